//! GPUs that are joined by NCCL: the ranks of a stage, and stages that are processes of their own (`gate.rs`).
//!
//! NCCL moves numbers and adds none, so that sums have the order of ranks here too: every rank collects its share of the
//! numbers from all others, adds them up with a kernel of ours, and hands the sums round. That moves as much as a ring does.
//!
//! Before each call the ranks agree through a group of the host's, threads or TCP, on what comes. There a rank that is gone,
//! late or at another operation is found, before anything is queued that would wait for it on the device. A rank that dies
//! between agreeing and queueing leaves the others' queues stuck: whoever waits for such a queue hangs until the watchdog has found
//! it, and the group is left by its [`GroupExit`]. A queue then goes on with numbers that are none, and the next call is an
//! error. To leave waits for nobody: where the library waits for the other ranks before it frees what it has, a thread of its own does.
//! A rank that has no memory for its part of a step says so in place of what comes, and none goes on with it.
//!
//! Sums of many rows are made in pieces, on a queue of their own: those of the first rows while the next are computed (`beside.rs`).

mod agreement;
mod beside;
mod calls;
mod gate;

use std::ops::Range;
use std::sync::Arc;

use agreement::{Agreement, Told};
use beside::Beside;
use calls::{Communicator, Direction, Move, Nccl};

pub(super) use calls::find;
pub use calls::{GroupExit, GroupId};
pub use gate::{Gate, NcclReceiver, NcclSender};

use super::arrays::CudaArray;
use super::memory::cuda_allocated_bytes;
use super::program;
use super::stream::{Argument, Grid, Kernel, Memory, Stream};
use super::{Cuda, flat_grid, u32_of};
use crate::array::Array;
use crate::collective::{Axis, Collective, Op, gathered};
use crate::error::{Error, Result};

/// Numbers of a share are a multiple of this: 16 bytes.
const SHARE: usize = 4;
const NUMBER: usize = size_of::<f32>();

/// A rank that is a GPU.
pub struct NcclRank {
    // Before the others hear that this rank is gone, what it has queued is ended.
    communicator: Communicator,
    agreement: Agreement,
    sum_ranks: Kernel,
    place_columns: Kernel,
    /// What the others have sent.
    parts: Memory,
    moves: Vec<Move>,
    beside: Beside,
    stream: Arc<Stream>,
}

impl NcclRank {
    /// Takes the place that a rank has in `control`, a group of the host's. All ranks do so, each on a thread of its own and with
    /// a way out of its own, by which whoever gives a rank up wakes it.
    ///
    /// # Errors
    /// NCCL is missing; a rank does not come, or its `exit` was taken; what NCCL refuses, such as two ranks on one GPU before its
    /// version 2.30.
    pub fn join(cuda: &Cuda, mut control: Box<dyn Collective<Array>>, exit: &GroupExit) -> Result<NcclRank> {
        let stream = &cuda.stream;
        let nccl = Nccl::load(cuda.options.libraries.as_deref());
        let begun = nccl.and_then(|nccl| Ok((nccl, nccl.new_group(stream)?)));
        // A rank that has no NCCL keeps the others from waiting for it.
        let mut readiness = row(&[if begun.is_ok() { 0.0 } else { 1.0 }]);
        control.all_reduce(&mut readiness)?;
        let (nccl, own_id) = begun?;
        if readiness.values()[0] > 0.0 {
            return Err(Op::Hello.error(control.rank(), "another rank has no NCCL"));
        }
        let mut id = row(&own_id.map(f32::from));
        control.broadcast(0, &mut id)?;
        let mut group: GroupId = [0; 128];
        group.iter_mut().zip(id.values()).for_each(|(byte, &number)| *byte = number as u8);
        let place = [control.rank(), control.num_ranks()];
        let communicator = nccl.join(stream, exit, group, place)?;
        let cubin = program::COLLECTIVE.cubin(cuda.options.cubins.as_deref(), &cuda.gpu.architecture(), 0)?;
        let module = Arc::new(stream.module(&cubin)?);
        Ok(NcclRank {
            communicator,
            agreement: Agreement::new(control),
            sum_ranks: module.kernel("sum_ranks", 0)?,
            place_columns: module.kernel("place_columns", 0)?,
            parts: Memory::none(stream),
            moves: Vec::new(),
            beside: Beside::new(stream)?,
            stream: Arc::clone(stream),
        })
    }

    /// Agrees on an operation; what all ranks have told. `room` is that of what comes of it on this rank.
    fn agree(&mut self, op: Op, shape: [usize; 2], room: usize) -> Result<Vec<Told>> {
        if self.communicator.has_left() {
            return Err(self.fail(op, "the group was left".to_owned()));
        }
        let told = self.agreement.tell(op, shape, room).map_err(|message| self.fail(op, message))?;
        let rank_at = |is: &dyn Fn(u32) -> bool| told.iter().position(|told| is(told.op));
        if let Some(rank) = rank_at(&|other| other == Op::NoRoom as u32) {
            // Sums that were begun come to nothing.
            self.beside.take_marks();
            return Err(Error::NoRoomOnRank { rank });
        }
        match rank_at(&|other| other != op as u32) {
            Some(rank) => Err(self.fail(op, format!("rank {rank} is at another operation"))),
            None => Ok(told),
        }
    }

    /// The same of an operation on arrays of one shape, for which all have room.
    fn agree_on_shape(&mut self, op: Op, shape: [usize; 2]) -> Result<()> {
        let told = self.agree(op, shape, 0)?;
        match told.iter().position(|other| other.shape != told[0].shape) {
            Some(other) => Err(self.fail(op, format!("rank {other} has another shape"))),
            None => Ok(()),
        }
    }

    /// Agrees once more where a rank has had to make room for what comes. Memory is freed when all that its device is at is done, and
    /// that may be what another rank on it has queued, which waits for this one: until all have made theirs nobody may queue anything.
    fn agree_on_room(&mut self, op: Op, had_room: bool) -> Result<()> {
        if had_room { Ok(()) } else { self.agree(op, [0, 0], 0).map(drop) }
    }

    fn fail(&mut self, op: Op, message: String) -> Error {
        self.communicator.abort();
        self.agreement.end = Some(message.clone());
        op.error(self.rank(), message)
    }

    /// Queues moves between this rank and others. The caller vouches for what [`Communicator::queue`] asks for.
    fn queue(&mut self, op: Op) -> Result<()> {
        let stream = Arc::clone(&self.stream);
        self.queue_on(&stream, op)
    }

    fn queue_on(&mut self, stream: &Stream, op: Op) -> Result<()> {
        // SAFETY: all ranks have agreed on the operation and on shapes, from which each end of a move follows; places are
        // inside of arrays that hold their shape.
        let queued = unsafe { self.communicator.queue(op.name(), stream, &self.moves) };
        self.moves.clear();
        self.or_fail(op, queued)
    }

    /// After ranks have agreed an error is the end of the group: the others wait for what this one no longer sends.
    fn or_fail(&mut self, op: Op, done: Result<()>) -> Result<()> {
        done.map_err(|error| self.fail(op, error.to_string()))
    }

    fn push(&mut self, direction: Direction, peer: usize, at: Argument, numbers: usize) {
        self.moves.push(Move { direction, peer, at, numbers });
    }

    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let own = self.rank();
        (0..self.num_ranks()).filter(move |rank| *rank != own)
    }

    /// Queues sums of some rows, for which there is room and on which all ranks have agreed.
    fn sum(&mut self, stream: &Stream, x: &CudaArray, rows: Range<usize>) -> Result<()> {
        let (op, own, num_ranks) = (Op::AllReduce, self.rank(), self.num_ranks());
        let at = |number: usize| x.memory.at((rows.start * x.cols + number) * NUMBER);
        let count = rows.len() * x.cols;
        let share = share(count, num_ranks);
        let first = |rank: usize| (rank * share).min(count);
        let numbers = |rank: usize| first(rank + 1) - first(rank);
        for peer in self.others() {
            self.push(Direction::To, peer, at(first(peer)), numbers(peer));
            let at = self.parts.at(peer * share * NUMBER);
            self.push(Direction::From, peer, at, numbers(own));
        }
        self.queue_on(stream, op)?;
        let arguments = [
            at(first(own)),
            self.parts.start(),
            Argument::U64(share as u64),
            u32_of(num_ranks),
            u32_of(own),
            Argument::U64(numbers(own) as u64),
        ];
        // SAFETY: the share lies inside of `x`, and the parts hold one of each rank.
        let launched =
            unsafe { stream.launch(op.name(), &self.sum_ranks, flat_grid(numbers(own)), &arguments) };
        self.or_fail(op, launched)?;
        for peer in self.others() {
            self.push(Direction::To, peer, at(first(own)), numbers(own));
            self.push(Direction::From, peer, at(first(peer)), numbers(peer));
        }
        self.queue_on(stream, op)
    }

    /// Collects the parts of all ranks on those that `receives` says.
    fn collect(
        &mut self,
        axis: Axis,
        part: &CudaArray,
        out: &mut CudaArray,
        receives: impl Fn(usize) -> bool,
    ) -> Result<()> {
        let (op, own) = (Op::gather(axis), self.rank());
        let told = self.agree(op, [part.rows, part.cols], self.room_to_collect(axis, out))?;
        let shapes: Vec<[usize; 2]> = told.iter().map(|told| told.shape).collect();
        let [rows, cols] = gathered(axis, shapes.iter().copied())
            .map_err(|other| self.fail(op, format!("rank {other} has another shape")))?;
        if receives(own) {
            out.reshape(rows, cols)?;
            if axis == Axis::Columns {
                self.parts.reserve(op.name(), rows * cols * NUMBER)?;
            }
        }
        let has_room = |(rank, told): (usize, &Told)| !receives(rank) || told.room >= rows * cols;
        self.agree_on_room(op, told.iter().enumerate().all(has_room))?;
        for peer in self.others().filter(|peer| receives(*peer)) {
            self.push(Direction::To, peer, part.memory.start(), part.rows * part.cols);
        }
        if !receives(own) {
            return self.queue(op);
        }
        // Rows lie one after the other, so that they come to where they belong; columns are put there afterwards.
        let numbers = |rank: usize| shapes[rank][0] * shapes[rank][1];
        let before = |rank: usize| (0..rank).map(numbers).sum::<usize>() * NUMBER;
        for peer in self.others() {
            let to = if axis == Axis::Rows { &out.memory } else { &self.parts };
            let at = to.at(before(peer));
            self.push(Direction::From, peer, at, numbers(peer));
        }
        self.queue(op)?;
        if axis == Axis::Rows {
            // One row of all numbers, for the kernel.
            let (shape, column) = ([1, numbers(own)], before(own) / NUMBER);
            let placed = self.place(shape, part.memory.start(), column, rows * cols, out);
            return self.or_fail(op, placed);
        }
        let mut column = 0;
        for (rank, &shape) in shapes.iter().enumerate() {
            let from = if rank == own { part.memory.start() } else { self.parts.at(before(rank)) };
            let placed = self.place(shape, from, column, cols, out);
            self.or_fail(op, placed)?;
            column += shape[1];
        }
        Ok(())
    }

    /// For so many numbers there is memory when parts are collected.
    fn room_to_collect(&self, axis: Axis, out: &CudaArray) -> usize {
        match axis {
            Axis::Rows => out.room(),
            Axis::Columns => out.room().min(self.parts.bytes() / NUMBER),
        }
    }

    /// Queues a copy of a part `[rows, cols]` to a column of `out`, whose rows are `out_cols` long.
    fn place(
        &self,
        [rows, cols]: [usize; 2],
        part: Argument,
        column: usize,
        out_cols: usize,
        out: &CudaArray,
    ) -> Result<()> {
        assert!(rows < 1 << 16 && out_cols < 1 << 32, "[{rows}, {cols}] of {out_cols} columns");
        let arguments = [out.memory.start(), part, u32_of(cols), u32_of(column), u32_of(out_cols)];
        let grid = Grid { blocks: [cols.div_ceil(256), rows, 1], threads: 256, block_bytes: 0 };
        // SAFETY: the part has its shape, and lies inside of `out`.
        unsafe { self.stream.launch("place_columns", &self.place_columns, grid, &arguments) }
    }
}

impl Collective<CudaArray> for NcclRank {
    fn rank(&self) -> usize {
        self.agreement.control.rank()
    }

    fn num_ranks(&self) -> usize {
        self.agreement.control.num_ranks()
    }

    fn all_reduce(&mut self, x: &mut CudaArray) -> Result<()> {
        self.reserve(x.rows * x.cols)?;
        self.agree_on_shape(Op::AllReduce, [x.rows, x.cols])?;
        let stream = Arc::clone(&self.stream);
        self.sum(&stream, x, 0..x.rows)
    }

    fn reserve(&mut self, numbers: usize) -> Result<()> {
        let num_ranks = self.num_ranks();
        self.parts.reserve("sums of ranks", num_ranks * share(numbers, num_ranks) * NUMBER)
    }

    fn free(&mut self) {
        // Waits for the stream, which is behind all sums that were queued, also beside it.
        self.parts = Memory::none(&self.stream);
    }

    fn pieces(&self, rows: usize) -> Vec<Range<usize>> {
        beside::pieces(rows)
    }

    fn begin_all_reduce(&mut self, x: &CudaArray, piece: Range<usize>) -> Result<()> {
        // What is whole is summed at the end, on the queue by which it is computed.
        if piece.len() == x.rows { Ok(()) } else { self.beside.mark(piece, &self.stream) }
    }

    fn finish_all_reduce(&mut self, x: &mut CudaArray) -> Result<()> {
        let marks = self.beside.take_marks();
        if marks.is_empty() {
            return self.all_reduce(x);
        }
        assert_eq!(marks.last().map(|mark| mark.rows.end), Some(x.rows), "all pieces were begun");
        // Now, and not while sums are under way in it: what computes has waited for those before, and the other queue has not.
        let largest = marks.iter().map(|mark| mark.rows.len()).max().unwrap_or(0);
        self.reserve(largest * x.cols)?;
        self.agree_on_shape(Op::AllReducePieces, [x.rows, x.cols])?;
        let stream = Arc::clone(&self.beside.stream);
        for mark in &marks {
            let held = mark.hold(&stream);
            self.or_fail(Op::AllReducePieces, held)?;
            self.sum(&stream, x, mark.rows.clone())?;
        }
        let closed = self.beside.close(marks, &self.stream);
        self.or_fail(Op::AllReducePieces, closed)
    }

    fn all_gather(&mut self, axis: Axis, part: &CudaArray, out: &mut CudaArray) -> Result<()> {
        self.collect(axis, part, out, |_| true)
    }

    fn gather(&mut self, axis: Axis, part: &CudaArray, out: &mut CudaArray) -> Result<()> {
        self.collect(axis, part, out, |rank| rank == 0)
    }

    fn broadcast(&mut self, root: usize, x: &mut CudaArray) -> Result<()> {
        let (op, own) = (Op::Broadcast, self.rank());
        assert!(root < self.num_ranks(), "root {root} of {} ranks", self.num_ranks());
        let told = self.agree(op, [x.rows, x.cols], x.room())?;
        let [rows, cols] = told[root].shape;
        if own != root {
            x.reshape(rows, cols)?;
        }
        self.agree_on_room(op, told.iter().all(|told| told.room >= rows * cols))?;
        let (direction, peers) = match own == root {
            true => (Direction::To, self.others().collect()),
            false => (Direction::From, vec![root]),
        };
        for peer in peers {
            self.push(direction, peer, x.memory.start(), rows * cols);
        }
        self.queue(op)
    }

    fn end_step(&mut self, has_room: bool) -> Result<()> {
        let op = if has_room { Op::EndStep } else { Op::NoRoom };
        self.agree(op, [0, 0], 0).map(drop)
    }
}

/// Numbers of a rank's share of a sum.
fn share(numbers: usize, num_ranks: usize) -> usize {
    numbers.div_ceil(num_ranks).next_multiple_of(SHARE)
}

/// Memory of a GPU in which so many ranks sum arrays of so many numbers, in bytes.
pub fn cuda_sum_bytes(numbers: usize, num_ranks: usize) -> u64 {
    cuda_allocated_bytes((num_ranks * share(numbers, num_ranks) * NUMBER) as u64)
}

impl Drop for NcclRank {
    fn drop(&mut self) {
        // Arrays that are summed may be freed next. Where the group was left nobody is waited for.
        let _ = self.beside.stream.wait("leave a group");
    }
}

/// An array of one row.
fn row(values: &[f32]) -> Array {
    let mut array = Array::new();
    array.reshape(1, values.len());
    array.values_mut().copy_from_slice(values);
    array
}
