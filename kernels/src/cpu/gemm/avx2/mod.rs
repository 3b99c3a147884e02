//! The tile in AVX2 with FMA.
//!
//! Sixteen registers hold 6 · 2 sums, 2 of weights and 1 of x; 12 independent sums fill two units with a
//! latency of 4 to 5 cycles. One row or two take wider pieces, to have 8 sums and to read whole lines. A
//! bf16 pair is two terms, the even k first.
//!
//! Here are the tiles that read panels of bf16 and f32; `narrow` has those of narrow weights, `widened` those of many rows,
//! `integers` the ones that multiply integers. What a tile of one and the same type sums, and in which order, is the same in all.

mod integers;
mod narrow;
mod widened;

use super::narrow::in_pieces;
use super::tile::{GROUP_BYTES, KR, NR, Tile, TileFn};
use crate::backend::WeightType;
use crate::cpu::exp::avx2::exp_ps;
use crate::cpu::lanes::upper_halves;
use std::arch::x86_64::*;

pub(super) use integers::tile_int8;
pub(super) use narrow::{tile_int4_weight, tile_int8_weight};
pub(super) use widened::{tile_widened, widen_fn};

/// Most tiles that share what is widened: to widen a weight takes as long as three rows' products with it, so 96 rows pay 3 %.
/// Their x is 108 KiB for each chunk of K of 288 terms and is read from L2.
pub(super) const GROUP_TILES: usize = 16;

/// Tiles of a unit from which on it pays to widen bf16. A tile that reads bf16 takes a tenth longer (91 % of the peak in L1 for
/// 100), and to widen takes as long as three rows: 33 rows are as long either way.
pub(super) const WIDENED_TILES: usize = 6;

/// Calls `$micro::<rows, registers of columns>` for a piece's shape, with what is done with weights before these, if it is
/// named.
macro_rules! dispatch {
    ($tile:expr, $micro:ident $(, $used:ident)?) => {
        match ($tile.rows, $tile.cols) {
            (1, 64) => $micro::<$($used,)? 1, 8>($tile),
            (1, 32) => $micro::<$($used,)? 1, 4>($tile),
            (1, 16) => $micro::<$($used,)? 1, 2>($tile),
            (2, 32) => $micro::<$($used,)? 2, 4>($tile),
            (2, 16) => $micro::<$($used,)? 2, 2>($tile),
            (3, 16) => $micro::<$($used,)? 3, 2>($tile),
            (4, 16) => $micro::<$($used,)? 4, 2>($tile),
            (5, 16) => $micro::<$($used,)? 5, 2>($tile),
            (6, 16) => $micro::<$($used,)? 6, 2>($tile),
            (rows, cols) => unreachable!("a piece of {rows} x {cols}"),
        }
    };
}

/// Columns of a piece of so many rows.
fn width(rows: usize) -> usize {
    match rows {
        1 => 64,
        2 => 32,
        _ => 16,
    }
}

/// A bf16 tile.
///
/// # Safety
/// As [`super::tile::TileFn`].
pub(super) unsafe fn tile_bf16(tile: &Tile) {
    // SAFETY: the caller vouches for the tile, and the piece reads bf16 panels.
    unsafe { in_pieces(tile, 2, width(tile.rows), piece_bf16::<Multiplied>) }
}

/// A tile that unpacks weights in its registers as it does to multiply them, and leaves them: its sums are noise.
pub(super) fn unpacking_tile(kind: WeightType) -> TileFn {
    match kind {
        WeightType::Bf16 => unpack_bf16,
        WeightType::Int8Weight => narrow::in_columns::<narrow::Int8, Left>,
        WeightType::Int4Weight => narrow::in_columns::<narrow::Int4, Left>,
        WeightType::F32 | WeightType::Fp8 | WeightType::Int8 => unreachable!("{kind:?} is not unpacked"),
    }
}

/// # Safety
/// As [`tile_bf16`].
unsafe fn unpack_bf16(tile: &Tile) {
    // SAFETY: as there.
    unsafe { in_pieces(tile, 2, width(tile.rows), piece_bf16::<Left>) }
}

/// An f32 tile.
///
/// # Safety
/// As [`super::tile::TileFn`].
pub(super) unsafe fn tile_f32(tile: &Tile) {
    // SAFETY: the caller vouches for the tile, and the piece reads f32 panels.
    unsafe { in_pieces(tile, 1, width(tile.rows), piece_f32) }
}

unsafe fn piece_bf16<U: Use>(tile: &Tile) {
    // SAFETY: the caller vouches for the pointers and the features.
    unsafe { dispatch!(tile, micro_bf16, U) }
}

unsafe fn piece_f32(tile: &Tile) {
    // SAFETY: the caller vouches for the pointers and the features.
    unsafe { dispatch!(tile, micro_f32) }
}

#[target_feature(enable = "avx2,fma")]
unsafe fn micro_bf16<U: Use, const R: usize, const V: usize>(tile: &Tile) {
    let odd_half = upper_halves();
    // SAFETY: the tile's pointers are valid for `rows = R` rows of f32, `8 * V` columns and `k` terms, of
    // which there are a multiple of KR = 8: four groups of two.
    unsafe {
        let mut sums = load_sums::<R, V>(tile);
        let (mut a, mut b, mut prefetch) = (tile.a, tile.b, tile.prefetch);
        for _ in 0..tile.k / KR {
            prefetch = prefetch_groups::<V, _MM_HINT_T0>(prefetch, tile.prefetch_groups);
            for pair in 0..KR / 2 {
                let words = b.add(pair * GROUP_BYTES).cast::<__m256i>();
                let even = std::array::from_fn(|v| {
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_load_si256(words.add(v))))
                });
                U::take(&mut sums, even, a.add(pair * 8), tile.a_stride);
                // Volatile, so that the words are read again instead of kept: with 6 rows they would be one
                // register too many, and sums would go to memory.
                let odd = std::array::from_fn(|v| {
                    _mm256_castsi256_ps(_mm256_and_si256(words.add(v).read_volatile(), odd_half))
                });
                U::take(&mut sums, odd, a.add(pair * 8 + 4), tile.a_stride);
            }
            a = a.add(KR * 4);
            b = b.add(KR / 2 * GROUP_BYTES);
        }
        store_sums(tile, sums);
    }
}

#[target_feature(enable = "avx2,fma")]
unsafe fn micro_f32<const R: usize, const V: usize>(tile: &Tile) {
    // SAFETY: as in `micro_bf16`, with KR = 8 groups of one term.
    unsafe {
        let mut sums = load_sums::<R, V>(tile);
        let (mut a, mut b, mut prefetch) = (tile.a, tile.b, tile.prefetch);
        for _ in 0..tile.k / KR {
            prefetch = prefetch_groups::<V, _MM_HINT_T1>(prefetch, tile.prefetch_groups);
            for k in 0..KR {
                let w = b.add(k * GROUP_BYTES).cast::<f32>();
                let w = std::array::from_fn(|v| _mm256_load_ps(w.add(v * 8)));
                accumulate(&mut sums, w, a.add(k * 4), tile.a_stride);
            }
            a = a.add(KR * 4);
            b = b.add(KR * GROUP_BYTES);
        }
        store_sums(tile, sums);
    }
}

/// What a tile does with weights that it has unpacked.
trait Use {
    /// Takes a term's numbers of V registers of columns to the sums of R rows of x, which are `stride` bytes apart.
    unsafe fn take<const R: usize, const V: usize>(
        sums: &mut [[__m256; V]; R],
        w: [__m256; V],
        a: *const u8,
        stride: usize,
    );
}

/// Multiplies them.
struct Multiplied;

/// Leaves them: for who asks what it takes to read and unpack weights alone.
struct Left;

impl Use for Multiplied {
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn take<const R: usize, const V: usize>(
        sums: &mut [[__m256; V]; R],
        w: [__m256; V],
        a: *const u8,
        stride: usize,
    ) {
        // SAFETY: the caller's.
        unsafe { accumulate(sums, w, a, stride) }
    }
}

impl Use for Left {
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn take<const R: usize, const V: usize>(
        sums: &mut [[__m256; V]; R],
        w: [__m256; V],
        _: *const u8,
        _: usize,
    ) {
        // The least that keeps the compiler from leaving them out.
        sums[0] = std::array::from_fn(|v| _mm256_or_ps(sums[0][v], w[v]));
    }
}

/// `sums[r] += w * a[r]` for one term; the rows of x are `stride` bytes apart.
///
/// # Safety
/// `a` is valid for R rows.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn accumulate<const R: usize, const V: usize>(
    sums: &mut [[__m256; V]; R],
    w: [__m256; V],
    a: *const u8,
    stride: usize,
) {
    for (r, sums) in sums.iter_mut().enumerate() {
        // SAFETY: the caller vouches for R rows.
        let x = unsafe { _mm256_broadcast_ss(&*a.add(r * stride).cast::<f32>()) };
        for v in 0..V {
            sums[v] = _mm256_fmadd_ps(w[v], x, sums[v]);
        }
    }
}

/// Prefetch the piece's `V / 2` lines of `groups` groups, and return where to go on.
#[inline]
#[target_feature(enable = "avx2")]
fn prefetch_groups<const V: usize, const HINT: i32>(mut at: *const u8, groups: usize) -> *const u8 {
    for _ in 0..groups {
        for line in 0..V / 2 {
            _mm_prefetch::<HINT>(at.wrapping_add(line * 64).cast());
        }
        at = at.wrapping_add(GROUP_BYTES);
    }
    at
}

#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load_sums<const R: usize, const V: usize>(tile: &Tile) -> [[__m256; V]; R] {
    if tile.init.is_null() {
        return [[_mm256_setzero_ps(); V]; R];
    }
    std::array::from_fn(|r| {
        // SAFETY: `init` holds R rows of `8 * V` numbers, NR apart.
        std::array::from_fn(|v| unsafe { _mm256_loadu_ps(tile.init.add(r * NR + v * 8)) })
    })
}

#[inline]
#[target_feature(enable = "avx2")]
unsafe fn store_sums<const R: usize, const V: usize>(tile: &Tile, sums: [[__m256; V]; R]) {
    for (r, sums) in sums.iter().enumerate() {
        for (v, &sum) in sums.iter().enumerate() {
            // SAFETY: the destination has R rows of at least `8 * V` columns.
            unsafe {
                let c = tile.c.add(r * tile.c_stride + v * 8);
                let sum = if tile.is_added { _mm256_add_ps(_mm256_loadu_ps(c), sum) } else { sum };
                _mm256_storeu_ps(c, sum);
            }
        }
    }
}

/// `gate = silu(gate) * up`, where `silu(g) = g / (1 + exp(-g))`.
///
/// # Safety
/// As [`super::tile::SwigluFn`].
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn swiglu(gate: *mut f32, up: *const f32, len: usize) {
    for i in (0..len).step_by(8) {
        // SAFETY: `len` is a multiple of 8, and the pointers are valid for as many numbers.
        unsafe {
            let g = _mm256_loadu_ps(gate.add(i));
            let e = exp_ps(_mm256_xor_ps(g, _mm256_set1_ps(-0.0)));
            let silu = _mm256_div_ps(g, _mm256_add_ps(_mm256_set1_ps(1.0), e));
            _mm256_storeu_ps(gate.add(i), _mm256_mul_ps(silu, _mm256_loadu_ps(up.add(i))));
        }
    }
}
