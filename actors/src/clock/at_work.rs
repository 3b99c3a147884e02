//! What a device thread is at right now, for the watchdog that looks for those that hang.

use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use scheduler::MicroBatchId;
use stages::GroupExit;
use tokio::sync::Notify;

use crate::thread::lock;

/// What a device thread is at; the thread writes, its watchdog reads.
#[derive(Debug, Default)]
pub(crate) struct AtWork {
    work: Mutex<Work>,
    freed: Notify,
}

#[derive(Debug, Default)]
struct Work {
    step: Option<(MicroBatchId, Instant)>,
    /// When a process last said that it is there.
    beat: Option<Instant>,
    hung: Option<Hung>,
    /// Out of groups in which its devices may wait for each other.
    exits: Vec<GroupExit>,
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

    /// Its stage is loaded, and has these ways out of groups in which it may wait.
    pub(crate) fn set_exits(&self, exits: Vec<GroupExit>) {
        self.lock().exits = exits;
    }

    /// The ways out, for whoever has given it up: they are there once.
    pub(crate) fn take_exits(&self) -> Vec<GroupExit> {
        std::mem::take(&mut self.lock().exits)
    }

    /// The thread has freed all that its stage had.
    pub(crate) fn free(&self) {
        self.freed.notify_one();
    }

    /// Waits for that. One may wait.
    pub(crate) async fn freed(&self) {
        self.freed.notified().await;
    }

    /// Over what the thread was given up, if it was.
    pub(crate) fn hung(&self) -> Option<Hung> {
        self.lock().hung
    }

    fn lock(&self) -> MutexGuard<'_, Work> {
        lock(&self.work)
    }
}
