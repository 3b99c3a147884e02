//! What a job knows, and what follows from each event: no actor, no thread, no clock.
//!
//! Every row that comes in goes out once: to a replica of the pipeline and back, or straight to the writer. A row of a
//! replica that fails for good goes to another. The job actor carries events here and decisions away, and so does the
//! simulation.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use jobs::{FinishedRow, InputRecord, Line, LineFile, MAX_CHOICES, PreparedRow, Row, RowError, Unread};
use scheduler::{Completion, Generated, Request, RequestKey};

use super::JobProgress;
use super::rooms::Rooms;
use crate::error::Error;

/// No share of errors is judged among fewer rows than these: the first row of a good job may be a bad one.
const LEAST_ROWS_TO_JUDGE: u64 = 20;

/// What the writer makes a line of, or keeps.
pub(crate) enum Unwritten {
    Completed(Box<PreparedRow>, Vec<Completion>),
    Line(Line),
    /// Lines that are there already.
    Finished(Vec<FinishedRow>),
    /// Tokens of a row that has no line yet, after the first so many.
    Checkpoint(RequestKey, usize, Generated),
    /// That was all.
    End(Unread),
}

/// What becomes of a row.
pub(crate) enum Fate {
    /// A pipeline answers it, with a sequence for each choice.
    Submit(Vec<Submission>),
    /// It has its line.
    Write(Unwritten),
}

/// What a pipeline is asked for one choice of a row.
pub(crate) struct Submission {
    /// Which replica of the pipeline.
    pub(crate) replica: usize,
    /// Its name in the pipeline.
    pub(crate) tag: u64,
    pub(crate) request: Arc<Request>,
    pub(crate) so_far: Generated,
    /// Whether its tokens are to be kept until it is done.
    pub(crate) is_kept: bool,
}

/// A row in a pipeline, or on its way to one.
struct InFlight {
    row: PreparedRow,
    /// The replica that has it; none where it waits for room.
    replica: Option<usize>,
    /// By choice, as far as they are done.
    completions: Vec<Option<Completion>>,
    /// What its replica has told of it, where another could take it over; it comes after what earlier runs had.
    told: Generated,
}

/// The rows of one job on their way.
pub(crate) struct JobState {
    limits: scheduler::Options,
    max_error_rate: f64,
    progress: Arc<JobProgress>,
    /// Rows in the pipelines, by their index.
    in_flight: HashMap<u64, InFlight>,
    /// Rows of these that no pipeline has room for, by their index.
    waiting: VecDeque<u64>,
    rooms: Rooms,
    /// What was read, and what has become of finished rows that the reader did not come by; once it is done.
    input: Option<(InputRecord, Unread)>,
}

impl JobState {
    /// A job on pipelines that take rows within `limits`, as many at once as `rooms` has.
    pub(crate) fn new(
        limits: scheduler::Options,
        rooms: Rooms,
        max_error_rate: f64,
        progress: Arc<JobProgress>,
    ) -> Self {
        let (in_flight, waiting) = (HashMap::new(), VecDeque::new());
        JobState { limits, max_error_rate, progress, in_flight, waiting, rooms, input: None }
    }

    /// The reader hands over a row.
    pub(crate) fn row(&mut self, row: Row) -> Fate {
        let row = match row {
            Row::Request(row) => row,
            Row::Rejected(row) => return self.write(Unwritten::Line(Line::rejected(&row))),
            Row::Finished(row) => return self.write(Unwritten::Finished(vec![row])),
        };
        if let Err(error) = self.limits.check(&row.request) {
            let error = RowError::new("context_length_exceeded", error.to_string());
            return self.write(Unwritten::Line(Line::refused(&row, &error)));
        }
        let index = row.index;
        let completions = (0..row.reply.choices).map(|_| None).collect();
        let in_flight = InFlight { row: *row, replica: None, completions, told: Generated::default() };
        self.in_flight.insert(index, in_flight);
        self.waiting.push_back(index);
        Fate::Submit(self.hand_out())
    }

    /// Gives waiting rows to the pipelines, as far as they have room. Rows wait only after a replica has failed.
    pub(crate) fn hand_out(&mut self) -> Vec<Submission> {
        let mut submissions = Vec::new();
        while let Some(index) = self.waiting.front()
            && let Some(replica) = self.rooms.take()
        {
            let in_flight = self.in_flight.get_mut(index).expect("a row that waits is in flight");
            in_flight.replica = Some(replica);
            submissions.extend(in_flight.submissions(replica));
            self.waiting.pop_front();
        }
        submissions
    }

    /// A replica has failed for good: its rows are to wait for room in another. False when there is none.
    pub(crate) fn replica_failed(&mut self, replica: usize) -> bool {
        let is_there_another = self.rooms.close(replica);
        let of_it = |(index, row): (&u64, &mut InFlight)| {
            let is_of_it = row.replica == Some(replica);
            is_of_it.then(|| {
                row.replica = None;
                *index
            })
        };
        let mut rows: Vec<u64> = self.in_flight.iter_mut().filter_map(of_it).collect();
        rows.sort_unstable(); // They came before those that wait already.
        rows.into_iter().rev().for_each(|index| self.waiting.push_front(index));
        is_there_another
    }

    /// The reader has come by rows that have their lines already.
    pub(crate) fn finished(&self, rows: Vec<FinishedRow>) -> Unwritten {
        self.counted(Unwritten::Finished(rows))
    }

    /// A pipeline is done with a choice of a row. What there is to write, once it is with all of them.
    pub(crate) fn completed(&mut self, tag: u64, completion: Completion) -> Option<Unwritten> {
        let (index, choice) = row_and_choice(tag);
        let in_flight = self.in_flight.get_mut(&index).expect("a completion answers a row in flight");
        in_flight.completions[choice] = Some(completion);
        if in_flight.completions.iter().any(Option::is_none) {
            return None;
        }
        let InFlight { row, replica, completions, .. } = self.in_flight.remove(&index).expect("it is there");
        self.rooms.give_back(replica.expect("a row that was answered was handed out"));
        Some(self.counted(Unwritten::Completed(Box::new(row), completions.into_iter().flatten().collect())))
    }

    /// A pipeline has more tokens of a row than the first so many.
    pub(crate) fn checkpoint(&mut self, tag: u64, first: usize, piece: Generated) -> Unwritten {
        let (index, _) = row_and_choice(tag);
        let in_flight = self.in_flight.get_mut(&index).expect("a checkpoint is of a row in flight");
        if self.rooms.are_several() {
            in_flight.told.extend(&piece);
        }
        Unwritten::Checkpoint(in_flight.row.request.key, first, piece)
    }

    /// The reader is done.
    pub(crate) fn input_ended(&mut self, record: InputRecord, unread: Unread) {
        self.input = Some((record, unread));
    }

    /// The last word to the writer, once nothing is on its way any more.
    pub(crate) fn end(&self) -> Option<Unwritten> {
        let (_, unread) = self.input.as_ref()?;
        self.in_flight.is_empty().then_some(Unwritten::End(*unread))
    }

    /// What was read; nothing where the reader had not come to an end.
    pub(crate) fn into_input(self) -> Option<InputRecord> {
        self.input.map(|(record, _)| record)
    }

    /// More rows have failed than may.
    pub(crate) fn too_many_failed(&self) -> Option<Error> {
        let failed = self.progress.failed.load(Ordering::Relaxed);
        let finished = failed + self.progress.completed.load(Ordering::Relaxed);
        let max_error_rate = self.max_error_rate;
        // Rows that are refused are finished at once. Those that are still computed may all be good ones.
        let judged = finished + self.in_flight.len() as u64;
        let is_too_many = finished >= LEAST_ROWS_TO_JUDGE && failed as f64 > max_error_rate * judged as f64;
        is_too_many.then_some(Error::TooManyErrors { failed, judged, max_error_rate })
    }

    fn write(&self, unwritten: Unwritten) -> Fate {
        Fate::Write(self.counted(unwritten))
    }

    fn counted(&self, unwritten: Unwritten) -> Unwritten {
        let progress = &self.progress;
        let add = |counter: &AtomicU64, count: usize| counter.fetch_add(count as u64, Ordering::Relaxed);
        match &unwritten {
            Unwritten::Completed(row, completions) if completions.iter().all(|done| done.outcome.is_ok()) => {
                let generated = completions.iter().map(|done| done.generated.tokens.len()).sum::<usize>();
                add(&progress.prompt_tokens, row.request.prompt.len());
                add(&progress.generated_tokens, generated - row.so_far.tokens.len());
                add(&progress.completed, 1);
            }
            Unwritten::Finished(rows) => {
                let failed = rows.iter().filter(|row| row.file == LineFile::Errors).count();
                add(&progress.failed, failed);
                add(&progress.completed, rows.len() - failed);
                add(&progress.resumed, rows.len());
            }
            Unwritten::Completed(..) | Unwritten::Line(_) => {
                add(&progress.failed, 1);
            }
            Unwritten::Checkpoint(..) | Unwritten::End(_) => {}
        }
        unwritten
    }
}

impl InFlight {
    /// What a replica is asked for the choices that are not done.
    fn submissions(&self, replica: usize) -> impl Iterator<Item = Submission> {
        let is_open = |(_, completion): &(usize, &Option<Completion>)| completion.is_none();
        let open = self.completions.iter().enumerate().filter(is_open);
        open.map(move |(choice, _)| self.submission(replica, choice as u32))
    }

    fn submission(&self, replica: usize, choice: u32) -> Submission {
        let row = &self.row;
        let request = match choice {
            0 => Arc::clone(&row.request),
            sample => Arc::new(Request { sample, ..Request::clone(&row.request) }),
        };
        // The journal keeps one sequence a row.
        let is_kept = row.reply.choices == 1;
        let so_far = Some(row.so_far.clone()).filter(|so_far| is_kept && request.goes_on_from(so_far));
        let mut so_far = so_far.unwrap_or_default();
        so_far.extend(&self.told);
        let tag = row.index * u64::from(MAX_CHOICES) + u64::from(choice);
        Submission { replica, tag, request, so_far, is_kept }
    }
}

fn row_and_choice(tag: u64) -> (u64, usize) {
    (tag / u64::from(MAX_CHOICES), (tag % u64::from(MAX_CHOICES)) as usize)
}
