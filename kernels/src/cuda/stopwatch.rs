//! How long queued work takes, by the device's own clock.
//!
//! A host that waits wakes some 20 to 40 us after the device is done, as long as a whole product of few rows takes. Here it is not
//! asked: two moments stand in the queue, and before the first of them work that keeps the device while the host queues the rest.
//! A call takes the host some 5 us, as long as a product of few rows and columns takes the device, so that a call is not work enough:
//! memory is written over for as long as it must be. Where the device has come to the first moment before the host had queued the
//! last call, the sample would be of the host's speed, and is made again behind twice as much.

use std::cell::Cell;
use std::time::Duration;

use super::Cuda;
use super::event::Event;
use super::stream::Memory;
use crate::error::Result;

const OP: &str = "time work";

/// Memory that is written over, where it is for that alone: what takes a GPU of 4 TB/s 16 us, and its host some 3 to queue.
const BALLAST_BYTES: usize = 64 << 20;
/// What is written before the first sample of all: next to nothing, for whoever is slow at it needs no more.
const FIRST_BYTES: usize = 1 << 20;
/// A device that was kept for this long is not kept for longer: 9 calls of what takes a host 50 us each are over by then. Work for which
/// it is not enough waits for the device by itself, and takes as long as it seems.
const LONG_ENOUGH: Duration = Duration::from_millis(2);

/// Samples of which the shortest counts, and calls of each.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Effort {
    pub(crate) samples: usize,
    pub(crate) calls: usize,
}

/// What a figure is made with that is told.
pub(crate) const THOROUGH: Effort = Effort { samples: 5, calls: 8 };

/// Moments of a queue, and what is written over before the first that counts.
#[derive(Debug)]
pub(crate) struct Stopwatch<'a> {
    kept: Event,
    begun: Event,
    ended: Event,
    ballast: &'a Memory,
    /// Bytes of the ballast that are written before a sample, over and over where it has fewer.
    bytes: Cell<usize>,
}

impl Stopwatch<'_> {
    /// One of a device's queue, with memory in which nobody keeps anything beyond the work that is queued. Without any, work is to be
    /// long by itself.
    pub(crate) fn new(ballast: &Memory) -> Result<Stopwatch<'_>> {
        let moment = || Event::new(OP, ballast.stream(), true);
        let (kept, begun, ended) = (moment()?, moment()?, moment()?);
        let bytes = Cell::new(FIRST_BYTES.min(ballast.bytes()));
        Ok(Stopwatch { kept, begun, ended, ballast, bytes })
    }

    /// Seconds of a call of what queues work and does not wait for it: the shortest sample, each behind a call that is not timed.
    pub(crate) fn seconds(&self, effort: Effort, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
        let (mut best, mut samples) = (f64::INFINITY, 0);
        while samples < effort.samples {
            self.keep_busy()?;
            work()?;
            self.begun.record(OP)?;
            (0..effort.calls).try_for_each(|_| work())?;
            self.ended.record(OP)?;
            let was_late = self.begun.has_passed();
            self.ended.wait(OP)?;
            if was_late && self.keeps_longer()? {
                continue;
            }
            let seconds = self.ended.since(OP, &self.begun)?.as_secs_f64() / effort.calls as f64;
            (best, samples) = (best.min(seconds), samples + 1);
        }
        Ok(best)
    }

    /// Queues what the device does before all else.
    fn keep_busy(&self) -> Result<()> {
        self.kept.record(OP)?;
        let mut left = self.bytes.get();
        while left > 0 {
            let bytes = left.min(self.ballast.bytes());
            self.ballast.stream().overwrite(OP, self.ballast, bytes)?;
            left -= bytes;
        }
        Ok(())
    }

    /// Whether the device, which has done a sample, is kept twice as long from now on.
    fn keeps_longer(&self) -> Result<bool> {
        let may = self.bytes.get() > 0 && self.begun.since(OP, &self.kept)? < LONG_ENOUGH;
        if may {
            self.bytes.set(2 * self.bytes.get());
        }
        Ok(may)
    }
}

impl Cuda {
    /// Seconds of some queued work, once what it needs is there: the shortest of some samples of several calls.
    ///
    /// # Errors
    /// What the work does not do, or the driver refuses.
    pub fn seconds_of(&self, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
        work()?;
        let mut ballast = Memory::none(&self.stream);
        ballast.reserve(OP, BALLAST_BYTES.min(self.stream.free_bytes()? / 8))?;
        Stopwatch::new(&ballast)?.seconds(THOROUGH, work)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::emulated;
    use super::*;
    use crate::backend::WeightType;

    #[test]
    fn a_sample_for_which_the_host_was_late_is_made_again_behind_more_work() {
        let cuda = emulated(WeightType::Bf16);
        let mut ballast = Memory::none(&cuda.stream);
        ballast.reserve(OP, FIRST_BYTES).unwrap();
        let (samples, calls) = (2, 3);
        // How often the ballast was doubled.
        let doubled = || {
            let (watch, mut called) = (Stopwatch::new(&ballast).unwrap(), 0);
            // The first sample's calls come when the device has nothing left to do.
            let work = || {
                called += 1;
                if called <= 1 + calls { cuda.stream.wait(OP) } else { Ok(()) }
            };
            watch.seconds(Effort { samples, calls }, work).unwrap();
            let doubled = (watch.bytes.get() / FIRST_BYTES).ilog2() as usize;
            assert_eq!(called, (samples + doubled) * (1 + calls));
            doubled
        };
        // Once at least, unless the machine had something else to do for as long as is long enough.
        assert!((0..10).any(|_| doubled() > 0));
    }
}
