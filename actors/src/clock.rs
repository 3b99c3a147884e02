//! Where the time of a run goes: how long each stage was busy, and how long there was anything to do.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use scheduler::MicroBatchId;

/// What one stage has done so far; its device thread writes, anybody reads.
#[derive(Debug, Default)]
pub struct StageClock {
    busy_ns: AtomicU64,
    steps: AtomicU64,
    tokens: AtomicU64,
    restarts: AtomicU64,
}

/// A reading of a [`StageClock`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StageTimes {
    /// Time spent in steps.
    pub busy: Duration,
    /// Micro-batches computed.
    pub steps: u64,
    /// Tokens computed, prompts' and generated ones.
    pub tokens: u64,
    /// How often the stage had to be started again.
    pub restarts: u64,
}

impl StageClock {
    pub(crate) fn add_restart(&self) {
        self.restarts.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn add_step(&self, busy: Duration, tokens: usize) {
        self.busy_ns.fetch_add(busy.as_nanos() as u64, Ordering::Relaxed);
        self.steps.fetch_add(1, Ordering::Relaxed);
        self.tokens.fetch_add(tokens as u64, Ordering::Relaxed);
    }

    /// What the stage has done so far.
    pub fn read(&self) -> StageTimes {
        StageTimes {
            busy: Duration::from_nanos(self.busy_ns.load(Ordering::Relaxed)),
            steps: self.steps.load(Ordering::Relaxed),
            tokens: self.tokens.load(Ordering::Relaxed),
            restarts: self.restarts.load(Ordering::Relaxed),
        }
    }
}

/// What a device thread is at; the thread writes, its watchdog reads.
#[derive(Debug, Default)]
pub(crate) struct AtWork(Mutex<Work>);

#[derive(Debug, Default)]
struct Work {
    step: Option<(MicroBatchId, Instant)>,
    /// The micro-batch over which the thread was given up.
    hung: Option<MicroBatchId>,
}

impl AtWork {
    pub(crate) fn set(&self, micro_batch: Option<MicroBatchId>) {
        self.lock().step = micro_batch.map(|id| (id, Instant::now()));
    }

    /// Gives the thread up where it has been at one micro-batch for longer than `timeout`.
    pub(crate) fn give_up_after(&self, timeout: Duration) -> bool {
        let mut work = self.lock();
        let hung = work.step.filter(|(_, since)| since.elapsed() > timeout);
        work.hung = work.hung.or(hung.map(|(id, _)| id));
        hung.is_some()
    }

    /// The micro-batch over which the thread was given up, if it was.
    pub(crate) fn hung(&self) -> Option<MicroBatchId> {
        self.lock().hung
    }

    fn lock(&self) -> MutexGuard<'_, Work> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long at least one micro-batch was in flight, and what came of it. A stage's bubble is this time less
/// its busy time.
#[derive(Debug, Default)]
pub struct PipelineClock {
    active_ns: AtomicU64,
    sampled_tokens: AtomicU64,
}

impl PipelineClock {
    pub(crate) fn add_sampled(&self, tokens: usize) {
        self.sampled_tokens.fetch_add(tokens as u64, Ordering::Relaxed);
    }

    /// Tokens drawn so far, those of unfinished sequences too.
    pub fn sampled_tokens(&self) -> u64 {
        self.sampled_tokens.load(Ordering::Relaxed)
    }

    /// Time with a micro-batch in flight, up to the last moment when there was none.
    pub fn active(&self) -> Duration {
        Duration::from_nanos(self.active_ns.load(Ordering::Relaxed))
    }
}

/// Adds the spans between the first micro-batch in flight and the last one back.
#[derive(Debug)]
pub(crate) struct ActiveSpan {
    clock: std::sync::Arc<PipelineClock>,
    since: Option<Instant>,
}

impl ActiveSpan {
    pub(crate) fn new(clock: std::sync::Arc<PipelineClock>) -> Self {
        ActiveSpan { clock, since: None }
    }

    pub(crate) fn update(&mut self, is_active: bool) {
        match (is_active, self.since) {
            (true, None) => self.since = Some(Instant::now()),
            (_, Some(since)) => {
                // Counted at every event, so that a run that is cut short keeps its time.
                let now = Instant::now();
                self.clock.active_ns.fetch_add((now - since).as_nanos() as u64, Ordering::Relaxed);
                self.since = is_active.then_some(now);
            }
            (false, None) => {}
        }
    }
}
