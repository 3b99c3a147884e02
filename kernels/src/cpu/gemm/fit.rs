//! Whether the operands of a product belong to each other and to a level: kernels find numbers by what they take for granted of
//! both.

use super::operand::{Numbers, Operand};
use super::pack::{PackedMatrix, packing_name};
use super::tile::Geometry;
use crate::backend::WeightType;
use crate::check;
use crate::cpu::simd::Simd;
use crate::error::Result;

/// x and some matrices, each with its name, are what a product of x with all of them reads at a level.
///
/// # Errors
/// Columns, number types or layouts that do not fit, as those of another device's operands may not.
pub(crate) fn check_operands<const N: usize>(
    op: &'static str,
    simd: Simd,
    x: &Operand,
    weights: [(&'static str, &PackedMatrix); N],
) -> Result<()> {
    let kind = weights[0].1.kind();
    check::kind(op, ("x", "type"), [x.numbers(), Numbers::beside(simd, kind)], Numbers::name)?;
    let strip = Geometry::new(simd, kind).strip;
    for (name, w) in weights {
        check::shape(op, "x's columns", [x.cols()], [w.cols()])?;
        check::kind(op, (name, "type"), [w.kind(), kind], WeightType::name)?;
        check::kind(op, (name, "packing"), [w.strip(), strip], packing_name)?;
    }
    Ok(())
}

/// An operand is what a level's products with such weights write, which are gated to the next one's x.
///
/// # Errors
/// Another number type, or another width of it.
pub(crate) fn check_gated(op: &'static str, simd: Simd, kind: WeightType, out: &Operand) -> Result<()> {
    check::kind(op, ("out", "type"), [out.numbers(), Numbers::beside(simd, kind)], Numbers::name)
}
