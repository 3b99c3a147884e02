//! How long queued work takes, by the device's own clock.
//!
//! A host that waits wakes some 20 to 40 us after the device is done, as long as a whole product of few rows takes. Here it is not
//! asked: two moments stand in the queue, and before the first of them work that keeps the device while the host queues the rest.

use std::sync::Arc;

use super::Cuda;
use super::event::Event;
use super::stream::Stream;
use crate::error::Result;

const OP: &str = "time work";

/// Samples of which the shortest counts, and calls of each.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Effort {
    pub(crate) samples: usize,
    pub(crate) calls: usize,
}

/// What a figure is made with that is told.
pub(crate) const THOROUGH: Effort = Effort { samples: 5, calls: 8 };

/// Two moments of a queue.
#[derive(Debug)]
pub(crate) struct Stopwatch {
    begun: Event,
    ended: Event,
}

impl Stopwatch {
    pub(crate) fn new(stream: &Arc<Stream>) -> Result<Stopwatch> {
        Ok(Stopwatch { begun: Event::new(OP, stream, true)?, ended: Event::new(OP, stream, true)? })
    }

    /// Seconds of a call of what queues work and does not wait for it: the shortest sample, each behind a call that is not timed.
    pub(crate) fn seconds(&self, effort: Effort, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
        let mut best = f64::INFINITY;
        for _ in 0..effort.samples {
            work()?;
            self.begun.record(OP)?;
            (0..effort.calls).try_for_each(|_| work())?;
            self.ended.record(OP)?;
            self.ended.wait(OP)?;
            let seconds = self.ended.since(OP, &self.begun)?.as_secs_f64() / effort.calls as f64;
            best = best.min(seconds);
        }
        Ok(best)
    }
}

impl Cuda {
    /// Seconds of some queued work, once what it needs is there: the shortest of some samples of several calls.
    ///
    /// # Errors
    /// What the work does not do, or the driver refuses.
    pub fn seconds_of(&self, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
        work()?;
        Stopwatch::new(&self.stream)?.seconds(THOROUGH, work)
    }
}
