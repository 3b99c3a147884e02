//! Rows of x as integers of 8 bits, for products in integers.
//!
//! A row has a scale for each [`BLOCK`] of K: the largest magnitude there over 127. Integers are stored [`OFFSET`] above themselves, without
//! a sign, and sums start from minus OFFSET times the weights' sum, which takes it off again; so they are exact.
//! A block with a NaN or an infinity has the scale NaN, so that all results of its row are NaN.

use super::operand::{LINE_BYTES, Line, Operand, REGISTER_ROWS, padded_row_bytes};
use super::quantized::{BLOCK, OFFSET, num_blocks};
use super::round::bf16_to_f32;
use crate::cpu::pool::ThreadPool;
use crate::cpu::rows::for_each_chunk;
use crate::cpu::simd::Simd;
use crate::quantize::Quantizer;

/// The integers of an operand `[rows, cols]`, and its scales, `[blocks, rows]`. Keeps its memory when it shrinks.
#[derive(Default)]
pub(super) struct Integers {
    rows: usize,
    row_bytes: usize,
    lines: Vec<Line>,
    scales: Vec<f32>,
    /// Whether they are those of what the operand holds now.
    pub(super) is_current: bool,
}

impl Integers {
    /// Takes on the rows of a bf16 operand.
    pub(super) fn assign(&mut self, simd: Simd, pool: &ThreadPool, x: &Operand) {
        (self.rows, self.row_bytes) = (x.rows(), padded_row_bytes(x.cols(), 1));
        let num_lines = self.rows.next_multiple_of(REGISTER_ROWS) * self.row_bytes / LINE_BYTES;
        if num_lines > self.lines.len() {
            self.lines.resize(num_lines, Line([0; LINE_BYTES]));
        }
        let num_scales = num_blocks(x.cols()) * self.rows;
        if num_scales > self.scales.len() {
            self.scales.resize(num_scales, 0.0);
        }
        let out =
            Rows { bytes: self.lines.as_mut_ptr().cast(), scales: self.scales.as_mut_ptr(), rows: self.rows };
        let row_bytes = self.row_bytes;
        for_each_chunk(pool, x.rows(), x.cols(), |rows| {
            for row in rows {
                // SAFETY: chunks are disjoint, and there is room for `rows` rows and for as many scales of each block.
                let bytes = unsafe { out.row(row, row_bytes, x.cols()) };
                for block in 0..num_blocks(x.cols()) {
                    let terms = block * BLOCK..x.cols().min((block + 1) * BLOCK);
                    let scale = quantize(simd, &x.bf16_row(row)[terms.clone()], &mut bytes[terms]);
                    // SAFETY: as above.
                    unsafe { out.scales.add(block * out.rows + row).write(scale) }
                }
            }
        });
        self.is_current = true;
    }

    /// First byte of the first row.
    pub(super) fn as_ptr(&self) -> *const u8 {
        self.lines.as_ptr().cast()
    }

    /// Bytes from row to row.
    pub(super) fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// What the rows' integers of a block of K are multiplied with, `[rows]`.
    pub(super) fn scales(&self, block: usize) -> &[f32] {
        &self.scales[block * self.rows..][..self.rows]
    }
}

/// Rows and scales that several threads fill at once.
struct Rows {
    bytes: *mut u8,
    /// `[blocks, rows]`
    scales: *mut f32,
    rows: usize,
}

// SAFETY: each row, and each of its scales, is one thread's alone, inside the borrow of `assign`.
unsafe impl Sync for Rows {}

impl Rows {
    /// # Safety
    /// The row is inside, and nobody else has it.
    unsafe fn row<'a>(&self, row: usize, row_bytes: usize, cols: usize) -> &'a mut [u8] {
        // SAFETY: the caller's.
        unsafe { std::slice::from_raw_parts_mut(self.bytes.add(row * row_bytes), cols) }
    }
}

/// Quantise a row's block of bf16 and return its scale; the same bits at every level.
fn quantize(simd: Simd, x: &[u16], out: &mut [u8]) -> f32 {
    match simd {
        // SAFETY: callers pass a level that this processor has.
        #[cfg(target_arch = "x86_64")]
        Simd::Avx512 | Simd::Amx => unsafe { quantize_avx512(x, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Simd::Avx2 => unsafe { quantize_avx2(x, out) },
        _ => quantize_each(x, out),
    }
}

/// The loops that the compiler vectorises with the features of the function they are inlined into.
#[inline(always)]
fn quantize_each(x: &[u16], out: &mut [u8]) -> f32 {
    // Magnitudes are ordered as their bits are, NaN above all.
    let largest = x.iter().fold(0, |largest: u16, &bits| largest.max(bits & 0x7fff));
    let quantizer = Quantizer::int8(bf16_to_f32(largest));
    for (out, &bits) in out.iter_mut().zip(x) {
        *out = quantizer.quantize(bf16_to_f32(bits)).cast_unsigned() ^ OFFSET;
    }
    quantizer.scale
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn quantize_avx512(x: &[u16], out: &mut [u8]) -> f32 {
    quantize_each(x, out)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn quantize_avx2(x: &[u16], out: &mut [u8]) -> f32 {
    quantize_each(x, out)
}

const _: () = assert!(OFFSET == 1 << 7, "adding it is flipping the upper bit");
