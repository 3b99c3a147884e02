//! A deterministic simulation of whole jobs: one thread, no clock, everything in an order drawn from a seed.
//!
//! Real are the reader, [`JobState`], the scheduler, the writer, its journal and its files. Simulated are
//! the stages: a token is a plain function of the one before it and its position, so that what a row must
//! get is known without them; and the actors, in whose place two queues stand. Which of them moves next is
//! drawn. Programs die between any two events; stages end, by themselves and over rows that are deadly; replicas of the
//! pipeline fail for good while others go on; and the input changes between runs. Deaths inside a commit and what the pipeline actor does about a stage
//! are not played here: tests/jobs/crashes.rs and this crate's `tests` have them.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jobs::{
    ModelText, ModelTextOptions, Order, OutputFolder, Preparer, Reader, RowOptions, SamplingOptions, Unread,
    Writer,
};
use scheduler::{
    Completion, Generated, MicroBatch, MicroBatchOutput, RequestKey, Scheduler, SequenceId, Slice,
    SliceOutput, TokenId,
};
use serde_json::Value;

use crate::job::{Fate, JobProgress, JobState, LineMaker, Rooms, Submission, Unwritten};

/// Seeds that every test run plays. `SPANWISE_SIMULATION_SEEDS` asks for more.
const SEEDS: u64 = 1000;

/// A prompt that begins with it ends the stage.
const DEADLY: TokenId = 99;

const VOCAB: usize = 100;
const CONTEXT: usize = 32;

/// Small random numbers from a seed: SplitMix64 (Steele, Lea and Flood, 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn is_one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

fn token_after(token: TokenId, position: usize) -> TokenId {
    (token * 31 + position as u32 * 7) % 89 + 5
}

/// One line of an input, and what must become of it.
#[derive(Debug, Clone, PartialEq)]
struct InputRow {
    id: usize,
    prompt: Vec<TokenId>,
    max_tokens: usize,
    choices: usize,
}

impl InputRow {
    fn random(id: usize, random: &mut Random) -> Self {
        let mut prompt: Vec<TokenId> = (0..=random.below(6)).map(|_| random.below(90) as u32).collect();
        match random.below(12) {
            0 => prompt[0] = DEADLY,
            1 => prompt = vec![1; CONTEXT],
            2 => prompt = vec![VOCAB as TokenId],
            _ => {}
        }
        let choices = if random.is_one_in(4) { 1 + random.below(4) } else { 1 };
        InputRow { id, prompt, max_tokens: 1 + random.below(12), choices }
    }

    fn line(&self) -> String {
        let InputRow { id, prompt, max_tokens, choices } = self;
        let body = format!(r#"{{"prompt": {prompt:?}, "max_tokens": {max_tokens}, "n": {choices}}}"#);
        format!(r#"{{"custom_id": "{id}", "method": "POST", "url": "/v1/completions", "body": {body}}}"#)
    }

    fn expected(&self) -> Result<Vec<TokenId>, &'static str> {
        match self.prompt[..] {
            [DEADLY, ..] => return Err("ends_stage"),
            _ if self.prompt.len() >= CONTEXT => return Err("context_length_exceeded"),
            [token, ..] if token >= VOCAB as TokenId => return Err("invalid_token_id"),
            _ => {}
        }
        let mut tokens = self.prompt.clone();
        for position in tokens.len()..tokens.len() + self.max_tokens {
            tokens.push(token_after(tokens[position - 1], position));
        }
        Ok(tokens.split_off(self.prompt.len()))
    }
}

/// A folder with an input and an output, over all runs.
struct Job {
    folder: PathBuf,
    rows: Vec<InputRow>,
    next_id: usize,
    options: scheduler::Options,
    /// Of each replica.
    windows: Vec<usize>,
    checkpoint_tokens: usize,
    /// Rows whose lines are committed, and which must not be computed again.
    durable: HashSet<RequestKey>,
    /// Lengths of the files of lines as of the last commit.
    committed: [u64; 2],
}

const FILES: [&str; 2] = ["output.jsonl", "errors.jsonl"];

/// How a run ended.
#[derive(Debug, PartialEq)]
enum End {
    Done,
    Died,
    Paused,
}

impl Job {
    fn new(folder: PathBuf, random: &mut Random) -> Self {
        let rows: Vec<InputRow> = (0..1 + random.below(14)).map(|id| InputRow::random(id, random)).collect();
        let page_tokens = 1 + random.below(8);
        let num_lanes = [1, 1, 2, 3][random.below(4)];
        let options = scheduler::Options {
            num_stages: 1 + random.below(3),
            micro_batch_tokens: 1 + random.below(24),
            max_sequences: 1 + random.below(6),
            num_pages: num_lanes * (CONTEXT.div_ceil(page_tokens) + [0, 1, CONTEXT][random.below(3)]),
            num_lanes,
            page_tokens,
            context_tokens: CONTEXT,
            efficient_tokens: 1,
            num_memories: 1,
            feeds_back: random.is_one_in(2),
            is_ahead: random.is_one_in(2),
        };
        Job {
            folder,
            next_id: rows.len(),
            rows,
            options,
            windows: (0..1 + random.below(3)).map(|_| 1 + random.below(8)).collect(),
            checkpoint_tokens: 1 + random.below(5),
            durable: HashSet::new(),
            committed: [0; 2],
        }
    }

    fn out(&self) -> PathBuf {
        self.folder.join("out")
    }

    /// Runs until the job is done, however often it dies; then every row has its line.
    fn play(&mut self, random: &mut Random) {
        loop {
            self.write_input();
            let patience = if random.is_one_in(3) { usize::MAX } else { random.below(120) };
            match self.run(random, patience) {
                End::Done => break,
                End::Died => self.tear(random),
                End::Paused => {}
            }
            if random.is_one_in(3) {
                self.change_input(random);
            }
        }
        self.check();
    }

    fn write_input(&self) {
        let lines: Vec<String> = self.rows.iter().map(InputRow::line).collect();
        fs::write(self.folder.join("input.jsonl"), lines.join("\n")).expect("write the input");
    }

    fn change_input(&mut self, random: &mut Random) {
        for _ in 0..1 + random.below(4) {
            let at = random.below(self.rows.len());
            match random.below(4) {
                0 => {
                    self.rows.insert(at, InputRow::random(self.next_id, random));
                    self.next_id += 1;
                }
                1 if self.rows.len() > 1 => drop(self.rows.remove(at)),
                2 => self.rows[at] = InputRow::random(self.rows[at].id, random),
                _ => self.rows.swap(0, at),
            }
        }
    }

    /// What a dying machine may leave behind what was committed: part of it, or bytes of no meaning.
    fn tear(&self, random: &mut Random) {
        for (file, committed) in FILES.iter().zip(self.committed) {
            let Ok(mut bytes) = fs::read(self.out().join(file)) else { continue };
            let uncommitted = bytes.len() - committed as usize;
            bytes.truncate(committed as usize + random.below(uncommitted + 1));
            if random.is_one_in(4) {
                bytes.extend_from_slice(b"{\"torn\": tr");
            }
            fs::write(self.out().join(file), bytes).expect("write what is left");
        }
    }

    fn run(&mut self, random: &mut Random, patience: usize) -> End {
        let mut run = Run::open(self);
        for _ in 0..patience {
            run.event(random);
            if run.writer.is_none() {
                return End::Done;
            }
        }
        if random.is_one_in(2) {
            return End::Died;
        }
        run.pause();
        End::Paused
    }

    /// Every row has one line, the right one, in the order of the input; and there is no other.
    fn check(&self) {
        let mut lines = FILES.map(|file| {
            let text = fs::read_to_string(self.out().join(file)).unwrap_or_default();
            text.lines()
                .map(|line| serde_json::from_str(line).expect("a whole line"))
                .collect::<VecDeque<Value>>()
        });
        for row in &self.rows {
            let expected = row.expected();
            let line = lines[usize::from(expected.is_err())].pop_front();
            let line = line.unwrap_or_else(|| panic!("{row:?} has no line"));
            assert_eq!(line["custom_id"], row.id.to_string(), "{row:?} has another's line: {line}");
            match expected {
                Ok(tokens) => {
                    let choices = line["response"]["body"]["choices"].as_array().expect("choices");
                    assert_eq!(choices.len(), row.choices, "{row:?}: {line}");
                    for choice in choices {
                        assert_eq!(choice["token_ids"], serde_json::json!(tokens), "{row:?}: {line}");
                    }
                }
                Err(code) => {
                    let text = line.to_string();
                    assert!(
                        text.contains(&format!(r#""code":"{code}""#)),
                        "{row:?}, expected {code}: {text}"
                    );
                }
            }
        }
        assert!(lines.iter().all(VecDeque::is_empty), "lines of no row: {lines:?}");
    }
}

/// One life of the program.
struct Run<'a> {
    job: &'a mut Job,
    reader: Option<Reader>,
    /// Gone when it has ended.
    writer: Option<Writer>,
    make: LineMaker,
    state: JobState,
    /// None where it has failed.
    replicas: Vec<Option<Replica>>,
    credits: usize,
    /// To the writer.
    unwritten: VecDeque<Unwritten>,
    /// Written since the last commit.
    written: Vec<RequestKey>,
}

/// One pipeline.
struct Replica {
    scheduler: Scheduler,
    /// What each sequence is, and how many of its tokens were sent to be kept.
    sequences: BTreeMap<SequenceId, (u64, usize)>,
    in_flight: VecDeque<MicroBatch>,
    /// What the last micro-batch that came back has drawn: the one behind it may begin with that.
    drawn: Vec<Option<TokenId>>,
}

impl<'a> Run<'a> {
    fn open(job: &'a mut Job) -> Self {
        let preparer = preparer(&job.folder);
        let output = OutputFolder::open(&job.out(), false).expect("an output folder");
        let begun = output.begin(Order::Input, &preparer.settings(), 0, false);
        let (writer, finished) = begun.expect("a folder of the same job");
        let reader = Reader::open(&job.folder.join("input.jsonl"), preparer, None).expect("the input");
        let replica = |_: &usize| {
            let scheduler = Scheduler::new(job.options.clone());
            Some(Replica {
                scheduler,
                sequences: BTreeMap::new(),
                in_flight: VecDeque::new(),
                drawn: Vec::new(),
            })
        };
        let rooms = Rooms::new(job.windows.iter().copied());
        Run {
            reader: Some(reader.after(finished)),
            writer: Some(writer),
            make: LineMaker { tokenizer: None, created: 0 },
            state: JobState::new(job.options.clone(), rooms, 1.0, Arc::new(JobProgress::default())),
            replicas: job.windows.iter().map(replica).collect(),
            credits: job.windows.iter().sum(),
            unwritten: VecDeque::new(),
            written: Vec::new(),
            job,
        }
    }

    fn event(&mut self, random: &mut Random) {
        let at = random.below(self.replicas.len());
        let num_alive = self.replicas.iter().flatten().count();
        match (random.below(16), &mut self.replicas[at]) {
            (0..=3, _) if self.credits > 0 => self.read(),
            (4..=6, Some(replica)) => {
                if let Some(batch) = replica.scheduler.next_micro_batch() {
                    replica.in_flight.push_back(batch);
                }
            }
            (7..=9, Some(replica)) if !replica.in_flight.is_empty() => self.complete(at),
            (10..=13, _) => self.write(),
            (14, _) if random.is_one_in(3) => self.commit(),
            // Over several sequences, so that none is convicted for what it did not do.
            (15, Some(replica)) if random.is_one_in(6) => {
                let crowded = replica.in_flight.iter().position(|batch| batch.slices.len() > 1);
                if let Some(index) = crowded {
                    self.end_stage(at, index);
                }
            }
            (15, Some(_)) if random.is_one_in(30) && num_alive > 1 => {
                self.replicas[at] = None;
                assert!(self.state.replica_failed(at), "another replica is there");
                let submissions = self.state.hand_out();
                self.submit(submissions);
            }
            _ => {}
        }
    }

    fn read(&mut self) {
        let Some(reader) = &mut self.reader else { return };
        match reader.next() {
            Some(row) => {
                self.credits -= 1;
                match self.state.row(row.expect("the input can be read")) {
                    Fate::Submit(submissions) => self.submit(submissions),
                    Fate::Write(unwritten) => self.send(unwritten),
                }
            }
            None => {
                self.state.input_ended(reader.record(), Unread::HasLeft);
                self.reader = None;
                self.end_when_done();
            }
        }
    }

    fn submit(&mut self, submissions: Vec<Submission>) {
        for Submission { replica: at, tag, request, so_far, is_kept } in submissions {
            // More than any sequence has.
            let num_kept = if is_kept { so_far.tokens.len() } else { CONTEXT };
            let replica = self.replica(at);
            let sequence = replica.scheduler.submit(request, so_far).expect("it was checked to fit");
            replica.sequences.insert(sequence, (tag, num_kept));
            let finished = replica.scheduler.drain_finished();
            self.completed(at, finished);
        }
    }

    fn replica(&mut self, at: usize) -> &mut Replica {
        self.replicas[at].as_mut().expect("a replica that has not failed")
    }

    fn complete(&mut self, at: usize) {
        let is_deadly = |slice: &Slice| slice.request.prompt[0] == DEADLY && slice.first_position == 0;
        if self.replica(at).in_flight[0].slices.iter().any(is_deadly) {
            return self.end_stage(at, 0);
        }
        let replica = self.replica(at);
        let batch = replica.in_flight.pop_front().expect("one is in flight");
        let drawn = std::mem::take(&mut replica.drawn);
        let answer = |slice: &Slice| SliceOutput {
            sequence: slice.sequence,
            token: slice.sample.then(|| {
                let last = match slice.fed_back {
                    Some(fed_back) => drawn[fed_back.slice].expect("it was drawn before"),
                    None => *slice.tokens.last().expect("a slice has tokens"),
                };
                token_after(last, slice.first_position as usize + slice.tokens.len())
            }),
            logprobs: None,
            prompt_logprobs: Vec::new(),
            failure: None,
        };
        let output = MicroBatchOutput { id: batch.id, slices: batch.slices.iter().map(answer).collect() };
        replica.drawn = output.slices.iter().map(|slice| slice.token).collect();
        let completions = replica.scheduler.complete(output, |_, _| false);
        self.completed(at, completions);
        let every = self.job.checkpoint_tokens;
        let replica = self.replicas[at].as_mut().expect("it has not failed");
        for (&sequence, (tag, num_kept)) in &mut replica.sequences {
            let Some(generated) = replica.scheduler.generated(sequence) else { continue };
            if generated.tokens.len() >= *num_kept + every {
                let piece: Generated = generated.since(*num_kept);
                self.unwritten.push_back(self.state.checkpoint(*tag, *num_kept, piece));
                *num_kept = generated.tokens.len();
            }
        }
    }

    fn end_stage(&mut self, at: usize, index: usize) {
        let replica = self.replica(at);
        let fatal = replica.in_flight[index].id;
        replica.in_flight.clear();
        let convicted = replica.scheduler.stage_ended(Some(fatal));
        self.completed(at, convicted.into_iter().collect());
    }

    fn completed(&mut self, at: usize, completions: Vec<Completion>) {
        for completion in completions {
            let key = completion.request.key;
            assert!(!self.job.durable.contains(&key), "{key:?} has its line, and is computed again");
            let (tag, _) = (self.replica(at).sequences)
                .remove(&completion.sequence)
                .expect("a sequence that was submitted");
            if let Some(unwritten) = self.state.completed(tag, completion) {
                self.send(unwritten);
                let submissions = self.state.hand_out();
                self.submit(submissions);
            }
        }
    }

    fn send(&mut self, unwritten: Unwritten) {
        self.unwritten.push_back(unwritten);
        self.credits += 1;
        self.end_when_done();
    }

    fn end_when_done(&mut self) {
        self.unwritten.extend(self.state.end());
    }

    fn write(&mut self) {
        let mut writer = self.writer.take().expect("the run has not ended");
        match self.unwritten.pop_front() {
            Some(Unwritten::End(unread)) => {
                writer.finish(unread).expect("a disk with room");
                return;
            }
            Some(unwritten) => {
                if let Unwritten::Completed(row, _) = &unwritten {
                    self.written.push(row.request.key);
                }
                self.make.write(&mut writer, unwritten).expect("a disk with room");
            }
            None => {}
        }
        self.writer = Some(writer);
    }

    fn commit(&mut self) {
        if let Some(writer) = &mut self.writer {
            writer.commit().expect("a disk with room");
        }
        self.committed();
    }

    fn committed(&mut self) {
        self.job.durable.extend(self.written.drain(..));
        let length = |file: &str| fs::metadata(self.job.out().join(file)).map_or(0, |file| file.len());
        self.job.committed = FILES.map(length);
    }

    /// Ends as after Ctrl-C: what is on its way to the writer is written.
    fn pause(mut self) {
        while self.writer.is_some() && !self.unwritten.is_empty() {
            self.write();
        }
        if let Some(writer) = self.writer.take() {
            writer.pause().expect("a disk with room");
        }
        self.committed();
    }
}

fn preparer(folder: &Path) -> Preparer {
    let model = folder.join("model");
    fs::create_dir_all(&model).expect("make a folder");
    let text = ModelTextOptions { vocab_size: VOCAB, eos_token_ids: vec![], unix_seconds: 0 };
    let text = ModelText::open(&model, &text).expect("a model without text files");
    let rows = RowOptions {
        model_identity: "simulated".into(),
        prompt: None,
        grader: None,
        sampling: SamplingOptions::default(),
        seed: 0,
        max_context_tokens: CONTEXT as u32,
    };
    Preparer::new(Arc::new(text), rows).expect("plain options")
}

/// A folder whose syncs cost nothing, where there is one: what is simulated is order, not speed.
fn memory() -> PathBuf {
    let memory = PathBuf::from("/dev/shm");
    if memory.is_dir() { memory } else { std::env::temp_dir() }
}

fn play(seed: u64) {
    let folder = tempfile::tempdir_in(memory()).expect("a temporary folder");
    let mut random = Random(seed);
    Job::new(folder.path().to_owned(), &mut random).play(&mut random);
}

#[test]
fn no_row_is_lost_or_doubled_under_any_order_of_completions_crashes_and_restarts() {
    let asked = std::env::var("SPANWISE_SIMULATION_SEEDS").ok();
    let seeds = asked.map_or(SEEDS, |seeds| seeds.parse().expect("a number of seeds"));
    for seed in 0..seeds {
        // The seed of a failure is the last line of its output.
        std::panic::catch_unwind(|| play(seed)).unwrap_or_else(|_| panic!("seed {seed}"));
    }
}
