//! Of the layouts that are equally fast, the most even one.

use super::furthest::Bounds;
use super::problem::{PlannedStage, Problem};

/// Rounding may part the sums of equal layouts by this share, and no cost is known to nine digits.
const TIE: f64 = 1e-9;

/// Moves the cuts of `stages`, on the devices they have, to where the sum of squared times over all devices
/// is least, within `bounds`.
///
/// Only runs within the bounds are looked at: for Ultra with 1,200 places to cut and 64 stages some 40 starts for each
/// end, 3 million steps.
pub(super) fn even_out(
    problem: &Problem<'_>,
    stages: Vec<PlannedStage>,
    bounds: Bounds,
) -> Vec<PlannedStage> {
    let num_pieces = problem.num_pieces();
    let limit = bounds.seconds * (1.0 + TIE);
    let mut totals = vec![f64::INFINITY; num_pieces + 1];
    totals[0] = 0.0;
    let mut starts = vec![vec![0; num_pieces + 1]; stages.len()];
    for (planned, starts) in stages.iter().zip(&mut starts) {
        let costs = problem.rank_costs(planned);
        let room = problem.room(planned.devices.clone());
        let mut next = vec![f64::INFINITY; num_pieces + 1];
        for end in 1..=num_pieces {
            for start in (0..end).rev() {
                let pieces = start..end;
                let stage = PlannedStage { pieces: pieces.clone(), devices: planned.devices.clone() };
                let seconds = costs.seconds(pieces.clone()) + problem.hop_seconds(&stage);
                if seconds > limit || costs.memory_bytes(pieces, bounds.kv_tokens) > room {
                    break;
                }
                let total = totals[start] + seconds * seconds * planned.devices.len() as f64;
                if total < next[end] * (1.0 - TIE) {
                    next[end] = total;
                    starts[end] = start;
                }
            }
        }
        totals = next;
    }
    if totals[num_pieces].is_infinite() {
        return stages;
    }
    trace(stages, &starts, num_pieces)
}

fn trace(mut stages: Vec<PlannedStage>, starts: &[Vec<usize>], num_pieces: usize) -> Vec<PlannedStage> {
    let mut end = num_pieces;
    for (stage, starts) in stages.iter_mut().zip(starts).rev() {
        stage.pieces = starts[end]..end;
        end = starts[end];
    }
    stages
}
