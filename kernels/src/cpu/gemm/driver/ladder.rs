//! A product with parts of it left out, for who asks what each part takes.

use super::{Input, Product};
use crate::array::Array;
use crate::backend::WeightType;
#[cfg(target_arch = "x86_64")]
use crate::cpu::gemm::avx2;
use crate::cpu::gemm::ceiling::read_all;
use crate::cpu::gemm::plan::{Reading, Unit};
use crate::cpu::gemm::scratch::with_sums;
#[cfg(target_arch = "x86_64")]
use crate::cpu::gemm::tile::Kernel;
use crate::cpu::gemm::tile::NR;
use crate::cpu::pool::ThreadPool;
use crate::cpu::simd::Simd;
use crate::cpu::{Cpu, CpuMatrix, CpuOperand};
use crate::error::{Error, Result};
use std::hint::black_box;

/// How much of a product is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rung {
    /// Panels are read, scales and all.
    Read,
    /// What tiles read of them is unpacked or widened, and not multiplied: to a buffer in L1, or in registers.
    Unpacked,
    /// Tiles multiply zeros in L1 in place of what is widened for all of them, and nothing is widened.
    Zeros,
    /// What is unpacked is multiplied, and sums stay where tiles leave them.
    Multiplied,
    /// They get their last scales and are stored: the whole product.
    Whole,
}

impl Rung {
    /// A word for it.
    pub fn name(self) -> &'static str {
        match self {
            Rung::Read => "read",
            Rung::Unpacked => "unpacked",
            Rung::Zeros => "zeros",
            Rung::Multiplied => "multiplied",
            Rung::Whole => "whole",
        }
    }

    /// Whether all of the product's multiplications are done.
    pub fn multiplies(self) -> bool {
        matches!(self, Rung::Zeros | Rung::Multiplied | Rung::Whole)
    }
}

impl Cpu {
    /// The rungs that a product has, from the bottom up: one with integers on both sides has none.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn rungs(&self, x: &CpuOperand, w: &CpuMatrix) -> Result<&'static [Rung]> {
        Ok(self.product(x, w)?.rungs())
    }

    /// [`matmul`](crate::Backend::matmul) as far as a rung, to measure what its parts take; the whole one alone writes `out`.
    ///
    /// # Errors
    /// Shapes that do not fit; a rung that this product does not have, see [`Cpu::rungs`].
    pub fn climb(&self, x: &CpuOperand, w: &CpuMatrix, rung: Rung, out: &mut Array) -> Result<()> {
        let product = self.product(x, w)?;
        if !product.rungs().contains(&rung) {
            let (rows, kind, rung) = (x.rows(), w.0.kind().name(), rung.name());
            let what = format!("no rung {rung:?} for a product of {rows} rows with weights in {kind}");
            return Err(Error::Unsupported(what));
        }
        out.reshape(x.rows(), w.0.rows());
        product.climb(&self.pool, rung, out.values_mut());
        Ok(())
    }

    fn product<'a>(&self, x: &'a CpuOperand, w: &'a CpuMatrix) -> Result<Product<'a, 1>> {
        self.check_operands("climb", x, [("w", w)])?;
        Ok(Product::new(self.simd, &self.pool, Input { numbers: &x.0, integers: None }, [&w.0]))
    }
}

impl Product<'_, 1> {
    /// As [`Cpu::rungs`].
    pub(in crate::cpu::gemm) fn rungs(&self) -> &'static [Rung] {
        use Rung::{Multiplied, Read, Unpacked, Whole, Zeros};
        match self.kind {
            WeightType::Int8 => &[],
            _ if self.shares_widened() => &[Read, Unpacked, Zeros, Multiplied, Whole],
            _ if self.unpacks() => &[Read, Unpacked, Multiplied, Whole],
            _ => &[Read, Multiplied, Whole],
        }
    }

    /// Whether chunks of weights are unpacked for tiles, or by tiles that can do it and nothing else.
    fn unpacks(&self) -> bool {
        match self.plan.reading {
            Reading::Unpacked => true,
            Reading::Panels => self.simd == Simd::Avx2 && self.kind != WeightType::F32,
            Reading::Widened => self.shares_widened(),
        }
    }

    /// The product as far as a rung that it has; `out: [rows, n]`, which the whole one alone writes.
    pub(in crate::cpu::gemm) fn climb(self, pool: &ThreadPool, rung: Rung, out: &mut [f32]) {
        assert!(self.rungs().contains(&rung), "{:?} of {} rows", self.kind, self.x.numbers.rows());
        match rung {
            Rung::Read => self.read_panels(pool),
            Rung::Unpacked => self.unpack(pool),
            Rung::Zeros => self.multiply_zeros(pool),
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
            Reading::Panels => self.with_unpacking_tiles().multiply(pool),
            Reading::Widened => self.widen(pool),
        }
    }

    /// Runs every unit's tiles, and leaves their sums in the scratch.
    fn multiply(&self, pool: &ThreadPool) {
        self.for_each_unit(pool, |unit| {
            // SAFETY: the scratch has a place for every tile of a unit.
            with_sums(self.unit_sums(), |scratch| unsafe { self.sweep_to_scratch(&unit, 0, scratch) });
        });
    }
}

#[cfg(target_arch = "x86_64")]
impl Product<'_, 1> {
    /// Whether tiles share what is widened for them.
    fn shares_widened(&self) -> bool {
        self.plan.reading == Reading::Widened && self.is_widened(&self.plan.unit(0))
    }

    /// The same product with tiles that multiply nothing.
    fn with_unpacking_tiles(self) -> Self {
        assert_eq!(self.simd, Simd::Avx2, "no other level unpacks in registers");
        Self { kernel: Kernel { tile: avx2::unpacking_tile(self.kind), ..self.kernel }, ..self }
    }
}

/// Other levels unpack to a buffer, or nothing.
#[cfg(not(target_arch = "x86_64"))]
impl Product<'_, 1> {
    fn shares_widened(&self) -> bool {
        false
    }

    fn with_unpacking_tiles(self) -> Self {
        unreachable!("no tile unpacks in registers")
    }

    fn widen(&self, _: &ThreadPool) {
        unreachable!("nothing is widened")
    }

    fn multiply_zeros(&self, _: &ThreadPool) {
        unreachable!("nothing is widened")
    }
}
