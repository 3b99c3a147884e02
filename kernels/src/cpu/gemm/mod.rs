//! Matrix products of activations with packed weights.
//!
//! * `operand`: x, row-major, in the number type of the product, or in f32 at levels that multiply bf16 as such, `integers`: x
//!   quantised; `pack`: w, in panels, in the memory of `arena`, `quantized`: narrow weights;
//! * `plan`: how a product is cut into units of work, by a `budget` of the caches; `driver`: carries it out on the pool, with `scratch` for sums
//!   that wait;
//! * `unpack`, `zeros` and `scales`: narrow weights made ready for the tiles, and their sums scaled;
//! * `argmax`: the largest sum of a row, where no other is wanted;
//! * `tile`: what a SIMD level computes in registers; `amx`, `avx512`, `avx2`, `portable` (`narrow` serves the
//!   latter two); in AVX2 many rows share what `driver/widened` makes of weights;
//! * `ceiling`: what the machine can do at most, to measure products against.
//!
//! An element of the result is the sum over K in order, in one f32 chain that starts at zero. So it depends
//! on its row of x and its row of w alone, to the bit: not on how many rows there are, on the number of
//! threads, or on how the work was cut. SIMD levels may differ from each other.
//!
//! With integers of 8 bits on both sides the sum over each block of K is exact, and blocks, each times its scales, are
//! added in order; so all levels agree. With narrow weights alone a sum over K, or for 4 bits over a group of K, is that of integers
//! in bf16; the groups' sums, each times its scale, are added in order.
//!
//! Shapes and types are the caller's to check, by `fit` above all; here they are asserted at most.

#[cfg(target_arch = "x86_64")]
mod amx;
mod arena;
mod argmax;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod budget;
mod ceiling;
mod driver;
mod fit;
mod integers;
mod narrow;
mod operand;
mod pack;
mod plan;
mod portable;
mod quantized;
mod round;
mod scales;
mod scratch;
#[cfg(test)]
mod tests;
mod tile;
mod unpack;
mod zeros;

#[cfg(target_arch = "x86_64")]
pub(crate) use amx::Registers;
pub(crate) use argmax::RowBest;
pub use ceiling::Ceilings;
pub use driver::Rung;
pub(crate) use fit::{check_gated, check_operands};
pub(crate) use operand::{Operand, OperandWriter};
pub(crate) use pack::{PackedMatrix, packed_bytes};

use super::pool::ThreadPool;
use super::simd::Simd;
use crate::backend::WeightType;
use driver::{Input, Product};

/// `out = x · wᵀ`, or with `accumulate` `out += x · wᵀ`, where the product is summed first and then added.
///
/// `x: [rows, k]`, `w: [n, k]`, `out: [rows, n]`; x is of the type that inputs have beside w's.
pub(crate) fn matmul(
    simd: Simd,
    pool: &ThreadPool,
    x: &Operand,
    w: &PackedMatrix,
    out: &mut [f32],
    accumulate: bool,
) {
    with_input(simd, pool, x, w.kind(), |x| Product::new(simd, pool, x, [w]).write(pool, out, accumulate));
}

/// `out = x · wᵀ` for each of some matrices of one type, in one region.
pub(crate) fn matmul_each<const N: usize>(
    simd: Simd,
    pool: &ThreadPool,
    x: &Operand,
    w: [&PackedMatrix; N],
    out: [&mut [f32]; N],
) {
    debug_assert!(w.iter().all(|other| other.kind() == w[0].kind()));
    with_input(simd, pool, x, w[0].kind(), |x| {
        Product::write_each(pool, &w.map(|w| Product::new(simd, pool, x, [w])), out);
    });
}

/// The largest entry of every row of `x · wᵀ`, the lowest index where several are equal; `best: [rows]`, new.
pub(crate) fn argmax(simd: Simd, pool: &ThreadPool, x: &Operand, w: &PackedMatrix, best: &[RowBest]) {
    with_input(simd, pool, x, w.kind(), |x| Product::new(simd, pool, x, [w]).find_largest(pool, best));
}

/// Goes on with the sums of a product over columns before those of w, which `sums` holds, in the order of K; with
/// scales for whole columns the product is summed first and then added.
///
/// `x: [rows, k]`, `w: [n, k]`, `sums: [rows, n]`; x is of the type that inputs have beside w's.
pub(crate) fn matmul_onto(simd: Simd, pool: &ThreadPool, x: &Operand, w: &PackedMatrix, sums: &mut [f32]) {
    match w.kind() {
        WeightType::F32 | WeightType::Bf16 | WeightType::Int8 | WeightType::Int4Weight => {
            with_input(simd, pool, x, w.kind(), |x| Product::new(simd, pool, x, [w]).go_on(pool, sums));
        }
        WeightType::Fp8 | WeightType::Int8Weight => matmul(simd, pool, x, w, sums, true),
    }
}

/// `out = silu(x · gateᵀ) ∘ (x · upᵀ)`, where `silu(g) = g / (1 + exp(-g))`; sets the shape of `out`.
///
/// `x: [rows, k]`, `gate, up: [width, k]`, `out: [rows, width]`; gate and up are of one type, x of the type that
/// inputs have beside it.
pub(crate) fn swiglu(
    simd: Simd,
    pool: &ThreadPool,
    x: &Operand,
    gate: &PackedMatrix,
    up: &PackedMatrix,
    out: &mut Operand,
) {
    out.reset(x.rows(), gate.rows());
    with_input(simd, pool, x, gate.kind(), |x| {
        Product::new(simd, pool, x, [gate, up]).write_swiglu(pool, out.writer(simd));
    });
}

/// Calls `run` with x as products with weights of `kind` read it.
fn with_input(simd: Simd, pool: &ThreadPool, x: &Operand, kind: WeightType, run: impl FnOnce(Input<'_>)) {
    debug_assert_eq!(x.dtype(), kind.operands());
    if kind == WeightType::Int8 {
        run(Input { numbers: x, integers: Some(&x.integers(simd, pool)) });
    } else {
        run(Input { numbers: x, integers: None });
    }
}
