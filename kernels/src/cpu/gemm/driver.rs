//! Carries a [`Plan`] out: units on threads, tiles in units, chunks of K in tiles.

mod addresses;
#[cfg(target_arch = "x86_64")]
mod blocks;
mod deal;
mod ladder;
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
use super::scales::AddGroup;
use super::tile::{Kernel, NR, OpenBlock, Tile};
use super::unpack::{Unpack, Unpacked, unpack_fn};
use super::zeros::TakeOff;
use crate::backend::WeightType;
use crate::cpu::lanes::at_level;
use crate::cpu::pool::ThreadPool;
use crate::cpu::simd::Simd;
use deal::deal;
pub use ladder::Rung;
use std::mem::MaybeUninit;

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
            // Gate and up give the next product's x, which is as this one.
            output_bytes: if N == 1 { size_of::<f32>() } else { x.numbers.number_bytes() },
        };
        let has_zeros = weights.iter().any(|w| w.has_zeros());
        let kernel = if has_zeros { Kernel::with_zeros(simd) } else { Kernel::new(simd, kind) };
        let plan = Plan::new(shape, kernel.geometry, pool.caches(), pool.num_threads());
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
                let take_off = TakeOff::new(zeros, column % NR, chunk, &to_unpack);
                // SAFETY: the device has its level, and the buffer holds the chunk's terms of the piece's columns.
                unsafe { at_level(self.simd, take_off) };
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
                    let add = AddGroup { group, scales, sums, is_first, rows, strip: geometry.strip, cols };
                    // SAFETY: the device has its level; the tile has left the group's sums, of as many rows and columns as
                    // it has a place for.
                    unsafe { at_level(self.simd, add) };
                }
            }
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
        // SAFETY: the caller vouches for the scratch, which has a place for every tile.
        unsafe {
            match self.plan.reading {
                Reading::Unpacked => self.sweep_unpacked(unit, m, scratch),
                Reading::Panels | Reading::Widened => {
                    self.sweep(unit, m, scratch, self.to_scratch(unit, scratch));
                }
            }
        }
    }

    /// The destination in the scratch of each `(piece, tile)` of a unit.
    fn to_scratch(&self, unit: &Unit, scratch: *mut f32) -> impl Fn(usize, usize) -> Destination {
        let c_stride = self.kernel.geometry.strip;
        move |piece, tile| {
            let c = scratch.wrapping_add(self.place(unit, piece, tile));
            Destination { c, c_stride, is_added: false }
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
