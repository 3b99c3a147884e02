//! Where a product's results go: to an output, to sums that are gone on with, to the largest of each row, gated to another
//! product's x.

use super::{Destination, Output, Product, deal};
use crate::backend::WeightType;
use crate::cpu::gemm::argmax::{MeetTile, RowBest};
use crate::cpu::gemm::operand::OperandWriter;
use crate::cpu::gemm::plan::{Reading, Unit};
use crate::cpu::gemm::scales::Finish;
use crate::cpu::gemm::scratch::with_sums;
use crate::cpu::lanes::at_level;
use crate::cpu::pool::ThreadPool;

impl Product<'_, 1> {
    /// Goes on with `out`, the sums over terms before the first, without scales that come last; `out: [rows, n]`.
    pub(in crate::cpu::gemm) fn go_on(mut self, pool: &ThreadPool, out: &mut [f32]) {
        let (rows, n) = (self.x.numbers.rows(), self.weights[0].rows());
        assert_eq!(out.len(), rows * n, "sums of {rows} rows and {n} columns");
        self.is_begun = true;
        let out = Output(out.as_mut_ptr());
        self.for_each_unit(pool, |unit| {
            with_sums(self.unit_sums(), |scratch| {
                // SAFETY: the valid part of a unit's tiles lies in `out`, by the assertion above, and is this unit's
                // alone; the scratch has a place for every tile of a unit, and is initialised.
                unsafe {
                    let each = |copy: &dyn Fn(*mut f32, *mut f32, usize)| {
                        self.for_each_row(&unit, |row, piece, place| {
                            let (col, valid) = (self.plan.cols(piece).start, self.valid_cols(piece));
                            copy(scratch.add(place), out.at(row * n + col), valid);
                        });
                    };
                    each(&|sums, out, valid| std::ptr::copy_nonoverlapping(out, sums, valid));
                    self.sweep_to_scratch(&unit, 0, scratch);
                    each(&|sums, out, valid| std::ptr::copy_nonoverlapping(sums, out, valid));
                }
            });
        });
    }

    /// `out = x · wᵀ`, or `out += x · wᵀ`; `out: [rows, n]`.
    pub(in crate::cpu::gemm) fn write(&self, pool: &ThreadPool, out: &mut [f32], is_added: bool) {
        let out = self.output(out);
        // SAFETY: the output was measured, and units are disjoint.
        self.for_each_unit(pool, |unit| unsafe { self.write_unit(&unit, out, is_added) });
    }

    /// `out = x · wᵀ` of each product, in one region; of one number type, `out: [rows, n]` each.
    pub(in crate::cpu::gemm) fn write_each<const P: usize>(
        pool: &ThreadPool,
        products: &[Self; P],
        mut out: [&mut [f32]; P],
    ) {
        let out: [Output; P] = std::array::from_fn(|i| products[i].output(out[i]));
        let num_units = products.iter().map(|product| product.plan.num_units()).sum();
        let num_shares = products.iter().map(|product| product.plan.num_shares).max().unwrap_or(0);
        deal(
            pool,
            num_units,
            num_shares,
            || products[0].registers(),
            |mut idx| {
                for (product, out) in products.iter().zip(out) {
                    if idx < product.plan.num_units() {
                        // SAFETY: the output was measured, and units are disjoint.
                        return unsafe { product.write_unit(&product.plan.unit(idx), out, false) };
                    }
                    idx -= product.plan.num_units();
                }
            },
        );
    }

    /// Where results go, which has room for all of them.
    fn output(&self, out: &mut [f32]) -> Output {
        let (rows, n) = (self.x.numbers.rows(), self.weights[0].rows());
        assert_eq!(out.len(), rows * n, "output of {rows} rows and {n} columns");
        Output(out.as_mut_ptr())
    }

    /// The results of a unit.
    ///
    /// # Safety
    /// `out` has room for `[rows, n]`, and nobody else uses the unit's part of it.
    unsafe fn write_unit(&self, unit: &Unit, out: Output, is_added: bool) {
        #[cfg(target_arch = "x86_64")]
        if self.kernel.geometry.is_amx && self.kind == WeightType::Int8 {
            // SAFETY: the caller's.
            return unsafe { self.write_unit_in_blocks(unit, out, is_added) };
        }
        let n = self.weights[0].rows();
        let is_whole = |piece| self.valid_cols(piece) == self.plan.cols(piece).len();
        let is_direct = self.is_plain() && unit.pieces.clone().all(is_whole);
        with_sums(self.unit_sums(), |scratch| {
            // SAFETY: a whole piece's destination lies in `out`, and is this unit's alone; otherwise sums go to
            // the scratch, which has a place for every tile of a unit, and their valid part from there to `out`.
            unsafe {
                if is_direct {
                    return self.sweep(unit, 0, scratch, |piece, tile| Destination {
                        c: out.at(self.plan.rows(tile).start * n + self.plan.cols(piece).start),
                        c_stride: n,
                        is_added,
                    });
                }
                self.sweep_to_scratch(unit, 0, scratch);
                self.for_each_row(unit, |row, piece, place| {
                    let (sums, cols) = (scratch.add(place), self.valid_cols(piece));
                    let scales = self.last_scales(0, piece);
                    let out = out.at(row * n + self.plan.cols(piece).start);
                    at_level(self.simd, Finish { sums, scales, out, is_added, cols });
                });
            }
        });
    }

    /// The largest entry of every row of `x · wᵀ`, which is stored nowhere; `best: [rows]`.
    pub(in crate::cpu::gemm) fn find_largest(&self, pool: &ThreadPool, best: &[RowBest]) {
        assert_eq!(best.len(), self.x.numbers.rows(), "a place for every row");
        self.for_each_unit(pool, |unit| {
            with_sums(self.unit_sums(), |scratch| {
                // SAFETY: the scratch has a place for every tile of a unit, and the sweep fills the pieces' columns of
                // every row, which are what is read.
                unsafe {
                    self.sweep_to_scratch(&unit, 0, scratch);
                    self.for_each_row(&unit, |_, piece, place| {
                        let scales = self.last_scales(0, piece);
                        if !scales.is_null() {
                            let (sums, cols) = (scratch.add(place), self.valid_cols(piece));
                            let finish = Finish { sums, scales, out: sums, is_added: false, cols };
                            at_level(self.simd, finish);
                        }
                    });
                    for (piece, tile) in unit.tiles_of_pieces() {
                        let sums = scratch.add(self.place(&unit, piece, tile)).cast_const();
                        let (first, cols) = (self.plan.cols(piece).start, self.valid_cols(piece));
                        let (stride, best) = (self.kernel.geometry.strip, &best[self.plan.rows(tile)]);
                        at_level(self.simd, MeetTile { sums, stride, cols, first, best });
                    }
                }
            });
        });
    }
}

impl Product<'_, 2> {
    /// `out = silu(x · gateᵀ) ∘ (x · upᵀ)`, where the weights are gate and up; `out: [rows, n]`.
    pub(in crate::cpu::gemm) fn write_swiglu(&self, pool: &ThreadPool, out: OperandWriter<'_>) {
        #[cfg(target_arch = "x86_64")]
        if self.kernel.geometry.is_amx && self.plan.reading == Reading::Panels {
            return self.write_swiglu_blocks(pool, out);
        }
        self.for_each_unit(pool, |unit| {
            with_sums(2 * self.unit_sums(), |scratch| {
                let scratches = [scratch, scratch.wrapping_add(self.unit_sums())];
                // SAFETY: both scratches have a place for every tile of a unit; the sweeps fill the pieces' columns
                // of every row, which are what is read. Rows and valid columns lie inside of `out` and are this
                // unit's alone.
                unsafe {
                    for (m, scratch) in scratches.into_iter().enumerate() {
                        self.sweep_to_scratch(&unit, m, scratch);
                    }
                    self.for_each_row(&unit, |row, piece, place| {
                        let cols = self.plan.cols(piece);
                        let [gate, up] = scratches.map(|scratch| scratch.add(place));
                        for (m, sums) in [gate, up].into_iter().enumerate() {
                            let scales = self.last_scales(m, piece);
                            if !scales.is_null() {
                                let (out, cols) = (sums, cols.len());
                                let finish = Finish { sums, scales, out, is_added: false, cols };
                                at_level(self.simd, finish);
                            }
                        }
                        (self.kernel.swiglu)(gate, up, cols.len());
                        out.write(row, cols.start, std::slice::from_raw_parts(gate, self.valid_cols(piece)));
                    });
                }
            });
        });
    }
}
