//! Weights widened to f32 for many rows, and the tiles that read them.

use super::narrow::{Int4, Int8, Narrow};
use super::{accumulate, load_sums, store_sums};
use crate::backend::WeightType;
use crate::cpu::gemm::quantized::GROUP;
use crate::cpu::gemm::tile::{KR, NR, PIECE_COLS, Tile};
use crate::cpu::gemm::unpack::{Unpack, UnpackFn};
use crate::cpu::lanes::upper_halves;
use std::arch::x86_64::*;

/// Registers of a piece's columns.
const V: usize = PIECE_COLS / 8;

/// What widens weights of a type: to `[terms][PIECE_COLS]` of f32, narrow ones without their scales.
pub(in crate::cpu::gemm) fn widen_fn(kind: WeightType) -> UnpackFn {
    match kind {
        WeightType::Bf16 => widen_bf16,
        WeightType::Int8Weight => widen_int8,
        WeightType::Int4Weight => widen_int4,
        WeightType::F32 | WeightType::Fp8 | WeightType::Int8 => unreachable!("{kind:?} is not widened"),
    }
}

#[target_feature(enable = "avx2")]
unsafe fn widen_bf16(chunk: &Unpack) {
    let odd_half = upper_halves();
    for pair in 0..chunk.terms / 2 {
        // SAFETY: the caller vouches for the chunk's pointers, two terms to a word.
        unsafe {
            let words = chunk.words.add(pair * chunk.strip).cast::<__m256i>();
            let out = chunk.out.add(2 * pair * PIECE_COLS).cast::<__m256i>();
            for v in 0..V {
                let words = _mm256_load_si256(words.add(v));
                _mm256_store_si256(out.add(v), _mm256_slli_epi32::<16>(words));
                _mm256_store_si256(out.add(V + v), _mm256_and_si256(words, odd_half));
            }
        }
    }
}

#[target_feature(enable = "avx2")]
unsafe fn widen_int8(chunk: &Unpack) {
    // SAFETY: the caller's.
    unsafe { widen_narrow::<Int8>(chunk) }
}

#[target_feature(enable = "avx2")]
unsafe fn widen_int4(chunk: &Unpack) {
    // SAFETY: the caller's.
    unsafe { widen_narrow::<Int4>(chunk) }
}

#[inline]
#[target_feature(enable = "avx2")]
unsafe fn widen_narrow<T: Narrow>(chunk: &Unpack) {
    for word in 0..chunk.terms / T::TERMS {
        // SAFETY: the caller vouches for the chunk's pointers.
        unsafe {
            let words = chunk.words.add(word * chunk.strip).cast::<__m256i>();
            let out = chunk.out.add(word * T::TERMS * PIECE_COLS).cast::<f32>();
            for v in 0..V {
                let words = T::without_signs(_mm256_load_si256(words.add(v)));
                for i in 0..T::TERMS {
                    _mm256_store_ps(out.add(i * PIECE_COLS + v * 8), T::term(words, i));
                }
            }
        }
    }
}

/// A tile of [`PIECE_COLS`] columns over what was widened; scales as narrow tiles have them.
///
/// # Safety
/// As [`crate::cpu::gemm::tile::TileFn`].
pub(in crate::cpu::gemm) unsafe fn tile_widened(tile: &Tile) {
    // SAFETY: the caller vouches for the pointers and the features.
    unsafe {
        match tile.rows {
            1 => micro::<1>(tile),
            2 => micro::<2>(tile),
            3 => micro::<3>(tile),
            4 => micro::<4>(tile),
            5 => micro::<5>(tile),
            6 => micro::<6>(tile),
            rows => unreachable!("a tile of {rows} rows"),
        }
    }
}

/// All of K at once, or group by group where these have scales. The loop over terms stands here once: as a function of its own it
/// was called for tiles of four rows and more when other code moved, with sums in memory.
#[target_feature(enable = "avx2,fma")]
unsafe fn micro<const R: usize>(tile: &Tile) {
    let has_groups = !tile.scales.is_null();
    let (num_groups, terms) = if has_groups { (tile.k / GROUP, GROUP) } else { (1, tile.k) };
    // SAFETY: the tile's pointers are valid for `rows = R` rows of f32, PIECE_COLS columns and `k` terms, a multiple of KR, of
    // which there are whole groups of scales.
    unsafe {
        let (mut a, mut b) = (tile.a, tile.b.cast::<f32>());
        for group in 0..num_groups {
            let mut sums = if has_groups { [[_mm256_setzero_ps(); V]; R] } else { load_sums::<R, V>(tile) };
            for _ in 0..terms / KR {
                for k in 0..KR {
                    let w = std::array::from_fn(|v| _mm256_load_ps(b.add(k * PIECE_COLS + v * 8)));
                    accumulate(&mut sums, w, a.add(k * 4), tile.a_stride);
                }
                a = a.add(KR * 4);
                b = b.add(KR * PIECE_COLS);
            }
            if has_groups {
                add_group(&sums, tile, tile.scales.add(group * NR), tile.init.is_null() && group == 0);
            } else {
                store_sums(tile, sums);
            }
        }
    }
}

/// Adds the sums over a group, times their scales, to the destination, which holds those over the groups before unless this
/// is the first: with both in registers there would be too few.
///
/// # Safety
/// As [`micro`]; the destination is where the tile takes earlier sums from, if it does.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn add_group<const R: usize>(
    over_group: &[[__m256; V]; R],
    tile: &Tile,
    scales: *const f32,
    is_first: bool,
) {
    debug_assert!(!tile.is_added && (tile.init.is_null() || std::ptr::eq(tile.init, tile.c)));
    for v in 0..V {
        // SAFETY: the caller's.
        unsafe {
            let scale = _mm256_loadu_ps(scales.add(v * 8));
            for (r, group) in over_group.iter().enumerate() {
                let c = tile.c.add(r * tile.c_stride + v * 8);
                let sum = match is_first {
                    true => _mm256_mul_ps(group[v], scale),
                    false => _mm256_fmadd_ps(group[v], scale, _mm256_loadu_ps(c)),
                };
                _mm256_storeu_ps(c, sum);
            }
        }
    }
}
