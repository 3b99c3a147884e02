//! What each rank of a stage has done, told to whoever reports it: time in collectives, and steps for a timeline.

use std::sync::Arc;
use std::time::{Duration, Instant};

use stages::{CollectiveClock, CollectiveTimes, RankStep};

use crate::clock::{StepEvent, StepLog};

/// A stage's ranks as they are watched. Copies watch the same ones.
#[derive(Debug, Clone)]
pub(crate) struct Watch {
    /// Of each rank.
    clocks: Vec<Arc<CollectiveClock>>,
    stage: usize,
    log: Option<StepLog>,
}

/// A rank's step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Done {
    pub(super) micro_batch: u64,
    pub(super) tokens: usize,
    /// Of sequences that decode.
    pub(super) decode_tokens: usize,
    pub(super) time: Duration,
    /// What of it went to collectives.
    pub(super) collectives: CollectiveTimes,
}

impl Watch {
    /// Of so many ranks.
    pub(crate) fn new(stage: usize, num_ranks: usize, log: Option<StepLog>) -> Self {
        Watch { clocks: (0..num_ranks).map(|_| Arc::default()).collect(), stage, log }
    }

    /// The clocks of all ranks, in order.
    pub(crate) fn clocks(&self) -> &[Arc<CollectiveClock>] {
        &self.clocks
    }

    /// Where a rank of this process tells its collectives.
    pub(super) fn clock(&self, rank: usize) -> Arc<CollectiveClock> {
        Arc::clone(&self.clocks[rank])
    }

    /// A rank of this process has taken a step that ended just now.
    pub(super) fn tell(&self, rank: usize, done: Done) {
        let Some(log) = &self.log else { return };
        let end = Instant::now();
        log.tell(StepEvent {
            stage: self.stage,
            rank: Some((rank, done.collectives.time)),
            micro_batch: done.micro_batch,
            // A process's step ends when its word is here.
            start: end.checked_sub(done.time).unwrap_or(end),
            end,
            tokens: done.tokens,
            decode_tokens: done.decode_tokens,
            hop_bytes: 0,
        });
    }

    /// The same of a rank of another process.
    pub(super) fn tell_from_afar(&self, rank: usize, done: Done) {
        self.clocks[rank].add(done.collectives);
        self.tell(rank, done);
    }
}

/// A step that is being taken.
pub(super) struct Doing {
    begun: Instant,
    before: CollectiveTimes,
}

impl Doing {
    pub(super) fn begin(clock: &CollectiveClock) -> Self {
        Doing { begun: Instant::now(), before: clock.read() }
    }

    pub(super) fn end(self, clock: &CollectiveClock, step: &RankStep) -> Done {
        let CollectiveTimes { calls, bytes, time } = clock.read();
        let rows = || step.slices.iter().map(|slice| slice.num_rows);
        Done {
            micro_batch: step.micro_batch,
            tokens: rows().sum(),
            decode_tokens: rows().filter(|rows| *rows == 1).count(),
            time: self.begun.elapsed(),
            collectives: CollectiveTimes {
                calls: calls - self.before.calls,
                bytes: bytes - self.before.bytes,
                time: time - self.before.time,
            },
        }
    }
}
