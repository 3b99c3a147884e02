//! Sharing out rows that are worked on one by one, and copying them.

use std::ops::Range;

use crate::array::Array;
use crate::cpu::pool::ThreadPool;

/// Numbers in a task, at least. Row operations take 0.1 to 0.5 ns for a number, so a task takes a few µs:
/// several times what a thread pays to join.
const TASK_NUMBERS: usize = 16 * 1024;

/// Calls `each` with ranges of rows of `cols` numbers on the pool's threads.
pub(crate) fn for_each_chunk(
    pool: &ThreadPool,
    rows: usize,
    cols: usize,
    each: impl Fn(Range<usize>) + Sync,
) {
    let chunk = (TASK_NUMBERS / cols.max(1)).max(1);
    pool.for_each(rows.div_ceil(chunk), |task| each(task * chunk..rows.min((task + 1) * chunk)));
}

/// Rows of an array that several threads fill at once.
#[derive(Clone, Copy)]
pub(crate) struct RowsWriter {
    base: *mut f32,
    cols: usize,
}

// SAFETY: `row` obliges its callers to take each row once, and the array is borrowed for as long as it is
// written (`for_each_row`).
unsafe impl Sync for RowsWriter {}

impl RowsWriter {
    /// # Safety
    /// The row is inside the array, and nobody else has it.
    unsafe fn row<'a>(&self, row: usize) -> &'a mut [f32] {
        // SAFETY: the caller's.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(row * self.cols), self.cols) }
    }
}

/// Calls `each(t, row t)` for every row of an array on the pool's threads.
pub(crate) fn for_each_row(pool: &ThreadPool, out: &mut Array, each: impl Fn(usize, &mut [f32]) + Sync) {
    let (rows, cols) = (out.rows(), out.cols());
    let writer = RowsWriter { base: out.values_mut().as_mut_ptr(), cols };
    for_each_chunk(pool, rows, cols, |chunk| {
        for t in chunk {
            // SAFETY: chunks are disjoint and inside the array, which is borrowed mutably.
            each(t, unsafe { writer.row(t) });
        }
    });
}
