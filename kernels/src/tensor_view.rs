//! A tensor of a checkpoint as its file has it: numbers, or narrow ones with their scales.

use std::ops::Range;

use half::{bf16, f16};

use crate::fp8;

/// Number type of a tensor in a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ViewDtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// E4M3 in 8 bits (Micikevicius et al. 2022, "FP8 formats for deep learning"), with scales.
    Fp8,
    /// Integers of 4 bits, kept above themselves by 8, with scales: eight of a row in a word of 32 bits, lowest first, and rows
    /// of whole words. So compressed-tensors' `pack-quantized` has them.
    Int4,
}

/// A row-major tensor in host memory, little endian, of any alignment: typically a range of a mapped file.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    /// Number type.
    pub dtype: ViewDtype,
    /// Rows; 1 for a vector.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Numbers from the start of a row to the start of the next, at least `cols`.
    pub stride: usize,
    /// From the first number of the first row to the last number of the last one; to the end of its word, where there are
    /// words.
    pub bytes: &'a [u8],
    /// What its numbers are multiplied with, where they are narrow ones.
    pub scales: Option<Scales<'a>>,
}

/// What narrow numbers are multiplied with.
#[derive(Debug, Clone, Copy)]
pub struct Scales<'a> {
    /// Number type: f32, f16 or bf16.
    pub dtype: ViewDtype,
    /// Those of the whole tensor, row by row.
    pub bytes: &'a [u8],
    /// Scales from one row's to the next one's: 0 where all rows share them.
    pub stride: usize,
    /// Columns that share one.
    pub group: usize,
    /// The group of each column of the whole tensor, a word each, where a group's columns do not lie side by side.
    pub order: Option<&'a [u8]>,
    /// The integers that stand for zero, as the tensor's own, `[rows / 8, stride]` words: eight rows of a group in one.
    pub zeros: Option<&'a [u8]>,
    /// Where the view begins in the whole tensor: row and column.
    pub first: [usize; 2],
}

impl<'a> TensorView<'a> {
    /// A whole tensor of numbers, `rows * cols` of them.
    ///
    /// # Panics
    /// When the type is one that has scales.
    pub fn new(dtype: ViewDtype, rows: usize, cols: usize, bytes: &'a [u8]) -> TensorView<'a> {
        assert!(!dtype.has_scales(), "{dtype:?} without scales");
        TensorView { dtype, rows, cols, stride: cols, bytes, scales: None }
    }

    /// A whole tensor of narrow numbers.
    ///
    /// # Panics
    /// When the type is one that has no scales.
    pub fn scaled(
        dtype: ViewDtype,
        rows: usize,
        cols: usize,
        bytes: &'a [u8],
        scales: Scales<'a>,
    ) -> TensorView<'a> {
        assert!(dtype.has_scales(), "{dtype:?} with scales");
        let stride = cols.next_multiple_of(dtype.in_word());
        TensorView { dtype, rows, cols, stride, bytes, scales: Some(scales) }
    }

    /// Some of its rows.
    ///
    /// # Panics
    /// When they are not inside of it.
    pub fn rows(&self, rows: Range<usize>) -> TensorView<'a> {
        self.part(rows, 0..self.cols)
    }

    /// Some columns of all its rows; integers of 4 bits can be parted at words alone.
    ///
    /// # Panics
    /// When they are not inside of it.
    pub fn columns(&self, columns: Range<usize>) -> TensorView<'a> {
        self.part(0..self.rows, columns)
    }

    /// The bytes of a row, to the end of its last word.
    ///
    /// # Panics
    /// When it is not inside of the view.
    pub fn row(&self, row: usize) -> &'a [u8] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let start = if self.cols == 0 { 0 } else { row * self.stride };
        &self.bytes[self.dtype.bytes_of(start)..][..self.dtype.bytes_of(self.cols)]
    }

    /// The number of a place: what is stored, less what stands for zero, times its scale.
    pub(crate) fn narrow(&self, row: usize, col: usize) -> f32 {
        let scales = self.scales.as_ref().expect("narrow numbers have scales");
        let at = row * self.stride + col;
        let number = match self.dtype {
            ViewDtype::Fp8 => fp8::f32_of(self.bytes[at]),
            ViewDtype::Int4 => (i32::from(self.nibble(at)) - i32::from(scales.zero(row, col))) as f32,
            other => unreachable!("{other:?} has no scales"),
        };
        number * scales.scale(row, col)
    }

    /// An integer of 4 bits as it is stored, 0 to 15.
    pub(crate) fn nibble(&self, at: usize) -> u8 {
        self.bytes[at / 2] >> (at % 2 * 4) & 0xf
    }

    fn part(&self, rows: Range<usize>, columns: Range<usize>) -> TensorView<'a> {
        let fits = |range: &Range<usize>, end| range.start <= range.end && range.end <= end;
        assert!(
            fits(&rows, self.rows) && fits(&columns, self.cols),
            "{rows:?}, {columns:?} of [{}, {}]",
            self.rows,
            self.cols
        );
        let in_word = self.dtype.in_word();
        assert!(columns.start.is_multiple_of(in_word), "{columns:?} of words of {in_word}");
        let (num_rows, cols) = (rows.len(), columns.len());
        let numbers = match num_rows * cols {
            0 => 0,
            _ => (num_rows - 1) * self.stride + cols,
        };
        let start = if numbers == 0 { 0 } else { rows.start * self.stride + columns.start };
        let bytes = &self.bytes[self.dtype.bytes_of(start)..][..self.dtype.bytes_of(numbers)];
        let scales = self.scales.map(|scales| Scales {
            first: [scales.first[0] + rows.start, scales.first[1] + columns.start],
            ..scales
        });
        TensorView { rows: num_rows, cols, bytes, scales, ..*self }
    }
}

impl Scales<'_> {
    /// The scale of a place of the view.
    pub(crate) fn scale(&self, row: usize, col: usize) -> f32 {
        let at = self.at(row, col);
        let size = self.dtype.bytes_of(1);
        let bytes = &self.bytes[at * size..][..size];
        match self.dtype {
            ViewDtype::F32 => f32::from_le_bytes(bytes.try_into().expect("four bytes")),
            ViewDtype::F16 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
            ViewDtype::Bf16 => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
            other => unreachable!("scales of {other:?} are refused"),
        }
    }

    /// The scale of a place of the view as it is stored, in 16 bits.
    pub(crate) fn bits(&self, row: usize, col: usize) -> u16 {
        let at = self.at(row, col) * size_of::<u16>();
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    /// What is stored for zero at a place of the view, of integers of 4 bits.
    pub(crate) fn zero(&self, row: usize, col: usize) -> u8 {
        let Some(zeros) = self.zeros else { return 8 };
        let row = self.first[0] + row;
        let word = row / 8 * self.stride + self.group_of(col);
        zeros[word * 4 + row % 8 / 2] >> (row % 2 * 4) & 0xf
    }

    /// Which group of the tensor a column of the view is in.
    pub(crate) fn group_of(&self, col: usize) -> usize {
        let col = self.first[1] + col;
        match self.order {
            Some(order) => u32::from_le_bytes(order[4 * col..][..4].try_into().expect("four bytes")) as usize,
            None => col / self.group,
        }
    }

    fn at(&self, row: usize, col: usize) -> usize {
        (self.first[0] + row) * self.stride + self.group_of(col)
    }
}

impl ViewDtype {
    /// Whether its numbers are narrow ones, which have scales.
    pub fn has_scales(self) -> bool {
        matches!(self, ViewDtype::Fp8 | ViewDtype::Int4)
    }

    /// Bytes of so many numbers in a row, to the end of the last word.
    pub fn bytes_of(self, numbers: usize) -> usize {
        match self {
            ViewDtype::F32 => numbers * 4,
            ViewDtype::F16 | ViewDtype::Bf16 => numbers * 2,
            ViewDtype::Fp8 => numbers,
            ViewDtype::Int4 => numbers.div_ceil(8) * 4,
        }
    }

    /// Numbers that only come together.
    fn in_word(self) -> usize {
        if self == ViewDtype::Int4 { 8 } else { 1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two rows of nine integers, -8 to 7 and on, in groups of four with scales 1, 2, 3 and 10, 20, 30.
    #[test]
    fn parts_of_narrow_numbers_keep_their_scales_and_zeros() {
        let words: [u32; 4] = [0x7654_3210, 0x8, 0xfedc_ba98, 0xf];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let scale_values = [1.0f32, 2.0, 3.0, 10.0, 20.0, 30.0];
        let scale_bytes: Vec<u8> = scale_values.iter().flat_map(|value| value.to_le_bytes()).collect();
        // Zeros 8, 9, 10 of the first row, and 0, 1, 2 of the second.
        let zero_bytes: Vec<u8> = [0x08u32, 0x19, 0x2a].iter().flat_map(|word| word.to_le_bytes()).collect();
        let scales = |zeros| Scales {
            dtype: ViewDtype::F32,
            bytes: &scale_bytes,
            stride: 3,
            group: 4,
            order: None,
            zeros,
            first: [0, 0],
        };
        let view = TensorView::scaled(ViewDtype::Int4, 2, 9, &bytes, scales(None));
        let all = |view: &TensorView<'_>| -> Vec<f32> {
            (0..view.rows).flat_map(|row| (0..view.cols).map(move |col| view.narrow(row, col))).collect()
        };
        let first = [-8.0, -7.0, -6.0, -5.0, -8.0, -6.0, -4.0, -2.0, 0.0];
        let second = [0.0, 10.0, 20.0, 30.0, 80.0, 100.0, 120.0, 140.0, 210.0];
        assert_eq!(all(&view), [first, second].concat());
        assert_eq!(all(&view.rows(1..2)), second);
        assert_eq!(all(&view.columns(8..9)), [0.0, 210.0]);
        assert_eq!(view.columns(8..9).row(1), [0xf, 0, 0, 0]);
        let view = TensorView::scaled(ViewDtype::Int4, 2, 9, &bytes, scales(Some(&zero_bytes)));
        assert_eq!(all(&view.columns(0..4)), [-8.0, -7.0, -6.0, -5.0, 80.0, 90.0, 100.0, 110.0]);
        assert_eq!(all(&view.rows(1..2).columns(8..9)), [(15.0 - 2.0) * 30.0]);
        let order: Vec<u8> =
            [2u32, 0, 0, 1, 1, 1, 0, 2, 1].iter().flat_map(|group| group.to_le_bytes()).collect();
        let ordered = Scales { order: Some(&order), ..scales(Some(&zero_bytes)) };
        let view = TensorView::scaled(ViewDtype::Int4, 2, 9, &bytes, ordered);
        assert_eq!(all(&view.rows(0..1)), [-30.0, -7.0, -6.0, -12.0, -10.0, -8.0, -2.0, -9.0, -2.0]);
        assert_eq!(all(&view.columns(8..9)), [-2.0, (15.0 - 1.0) * 20.0]);
    }
}
