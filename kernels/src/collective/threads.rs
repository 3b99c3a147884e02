//! Ranks that are threads of one process.
//!
//! Each rank lays its numbers out in a place of its own, waits for the others, and reads theirs. Places are there twice and
//! used in turn: when a rank writes to one again, all have come to the operation between, so nobody reads it any more.
//! So locks are never waited for; they are there for ranks that come when the group has ended. What is summed up is laid out
//! as the array that it is, for the one that was there before: nothing is copied.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use super::meeting::Meeting;
use super::{Axis, Collective, Op, gathered, place};
use crate::array::Array;
use crate::error::Result;

/// Sums of fewer numbers are made by every rank for itself: to share the work takes a second meeting, some µs, which is what
/// a core takes to add up so many. Of two ranks each reads as many numbers of the other's either way.
const SHARED_NUMBERS: usize = 16 * 1024;

/// Numbers that are added up at a time, for all ranks, while they are in a core's nearest cache: 4 KB.
const NEAR_NUMBERS: usize = 1024;

/// A rank that is a thread.
#[derive(Debug)]
pub struct ThreadRank {
    rank: usize,
    group: Arc<Group>,
    num_calls: usize,
}

#[derive(Debug)]
struct Group {
    meeting: Meeting,
    /// By the parity of the call, then by rank.
    parts: [Vec<RwLock<Part>>; 2],
    /// Each rank's share of a sum.
    sums: [Vec<RwLock<Vec<f32>>>; 2],
}

/// What a rank has laid out.
#[derive(Debug, Default)]
struct Part {
    op: Option<Op>,
    x: Array,
}

impl Part {
    fn shape(&self) -> [usize; 2] {
        [self.x.rows(), self.x.cols()]
    }
}

/// The ranks of a group, to be taken to their threads. None waits for the others longer than `patience`.
pub fn thread_ranks(num_ranks: usize, patience: Duration) -> Vec<ThreadRank> {
    let parts = || (0..num_ranks).map(|_| RwLock::default()).collect();
    let sums = || (0..num_ranks).map(|_| RwLock::default()).collect();
    let group = Group {
        meeting: Meeting::new(num_ranks, patience),
        parts: [parts(), parts()],
        sums: [sums(), sums()],
    };
    let group = Arc::new(group);
    (0..num_ranks).map(|rank| ThreadRank { rank, group: Arc::clone(&group), num_calls: 0 }).collect()
}

impl ThreadRank {
    /// Lays out numbers, which `lay` puts into an array, and waits for the others; returns the parity of the call.
    fn exchange(&mut self, op: Op, lay: impl FnOnce(&mut Array)) -> Result<usize> {
        let parity = self.num_calls % 2;
        self.num_calls += 1;
        {
            let mut part = write(&self.group.parts[parity][self.rank]);
            part.op = Some(op);
            lay(&mut part.x);
        }
        self.meet(op)?;
        let ops = |rank: usize| read(&self.group.parts[parity][rank]).op;
        match (0..self.num_ranks()).find(|rank| ops(*rank) != Some(op)) {
            Some(other) => Err(self.disagree(op, other)),
            None => Ok(parity),
        }
    }

    fn meet(&self, op: Op) -> Result<()> {
        self.group.meeting.meet(self.rank).map_err(|end| op.error(self.rank, end))
    }

    fn disagree(&self, op: Op, other: usize) -> crate::Error {
        let message = format!("rank {other} is at another operation, or has another shape");
        self.group.meeting.end(message.clone());
        op.error(self.rank, message)
    }
}

impl Collective<Array> for ThreadRank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn num_ranks(&self) -> usize {
        self.group.parts[0].len()
    }

    fn all_reduce(&mut self, x: &mut Array) -> Result<()> {
        let (op, shape, num_ranks) = (Op::AllReduce, [x.rows(), x.cols()], self.num_ranks());
        if num_ranks == 1 {
            return Ok(());
        }
        let parity = self.exchange(op, |laid| std::mem::swap(laid, x))?;
        let group = Arc::clone(&self.group);
        let parts: Vec<_> = group.parts[parity].iter().map(read).collect();
        if let Some(other) = parts.iter().position(|part| part.shape() != shape) {
            return Err(self.disagree(op, other));
        }
        let terms: Vec<&[f32]> = parts.iter().map(|part| part.x.values()).collect();
        let sum = |out: &mut [f32], first: usize| {
            for (chunk, out) in out.chunks_mut(NEAR_NUMBERS).enumerate() {
                let first = first + chunk * NEAR_NUMBERS;
                out.copy_from_slice(&terms[0][first..][..out.len()]);
                for terms in &terms[1..] {
                    let terms = &terms[first..][..out.len()];
                    out.iter_mut().zip(terms).for_each(|(out, term)| *out += term);
                }
            }
        };
        x.reshape(shape[0], shape[1]);
        let out = x.values_mut();
        if num_ranks == 2 || out.len() < SHARED_NUMBERS {
            sum(out, 0);
            return Ok(());
        }
        let share = out.len().div_ceil(num_ranks);
        {
            let first = (self.rank * share).min(out.len());
            let mut own = write(&group.sums[parity][self.rank]);
            own.resize(share.min(out.len() - first), 0.0);
            sum(&mut own, first);
        }
        self.meet(op)?;
        for (out, sums) in out.chunks_mut(share).zip(&group.sums[parity]) {
            out.copy_from_slice(&read(sums));
        }
        Ok(())
    }

    fn all_gather(&mut self, axis: Axis, part: &Array, out: &mut Array) -> Result<()> {
        let op = Op::gather(axis);
        let parity = self.exchange(op, |laid| copy(part, laid))?;
        let group = Arc::clone(&self.group);
        let parts: Vec<_> = group.parts[parity].iter().map(read).collect();
        let [rows, cols] = gathered(axis, parts.iter().map(|part| part.shape()))
            .map_err(|other| self.disagree(op, other))?;
        out.reshape(rows, cols);
        let mut before = 0;
        for part in &parts {
            let [part_rows, part_cols] = part.shape();
            place(axis, part.x.values(), part_cols, before, out.values_mut(), cols);
            before += if axis == Axis::Rows { part_rows } else { part_cols };
        }
        Ok(())
    }

    fn gather(&mut self, axis: Axis, part: &Array, out: &mut Array) -> Result<()> {
        if self.rank == 0 {
            return self.all_gather(axis, part, out);
        }
        self.exchange(Op::gather(axis), |laid| copy(part, laid)).map(drop)
    }

    fn broadcast(&mut self, root: usize, x: &mut Array) -> Result<()> {
        let (op, is_root) = (Op::Broadcast, self.rank == root);
        assert!(root < self.num_ranks(), "root {root} of {} ranks", self.num_ranks());
        let parity = match is_root {
            true => self.exchange(op, |laid| copy(x, laid))?,
            false => self.exchange(op, |laid| laid.reshape(0, 0))?,
        };
        if !is_root {
            copy(&read(&self.group.parts[parity][root]).x, x);
        }
        Ok(())
    }
}

impl Drop for ThreadRank {
    fn drop(&mut self) {
        self.group.meeting.end(format!("rank {} is gone", self.rank));
    }
}

fn copy(from: &Array, to: &mut Array) {
    to.reshape(from.rows(), from.cols());
    to.values_mut().copy_from_slice(from.values());
}

// A rank that panicked has ended the meeting; what it has laid out is not looked at.

fn read<T>(lock: &RwLock<T>) -> std::sync::RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> std::sync::RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}
