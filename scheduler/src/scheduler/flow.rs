//! Whether a stage that waits does so for want of rows, for want of pages, or for another stage.
//!
//! Said of the whole pipeline at one moment and decided from what stands there: whoever has a clock adds up
//! how long each answer held.

use crate::scheduler::Scheduler;

/// Why no more micro-batches are in flight than there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// As many are in flight as the pipeline ever has, or more can be issued as soon as some come back: a stage
    /// that waits now waits for another one.
    Steady,
    /// Sequences wait, and there are no pages for the next one.
    ShortOfPages,
    /// No sequence waits, and those that run do not fill the pipeline. Once no more will be submitted, this
    /// is the job's tail.
    NothingWaits,
}

impl Scheduler {
    /// Why no more micro-batches are in flight. To be asked when [`Self::next_micro_batch`] has said none.
    pub fn flow(&self) -> Flow {
        // One more than may be now are in flight where they ran ahead until a sequence came that does not.
        if self.in_flight.len() >= self.options.most_in_flight(self.runs_ahead()) {
            return Flow::Steady;
        }
        match self.next_waiting() {
            None => Flow::NothingWaits,
            Some((_, next)) if self.has_use_for_more() && self.lane_for(next).is_none() => Flow::ShortOfPages,
            Some(_) => Flow::Steady,
        }
    }
}
