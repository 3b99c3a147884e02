//! A product of few rows with parts of it left out, for who asks what each part takes.

use super::Product;
use crate::backend::WeightType;
use crate::cpu::gemm::ceiling::read_all;
use crate::cpu::gemm::plan::{Reading, Unit};
use crate::cpu::gemm::scratch::with_sums;
use crate::cpu::gemm::tile::NR;
use crate::cpu::pool::ThreadPool;
#[cfg(target_arch = "x86_64")]
use crate::cpu::{gemm::avx2, gemm::tile::Kernel, simd::Simd};
use std::hint::black_box;

/// How much of a product with narrow weights is done, a part more with each rung.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rung {
    /// Panels are read, scales and all.
    Read,
    /// What tiles read of them is unpacked: at levels without a tile that unpacks in registers, to a buffer in L1.
    Unpacked,
    /// It is multiplied, and sums stay where tiles leave them.
    Multiplied,
    /// They get their last scales and are stored: the whole product.
    Whole,
}

impl Rung {
    /// All of them, in order.
    pub const ALL: [Rung; 4] = [Rung::Read, Rung::Unpacked, Rung::Multiplied, Rung::Whole];

    /// A word for it.
    pub fn name(self) -> &'static str {
        match self {
            Rung::Read => "read",
            Rung::Unpacked => "unpacked",
            Rung::Multiplied => "multiplied",
            Rung::Whole => "whole",
        }
    }
}

impl Product<'_, 1> {
    /// Whether there are rungs: narrow weights, and rows that one tile has.
    pub(in crate::cpu::gemm) fn has_rungs(&self) -> bool {
        let is_narrow = matches!(self.kind, WeightType::Int8Weight | WeightType::Int4Weight);
        is_narrow && self.plan.reading != Reading::Widened
    }

    /// The product as far as a rung; `out: [rows, n]`, which the whole one alone writes.
    pub(in crate::cpu::gemm) fn climb(self, pool: &ThreadPool, rung: Rung, out: &mut [f32]) {
        assert!(self.has_rungs(), "{:?} of {} rows", self.kind, self.x.numbers.rows());
        match rung {
            Rung::Read => self.read_panels(pool),
            Rung::Unpacked => self.unpack(pool),
            Rung::Multiplied => self.multiply(pool),
            Rung::Whole => self.write(pool, out, false),
        }
    }

    /// Reads all panels, by as many threads as the product has.
    fn read_panels(&self, pool: &ThreadPool) {
        let (panels, num_panels) = (self.weights[0].panels(), self.weights[0].rows().div_ceil(NR));
        let bytes = panels.len() / num_panels.max(1);
        super::deal(
            pool,
            num_panels,
            self.plan.num_shares,
            || (),
            |panel| {
                black_box(read_all(self.simd, &panels[panel * bytes..][..bytes]));
            },
        );
    }

    /// Has every unit's weights unpacked.
    fn unpack(self, pool: &ThreadPool) {
        match self.plan.reading {
            // Without tiles nothing else is done.
            Reading::Unpacked => self.for_each_unit(pool, |unit| {
                // SAFETY: no tile has sums.
                unsafe { self.sweep_unpacked(&Unit { tiles: 0..0, ..unit }, 0, std::ptr::null_mut()) }
            }),
            Reading::Panels | Reading::Widened => self.with_unpacking_tiles().multiply(pool),
        }
    }

    /// The same product with tiles that multiply nothing.
    #[cfg(target_arch = "x86_64")]
    fn with_unpacking_tiles(self) -> Self {
        assert_eq!(self.simd, Simd::Avx2, "no other level unpacks in registers");
        let tile = avx2::unpacking_tile(self.kind == WeightType::Int4Weight);
        Self { kernel: Kernel { tile, ..self.kernel }, ..self }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn with_unpacking_tiles(self) -> Self {
        unreachable!("this level has no tile that unpacks in registers")
    }

    /// Runs every unit's tiles, and leaves their sums in the scratch.
    fn multiply(&self, pool: &ThreadPool) {
        self.for_each_unit(pool, |unit| {
            // SAFETY: the scratch has a place for every tile of a unit.
            with_sums(self.unit_sums(), |scratch| unsafe { self.sweep_to_scratch(&unit, 0, scratch) });
        });
    }
}
