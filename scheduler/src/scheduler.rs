//! Requests in, micro-batches out, answers in, completions out.
//!
//! The scheduler takes events (`submit`, `complete`, `stage_ended`) and returns decisions
//! (`next_micro_batch`); it never waits and never looks at a clock. It is deterministic: the same
//! events in the same order give the same decisions. What it must never break, and
//! [`Scheduler::check_integrity`] asserts:
//!
//! - every page is free or has one owner, and a sequence holds just the pages its issued positions fill, all of one lane;
//! - a sequence is waiting, running or gone, and a running one stands in at most one queue;
//! - micro-batches complete in the order of issue, since every stage takes them in turn.
//!
//! Everything that is submitted ends. Only a sequence older than another takes its pages away, so
//! the oldest one of a lane keeps its own; and once nothing is in flight all other pages of its lane are within
//! its reach, which `check` made sure are enough.

mod compose;
mod flow;
mod integrity;

pub use flow::Flow;

use std::collections::{BTreeMap, VecDeque};
use std::mem;
use std::sync::Arc;

use crate::backlog::{Backlog, Need, Pages};
use crate::error::Error;
use crate::micro_batch::{Failure, MicroBatchId, MicroBatchOutput, SliceOutput};
use crate::options::Options;
use crate::pages::PagePool;
use crate::request::{Completion, FinishReason, Generated, Request, SequenceId, TokenId};
use crate::running::{Running, Seat};
use crate::sequence::{Asked, Phase, Progress, Sequence};
use crate::trials::Trials;

/// Decides which tokens of which sequence travel next.
///
/// A prompt of three tokens with budgets of two: it travels in two micro-batches, and only the last of them draws.
///
/// ```
/// use scheduler::{
///     FinishReason, Generated, MicroBatchOutput, Options, Request, RequestKey, Sampling, Scheduler, SliceOutput,
/// };
/// use std::sync::Arc;
///
/// let mut scheduler = Scheduler::new(Options {
///     num_stages: 1,
///     micro_batch_tokens: 2,
///     max_sequences: 8,
///     num_pages: 4,
///     num_lanes: 1,
///     page_tokens: 16,
///     context_tokens: 64,
///     efficient_tokens: 1,
///     num_memories: 1,
///     feeds_back: false,
///     is_ahead: false,
/// });
/// let sampling = Arc::new(Sampling::greedy(1));
/// let request = Request { key: RequestKey(7), prompt: vec![3, 1, 4], sampling, sample: 0 };
/// scheduler.submit(Arc::new(request), Generated::default())?;
///
/// let (mut issued, mut ended) = (vec![], vec![]);
/// while let Some(micro_batch) = scheduler.next_micro_batch() {
///     issued.push(micro_batch.num_tokens());
///     // A model that says 42 whatever it is asked.
///     let answer = micro_batch.slices.iter().map(|slice| SliceOutput {
///         sequence: slice.sequence,
///         token: slice.sample.then_some(42),
///         logprobs: None,
///         prompt_logprobs: vec![],
///         failure: None,
///     });
///     let output = MicroBatchOutput { id: micro_batch.id, slices: answer.collect() };
///     ended.extend(scheduler.complete(output, |_, _| false));
/// }
/// assert_eq!(issued, [2, 1]);
/// assert_eq!(ended[0].generated.tokens, [42]);
/// assert_eq!(ended[0].outcome, Ok(FinishReason::Length));
/// # Ok::<(), scheduler::Error>(())
/// ```
#[derive(Debug)]
pub struct Scheduler {
    options: Options,
    pages: PagePool,
    /// By age, so that a preempted sequence comes back before all that were submitted after it.
    waiting: BTreeMap<SequenceId, Sequence>,
    running: Running,
    /// Running sequences whose next decode step can go, in the order in which they became ready.
    ready: VecDeque<Seat>,
    backlog: Backlog,
    in_flight: VecDeque<InFlight>,
    decodes_in_flight: usize,
    tokens_in_flight: usize,
    /// Running sequences that do not run ahead.
    num_in_step: usize,
    /// Ended without a micro-batch, to be fetched by `drain_finished`.
    finished: Vec<Completion>,
    next_sequence: SequenceId,
    next_micro_batch: MicroBatchId,
    trials: Trials,
    stats: Stats,
}

/// What the scheduler has done since it was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Tokens issued in prefill, those computed again included.
    pub prefill_tokens: u64,
    /// Tokens issued as decode steps.
    pub decode_tokens: u64,
    /// How often a sequence lost its pages to an older one.
    pub preemptions: u64,
    /// Tokens issued again after a preemption.
    pub recomputed_tokens: u64,
}

impl std::ops::AddAssign for Stats {
    fn add_assign(&mut self, other: Self) {
        self.prefill_tokens += other.prefill_tokens;
        self.decode_tokens += other.decode_tokens;
        self.preemptions += other.preemptions;
        self.recomputed_tokens += other.recomputed_tokens;
    }
}

/// A micro-batch on its way.
#[derive(Debug)]
struct InFlight {
    id: MicroBatchId,
    parts: Vec<Part>,
}

/// One slice of it.
#[derive(Debug)]
struct Part {
    seat: Seat,
    /// Positions of its sequence that are computed with it.
    end: usize,
    asked: Asked,
    is_decode: bool,
}

impl Scheduler {
    /// A scheduler with nothing to do. Every option must be positive.
    pub fn new(options: Options) -> Self {
        options.assert_sane();
        Self {
            pages: PagePool::new(options.num_pages, options.num_lanes),
            options,
            waiting: BTreeMap::new(),
            running: Running::default(),
            ready: VecDeque::new(),
            backlog: Backlog::default(),
            in_flight: VecDeque::new(),
            decodes_in_flight: 0,
            tokens_in_flight: 0,
            num_in_step: 0,
            finished: vec![],
            next_sequence: SequenceId(0),
            next_micro_batch: MicroBatchId(0),
            trials: Trials::default(),
            stats: Stats::default(),
        }
    }

    /// What it was made with.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Queues a request, or what is left of it after `so_far`. One that wants nothing computed ends at once:
    /// see [`Self::drain_finished`].
    ///
    /// # Panics
    /// Where the request cannot go on from `so_far`: see [`Request::goes_on_from`].
    pub fn submit(&mut self, request: Arc<Request>, so_far: Generated) -> Result<SequenceId, Error> {
        self.options.check(&request)?;
        let id = self.next_sequence;
        self.next_sequence.0 += 1;
        let feeds_back = self.options.feeds_back && self.options.num_stages == 1;
        let mut sequence = Sequence::new(id, request, so_far, feeds_back);
        if sequence.max_positions() == 0 {
            self.finished.push(sequence.completion(Ok(FinishReason::Length)));
        } else {
            self.waiting.insert(id, sequence);
        }
        Ok(id)
    }

    /// The sequences that ended with nothing to compute, since they want neither a token nor a score.
    ///
    /// All others end in [`Self::complete`]. To be asked after `submit`.
    pub fn drain_finished(&mut self) -> Vec<Completion> {
        mem::take(&mut self.finished)
    }

    /// Takes the answer to the oldest micro-batch in flight and returns the sequences that it ends.
    ///
    /// `stops` says whether a token completes a stop string; it is asked once for each token that a
    /// request with stop strings gets, and minds `min_tokens` itself.
    pub fn complete(
        &mut self,
        output: MicroBatchOutput,
        mut stops: impl FnMut(SequenceId, TokenId) -> bool,
    ) -> Vec<Completion> {
        let InFlight { id, parts } =
            self.in_flight.pop_front().expect("an answer belongs to a micro-batch in flight");
        assert_eq!(output.id, id, "micro-batches complete in the order of issue");
        assert_eq!(output.slices.len(), parts.len(), "{id:?}: slices answered and slices issued");
        // In a loop of its own, whose reads do not wait for each other: with thousands of sequences few are in a cache.
        for (part, output) in parts.iter().zip(&output.slices) {
            let expected = self.running[part.seat].id;
            assert_eq!(output.sequence, expected, "slices are answered in the order of the micro-batch");
        }
        let mut completions = vec![];
        for (part, output) in parts.into_iter().zip(output.slices) {
            completions.extend(self.complete_slice(part, output, &mut stops));
        }
        completions
    }

    fn complete_slice(
        &mut self,
        part: Part,
        output: SliceOutput,
        stops: impl FnMut(SequenceId, TokenId) -> bool,
    ) -> Option<Completion> {
        let Part { seat, end, asked, is_decode } = part;
        self.tokens_in_flight -= asked.num_tokens;
        self.decodes_in_flight -= usize::from(is_decode);
        let sequence = &mut self.running[seat];
        if sequence.phase() == Phase::Draining {
            if sequence.drop_answer() {
                self.release(seat);
            }
            return None;
        }
        match sequence.answer(asked, output, stops) {
            Progress::GoesOn => {}
            Progress::Ready => self.ready.push_back(seat),
            Progress::Ended(outcome) => return Some(self.end(seat, outcome)),
        }
        self.trials.computed(self.running[seat].id, end);
        self.dismiss(seat);
        None
    }

    /// Sends a sequence back to wait that has no part in the trial under way: its pages are for those that
    /// have.
    fn dismiss(&mut self, seat: Seat) {
        let sequence = &self.running[seat];
        if !self.trials.admit(sequence.id) && !sequence.is_in_flight() {
            self.preempt(seat);
        }
    }

    /// A stage has ended, over the micro-batch `fatal` where it was over one: no micro-batch in flight will
    /// be answered, and every running sequence waits to be computed again. Returns the sequence that has
    /// ended stages before and is now held to be the reason, with [`Failure::EndsStage`].
    ///
    /// A stage that is a step ahead may have failed at the micro-batch behind the one that is waited for: whoever is in either is a
    /// suspect then.
    ///
    /// See `trials` for how it is found. Answers to lost micro-batches must not be shown to
    /// [`Self::complete`]; those that are issued from now on have ids from [`Self::next_micro_batch_id`].
    pub fn stage_ended(&mut self, fatal: Option<MicroBatchId>) -> Option<Completion> {
        let lost = mem::take(&mut self.in_flight);
        let is_ahead = self.options.feeds_back || self.options.is_ahead;
        let next_after = |fatal| lost.iter().map(|lost| lost.id).find(|id| *id > fatal);
        let behind = fatal.filter(|_| is_ahead).and_then(next_after);
        let is_fatal = |id: MicroBatchId| Some(id) == fatal || Some(id) == behind;
        let mut until = BTreeMap::<SequenceId, usize>::new();
        let parts = lost.iter().filter(|lost| is_fatal(lost.id)).flat_map(|lost| &lost.parts);
        for part in parts {
            let sequence = &self.running[part.seat];
            if sequence.phase() != Phase::Draining {
                let end = until.entry(sequence.id).or_default();
                *end = part.end.max(*end);
            }
        }
        let fatal: Vec<(SequenceId, usize)> = until.into_iter().collect();
        (self.decodes_in_flight, self.tokens_in_flight) = (0, 0);
        for seat in self.running.seats() {
            match self.running[seat].phase() {
                Phase::Draining => self.release(seat),
                _ => self.preempt(seat),
            }
        }
        let convicted = self.trials.blame(&fatal)?;
        let mut sequence = self.waiting.remove(&convicted).expect("a convicted sequence waits");
        Some(sequence.completion(Err(Failure::EndsStage)))
    }

    /// Queues a request that is computed alone, before anything else: whether the stages can do anything
    /// at all, after they have ended over and over.
    ///
    /// # Errors
    /// As [`Self::submit`].
    pub fn probe(&mut self, request: Arc<Request>) -> Result<SequenceId, Error> {
        let id = self.submit(request, Generated::default())?;
        self.trials.probe(id);
        Ok(id)
    }

    /// The name of the micro-batch that is issued next.
    pub fn next_micro_batch_id(&self) -> MicroBatchId {
        self.next_micro_batch
    }

    /// What a sequence that has not ended has brought so far.
    pub fn generated(&self, sequence: SequenceId) -> Option<&Generated> {
        let running = self.running.find(sequence).map(|seat| &self.running[seat]);
        running.or_else(|| self.waiting.get(&sequence)).map(Sequence::generated)
    }

    /// Takes a running sequence's pages; it waits to be computed again. What it has in flight is lost.
    fn preempt(&mut self, seat: Seat) {
        self.unqueue(seat);
        let mut sequence = self.leave(seat);
        self.pages.give_back(&sequence.preempt());
        self.waiting.insert(sequence.id, sequence);
    }

    /// Sequences submitted and not running, preempted ones included.
    pub fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Sequences admitted, until their pages are free again.
    pub fn num_running(&self) -> usize {
        self.running.len()
    }

    /// Micro-batches issued and not completed.
    pub fn num_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Pages that no sequence holds.
    pub fn num_free_pages(&self) -> usize {
        self.pages.num_free()
    }

    /// The waiting sequences, the oldest first.
    pub fn waiting(&self) -> impl Iterator<Item = SequenceId> {
        self.waiting.keys().copied()
    }

    /// The running sequences, the oldest first.
    pub fn running(&self) -> impl Iterator<Item = SequenceId> {
        self.running.oldest_first().map(|sequence| sequence.id)
    }

    /// What has been done so far.
    pub fn stats(&self) -> Stats {
        self.stats
    }

    fn end(&mut self, seat: Seat, outcome: Result<FinishReason, Failure>) -> Completion {
        self.unqueue(seat);
        let completion = self.running[seat].completion(outcome);
        self.trials.clear(completion.sequence);
        self.retire(seat);
        completion
    }

    /// Takes a sequence out of the queue in which it stands for its next slice, if it stands in one.
    fn unqueue(&mut self, seat: Seat) {
        let sequence = &self.running[seat];
        match sequence.phase() {
            Phase::Prefilling => self.backlog.leave(sequence.id, self.need(sequence)),
            // A search through the queue: preemption comes here, where a recomputed prompt costs a thousand times more, and the end
            // of a sequence that runs ahead.
            Phase::Ready => self.ready.retain(|&other| other != seat),
            Phase::Stepping => {}
            phase => panic!("{:?} is in no queue while {phase:?}", sequence.id),
        }
    }

    /// Lets a sequence go that stands in no queue: at once, or when its last slice has come back.
    fn retire(&mut self, seat: Seat) {
        let sequence = &mut self.running[seat];
        if sequence.is_in_flight() {
            sequence.drain();
        } else {
            self.release(seat);
        }
    }

    fn release(&mut self, seat: Seat) {
        let sequence = self.leave(seat);
        self.pages.give_back(&sequence.pages);
    }

    fn leave(&mut self, seat: Seat) -> Sequence {
        let sequence = self.running.leave(seat);
        self.num_in_step -= usize::from(!sequence.runs_ahead());
        sequence
    }

    /// What a sequence in prefill has still to issue.
    fn need(&self, sequence: &Sequence) -> Need {
        let count = self.options.pages_for(sequence.end()) - sequence.pages.len();
        Need { tokens: sequence.num_left(), pages: Pages { lane: sequence.lane, count } }
    }
}
