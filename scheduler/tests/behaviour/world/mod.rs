//! A pipeline around the scheduler, with a made-up model: what the tests of its behaviour share.
//!
//! The model's next token is a hash of all tokens before it, read back from a cache that is laid
//! out by page tables like a real one. A wrong page, a position left out or computed twice with
//! other content therefore changes the tokens, and [`Expected`], which knows no scheduler, tells.

mod model;
mod random;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use scheduler::{
    Completion, FedBack, MicroBatch, MicroBatchOutput, Options, Request, RequestKey, Sampling, Scheduler,
    SequenceId, Slice, TokenId,
};

pub(crate) use model::{Cache, Expected, STOP_TOKEN, deadly, is_deadly, poison, stops_text};
pub(crate) use random::Random;

/// A request for a prompt of `num_tokens` tokens and four more.
pub(crate) fn prompt(num_tokens: usize) -> Request {
    let sampling = Sampling::greedy(4);
    let prompt = (0..num_tokens as u32).collect();
    Request { key: RequestKey(0), prompt, sampling: Arc::new(sampling), sample: 0 }
}

/// The same request with its sampling changed.
pub(crate) fn with(request: Request, change: impl FnOnce(&mut Sampling)) -> Request {
    let mut sampling = Sampling::clone(&request.sampling);
    change(&mut sampling);
    Request { sampling: Arc::new(sampling), ..request }
}

pub(crate) fn max_tokens(request: Request, max_tokens: u32) -> Request {
    with(request, |sampling| sampling.max_tokens = max_tokens)
}

/// The scheduler, the micro-batches on their way, and all that has come out.
pub(crate) struct World {
    pub(crate) options: Options,
    pub(crate) scheduler: Scheduler,
    pub(crate) in_flight: VecDeque<MicroBatch>,
    pub(crate) completions: BTreeMap<SequenceId, Completion>,
    requests: BTreeMap<SequenceId, Arc<Request>>,
    /// The first stage computes when a micro-batch is sent, the last one when it comes back.
    first_stage: Cache,
    last_stage: Cache,
    /// What the first stage would draw, if it were the last, for each micro-batch in flight.
    drawn: VecDeque<Vec<Option<TokenId>>>,
    /// Slices that were issued before their token had come back.
    pub(crate) num_fed_back: usize,
    /// Where the next slice of a sequence must start, for those that have begun.
    next_position: BTreeMap<SequenceId, usize>,
    /// Tokens for which a verdict on stop strings was asked.
    num_judged: BTreeMap<SequenceId, usize>,
    preempted: Vec<SequenceId>,
    /// How often a stage has ended.
    pub(crate) num_ends: usize,
}

impl World {
    /// One stage and plenty of everything.
    pub(crate) fn new() -> Self {
        Self::of(Options {
            num_stages: 1,
            micro_batch_tokens: 512,
            max_sequences: 256,
            num_pages: 4096,
            num_lanes: 1,
            page_tokens: 16,
            context_tokens: 8192,
            efficient_tokens: 1,
            num_memories: 1,
            feeds_back: false,
            is_ahead: false,
        })
    }

    pub(crate) fn of(options: Options) -> Self {
        Self {
            scheduler: Scheduler::new(options.clone()),
            in_flight: VecDeque::new(),
            completions: BTreeMap::new(),
            requests: BTreeMap::new(),
            first_stage: Cache::new(&options),
            last_stage: Cache::new(&options),
            drawn: VecDeque::new(),
            num_fed_back: 0,
            next_position: BTreeMap::new(),
            num_judged: BTreeMap::new(),
            preempted: vec![],
            num_ends: 0,
            options,
        }
    }

    pub(crate) fn stages(self, num_stages: usize) -> Self {
        Self::of(Options { num_stages, ..self.options })
    }

    pub(crate) fn micro_batch_tokens(self, micro_batch_tokens: usize) -> Self {
        Self::of(Options { micro_batch_tokens, ..self.options })
    }

    pub(crate) fn max_sequences(self, max_sequences: usize) -> Self {
        Self::of(Options { max_sequences, ..self.options })
    }

    pub(crate) fn pages(self, num_pages: usize) -> Self {
        Self::of(Options { num_pages, ..self.options })
    }

    /// So many lanes of as many pages together.
    pub(crate) fn lanes(self, num_lanes: usize) -> Self {
        Self::of(Options { num_lanes, ..self.options })
    }

    pub(crate) fn page_tokens(self, page_tokens: usize) -> Self {
        Self::of(Options { page_tokens, ..self.options })
    }

    pub(crate) fn efficient_tokens(self, efficient_tokens: usize) -> Self {
        Self::of(Options { efficient_tokens, ..self.options })
    }

    /// Its stage is given tokens that it has drawn before the scheduler knows of them.
    pub(crate) fn feeding_back(self) -> Self {
        Self::of(Options { feeds_back: true, ..self.options })
    }

    /// Its stages begin with a micro-batch before they are done with the one before.
    pub(crate) fn ahead(self) -> Self {
        Self::of(Options { is_ahead: true, ..self.options })
    }

    pub(crate) fn submit(&mut self, request: Request) -> SequenceId {
        self.submit_after(0, request)
    }

    /// Submits what is left of a request of which an earlier run has `num_tokens`.
    pub(crate) fn submit_after(&mut self, num_tokens: usize, request: Request) -> SequenceId {
        let so_far = Expected::of(&request).so_far(num_tokens);
        let num_judged = so_far.tokens.len();
        let request = Arc::new(request);
        let id = self.scheduler.submit(request.clone(), so_far).expect("the request fits");
        self.requests.insert(id, request);
        self.num_judged.insert(id, num_judged);
        let finished = self.scheduler.drain_finished();
        self.keep(finished);
        id
    }

    pub(crate) fn submit_many(&mut self, count: usize, request: &Request) {
        for _ in 0..count {
            self.submit(request.clone());
        }
    }

    /// Sends the next micro-batch, if there is one, and says how many tokens each sequence has in it.
    pub(crate) fn send(&mut self) -> Option<Vec<(SequenceId, usize)>> {
        let ran: BTreeSet<SequenceId> = self.scheduler.running().collect();
        let micro_batch = self.scheduler.next_micro_batch();
        for id in self.scheduler.waiting().filter(|id| ran.contains(id)) {
            self.preempted.push(id);
            self.next_position.remove(&id);
        }
        let mut micro_batch = micro_batch?;
        self.check(&micro_batch);
        micro_batch.slices.iter_mut().for_each(|slice| self.feed_back(slice));
        let summary = micro_batch.slices.iter().map(|slice| (slice.sequence, slice.tokens.len())).collect();
        let drawn = micro_batch.slices.iter().map(|slice| self.first_stage.compute(slice).token).collect();
        self.drawn.push_back(drawn);
        self.in_flight.push_back(micro_batch);
        Some(summary)
    }

    /// Sends all that can go.
    pub(crate) fn fill(&mut self) {
        while self.send().is_some() {}
    }

    /// A stage ends over the micro-batch in flight at `index`, and another takes its place.
    pub(crate) fn end_stage(&mut self, index: usize) {
        let fatal = self.in_flight[index].id;
        self.in_flight.clear();
        self.drawn.clear();
        self.next_position.clear();
        self.num_ends += 1;
        let convicted = self.scheduler.stage_ended(Some(fatal));
        assert_eq!(self.scheduler.num_free_pages(), self.options.num_pages, "nothing is computed any more");
        self.keep(convicted.into_iter().collect());
    }

    /// Brings the oldest micro-batch back, unless a stage ends over it. A device that is a step ahead may fail at the one behind
    /// before: two times of three it does.
    pub(crate) fn complete(&mut self) {
        let Options { feeds_back, is_ahead, .. } = self.options;
        let is_early = (feeds_back || is_ahead) && !self.num_ends.is_multiple_of(3);
        let mut under_way = self.in_flight.iter().take(if is_early { 2 } else { 1 });
        if under_way.any(|micro_batch| micro_batch.slices.iter().any(is_deadly)) {
            return self.end_stage(0);
        }
        let micro_batch = self.in_flight.pop_front().expect("a micro-batch is in flight");
        self.drawn.pop_front();
        let slices = micro_batch.slices.iter().map(|slice| self.last_stage.compute(slice)).collect();
        let output = MicroBatchOutput { id: micro_batch.id, slices };
        let (requests, num_judged) = (&self.requests, &mut self.num_judged);
        let completions = self.scheduler.complete(output, |id, token| {
            let num_judged = num_judged.entry(id).or_default();
            *num_judged += 1;
            stops_text(&requests[&id], *num_judged, token)
        });
        for id in self.scheduler.waiting() {
            self.next_position.remove(&id); // Sent back, where it ran: a trial goes on without it.
        }
        self.keep(completions);
    }

    pub(crate) fn step(&mut self) {
        self.fill();
        self.complete();
    }

    /// Goes on until everything submitted has ended.
    pub(crate) fn run_to_the_end(&mut self) {
        // Each round takes at least one position further. Even with every sequence preempted at each of
        // its positions there are no more rounds than the sum of squares.
        let most: usize = self.requests.values().map(|request| request.max_positions().pow(2) + 1).sum();
        for _ in 0..most {
            self.fill();
            self.scheduler.check_integrity();
            if self.in_flight.is_empty() {
                return self.check_end();
            }
            self.complete();
            self.scheduler.check_integrity();
        }
        panic!("no end after {most} micro-batches");
    }

    pub(crate) fn running(&self) -> Vec<SequenceId> {
        self.scheduler.running().collect()
    }

    pub(crate) fn waiting(&self) -> Vec<SequenceId> {
        self.scheduler.waiting().collect()
    }

    /// Every preemption so far, in order.
    pub(crate) fn preempted(&self) -> &[SequenceId] {
        &self.preempted
    }

    /// Tokens of each micro-batch in flight, the oldest first.
    pub(crate) fn sizes(&self) -> Vec<usize> {
        self.in_flight.iter().map(MicroBatch::num_tokens).collect()
    }

    pub(crate) fn num_tokens_in_flight(&self) -> usize {
        self.sizes().iter().sum()
    }

    /// The slices of `id` in flight as `(first position, tokens)`.
    pub(crate) fn slices_of(&self, id: SequenceId) -> Vec<(usize, usize)> {
        let slices = self.in_flight.iter().flat_map(|micro_batch| &micro_batch.slices);
        let of_id = slices.filter(|slice| slice.sequence == id);
        of_id.map(|slice| (slice.first_position as usize, slice.tokens.len())).collect()
    }

    fn keep(&mut self, completions: Vec<Completion>) {
        for completion in completions {
            let id = completion.sequence;
            Expected::of(&completion.request).check(&completion);
            if !completion.request.sampling.stop.is_empty() {
                let num_judged = self.num_judged.get(&id).copied().unwrap_or(0);
                assert_eq!(num_judged, completion.generated.tokens.len(), "{id:?}: a verdict for each token");
            }
            assert!(self.completions.insert(id, completion).is_none(), "{id:?} ended twice");
        }
    }

    /// What every micro-batch must be like.
    fn check(&mut self, micro_batch: &MicroBatch) {
        let num_tokens = micro_batch.num_tokens();
        assert!(
            (1..=self.options.micro_batch_tokens).contains(&num_tokens),
            "{num_tokens} tokens in a micro-batch"
        );
        assert!(
            self.in_flight.len() < self.options.max_in_flight(),
            "{} in flight already",
            self.in_flight.len()
        );
        let sequences: BTreeSet<SequenceId> = micro_batch.slices.iter().map(|slice| slice.sequence).collect();
        assert_eq!(sequences.len(), micro_batch.slices.len(), "a sequence has one slice in a micro-batch");
        let sampling: Vec<SequenceId> = self
            .in_flight
            .iter()
            .flat_map(|sent| &sent.slices)
            .filter(|slice| slice.sample)
            .map(|s| s.sequence)
            .collect();
        for slice in &micro_batch.slices {
            let is_ahead = sampling.contains(&slice.sequence);
            assert_eq!(is_ahead, slice.fed_back.is_some(), "{:?} goes on without its token", slice.sequence);
            self.check_slice(slice);
        }
    }

    /// Puts the token of a slice in its place that was still to be drawn, as a stage does.
    fn feed_back(&mut self, slice: &mut Slice) {
        let Some(FedBack { micro_batch, slice: index }) = slice.fed_back else { return };
        let (source, drawn) = (self.in_flight.back().unwrap(), self.drawn.back().unwrap());
        assert_eq!(
            (micro_batch, slice.sequence),
            (source.id, source.slices[index].sequence),
            "it was drawn by the micro-batch before"
        );
        assert_eq!(slice.tokens.len(), 1, "{:?}: a token is fed back alone", slice.sequence);
        // A row that has failed draws nothing; what comes of it now is dropped.
        slice.tokens[0] = drawn[index].unwrap_or_default();
        self.num_fed_back += 1;
    }

    fn check_slice(&mut self, slice: &Slice) {
        let first = slice.first_position as usize;
        let next_position = self.next_position.entry(slice.sequence).or_default();
        assert_eq!(first, *next_position, "{:?} leaves no gap", slice.sequence);
        *next_position = first + slice.tokens.len();
        let num_pages = next_position.div_ceil(self.options.page_tokens);
        assert_eq!(slice.pages.len(), num_pages, "{:?} has just the pages it needs", slice.sequence);
    }

    fn check_end(&self) {
        assert_eq!((self.scheduler.num_running(), self.scheduler.num_waiting()), (0, 0), "running, waiting");
        assert_eq!(self.scheduler.num_free_pages(), self.options.num_pages, "all pages are free in the end");
        for id in self.requests.keys() {
            assert!(self.completions.contains_key(id), "{id:?} has not ended");
        }
    }
}
