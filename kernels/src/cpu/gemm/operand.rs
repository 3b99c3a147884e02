//! Matrix product inputs: activations in the number type that products read.

use super::integers::{IntegerWriter, Integers};
use super::round::{bf16_to_f32, round_row, round_wide};
use crate::backend::{Dtype, WeightType};
use crate::cpu::pool::ThreadPool;
use crate::cpu::simd::Simd;
use std::marker::PhantomData;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A cache line; the unit in which operands are stored, so that every row starts on one.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [u8; LINE_BYTES]);

pub(super) const LINE_BYTES: usize = 64;

/// Rows of x that a register of AMX reads.
pub(super) const REGISTER_ROWS: usize = 16;

/// What an operand is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Numbers {
    dtype: Dtype,
    /// Whether bf16 is kept in f32.
    is_wide: bool,
}

impl Numbers {
    /// Those of operands of products with weights of a type, at a level.
    pub(super) fn beside(simd: Simd, weights: WeightType) -> Self {
        let dtype = weights.operands();
        Self { dtype, is_wide: dtype == Dtype::Bf16 && simd < Simd::Avx512 }
    }

    /// Bytes of one in memory.
    const fn bytes(self) -> usize {
        if self.is_wide { size_of::<f32>() } else { dtype_bytes(self.dtype) }
    }

    /// A name for messages.
    pub(super) fn name(self) -> &'static str {
        if self.is_wide { "bf16 in 32 bits" } else { self.dtype.name() }
    }
}

/// A row-major matmul input `[rows, cols]`, bf16 or f32.
///
/// Every row starts on a cache line and is padded with zeros to whole lines, so that the kernels need no tail in
/// K. There is memory for whole registers of [`REGISTER_ROWS`] rows, of which those beyond the last hold anything.
/// Memory is kept when it shrinks.
///
/// Levels without a product of bf16 multiply in f32. For them bf16 is *wide*: rounded as ever, and kept in f32, so that nothing
/// is to be widened between products.
pub(crate) struct Operand {
    numbers: Numbers,
    rows: usize,
    cols: usize,
    row_bytes: usize,
    lines: Vec<Line>,
    /// Whether products in integers read it.
    is_for_integers: bool,
    /// The same rows for those: made row by row as the operand is written, or by the first of them, and kept until the
    /// operand is written again, so that q, k and v, or gate and up, share them.
    integers: Mutex<Integers>,
}

impl Operand {
    /// An empty operand of products with weights of a type, at a level.
    pub(crate) fn beside(simd: Simd, weights: WeightType) -> Self {
        let is_for_integers = weights == WeightType::Int8;
        Self {
            numbers: Numbers::beside(simd, weights),
            rows: 0,
            cols: 0,
            row_bytes: 0,
            lines: Vec::new(),
            is_for_integers,
            integers: Mutex::default(),
        }
    }

    /// Set the shape. The padding is zero afterwards; the contents are whatever was there, and every
    /// element has to be written.
    pub(crate) fn reset(&mut self, rows: usize, cols: usize) {
        self.forget_integers();
        self.rows = rows;
        self.cols = cols;
        let number_bytes = self.number_bytes();
        let padded_cols = cols.next_multiple_of(LINE_BYTES / dtype_bytes(self.dtype()));
        self.row_bytes = padded_row_bytes(padded_cols, number_bytes);
        let num_lines = rows.next_multiple_of(REGISTER_ROWS) * self.row_bytes / LINE_BYTES;
        if num_lines > self.lines.len() {
            self.lines.resize(num_lines, Line([0; LINE_BYTES]));
        }
        let (padding, row_bytes) = (cols * number_bytes..padded_cols * number_bytes, self.row_bytes);
        if !padding.is_empty() {
            self.bytes_mut().chunks_exact_mut(row_bytes).for_each(|row| row[padding.clone()].fill(0));
        }
    }

    /// Number of rows.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns, without the padding.
    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// Number type.
    pub(crate) fn dtype(&self) -> Dtype {
        self.numbers.dtype
    }

    /// What it is made of.
    pub(super) fn numbers(&self) -> Numbers {
        self.numbers
    }

    /// Bytes of a number in memory.
    pub(super) fn number_bytes(&self) -> usize {
        self.numbers.bytes()
    }

    /// Write a row, `values: [cols]`, rounding to nearest even for bf16.
    #[cfg(test)]
    pub(crate) fn set_row(&mut self, row: usize, values: &[f32]) {
        assert!(
            row < self.rows && values.len() == self.cols,
            "row {row} of {} in {}",
            values.len(),
            self.rows
        );
        // SAFETY: `self` is borrowed mutably, so that nobody else writes, and the row is inside.
        unsafe { self.writer(Simd::detect()).write(row, 0, values) }
    }

    /// Read a row as f32, `out: [cols]`.
    pub(crate) fn copy_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.cols, "row {row} of {} in {}", out.len(), self.rows);
        let bytes = &self.bytes()[row * self.row_bytes..];
        if self.number_bytes() == size_of::<f32>() {
            for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = f32::from_ne_bytes(*bytes);
            }
        } else {
            for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = bf16_to_f32(u16::from_ne_bytes(*bytes));
            }
        }
    }

    /// A handle through which several threads write disjoint parts; they round and quantise at a level that this processor has.
    pub(crate) fn writer(&mut self, simd: Simd) -> OperandWriter<'_> {
        self.forget_integers();
        self.bare_writer(simd)
    }

    fn bare_writer(&mut self, simd: Simd) -> OperandWriter<'_> {
        OperandWriter {
            base: self.lines.as_mut_ptr().cast(),
            row_bytes: self.row_bytes,
            rows: self.rows,
            cols: self.cols,
            numbers: self.numbers,
            simd,
            integers: None,
            operand: PhantomData,
        }
    }

    /// The same for whoever has whole rows, and finishes each before the operand is read: rows are quantised while they
    /// are in a core's nearest cache.
    pub(crate) fn row_writer(&mut self, simd: Simd) -> OperandWriter<'_> {
        self.forget_integers();
        let (rows, cols) = (self.rows, self.cols);
        let integers = self.is_for_integers.then(|| {
            let kept = self.integers.get_mut().unwrap_or_else(PoisonError::into_inner);
            kept.is_current = true;
            kept.writer(rows, cols)
        });
        OperandWriter { integers, ..self.bare_writer(simd) }
    }

    /// A row of a bf16 operand, without the padding.
    pub(super) fn bf16_row(&self, row: usize) -> Bf16Row<'_> {
        assert!(self.dtype() == Dtype::Bf16 && row < self.rows, "row {row} of {:?}", self.dtype());
        let bytes = &self.bytes()[row * self.row_bytes..][..self.cols * self.number_bytes()];
        match self.numbers.is_wide {
            true => Bf16Row::Wide(bytemuck::cast_slice(bytes)),
            false => Bf16Row::Narrow(bytemuck::cast_slice(bytes)),
        }
    }

    /// Its rows as integers.
    pub(super) fn integers(&self, simd: Simd, pool: &ThreadPool) -> MutexGuard<'_, Integers> {
        let mut integers = self.integers.lock().unwrap_or_else(PoisonError::into_inner);
        if !integers.is_current {
            integers.assign(simd, pool, self);
        }
        integers
    }

    fn forget_integers(&mut self) {
        self.integers.get_mut().unwrap_or_else(PoisonError::into_inner).is_current = false;
    }

    /// First byte of the first row.
    pub(super) fn as_ptr(&self) -> *const u8 {
        self.lines.as_ptr().cast()
    }

    /// Bytes from row to row.
    pub(super) fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    fn bytes(&self) -> &[u8] {
        let len = self.rows * self.row_bytes;
        // SAFETY: `reset` made room for `rows * row_bytes` initialised bytes.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), len) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        let len = self.rows * self.row_bytes;
        // SAFETY: `reset` made room for `rows * row_bytes` initialised bytes, and any byte is a valid one.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), len) }
    }
}

/// A row in bf16, as an operand keeps it.
#[derive(Clone, Copy)]
pub(super) enum Bf16Row<'a> {
    Narrow(&'a [u16]),
    Wide(&'a [f32]),
}

/// Writes parts of an [`Operand`] from several threads at once.
#[derive(Clone, Copy)]
pub(crate) struct OperandWriter<'a> {
    base: *mut u8,
    row_bytes: usize,
    rows: usize,
    cols: usize,
    numbers: Numbers,
    /// For rounding and quantising only, which give the same bits at every level.
    simd: Simd,
    /// Where finished rows go as integers.
    integers: Option<IntegerWriter>,
    operand: PhantomData<&'a mut Operand>,
}

// SAFETY: the pointer is to memory that the operand's mutable borrow reserves for the writers, and
// `write` obliges its callers to keep their parts disjoint.
unsafe impl Send for OperandWriter<'_> {}
// SAFETY: as above.
unsafe impl Sync for OperandWriter<'_> {}

impl OperandWriter<'_> {
    /// Write `values` at `[row, col..]`, rounding to nearest even for bf16.
    ///
    /// # Safety
    /// `row` and `col + values.len()` lie inside the operand, and no other thread writes any of these
    /// elements at the same time.
    #[inline]
    pub(crate) unsafe fn write(&self, row: usize, col: usize, values: &[f32]) {
        debug_assert!(
            row < self.rows && col + values.len() <= self.cols,
            "{} values at [{row}, {col}] of [{}, {}]",
            values.len(),
            self.rows,
            self.cols
        );
        // SAFETY: the caller keeps the range inside the row and to itself; rows are aligned to cache lines,
        // so that elements are aligned, and every bit pattern is a valid number.
        unsafe {
            let at = self.base.add(row * self.row_bytes + col * self.numbers.bytes());
            match self.numbers.dtype {
                Dtype::F32 => at.cast::<f32>().copy_from_nonoverlapping(values.as_ptr(), values.len()),
                Dtype::Bf16 if self.numbers.is_wide => {
                    round_wide(self.simd, values, std::slice::from_raw_parts_mut(at.cast(), values.len()));
                }
                Dtype::Bf16 => {
                    round_row(self.simd, values, std::slice::from_raw_parts_mut(at.cast(), values.len()));
                }
            }
        }
    }
}

impl OperandWriter<'_> {
    /// Quantises a row that has been written, if it is to be, see [`Operand::row_writer`].
    ///
    /// # Safety
    /// The row lies inside the operand, and no other thread writes it or finishes it at the same time.
    #[inline]
    pub(crate) unsafe fn finish_row(&self, row: usize) {
        if let Some(integers) = &self.integers {
            // SAFETY: the caller's; an operand for integers is of bf16.
            unsafe {
                let x = self.base.add(row * self.row_bytes);
                let x = match self.numbers.is_wide {
                    true => Bf16Row::Wide(std::slice::from_raw_parts(x.cast(), self.cols)),
                    false => Bf16Row::Narrow(std::slice::from_raw_parts(x.cast(), self.cols)),
                };
                integers.take(self.simd, row, x);
            }
        }
    }

    /// Where a number of a bf16 operand that is not wide is written.
    ///
    /// # Safety
    /// Row and column lie inside the operand.
    #[inline]
    pub(super) unsafe fn bf16_at(&self, row: usize, col: usize) -> *mut u16 {
        debug_assert!(
            self.numbers == Numbers { dtype: Dtype::Bf16, is_wide: false }
                && row < self.rows
                && col < self.cols,
            "[{row}, {col}]"
        );
        // SAFETY: the caller's.
        unsafe { self.base.add(row * self.row_bytes + col * 2).cast() }
    }
}

/// Bytes of a number.
pub(super) const fn dtype_bytes(dtype: Dtype) -> usize {
    match dtype {
        Dtype::F32 => 4,
        Dtype::Bf16 => 2,
    }
}

/// Bytes from row to row: whole cache lines, and an odd number of them, because the rows of a tile are read
/// side by side and a stride of a power of two would put them all into one set of the L1 cache.
pub(super) fn padded_row_bytes(cols: usize, number_bytes: usize) -> usize {
    let lines = (cols * number_bytes).div_ceil(LINE_BYTES);
    (lines | 1) * LINE_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_rounded() {
        for simd in Simd::ALL {
            let mut operand = Operand::beside(simd, WeightType::Bf16);
            operand.reset(2, 3);
            operand.set_row(0, &[1.0, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0]);
            operand.set_row(1, &[f32::NAN, f32::INFINITY, -f32::MAX]);
            let mut row = [0.0; 3];
            operand.copy_row(0, &mut row);
            assert_eq!(row, [1.0, 1.0, 1.0 + 4.0 / 256.0]); // Halfway cases go to the even neighbour.
            operand.copy_row(1, &mut row);
            assert!(row[0].is_nan());
            assert_eq!(row[1..], [f32::INFINITY, f32::NEG_INFINITY]);
        }
    }

    #[test]
    fn padding_is_zero_after_every_reset() {
        let weights = [WeightType::F32, WeightType::Bf16];
        for (weights, simd) in weights.into_iter().flat_map(|weights| Simd::ALL.map(|simd| (weights, simd))) {
            let mut operand = Operand::beside(simd, weights);
            operand.reset(4, 40);
            (0..4).for_each(|row| operand.set_row(row, &[7.0; 40]));
            for cols in [1, 3, 17, 33] {
                operand.reset(3, cols);
                (0..3).for_each(|row| operand.set_row(row, &vec![7.0; cols]));
                // To look at the padding.
                operand.cols = cols.next_multiple_of(LINE_BYTES / dtype_bytes(weights.operands()));
                for row in 0..3 {
                    let mut values = vec![0.0; operand.cols];
                    operand.copy_row(row, &mut values);
                    assert!(values[..cols].iter().all(|&v| v == 7.0));
                    assert!(values[cols..].iter().all(|&v| v == 0.0));
                }
            }
        }
    }

    #[test]
    fn memory_is_kept_when_it_shrinks() {
        let mut operand = Operand::beside(Simd::detect(), WeightType::Bf16);
        operand.reset(100, 64);
        let before = operand.as_ptr();
        operand.reset(3, 64);
        operand.reset(100, 60);
        assert_eq!(operand.as_ptr(), before);
    }
}
