//! A stage of several ranks: each has a part of every block on a device of its own.
//!
//! The first rank is the stage as the pipeline sees it; the others follow it through each micro-batch. They learn of it
//! by a [`RankStep`] and of activations by the collective, and hand nothing on.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::time::{Duration, Instant};

use kernels::{Array, AttentionSlice, Axis, Collective};
use scheduler::MicroBatch;

use crate::error::Result;
use crate::head::wanted_rows;
use crate::shard::RankPlace;
use crate::sharing::Sharing;

/// What a rank beside the first must know of a micro-batch.
#[derive(Debug, Clone, Default)]
pub struct RankStep {
    /// The micro-batch's id.
    pub micro_batch: u64,
    /// Rows of each sequence, and its pages.
    pub slices: Vec<AttentionSlice>,
    /// Rows whose logits the first rank asks for, in its order.
    pub logit_rows: Vec<u32>,
    /// Rows of which it asks for the largest logit alone, in its order.
    pub greedy_rows: Vec<u32>,
}

impl RankStep {
    /// Of a micro-batch; `draws` says whether the stage has the output matrix.
    pub fn of(batch: &MicroBatch, draws: bool) -> Self {
        let mut first_row = 0;
        let slices = (batch.slices.iter())
            .map(|slice| {
                let num_rows = slice.tokens.len();
                let first_position = slice.first_position as usize;
                let out = AttentionSlice { first_row, num_rows, first_position, pages: slice.pages.to_vec() };
                first_row += num_rows;
                out
            })
            .collect();
        let (logit_rows, greedy_rows) = if draws { wanted_rows(batch) } else { Default::default() };
        RankStep { micro_batch: batch.id.0, slices, logit_rows, greedy_rows }
    }
}

/// How long a rank looks out for the next step before it lies down: what the first one does between two steps, and no more
/// than a scheduler's time slice.
const LOOK_OUT: Duration = Duration::from_millis(1);

/// Looks between two looks at the clock, and offers of the core to whoever else wants it.
const LOOKS: u32 = 64;

/// The steps of a rank that is a thread beside the first's. It looks out for the next one for a while, as it does for the
/// other ranks in collectives: who waits for it is the first rank, and a core that has lain down takes 50 µs and more to wake.
#[derive(Debug)]
pub struct RankSteps(Receiver<Arc<RankStep>>);

/// A way for steps to a rank of this process. They end with the sender.
pub fn rank_steps() -> (Sender<Arc<RankStep>>, RankSteps) {
    let (sender, steps) = channel();
    (sender, RankSteps(steps))
}

impl Iterator for RankSteps {
    type Item = Arc<RankStep>;

    fn next(&mut self) -> Option<Arc<RankStep>> {
        let begun = Instant::now();
        while begun.elapsed() < LOOK_OUT {
            for _ in 0..LOOKS {
                match self.0.try_recv() {
                    Ok(step) => return Some(step),
                    Err(TryRecvError::Disconnected) => return None,
                    Err(TryRecvError::Empty) => std::hint::spin_loop(),
                }
            }
            std::thread::yield_now();
        }
        self.0.recv().ok()
    }
}

/// A rank's way to the others, with host arrays; and how they share blocks.
pub struct RankGroup {
    /// The way.
    pub collective: Box<dyn Collective<Array>>,
    /// How blocks are shared, the same on every rank.
    pub sharing: Sharing,
    /// Where its time is told.
    pub clock: Arc<CollectiveClock>,
}

/// What a rank spends on collectives.
#[derive(Debug, Default)]
pub struct CollectiveClock {
    calls: AtomicU64,
    bytes: AtomicU64,
    nanos: AtomicU64,
}

/// A reading of a [`CollectiveClock`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CollectiveTimes {
    /// How many.
    pub calls: u64,
    /// Bytes of the arrays that they were about, on this rank.
    pub bytes: u64,
    /// Time in them, waiting for other ranks counted.
    pub time: Duration,
}

impl CollectiveClock {
    /// What there is so far.
    pub fn read(&self) -> CollectiveTimes {
        let [calls, bytes, nanos] =
            [&self.calls, &self.bytes, &self.nanos].map(|counter| counter.load(Ordering::Relaxed));
        CollectiveTimes { calls, bytes, time: Duration::from_nanos(nanos) }
    }

    /// Adds what was spent, here or in another process.
    pub fn add(&self, times: CollectiveTimes) {
        self.calls.fetch_add(times.calls, Ordering::Relaxed);
        self.bytes.fetch_add(times.bytes, Ordering::Relaxed);
        self.nanos.fetch_add(times.time.as_nanos() as u64, Ordering::Relaxed);
    }
}

/// The other ranks, as a span's forward pass sees them.
pub(crate) struct Ranks<A> {
    pub(crate) place: RankPlace,
    pub(crate) sharing: Sharing,
    collective: Box<dyn Collective<A>>,
    clock: Arc<CollectiveClock>,
}

impl From<RankGroup> for Ranks<Array> {
    fn from(group: RankGroup) -> Self {
        let RankGroup { collective, sharing, clock } = group;
        Ranks::new(collective, sharing, clock)
    }
}

impl RankGroup {
    /// The group on a device whose arrays are not the host's: `join` makes its collective, with this one to agree by.
    pub(crate) fn join<A>(
        self,
        join: impl FnOnce(Box<dyn Collective<Array>>) -> kernels::Result<Box<dyn Collective<A>>>,
    ) -> Result<Ranks<A>> {
        let RankGroup { collective, sharing, clock } = self;
        Ok(Ranks::new(join(collective)?, sharing, clock))
    }
}

impl<A> Ranks<A> {
    fn new(collective: Box<dyn Collective<A>>, sharing: Sharing, clock: Arc<CollectiveClock>) -> Self {
        let place = RankPlace { rank: collective.rank(), num_ranks: collective.num_ranks() };
        Ranks { place, sharing, collective, clock }
    }

    pub(crate) fn is_first(&self) -> bool {
        self.place.rank == 0
    }

    /// Makes room for what the others send of arrays of up to so many numbers.
    pub(crate) fn reserve(&mut self, numbers: usize) -> Result<()> {
        Ok(self.collective.reserve(numbers)?)
    }

    /// Rows in the pieces whose sums are begun one by one.
    pub(crate) fn pieces(&self, rows: usize) -> Vec<Range<usize>> {
        self.collective.pieces(rows)
    }

    /// A piece of `x` is computed.
    pub(crate) fn begin_all_reduce(&mut self, x: &A, piece: Range<usize>) -> Result<()> {
        Ok(self.collective.begin_all_reduce(x, piece)?)
    }

    /// `x` of `numbers`, all of whose pieces were begun, becomes the sum over all ranks.
    pub(crate) fn finish_all_reduce(&mut self, x: &mut A, numbers: usize) -> Result<()> {
        self.timed(numbers, |collective| collective.finish_all_reduce(x))
    }

    /// `out` of `numbers` becomes the parts of all ranks.
    pub(crate) fn all_gather(&mut self, axis: Axis, part: &A, out: &mut A, numbers: usize) -> Result<()> {
        self.timed(numbers, |collective| collective.all_gather(axis, part, out))
    }

    /// `out` of `numbers` becomes the parts of all ranks, on the first of them.
    pub(crate) fn gather(&mut self, axis: Axis, part: &A, out: &mut A, numbers: usize) -> Result<()> {
        self.timed(numbers, |collective| collective.gather(axis, part, out))
    }

    /// `x` of `numbers` becomes that of the first rank.
    pub(crate) fn broadcast(&mut self, x: &mut A, numbers: usize) -> Result<()> {
        self.timed(numbers, |collective| collective.broadcast(0, x))
    }

    fn timed(
        &mut self,
        numbers: usize,
        run: impl FnOnce(&mut dyn Collective<A>) -> kernels::Result<()>,
    ) -> Result<()> {
        let begun = Instant::now();
        run(&mut *self.collective)?;
        let bytes = (numbers * size_of::<f32>()) as u64;
        self.clock.add(CollectiveTimes { calls: 1, bytes, time: begun.elapsed() });
        Ok(())
    }
}
