//! What a stage does with its time, and why it waits when it does.

use std::time::Duration;

use crate::scheduler::Flow;

/// What holds for a stage during some time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Doing {
    Busy,
    Starved,
    KvLimited,
    Tail,
    Idle,
}

/// Number of things a stage may do.
pub(super) const KINDS: usize = 5;

/// A stage's time; the parts sum up to the wall time exactly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Waits {
    /// It computed.
    pub busy: Duration,
    /// It waited while another stage computed: the pipeline fills, or stages are unlike.
    pub starved: Duration,
    /// It waited while sequences waited for want of pages, and fewer micro-batches were in flight for it.
    pub kv_limited: Duration,
    /// It waited when no request was left to admit, and the last ones did not fill the pipeline.
    pub tail: Duration,
    /// It waited and no stage computed: everything was on its way between stages.
    pub idle: Duration,
}

impl Waits {
    /// All of it: the wall time.
    pub fn total(&self) -> Duration {
        self.busy + self.starved + self.kv_limited + self.tail + self.idle
    }

    pub(super) fn of_ns(ns: [u64; KINDS]) -> Self {
        let [busy, starved, kv_limited, tail, idle] = ns.map(Duration::from_nanos);
        Self { busy, starved, kv_limited, tail, idle }
    }
}

/// Why a stage waits that does, from what the scheduler says, whether more requests come, and whether any stage
/// computes.
pub(super) fn reason(flow: Flow, is_exhausted: bool, is_any_busy: bool) -> Doing {
    match (flow, is_any_busy) {
        (Flow::NothingWaits, _) if is_exhausted => Doing::Tail,
        (Flow::ShortOfPages, _) => Doing::KvLimited,
        (_, true) => Doing::Starved,
        (_, false) => Doing::Idle,
    }
}
