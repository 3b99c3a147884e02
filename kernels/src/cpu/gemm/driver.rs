//! Carries a [`Plan`] out: units on threads, tiles in units, chunks of K in tiles.

use super::operand::{Operand, OperandWriter, dtype_bytes};
use super::pack::PackedMatrix;
use super::plan::{GROUP_TILES, Plan, Shape, Unit, share};
use super::tile::{GROUP_BYTES, KR, Kernel, MR, NR, Sums, Tile};
use crate::cpu::pool::ThreadPool;
use crate::cpu::simd::Simd;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Sums of a unit's tiles, on the stack of its thread.
type Scratch = MaybeUninit<[Sums; GROUP_TILES]>;

/// A product of x with one matrix or two.
pub(super) struct Product<'a, const N: usize> {
    kernel: Kernel,
    plan: Plan,
    x: &'a Operand,
    weights: [&'a PackedMatrix; N],
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
    pub(super) fn new(simd: Simd, pool: &ThreadPool, x: &'a Operand, weights: [&'a PackedMatrix; N]) -> Self {
        let w = weights[0];
        debug_assert!(weights.iter().all(|other| (other.rows(), other.cols()) == (w.rows(), w.cols())));
        debug_assert!(weights.iter().all(|w| w.dtype() == x.dtype()), "x is {:?}", x.dtype());
        debug_assert_eq!(x.cols(), w.cols());
        let shape = Shape {
            rows: x.rows(),
            n: w.rows(),
            k: w.cols().next_multiple_of(KR),
            dtype_bytes: dtype_bytes(w.dtype()),
            num_matrices: N,
        };
        let plan = Plan::new(shape, pool.num_threads());
        Self { kernel: Kernel::new(simd, w.dtype()), plan, x, weights }
    }

    /// The sums of a unit's tiles by matrix `m`, to where `destination(index of the tile in the unit)` says.
    ///
    /// # Safety
    /// `scratch` has room for the unit's tiles, and the destinations for tiles of the piece's width.
    unsafe fn sweep(
        &self,
        unit: &Unit,
        m: usize,
        scratch: *mut Sums,
        destination: impl Fn(usize) -> Destination,
    ) {
        let plan = &self.plan;
        let term_bytes = NR * dtype_bytes(self.x.dtype());
        for chunk in 0..plan.num_chunks {
            let first = chunk * plan.chunk;
            let k = plan.chunk.min(self.padded_k() - first);
            let b = self.piece(m, unit.piece).wrapping_add(first * term_bytes);
            let (next, in_unit) = self.next_sweep(unit, m, chunk);
            for (i, tile) in unit.tiles.clone().enumerate() {
                let rows = plan.rows(tile);
                // SAFETY: the caller vouches for the scratch.
                let sums = unsafe { scratch.add(i).cast::<f32>() };
                let (place, places) =
                    if in_unit { (i, unit.tiles.len()) } else { unit.sweep.unwrap_or((0, 1)) };
                let (prefetch, prefetch_groups) = self.prefetch(b, k, next, place, places);
                let is_last = chunk + 1 == plan.num_chunks;
                let to = if is_last {
                    destination(i)
                } else {
                    Destination { c: sums, c_stride: NR, is_added: false }
                };
                let tile = Tile {
                    a: self
                        .x
                        .as_ptr()
                        .wrapping_add(rows.start * self.x.row_bytes() + first * term_bytes / NR),
                    a_stride: self.x.row_bytes(),
                    b,
                    k,
                    rows: rows.len(),
                    cols: plan.cols(unit.piece).len(),
                    init: if chunk > 0 { sums } else { std::ptr::null() },
                    c: to.c,
                    c_stride: to.c_stride,
                    is_added: to.is_added,
                    prefetch,
                    prefetch_groups,
                };
                // SAFETY: rows, columns and terms lie inside of x and of the panel by the plan; sums from
                // the chunk before are in the scratch; the caller vouches for the destination.
                unsafe { (self.kernel.tile)(&tile) }
            }
        }
    }

    /// The weights that this thread is likely to need after this chunk, and whether the sweep over the
    /// chunk lies inside of the unit.
    fn next_sweep(&self, unit: &Unit, m: usize, chunk: usize) -> (Option<*const u8>, bool) {
        let next_piece = self.plan.piece_start(unit.piece + 1);
        if unit.sweep.is_some() {
            return (next_piece.map(|start| self.weights[m].as_ptr().wrapping_add(start)), false);
        }
        let next = if chunk + 1 < self.plan.num_chunks {
            let bytes = (chunk + 1) * self.plan.chunk * NR * dtype_bytes(self.x.dtype());
            Some(self.piece(m, unit.piece).wrapping_add(bytes))
        } else if m + 1 < N {
            Some(self.piece(m + 1, unit.piece))
        } else {
            next_piece.map(|start| self.weights[0].as_ptr().wrapping_add(start))
        };
        (next, true)
    }

    /// What tile `place` of the `places` that sweep over `b` shall prefetch: address and groups per KR terms.
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
        let step_groups = KR * dtype_bytes(self.x.dtype()) * NR / GROUP_BYTES;
        if places == 1 {
            return (b, 0);
        }
        let groups = step_groups.div_ceil(places);
        match next {
            Some(next) if place * groups < step_groups => {
                (next.wrapping_add(place * groups * (k / KR) * GROUP_BYTES), groups)
            }
            _ => (b, 0),
        }
    }

    fn piece(&self, m: usize, piece: usize) -> *const u8 {
        let start = self.plan.piece_start(piece).expect("a unit's piece is one of the plan's");
        self.weights[m].as_ptr().wrapping_add(start)
    }

    fn padded_k(&self) -> usize {
        self.x.cols().next_multiple_of(KR)
    }

    /// Columns of a piece that are no padding.
    fn valid_cols(&self, piece: usize) -> usize {
        let cols = self.plan.cols(piece);
        self.weights[0].rows().min(cols.end).saturating_sub(cols.start)
    }
}

impl Product<'_, 1> {
    /// `out = x · wᵀ`, or `out += x · wᵀ`; `out: [rows, n]`.
    pub(super) fn write(&self, pool: &ThreadPool, out: &mut [f32], is_added: bool) {
        let n = self.weights[0].rows();
        assert_eq!(out.len(), self.x.rows() * n, "output of {} rows and {n} columns", self.x.rows());
        let out = Output(out.as_mut_ptr());
        for_each_unit(pool, &self.plan, |unit| {
            let mut scratch = Scratch::uninit();
            let scratch = scratch.as_mut_ptr().cast::<Sums>();
            let (col, valid) = (self.plan.cols(unit.piece).start, self.valid_cols(unit.piece));
            let row_of = |i: usize| self.plan.rows(unit.tiles.start + i);
            let is_whole = valid == self.plan.cols(unit.piece).len();
            // SAFETY: a whole piece's destination lies in `out`, by the assertion above, and is this unit's
            // alone; otherwise sums go to the scratch, which has a place for every tile of a unit, and their
            // valid part from there to `out`.
            unsafe {
                self.sweep(&unit, 0, scratch, |i| match is_whole {
                    true => Destination { c: out.at(row_of(i).start * n + col), c_stride: n, is_added },
                    false => Destination { c: scratch.add(i).cast(), c_stride: NR, is_added: false },
                });
                if !is_whole {
                    for i in 0..unit.tiles.len() {
                        for (r, row) in row_of(i).enumerate() {
                            let sums =
                                std::slice::from_raw_parts(scratch.add(i).cast::<f32>().add(r * NR), valid);
                            let out = std::slice::from_raw_parts_mut(out.at(row * n + col), valid);
                            for (out, &sum) in out.iter_mut().zip(sums) {
                                *out = if is_added { *out + sum } else { sum };
                            }
                        }
                    }
                }
            }
        });
    }
}

impl Product<'_, 2> {
    /// `out = silu(x · gateᵀ) ∘ (x · upᵀ)`, where the weights are gate and up; `out: [rows, n]`.
    pub(super) fn write_swiglu(&self, pool: &ThreadPool, out: OperandWriter<'_>) {
        for_each_unit(pool, &self.plan, |unit| {
            let (mut gate, mut up) = (Scratch::uninit(), Scratch::uninit());
            let (gate, up) = (gate.as_mut_ptr().cast::<Sums>(), up.as_mut_ptr().cast::<Sums>());
            let cols = self.plan.cols(unit.piece);
            let valid = self.valid_cols(unit.piece);
            // SAFETY: both scratches have a place for every tile of a unit; the sweeps fill the piece's
            // columns of every row, which are what is read. Rows and valid columns lie inside of `out` and
            // are this unit's alone.
            unsafe {
                for (m, scratch) in [gate, up].into_iter().enumerate() {
                    self.sweep(&unit, m, scratch, |i| Destination {
                        c: scratch.add(i).cast(),
                        c_stride: NR,
                        is_added: false,
                    });
                }
                for i in 0..unit.tiles.len() {
                    for (r, row) in self.plan.rows(unit.tiles.start + i).enumerate() {
                        let gate = gate.add(i).cast::<f32>().add(r * NR);
                        (self.kernel.swiglu)(gate, up.add(i).cast::<f32>().add(r * NR), cols.len());
                        out.write(row, cols.start, std::slice::from_raw_parts(gate, valid));
                    }
                }
            }
        });
    }
}

/// Most threads that a product is dealt out to.
const MAX_SHARES: usize = 256;

/// A share's next unit, on a cache line of its own.
#[repr(align(64))]
struct Next(AtomicUsize);

/// Run every unit of a plan. Each thread has a run of neighbouring units, and when it is through with them
/// helps the others, from their next unit on.
fn for_each_unit(pool: &ThreadPool, plan: &Plan, run: impl Fn(Unit) + Sync) {
    let num_units = plan.num_units();
    let num_shares = plan.num_shares.min(num_units).min(MAX_SHARES);
    if num_shares <= 1 {
        (0..num_units).for_each(|idx| run(plan.unit(idx)));
        return;
    }
    let next: [Next; MAX_SHARES] = std::array::from_fn(|i| {
        Next(AtomicUsize::new(if i < num_shares { share(num_units, num_shares, i).start } else { 0 }))
    });
    pool.for_each(num_shares, |own| {
        for victim in (own..num_shares).chain(0..own) {
            let end = share(num_units, num_shares, victim).end;
            loop {
                // Relaxed: the counter orders nothing but itself, and the pool orders the rest.
                let idx = next[victim].0.fetch_add(1, Ordering::Relaxed);
                if idx >= end {
                    break;
                }
                run(plan.unit(idx));
            }
        }
    });
}

const _: () = assert!(MR * NR * 4 == size_of::<Sums>());
