//! The job actor: feeds rows to a pipeline and hands what comes back to the writer.
//!
//! Two threads stand beside it, since files block: one reads, renders and tokenizes rows, the other
//! detokenizes, writes lines and commits them. Memory is bounded by credits: the reader takes one for each
//! row it hands over, and gets it back when the row's line goes to the writer. Rows that earlier runs have
//! finished pass by in bunches.

use std::collections::HashMap;
use std::future::Future;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};
use jobs::{
    FinishedRow, InputRecord, Line, LineFile, PreparedRow, Reader, Row, StopMatcher, Tokenizer, Unread,
    Writer, Written,
};
use kameo::Actor;
use kameo::actor::{ActorId, ActorRef, PreparedActor, WeakActorRef};
use kameo::error::{ActorStopReason, Infallible};
use kameo::mailbox;
use kameo::message::{Context, Message};
use scheduler::Completion;

use crate::error::{Error, Result, death_error, panic_message, with_causes};
use crate::link::is_delivered;
use crate::pipeline::{Completed, PipelineActor, Prompt};
use crate::start::Pipeline;

/// How often lines are put on disk and committed. This much work is lost at most when the program dies; a
/// commit takes a few syncs of 1 to 20 ms each, and the pipeline does not wait for them.
const COMMIT_INTERVAL: Duration = Duration::from_millis(500);

/// Finished rows that pass by in one message, which costs about as much as reading some rows.
const BUNCH_ROWS: usize = 1024;

/// No share of errors is judged among fewer rows than these: the first row of a good job may be a bad one.
const LEAST_ROWS_TO_JUDGE: u64 = 20;

/// Messages that can be under way to a job at once.
const fn mailbox_size(window: usize) -> usize {
    let mut sum = 0;
    sum += window; // A row in flight is one message: the row on its way in, or its completion. So is a bunch.
    sum += 1; // The end of the input.
    sum += 1; // The writer's last word.
    sum += 1; // An interrupt.
    sum
}

/// What a job works on.
pub struct JobOptions {
    /// Its rows.
    pub reader: Reader,
    /// Its lines.
    pub writer: Writer,
    /// Turns tokens into text, where the model has one.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// What the pipeline takes; a row beyond it becomes an error line.
    pub limits: scheduler::Options,
    /// The job stops once a greater share of its finished rows are error lines.
    pub max_error_rate: f64,
    /// Is told how far the job is.
    pub progress: Arc<JobProgress>,
}

/// How far a job is; the job writes, anybody reads.
#[derive(Debug, Default)]
pub struct JobProgress {
    /// Rows with an answer.
    pub completed: AtomicU64,
    /// Rows with an error line.
    pub failed: AtomicU64,
    /// Rows of these that earlier runs have finished.
    pub resumed: AtomicU64,
    /// Prompt tokens of the rows that this run has answered.
    pub prompt_tokens: AtomicU64,
    /// Tokens that this run has generated for them.
    pub generated_tokens: AtomicU64,
}

/// How a job ended.
#[derive(Debug)]
pub struct JobOutcome {
    /// What was read; nothing where the reader had not come to an end.
    pub input: Option<InputRecord>,
    /// What was written.
    pub written: Written,
    /// Somebody asked it to stop before its end.
    pub was_interrupted: bool,
    /// What stopped it, if it failed.
    pub failure: Option<Error>,
}

/// Runs a job to its end, or until `interrupt` resolves: then no further row is started, rows in flight
/// are given up, and the lines that are there are made whole.
///
/// # Errors
/// Only where the job could not even end in order; a job that failed says so in its outcome.
pub async fn run_job(
    pipeline: &Pipeline,
    options: JobOptions,
    interrupt: impl Future<Output = ()>,
) -> Result<JobOutcome> {
    let prepared = PreparedActor::<JobActor>::new(mailbox::bounded(mailbox_size(pipeline.window)));
    let job = prepared.actor_ref().clone();
    job.link(&pipeline.actor).await;
    let args = JobArgs { options, pipeline: pipeline.actor.clone(), window: pipeline.window };
    let mut running = prepared.spawn(args);
    let ended = tokio::select! {
        ended = &mut running => ended,
        () = interrupt => {
            // A job that has just ended does not hear this, and need not.
            let _ = job.tell(Interrupt).send().await;
            running.await
        }
    };
    match ended {
        Ok(Ok((job, _))) => Ok(job.outcome),
        Ok(Err(_)) | Err(_) => Err(Error::Ended("the job")),
    }
}

struct JobArgs {
    options: JobOptions,
    pipeline: ActorRef<PipelineActor>,
    window: usize,
}

struct JobActor {
    pipeline: ActorRef<PipelineActor>,
    tokenizer: Option<Arc<Tokenizer>>,
    limits: scheduler::Options,
    max_error_rate: f64,
    progress: Arc<JobProgress>,
    /// Rows in the pipeline, by their index.
    in_flight: HashMap<u64, PreparedRow>,
    /// What has become of finished rows that the reader did not come by, once it is done.
    unread: Unread,
    /// Gives the reader leave for another row; gone once no further row is wanted.
    credits: Option<Sender<()>>,
    /// To the writer; gone once the last line is on its way.
    lines: Option<Sender<Unwritten>>,
    outcome: JobOutcome,
}

/// The reader hands over a row.
struct RowRead(Row);

/// The reader has come by rows that have their lines already.
struct RowsFinished(Vec<FinishedRow>);

/// The reader is done; what has become of finished rows that it did not come by.
struct InputEnded(Result<(InputRecord, Unread)>);

/// The writer is done.
struct LinesEnded(Result<Written>);

/// The user wants to stop.
struct Interrupt;

/// What the writer makes a line of.
enum Unwritten {
    Completed(Box<PreparedRow>, Completion),
    Line(Line),
    /// Lines that are there already.
    Finished(Vec<FinishedRow>),
    /// That was all.
    End(Unread),
}

impl Actor for JobActor {
    type Args = JobArgs;
    type Error = Infallible;

    async fn on_start(args: JobArgs, job: ActorRef<Self>) -> std::result::Result<Self, Infallible> {
        let JobArgs { options, pipeline, window } = args;
        let JobOptions { reader, writer, tokenizer, limits, max_error_rate, progress } = options;
        let (credits, leave) = bounded(window);
        for () in std::iter::repeat_n((), window) {
            credits.try_send(()).expect("a new channel of that size has room");
        }
        let (lines, unwritten) = bounded(window);
        spawn_thread("reader", {
            let job = job.clone();
            move || {
                if let Err(error) = catch(|| read_rows(reader, &leave, &job)) {
                    let _ = job.tell(InputEnded(Err(error))).blocking_send();
                }
            }
        });
        spawn_thread("writer", {
            let tokenizer = tokenizer.clone();
            move || {
                let write = || write_lines(writer, &unwritten, tokenizer.as_ref());
                let written = catch(write).and_then(|written| written.map_err(|error| files_error(&error)));
                let _ = job.tell(LinesEnded(written)).blocking_send();
            }
        });
        Ok(JobActor {
            pipeline,
            tokenizer,
            limits,
            max_error_rate,
            progress,
            unread: Unread::Stays,
            in_flight: HashMap::new(),
            credits: Some(credits),
            lines: Some(lines),
            outcome: JobOutcome {
                input: None,
                written: Written::default(),
                was_interrupted: false,
                failure: None,
            },
        })
    }

    async fn on_link_died(
        &mut self,
        _: WeakActorRef<Self>,
        _: ActorId,
        reason: ActorStopReason,
    ) -> std::result::Result<ControlFlow<ActorStopReason>, Infallible> {
        self.fail(death_error(&reason));
        Ok(ControlFlow::Continue(())) // Until the writer has made its lines whole.
    }
}

impl JobActor {
    /// Sends a line's makings to the writer and lets the reader read on.
    async fn write(&mut self, unwritten: Unwritten) {
        self.count(&unwritten);
        self.send(unwritten);
        if let Some(credits) = &self.credits {
            let _ = credits.try_send(());
        }
        self.stop_when_too_many_failed();
        self.finish_when_done();
    }

    fn count(&self, unwritten: &Unwritten) {
        let progress = &self.progress;
        let add = |counter: &AtomicU64, count: usize| counter.fetch_add(count as u64, Ordering::Relaxed);
        match unwritten {
            Unwritten::Completed(_, completion) if completion.outcome.is_ok() => {
                add(&progress.prompt_tokens, completion.request.prompt.len());
                add(&progress.generated_tokens, completion.generated.tokens.len());
                add(&progress.completed, 1);
            }
            Unwritten::Finished(rows) => {
                let failed = rows.iter().filter(|row| row.file == LineFile::Errors).count();
                add(&progress.failed, failed);
                add(&progress.completed, rows.len() - failed);
                add(&progress.resumed, rows.len());
            }
            _ => {
                add(&progress.failed, 1);
            }
        }
    }

    fn send(&self, unwritten: Unwritten) {
        if let Some(lines) = &self.lines {
            // Full where the disk is slower than the pipeline: then the pipeline has to wait.
            let _ = tokio::task::block_in_place(|| lines.send(unwritten));
        }
    }

    fn stop_when_too_many_failed(&mut self) {
        let failed = self.progress.failed.load(Ordering::Relaxed);
        let finished = failed + self.progress.completed.load(Ordering::Relaxed);
        let max_error_rate = self.max_error_rate;
        if finished >= LEAST_ROWS_TO_JUDGE && failed as f64 > max_error_rate * finished as f64 {
            self.fail(Error::TooManyErrors { failed, finished, max_error_rate });
        }
    }

    fn finish_when_done(&mut self) {
        if self.outcome.input.is_some() && self.in_flight.is_empty() && self.lines.is_some() {
            self.send(Unwritten::End(self.unread));
            self.finish();
        }
    }

    /// Wants no more rows and no more lines; the writer's last word ends the actor.
    fn finish(&mut self) {
        self.credits = None;
        self.lines = None;
    }

    fn fail(&mut self, error: Error) {
        self.outcome.failure.get_or_insert(error);
        self.finish();
    }
}

impl Message<RowRead> for JobActor {
    type Reply = ();

    async fn handle(&mut self, RowRead(row): RowRead, ctx: &mut Context<Self, ()>) {
        let row = match row {
            Row::Request(row) => row,
            Row::Rejected(row) => return self.write(Unwritten::Line(Line::rejected(&row))).await,
            Row::Finished(row) => return self.write(Unwritten::Finished(vec![row])).await,
        };
        if let Err(error) = self.limits.check(&row.request) {
            let error = jobs::RowError::new("context_length_exceeded", error.to_string());
            return self.write(Unwritten::Line(Line::refused(&row, &error))).await;
        }
        let sampling = &row.request.sampling;
        let stop = (self.tokenizer.as_ref())
            .filter(|_| !sampling.stop.is_empty())
            .map(|tokenizer| StopMatcher::new(Arc::clone(tokenizer), sampling));
        let prompt = Prompt {
            tag: row.index,
            request: Arc::clone(&row.request),
            so_far: row.so_far.clone(),
            stop,
            completed: ctx.actor_ref().clone().recipient(),
            sampled: None,
        };
        self.in_flight.insert(row.index, *row);
        // A pipeline that is gone tells so through its link.
        is_delivered(self.pipeline.tell(prompt).try_send());
    }
}

impl Message<RowsFinished> for JobActor {
    type Reply = ();

    async fn handle(&mut self, RowsFinished(rows): RowsFinished, _: &mut Context<Self, ()>) {
        self.write(Unwritten::Finished(rows)).await;
    }
}

impl Message<Completed> for JobActor {
    type Reply = ();

    async fn handle(&mut self, Completed { tag, completion }: Completed, _: &mut Context<Self, ()>) {
        let row = self.in_flight.remove(&tag).expect("a completion answers a row in flight");
        self.write(Unwritten::Completed(Box::new(row), completion)).await;
    }
}

impl Message<InputEnded> for JobActor {
    type Reply = ();

    async fn handle(&mut self, InputEnded(input): InputEnded, _: &mut Context<Self, ()>) {
        match input {
            Ok((record, unread)) => {
                self.outcome.input = Some(record);
                self.unread = unread;
                self.finish_when_done();
            }
            Err(error) => self.fail(error),
        }
    }
}

impl Message<LinesEnded> for JobActor {
    type Reply = ();

    async fn handle(&mut self, LinesEnded(written): LinesEnded, ctx: &mut Context<Self, ()>) {
        match written {
            Ok(written) => self.outcome.written = written,
            Err(error) => self.fail(error),
        }
        ctx.stop();
    }
}

impl Message<Interrupt> for JobActor {
    type Reply = ();

    async fn handle(&mut self, _: Interrupt, _: &mut Context<Self, ()>) {
        self.outcome.was_interrupted = self.lines.is_some();
        self.finish();
    }
}

/// Reads rows as long as there is leave, then says how the input ended.
fn read_rows(mut reader: Reader, leave: &Receiver<()>, job: &ActorRef<JobActor>) {
    // Finished rows that are still to be handed over, before any row behind them.
    let mut bunch = Vec::new();
    loop {
        let next = reader.next();
        match next {
            Some(Ok(Row::Finished(row))) if bunch.len() + 1 < BUNCH_ROWS => {
                bunch.push(row);
                continue;
            }
            _ if bunch.is_empty() => {}
            _ => {
                let rows = RowsFinished(std::mem::take(&mut bunch));
                if leave.recv().is_err() || job.tell(rows).blocking_send().is_err() {
                    return; // The job wants no more rows, or is gone.
                }
            }
        }
        let ended = match next {
            Some(Ok(row)) => {
                if leave.recv().is_err() || job.tell(RowRead(row)).blocking_send().is_err() {
                    return;
                }
                continue;
            }
            Some(Err(error)) => Err(files_error(&error)),
            None if reader.is_limited() => Ok((reader.record(), Unread::Stays)),
            None => Ok((reader.record(), Unread::HasLeft)),
        };
        let _ = job.tell(InputEnded(ended)).blocking_send();
        return;
    }
}

/// Makes lines and writes them until the job wants no more.
fn write_lines(
    mut writer: Writer,
    unwritten: &Receiver<Unwritten>,
    tokenizer: Option<&Arc<Tokenizer>>,
) -> jobs::Result<Written> {
    let mut committed = Instant::now();
    loop {
        match unwritten.recv_timeout(COMMIT_INTERVAL) {
            Ok(Unwritten::Completed(row, completion)) => {
                writer.write(&Line::completed(&row, &completion, tokenizer, unix_seconds()))?;
            }
            Ok(Unwritten::Line(line)) => writer.write(&line)?,
            Ok(Unwritten::Finished(rows)) => rows.into_iter().try_for_each(|row| writer.keep(row))?,
            Ok(Unwritten::End(unread)) => return writer.finish(unread),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return writer.pause(),
        }
        if committed.elapsed() >= COMMIT_INTERVAL {
            writer.commit()?;
            committed = Instant::now();
        }
    }
}

/// Runs a thread's work; a panic in it must not leave the job waiting for a word that never comes.
pub(crate) fn catch<T>(work: impl FnOnce() -> T) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work))
        .map_err(|panic| Error::Files(format!("internal error: {}", panic_message(&*panic))))
}

fn spawn_thread(name: &str, run: impl FnOnce() + Send + 'static) {
    std::thread::Builder::new().name(name.to_owned()).spawn(run).expect("the system starts a thread");
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn files_error(error: &jobs::Error) -> Error {
    Error::Files(with_causes(error))
}
