//! What blocks cost, so that spans can be cut before anything was measured.
//!
//! [`flops`] is what `run` cuts by: one number a block. [`Estimator`] tells seconds and bytes of every piece on
//! one rank of a stage, from a device's [`Roofline`]: pure functions of shapes, always an estimate, never a
//! measurement.

mod estimate;
mod pieces;
mod roofline;

use crate::config::ModelConfig;

pub use estimate::{Balance, Estimator, StageSeconds, activation_bytes, hop_bytes};
pub use pieces::{PieceShape, pieces};
pub use roofline::{Channel, NumberType, NumberTypes, Roofline};
pub use scheduler::Load;

/// Context length at which attention is charged where the job's own is not known: prompts of a few
/// hundred tokens with answers alike.
const TYPICAL_CONTEXT: u64 = 512;

/// Costs of a model's parts in one unit.
#[derive(Debug, Clone, PartialEq)]
pub struct Costs {
    /// Of each block, in order.
    pub blocks: Vec<f64>,
    /// Of what the first stage does beside its blocks.
    pub first: f64,
    /// Of what the last stage does beside its blocks.
    pub last: f64,
}

/// Floating-point operations for one generated token at a typical context.
///
/// The embedding is a copy and costs none; the output matrix is charged in full, as in a job that mostly
/// decodes.
pub fn flops(config: &ModelConfig) -> Costs {
    let dims = config.dims;
    let blocks = (config.blocks.iter())
        .map(|block| block.flops_per_token(dims) + TYPICAL_CONTEXT * block.flops_per_context_token(dims))
        .map(|flops| flops as f64)
        .collect();
    Costs { blocks, first: 0.0, last: 2.0 * dims.vocab as f64 * dims.hidden as f64 }
}
