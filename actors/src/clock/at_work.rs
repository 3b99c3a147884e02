//! What a device thread is at right now, for the watchdog that looks for those that hang.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use scheduler::MicroBatchId;

/// What a device thread is at; the thread writes, its watchdog reads.
#[derive(Debug, Default)]
pub(crate) struct AtWork(Mutex<Work>);

#[derive(Debug, Default)]
struct Work {
    step: Option<(MicroBatchId, Instant)>,
    /// When a process last said that it is there.
    beat: Option<Instant>,
    hung: Option<Hung>,
}

/// A device thread that was given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hung {
    /// The micro-batch that it was at, if it was.
    pub(crate) micro_batch: Option<MicroBatchId>,
}

impl AtWork {
    pub(crate) fn set(&self, micro_batch: Option<MicroBatchId>) {
        self.lock().step = micro_batch.map(|id| (id, Instant::now()));
    }

    /// A process is there, whatever it is at; it says so many times a second.
    pub(crate) fn beat(&self) {
        self.lock().beat = Some(Instant::now());
    }

    /// What it is at.
    pub(crate) fn micro_batch(&self) -> Option<MicroBatchId> {
        self.lock().step.map(|(id, _)| id)
    }

    /// Gives the thread up where it has been at one micro-batch for longer than `timeout`, or its process was not heard
    /// of for as long.
    pub(crate) fn give_up_after(&self, timeout: Duration) -> bool {
        let mut work = self.lock();
        let has_hung = |since: Instant| since.elapsed() > timeout;
        let is_hung = work.step.is_some_and(|(_, since)| has_hung(since)) || work.beat.is_some_and(has_hung);
        if is_hung {
            let micro_batch = work.step.map(|(id, _)| id);
            work.hung.get_or_insert(Hung { micro_batch });
        }
        is_hung
    }

    /// Over what the thread was given up, if it was.
    pub(crate) fn hung(&self) -> Option<Hung> {
        self.lock().hung
    }

    fn lock(&self) -> MutexGuard<'_, Work> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
