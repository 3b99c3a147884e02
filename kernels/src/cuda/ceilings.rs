//! What a GPU can do at most, measured: the yardstick for the speed of steps.
//!
//! Work is made larger until it takes so long that starting it is nothing beside it.

use super::Cuda;
use super::stopwatch::{Effort, Stopwatch};
use super::stream::Memory;
use crate::backend::Backend;
use crate::error::Result;
use crate::tensor_view::{TensorView, ViewDtype};

/// Work that takes this long was large enough: a launch takes some microseconds.
const ENOUGH_SECONDS: f64 = 0.005;
/// Largest matrix, at which products are as fast as they get.
const MOST_ROWS: usize = 8192;
/// Work that is long enough by itself.
const REPEATS: Effort = Effort { samples: 3, calls: 1 };
/// Smallest and largest memory that is copied.
const LEAST_BYTES: usize = 1 << 20;
const MOST_BYTES: usize = 2 << 30;

impl Cuda {
    /// Multiplications and additions a second of the fastest product with weights of its type, of square matrices of numbers without a pattern:
    /// zeros take less power, and are faster than anything real.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn product_flops(&self) -> Result<f64> {
        let mut best = 0.0;
        for rows in
            std::iter::successors(Some(128), |rows| Some(2 * rows)).take_while(|rows| *rows <= MOST_ROWS)
        {
            let (seconds, flops) = self.product(rows)?;
            best = f64::max(best, flops / seconds);
            if seconds >= ENOUGH_SECONDS {
                break;
            }
        }
        Ok(best)
    }

    /// Time and operations of one product.
    fn product(&self, rows: usize) -> Result<(f64, f64)> {
        let numbers = without_pattern(rows * rows);
        let view = TensorView::new(ViewDtype::Bf16, rows, rows, bytemuck::cast_slice(&numbers));
        let ones = self.vector(TensorView::new(ViewDtype::Bf16, 1, rows, &[0x80, 0x3f].repeat(rows)))?;
        let (w, table) = (self.matrix(view)?, self.table(view)?);
        let (mut x, mut normed, mut out) = (self.array(), self.operand(), self.array());
        let tokens: Vec<u32> = (0..rows as u32).collect();
        self.embed(&table, &tokens, &mut x)?;
        self.rms_norm(&x, &ones, 1e-6, &mut normed)?;
        let seconds = self.best_of(|| self.matmul(&normed, &w, &mut out))?;
        Ok((seconds, 2.0 * (rows as f64).powi(3)))
    }

    /// Bytes a second that a copy on the device reads and writes, together.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn copy_bandwidth(&self) -> Result<f64> {
        let most = MOST_BYTES.min(self.stream.free_bytes()? / 8);
        let (mut from, mut to) = (Memory::none(&self.stream), Memory::none(&self.stream));
        let mut best = 0.0;
        for bytes in std::iter::successors(Some(LEAST_BYTES), |bytes| Some(2 * bytes)) {
            if bytes > most.max(LEAST_BYTES) {
                break;
            }
            from.reserve("measure", bytes)?;
            to.reserve("measure", bytes)?;
            self.stream.clear("measure", &mut from)?;
            let seconds = self.best_of(|| self.stream.copy("measure", &from, &to, bytes))?;
            best = f64::max(best, 2.0 * bytes as f64 / seconds);
            if seconds >= ENOUGH_SECONDS {
                break;
            }
        }
        Ok(best)
    }

    /// The shortest time of some queued work, after one that is not counted.
    fn best_of(&self, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
        work()?;
        Stopwatch::new(&Memory::none(&self.stream))?.seconds(REPEATS, work)
    }
}

/// Numbers in bf16 between -2 and 2.
fn without_pattern(count: usize) -> Vec<u16> {
    let mut state = 1u32;
    let mut next = || {
        // Knuth's linear congruential generator (MMIX's is of 64 bits; this is Numerical Recipes' of 32).
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let (sign, fraction) = (state >> 31, state >> 24 & 0x7f);
        (sign << 15 | 0x3f80 | fraction) as u16
    };
    (0..count).map(|_| next()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_without_a_pattern_are_of_both_signs_and_of_no_special_kind() {
        let numbers: Vec<f32> =
            without_pattern(1000).into_iter().map(|bits| f32::from_bits(u32::from(bits) << 16)).collect();
        assert!(numbers.iter().all(|x| (1.0..2.0).contains(&x.abs())));
        let negative = numbers.iter().filter(|x| **x < 0.0).count();
        assert!((400..600).contains(&negative), "{negative}");
    }
}
