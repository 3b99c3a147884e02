//! Rows on their way from one stage to the next, on a host, in memory that goes round.
//!
//! One thread writes a micro-batch's rows, some hundred kilobytes, and another is done with them a step later: memory of their own
//! would be allocated by the one and freed by the other, each time. So whoever makes rows has a pool, and wherever rows of it are
//! dropped, their memory is back in it. A pool has never more than was under way from it at once, which the scheduler bounds.

use std::fmt;
use std::mem::take;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Memory for rows, as far as no rows are in it. Clones are the same pool.
#[derive(Debug, Clone, Default)]
pub struct RowPool(Arc<Mutex<Vec<Vec<f32>>>>);

/// Numbers, row by row, in memory of a pool.
pub struct HostRows {
    numbers: Vec<f32>,
    pool: RowPool,
}

impl RowPool {
    /// Rows that have no numbers yet. The memory that was in use last is used first, as caches may still have it.
    pub fn rows(&self) -> HostRows {
        HostRows { numbers: self.free().pop().unwrap_or_default(), pool: self.clone() }
    }

    fn free(&self) -> MutexGuard<'_, Vec<Vec<f32>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for HostRows {
    fn drop(&mut self) {
        let mut memory = take(&mut self.numbers);
        memory.clear();
        self.pool.free().push(memory);
    }
}

/// In memory of their own, which goes nowhere else.
impl From<Vec<f32>> for HostRows {
    fn from(numbers: Vec<f32>) -> HostRows {
        HostRows { numbers, pool: RowPool::default() }
    }
}

/// A copy is of the same pool.
impl Clone for HostRows {
    fn clone(&self) -> HostRows {
        let mut copy = self.pool.rows();
        copy.extend_from_slice(self);
        copy
    }
}

impl Deref for HostRows {
    type Target = Vec<f32>;

    fn deref(&self) -> &Vec<f32> {
        &self.numbers
    }
}

impl DerefMut for HostRows {
    fn deref_mut(&mut self) -> &mut Vec<f32> {
        &mut self.numbers
    }
}

impl fmt::Debug for HostRows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.numbers, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where some rows' memory is.
    fn place(rows: &HostRows) -> *const f32 {
        rows.as_ptr()
    }

    fn filled(pool: &RowPool, number: f32) -> HostRows {
        let mut rows = pool.rows();
        rows.extend([number; 100]);
        rows
    }

    #[test]
    fn memory_is_in_its_pool_again_when_its_rows_are_dropped_by_another_thread() {
        let pool = RowPool::default();
        let (one, other) = (filled(&pool, 1.0), filled(&pool, 2.0));
        let places = [place(&one), place(&other)];
        assert_ne!(places[0], places[1]);
        std::thread::spawn(move || drop((other, one))).join().unwrap();
        assert_eq!(pool.free().len(), 2);
        let again = [filled(&pool, 3.0), filled(&pool, 4.0)];
        assert_eq!(again.each_ref().map(place), places, "the last one comes first");
        assert_eq!(again.each_ref().map(|rows| rows.len()), [100; 2], "they begin empty");
        assert_eq!(again.map(|rows| rows[0]), [3.0, 4.0]);
    }

    #[test]
    fn a_pool_has_no_more_memory_than_was_in_use_at_once_copies_counted() {
        let pool = RowPool::default();
        for _ in 0..10 {
            let rows = filled(&pool, 1.0);
            let copy = rows.clone();
            assert_eq!(copy[..], rows[..]);
            assert_ne!(place(&copy), place(&rows));
        }
        assert_eq!(pool.free().len(), 2);
    }
}
