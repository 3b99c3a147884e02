//! Root mean square norm of rows, written as matmul input.

use crate::array::Array;
use crate::check;
use crate::cpu::gemm::{Operand, OperandWriter};
use crate::cpu::lanes::{Kernel, Lanes, at_level};
use crate::cpu::pool::ThreadPool;
use crate::cpu::rows::for_each_chunk;
use crate::cpu::simd::Simd;
use crate::error::Result;

/// Numbers normed before they are handed to the operand: 2 KiB, which stays in L1 beside x and the weight.
const CHUNK: usize = 512;

/// `out[t] = x[t] / sqrt(mean(x[t]²) + eps) ∘ weight`
pub(crate) fn rms_norm(
    simd: Simd,
    pool: &ThreadPool,
    x: &Array,
    weight: &[f32],
    eps: f32,
    out: &mut Operand,
) -> Result<()> {
    check::shape("rms_norm", "weight", [weight.len()], [x.cols()])?;
    out.reset(x.rows(), x.cols());
    let writer = out.writer();
    for_each_chunk(pool, x.rows(), x.cols(), |rows| {
        for t in rows {
            at_level(simd, NormRow { row: x.row(t), weight, eps, t, writer });
        }
    });
    Ok(())
}

struct NormRow<'a> {
    row: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    t: usize,
    writer: OperandWriter<'a>,
}

impl Kernel for NormRow<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let (x, weight) = (self.row.as_ptr(), self.weight.as_ptr());
        let mut buffer = [0.0; CHUNK];
        // SAFETY: the features are the caller's to vouch for; x and the weight have `row.len()` numbers, the
        // buffer holds a chunk, and this task alone writes row t.
        unsafe {
            let mean_square = sum_of_squares::<L>(self.row) / self.row.len() as f32;
            let scale = L::splat(1.0 / (mean_square + self.eps).sqrt());
            for first in (0..self.row.len()).step_by(CHUNK) {
                let count = CHUNK.min(self.row.len() - first);
                let mut i = 0;
                while i < count {
                    let n = (count - i).min(L::LANES);
                    let normed = L::load_first(x.add(first + i), n).mul(scale);
                    let weight = L::load_first(weight.add(first + i), n);
                    normed.mul(weight).store(buffer.as_mut_ptr().add(i));
                    i += L::LANES;
                }
                self.writer.write(self.t, first, &buffer[..count]);
            }
        }
    }
}

/// Σ x², in four chains per lane so that the latency of an addition is hidden.
///
/// # Safety
/// The processor has the features of `L`.
#[inline(always)]
unsafe fn sum_of_squares<L: Lanes>(x: &[f32]) -> f32 {
    const CHAINS: usize = 4;
    let at = x.as_ptr();
    // SAFETY: the features are the caller's; loads end at `x.len()`.
    unsafe {
        let mut sums = [L::splat(0.0); CHAINS];
        let mut i = 0;
        while i + CHAINS * L::LANES <= x.len() {
            for (chain, sum) in sums.iter_mut().enumerate() {
                let x = L::load(at.add(i + chain * L::LANES));
                *sum = x.mul_add(x, *sum);
            }
            i += CHAINS * L::LANES;
        }
        while i < x.len() {
            let x = L::load_first(at.add(i), (x.len() - i).min(L::LANES));
            sums[0] = x.mul_add(x, sums[0]);
            i += L::LANES;
        }
        sums[0].add(sums[1]).add(sums[2].add(sums[3])).sum()
    }
}
