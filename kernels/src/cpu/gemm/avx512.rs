//! The tile in AVX-512, with `VDPBF16PS` for bf16 and `VPDPBUSD` for integers.
//!
//! `VDPBF16PS` adds the product of the odd k of a pair and then that of the even one, each time rounded to nearest
//! even; a processor that adds both at once is told apart by [`Simd::numerics`]. It takes denormal inputs for zeros and
//! flushes denormal sums to zero, whatever the control register says. That is the level's numeric profile, and no
//! other level has to match it.
//!
//! [`Simd::numerics`]: crate::cpu::simd::Simd::numerics

use super::tile::{GROUP_BYTES, KR, NR, Tile};
use crate::cpu::exp::avx512::exp_ps;
use std::arch::x86_64::*;

/// Calls `$micro::<rows, registers of columns>` for a tile's shape.
macro_rules! dispatch {
    ($tile:expr, $micro:ident) => {
        match ($tile.rows, $tile.cols) {
            (1, 64) => $micro::<1, 4>($tile),
            (2, 64) => $micro::<2, 4>($tile),
            (3, 64) => $micro::<3, 4>($tile),
            (4, 64) => $micro::<4, 4>($tile),
            (5, 64) => $micro::<5, 4>($tile),
            (6, 64) => $micro::<6, 4>($tile),
            (1, 32) => $micro::<1, 2>($tile),
            (2, 32) => $micro::<2, 2>($tile),
            (3, 32) => $micro::<3, 2>($tile),
            (4, 32) => $micro::<4, 2>($tile),
            (5, 32) => $micro::<5, 2>($tile),
            (6, 32) => $micro::<6, 2>($tile),
            (1, 16) => $micro::<1, 1>($tile),
            (2, 16) => $micro::<2, 1>($tile),
            (3, 16) => $micro::<3, 1>($tile),
            (4, 16) => $micro::<4, 1>($tile),
            (5, 16) => $micro::<5, 1>($tile),
            (6, 16) => $micro::<6, 1>($tile),
            (rows, cols) => unreachable!("a tile of {rows} x {cols}"),
        }
    };
}

/// A bf16 tile.
///
/// # Safety
/// As [`super::tile::TileFn`].
pub(super) unsafe fn tile_bf16(tile: &Tile) {
    // SAFETY: the caller vouches for the pointers and the features.
    unsafe { dispatch!(tile, micro_bf16) }
}

/// An f32 tile.
///
/// # Safety
/// As [`super::tile::TileFn`].
pub(super) unsafe fn tile_f32(tile: &Tile) {
    // SAFETY: the caller vouches for the pointers and the features.
    unsafe { dispatch!(tile, micro_f32) }
}

/// A tile in integers of 8 bits.
///
/// # Safety
/// As [`super::tile::TileFn`], and the processor has `VPDPBUSD`.
pub(super) unsafe fn tile_int8(tile: &Tile) {
    // SAFETY: the caller vouches for the pointers and the features.
    unsafe { dispatch!(tile, micro_int8) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn micro_bf16<const R: usize, const V: usize>(tile: &Tile) {
    // SAFETY: the tile's pointers are valid for `rows = R` rows, `16 * V` columns and `k` terms, of which
    // there are a multiple of KR = 8: four groups of two.
    unsafe {
        let mut sums = load_sums::<R, V>(tile);
        let (mut a, mut b, mut prefetch) = (tile.a, tile.b, tile.prefetch);
        for _ in 0..tile.k / KR {
            prefetch = prefetch_groups::<V>(prefetch, tile.prefetch_groups);
            for pair in 0..KR / 2 {
                let w: [__m512bh; V] = std::array::from_fn(|v| {
                    std::mem::transmute(_mm512_load_si512(b.add(pair * GROUP_BYTES + v * 64).cast()))
                });
                for (r, sums) in sums.iter_mut().enumerate() {
                    let x = *a.add(r * tile.a_stride + pair * 4).cast::<i32>();
                    let x: __m512bh = std::mem::transmute(_mm512_set1_epi32(x));
                    for v in 0..V {
                        sums[v] = _mm512_dpbf16_ps(sums[v], w[v], x);
                    }
                }
            }
            a = a.add(KR * 2);
            b = b.add(KR / 2 * GROUP_BYTES);
        }
        store_sums(tile, sums);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn micro_f32<const R: usize, const V: usize>(tile: &Tile) {
    // SAFETY: as in `micro_bf16`, with KR = 8 groups of one term.
    unsafe {
        let mut sums = load_sums::<R, V>(tile);
        let (mut a, mut b, mut prefetch) = (tile.a, tile.b, tile.prefetch);
        for _ in 0..tile.k / KR {
            prefetch = prefetch_groups::<V>(prefetch, tile.prefetch_groups);
            for k in 0..KR {
                let w: [__m512; V] =
                    std::array::from_fn(|v| _mm512_load_ps(b.add(k * GROUP_BYTES + v * 64).cast()));
                for (r, sums) in sums.iter_mut().enumerate() {
                    let x = _mm512_set1_ps(*a.add(r * tile.a_stride + k * 4).cast::<f32>());
                    for v in 0..V {
                        sums[v] = _mm512_fmadd_ps(w[v], x, sums[v]);
                    }
                }
            }
            a = a.add(KR * 4);
            b = b.add(KR * GROUP_BYTES);
        }
        store_sums(tile, sums);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn micro_int8<const R: usize, const V: usize>(tile: &Tile) {
    // SAFETY: as in `micro_bf16`, with KR = 8 terms in two groups of four; bias and scales are valid for `16 * V`
    // columns, the rows' scales for R.
    unsafe {
        let bias: [__m512i; V] = std::array::from_fn(|v| _mm512_loadu_si512(tile.bias.add(v * 16).cast()));
        let mut sums = [bias; R];
        let (mut a, mut b, mut prefetch) = (tile.a, tile.b, tile.prefetch);
        for _ in 0..tile.k / KR {
            prefetch = prefetch_groups::<V>(prefetch, tile.prefetch_groups);
            for quad in 0..KR / 4 {
                let w: [__m512i; V] =
                    std::array::from_fn(|v| _mm512_load_si512(b.add(quad * GROUP_BYTES + v * 64).cast()));
                for (r, sums) in sums.iter_mut().enumerate() {
                    let x = _mm512_set1_epi32(*a.add(r * tile.a_stride + quad * 4).cast::<i32>());
                    for v in 0..V {
                        sums[v] = _mm512_dpbusd_epi32(sums[v], x, w[v]);
                    }
                }
            }
            a = a.add(KR);
            b = b.add(KR / 4 * GROUP_BYTES);
        }
        for (r, sums) in sums.into_iter().enumerate() {
            let row_scale = _mm512_set1_ps(*tile.row_scales.add(r));
            for (v, sum) in sums.into_iter().enumerate() {
                let scales = _mm512_mul_ps(row_scale, _mm512_loadu_ps(tile.scales.add(v * 16)));
                let mut sum = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scales);
                if !tile.init.is_null() {
                    sum = _mm512_add_ps(_mm512_loadu_ps(tile.init.add(r * NR + v * 16)), sum);
                }
                _mm512_storeu_ps(tile.c.add(r * tile.c_stride + v * 16), sum);
            }
        }
    }
}

/// Prefetch the piece's `V` lines of `groups` groups into L2, and return where to go on.
#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch_groups<const V: usize>(mut at: *const u8, groups: usize) -> *const u8 {
    for _ in 0..groups {
        for v in 0..V {
            _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(v * 64).cast());
        }
        at = at.wrapping_add(GROUP_BYTES);
    }
    at
}

#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load_sums<const R: usize, const V: usize>(tile: &Tile) -> [[__m512; V]; R] {
    if tile.init.is_null() {
        return [[_mm512_setzero_ps(); V]; R];
    }
    std::array::from_fn(|r| {
        // SAFETY: `init` holds `[R, NR]` numbers.
        std::array::from_fn(|v| unsafe { _mm512_loadu_ps(tile.init.add(r * NR + v * 16)) })
    })
}

#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store_sums<const R: usize, const V: usize>(tile: &Tile, sums: [[__m512; V]; R]) {
    for (r, sums) in sums.iter().enumerate() {
        for (v, &sum) in sums.iter().enumerate() {
            // SAFETY: the destination has R rows of at least `16 * V` columns.
            unsafe {
                let c = tile.c.add(r * tile.c_stride + v * 16);
                let sum = if tile.is_added { _mm512_add_ps(_mm512_loadu_ps(c), sum) } else { sum };
                _mm512_storeu_ps(c, sum);
            }
        }
    }
}

/// `gate = silu(gate) * up`, where `silu(g) = g / (1 + exp(-g))`.
///
/// # Safety
/// As [`super::tile::SwigluFn`].
#[target_feature(enable = "avx512f,avx512dq")]
pub(super) unsafe fn swiglu(gate: *mut f32, up: *const f32, len: usize) {
    for i in (0..len).step_by(16) {
        // SAFETY: `len` is a multiple of 16, and the pointers are valid for as many numbers.
        unsafe {
            let g = _mm512_loadu_ps(gate.add(i));
            let e = exp_ps(_mm512_xor_ps(g, _mm512_set1_ps(-0.0)));
            let silu = _mm512_div_ps(g, _mm512_add_ps(_mm512_set1_ps(1.0), e));
            _mm512_storeu_ps(gate.add(i), _mm512_mul_ps(silu, _mm512_loadu_ps(up.add(i))));
        }
    }
}
