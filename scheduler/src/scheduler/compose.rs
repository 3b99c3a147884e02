//! What the next micro-batch holds: admission, decode steps, chunks of prefill, and pages for them.
//!
//! Decode steps go first, in the order in which they became ready; prefill fills what is left, the
//! oldest sequence first. A slice takes its pages when it is made. Where none is free the newest
//! sequence of the same lane that is newer than the one in need, and has nothing in flight, gives up all of its own
//! and waits to be computed again; where there is none such, the slice waits for completions.
//!
//! A lone stage that feeds tokens back has a second micro-batch behind the one that it computes, with the same sequences,
//! before the tokens are known that they begin with. A sequence that turns out to have ended was then computed in
//! vain, once. All of them run ahead or none does: where some must wait for their tokens, as penalties and guides ask
//! for, micro-batches would be torn apart into those that wait and those that need not.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;

use crate::backlog::{Need, Pages};
use crate::micro_batch::{FedBack, MicroBatch, Slice};
use crate::request::SequenceId;
use crate::running::Seat;
use crate::scheduler::{InFlight, Part, Scheduler};
use crate::sequence::{Asked, Phase, Sequence};
use crate::share::{AtHand, next_share};

/// A micro-batch in the making.
#[derive(Default)]
struct Draft {
    slices: Vec<Slice>,
    parts: Vec<Part>,
    /// Those of them that may be in the next one too.
    ready: Vec<Seat>,
    /// No sequence of a lane that is newer than this one can be preempted any more.
    last_refuges: BTreeMap<usize, SequenceId>,
}

impl Draft {
    /// Whether a lane has a last refuge, and such a one.
    fn is_refuge(&self, lane: usize, is_such: impl Fn(SequenceId) -> bool) -> bool {
        self.last_refuges.get(&lane).is_some_and(|last_refuge| is_such(*last_refuge))
    }
}

impl Scheduler {
    /// The next micro-batch to send to the first stage, if one is to be sent now.
    ///
    /// To be asked until it says none, after every event.
    pub fn next_micro_batch(&mut self) -> Option<MicroBatch> {
        self.admit();
        let mut draft = Draft::default();
        if let Some(share) = next_share(&self.options, self.work_at_hand()) {
            let most = share.decodes.min(self.ready.len());
            draft.slices.reserve(most);
            draft.parts.reserve(most);
            self.add_decodes(&mut draft, share.decodes);
            let room = share.tokens - draft.slices.len();
            self.add_prefill(&mut draft, room);
        }
        if !draft.slices.is_empty() {
            return Some(self.send(draft));
        }
        assert!(
            !self.in_flight.is_empty() || (self.running.is_empty() && self.waiting.is_empty()),
            "stuck with nothing in flight: {} running, {} waiting, {} pages free",
            self.running.len(),
            self.waiting.len(),
            self.pages.num_free()
        );
        None
    }

    /// Admits waiting sequences in order of age, as many as the pipeline has use and pages for.
    fn admit(&mut self) {
        while let Some((id, lane)) = self.next_admitted() {
            let mut sequence = self.waiting.remove(&id).expect("a sequence waits");
            sequence.admit(lane);
            let need = self.need(&sequence);
            self.num_in_step += usize::from(!sequence.runs_ahead());
            let seat = self.running.enter(sequence);
            self.backlog.enter(id, seat, need);
        }
    }

    /// The oldest waiting sequence, if it may run, and in which lane. During a trial it is the oldest of those on trial.
    ///
    /// A backlog that fills every micro-batch in flight once is enough: what is admitted later is
    /// judged by the pages that are free then. Beside its own prompt and those of the backlog there
    /// must be a page for the next tokens of each running sequence, itself included. Without that
    /// headroom its prefill would take the very pages that the running ones want within a few
    /// steps, and it, the newest, would be the one to lose them; and a sequence just preempted
    /// would come back before any has ended. More headroom would be a guess about lengths: most
    /// sequences end long before `max_tokens`. Tried on seven mixes of 5,000 requests in too few
    /// pages, at a cost of 1 + tokens / 128 a micro-batch, none took 2 to 17 % longer than one page
    /// each, and eight up to 22 %.
    ///
    /// Where nothing runs, no more is asked than the pages that `check` counted: the pipeline never
    /// stays empty.
    fn next_admitted(&self) -> Option<(SequenceId, usize)> {
        let (&id, next) = self.next_waiting().filter(|_| self.has_use_for_more())?;
        self.lane_for(next).map(|lane| (id, lane))
    }

    /// The oldest waiting sequence that may run at all now.
    pub(super) fn next_waiting(&self) -> Option<(&SequenceId, &Sequence)> {
        self.waiting.iter().find(|(id, _)| self.trials.admit(**id))
    }

    /// Whether one more running sequence would have work to do before long.
    pub(super) fn has_use_for_more(&self) -> bool {
        let options = &self.options;
        self.running.len() < options.max_sequences
            && self.backlog.tokens() < options.max_in_flight() * options.micro_batch_tokens
    }

    /// The lane with most pages to spare, if they are enough for a waiting sequence.
    pub(super) fn lane_for(&self, next: &Sequence) -> Option<usize> {
        let options = &self.options;
        let tokens = next.max_positions().min(next.end() + options.page_tokens);
        let (spare, lane) = (0..options.num_lanes)
            .filter_map(|lane| Some((self.spare_pages(lane)?, lane)))
            .max_by_key(|(spare, lane)| (*spare, Reverse(*lane)))?;
        (options.pages_for(tokens) <= spare).then_some(lane)
    }

    /// Pages of a lane that are free beside those that its running sequences will want, if these have enough.
    fn spare_pages(&self, lane: usize) -> Option<usize> {
        let headroom = self.running.len_in(lane); // One page each.
        self.pages.num_free_in(lane).checked_sub(self.backlog.pages_in(lane) + headroom)
    }

    fn work_at_hand(&self) -> AtHand {
        AtHand {
            micro_batches_in_flight: self.in_flight.len(),
            tokens_in_flight: self.tokens_in_flight,
            decoding: self.ready.len() + self.decodes_in_flight,
            tokens_at_hand: self.ready.len() + self.backlog.tokens(),
            runs_ahead: self.runs_ahead(),
        }
    }

    /// Whether no running sequence must know its tokens before its next step.
    pub(super) fn runs_ahead(&self) -> bool {
        self.num_in_step == 0 && !self.trials.are_under_way()
    }

    /// Adds the next step of up to `most` ready sequences, passing over those that get no page. Where one of them finds nobody to
    /// take a page from, those newer than it that run ahead come home first, so that they can give theirs.
    fn add_decodes(&mut self, draft: &mut Draft, most: usize) {
        let mut place = 0;
        while draft.slices.len() < most && place < self.ready.len() {
            let seat = self.ready[place];
            let sequence = &self.running[seat];
            if sequence.is_in_flight() && draft.is_refuge(sequence.lane, |needy| needy < sequence.id) {
                place += 1;
                continue;
            }
            let num_tokens = self.provide_pages(draft, seat, 1);
            if self.ready.get(place) != Some(&seat) {
                // Preempting for its page took others out of the queue before it.
                place = self.ready.iter().position(|&other| other == seat).expect("it is still ready");
            }
            if num_tokens == 1 {
                self.ready.remove(place);
                self.add_slice(draft, seat, 1, true);
            } else {
                place += 1;
            }
        }
    }

    /// Adds chunks of prefill of together up to `room` tokens.
    fn add_prefill(&mut self, draft: &mut Draft, mut room: usize) {
        let mut after = None;
        while room > 0
            && let Some((id, seat)) = self.backlog.next(after)
        {
            after = Some(id);
            if !self.trials.admit(id) {
                continue; // Cleared, and goes back to wait when its last slice has come back.
            }
            let num_held = self.running[seat].pages.len();
            let wanted = self.running[seat].next_len(room);
            let num_tokens = self.provide_pages(draft, seat, wanted);
            if num_tokens == 0 {
                continue;
            }
            self.add_slice(draft, seat, num_tokens, false);
            room -= num_tokens;
            let sequence = &self.running[seat];
            let pages = Pages { lane: sequence.lane, count: sequence.pages.len() - num_held };
            self.backlog.meet(Need { tokens: num_tokens, pages });
            if sequence.phase() != Phase::Prefilling {
                self.backlog.leave(id, Need::default());
            }
        }
    }

    /// Finds pages for the next `num_tokens` positions of a sequence, and says for how many they suffice.
    fn provide_pages(&mut self, draft: &mut Draft, seat: Seat, num_tokens: usize) -> usize {
        let sequence = &self.running[seat];
        let (id, lane, first) = (sequence.id, sequence.lane, sequence.num_issued());
        let num_pages = self.options.pages_for(first + num_tokens);
        while self.running[seat].pages.len() < num_pages {
            match self.pages.take(lane) {
                Some(page_idx) => Arc::make_mut(&mut self.running[seat].pages).push(page_idx),
                None if self.preempt_newer(draft, lane, id) => {}
                None => break,
            }
        }
        num_tokens.min(self.running[seat].pages.len() * self.options.page_tokens - first)
    }

    /// Frees the pages of the newest sequence of a lane that is newer than `id` and has nothing in flight.
    fn preempt_newer(&mut self, draft: &mut Draft, lane: usize, id: SequenceId) -> bool {
        if draft.is_refuge(lane, |last_refuge| last_refuge <= id) {
            return false;
        }
        let is_victim = |&seat: &Seat| {
            let sequence = &self.running[seat];
            sequence.lane == lane && !sequence.is_in_flight() && !sequence.pages.is_empty()
        };
        let Some(seat) = self.running.newer_than(id).find(is_victim) else {
            draft.last_refuges.insert(lane, id);
            return false;
        };
        self.preempt(seat);
        self.stats.preemptions += 1;
        true
    }

    fn add_slice(&mut self, draft: &mut Draft, seat: Seat, num_tokens: usize, is_decode: bool) {
        let sequence = &mut self.running[seat];
        self.stats.recomputed_tokens += sequence.num_recomputed(num_tokens) as u64;
        if is_decode {
            self.stats.decode_tokens += 1;
        } else {
            self.stats.prefill_tokens += num_tokens as u64;
        }
        let here = FedBack { micro_batch: self.next_micro_batch, slice: draft.slices.len() };
        let slice = sequence.issue(num_tokens, here);
        if sequence.phase() == Phase::Ready {
            draft.ready.push(seat);
        }
        let asked = Asked { num_tokens, num_scores: slice.score.len(), sample: slice.sample };
        let end = slice.first_position as usize + num_tokens;
        draft.parts.push(Part { seat, end, asked, is_decode });
        draft.slices.push(slice);
        self.tokens_in_flight += num_tokens;
        self.decodes_in_flight += usize::from(is_decode);
    }

    fn send(&mut self, draft: Draft) -> MicroBatch {
        let id = self.next_micro_batch;
        self.next_micro_batch.0 += 1;
        self.ready.extend(draft.ready);
        self.in_flight.push_back(InFlight { id, parts: draft.parts });
        MicroBatch { id, slices: draft.slices }
    }
}
