//! The tile in plain Rust, in loops that the compiler vectorises.
//!
//! A product is rounded before it is added: fused multiply-add would be a function call on processors that
//! lack it. For bf16 this makes no difference, as the product of two bf16 is an f32 exactly (but below the
//! normal range).

use super::narrow::in_pieces;
use super::quantized::OFFSET;
use super::round::bf16_to_f32;
use super::tile::{GROUP_BYTES, NR, PIECE_COLS, Tile};
use crate::cpu::exp::exp_f32;

/// Rows computed together: 2 · 16 sums are 8 of the 16 registers that every x86-64 has.
const ROWS: usize = 2;

/// A bf16 tile.
///
/// # Safety
/// As [`super::tile::TileFn`].
pub(super) unsafe fn tile_bf16(tile: &Tile) {
    // SAFETY: the caller vouches for the tile, and the piece reads bf16 panels.
    unsafe { in_pieces(tile, 2, PIECE_COLS, piece::<true>) }
}

/// An f32 tile.
///
/// # Safety
/// As [`super::tile::TileFn`].
pub(super) unsafe fn tile_f32(tile: &Tile) {
    // SAFETY: the caller vouches for the tile, and the piece reads f32 panels.
    unsafe { in_pieces(tile, 1, PIECE_COLS, piece::<false>) }
}

/// A tile in integers of 8 bits. x has its sign back, so that sums start from zero instead of the bias.
///
/// # Safety
/// As [`super::tile::TileFn`].
pub(super) unsafe fn tile_int8(tile: &Tile) {
    for (row, col) in (0..tile.rows).flat_map(|row| (0..tile.cols).step_by(PIECE_COLS).map(move |c| (row, c)))
    {
        let mut sums = [0i32; PIECE_COLS];
        // SAFETY: the tile's pointers are valid for the row, 16 columns from `col` on and `k` terms; a group
        // holds four.
        unsafe {
            for quad in 0..tile.k / 4 {
                let x = tile.a.add(row * tile.a_stride + quad * 4).cast::<[u8; 4]>().read();
                let x = x.map(|byte| i32::from(byte) - i32::from(OFFSET));
                let words = tile.b.add(quad * GROUP_BYTES + col * 4).cast::<[[i8; 4]; PIECE_COLS]>().read();
                for (sum, w) in sums.iter_mut().zip(words) {
                    *sum += (0..4).map(|i| x[i] * i32::from(w[i])).sum::<i32>();
                }
            }
            let row_scale = *tile.row_scales.add(row);
            for (j, &sum) in sums.iter().enumerate() {
                let mut sum = sum as f32 * (row_scale * *tile.scales.add(col + j));
                if !tile.init.is_null() {
                    sum += *tile.init.add(row * NR + col + j);
                }
                *tile.c.add(row * tile.c_stride + col + j) = sum;
            }
        }
    }
}

/// A piece of 16 columns.
///
/// # Safety
/// As [`super::tile::TileFn`]; x is f32.
unsafe fn piece<const IS_BF16: bool>(tile: &Tile) {
    for row in (0..tile.rows).step_by(ROWS) {
        // SAFETY: the rows lie inside the tile.
        unsafe {
            match tile.rows - row {
                1 => rows::<1, IS_BF16>(tile, row),
                _ => rows::<ROWS, IS_BF16>(tile, row),
            }
        }
    }
}

/// Rows `row .. row + R` of a piece.
///
/// # Safety
/// As [`piece`], and the rows lie inside the tile.
unsafe fn rows<const R: usize, const IS_BF16: bool>(tile: &Tile, row: usize) {
    let mut sums = [[0.0f32; PIECE_COLS]; R];
    // SAFETY: the tile's pointers are valid for R rows from `row` on, 16 columns and `k` terms; a group
    // holds two terms in bf16, and `k` is a multiple of KR = 8.
    unsafe {
        if !tile.init.is_null() {
            for (r, sums) in sums.iter_mut().enumerate() {
                *sums = tile.init.add((row + r) * NR).cast::<[f32; PIECE_COLS]>().read();
            }
        }
        let x = |r: usize, k: usize| *tile.a.add((row + r) * tile.a_stride).cast::<f32>().add(k);
        let terms = if IS_BF16 { 2 } else { 1 };
        for group in 0..tile.k / terms {
            let words = tile.b.add(group * GROUP_BYTES).cast::<[u32; PIECE_COLS]>().read();
            if IS_BF16 {
                let even = words.map(|word| bf16_to_f32(word as u16));
                let odd = words.map(|word| f32::from_bits(word & 0xffff_0000));
                for (r, sums) in sums.iter_mut().enumerate() {
                    accumulate(sums, &even, x(r, 2 * group));
                    accumulate(sums, &odd, x(r, 2 * group + 1));
                }
            } else {
                let w = words.map(f32::from_bits);
                for (r, sums) in sums.iter_mut().enumerate() {
                    accumulate(sums, &w, x(r, group));
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            let c = tile.c.add((row + r) * tile.c_stride);
            for (j, &sum) in sums.iter().enumerate() {
                let c = c.add(j);
                *c = if tile.is_added { *c + sum } else { sum };
            }
        }
    }
}

#[inline(always)]
fn accumulate(sums: &mut [f32; PIECE_COLS], w: &[f32; PIECE_COLS], x: f32) {
    for (sum, w) in sums.iter_mut().zip(w) {
        *sum += w * x;
    }
}

/// `gate = silu(gate) * up`, where `silu(g) = g / (1 + exp(-g))`.
///
/// # Safety
/// As [`super::tile::SwigluFn`].
pub(super) unsafe fn swiglu(gate: *mut f32, up: *const f32, len: usize) {
    // SAFETY: the caller vouches for `len` numbers, and the two are different scratch tiles.
    let (gate, up) =
        unsafe { (std::slice::from_raw_parts_mut(gate, len), std::slice::from_raw_parts(up, len)) };
    for (g, u) in gate.iter_mut().zip(up) {
        *g = *g / (1.0 + exp_f32(-*g)) * u;
    }
}
