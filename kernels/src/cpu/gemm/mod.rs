//! Matrix products of activations with packed weights.
//!
//! * `operand`: x, row-major, in the number type of the product; `pack`: w, in panels, in the
//!   memory of `arena`;
//! * `plan`: how a product is cut into units of work; `driver`: carries it out on the pool;
//! * `tile`: what a SIMD level computes in registers; `avx512`, `avx2`, `portable` (`narrow` serves the
//!   latter two);
//! * `ceiling`: what the machine can do at most, to measure products against.
//!
//! An element of the result is the sum over K in order, in one f32 chain that starts at zero. So it depends
//! on its row of x and its row of w alone, to the bit: not on how many rows there are, on the number of
//! threads, or on how the work was cut. SIMD levels may differ from each other.
//!
//! Shapes are the caller's to check; here they are asserted at most.

mod arena;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod ceiling;
mod driver;
mod narrow;
mod operand;
mod pack;
mod plan;
mod portable;
mod round;
#[cfg(test)]
mod tests;
mod tile;

pub use ceiling::Ceilings;
pub(crate) use operand::{Operand, OperandWriter};
pub(crate) use pack::PackedMatrix;

use super::pool::ThreadPool;
use super::simd::Simd;
use driver::Product;

/// `out = x · wᵀ`, or with `accumulate` `out += x · wᵀ`, where the product is summed first and then added.
///
/// `x: [rows, k]`, `w: [n, k]`, `out: [rows, n]`; x and w are of one number type.
pub(crate) fn matmul(
    simd: Simd,
    pool: &ThreadPool,
    x: &Operand,
    w: &PackedMatrix,
    out: &mut [f32],
    accumulate: bool,
) {
    Product::new(simd, pool, x, [w]).write(pool, out, accumulate);
}

/// `out = silu(x · gateᵀ) ∘ (x · upᵀ)`, where `silu(g) = g / (1 + exp(-g))`; sets the shape of `out`.
///
/// `x: [rows, k]`, `gate, up: [width, k]`, `out: [rows, width]`; x, gate and up are of one number type.
pub(crate) fn swiglu(
    simd: Simd,
    pool: &ThreadPool,
    x: &Operand,
    gate: &PackedMatrix,
    up: &PackedMatrix,
    out: &mut Operand,
) {
    out.reset(x.rows(), gate.rows());
    Product::new(simd, pool, x, [gate, up]).write_swiglu(pool, out.writer());
}
