//! Carries a [`Plan`] out: units on threads, tiles in units, chunks of K in tiles.

#[cfg(target_arch = "x86_64")]
mod blocks;
mod deal;
mod results;
#[cfg(target_arch = "x86_64")]
mod widened;

#[cfg(target_arch = "x86_64")]
use super::amx::Registers;
use super::integers::Integers;
use super::operand::Operand;
use super::operand::REGISTER_ROWS;
use super::pack::{PackedMatrix, padded_terms, terms_per_word};
use super::plan::{Plan, Reading, Shape, Unit};
use super::quantized::BLOCK;
use super::scales::AddGroup;
use super::tile::{Kernel, NR, OpenBlock, Tile};
use super::unpack::{Unpack, Unpacked, unpack_fn};
use super::zeros::TakeOff;
use crate::backend::WeightType;
use crate::cpu::lanes::at_level;
use crate::cpu::pool::ThreadPool;
use crate::cpu::simd::Simd;
use deal::deal;
use std::mem::MaybeUninit;

/// Groups that a single tile of AVX2 is to ask for ahead: 32 lines of 16 columns, which a core waits for at a time.
const LINES_AHEAD: usize = 32;

/// x, as a product reads it.
#[derive(Clone, Copy)]
pub(super) struct Input<'a> {
    pub(super) numbers: &'a Operand,
    /// The same quantised, for products in integers.
    pub(super) integers: Option<&'a Integers>,
}

impl Input<'_> {
    /// Bytes of a number.
    fn number_bytes(&self) -> usize {
        if self.integers.is_some() { 1 } else { self.numbers.number_bytes() }
    }

    /// First byte of the first row, and bytes from row to row.
    fn rows(&self) -> (*const u8, usize) {
        match self.integers {
            Some(integers) => (integers.as_ptr(), integers.row_bytes()),
            None => (self.numbers.as_ptr(), self.numbers.row_bytes()),
        }
    }
}

/// A product of x with one matrix or two.
pub(super) struct Product<'a, const N: usize> {
    simd: Simd,
    kernel: Kernel,
    plan: Plan,
    x: Input<'a>,
    kind: WeightType,
    weights: [&'a PackedMatrix; N],
    /// Whether the scratch holds sums of earlier terms when a sweep begins.
    is_begun: bool,
}

/// Where a tile's finished sums go.
#[derive(Clone, Copy)]
struct Destination {
    c: *mut f32,
    c_stride: usize,
    is_added: bool,
}

/// The output's address, for the threads that write disjoint tiles of it.
#[derive(Clone, Copy)]
struct Output(*mut f32);

// SAFETY: threads write the elements of their own units alone.
unsafe impl Sync for Output {}

impl Output {
    fn at(&self, offset: usize) -> *mut f32 {
        self.0.wrapping_add(offset)
    }
}

impl<'a, const N: usize> Product<'a, N> {
    pub(super) fn new(simd: Simd, pool: &ThreadPool, x: Input<'a>, weights: [&'a PackedMatrix; N]) -> Self {
        let w = weights[0];
        let kind = w.kind();
        debug_assert!(weights.iter().all(|other| (other.rows(), other.cols()) == (w.rows(), w.cols())));
        debug_assert!(weights.iter().all(|other| other.kind() == kind));
        debug_assert_eq!(x.numbers.cols(), w.cols());
        let shape = Shape {
            rows: x.numbers.rows(),
            n: w.rows(),
            k: padded_terms(kind, w.cols()),
            kind,
            num_matrices: N,
        };
        let has_zeros = weights.iter().any(|w| w.has_zeros());
        let kernel = if has_zeros { Kernel::with_zeros(simd) } else { Kernel::new(simd, kind) };
        let plan = Plan::new(shape, kernel.geometry, pool.num_threads());
        Self { simd, kernel, plan, x, kind, weights, is_begun: false }
    }

    /// The sums of a unit's tiles by matrix `m`, to where `destination(piece, tile)` says.
    ///
    /// # Safety
    /// `scratch` has room for the unit's tiles, and the destinations for tiles of the piece's width.
    unsafe fn sweep(
        &self,
        unit: &Unit,
        m: usize,
        scratch: *mut f32,
        destination: impl Fn(usize, usize) -> Destination,
    ) {
        // SAFETY: the caller's.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            if self.plan.reading == Reading::Widened {
                return self.sweep_widened(unit, m, scratch, destination);
            }
            self.sweep_with(unit, m, scratch, |tile, piece, index| {
                let Destination { c, c_stride, is_added } = destination(piece, index);
                (self.kernel.tile)(&Tile { c, c_stride, is_added, ..*tile });
            });
        }
    }

    /// The same with the last chunk of K left to `last(tile, piece, index of the tile)`, where the tile still leads to the
    /// scratch.
    ///
    /// # Safety
    /// `scratch` has room for the unit's tiles.
    unsafe fn sweep_with(
        &self,
        unit: &Unit,
        m: usize,
        scratch: *mut f32,
        last: impl Fn(&Tile, usize, usize),
    ) {
        let (plan, geometry) = (&self.plan, &self.kernel.geometry);
        for (chunk, piece) in
            (0..plan.num_chunks).flat_map(|chunk| unit.pieces.clone().map(move |p| (chunk, p)))
        {
            let (first, k) = self.chunk(chunk);
            let b = self.piece(m, piece).wrapping_add(self.bytes_of(first));
            let (next, in_unit) = self.next_sweep(unit, m, chunk, piece);
            let cols = plan.cols(piece).len();
            let (block, is_begun, is_open) = self.place_in_block(chunk);
            let bias = self.bias(m, piece, block);
            let is_last = chunk + 1 == plan.num_chunks;
            for index in unit.tiles.clone() {
                let rows = plan.rows(index);
                let place = self.place(unit, piece, index);
                // SAFETY: the caller vouches for the scratch.
                let (sums, integers) = unsafe { (scratch.add(place), self.integers(scratch, place)) };
                let (place, places) = match unit.sweep {
                    Some(sweep) if !in_unit => sweep,
                    _ => (index - unit.tiles.start, unit.tiles.len()),
                };
                let (prefetch, prefetch_groups) = self.prefetch(b, k, next, place, places);
                let (a, a_stride) = self.rows_of_x(rows.start, first);
                let tile = Tile {
                    a,
                    a_stride,
                    b,
                    k,
                    rows: rows.len(),
                    register_rows: self.register_rows(),
                    cols,
                    bias,
                    integers: OpenBlock { sums: integers, is_begun, is_open },
                    scales: self.block_scales(m, piece, block),
                    row_scales: self.row_scales(rows.start, block),
                    init: if self.has_sums_before(chunk) { sums } else { std::ptr::null() },
                    c: sums,
                    c_stride: geometry.strip,
                    is_added: false,
                    prefetch,
                    prefetch_groups,
                };
                if is_last {
                    last(&tile, piece, index);
                    continue;
                }
                // SAFETY: rows, columns and terms lie inside of x and of the panel by the plan; sums from
                // the chunk before are in the scratch, and these go there.
                unsafe { (self.kernel.tile)(&tile) }
            }
        }
    }

    /// Where in the scratch the sums of a unit's tile lie.
    fn place(&self, unit: &Unit, piece: usize, tile: usize) -> usize {
        let idx = (piece - unit.pieces.start) * unit.tiles.len() + tile - unit.tiles.start;
        idx * self.kernel.geometry.sums()
    }

    /// Numbers of the sums of a unit by one matrix, and of a tile's over a group of K or of all tiles' over a part of a block.
    fn unit_sums(&self) -> usize {
        let sums = self.plan.unit_tiles() * self.kernel.geometry.sums();
        sums + if self.kind == WeightType::Int8 { sums } else { self.kernel.geometry.sums() }
    }

    /// The sums in integers of the tile at a place of the scratch: behind all of those in f32.
    ///
    /// # Safety
    /// The scratch has room for the unit's tiles.
    unsafe fn integers(&self, scratch: *mut f32, place: usize) -> *mut i32 {
        match self.kind {
            // SAFETY: `unit_sums` counts them.
            WeightType::Int8 => unsafe {
                scratch.add(self.plan.unit_tiles() * self.kernel.geometry.sums() + place).cast()
            },
            _ => std::ptr::null_mut(),
        }
    }

    /// The block of K that a chunk of integers is in, whether a chunk before is, and whether one after is.
    fn place_in_block(&self, chunk: usize) -> (usize, bool, bool) {
        if self.kind != WeightType::Int8 {
            return (0, false, false);
        }
        let (first, k) = self.chunk(chunk);
        let ends = (first + k).is_multiple_of(BLOCK) || first + k == self.padded_k();
        (first / BLOCK, !first.is_multiple_of(BLOCK), !ends)
    }

    /// Whether the scratch holds sums of earlier terms when a chunk begins; of integers, of earlier blocks.
    fn has_sums_before(&self, chunk: usize) -> bool {
        let is_first = match self.kind {
            WeightType::Int8 => self.place_in_block(chunk).0 == 0,
            _ => chunk == 0,
        };
        !is_first || self.is_begun
    }

    /// The same where weights are unpacked: chunk by chunk, for all tiles of the unit; the sums go to `scratch`.
    ///
    /// # Safety
    /// `scratch` has room for the unit's tiles.
    unsafe fn sweep_unpacked(&self, unit: &Unit, m: usize, scratch: *mut f32) {
        let unpack = unpack_fn(self.simd, self.kind);
        let mut unpacked = MaybeUninit::<Unpacked>::uninit();
        let b = unpacked.as_mut_ptr().cast::<u32>();
        // A tile's sums over a group lie behind those of the unit.
        let group = scratch.wrapping_add(self.plan.unit_tiles() * self.kernel.geometry.sums());
        let has_groups = self.kind == WeightType::Int4Weight;
        let geometry = &self.kernel.geometry;
        let chunks = 0..self.plan.num_chunks;
        for (chunk, piece) in chunks.flat_map(|chunk| unit.pieces.clone().map(move |piece| (chunk, piece))) {
            let (first, k) = self.chunk(chunk);
            let cols = self.plan.cols(piece).len();
            let words = self.piece(m, piece).wrapping_add(self.bytes_of(first));
            // In AMX what is unpacked next comes from memory while the tiles are multiplied; they take no notice
            // of memory themselves.
            let next = words.wrapping_add(self.bytes_of(k));
            let step_words = geometry.step / terms_per_word(self.kind) * geometry.strip;
            let step_groups = if geometry.is_amx { step_words * 4 / geometry.prefetch_bytes } else { 0 };
            let to_unpack = Unpack { words: words.cast(), strip: geometry.strip, terms: k, cols, out: b };
            // SAFETY: the chunk's words lie inside of the panel by the plan, and the buffer has room for a chunk.
            unsafe { unpack(&to_unpack) };
            let column = self.plan.cols(piece).start;
            if let Some(zeros) = self.weights[m].panel_zeros(column / NR) {
                // A chunk is a group.
                at_level(self.simd, TakeOff::new(zeros, column % NR, chunk, &to_unpack));
            }
            let is_first = chunk == 0 && !self.is_begun;
            for tile in unit.tiles.clone() {
                let rows = self.plan.rows(tile);
                // SAFETY: the caller vouches for the scratch.
                let sums = unsafe { scratch.add(self.place(unit, piece, tile)) };
                let (a, a_stride) = self.rows_of_x(rows.start, first);
                let tile = Tile {
                    a,
                    a_stride,
                    b: b.cast_const().cast(),
                    k,
                    rows: rows.len(),
                    register_rows: self.register_rows(),
                    cols,
                    bias: std::ptr::null(),
                    integers: OpenBlock::NONE,
                    scales: std::ptr::null(),
                    row_scales: std::ptr::null(),
                    init: if has_groups || is_first { std::ptr::null() } else { sums },
                    c: if has_groups { group } else { sums },
                    c_stride: geometry.strip,
                    is_added: false,
                    prefetch: next,
                    prefetch_groups: if tile == unit.tiles.start { step_groups } else { 0 },
                };
                // SAFETY: rows and terms lie inside of x by the plan, the chunk's columns have been unpacked, and
                // sums from the chunk before are in the scratch.
                unsafe { (self.kernel.tile)(&tile) }
                if has_groups {
                    let (scales, rows) = (self.scales(m, piece, chunk), rows.len());
                    at_level(
                        self.simd,
                        AddGroup { group, scales, sums, is_first, rows, strip: geometry.strip, cols },
                    );
                }
            }
        }
    }

    /// First term and number of terms of a chunk.
    fn chunk(&self, chunk: usize) -> (usize, usize) {
        let first = chunk * self.plan.chunk;
        (first, self.plan.chunk.min(self.padded_k() - first))
    }

    /// x from a row and a term on, and bytes from row to row.
    fn rows_of_x(&self, row: usize, term: usize) -> (*const u8, usize) {
        let (start, row_bytes) = self.x.rows();
        (start.wrapping_add(row * row_bytes + term * self.x.number_bytes()), row_bytes)
    }

    /// Bytes of so many terms of a strip.
    fn bytes_of(&self, terms: usize) -> usize {
        terms / terms_per_word(self.kind) * self.kernel.geometry.strip * size_of::<u32>()
    }

    /// A piece's scales for all of K, or for a group of it.
    fn scales(&self, m: usize, piece: usize, group: usize) -> *const f32 {
        self.behind_numbers(m, piece, group).cast()
    }

    /// What a piece's sums over a block of K start from.
    fn bias(&self, m: usize, piece: usize, block: usize) -> *const i32 {
        match self.x.integers {
            Some(_) => self.behind_numbers(m, piece, self.weights[m].layout().scales + block).cast(),
            None => std::ptr::null(),
        }
    }

    /// What a piece's sums over a block of K are multiplied with beside the rows' scales, or over groups of K from a first one on.
    fn block_scales(&self, m: usize, piece: usize, block: usize) -> *const f32 {
        match self.kind {
            WeightType::Int8 | WeightType::Int4Weight => self.scales(m, piece, block),
            _ => std::ptr::null(),
        }
    }

    /// The scales that rows from `row` on have for a block of K.
    fn row_scales(&self, row: usize, block: usize) -> *const f32 {
        self.x.integers.map_or(std::ptr::null(), |integers| integers.scales(block)[row..].as_ptr())
    }

    /// The `i`-th group behind the numbers of a piece's panel.
    fn behind_numbers(&self, m: usize, piece: usize, i: usize) -> *const u8 {
        self.weights[m].as_ptr().wrapping_add(self.plan.behind_numbers(piece, i))
    }

    /// What turns the sums of a piece's columns into results: their scales; null where there are none, or where they have
    /// been applied.
    fn last_scales(&self, m: usize, piece: usize) -> *const f32 {
        match self.kind {
            WeightType::Int8Weight => self.scales(m, piece, 0),
            _ => std::ptr::null(),
        }
    }

    /// Whether sums are results as the tiles leave them, without scales.
    fn is_plain(&self) -> bool {
        matches!(self.kind, WeightType::F32 | WeightType::Bf16)
    }

    /// The sums of all tiles of a unit, in the scratch and without the last scales.
    ///
    /// # Safety
    /// `scratch` has room for the unit's tiles.
    unsafe fn sweep_to_scratch(&self, unit: &Unit, m: usize, scratch: *mut f32) {
        let c_stride = self.kernel.geometry.strip;
        // SAFETY: the caller vouches for the scratch, which has a place for every tile.
        unsafe {
            match self.plan.reading {
                Reading::Unpacked => self.sweep_unpacked(unit, m, scratch),
                Reading::Panels | Reading::Widened => self.sweep(unit, m, scratch, |piece, tile| {
                    Destination { c: scratch.add(self.place(unit, piece, tile)), c_stride, is_added: false }
                }),
            }
        }
    }

    /// Calls `each(row, piece, place of its sums in the scratch)` for every row of a unit's tiles.
    fn for_each_row(&self, unit: &Unit, mut each: impl FnMut(usize, usize, usize)) {
        for (piece, tile) in unit.tiles_of_pieces() {
            let place = self.place(unit, piece, tile);
            for (r, row) in self.plan.rows(tile).enumerate() {
                each(row, piece, place + r * self.kernel.geometry.strip);
            }
        }
    }

    /// The weights that this thread is likely to need after this chunk, and whether the sweep over the
    /// chunk lies inside of the unit.
    fn next_sweep(&self, unit: &Unit, m: usize, chunk: usize, piece: usize) -> (Option<*const u8>, bool) {
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
    /// that of the products. A single tile is left to the processor's own prefetching: it reads straight
    /// on, and hints of ours take the places that its own would have (measured: 60 % of the bandwidth for 4
    /// rows against 95 %).
    fn prefetch(
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
            // The first tile sees to it with its blocks of rows; a single block leaves it to the processor, too.
            let next = next.filter(|_| place == 0 && !self.is_one_block());
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

    /// Whether all rows are one block of AMX.
    fn is_one_block(&self) -> bool {
        self.x.numbers.rows() <= 2 * REGISTER_ROWS
    }

    fn piece(&self, m: usize, piece: usize) -> *const u8 {
        let start = self.plan.piece_start(piece).expect("a unit's piece is one of the plan's");
        self.weights[m].as_ptr().wrapping_add(start)
    }

    fn padded_k(&self) -> usize {
        padded_terms(self.kind, self.x.numbers.cols())
    }

    /// Columns of a piece that are no padding.
    fn valid_cols(&self, piece: usize) -> usize {
        let cols = self.plan.cols(piece);
        self.weights[0].rows().min(cols.end).saturating_sub(cols.start)
    }
}

impl<const N: usize> Product<'_, N> {
    /// Run every unit of the plan.
    fn for_each_unit(&self, pool: &ThreadPool, run: impl Fn(Unit) + Sync) {
        let plan = &self.plan;
        deal(pool, plan.num_units(), plan.num_shares, || self.registers(), |idx| run(plan.unit(idx)));
    }

    /// The calling thread's registers, ready for the tiles of this product.
    #[cfg(target_arch = "x86_64")]
    fn registers(&self) -> Option<Registers> {
        // SAFETY: callers pass a level that this processor has.
        self.kernel.geometry.is_amx.then(|| unsafe { Registers::shape(self.register_rows()) })
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn registers(&self) {}

    /// Rows of x that a register of AMX reads.
    fn register_rows(&self) -> usize {
        self.x.numbers.rows().clamp(1, REGISTER_ROWS)
    }
}
