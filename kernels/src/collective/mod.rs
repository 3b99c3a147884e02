//! What the ranks of a stage tell each other: sums, parts put side by side, and copies.
//!
//! The ranks of a group call the same operations in the same order, each on a thread of its own. [`thread_ranks`]
//! makes a group of threads in one process, [`TcpRank`] one of processes that are joined by TCP, and [`crate::NcclRank`] makes
//! one of GPUs from either.
//!
//! Three invariants, which `tests/collective.rs` checks of every maker:
//! * **Sums have one order**: rank 0's numbers, then rank 1's added to them, and so on, number by number. So a
//!   result has the same bits at every call and on every rank, whoever comes first.
//! * **Nobody waits for ever.** A rank that is gone, or that others have waited for longer than their patience,
//!   ends the group: every call of every rank is an error from then on, at the latest when its own patience ends.
//! * **Ranks that disagree** on the operation or on shapes are an error on all of them.

mod frame;
mod meeting;
mod tcp;
mod threads;

use std::ops::Range;

use crate::error::{Error, Result};

pub use frame::{FRAME_HEADER_BYTES, Frame};
pub use tcp::TcpRank;
pub use threads::{ThreadRank, thread_ranks};

/// In which direction parts lie beside each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Axis {
    /// `[rows of each rank, cols]` become `[all rows, cols]`.
    Rows,
    /// `[rows, columns of each rank]` become `[rows, all columns]`.
    Columns,
}

/// One rank's place in a group; `A` is an array on its device, `[rows, cols]`.
pub trait Collective<A>: Send {
    /// Which rank this is, from 0.
    fn rank(&self) -> usize;

    /// How many there are.
    fn num_ranks(&self) -> usize;

    /// Every rank's `x` becomes the sum of all, added in the order of ranks.
    ///
    /// # Errors
    /// Shapes that are not equal; a rank that is gone or does not come; a group that has ended before.
    fn all_reduce(&mut self, x: &mut A) -> Result<()>;

    /// Makes room for sums of arrays of so many numbers, where a device's memory is slow to give.
    ///
    /// # Errors
    /// There is no such room.
    fn reserve(&mut self, _numbers: usize) -> Result<()> {
        Ok(())
    }

    /// Gives back what there was room in for sums; those to come make it again. No rank waits for another here.
    fn free(&mut self) {}

    /// An array's rows in the pieces that [`Collective::begin_all_reduce`] is told of, in order: several where this rank sums some
    /// while it computes others. They follow from the number of rows, so that all ranks have the same.
    fn pieces(&self, rows: usize) -> Vec<Range<usize>> {
        std::iter::once(0..rows).collect()
    }

    /// Says that a piece of `x`, which has its shape, is computed, or will be when all that is queued has run: what is queued
    /// from now on leaves it alone, and may run beside its sums.
    ///
    /// # Errors
    /// What the device refuses. No rank waits for another here.
    fn begin_all_reduce(&mut self, _x: &A, _piece: Range<usize>) -> Result<()> {
        Ok(())
    }

    /// As [`Collective::all_reduce`], to the bit, of an array all of whose pieces were begun.
    ///
    /// # Errors
    /// As for [`Collective::all_reduce`].
    fn finish_all_reduce(&mut self, x: &mut A) -> Result<()> {
        self.all_reduce(x)
    }

    /// `out` becomes the parts of all ranks, in their order. They are equal in the other direction, and may be empty.
    ///
    /// # Errors
    /// As for [`Collective::all_reduce`].
    fn all_gather(&mut self, axis: Axis, part: &A, out: &mut A) -> Result<()>;

    /// As [`Collective::all_gather`], but only rank 0 has the parts of all afterwards.
    ///
    /// # Errors
    /// As for [`Collective::all_reduce`].
    fn gather(&mut self, axis: Axis, part: &A, out: &mut A) -> Result<()>;

    /// Every rank's `x` becomes that of `root`, shape and all.
    ///
    /// # Errors
    /// As for [`Collective::all_reduce`], but shapes need not be equal.
    fn broadcast(&mut self, root: usize, x: &mut A) -> Result<()>;

    /// Says at a step's end whether this rank had room for it: one that has none says so at once, and the others hear of it by
    /// the call that they are at, this one at the latest. Where ranks are cores nothing is said, for a host's memory does not run
    /// out like that.
    ///
    /// # Errors
    /// [`Error::NoRoomOnRank`] on every rank, where one had none: the group goes on. Else as for [`Collective::all_reduce`].
    fn end_step(&mut self, _has_room: bool) -> Result<()> {
        Ok(())
    }
}

/// An operation, as ranks name it to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Op {
    Hello = 1,
    AllReduce = 2,
    GatherRows = 3,
    GatherColumns = 4,
    Broadcast = 5,
    AllReducePieces = 6,
    EndStep = 7,
    /// In place of any other.
    NoRoom = 8,
}

impl Op {
    pub(crate) fn gather(axis: Axis) -> Self {
        match axis {
            Axis::Rows => Op::GatherRows,
            Axis::Columns => Op::GatherColumns,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Op::Hello => "hello",
            Op::AllReduce | Op::AllReducePieces => "all_reduce",
            Op::GatherRows | Op::GatherColumns => "all_gather",
            Op::Broadcast => "broadcast",
            Op::EndStep => "end_step",
            Op::NoRoom => "no_room",
        }
    }

    pub(crate) fn error(self, rank: usize, message: impl Into<String>) -> Error {
        Error::Collective { op: self.name(), rank, message: message.into() }
    }
}

/// The shape of what parts `[rows, cols]` make together; where they do not fit, the rank that differs.
pub(crate) fn gathered(
    axis: Axis,
    shapes: impl IntoIterator<Item = [usize; 2]>,
) -> std::result::Result<[usize; 2], usize> {
    let mut whole: Option<[usize; 2]> = None;
    for (rank, [rows, cols]) in shapes.into_iter().enumerate() {
        let Some([all_rows, all_cols]) = &mut whole else {
            whole = Some([rows, cols]);
            continue;
        };
        match axis {
            Axis::Rows if *all_cols == cols => *all_rows += rows,
            Axis::Columns if *all_rows == rows => *all_cols += cols,
            Axis::Rows | Axis::Columns => return Err(rank),
        }
    }
    Ok(whole.unwrap_or([0, 0]))
}

/// Copies a rank's `part`, of `cols` columns, to where it lies in `out`: after `before` rows or columns of others.
fn place(axis: Axis, part: &[f32], cols: usize, before: usize, out: &mut [f32], out_cols: usize) {
    match axis {
        Axis::Rows => out[before * out_cols..][..part.len()].copy_from_slice(part),
        Axis::Columns if cols > 0 => {
            for (part, out) in part.chunks_exact(cols).zip(out.chunks_exact_mut(out_cols)) {
                out[before..before + cols].copy_from_slice(part);
            }
        }
        Axis::Columns => {}
    }
}
