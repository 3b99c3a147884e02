//! Root mean square norm of rows, written as matmul input.

use std::ops::Range;

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
    let writer = out.row_writer(simd);
    for_each_chunk(pool, x.rows(), x.cols(), |rows| {
        // SAFETY: the device has its level, and a chunk's rows are this task's alone.
        unsafe { at_level(simd, NormRows { x, weight, eps, rows, writer }) }
    });
    Ok(())
}

struct NormRows<'a> {
    x: &'a Array,
    weight: &'a [f32],
    eps: f32,
    rows: Range<usize>,
    writer: OperandWriter<'a>,
}

impl Kernel for NormRows<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let mut buffer = [0.0; CHUNK];
        for t in self.rows {
            let row = self.x.row(t);
            // SAFETY: the features are the caller's to vouch for, and this task alone writes row t.
            unsafe {
                let mean_square = sum_of_squares::<L>(row) / row.len() as f32;
                let scale = 1.0 / (mean_square + self.eps).sqrt();
                for (chunk, (x, weight)) in row.chunks(CHUNK).zip(self.weight.chunks(CHUNK)).enumerate() {
                    scale_into::<L>(x, weight, scale, &mut buffer);
                    self.writer.write(t, chunk * CHUNK, &buffer[..x.len()]);
                }
                self.writer.finish_row(t);
            }
        }
    }
}

/// `out = x * scale ∘ weight`
///
/// # Safety
/// The processor has the features of `L`.
#[inline(always)]
unsafe fn scale_into<L: Lanes>(x: &[f32], weight: &[f32], scale: f32, out: &mut [f32; CHUNK]) {
    assert!(x.len() == weight.len() && x.len() <= CHUNK);
    let (x_at, weight_at, out_at) = (x.as_ptr(), weight.as_ptr(), out.as_mut_ptr());
    let whole = x.len() / L::LANES * L::LANES;
    // SAFETY: the features are the caller's; all three hold `x.len()` numbers.
    unsafe {
        let scale = L::splat(scale);
        let mut i = 0;
        while i < whole {
            L::load(x_at.add(i)).mul(scale).mul(L::load(weight_at.add(i))).store(out_at.add(i));
            i += L::LANES;
        }
        let left = x.len() - whole;
        let (x, weight) = (L::load_first(x_at.add(i), left), L::load_first(weight_at.add(i), left));
        x.mul(scale).mul(weight).store_first(out_at.add(i), left);
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
