//! What must hold of the scheduler after each event, counted anew from what stands there.

use std::collections::BTreeMap;

use super::Scheduler;
use crate::backlog::Need;
use crate::micro_batch::PageIdx;
use crate::options::Options;
use crate::request::SequenceId;
use crate::running::Seat;
use crate::sequence::Phase;

impl Scheduler {
    /// Asserts every invariant of the scheduler's first lines. Its cost grows with all there is: for tests.
    pub fn check_integrity(&self) {
        let Options { page_tokens, num_lanes, max_sequences, .. } = self.options;
        self.pages
            .check_integrity(self.running.oldest_first().flat_map(|sequence| sequence.pages.iter().copied()));
        self.running.check_integrity();
        self.trials.check_integrity(|id| self.waiting.contains_key(&id) || self.running.find(id).is_some());
        let parts = || self.in_flight.iter().flat_map(|micro_batch| &micro_batch.parts);
        let mut slices_in_flight: BTreeMap<SequenceId, usize> = BTreeMap::new();
        for part in parts() {
            *slices_in_flight.entry(self.running[part.seat].id).or_default() += 1;
        }
        for (id, sequence) in &self.waiting {
            assert!(self.running.find(*id).is_none(), "{id:?} is waiting and running");
            assert_eq!(sequence.phase(), Phase::Waiting, "{id:?} waits");
            sequence.check_integrity(0, page_tokens);
        }
        for sequence in self.running.oldest_first() {
            assert_ne!(sequence.phase(), Phase::Waiting, "{:?} runs", sequence.id);
            sequence.check_integrity(slices_in_flight.get(&sequence.id).copied().unwrap_or(0), page_tokens);
            let is_of_lane = |page_idx: &PageIdx| *page_idx as usize % num_lanes == sequence.lane;
            assert!(sequence.pages.iter().all(is_of_lane), "{:?} has pages of two lanes", sequence.id);
        }
        self.check_queue(Phase::Ready, self.ready.iter().copied());
        self.check_queue(Phase::Prefilling, self.backlog.seats());
        let needs: Vec<Need> = self.backlog.seats().map(|seat| self.need(&self.running[seat])).collect();
        let tokens: usize = needs.iter().map(|need| need.tokens).sum();
        assert_eq!(self.backlog.tokens(), tokens, "the backlog's sum and its sequences");
        for lane in 0..num_lanes {
            let of_lane = needs.iter().map(|need| need.pages).filter(|pages| pages.lane == lane);
            let count: usize = of_lane.map(|pages| pages.count).sum();
            assert_eq!(
                self.backlog.pages_in(lane),
                count,
                "the backlog's sum of lane {lane} and its sequences"
            );
        }
        let num_tokens: usize = parts().map(|part| part.asked.num_tokens).sum();
        assert_eq!(self.tokens_in_flight, num_tokens, "tokens counted and tokens in flight");
        let num_decodes = parts().filter(|part| part.is_decode).count();
        assert_eq!(self.decodes_in_flight, num_decodes, "decodes counted and decodes in flight");
        assert!(
            self.running.len() <= max_sequences,
            "{} sequences run, at most {max_sequences}",
            self.running.len()
        );
        let num_in_step = self.running.oldest_first().filter(|sequence| !sequence.runs_ahead()).count();
        assert_eq!(self.num_in_step, num_in_step, "sequences in step counted and running");
        let (num_in_flight, most) = (self.in_flight.len(), self.options.max_in_flight());
        assert!(num_in_flight <= most, "{num_in_flight} micro-batches in flight, at most {most}");
    }

    /// Asserts that a queue holds just the running sequences of one phase, each once.
    fn check_queue(&self, phase: Phase, queue: impl Iterator<Item = Seat>) {
        let mut queued: Vec<SequenceId> = queue.map(|seat| self.running[seat].id).collect();
        queued.sort_unstable();
        let of_phase = self.running.oldest_first().filter(|sequence| sequence.phase() == phase);
        assert_eq!(queued, of_phase.map(|sequence| sequence.id).collect::<Vec<_>>(), "queued as {phase:?}");
    }
}
