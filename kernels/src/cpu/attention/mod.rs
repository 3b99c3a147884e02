//! Causal attention over the paged cache, for prefill and decode alike.
//!
//! A task is a *tile*: a few consecutive positions of a sequence, with all query heads that read one KV
//! head, so that one pass over the head's keys and values serves its whole group. See [`tile`], and for AMX `amx`, for
//! what happens inside. Runs of tiles are claimed by the pool's threads, the longest first.

#[cfg(target_arch = "x86_64")]
mod amx;
mod own_pages;
mod parts;
mod product;
mod tile;

use std::cell::RefCell;

use crate::array::Array;
use crate::backend::{AttentionSlice, PAGE_TOKENS};
use crate::check;
#[cfg(target_arch = "x86_64")]
use crate::cpu::gemm::Registers;
use crate::cpu::gemm::{Operand, OperandWriter};
use crate::cpu::kv_cache::{self, AppendPosition, KeyLayout, KvCache, NewEntries};
use crate::cpu::lanes::{Kernel, Lanes, at_level};
use crate::cpu::pool::ThreadPool;
use crate::cpu::rope::Angles;
use crate::cpu::rows::SharedRows;
use crate::cpu::simd::Simd;
use crate::error::Result;

/// Query rows of a tile, at most, but for a group that is larger. Keys and values come from L2 once per tile
/// and page: a page of 64 keys takes 48 * 64 * 2 products per word of it, so that even a head's 32 KiB
/// from L3 would hide behind them. It is a multiple of every level's TILE_ROWS, and small enough that
/// a prompt of 100 tokens makes work for several threads.
const TILE_QUERIES: usize = 48;

/// The same of a tile of several heads where keys lie in rows: those of a block in AMX.
const SHARED_QUERIES: usize = 16;

/// Tasks to make for each thread, where heads can be shared out to that end: with two, a thread that has ended
/// its long one can still take a short one from another.
const TASKS_PER_THREAD: usize = 2;

/// Runs of neighbouring tiles that each thread is dealt, at least: one knows what its next tile is and can fetch its
/// entries, and what a thread may have to wait for another is an eighth.
const RUNS_PER_THREAD: usize = 8;

/// Consecutive positions of one slice, and some KV heads.
#[derive(Debug, Clone, Copy)]
struct Tile {
    slice: u32,
    /// Offset of its first row in the slice.
    first: u32,
    num_positions: u32,
    first_head: u32,
    num_heads: u32,
    /// Scores to compute, about: tiles are ordered by it.
    work: u64,
}

impl Tile {
    /// What it reads first.
    fn first_entries(&self, slices: &[AttentionSlice]) -> Entries {
        let slice = &slices[self.slice as usize];
        let num_seen = slice.first_position + (self.first + self.num_positions) as usize;
        Entries {
            page: slice.pages[0],
            first_head: self.first_head as usize,
            num_heads: self.num_heads as usize,
            num_keys: num_seen.min(PAGE_TOKENS),
        }
    }
}

/// Some neighbouring heads' entries of a page.
#[derive(Debug, Clone, Copy)]
#[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "for those that fetch ahead"))]
struct Entries {
    page: u32,
    first_head: usize,
    num_heads: usize,
    /// Positions of the page that are seen.
    num_keys: usize,
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
    let group = check_attention(q, cache, slices)?;
    out.reset(q.rows(), q.cols());
    let queries = Queries { q: SharedRows::read_only(q), group, angles: None, new: None };
    attend_slices(simd, pool, &queries, cache, slices, out);
    Ok(())
}

fn check_attention(q: &Array, cache: &KvCache, slices: &[AttentionSlice]) -> Result<usize> {
    const OP: &str = "attention";
    let group = check::heads(OP, "q's columns", q.cols(), cache.kv_heads(), cache.head_dim())?;
    check::slices(OP, slices, q.rows(), cache.num_pages())?;
    Ok(group)
}

/// Rows whose queries and keys are still to be turned, and whose keys and values are not in the cache yet.
pub(crate) struct NewRows<'a> {
    pub(crate) q: &'a mut Array,
    pub(crate) k: &'a mut Array,
    pub(crate) v: &'a Array,
    pub(crate) angles: Angles<'a>,
}

/// The same for rows that are new.
///
/// A row that decodes is all that its tile has: the tile writes its entries where it is about to read them, which would
/// otherwise come from memory twice. Prompts are written before, as their rows read each other's; and so is all where a tile would
/// read of a page that another one writes.
pub(crate) fn attend_new(
    simd: Simd,
    pool: &ThreadPool,
    NewRows { q, k, v, angles }: NewRows<'_>,
    cache: &mut KvCache,
    slices: &[AttentionSlice],
    out: &mut Operand,
) -> Result<()> {
    check::rope("rope", q, angles.table, angles.positions)?;
    check::rope("rope", k, angles.table, angles.positions)?;
    kv_cache::check_append(cache, k, v, slices)?;
    let group = check_attention(q, cache, slices)?;
    check::shape("rope", "a head of angles", [angles.table.head_dim], [cache.head_dim()])?;
    out.reset(q.rows(), q.cols());
    let new = NewEntries { k: SharedRows::of(k), v: SharedRows::read_only(v), angles: Some(angles) };
    let are_own = own_pages::are_own(slices, cache.num_pages());
    let is_before: fn(&AttentionSlice) -> bool = if are_own { |slice| slice.num_rows > 1 } else { |_| true };
    kv_cache::append_slices(simd, pool, cache, new, slices, is_before);
    let queries = Queries { q: SharedRows::of(q), group, angles: Some(angles), new: are_own.then_some(new) };
    attend_slices(simd, pool, &queries, cache, slices, out);
    Ok(())
}

/// What attends, and what is to be done to it before.
struct Queries<'a> {
    q: SharedRows,
    /// Query heads of a KV head.
    group: usize,
    /// What queries are still to be turned by, in place.
    angles: Option<Angles<'a>>,
    /// Where entries of slices of one row are still to be written.
    new: Option<NewEntries<'a>>,
}

fn attend_slices(
    simd: Simd,
    pool: &ThreadPool,
    queries: &Queries<'_>,
    cache: &KvCache,
    slices: &[AttentionSlice],
    out: &mut Operand,
) {
    let &Queries { q, group, angles, new } = queries;
    TILES.with_borrow_mut(|tiles| {
        let most_shared = match cache.layout() {
            KeyLayout::Columns => TILE_QUERIES,
            KeyLayout::Rows => SHARED_QUERIES,
        };
        let shape = Shape { group, kv_heads: cache.kv_heads(), threads: pool.num_threads(), most_shared };
        plan(slices, shape, tiles);
        let tiles = &*tiles;
        // Rows that decode are the work of one tile, which then has whole rows.
        let has_rows = tiles.iter().all(|tile| tile.num_heads as usize == cache.kv_heads());
        let writer = if has_rows { out.row_writer(simd) } else { out.writer(simd) };
        let run = (tiles.len() / (RUNS_PER_THREAD * pool.num_threads())).max(1);
        pool.for_each(tiles.len().div_ceil(run), |task| {
            let run = task * run..tiles.len().min((task + 1) * run);
            SCRATCH.with_borrow_mut(|scratch| {
                let _registers = registers(cache);
                for i in run.clone() {
                    let tile = &tiles[i];
                    let slice = &slices[tile.slice as usize];
                    if let Some(angles) = angles {
                        let cols = group * cache.head_dim();
                        // SAFETY: the device has its level, and the tile's queries are inside of q and its own.
                        unsafe { at_level(simd, TurnQueries { q, angles, slice, tile, cols }) };
                    }
                    attend(
                        simd,
                        Attend {
                            q,
                            cache,
                            slice,
                            first_row: slice.first_row + tile.first as usize,
                            first_position: slice.first_position + tile.first as usize,
                            num_positions: tile.num_positions as usize,
                            first_head: tile.first_head as usize,
                            num_heads: tile.num_heads as usize,
                            group,
                            new: new.as_ref().filter(|_| slice.num_rows == 1),
                            next: run.contains(&(i + 1)).then(|| tiles[i + 1].first_entries(slices)),
                            writer,
                            scratch,
                        },
                    );
                    if has_rows {
                        let first = slice.first_row + tile.first as usize;
                        // SAFETY: the tile is this thread's, and has written its rows.
                        (first..first + tile.num_positions as usize)
                            .for_each(|row| unsafe { writer.finish_row(row) });
                    }
                }
            });
        });
    });
}

/// The calling thread's registers, ready for tiles over a cache.
#[cfg(target_arch = "x86_64")]
fn registers(cache: &KvCache) -> Option<Registers> {
    // SAFETY: only a device of the level `amx` takes a cache with its keys in rows.
    (cache.layout() == KeyLayout::Rows).then(|| unsafe { Registers::shape(amx::BLOCK) })
}

#[cfg(not(target_arch = "x86_64"))]
fn registers(_: &KvCache) {}

/// One tile, by the way that the cache is laid out for.
fn attend(simd: Simd, job: Attend<'_>) {
    match job.cache.layout() {
        KeyLayout::Columns => {
            job.append(simd);
            // SAFETY: the device has its level, and the slices were checked.
            unsafe { at_level(simd, job) };
        }
        // SAFETY: only a device of the level `amx` takes a cache with its keys in rows, and they are of bf16; the slices
        // were checked by `attention`.
        #[cfg(target_arch = "x86_64")]
        KeyLayout::Rows => unsafe { amx::attend(job) },
        #[cfg(not(target_arch = "x86_64"))]
        KeyLayout::Rows => unreachable!("keys lie in rows for x86-64 alone"),
    }
}

/// What tiles are cut by, beside the slices.
#[derive(Debug, Clone, Copy)]
struct Shape {
    group: usize,
    kv_heads: usize,
    threads: usize,
    /// Query rows of a tile of several heads, at most.
    most_shared: usize,
}

/// Cuts the slices into tiles, the longest first.
fn plan(slices: &[AttentionSlice], shape: Shape, tiles: &mut Vec<Tile>) {
    let Shape { group, kv_heads, threads, most_shared } = shape;
    let max_positions = (TILE_QUERIES / group).max(1);
    let num_spans: usize = slices.iter().map(|slice| slice.num_rows.div_ceil(max_positions)).sum();
    // Several heads of a page lie side by side and are read as one stream: a task takes as many of them as still
    // leave work for every thread.
    let shared_heads = (num_spans * kv_heads).div_ceil(TASKS_PER_THREAD * threads);
    tiles.clear();
    for (index, slice) in slices.iter().enumerate() {
        for first in (0..slice.num_rows).step_by(max_positions) {
            let num_positions = max_positions.min(slice.num_rows - first);
            let fitting_heads = most_shared / (num_positions * group);
            let num_heads = fitting_heads.min(shared_heads).clamp(1, kv_heads);
            for first_head in (0..kv_heads).step_by(num_heads) {
                let num_heads = num_heads.min(kv_heads - first_head);
                let num_keys = slice.first_position + first + num_positions;
                tiles.push(Tile {
                    slice: index as u32,
                    first: first as u32,
                    num_positions: num_positions as u32,
                    first_head: first_head as u32,
                    num_heads: num_heads as u32,
                    work: (num_heads * num_positions * num_keys) as u64,
                });
            }
        }
    }
    tiles.sort_unstable_by_key(|tile| std::cmp::Reverse(tile.work));
}

/// Turns a tile's queries in place: no other tile has these heads of these rows.
struct TurnQueries<'a> {
    q: SharedRows,
    angles: Angles<'a>,
    slice: &'a AttentionSlice,
    tile: &'a Tile,
    /// Columns of a KV head's queries.
    cols: usize,
}

impl Kernel for TurnQueries<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let TurnQueries { q, angles, slice, tile, cols } = self;
        let first_row = slice.first_row + tile.first as usize;
        let (first_col, num_cols) = (tile.first_head as usize * cols, tile.num_heads as usize * cols);
        for row in first_row..first_row + tile.num_positions as usize {
            // SAFETY: the features are the caller's; tiles lie inside of q and have their queries to themselves.
            unsafe { angles.turn::<L>(row, q.part_mut(row, first_col, num_cols)) }
        }
    }
}

/// One tile.
struct Attend<'a> {
    q: SharedRows,
    cache: &'a KvCache,
    slice: &'a AttentionSlice,
    /// Its first row in the batch.
    first_row: usize,
    first_position: usize,
    num_positions: usize,
    first_head: usize,
    num_heads: usize,
    group: usize,
    /// The entries of its only position, where they are still to be written.
    new: Option<&'a NewEntries<'a>>,
    /// What the thread reads after it, if that is known.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "for those that fetch ahead"))]
    next: Option<Entries>,
    writer: OperandWriter<'a>,
    scratch: &'a mut Array,
}

impl Attend<'_> {
    /// Writes the entries that are still to be written: to be called before the last page is read.
    #[inline]
    fn append(&self, simd: Simd) {
        if let Some(&new) = self.new {
            let heads = self.first_head..self.first_head + self.num_heads;
            let (row, position) = (self.first_row, self.first_position);
            let append = AppendPosition { cache: self.cache, new, slice: self.slice, row, position, heads };
            // SAFETY: the device has its level, the slices were checked, and no other tile has these heads of the page, which
            // is in no other slice.
            unsafe { at_level(simd, append) };
        }
    }

    /// The query of a row and of a head's first column.
    ///
    /// # Safety
    /// The place is one of [`Attend::place`].
    #[inline(always)]
    unsafe fn query(&self, (row, first): (usize, usize)) -> &[f32] {
        // SAFETY: the place is inside of q, and no other tile's.
        unsafe { self.q.part(row, first, self.cache.head_dim()) }
    }

    /// Row of the batch and first column of the tile's query row `row`: head by head, position by position.
    #[inline(always)]
    fn place(&self, row: usize) -> (usize, usize) {
        let (row, member) = (row / self.group, row % self.group);
        let (head, position) = (row / self.num_positions, row % self.num_positions);
        let query_head = (self.first_head + head) * self.group + member;
        (self.first_row + position, query_head * self.cache.head_dim())
    }
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
        for (group, kv_heads, threads) in [(1, 1, 1), (3, 3, 2), (16, 2, 64), (64, 5, 1), (1, 32, 2)] {
            let shape = Shape { group, kv_heads, threads, most_shared: TILE_QUERIES };
            plan(&slices, shape, &mut tiles);
            let mut seen = vec![0; 102 * kv_heads];
            for tile in &tiles {
                let (num_positions, num_heads) = (tile.num_positions as usize, tile.num_heads as usize);
                assert!(num_positions * group * num_heads <= TILE_QUERIES.max(group), "{tile:?}");
                let first = slices[tile.slice as usize].first_row + tile.first as usize;
                for row in first..first + num_positions {
                    (0..num_heads)
                        .for_each(|head| seen[row * kv_heads + tile.first_head as usize + head] += 1);
                }
            }
            assert_eq!(seen, vec![1; 102 * kv_heads], "group {group} of {kv_heads}");
            assert!(tiles.is_sorted_by(|a, b| a.work >= b.work));
        }
    }
}
