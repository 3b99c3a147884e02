//! One sequence: what of it is computed, what is on its way, and how it ends.
//!
//! It never chooses. The scheduler decides when it is admitted, how many positions go next and
//! whose pages they use; this module says what that slice holds and what its answer means. It
//! keeps three promises: positions are issued in order and without a gap, at most one slice that
//! samples is in flight, or two where the second begins with the token of the first, and no token and no
//! score is reported twice, however often the sequence is preempted and computed again.

use std::mem;
use std::ops::Range;
use std::sync::Arc;

use crate::counts::{self, TokenCount};
use crate::micro_batch::{Failure, FedBack, PageIdx, Slice, SliceOutput, SliceTokens, TokenLogprobs};
use crate::request::{Completion, FinishReason, Generated, Request, SequenceId, TokenId};

/// Where a sequence stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Not admitted, or preempted: holds no page.
    Waiting,
    /// Positions are to be issued until every token it has is computed.
    Prefilling,
    /// One token, the last, is to be computed; where it runs ahead it may still be in flight.
    Ready,
    /// All has been issued and the last slice is in flight.
    Stepping,
    /// Ended while slices are in flight: their answers are dropped, then its pages go.
    Draining,
}

/// What an answer means for the sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// More is in flight, or stands in a queue already.
    GoesOn,
    /// It has a new token and wants its next step.
    Ready,
    /// It has ended.
    Ended(Result<FinishReason, Failure>),
}

/// What one slice in flight was asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked {
    pub(crate) num_tokens: usize,
    pub(crate) num_scores: usize,
    pub(crate) sample: bool,
}

#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) id: SequenceId,
    request: Arc<Request>,
    phase: Phase,
    /// Positions below this one are computed or in flight, and the pages cover them.
    num_issued: usize,
    /// Of the positions, how many were computed before the last preemption.
    num_lost: usize,
    slices_in_flight: usize,
    /// Whether it is fed back: its next slice may be issued with a token that is in flight.
    runs_ahead: bool,
    /// Slices in flight that sample, and the newest of them.
    num_drawing: usize,
    drawn_by: Option<FedBack>,
    /// Of which lane its pages are, since it was admitted last.
    pub(crate) lane: usize,
    /// Slices in flight share them.
    pub(crate) pages: Arc<Vec<PageIdx>>,
    generated: Generated,
    /// Where it has penalties, from its first draw on; slices in flight share them.
    counts: Option<Arc<Vec<TokenCount>>>,
}

impl Sequence {
    /// One that is fed back where its request allows it and `feeds_back` is true.
    pub(crate) fn new(id: SequenceId, request: Arc<Request>, so_far: Generated, feeds_back: bool) -> Self {
        assert!(request.goes_on_from(&so_far), "{id:?} cannot go on from {so_far:?}");
        Self {
            id,
            runs_ahead: feeds_back && request.sampling.draws_ahead(),
            num_drawing: 0,
            drawn_by: None,
            request,
            phase: Phase::Waiting,
            num_issued: 0,
            num_lost: 0,
            slices_in_flight: 0,
            lane: 0,
            pages: Arc::default(),
            generated: so_far,
            counts: None,
        }
    }

    pub(crate) fn phase(&self) -> Phase {
        self.phase
    }

    pub(crate) fn num_issued(&self) -> usize {
        self.num_issued
    }

    pub(crate) fn is_in_flight(&self) -> bool {
        self.slices_in_flight > 0
    }

    /// Whether its slices may be issued with tokens that are in flight.
    pub(crate) fn runs_ahead(&self) -> bool {
        self.runs_ahead
    }

    pub(crate) fn generated(&self) -> &Generated {
        &self.generated
    }

    pub(crate) fn max_positions(&self) -> usize {
        self.request.max_positions()
    }

    /// Positions that the tokens known so far allow to compute, and the next one in flight where it is fed back.
    pub(crate) fn end(&self) -> usize {
        self.max_positions().min(self.num_known() + usize::from(self.runs_ahead && self.num_drawing > 0))
    }

    /// Tokens of the prompt and those that came back.
    fn num_known(&self) -> usize {
        self.request.prompt.len() + self.generated.tokens.len()
    }

    /// Positions still to be issued.
    pub(crate) fn num_left(&self) -> usize {
        self.end() - self.num_issued
    }

    // ## Waiting => Prefilling
    pub(crate) fn admit(&mut self, lane: usize) {
        assert_eq!(self.phase, Phase::Waiting, "{:?} is admitted twice", self.id);
        self.phase = Phase::Prefilling;
        self.lane = lane;
    }

    // ## (Prefilling | Ready | Stepping) => Waiting
    /// Gives up its pages; all its positions are to be computed again. What it has in flight is lost: only
    /// where a stage has ended does it have any.
    pub(crate) fn preempt(&mut self) -> Arc<Vec<PageIdx>> {
        self.phase = Phase::Waiting;
        (self.slices_in_flight, self.num_drawing, self.drawn_by) = (0, 0, None);
        self.num_lost = self.num_lost.max(self.num_issued);
        self.num_issued = 0;
        mem::take(&mut self.pages)
    }

    /// The most positions, up to `room`, that the next slice may hold.
    ///
    /// After a preemption a slice ends where the scores already reported end, since a slice is
    /// scored from its first token on or not at all.
    pub(crate) fn next_len(&self, room: usize) -> usize {
        let mut len = room.min(self.num_left());
        let reported = self.generated.prompt_logprobs.len();
        if self.wants_scores() && self.num_issued < reported && reported < self.request.prompt.len() - 1 {
            len = len.min(reported - self.num_issued);
        }
        len
    }

    // ## Prefilling => (Prefilling | Ready | Stepping)
    // ## Ready => (Ready | Stepping)
    /// The slice of the next `num_tokens` positions, for which the pages are there; `here` is its place.
    pub(crate) fn issue(&mut self, num_tokens: usize, here: FedBack) -> Slice {
        let range = self.num_issued..self.num_issued + num_tokens;
        assert!(
            matches!(self.phase, Phase::Prefilling | Phase::Ready)
                && num_tokens > 0
                && range.end <= self.end(),
            "{:?}, {:?} with {} positions to compute, cannot issue {range:?}",
            self.id,
            self.phase,
            self.end(),
        );
        let end = range.end;
        self.num_issued = end;
        self.slices_in_flight += 1;
        let fed_back = if range.start == self.num_known() { self.drawn_by } else { None };
        let is_last = self.num_left() == 0;
        let sample = is_last && self.request.sampling.max_tokens > 0;
        if sample {
            (self.num_drawing, self.drawn_by) = (self.num_drawing + 1, Some(here));
        }
        if is_last {
            self.phase = if self.num_left() > 0 { Phase::Ready } else { Phase::Stepping };
        }
        Slice {
            sequence: self.id,
            first_position: range.start as u32, // The context fits u32, which `Options` checks.
            score: self.scores_in(range.clone()),
            tokens: if fed_back.is_some() { SliceTokens::from_elem(0, 1) } else { self.tokens_in(range) },
            fed_back,
            pages: self.pages.clone(),
            sample,
            bars_stops: sample && self.is_short_at(end),
            counts: if sample { self.counts() } else { None },
            mask: None,
            request: self.request.clone(),
        }
    }

    /// How many of `num_tokens` positions from here had been computed before a preemption.
    pub(crate) fn num_recomputed(&self, num_tokens: usize) -> usize {
        num_tokens.min(self.num_lost.saturating_sub(self.num_issued))
    }

    /// Takes the answer to its oldest slice in flight. `stops` says whether a stop string is completed.
    pub(crate) fn answer(
        &mut self,
        asked: Asked,
        output: SliceOutput,
        stops: impl FnMut(SequenceId, TokenId) -> bool,
    ) -> Progress {
        self.slices_in_flight -= 1;
        self.num_drawing -= usize::from(asked.sample);
        if let Some(failure) = output.failure {
            return Progress::Ended(Err(failure));
        }
        assert_eq!(
            (output.prompt_logprobs.len(), output.token.is_some()),
            (asked.num_scores, asked.sample),
            "{:?} got other than the scores and the token it asked for",
            self.id
        );
        self.generated.prompt_logprobs.extend(output.prompt_logprobs);
        match output.token {
            Some(token) => self.append(token, output.logprobs, stops),
            None if self.phase == Phase::Stepping && !self.is_in_flight() => {
                Progress::Ended(Ok(FinishReason::Length))
            }
            None => Progress::GoesOn,
        }
    }

    // ## (Ready | Stepping) => (Ready | Stepping)
    fn append(
        &mut self,
        token: TokenId,
        logprobs: Option<TokenLogprobs>,
        mut stops: impl FnMut(SequenceId, TokenId) -> bool,
    ) -> Progress {
        assert!(
            matches!(self.phase, Phase::Ready | Phase::Stepping) && self.slices_in_flight == self.num_drawing,
            "{:?} got a token while {:?} with {} slices in flight, of which {} draw",
            self.id,
            self.phase,
            self.slices_in_flight,
            self.num_drawing
        );
        self.generated.tokens.push(token);
        if let Some(counts) = &mut self.counts {
            counts::add(Arc::make_mut(counts), token);
        }
        let sampling = &self.request.sampling;
        if sampling.logprobs.is_some() {
            self.generated
                .logprobs
                .push(logprobs.expect("a request for log-probabilities gets them with each token"));
        }
        let num_generated = self.generated.tokens.len();
        let is_stop_token =
            num_generated >= sampling.min_tokens as usize && sampling.stop_token_ids.contains(&token);
        // Asked even after a stop token: the caller's matcher sees every token of such a request.
        let is_stop_text = !sampling.stop.is_empty() && stops(self.id, token);
        if is_stop_token || is_stop_text {
            Progress::Ended(Ok(FinishReason::Stop))
        } else if num_generated == sampling.max_tokens as usize {
            Progress::Ended(Ok(FinishReason::Length))
        } else if self.phase == Phase::Ready || self.num_left() == 0 {
            Progress::GoesOn
        } else {
            self.phase = Phase::Ready;
            Progress::Ready
        }
    }

    // ## (Prefilling | Ready | Stepping) => Draining
    pub(crate) fn drain(&mut self) {
        self.phase = Phase::Draining;
    }

    /// Drops the answer to its oldest slice in flight, and says whether that was the last one.
    pub(crate) fn drop_answer(&mut self) -> bool {
        assert_eq!(self.phase, Phase::Draining, "{:?} has a use for its answers", self.id);
        self.slices_in_flight -= 1;
        !self.is_in_flight()
    }

    /// All that was generated, moved out of the sequence.
    pub(crate) fn completion(&mut self, outcome: Result<FinishReason, Failure>) -> Completion {
        Completion {
            sequence: self.id,
            request: self.request.clone(),
            generated: mem::take(&mut self.generated),
            outcome,
        }
    }

    fn counts(&mut self) -> Option<Arc<Vec<TokenCount>>> {
        let sampling = &self.request.sampling;
        if self.counts.is_none() && sampling.has_penalties() {
            let prompt: &[TokenId] =
                if sampling.repetition_penalty != 1.0 { &self.request.prompt } else { &[] };
            self.counts = Some(Arc::new(counts::count(prompt, &self.generated.tokens)));
        }
        self.counts.clone()
    }

    /// Whether the token at this position comes too early to end the sequence.
    fn is_short_at(&self, position: usize) -> bool {
        position < self.request.prompt.len() + self.request.sampling.min_tokens as usize
    }

    fn wants_scores(&self) -> bool {
        self.request.sampling.prompt_logprobs
    }

    /// The prompt tokens that follow those of `range`, unless they are not wanted or already scored.
    fn scores_in(&self, range: Range<usize>) -> Vec<TokenId> {
        if !self.wants_scores() || range.start < self.generated.prompt_logprobs.len() {
            return vec![];
        }
        let prompt = &self.request.prompt;
        let end = prompt.len().min(range.end + 1);
        prompt[end.min(range.start + 1)..end].to_vec()
    }

    fn tokens_in(&self, range: Range<usize>) -> SliceTokens {
        let prompt = &self.request.prompt;
        let border = prompt.len();
        let mut tokens = SliceTokens::with_capacity(range.len());
        tokens.extend_from_slice(&prompt[range.start.min(border)..range.end.min(border)]);
        tokens.extend_from_slice(
            &self.generated.tokens[range.start.max(border) - border..range.end.max(border) - border],
        );
        tokens
    }

    pub(crate) fn check_integrity(&self, slices_in_flight: usize, page_tokens: usize) {
        let Self { id, phase, num_issued, .. } = self;
        assert_eq!(self.slices_in_flight, slices_in_flight, "{id:?}: slices counted and slices in flight");
        let (num_pages, end) = (self.pages.len(), self.end());
        assert_eq!(
            num_pages,
            num_issued.div_ceil(page_tokens),
            "{id:?}: {num_pages} pages for {num_issued} positions"
        );
        let is_ahead = self.num_drawing > 0;
        assert!(self.num_drawing <= 1 + usize::from(self.runs_ahead), "{id:?}: {} draw", self.num_drawing);
        let is_right = match phase {
            Phase::Waiting => *num_issued == 0 && slices_in_flight == 0,
            Phase::Prefilling => *num_issued < end,
            Phase::Ready => num_issued + 1 == end && is_ahead == (slices_in_flight > 0),
            Phase::Stepping => *num_issued == end && slices_in_flight > 0,
            Phase::Draining => slices_in_flight > 0,
        };
        assert!(
            is_right,
            "{id:?}: {phase:?} with {num_issued} of {end} issued, {slices_in_flight} slices in flight"
        );
    }
}
