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

use crate::sharing::{AttentionSharing, Sharing};

pub use curve::Basis;
pub use estimate::{Balance, Estimator, StageSeconds, activation_bytes, hop_bytes};
pub use measured::{Lacking, Measured};
pub use pieces::{PieceShape, pieces};
pub use roofline::{Channel, NumberType, NumberTypes, Roofline};
pub use scheduler::Load;

/// Where the costs of a model on a device come from.
pub trait CostModel {
    /// Costs of all pieces on one rank of a stage of `ranks` that share blocks so, for one micro-batch.
    fn shared_costs(&self, pieces: &[PieceShape], ranks: usize, sharing: &Sharing, load: Load) -> RankCosts;

    /// How `ranks` share each half of each block where each is as fast as it gets for this micro-batch, attention in one of
    /// these `ways`.
    fn sharing_in(
        &self,
        ways: &[AttentionSharing],
        pieces: &[PieceShape],
        ranks: usize,
        load: Load,
    ) -> Sharing;

    /// The same with attention in any way.
    fn sharing(&self, pieces: &[PieceShape], ranks: usize, load: Load) -> Sharing {
        self.sharing_in(&AttentionSharing::ALL, pieces, ranks, load)
    }

    /// Costs where `ranks` share blocks as is fastest for this micro-batch: what a plan for it has. A job keeps one
    /// sharing for all of its micro-batches.
    fn rank_costs(&self, pieces: &[PieceShape], ranks: usize, load: Load) -> RankCosts {
        self.shared_costs(pieces, ranks, &self.sharing(pieces, ranks, load), load)
    }

    /// Time to hand a micro-batch on from stage to stage: the sender's part and the receiver's together.
    fn hop_seconds(&self, load: Load) -> f64;

    /// Time that each of a stage's `ranks` devices is at work on a micro-batch: its run of pieces, embedding or head where it has
    /// them, and its part of each hop, which takes two arrays where an FFN is cut. `pieces` are all of the model's.
    fn step_seconds(
        &self,
        pieces: &[PieceShape],
        run: Range<usize>,
        ranks: usize,
        sharing: &Sharing,
        load: Load,
    ) -> f64 {
        let arrays = |piece: &PieceShape| if piece.ends_block { 1.0 } else { 2.0 };
        let before = run.start.checked_sub(1).map_or(0.0, |piece| arrays(&pieces[piece]));
        let after = if run.end < pieces.len() { arrays(&pieces[run.end - 1]) } else { 0.0 };
        let hops = (before + after) * self.hop_seconds(load) / 2.0;
        let costs = self.shared_costs(pieces, ranks, sharing, load);
        let is_cut = run.end < pieces.len() && !pieces[run.end - 1].ends_block;
        let cut = if is_cut { costs.cut_seconds(run.end) } else { 0.0 };
        costs.seconds(run) + cut + hops
    }
}
