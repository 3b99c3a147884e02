//! f32 activations in host memory, as both backends here use them.

use bytemuck::{Pod, Zeroable, cast_slice, cast_slice_mut};

use crate::check;
use crate::error::Result;

/// f32 numbers in one cache line, which is also one 512-bit register.
const LINE: usize = 16;

#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; LINE]);

// SAFETY: all-zero bits are sixteen zeros.
unsafe impl Zeroable for Line {}
// SAFETY: sixteen f32 fill the 64 bytes of the alignment, so there is no padding and any bits are valid.
unsafe impl Pod for Line {}

/// f32 activations `[rows, cols]`, row-major, starting at a cache line. Keeps its memory when it shrinks.
#[derive(Debug, Clone, Default)]
pub struct Array {
    rows: usize,
    cols: usize,
    lines: Vec<Line>,
}

impl Array {
    /// An empty array.
    pub fn new() -> Array {
        Array::default()
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// All numbers, row by row.
    pub fn values(&self) -> &[f32] {
        &cast_slice(&self.lines)[..self.rows * self.cols]
    }

    /// All numbers, row by row.
    pub fn values_mut(&mut self) -> &mut [f32] {
        &mut cast_slice_mut(&mut self.lines)[..self.rows * self.cols]
    }

    /// One row.
    pub fn row(&self, row: usize) -> &[f32] {
        &self.values()[row * self.cols..][..self.cols]
    }

    /// One row.
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        let cols = self.cols;
        &mut self.values_mut()[row * cols..][..cols]
    }

    /// Gives the array a shape; its values are then whatever was there, and are to be overwritten.
    pub fn reshape(&mut self, rows: usize, cols: usize) {
        let num_lines = (rows * cols).div_ceil(LINE);
        if num_lines > self.lines.len() {
            self.lines.resize(num_lines, Line([0.0; LINE]));
        }
        (self.rows, self.cols) = (rows, cols);
    }

    /// Takes on host values `[rows, cols]`.
    pub(crate) fn assign(&mut self, values: &[f32], rows: usize, cols: usize) -> Result<()> {
        check::shape("upload", "values", [values.len()], [rows * cols])?;
        self.reshape(rows, cols);
        self.values_mut().copy_from_slice(values);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_kept_when_an_array_shrinks_and_starts_at_a_line() {
        let mut array = Array::new();
        array.reshape(7, 33);
        array.values_mut().fill(1.0);
        let start = array.values().as_ptr();
        assert_eq!(start.align_offset(64), 0);
        array.reshape(2, 3);
        assert_eq!(array.values(), [1.0; 6]);
        array.reshape(7, 33);
        assert_eq!(array.values().as_ptr(), start);
        assert_eq!(array.row_mut(6).len(), 33);
    }

    #[test]
    fn an_empty_array_has_no_values() {
        let mut array = Array::new();
        assert!(array.values().is_empty());
        array.reshape(0, 5);
        assert!(array.values_mut().is_empty());
    }
}
