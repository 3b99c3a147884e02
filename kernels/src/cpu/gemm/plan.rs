//! How a product is cut into units of work: decided here, carried out in `driver`.
//!
//! Rows are dealt out evenly to tiles, so that 64 rows make 9 tiles of 6 and 2 of 5, and no tile is so short
//! that its few sums leave the units idle. A unit is one tile (or a group of tiles, where K is long) times
//! one panel (or a piece of one, where panels are few). Units are numbered so that a thread with a run of
//! them sweeps its tiles over one panel, which stays in its L2 cache, and then goes on to the next panel:
//! weights come from memory once per block of rows.
//!
//! None of these choices changes a result.

#[cfg(test)]
mod tests;

use super::budget::Budget;
use super::operand::LINE_BYTES;
use super::pack::PanelLayout;
use super::quantized::{BLOCK, GROUP};
use super::tile::{Geometry, NR};
use crate::backend::WeightType;
use crate::cpu::caches::CoreCaches;
use std::ops::Range;

/// Units for every thread that are left when a unit takes several pieces.
const MIN_AMX_UNITS_PER_THREAD: usize = 4;

/// Rows of a block of AMX.
const AMX_BLOCK_ROWS: usize = 32;

/// Tiles that go over all panels before the next ones, at least: 96 rows, even if x then comes from L3. With fewer rows, reading
/// the weights from memory takes the time of the products. 96 rows are 96 operations per byte in bf16; two Zen 5 cores do 22
/// in the time of a byte.
const MIN_BLOCK_TILES: usize = 16;

/// Tiles whose sums wait in scratch memory while K is walked in chunks: every chunk of weights is read from
/// L2 eight times for once from L3.
pub(super) const GROUP_TILES: usize = 8;

/// Units for every thread below which panels are cut to pieces: what one thread may have to wait for
/// another is then an eighth. Not for a single tile, which waits for memory: the processor would prefetch
/// the lines of the other piece along with its own (measured: half the bandwidth).
const MIN_UNITS_PER_THREAD: usize = 8;

/// Multiplications that are worth another thread: 2 µs of a core in AVX-512 with its products of bf16, and 13 in AVX2, several
/// times what a region takes of workers that are awake, which is below half of one. Rows count for at least 4, as fewer wait for
/// memory.
const MIN_PRODUCTS_PER_THREAD: usize = 1 << 18;

/// The shape of a product: `[rows, k] · [n, k]ᵀ`, by one matrix or two (gate and up).
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) rows: usize,
    pub(super) n: usize,
    /// With its padding.
    pub(super) k: usize,
    /// What the matrices are kept in.
    pub(super) kind: WeightType,
    pub(super) num_matrices: usize,
    /// Bytes of a number of the output.
    pub(super) output_bytes: usize,
}

/// Bytes of a number of x, which are those of a weight where a tile reads it.
pub(super) const fn tile_bytes(kind: WeightType) -> usize {
    match kind {
        WeightType::F32 => 4,
        WeightType::Bf16 | WeightType::Fp8 | WeightType::Int8Weight | WeightType::Int4Weight => 2,
        WeightType::Int8 => 1,
    }
}

/// How tiles come by their weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reading {
    /// They read panels.
    Panels,
    /// Narrow weights are unpacked to bf16 for a group of tiles.
    Unpacked,
    /// Chunks of weights of any type are widened to f32 for a group of tiles, if these are enough.
    Widened,
}

impl Reading {
    fn new(kind: WeightType, geometry: &Geometry, num_tiles: usize) -> Self {
        let is_narrow = matches!(kind, WeightType::Int8Weight | WeightType::Int4Weight);
        match geometry.widens {
            true if num_tiles > 1 => Self::Widened,
            false if is_narrow => Self::Unpacked,
            _ => Self::Panels,
        }
    }
}

/// Tiles of so many rows, and the rows of each but the last, where they are not dealt out evenly.
fn tiles(rows: usize, geometry: &Geometry) -> (usize, usize) {
    let num_tiles = rows.div_ceil(geometry.rows);
    if !geometry.is_amx {
        return (num_tiles, geometry.rows);
    }
    // As even as whole blocks of rows allow.
    let tile_rows = rows.div_ceil(num_tiles.max(1)).next_multiple_of(AMX_BLOCK_ROWS).max(1);
    (rows.div_ceil(tile_rows), tile_rows)
}

/// Bytes of a term of a strip, where a tile reads it.
fn term_bytes(shape: &Shape, geometry: &Geometry) -> usize {
    geometry.strip * tile_bytes(shape.kind)
}

/// Terms of a chunk of K, a multiple of the geometry's step.
fn chunk(shape: &Shape, geometry: &Geometry, budget: &Budget, reading: Reading) -> usize {
    let sweep_bytes = match geometry.is_amx && shape.rows <= AMX_BLOCK_ROWS {
        true => budget.lone_sweep_bytes,
        false => budget.sweep_bytes,
    };
    let num_sweeps = |k: usize| (k * term_bytes(shape, geometry)).div_ceil(sweep_bytes).max(1);
    let chunk = fixed_chunk(shape, geometry, budget, reading).unwrap_or_else(|| match shape.kind {
        // Parts of whole blocks; the last block may have fewer.
        WeightType::Int8 if shape.k > BLOCK => BLOCK / num_sweeps(BLOCK).next_power_of_two(),
        _ => shape.k.div_ceil(num_sweeps(shape.k)).next_multiple_of(geometry.step),
    });
    debug_assert!(
        shape.kind != WeightType::Int8 || shape.k <= BLOCK || BLOCK.is_multiple_of(chunk),
        "a chunk of {chunk} has parts of two blocks, whose scales differ"
    );
    chunk
}

/// Terms of a chunk where the number type fixes them; results of the other types do not depend on it.
fn fixed_chunk(shape: &Shape, geometry: &Geometry, budget: &Budget, reading: Reading) -> Option<usize> {
    match shape.kind {
        _ if reading == Reading::Widened => {
            // As even as whole groups of K allow.
            let num_chunks = shape.k.div_ceil(budget.widened_terms).max(1);
            Some(shape.k.div_ceil(num_chunks).next_multiple_of(GROUP))
        }
        WeightType::F32 | WeightType::Bf16 => None,
        // AMX takes sums of integers up again, as it does those of bf16.
        WeightType::Int8 if geometry.is_amx => None,
        WeightType::Int8 => Some(BLOCK),
        // Where tiles read narrow weights, they are few, and have all of K.
        _ if reading == Reading::Panels => Some(shape.k),
        WeightType::Fp8 | WeightType::Int8Weight => Some(budget.unpacked_terms),
        WeightType::Int4Weight => Some(GROUP),
    }
}

/// Threads that have enough to do.
fn num_shares(shape: &Shape, geometry: &Geometry, num_threads: usize) -> usize {
    let products = |least_rows: usize| {
        (shape.rows.max(least_rows) * shape.n).saturating_mul(shape.k * shape.num_matrices)
    };
    num_threads.min(match geometry.is_amx {
        true => 1 + products(64) / (8 * MIN_PRODUCTS_PER_THREAD),
        false => 1 + products(4) / MIN_PRODUCTS_PER_THREAD,
    })
}

/// Columns of a piece, fewer than a strip has where so many tiles, in so many groups, would make too few units.
fn piece_cols(
    shape: &Shape,
    geometry: &Geometry,
    [num_tiles, num_groups]: [usize; 2],
    num_shares: usize,
) -> usize {
    // No two threads write to one line.
    let narrowest = geometry.narrowest.max(LINE_BYTES / shape.output_bytes);
    let num_units = |piece_cols: usize| num_groups * shape.n.div_ceil(NR) * (NR / piece_cols);
    let mut piece_cols = geometry.strip;
    while num_shares > 1
        && num_tiles > 1
        && piece_cols > narrowest
        && num_units(piece_cols) < MIN_UNITS_PER_THREAD * num_shares
    {
        piece_cols /= 2;
    }
    piece_cols
}

/// The cut.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    shape: Shape,
    pub(super) reading: Reading,
    geometry: Geometry,
    num_tiles: usize,
    /// Rows of every tile but the last, in AMX; otherwise they are dealt out evenly.
    tile_rows: usize,
    /// Runs of tiles that are units.
    num_groups: usize,
    groups_per_block: usize,
    /// Pieces over all panels.
    num_pieces: usize,
    /// Pieces of a unit, but perhaps the last one's.
    unit_pieces: usize,
    piece_cols: usize,
    /// Terms of a chunk of K, a multiple of the geometry's step.
    pub(super) chunk: usize,
    pub(super) num_chunks: usize,
    /// Threads that have enough to do.
    pub(super) num_shares: usize,
}

/// What a thread does in one go: some tiles over a piece of a panel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unit {
    pub(super) tiles: Range<usize>,
    /// Indices of the pieces.
    pub(super) pieces: Range<usize>,
    /// This unit's place among those that sweep over the piece, and their number, where that is the number
    /// of tiles; otherwise the sweep is inside of the unit.
    pub(super) sweep: Option<(usize, usize)>,
}

impl Unit {
    /// Each piece and each tile of it.
    pub(super) fn tiles_of_pieces(&self) -> impl Iterator<Item = (usize, usize)> {
        self.pieces.clone().flat_map(|piece| self.tiles.clone().map(move |tile| (piece, tile)))
    }
}

impl Plan {
    /// The cut for so many threads on cores of such caches.
    pub(super) fn new(shape: Shape, geometry: Geometry, caches: CoreCaches, num_threads: usize) -> Self {
        let budget = Budget::new(caches, &geometry);
        let (num_tiles, tile_rows) = tiles(shape.rows, &geometry);
        let reading = Reading::new(shape.kind, &geometry, num_tiles);
        let chunk = chunk(&shape, &geometry, &budget, reading);
        let num_chunks = shape.k.div_ceil(chunk.max(1)).max(1); // Rounding up may have saved one.

        // What is unpacked is unpacked once for a group of tiles.
        let sweep_bytes = shape.num_matrices * shape.k * term_bytes(&shape, &geometry);
        let fits = num_chunks == 1 && sweep_bytes <= budget.sweep_bytes;
        let has_tile_units = (fits || geometry.is_amx) && reading == Reading::Panels;
        let num_groups = if has_tile_units { num_tiles } else { num_tiles.div_ceil(geometry.group_tiles) };
        // Where weights are widened, x is in f32.
        let input_bytes = if geometry.widens { size_of::<f32>() } else { tile_bytes(shape.kind) };
        let tile_bytes = tile_rows * shape.k * input_bytes;
        let least_block_tiles = if geometry.is_amx { 1 } else { MIN_BLOCK_TILES };
        let max_block_tiles = (budget.block_bytes / tile_bytes.max(1)).max(least_block_tiles);
        let num_blocks = num_tiles.div_ceil(max_block_tiles).clamp(1, num_groups.max(1));

        let num_shares = num_shares(&shape, &geometry, num_threads);
        let piece_cols = piece_cols(&shape, &geometry, [num_tiles, num_groups], num_shares);
        let num_pieces = shape.n.div_ceil(piece_cols); // None that is all padding.
        let mut unit_pieces = 1;
        if geometry.is_amx && tile_bytes > budget.block_bytes {
            let per_unit = num_pieces * num_groups / (MIN_AMX_UNITS_PER_THREAD * num_shares);
            unit_pieces = per_unit.clamp(1, (budget.unit_pieces / shape.num_matrices).max(1));
        }
        Self {
            shape,
            reading,
            geometry,
            num_tiles,
            tile_rows,
            num_groups,
            groups_per_block: num_groups.div_ceil(num_blocks),
            num_pieces,
            unit_pieces,
            piece_cols,
            chunk,
            num_chunks,
            num_shares,
        }
    }

    /// Units, in the order in which neighbours share most.
    pub(super) fn num_units(&self) -> usize {
        self.num_groups * self.num_pieces.div_ceil(self.unit_pieces)
    }

    /// Most pieces of a unit times most tiles.
    pub(super) fn unit_tiles(&self) -> usize {
        self.unit_pieces * self.num_tiles.div_ceil(self.num_groups.max(1))
    }

    /// The unit of an index.
    pub(super) fn unit(&self, idx: usize) -> Unit {
        let block_units = self.groups_per_block * self.num_pieces.div_ceil(self.unit_pieces);
        let (block, idx) = (idx / block_units, idx % block_units);
        let first_group = block * self.groups_per_block;
        let num_groups = self.groups_per_block.min(self.num_groups - first_group);
        let (first_piece, in_block) = (idx / num_groups * self.unit_pieces, idx % num_groups);
        let group = first_group + in_block;
        Unit {
            tiles: share(self.num_tiles, self.num_groups, group),
            pieces: first_piece..self.num_pieces.min(first_piece + self.unit_pieces),
            sweep: (self.num_groups == self.num_tiles && self.num_chunks == 1 && self.unit_pieces == 1)
                .then_some((in_block, num_groups)),
        }
    }

    /// The rows of a tile.
    pub(super) fn rows(&self, tile: usize) -> Range<usize> {
        if self.geometry.is_amx {
            let start = tile * self.tile_rows;
            return start..self.shape.rows.min(start + self.tile_rows);
        }
        share(self.shape.rows, self.num_tiles, tile)
    }

    /// The columns of a piece; those at or beyond n are padding.
    pub(super) fn cols(&self, piece: usize) -> Range<usize> {
        piece * self.piece_cols..(piece + 1) * self.piece_cols
    }

    /// Where a piece starts in the packed matrix, in bytes; none beyond the last.
    pub(super) fn piece_start(&self, piece: usize) -> Option<usize> {
        let col = piece * self.piece_cols;
        let layout = PanelLayout::new(self.shape.kind, self.shape.k);
        let in_panel = layout.strips(self.geometry.strip).column(col % NR).start;
        (piece < self.num_pieces).then(|| col / NR * layout.bytes() + in_panel * WORD_BYTES)
    }

    /// Where the `i`-th group behind the numbers of a piece's panel starts, in bytes.
    pub(super) fn behind_numbers(&self, piece: usize, i: usize) -> usize {
        let col = piece * self.piece_cols;
        let layout = PanelLayout::new(self.shape.kind, self.shape.k);
        col / NR * layout.bytes() + ((layout.numbers + i) * NR + col % NR) * WORD_BYTES
    }
}

/// Bytes of a word.
const WORD_BYTES: usize = 4;

/// Part `i` of `0..total` cut into `parts` that differ by one at most.
pub(super) fn share(total: usize, parts: usize, i: usize) -> Range<usize> {
    let (size, longer) = (total / parts, total % parts);
    let start = |i: usize| i * size + i.min(longer);
    start(i)..start(i + 1)
}
