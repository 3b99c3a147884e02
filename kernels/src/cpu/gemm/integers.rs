//! Rows of x as integers of 8 bits, for products in integers.
//!
//! A row has a scale for each [`BLOCK`] of K: the largest magnitude there over 127. Integers are stored [`OFFSET`] above themselves, without
//! a sign, and sums start from minus OFFSET times the weights' sum, which takes it off again; so they are exact.
//! A block with a NaN or an infinity has the scale NaN, so that all results of its row are NaN.

use super::operand::{Bf16Row, LINE_BYTES, Line, Operand, REGISTER_ROWS, padded_row_bytes};
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
        let out = self.writer(x.rows(), x.cols());
        for_each_chunk(pool, x.rows(), x.cols(), |rows| {
            // SAFETY: chunks are disjoint, and the rows are those of the shape.
            rows.for_each(|row| unsafe { out.take(simd, row, x.bf16_row(row)) });
        });
        self.is_current = true;
    }

    /// A handle through which several threads write rows of a shape.
    pub(super) fn writer(&mut self, rows: usize, cols: usize) -> IntegerWriter {
        (self.rows, self.row_bytes) = (rows, padded_row_bytes(cols, 1));
        let num_lines = rows.next_multiple_of(REGISTER_ROWS) * self.row_bytes / LINE_BYTES;
        if num_lines > self.lines.len() {
            self.lines.resize(num_lines, Line([0; LINE_BYTES]));
        }
        let num_scales = num_blocks(cols) * rows;
        if num_scales > self.scales.len() {
            self.scales.resize(num_scales, 0.0);
        }
        let (bytes, scales) = (self.lines.as_mut_ptr().cast(), self.scales.as_mut_ptr());
        IntegerWriter { bytes, row_bytes: self.row_bytes, scales, rows }
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

/// Writes rows of [`Integers`], and their scales, from several threads at once, as long as those are borrowed.
#[derive(Clone, Copy)]
pub(super) struct IntegerWriter {
    bytes: *mut u8,
    row_bytes: usize,
    /// `[blocks, rows]`
    scales: *mut f32,
    rows: usize,
}

// SAFETY: `take` obliges its callers to keep rows to themselves.
unsafe impl Send for IntegerWriter {}
// SAFETY: as above.
unsafe impl Sync for IntegerWriter {}

impl IntegerWriter {
    /// Quantises a row, `x: [cols]`.
    ///
    /// # Safety
    /// The integers are borrowed, row and columns are those of their shape, and nobody else has the row.
    #[inline]
    pub(super) unsafe fn take(&self, simd: Simd, row: usize, x: Bf16Row<'_>) {
        match x {
            // SAFETY: the caller's.
            Bf16Row::Narrow(x) => unsafe { self.take_with(row, x, |x, bytes| quantize(simd, x, bytes)) },
            // SAFETY: as above.
            Bf16Row::Wide(x) => unsafe { self.take_with(row, x, |x, bytes| quantize_wide(simd, x, bytes)) },
        }
    }

    /// The same by `quantize`, which returns the scale of a block of the row.
    ///
    /// # Safety
    /// As [`IntegerWriter::take`].
    #[inline(always)]
    unsafe fn take_with<T>(&self, row: usize, x: &[T], quantize: impl Fn(&[T], &mut [u8]) -> f32) {
        debug_assert!(row < self.rows && x.len() <= self.row_bytes, "row {row} of {}", self.rows);
        // SAFETY: the caller's.
        let bytes = unsafe { std::slice::from_raw_parts_mut(self.bytes.add(row * self.row_bytes), x.len()) };
        for (block, (x, bytes)) in x.chunks(BLOCK).zip(bytes.chunks_mut(BLOCK)).enumerate() {
            let scale = quantize(x, bytes);
            // SAFETY: there is a scale for every block and row.
            unsafe { self.scales.add(block * self.rows + row).write(scale) }
        }
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
        _ => quantize_each(x, bf16_to_f32, out),
    }
}

/// The same of bf16 in f32.
fn quantize_wide(simd: Simd, x: &[f32], out: &mut [u8]) -> f32 {
    match simd {
        // SAFETY: callers pass a level that this processor has.
        #[cfg(target_arch = "x86_64")]
        Simd::Avx2 | Simd::Avx512 | Simd::Amx => unsafe { quantize_wide_avx2(x, out) },
        _ => quantize_each(x, |value| value, out),
    }
}

/// The loops that the compiler vectorises with the features of the function they are inlined into.
#[inline(always)]
fn quantize_each<T: Copy>(x: &[T], value: impl Fn(T) -> f32, out: &mut [u8]) -> f32 {
    // Magnitudes are ordered as their bits are, NaN above all.
    let largest = x.iter().fold(0, |largest: u32, &x| largest.max(value(x).to_bits() & 0x7fff_ffff));
    let quantizer = Quantizer::int8(f32::from_bits(largest));
    for (out, &x) in out.iter_mut().zip(x) {
        *out = quantizer.quantize(value(x)).cast_unsigned() ^ OFFSET;
    }
    quantizer.scale
}

/// By hand, in a third of the time: even and odd numbers of a register each become f32 by one instruction, and integers
/// come together again by a shift.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn quantize_avx512(x: &[u16], out: &mut [u8]) -> f32 {
    use std::arch::x86_64::*;
    const ODD: u32 = 0xaaaa_aaaa;
    debug_assert_eq!(x.len(), out.len());
    // Numbers 32 · i and on, zeros beyond the last.
    let load = |at: usize| {
        let lanes = x.len().saturating_sub(at).min(32);
        // SAFETY: lanes beyond the last number are not read.
        unsafe { _mm512_maskz_loadu_epi16(((1u64 << lanes) - 1) as u32, x.as_ptr().wrapping_add(at).cast()) }
    };
    let mut largest = [_mm512_setzero_si512(); 2];
    for at in (0..x.len()).step_by(64) {
        for (i, largest) in largest.iter_mut().enumerate() {
            let magnitudes = _mm512_and_si512(load(at + 32 * i), _mm512_set1_epi16(0x7fff));
            *largest = _mm512_max_epu16(*largest, magnitudes);
        }
    }
    let largest = _mm512_max_epu16(largest[0], largest[1]);
    let largest = _mm256_max_epu16(_mm512_castsi512_si256(largest), _mm512_extracti64x4_epi64::<1>(largest));
    let largest = _mm_max_epu16(_mm256_castsi256_si128(largest), _mm256_extracti128_si256::<1>(largest));
    // There is an instruction for the smallest of eight.
    let smallest = _mm_minpos_epu16(_mm_xor_si128(largest, _mm_set1_epi16(-1)));
    let quantizer = Quantizer::int8(bf16_to_f32(!(_mm_cvtsi128_si32(smallest) as u16)));

    let inverse = _mm512_set1_ps(quantizer.inverse());
    // No number is more than 127 steps and a rounding error, so that none is to be cut.
    let integers = |bits| _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_castsi512_ps(bits), inverse));
    let order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    for (at, out) in (0..).step_by(64).zip(out.chunks_mut(64)) {
        let words = [load(at), load(at + 32)].map(|numbers| {
            let even = integers(_mm512_slli_epi32::<16>(numbers));
            let odd = integers(_mm512_and_si512(numbers, _mm512_set1_epi32(0xffff_0000_u32.cast_signed())));
            _mm512_mask_blend_epi16(ODD, even, _mm512_slli_epi32::<16>(odd))
        });
        let bytes = _mm512_permutexvar_epi64(order, _mm512_packs_epi16(words[0], words[1]));
        let bytes = _mm512_xor_si512(bytes, _mm512_set1_epi8(OFFSET.cast_signed()));
        // SAFETY: lanes beyond the last byte are not written.
        unsafe { _mm512_mask_storeu_epi8(out.as_mut_ptr().cast(), u64::MAX >> (64 - out.len()), bytes) }
    }
    quantizer.scale
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn quantize_avx2(x: &[u16], out: &mut [u8]) -> f32 {
    quantize_each(x, bf16_to_f32, out)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn quantize_wide_avx2(x: &[f32], out: &mut [u8]) -> f32 {
    quantize_each(x, |value| value, out)
}

const _: () = assert!(OFFSET == 1 << 7, "adding it is flipping the upper bit");

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::bf16_bits;

    #[test]
    fn every_level_quantises_to_the_same_integers() {
        for len in [1, 2, 15, 31, 32, 33, 63, 64, 65, 100, 127, 128, 576, 1536, BLOCK] {
            for (i, scale) in [1.0, 1e-38, 1e-30, 3e38, 0.0].into_iter().enumerate() {
                let number = |k: usize| ((k * 37 + i) as f32 * 0.61).sin() * scale;
                let x: Vec<u16> = (0..len).map(|k| bf16_bits(number(k))).collect();
                let mut expected = vec![0; len];
                let expected_scale = quantize_each(&x, bf16_to_f32, &mut expected);
                let wide: Vec<f32> = x.iter().map(|&bits| bf16_to_f32(bits)).collect();
                for simd in Simd::ALL.into_iter().filter(|simd| simd.is_available()) {
                    let mut found = vec![0; len];
                    assert_eq!(quantize(simd, &x, &mut found), expected_scale, "{}", simd.name());
                    assert_eq!(found, expected, "{} {len} {scale}", simd.name());
                    found.fill(0);
                    assert_eq!(quantize_wide(simd, &wide, &mut found), expected_scale, "{}", simd.name());
                    assert_eq!(found, expected, "{} {len} {scale}, wide", simd.name());
                }
            }
        }
    }

    #[test]
    fn halves_of_steps_go_to_the_even_integer_and_what_is_not_finite_spoils_the_scale() {
        let halves: Vec<u16> = (-127i16..=127).map(|i| bf16_bits(f32::from(i) / 2.0 + 0.0)).collect();
        let x: Vec<u16> = halves.iter().copied().chain([bf16_bits(127.0)]).collect();
        for simd in Simd::ALL.into_iter().filter(|simd| simd.is_available()) {
            let mut found = vec![0; x.len()];
            assert_eq!(quantize(simd, &x, &mut found), 1.0);
            for (i, &found) in (-127i32..=127).zip(&found) {
                let expected = (f64::from(i) / 2.0).round_ties_even() as i32;
                assert_eq!(i32::from(found) - i32::from(OFFSET), expected, "{} {i}/2", simd.name());
            }
            for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let x: Vec<u16> = (0..70).map(|k| bf16_bits(if k == 66 { wrong } else { 1.0 })).collect();
                assert!(quantize(simd, &x, &mut [0; 70]).is_nan(), "{}", simd.name());
            }
        }
    }
}
