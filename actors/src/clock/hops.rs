//! What goes from one stage to the next: how much, and how long it is on its way.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The hops of one stage; whoever carries them writes, anybody reads.
#[derive(Debug, Default)]
pub(crate) struct HopClock {
    hops: AtomicU64,
    bytes: AtomicU64,
    nanos: AtomicU64,
}

/// A reading of a stage's hops to the next one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HopTimes {
    /// Micro-batches that have arrived.
    pub hops: u64,
    /// Bytes of these: of activations in one process, of all that went over the connection between two.
    pub bytes: u64,
    /// Time from the moment when each was handed on until it had arrived, word of that included between processes.
    pub time: Duration,
}

impl HopClock {
    pub(crate) fn add(&self, bytes: u64, time: Duration) {
        self.hops.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.nanos.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
    }

    pub(crate) fn read(&self) -> HopTimes {
        let [hops, bytes, nanos] =
            [&self.hops, &self.bytes, &self.nanos].map(|counter| counter.load(Ordering::Relaxed));
        HopTimes { hops, bytes, time: Duration::from_nanos(nanos) }
    }
}
