//! Integers of 8 bits on both sides.
//!
//! `VPMADDUBSW` multiplies bytes without a sign by bytes with one and adds two products into 16 bits, where it saturates. With
//! x's magnitudes on one side, and the weights with the sign of x on the other, two products are at most
//! 2 · 127², which is below 2¹⁵: so nothing does, and `VPMADDWD` with ones adds two such sums exactly.
//!
//! On a Zen 1 core both are a unit's alone, so that it does 7 of these multiplications in a cycle and 8 in f32; where there are
//! two such units, or wider ones, integers are the faster.

use crate::cpu::gemm::operand::LINE_BYTES;
use crate::cpu::gemm::quantized::OFFSET;
use crate::cpu::gemm::tile::{GROUP_BYTES, MR, NR, PIECE_COLS, Tile};
use std::arch::x86_64::*;

/// A tile in integers of 8 bits.
///
/// # Safety
/// As [`crate::cpu::gemm::tile::TileFn`].
pub(in crate::cpu::gemm) unsafe fn tile_int8(tile: &Tile) {
    let width = match tile.rows {
        1 => 64,
        2 => 32,
        _ => PIECE_COLS,
    };
    let width = width.min(tile.cols);
    for col in (0..tile.cols).step_by(width) {
        // SAFETY: the caller vouches for the pointers and the features.
        unsafe {
            match (tile.rows, width) {
                (1, 64) => micro_int8::<1, 8>(tile, col),
                (1, 32) => micro_int8::<1, 4>(tile, col),
                (1, 16) => micro_int8::<1, 2>(tile, col),
                (2, 32) => micro_int8::<2, 4>(tile, col),
                (2, 16) => micro_int8::<2, 2>(tile, col),
                (3, 16) => micro_int8::<3, 2>(tile, col),
                (4, 16) => micro_int8::<4, 2>(tile, col),
                (5, 16) => micro_int8::<5, 2>(tile, col),
                (MR, 16) => micro_int8::<MR, 2>(tile, col),
                (rows, cols) => unreachable!("a piece of {rows} x {cols}"),
            }
        }
    }
}

/// How far ahead of itself a tile asks for the lines of its columns.
const AHEAD_BYTES: usize = 32 * GROUP_BYTES;

/// V registers of columns from `col` on. x has its sign back, so that sums start from zero instead of the bias.
#[target_feature(enable = "avx2")]
unsafe fn micro_int8<const R: usize, const V: usize>(tile: &Tile, col: usize) {
    let ones = _mm256_set1_epi16(1);
    // SAFETY: the tile's pointers are valid for R rows, the piece's columns and `k` terms, of which there
    // are a multiple of KR = 8: two groups of four.
    unsafe {
        let mut sums = [[_mm256_setzero_si256(); V]; R];
        for quad in 0..tile.k / 4 {
            let words = tile.b.add(quad * GROUP_BYTES + col * 4);
            for line in (0..V * 32).step_by(LINE_BYTES) {
                _mm_prefetch::<_MM_HINT_T1>(words.wrapping_add(AHEAD_BYTES + line).cast());
            }
            let words = words.cast::<__m256i>();
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = *tile.a.add(r * tile.a_stride + quad * 4).cast::<u32>();
                let x = _mm256_set1_epi32((x ^ u32::from_ne_bytes([OFFSET; 4])).cast_signed());
                let magnitudes = _mm256_abs_epi8(x);
                for (v, sum) in sums.iter_mut().enumerate() {
                    let w = _mm256_sign_epi8(_mm256_load_si256(words.add(v)), x);
                    *sum =
                        _mm256_add_epi32(*sum, _mm256_madd_epi16(_mm256_maddubs_epi16(magnitudes, w), ones));
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (v, &sum) in sums.iter().enumerate() {
                let col = col + 8 * v;
                let scales = _mm256_loadu_ps(tile.scales.add(col));
                let scales = _mm256_mul_ps(_mm256_broadcast_ss(&*tile.row_scales.add(r)), scales);
                let mut sum = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), scales);
                if !tile.init.is_null() {
                    sum = _mm256_add_ps(_mm256_loadu_ps(tile.init.add(r * NR + col)), sum);
                }
                _mm256_storeu_ps(tile.c.add(r * tile.c_stride + col), sum);
            }
        }
    }
}
