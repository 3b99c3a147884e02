//! Weights of 8 and 4 bits as f32, in registers, and the tiles of few rows that read them where they lie.
//!
//! Some bits of a word become the lowest of a number's fraction, under an exponent that gives them the worth of integers:
//! a mask, an exponent, and a subtraction of what is too much. There is no shift but one that serves half of a word: on a
//! Zen 1 core it takes as long as all three.

use super::{Multiplied, Use, load_sums, store_sums};
use crate::cpu::gemm::narrow::in_pieces;
use crate::cpu::gemm::operand::LINE_BYTES;
use crate::cpu::gemm::quantized::GROUP;
use crate::cpu::gemm::tile::{GROUP_BYTES, NR, Tile};
use std::arch::x86_64::*;

/// Integers of a register of words, one after the other.
pub(super) trait Narrow {
    /// Integers in a word.
    const TERMS: usize;

    /// Whether sums are those over groups of K, each times its scales.
    const HAS_GROUPS: bool;

    /// The words with every integer above itself, so that none has a sign.
    unsafe fn without_signs(words: __m256i) -> __m256i;

    /// The word's term `i` of every column, of [`Narrow::without_signs`].
    unsafe fn term(words: __m256i, i: usize) -> __m256;
}

/// Four of 8 bits.
pub(super) struct Int8;

/// Eight of 4 bits, the even ones in the lower half.
pub(super) struct Int4;

/// The bits from `at` on as an integer, less `offset`, exactly.
#[inline]
#[target_feature(enable = "avx2")]
fn number<const AT: u32>(words: __m256i, mask: u32, offset: u32) -> __m256 {
    // The exponent of 2^(23 - AT) gives bit AT the worth of 1.
    let exponent = (127 + 23 - AT) << 23;
    let excess = f32::from_bits(exponent) + offset as f32;
    let bits = _mm256_and_si256(words, _mm256_set1_epi32((mask << AT).cast_signed()));
    let bits = _mm256_or_si256(bits, _mm256_set1_epi32(exponent.cast_signed()));
    _mm256_sub_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(excess))
}

impl Narrow for Int8 {
    const TERMS: usize = 4;
    const HAS_GROUPS: bool = false;

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn without_signs(words: __m256i) -> __m256i {
        _mm256_xor_si256(words, _mm256_set1_epi8(-128))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn term(words: __m256i, i: usize) -> __m256 {
        let half = if i < 2 { words } else { _mm256_srli_epi32::<16>(words) };
        match i % 2 {
            0 => number::<0>(half, 0xff, 128),
            _ => number::<8>(half, 0xff, 128),
        }
    }
}

impl Narrow for Int4 {
    const TERMS: usize = 8;
    const HAS_GROUPS: bool = true;

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn without_signs(words: __m256i) -> __m256i {
        _mm256_xor_si256(words, _mm256_set1_epi8(0x88_u8.cast_signed()))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn term(words: __m256i, i: usize) -> __m256 {
        let half = if i.is_multiple_of(2) { words } else { _mm256_srli_epi32::<16>(words) };
        match i / 2 {
            0 => number::<0>(half, 0xf, 8),
            1 => number::<4>(half, 0xf, 8),
            2 => number::<8>(half, 0xf, 8),
            _ => number::<12>(half, 0xf, 8),
        }
    }
}

/// A tile of weights of 8 bits, without their scales.
///
/// # Safety
/// As [`crate::cpu::gemm::tile::TileFn`].
pub(in crate::cpu::gemm) unsafe fn tile_int8_weight(tile: &Tile) {
    // SAFETY: the caller vouches for the pointers and the features.
    unsafe { in_columns::<Int8, Multiplied>(tile) }
}

/// A tile of weights of 4 bits, whose scales for groups of K are NR apart.
///
/// # Safety
/// As [`crate::cpu::gemm::tile::TileFn`].
pub(in crate::cpu::gemm) unsafe fn tile_int4_weight(tile: &Tile) {
    // SAFETY: the caller vouches for the pointers and the features.
    unsafe { in_columns::<Int4, Multiplied>(tile) }
}

/// Pieces of a tile: as wide as there are registers for sums, of which the units want five at a time.
///
/// # Safety
/// As [`tile_int8_weight`].
pub(super) unsafe fn in_columns<T: Narrow, U: Use>(tile: &Tile) {
    let width = match tile.rows {
        1 => 32,
        2..=4 => 16,
        _ => 8,
    };
    // SAFETY: the caller vouches for the tile, and the piece reads panels of narrow weights.
    unsafe { in_pieces(tile, T::TERMS, width, piece::<T, U>) }
}

unsafe fn piece<T: Narrow, U: Use>(tile: &Tile) {
    // SAFETY: the caller's.
    unsafe {
        match (tile.rows, tile.cols) {
            (1, 32) => micro::<T, U, 1, 4>(tile),
            (1, 16) => micro::<T, U, 1, 2>(tile),
            (2, 16) => micro::<T, U, 2, 2>(tile),
            (3, 16) => micro::<T, U, 3, 2>(tile),
            (4, 16) => micro::<T, U, 4, 2>(tile),
            (5, 8) => micro::<T, U, 5, 1>(tile),
            (6, 8) => micro::<T, U, 6, 1>(tile),
            (rows, cols) => unreachable!("a piece of {rows} x {cols}"),
        }
    }
}

/// R rows by V registers of columns. With groups, sums are those over groups of K, each times its scales.
#[target_feature(enable = "avx2,fma")]
unsafe fn micro<T: Narrow, U: Use, const R: usize, const V: usize>(tile: &Tile) {
    // SAFETY: the tile's pointers are valid for `rows = R` rows of f32, `8 * V` columns and `k` terms, of which there are whole
    // groups of scales.
    unsafe {
        let mut sums = load_sums::<R, V>(tile);
        if !T::HAS_GROUPS {
            add_words::<T, U, R, V>(&mut sums, tile, 0, tile.k);
            return store_sums(tile, sums);
        }
        if tile.init.is_null() {
            // What takes every product as it is, with its sign if it is a zero.
            sums = [[_mm256_set1_ps(-0.0); V]; R];
        }
        for group in 0..tile.k / GROUP {
            let mut over_group = [[_mm256_setzero_ps(); V]; R];
            add_words::<T, U, R, V>(&mut over_group, tile, group * GROUP, GROUP);
            add_group(&mut sums, &over_group, tile.scales.add(group * NR));
        }
        store_sums(tile, sums);
    }
}

/// `sums += over_group · scales`.
///
/// # Safety
/// The processor has AVX2 and FMA, and there are `8 * V` scales.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn add_group<const R: usize, const V: usize>(
    sums: &mut [[__m256; V]; R],
    over_group: &[[__m256; V]; R],
    scales: *const f32,
) {
    for v in 0..V {
        // SAFETY: the caller's.
        let scale = unsafe { _mm256_loadu_ps(scales.add(v * 8)) };
        for (sums, group) in sums.iter_mut().zip(over_group) {
            sums[v] = _mm256_fmadd_ps(group[v], scale, sums[v]);
        }
    }
}

/// How far ahead of itself a tile asks for the lines of its columns: 32 groups, of which each has one or two of them.
const AHEAD_BYTES: usize = 32 * GROUP_BYTES;

/// Takes `terms` terms from `first` on, in order.
///
/// # Safety
/// As [`micro`].
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn add_words<T: Narrow, U: Use, const R: usize, const V: usize>(
    sums: &mut [[__m256; V]; R],
    tile: &Tile,
    first: usize,
    terms: usize,
) {
    // SAFETY: the caller's.
    unsafe {
        let mut a = tile.a.add(first * 4);
        let mut b = tile.b.add(first / T::TERMS * GROUP_BYTES);
        for _ in 0..terms / T::TERMS {
            let words: [__m256i; V] =
                std::array::from_fn(|v| T::without_signs(_mm256_load_si256(b.cast::<__m256i>().add(v))));
            for line in 0..V.div_ceil(2) {
                _mm_prefetch::<_MM_HINT_T1>(b.wrapping_add(AHEAD_BYTES + line * LINE_BYTES).cast());
            }
            for i in 0..T::TERMS {
                let w = std::array::from_fn(|v| T::term(words[v], i));
                U::take(sums, w, a.add(i * 4), tile.a_stride);
            }
            a = a.add(T::TERMS * 4);
            b = b.add(GROUP_BYTES);
        }
    }
}
