//! Where the time of a run goes: what each stage is at, and where it waits, what it waits for.
//!
//! Each moment of a stage between a job's begin and its end belongs to one part of [`StageParts`], so the
//! parts sum up to the wall time without anybody adding them up. A device thread only says what it turns to; why
//! there is nothing to compute is known to the pipeline actor, which keeps [`FlowClock`].

mod at_work;
mod flow;
mod hops;
mod ledger;
mod stage;
mod steps;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

pub(crate) use at_work::{AtWork, Hung};
pub(crate) use flow::{Flow, FlowClock};
pub(crate) use hops::HopClock;
pub use hops::HopTimes;
pub use ledger::StageParts;
pub(crate) use stage::{Meter, StepWork};
pub use stage::{StageClock, StageTimes, StepLoads};
pub use steps::{StepEvent, StepLog};

/// What a pipeline as a whole has done, and what its stages lack.
#[derive(Debug, Default)]
pub struct PipelineClock {
    flow: FlowClock,
    is_input_read: AtomicBool,
    sampled_tokens: AtomicU64,
    handling_ns: AtomicU64,
    /// Who hears of every step, if anybody.
    step_log: Option<StepLog>,
}

impl PipelineClock {
    pub(crate) fn new(step_log: Option<StepLog>) -> Self {
        PipelineClock { step_log, ..PipelineClock::default() }
    }

    pub(crate) fn flow(&self) -> &FlowClock {
        &self.flow
    }

    pub(crate) fn step_log(&self) -> Option<&StepLog> {
        self.step_log.as_ref()
    }

    /// No row will come any more.
    pub(crate) fn set_input_read(&self) {
        self.is_input_read.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_input_read(&self) -> bool {
        self.is_input_read.load(Ordering::Relaxed)
    }

    pub(crate) fn add_sampled(&self, tokens: usize) {
        self.sampled_tokens.fetch_add(tokens as u64, Ordering::Relaxed);
    }

    pub(crate) fn add_handling(&self, time: Duration) {
        self.handling_ns.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
    }

    /// Tokens drawn so far, those of unfinished sequences too.
    pub fn sampled_tokens(&self) -> u64 {
        self.sampled_tokens.load(Ordering::Relaxed)
    }

    /// Time that the pipeline actor has spent between the last stage and the first: on what comes back, stop
    /// strings among it, and on what goes out next.
    pub fn handling(&self) -> Duration {
        Duration::from_nanos(self.handling_ns.load(Ordering::Relaxed))
    }
}
