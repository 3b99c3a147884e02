//! A stage of several ranks: each has a part of every block on a device of its own.
//!
//! The first rank is the stage as the pipeline sees it; the others follow it through each micro-batch. They learn of it
//! by a [`RankStep`] and of activations by the collective, and hand nothing on.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::time::{Duration, Instant};

use kernels::{Array, AttentionSlice, Axis, Collective, GroupExit};
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

    /// Rows of all sequences.
    pub(crate) fn num_rows(&self) -> usize {
        self.slices.iter().map(|slice| slice.num_rows).sum()
    }

    /// Those of [`MicroBatch::halves`], or nothing of a single row.
    pub(crate) fn halves(&self) -> Option<(RankStep, RankStep)> {
        let num_rows = self.num_rows();
        let cut = num_rows / 2;
        (cut > 0).then(|| (self.rows(0..cut), self.rows(cut..num_rows)))
    }

    /// What it says of some rows.
    fn rows(&self, rows: Range<usize>) -> RankStep {
        let cut = |slice: &AttentionSlice| {
            let end = (slice.first_row + slice.num_rows).min(rows.end);
            let first = slice.first_row.max(rows.start);
            (first < end).then(|| AttentionSlice {
                first_row: first - rows.start,
                num_rows: end - first,
                first_position: slice.first_position + (first - slice.first_row),
                pages: slice.pages.clone(),
            })
        };
        let of = |all: &[u32]| {
            let wanted = all.iter().filter(|row| rows.contains(&(**row as usize)));
            wanted.map(|row| row - rows.start as u32).collect()
        };
        RankStep {
            micro_batch: self.micro_batch,
            slices: self.slices.iter().filter_map(cut).collect(),
            logit_rows: of(&self.logit_rows),
            greedy_rows: of(&self.greedy_rows),
        }
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
    /// The way out, for whoever gives a rank up whose device waits for another's.
    pub exit: GroupExit,
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
        let RankGroup { collective, sharing, clock, exit: _ } = group; // A host waits no longer than its patience.
        Ranks::new(collective, sharing, clock)
    }
}

impl RankGroup {
    /// The group on a device whose arrays are not the host's: `join` makes its collective, with this one to agree by and the way out.
    pub(crate) fn join<A>(
        self,
        join: impl FnOnce(Box<dyn Collective<Array>>, &GroupExit) -> kernels::Result<Box<dyn Collective<A>>>,
    ) -> Result<Ranks<A>> {
        let RankGroup { collective, sharing, clock, exit } = self;
        Ok(Ranks::new(join(collective, &exit)?, sharing, clock))
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

    /// Gives that room back.
    pub(crate) fn free(&mut self) {
        self.collective.free();
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

    /// Says whether this rank had room for its part of a step, and hears it of the others.
    pub(crate) fn end_step(&mut self, has_room: bool) -> Result<()> {
        Ok(self.collective.end_step(has_room)?)
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

#[cfg(test)]
mod tests {
    use scheduler::{MicroBatchId, Request, RequestKey, Sampling, SequenceId, Slice};

    use super::*;

    /// Sequences of so many tokens each, some of which ask for a draw by logits and some for the likeliest token, or score their prompt.
    fn batch(lengths: &[usize]) -> MicroBatch {
        let slice = |(sequence, &length): (usize, &usize)| {
            let mut sampling = Sampling::greedy(4);
            sampling.temperature = if sequence.is_multiple_of(2) { 0.0 } else { 0.5 };
            let score = if sequence == 2 { vec![9; length - 1] } else { Vec::new() };
            Slice {
                sequence: SequenceId(sequence as u64),
                first_position: 10 * sequence as u32,
                tokens: (0..length as u32).collect(),
                pages: Arc::new(vec![sequence as u32, 90]),
                sample: sequence != 3,
                bars_stops: false,
                score,
                counts: None,
                mask: None,
                fed_back: None,
                request: Arc::new(Request {
                    key: RequestKey(0),
                    prompt: vec![0],
                    sampling: Arc::new(sampling),
                    sample: 0,
                }),
            }
        };
        MicroBatch { id: MicroBatchId(7), slices: lengths.iter().enumerate().map(slice).collect() }
    }

    #[test]
    fn ranks_go_through_the_halves_that_the_first_one_does() {
        let lengths = [&[1, 1, 1, 1, 1][..], &[2], &[5], &[1, 7, 1], &[3, 4, 2, 8], &[1, 2, 9, 1, 6]];
        for (lengths, draws) in lengths.into_iter().flat_map(|lengths| [(lengths, true), (lengths, false)]) {
            let whole = batch(lengths);
            let (front, back) = whole.halves().unwrap();
            let expected = (RankStep::of(&front, draws), RankStep::of(&back, draws));
            let found = RankStep::of(&whole, draws).halves().unwrap();
            assert_eq!(format!("{found:?}"), format!("{expected:?}"), "{lengths:?}");
        }
        for lengths in [&[1][..], &[]] {
            assert!(RankStep::of(&batch(lengths), true).halves().is_none(), "{lengths:?}");
        }
    }
}
