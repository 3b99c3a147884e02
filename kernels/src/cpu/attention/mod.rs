//! Causal attention over the paged cache, for prefill and decode alike.
//!
//! A task is a *tile*: a few consecutive positions of a sequence, with all query heads that read one KV
//! head, so that one pass over the head's keys and values serves its whole group. See [`tile`] for what
//! happens inside. Tiles are claimed by the pool's threads, the longest first.

mod tile;

use std::cell::RefCell;

use crate::array::Array;
use crate::backend::AttentionSlice;
use crate::check;
use crate::cpu::gemm::{Operand, OperandWriter};
use crate::cpu::kv_cache::KvCache;
use crate::cpu::lanes::{Kernel, Lanes, at_level};
use crate::cpu::pool::ThreadPool;
use crate::cpu::simd::Simd;
use crate::error::Result;

/// Query rows of a tile, at most, but for a group that is larger. Keys and values come from L2 once per tile
/// and page: a page of 64 keys takes 48 * 64 * 2 products per word of it, so that even a head's 32 KiB
/// from L3 would hide behind them. It is a multiple of every level's TILE_ROWS, and small enough that
/// a prompt of 100 tokens makes work for several threads.
const TILE_QUERIES: usize = 48;

/// Consecutive positions of one slice.
#[derive(Debug, Clone, Copy)]
struct Tile {
    slice: u32,
    /// Offset of its first row in the slice.
    first: u32,
    num_positions: u32,
    /// Keys that its last row sees, by which tiles are ordered.
    num_keys: u32,
}

thread_local! {
    /// The caller's list of tiles, kept for the next call.
    static TILES: RefCell<Vec<Tile>> = const { RefCell::new(Vec::new()) };
    /// What a tile is worked out in, kept by each thread for the next one.
    static SCRATCH: RefCell<Array> = RefCell::new(Array::new());
}

/// Attention of `q: [T, heads * head_dim]` over the cache, into `out` of the same shape.
pub(crate) fn attention(
    simd: Simd,
    pool: &ThreadPool,
    q: &Array,
    cache: &KvCache,
    slices: &[AttentionSlice],
    out: &mut Operand,
) -> Result<()> {
    const OP: &str = "attention";
    let group = check::heads(OP, "q's columns", q.cols(), cache.kv_heads(), cache.head_dim())?;
    check::slices(OP, slices, q.rows(), cache.num_pages())?;
    out.reset(q.rows(), q.cols());
    let writer = out.writer();
    TILES.with_borrow_mut(|tiles| {
        plan(slices, group, tiles);
        let tiles = &*tiles;
        let kv_heads = cache.kv_heads();
        pool.for_each(tiles.len() * kv_heads, |task| {
            let tile = tiles[task / kv_heads];
            SCRATCH.with_borrow_mut(|scratch| {
                let slice = &slices[tile.slice as usize];
                let kv_head = task % kv_heads;
                at_level(simd, Attend { q, cache, slice, tile, kv_head, group, writer, scratch });
            });
        });
    });
    Ok(())
}

/// Cuts the slices into tiles, the longest first.
fn plan(slices: &[AttentionSlice], group: usize, tiles: &mut Vec<Tile>) {
    let max_positions = (TILE_QUERIES / group).max(1);
    tiles.clear();
    for (index, slice) in slices.iter().enumerate() {
        for first in (0..slice.num_rows).step_by(max_positions) {
            let num_positions = max_positions.min(slice.num_rows - first);
            tiles.push(Tile {
                slice: index as u32,
                first: first as u32,
                num_positions: num_positions as u32,
                num_keys: (slice.first_position + first + num_positions) as u32,
            });
        }
    }
    tiles.sort_unstable_by_key(|tile| std::cmp::Reverse(tile.num_positions as u64 * tile.num_keys as u64));
}

/// One tile of one KV head.
struct Attend<'a> {
    q: &'a Array,
    cache: &'a KvCache,
    slice: &'a AttentionSlice,
    tile: Tile,
    kv_head: usize,
    group: usize,
    writer: OperandWriter<'a>,
    scratch: &'a mut Array,
}

impl Kernel for Attend<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        // SAFETY: the caller's; the slices were checked by `attention`.
        unsafe { tile::attend::<L>(self) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_every_row_once_and_start_with_the_longest() {
        let slice = |first_row, num_rows, first_position| AttentionSlice {
            first_row,
            num_rows,
            first_position,
            pages: vec![0; 20],
        };
        let slices = [slice(0, 1, 700), slice(1, 100, 30), slice(101, 0, 5), slice(101, 1, 3)];
        let mut tiles = Vec::new();
        for group in [1, 3, 16, 64] {
            plan(&slices, group, &mut tiles);
            let mut seen = vec![0; 102];
            for tile in &tiles {
                assert!(tile.num_positions as usize * group <= TILE_QUERIES.max(group));
                let first = slices[tile.slice as usize].first_row + tile.first as usize;
                (0..tile.num_positions as usize).for_each(|i| seen[first + i] += 1);
            }
            assert_eq!(seen, vec![1; 102], "group {group}");
            let work: Vec<u32> = tiles.iter().map(|tile| tile.num_positions * tile.num_keys).collect();
            assert!(work.is_sorted_by(|a, b| a >= b), "{work:?}");
        }
    }
}
