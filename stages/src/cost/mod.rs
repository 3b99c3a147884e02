//! What blocks cost, so that spans can be cut.
//!
//! A [`CostModel`] tells seconds and bytes of every piece on one rank of a stage. There are two: [`Estimator`] takes them
//! from shapes and a device's [`Roofline`], always an estimate, never a measurement; [`Measured`] takes the seconds from
//! a [`Profile`](crate::profile::Profile) of the device, and says where it had to go beyond what was measured.

mod curve;
mod estimate;
mod measured;
mod pieces;
mod rank;
mod roofline;

use std::ops::Range;

use scheduler::RankCosts;

pub use curve::Basis;
pub use estimate::{Balance, Estimator, StageSeconds, activation_bytes, hop_bytes};
pub use measured::{Lacking, Measured};
pub use pieces::{PieceShape, pieces};
pub use roofline::{Channel, NumberType, NumberTypes, Roofline};
pub use scheduler::Load;

/// Where the costs of a model on a device come from.
pub trait CostModel {
    /// Costs of all pieces on one rank of a stage of `ranks`, for one micro-batch.
    fn rank_costs(&self, pieces: &[PieceShape], ranks: usize, load: Load) -> RankCosts;

    /// Time to hand a micro-batch on from stage to stage: the sender's part and the receiver's together.
    fn hop_seconds(&self, load: Load) -> f64;

    /// Time that a stage of one device is at work on a micro-batch: its `blocks`, embedding or head where it has
    /// them, and its part of each hop. `pieces` are all of the model's, whole blocks.
    fn step_seconds(&self, pieces: &[PieceShape], blocks: Range<usize>, load: Load) -> f64 {
        let num_hops = usize::from(blocks.start > 0) + usize::from(blocks.end < pieces.len());
        let hops = num_hops as f64 * self.hop_seconds(load) / 2.0;
        self.rank_costs(pieces, 1, load).seconds(blocks) + hops
    }
}
