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

/// Rows of an array, of which several threads read and write parts at once.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SharedRows {
    base: *mut f32,
    cols: usize,
}

// SAFETY: `part` obliges its callers to keep what is written to themselves.
unsafe impl Send for SharedRows {}
// SAFETY: as above.
unsafe impl Sync for SharedRows {}

impl SharedRows {
    /// An array's, for as long as nobody else uses it.
    pub(crate) fn of(array: &mut Array) -> Self {
        let cols = array.cols();
        Self { base: array.values_mut().as_mut_ptr(), cols }
    }

    /// An array's that is only read.
    pub(crate) fn read_only(array: &Array) -> Self {
        Self { base: array.values().as_ptr().cast_mut(), cols: array.cols() }
    }

    /// Some columns of a row.
    ///
    /// # Safety
    /// They are inside of the array, which lives for `'a`, and nobody writes them meanwhile.
    #[inline(always)]
    pub(crate) unsafe fn part<'a>(&self, row: usize, col: usize, len: usize) -> &'a [f32] {
        debug_assert!(col + len <= self.cols, "{len} columns from {col} on of {}", self.cols);
        // SAFETY: the caller's.
        unsafe { std::slice::from_raw_parts(self.base.add(row * self.cols + col), len) }
    }

    /// The same to write.
    ///
    /// # Safety
    /// They are inside of the array, which lives for `'a` and is not one that is only read, and nobody else has them.
    #[inline(always)]
    pub(crate) unsafe fn part_mut<'a>(&self, row: usize, col: usize, len: usize) -> &'a mut [f32] {
        debug_assert!(col + len <= self.cols, "{len} columns from {col} on of {}", self.cols);
        // SAFETY: the caller's.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(row * self.cols + col), len) }
    }
}

/// Calls `each(t, row t)` for every row of an array on the pool's threads.
pub(crate) fn for_each_row(pool: &ThreadPool, out: &mut Array, each: impl Fn(usize, &mut [f32]) + Sync) {
    let (rows, cols) = (out.rows(), out.cols());
    let writer = SharedRows::of(out);
    for_each_chunk(pool, rows, cols, |chunk| {
        for t in chunk {
            // SAFETY: chunks are disjoint and inside the array, which is borrowed mutably.
            each(t, unsafe { writer.part_mut(t, 0, cols) });
        }
    });
}
