//! A run of blocks.

use std::fmt;
use std::ops::Range;

/// A run of consecutive blocks, `[start, end)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span {
    /// First block.
    pub start: usize,
    /// The block after the last.
    pub end: usize,
}

impl Span {
    /// How many blocks it holds.
    pub fn num_blocks(&self) -> usize {
        self.end - self.start
    }

    /// Its block indices.
    pub fn range(&self) -> Range<usize> {
        self.start..self.end
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}, {})", self.start, self.end)
    }
}
