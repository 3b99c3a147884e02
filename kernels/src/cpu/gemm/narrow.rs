//! Tiles for levels with narrower registers: the same tile, walked in narrow pieces and in chunks of K.
//!
//! These levels have no bf16 product. Weights are widened to f32 in the kernel, by a shift and a mask; x is
//! widened here, once per tile and chunk, into a small buffer from which it is broadcast.

use super::round::bf16_to_f32;
use super::tile::{GROUP_BYTES, KR, MR, NR, Sums, Tile, TileFn};
use crate::backend::Dtype;
use std::mem::MaybeUninit;

/// Terms of a chunk: MR rows of widened x take 6 · 256 · 4 = 6 KiB, and 16 columns of weights 8 KiB in bf16
/// and 16 KiB in f32; both stay in an L1 cache of 32 KiB.
const CHUNK: usize = 256;

/// Compute a tile by calls of `micro` with at most `width` columns and [`CHUNK`] terms, and x in f32.
///
/// # Safety
/// As [`super::tile::TileFn`], and `micro` reads panels of `dtype` and x in f32.
pub(super) unsafe fn in_pieces(tile: &Tile, dtype: Dtype, width: usize, micro: TileFn) {
    let mut wide = MaybeUninit::<[f32; MR * CHUNK]>::uninit();
    let mut sums = MaybeUninit::<Sums>::uninit();
    let (wide, sums) = (wide.as_mut_ptr().cast::<f32>(), sums.as_mut_ptr().cast::<f32>());
    let width = width.min(tile.cols);
    let terms_per_group = if dtype == Dtype::Bf16 { 2 } else { 1 };
    for first in (0..tile.k.max(1)).step_by(CHUNK) {
        let k = CHUNK.min(tile.k - first);
        let is_last = first + k == tile.k;
        // SAFETY: the chunk lies inside the tile, whose pointers the caller vouches for. `wide` has room for
        // `[rows, CHUNK]`, and `sums` for `[rows, NR]`, which the chunk before has filled for this piece.
        unsafe {
            let (a, a_stride) = match dtype {
                Dtype::F32 => (tile.a.add(first * 4), tile.a_stride),
                Dtype::Bf16 => {
                    widen(tile.a.add(first * 2), tile.a_stride, tile.rows, k, wide);
                    (wide.cast_const().cast(), CHUNK * 4)
                }
            };
            let group = first / terms_per_group * GROUP_BYTES;
            let prefetch = tile.prefetch.wrapping_add(first / KR * tile.prefetch_groups * GROUP_BYTES);
            for col in (0..tile.cols).step_by(width) {
                let init = if first > 0 { sums.cast_const() } else { tile.init };
                let (c, c_stride) = if is_last { (tile.c, tile.c_stride) } else { (sums, NR) };
                micro(&Tile {
                    register_rows: tile.register_rows,
                    a,
                    a_stride,
                    b: tile.b.add(group + col * 4),
                    k,
                    rows: tile.rows,
                    cols: width,
                    bias: tile.bias,
                    integers: tile.integers,
                    scales: tile.scales,
                    row_scales: tile.row_scales,
                    init: if init.is_null() { init } else { init.add(col) },
                    c: c.add(col),
                    c_stride,
                    is_added: tile.is_added && is_last,
                    prefetch: prefetch.wrapping_add(col * 4),
                    prefetch_groups: tile.prefetch_groups,
                });
            }
        }
    }
}

/// bf16 rows of x, `a_stride` bytes apart, to f32 rows CHUNK apart.
///
/// # Safety
/// `a` is valid for `[rows, k]` and aligned to 2 bytes, `wide` valid for `[rows, CHUNK]`.
unsafe fn widen(a: *const u8, a_stride: usize, rows: usize, k: usize, wide: *mut f32) {
    for row in 0..rows {
        // SAFETY: the caller vouches for both ranges; `wide` is written before it is read.
        unsafe {
            let values = std::slice::from_raw_parts(a.add(row * a_stride).cast::<u16>(), k);
            for (i, &bits) in values.iter().enumerate() {
                wide.add(row * CHUNK + i).write(bf16_to_f32(bits));
            }
        }
    }
}
