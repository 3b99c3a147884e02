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
