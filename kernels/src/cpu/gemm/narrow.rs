//! Tiles for levels with narrower registers: the same tile, walked in narrow pieces and in chunks of K.
//!
//! These levels have no bf16 product. x is in f32, see `operand`, and weights are widened in the kernel, by a shift and
//! a mask.

use super::quantized;
use super::tile::{GROUP_BYTES, KR, NR, Sums, Tile, TileFn};
use std::mem::MaybeUninit;

/// Terms of a chunk: MR rows of x take 6 · 256 · 4 = 6 KiB, and 16 columns of weights 8 KiB in bf16
/// and 16 KiB in f32; both stay in an L1 cache of 32 KiB.
const CHUNK: usize = 256;

/// Compute a tile by calls of `micro` with at most `width` columns and [`CHUNK`] terms.
///
/// # Safety
/// As [`super::tile::TileFn`], and `micro` reads x in f32 and panels of which a word holds `terms_per_word` terms.
pub(super) unsafe fn in_pieces(tile: &Tile, terms_per_word: usize, width: usize, micro: TileFn) {
    let mut sums = MaybeUninit::<Sums>::uninit();
    let sums = sums.as_mut_ptr().cast::<f32>();
    let width = width.min(tile.cols);
    for first in (0..tile.k.max(1)).step_by(CHUNK) {
        let k = CHUNK.min(tile.k - first);
        let is_last = first + k == tile.k;
        let group = first / terms_per_word * GROUP_BYTES;
        // All of a chunk's, by each piece its own lines.
        let prefetch = tile.prefetch.wrapping_add(first / KR * tile.prefetch_groups * GROUP_BYTES);
        for col in (0..tile.cols).step_by(width) {
            let init = if first > 0 { sums.cast_const() } else { tile.init };
            // SAFETY: the chunk lies inside the tile, whose pointers the caller vouches for. `sums` has room for
            // `[rows, NR]`, which the chunk before has filled for this piece.
            unsafe {
                let (c, c_stride) = if is_last { (tile.c, tile.c_stride) } else { (sums, NR) };
                micro(&Tile {
                    a: tile.a.add(first * size_of::<f32>()),
                    b: tile.b.add(group + col * 4),
                    k,
                    cols: width,
                    init: if init.is_null() { init } else { init.add(col) },
                    scales: match tile.scales.is_null() {
                        true => tile.scales,
                        false => tile.scales.add(first / quantized::GROUP * NR + col),
                    },
                    c: c.add(col),
                    c_stride,
                    is_added: tile.is_added && is_last,
                    prefetch: prefetch.wrapping_add(col * 4),
                    ..*tile
                });
            }
        }
    }
}
