//! Where what a product works with lies: chunks of K, panels and their scales, sums in the scratch; and which weights are asked
//! for ahead.

use super::Product;
use crate::backend::WeightType;
use crate::cpu::gemm::pack::{padded_terms, terms_per_word};
use crate::cpu::gemm::plan::Unit;
use crate::cpu::gemm::quantized::BLOCK;

/// Groups that a single tile of AVX2 is to ask for ahead: 32 lines of 16 columns, which a core waits for at a time.
pub(super) const LINES_AHEAD: usize = 32;

impl<const N: usize> Product<'_, N> {
    /// Where in the scratch the sums of a unit's tile lie.
    pub(super) fn place(&self, unit: &Unit, piece: usize, tile: usize) -> usize {
        let idx = (piece - unit.pieces.start) * unit.tiles.len() + tile - unit.tiles.start;
        idx * self.kernel.geometry.sums()
    }

    /// Numbers of the sums of a unit by one matrix, and of a tile's over a group of K or of all tiles' over a part of a block.
    pub(super) fn unit_sums(&self) -> usize {
        let sums = self.plan.unit_tiles() * self.kernel.geometry.sums();
        sums + if self.kind == WeightType::Int8 { sums } else { self.kernel.geometry.sums() }
    }

    /// The sums in integers of the tile at a place of the scratch: behind all of those in f32.
    ///
    /// # Safety
    /// The scratch has room for the unit's tiles.
    pub(super) unsafe fn integers(&self, scratch: *mut f32, place: usize) -> *mut i32 {
        match self.kind {
            // SAFETY: `unit_sums` counts them.
            WeightType::Int8 => unsafe {
                scratch.add(self.plan.unit_tiles() * self.kernel.geometry.sums() + place).cast()
            },
            _ => std::ptr::null_mut(),
        }
    }

    /// The block of K that a chunk of integers is in, whether a chunk before is, and whether one after is.
    pub(super) fn place_in_block(&self, chunk: usize) -> (usize, bool, bool) {
        if self.kind != WeightType::Int8 {
            return (0, false, false);
        }
        let (first, k) = self.chunk(chunk);
        let ends = (first + k).is_multiple_of(BLOCK) || first + k == self.padded_k();
        (first / BLOCK, !first.is_multiple_of(BLOCK), !ends)
    }

    /// Whether the scratch holds sums of earlier terms when a chunk begins; of integers, of earlier blocks.
    pub(super) fn has_sums_before(&self, chunk: usize) -> bool {
        let is_first = match self.kind {
            WeightType::Int8 => self.place_in_block(chunk).0 == 0,
            _ => chunk == 0,
        };
        !is_first || self.is_begun
    }

    /// First term and number of terms of a chunk.
    pub(super) fn chunk(&self, chunk: usize) -> (usize, usize) {
        let first = chunk * self.plan.chunk;
        (first, self.plan.chunk.min(self.padded_k() - first))
    }

    /// x from a row and a term on, and bytes from row to row.
    pub(super) fn rows_of_x(&self, row: usize, term: usize) -> (*const u8, usize) {
        let (start, row_bytes) = self.x.rows();
        (start.wrapping_add(row * row_bytes + term * self.x.number_bytes()), row_bytes)
    }

    /// Bytes of so many terms of a strip.
    pub(super) fn bytes_of(&self, terms: usize) -> usize {
        terms / terms_per_word(self.kind) * self.kernel.geometry.strip * size_of::<u32>()
    }

    /// A piece's scales for all of K, or for a group of it.
    pub(super) fn scales(&self, m: usize, piece: usize, group: usize) -> *const f32 {
        self.behind_numbers(m, piece, group).cast()
    }

    /// What a piece's sums over a block of K start from.
    pub(super) fn bias(&self, m: usize, piece: usize, block: usize) -> *const i32 {
        match self.x.integers {
            Some(_) => self.behind_numbers(m, piece, self.weights[m].layout().scales + block).cast(),
            None => std::ptr::null(),
        }
    }

    /// What a piece's sums over a block of K are multiplied with beside the rows' scales, or over groups of K from a first one on.
    pub(super) fn block_scales(&self, m: usize, piece: usize, block: usize) -> *const f32 {
        match self.kind {
            WeightType::Int8 | WeightType::Int4Weight => self.scales(m, piece, block),
            _ => std::ptr::null(),
        }
    }

    /// The scales that rows from `row` on have for a block of K.
    pub(super) fn row_scales(&self, row: usize, block: usize) -> *const f32 {
        self.x.integers.map_or(std::ptr::null(), |integers| integers.scales(block)[row..].as_ptr())
    }

    /// The `i`-th group behind the numbers of a piece's panel.
    pub(super) fn behind_numbers(&self, m: usize, piece: usize, i: usize) -> *const u8 {
        self.weights[m].as_ptr().wrapping_add(self.plan.behind_numbers(piece, i))
    }

    /// What turns the sums of a piece's columns into results: their scales; null where there are none, or where they have
    /// been applied.
    pub(super) fn last_scales(&self, m: usize, piece: usize) -> *const f32 {
        match self.kind {
            WeightType::Int8Weight => self.scales(m, piece, 0),
            _ => std::ptr::null(),
        }
    }

    pub(super) fn piece(&self, m: usize, piece: usize) -> *const u8 {
        let start = self.plan.piece_start(piece).expect("a unit's piece is one of the plan's");
        self.weights[m].as_ptr().wrapping_add(start)
    }

    pub(super) fn padded_k(&self) -> usize {
        padded_terms(self.kind, self.x.numbers.cols())
    }

    /// Columns of a piece that are no padding.
    pub(super) fn valid_cols(&self, piece: usize) -> usize {
        let cols = self.plan.cols(piece);
        self.weights[0].rows().min(cols.end).saturating_sub(cols.start)
    }

    /// The weights that this thread is likely to need after this chunk, and whether the sweep over the
    /// chunk lies inside of the unit.
    pub(super) fn next_sweep(
        &self,
        unit: &Unit,
        m: usize,
        chunk: usize,
        piece: usize,
    ) -> (Option<*const u8>, bool) {
        let next_unit = |m: usize| {
            let start = self.plan.piece_start(unit.pieces.end);
            start.map(|start| self.weights[m].as_ptr().wrapping_add(start))
        };
        if unit.sweep.is_some() {
            return (next_unit(m), false);
        }
        let at = |piece, chunk: usize| {
            Some(self.piece(m, piece).wrapping_add(self.bytes_of(chunk * self.plan.chunk)))
        };
        let next = if piece + 1 < unit.pieces.end {
            at(piece + 1, chunk)
        } else if chunk + 1 < self.plan.num_chunks {
            at(unit.pieces.start, chunk + 1)
        } else if m + 1 < N {
            Some(self.piece(m + 1, unit.pieces.start))
        } else {
            next_unit(0)
        };
        (next, true)
    }

    /// What tile `place` of the `places` that sweep over `b` shall prefetch: address and groups per step.
    ///
    /// The first tiles of a sweep bring in the weights of the next one, which takes the time of memory off
    /// that of the products. Below AMX a single tile is left to the processor's own prefetching: it reads straight
    /// on, and hints of ours take the places that its own would have (measured: 60 % of the bandwidth for 4
    /// rows against 95 %). In AMX, whose registers are loaded from every second line, hints in four streams are the better
    /// way (72 to 91 % for 66 to 82).
    pub(super) fn prefetch(
        &self,
        b: *const u8,
        k: usize,
        next: Option<*const u8>,
        place: usize,
        places: usize,
    ) -> (*const u8, usize) {
        let geometry = &self.kernel.geometry;
        let step_groups = self.bytes_of(geometry.step) / geometry.prefetch_bytes;
        if geometry.is_amx {
            // The first tile sees to it with its blocks of rows.
            let next = next.filter(|_| place == 0);
            return next.map_or((b, 0), |next| (next, step_groups));
        }
        if places == 1 {
            // In AVX2 a single tile reads every fourth line, and then the next ones: no stream to the processor.
            let is_stream = !geometry.widens || self.x.numbers.rows() == 1;
            return (
                b.wrapping_add(LINES_AHEAD * geometry.prefetch_bytes),
                if is_stream { 0 } else { step_groups },
            );
        }
        let groups = step_groups.div_ceil(places);
        match next {
            Some(next) if place * groups < step_groups => {
                (next.wrapping_add(place * groups * (k / geometry.step) * geometry.prefetch_bytes), groups)
            }
            _ => (b, 0),
        }
    }
}
