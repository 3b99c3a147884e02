//! Products at a level without a product of bf16, of so many rows that it pays to widen weights first.
//!
//! Chunk by chunk of K, some columns' weights become f32 in a buffer that stays in L1, and all tiles of a unit
//! multiply them: so a tile's loop loads factors and does nothing else to them. Where tiles are too few for that, they take what
//! is in L1 one after the other. The bits are those of the tiles that read panels.

use super::addresses::LINES_AHEAD;
use super::{Destination, Product};
use crate::backend::WeightType;
use crate::cpu::gemm::avx2;
use crate::cpu::gemm::operand::LINE_BYTES;
use crate::cpu::gemm::pack::terms_per_word;
use crate::cpu::gemm::plan::Unit;
use crate::cpu::gemm::quantized::GROUP;
use crate::cpu::gemm::scratch::with_sums;
use crate::cpu::gemm::tile::{GROUP_BYTES, KR, NR, OpenBlock, PIECE_COLS, Tile};
use crate::cpu::gemm::unpack::{Unpack, Widened};
use crate::cpu::pool::ThreadPool;
use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
use std::mem::MaybeUninit;

impl<const N: usize> Product<'_, N> {
    /// As `sweep`.
    ///
    /// # Safety
    /// As there, and the level is AVX2.
    pub(super) unsafe fn sweep_widened(
        &self,
        unit: &Unit,
        m: usize,
        scratch: *mut f32,
        destination: impl Fn(usize, usize) -> Destination,
    ) {
        let widen = avx2::widen_fn(self.kind);
        // SAFETY: the caller's; `sweep_by` vouches for the chunk and the tiles.
        unsafe {
            let multiply = |tile: &Tile| avx2::tile_widened(tile);
            self.sweep_by(unit, m, scratch, destination, |chunk| widen(chunk), multiply);
        }
    }

    /// Whether a unit's weights are widened. A few tiles of bf16 take each line while it is in L1, but nothing is widened for
    /// them.
    pub(super) fn is_widened(&self, unit: &Unit) -> bool {
        self.kind != WeightType::Bf16 || unit.tiles.len() >= avx2::WIDENED_TILES
    }

    /// The same with what widens some columns of a chunk, and what multiplies them as widened. What is passed to either is
    /// valid for it, but for the numbers of columns that have not been widened.
    ///
    /// # Safety
    /// As `sweep_widened`.
    unsafe fn sweep_by(
        &self,
        unit: &Unit,
        m: usize,
        scratch: *mut f32,
        destination: impl Fn(usize, usize) -> Destination,
        widen: impl Fn(&Unpack),
        multiply: impl Fn(&Tile),
    ) {
        let plan = &self.plan;
        let mut widened = MaybeUninit::<Widened>::uninit();
        let b = widened.as_mut_ptr().cast::<u32>();
        let is_widened = self.is_widened(unit);
        for (chunk, piece) in
            (0..plan.num_chunks).flat_map(|chunk| unit.pieces.clone().map(move |piece| (chunk, piece)))
        {
            let (first, k) = self.chunk(chunk);
            let words = self.piece(m, piece).wrapping_add(self.bytes_of(first)).cast::<u32>();
            let cols = plan.cols(piece).len();
            let mut ahead = self.lines_ahead(unit, m, chunk, piece, cols);
            let is_last = chunk + 1 == plan.num_chunks;
            let tiles: [Tile; avx2::GROUP_TILES] = std::array::from_fn(|i| {
                let index = unit.tiles.end.min(unit.tiles.start + i + 1) - 1;
                // SAFETY: the caller vouches for the scratch.
                let sums = unsafe { scratch.add(self.place(unit, piece, index)) };
                let to = is_last.then(|| destination(piece, index));
                self.tile_of_chunk(m, piece, chunk, index, sums, to)
            });
            for col in (0..cols).step_by(PIECE_COLS) {
                let words = words.wrapping_add(col);
                if is_widened {
                    // The chunk's words lie inside of the panel by the plan, and the buffer has room for a chunk.
                    widen(&Unpack { words, strip: NR, terms: k, cols: PIECE_COLS, out: b });
                }
                for (i, tile) in tiles[..unit.tiles.len()].iter().enumerate() {
                    let mut tile = tile.of_columns(col);
                    if is_widened {
                        tile.b = b.cast_const().cast();
                        ahead.ask();
                        // Rows and terms lie inside of x by the plan, and sums from the chunk before are in the scratch.
                        multiply(&tile);
                    } else {
                        tile.b = words.cast();
                        tile.prefetch = tile.b.wrapping_add(LINES_AHEAD * GROUP_BYTES);
                        tile.prefetch_groups = if i == 0 { KR / terms_per_word(self.kind) } else { 0 };
                        // SAFETY: as above, with the columns where they lie in the panel.
                        unsafe { avx2::tile_bf16(&tile) }
                    }
                }
            }
        }
    }

    /// A tile of all of a piece's columns over a chunk, still without weights. Its sums are those in the scratch, and go there if
    /// nowhere else.
    fn tile_of_chunk(
        &self,
        m: usize,
        piece: usize,
        chunk: usize,
        index: usize,
        sums: *mut f32,
        to: Option<Destination>,
    ) -> Tile {
        let (rows, (first, k)) = (self.plan.rows(index), self.chunk(chunk));
        let (a, a_stride) = self.rows_of_x(rows.start, first);
        let to = to.unwrap_or(Destination { c: sums, c_stride: NR, is_added: false });
        Tile {
            a,
            a_stride,
            b: std::ptr::null(),
            k,
            rows: rows.len(),
            register_rows: self.register_rows(),
            cols: PIECE_COLS,
            bias: std::ptr::null(),
            integers: OpenBlock::NONE,
            scales: self.block_scales(m, piece, first / GROUP),
            row_scales: std::ptr::null(),
            init: if self.has_sums_before(chunk) { sums } else { std::ptr::null() },
            c: to.c,
            c_stride: to.c_stride,
            is_added: to.is_added,
            prefetch: std::ptr::null(),
            prefetch_groups: 0,
        }
    }

    /// What is widened next, to be asked for by the tiles of this chunk and piece.
    fn lines_ahead(&self, unit: &Unit, m: usize, chunk: usize, piece: usize, cols: usize) -> LinesAhead {
        let (plan, (next, _)) = (&self.plan, self.next_sweep(unit, m, chunk, piece));
        let tiles = unit.tiles.len() * cols.div_ceil(PIECE_COLS);
        let groups = next.map_or(0, |_| plan.chunk / terms_per_word(self.kind));
        LinesAhead {
            group: next.unwrap_or(std::ptr::null()),
            lines_of_group: cols.div_ceil(PIECE_COLS),
            next_line: 0,
            lines: groups * cols.div_ceil(PIECE_COLS),
            per_tile: (groups * cols.div_ceil(PIECE_COLS)).div_ceil(tiles),
        }
    }
}

/// With one part left out.
impl Product<'_, 1> {
    /// Widens for every unit what its tiles would multiply.
    pub(super) fn widen(&self, pool: &ThreadPool) {
        let widen = avx2::widen_fn(self.kind);
        // SAFETY: `sweep_by` vouches for the chunk.
        self.sweep_all_by(pool, |chunk| unsafe { widen(chunk) }, |_| ());
    }

    /// Has every unit's tiles multiply zeros, and widens nothing; sums stay in the scratch.
    pub(super) fn multiply_zeros(&self, pool: &ThreadPool) {
        let zeros = Widened([0.0; _]);
        // SAFETY: `sweep_by` vouches for the tile but for its weights, in whose place there are as many zeros.
        let multiply =
            |tile: &Tile| unsafe { avx2::tile_widened(&Tile { b: zeros.0.as_ptr().cast(), ..*tile }) };
        self.sweep_all_by(pool, |_| (), multiply);
    }

    fn sweep_all_by(
        &self,
        pool: &ThreadPool,
        widen: impl Fn(&Unpack) + Sync,
        multiply: impl Fn(&Tile) + Sync,
    ) {
        self.for_each_unit(pool, |unit| {
            // SAFETY: the scratch has a place for every tile of a unit, and what is widened is so in AVX2.
            with_sums(self.unit_sums(), |scratch| unsafe {
                self.sweep_by(&unit, 0, scratch, self.to_scratch(&unit, scratch), &widen, &multiply);
            });
        });
    }
}

/// Lines of a piece to be asked for ahead, some by each tile.
struct LinesAhead {
    /// The first of the piece's lines that are not all asked for: lines of a panel's words, of which a piece has some.
    group: *const u8,
    lines_of_group: usize,
    /// The next one of them.
    next_line: usize,
    /// All that are left.
    lines: usize,
    per_tile: usize,
}

impl LinesAhead {
    /// A tile's share.
    fn ask(&mut self) {
        for _ in 0..self.per_tile.min(self.lines) {
            let line = self.group.wrapping_add(self.next_line * LINE_BYTES);
            // SAFETY: a prefetch never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) }
            self.lines -= 1;
            self.next_line += 1;
            if self.next_line == self.lines_of_group {
                (self.group, self.next_line) = (self.group.wrapping_add(GROUP_BYTES), 0);
            }
        }
    }
}
