//! What each rank of a stage has done, told to whoever reports it: time in collectives, and steps for a timeline.

use std::sync::Arc;
use std::time::{Duration, Instant};

use stages::{CollectiveClock, CollectiveTimes, RankStep};

use crate::clock::{StepEvent, StepLog};

/// A stage's ranks as they are watched. Copies watch the same ones.
#[derive(Clone)]
pub(crate) struct Watch {
    /// Of each rank.
    clocks: Vec<Arc<CollectiveClock>>,
    stage: usize,
    listener: Listener,
}

/// Who wants to know of steps.
#[derive(Clone)]
enum Listener {
    Nobody,
    Log(StepLog),
    /// Another process, through this one's voice; given the rank.
    Process(Arc<dyn Fn(usize, Done) + Send + Sync>),
}

/// A rank's step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Done {
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
        Watch::heard_by(stage, num_ranks, log.map_or(Listener::Nobody, Listener::Log))
    }

    /// The same in the process of a stage, which has each step told to the process that started it, if that wants to know.
    pub(crate) fn from_afar(
        stage: usize,
        num_ranks: usize,
        tell: Option<Arc<dyn Fn(usize, Done) + Send + Sync>>,
    ) -> Self {
        Watch::heard_by(stage, num_ranks, tell.map_or(Listener::Nobody, Listener::Process))
    }

    fn heard_by(stage: usize, num_ranks: usize, listener: Listener) -> Self {
        Watch { clocks: (0..num_ranks).map(|_| Arc::default()).collect(), stage, listener }
    }

    /// Whether anybody wants to know of steps.
    pub(crate) fn has_listener(&self) -> bool {
        !matches!(self.listener, Listener::Nobody)
    }

    /// The clocks of all ranks, in order.
    pub(crate) fn clocks(&self) -> &[Arc<CollectiveClock>] {
        &self.clocks
    }

    /// Where a rank of this process tells its collectives.
    pub(super) fn clock(&self, rank: usize) -> Arc<CollectiveClock> {
        Arc::clone(&self.clocks[rank])
    }

    /// A rank has taken a step that ended just now; its clock knows of it.
    pub(crate) fn tell(&self, rank: usize, done: Done) {
        let log = match &self.listener {
            Listener::Nobody => return,
            Listener::Log(log) => log,
            Listener::Process(tell) => return tell(rank, done),
        };
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
