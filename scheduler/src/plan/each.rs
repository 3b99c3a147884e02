//! The cut that gives each device a stage.
//!
//! As in `furthest`, a stage that ends later leaves less to those after it, who are at worst as fast for it: so a time is
//! enough when stages that go as far as they can within it, and leave a block for each that follows, come to the
//! end.

use super::even::even_out;
use super::furthest::Bounds;
use super::problem::{PlannedStage, Problem};
use crate::error::Error;

/// Halving goes on until so small a share is left between a time that is enough and one that is not.
const TIE: f64 = 1e-10;

/// One stage of whole blocks on each device, none empty, whose slowest takes least; of such cuts the most even one.
/// None where the memory has no room for it. Every piece must be a block.
///
/// # Errors
/// [`Error::TooFewBlocks`].
pub fn least_bottleneck_on_each(
    problem: &Problem<'_>,
    kv_tokens: u64,
) -> Result<Option<Vec<PlannedStage>>, Error> {
    let (num_blocks, num_stages) = (problem.num_pieces(), problem.devices.len());
    assert!(num_stages > 0 && problem.ends_block.iter().all(|ends| *ends), "blocks stay whole here");
    if num_blocks < num_stages {
        return Err(Error::TooFewBlocks { num_blocks, num_stages });
    }
    let bounds = |seconds| Bounds { seconds, kv_tokens, max_stages: num_stages };
    let Some(mut stages) = cut(problem, bounds(f64::INFINITY)) else { return Ok(None) };
    let (mut too_little, mut enough) = (0.0, problem.bottleneck(&stages));
    while enough - too_little > TIE * enough {
        let seconds = too_little + (enough - too_little) / 2.0;
        match cut(problem, bounds(seconds)) {
            Some(faster) => {
                enough = problem.bottleneck(&faster);
                stages = faster;
            }
            None => too_little = seconds,
        }
    }
    Ok(Some(even_out(problem, stages, bounds(enough))))
}

/// The cut whose stages go as far as they can within bounds, if they come to the end.
fn cut(problem: &Problem<'_>, bounds: Bounds) -> Option<Vec<PlannedStage>> {
    let num_pieces = problem.num_pieces();
    let num_devices = problem.devices.len();
    let mut start = 0;
    let mut stages = Vec::with_capacity(num_devices);
    for device in 0..num_devices {
        let devices = device..device + 1;
        let rest = PlannedStage { pieces: start..num_pieces, devices: devices.clone() };
        let (costs, room) = (problem.rank_costs(&rest), problem.room(devices.clone()));
        let followers = num_devices - device - 1;
        let end = match followers {
            0 => {
                let is_within = costs.seconds(rest.pieces.clone()) <= bounds.seconds
                    && costs.memory_bytes(rest.pieces, bounds.kv_tokens) <= room;
                if is_within { num_pieces } else { start }
            }
            _ => {
                let seconds = bounds.seconds - problem.devices[device].hop_seconds;
                costs.furthest(start, seconds, room, bounds.kv_tokens).min(num_pieces - followers)
            }
        };
        if end == start {
            return None;
        }
        stages.push(PlannedStage { pieces: start..end, devices });
        start = end;
    }
    Some(stages)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{Costs, Extra, Piece, RankCosts, StageDevice};

    fn costs(seconds: &[f64], first: f64, last: f64) -> Costs {
        let pieces =
            seconds.iter().map(|seconds| Piece { seconds: *seconds, weight_bytes: 1, kv_bytes_per_token: 0 });
        let extra = |seconds| Extra { seconds, bytes: 0 };
        vec![(1, RankCosts::new(pieces, extra(first), extra(last)))]
    }

    fn devices(num: usize, hop_seconds: f64) -> Vec<StageDevice> {
        vec![StageDevice { kind: 0, memory_bytes: u64::MAX, hop_seconds, cut_hop_seconds: hop_seconds }; num]
    }

    fn starts(seconds: &[f64], num_stages: usize, first: f64, last: f64) -> Vec<usize> {
        let (devices, costs) = (devices(num_stages, 0.0), [costs(seconds, first, last)]);
        let ends = vec![true; seconds.len()];
        let problem = Problem::new(&devices, &ends, &costs);
        let stages = least_bottleneck_on_each(&problem, 0).unwrap().unwrap();
        stages.iter().map(|stage| stage.pieces.start).collect()
    }

    #[test]
    fn a_dear_block_and_a_dear_end_move_the_cut() {
        assert_eq!(starts(&[1.0; 8], 2, 0.0, 0.0), [0, 4]);
        assert_eq!(starts(&[1.0; 8], 2, 0.0, 4.0), [0, 6]);
        assert_eq!(starts(&[1.0; 8], 2, 2.0, 0.0), [0, 3]);
        assert_eq!(starts(&[1.0, 1.0, 10.0, 1.0, 1.0, 1.0], 3, 0.0, 0.0), [0, 2, 3]);
    }

    #[test]
    fn no_device_is_left_idle_where_it_could_be() {
        assert_eq!(starts(&[9.0, 0.0, 0.0], 3, 0.0, 0.0), [0, 1, 2]);
        assert_eq!(starts(&[0.0, 0.0, 9.0], 2, 0.0, 0.0).len(), 2);
    }

    #[test]
    fn fewer_blocks_than_devices_are_refused_and_so_is_too_little_memory() {
        let costs = [costs(&[1.0, 1.0], 0.0, 0.0)];
        let ends = [true; 2];
        let problem = |devices| Problem::new(devices, &ends, &costs);
        let three = devices(3, 0.0);
        let error = least_bottleneck_on_each(&problem(&three), 0).unwrap_err();
        assert_eq!(error, Error::TooFewBlocks { num_blocks: 2, num_stages: 3 });
        let mut small = devices(2, 0.0);
        small[1].memory_bytes = 0;
        assert_eq!(least_bottleneck_on_each(&problem(&small), 0), Ok(None));
    }

    /// Against all cuts of some hundred lists, hops included.
    #[test]
    fn no_other_cut_is_faster() {
        let mut state = 7_u64;
        let mut next = |bound: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % bound
        };
        for _ in 0..300 {
            let seconds: Vec<f64> = (0..3 + next(5)).map(|_| next(10) as f64).collect();
            let (devices, costs) =
                (devices(3, next(4) as f64), [costs(&seconds, next(5) as f64, next(5) as f64)]);
            let ends = vec![true; seconds.len()];
            let problem = Problem::new(&devices, &ends, &costs);
            let found = problem.bottleneck(&least_bottleneck_on_each(&problem, 0).unwrap().unwrap());
            let stage = |pieces, device| PlannedStage { pieces, devices: device..device + 1 };
            let best = (1..seconds.len() - 1)
                .flat_map(|a| (a + 1..seconds.len()).map(move |b| (a, b)))
                .map(|(a, b)| {
                    problem.bottleneck(&[stage(0..a, 0), stage(a..b, 1), stage(b..seconds.len(), 2)])
                })
                .fold(f64::INFINITY, f64::min);
            assert!((found - best).abs() < 1e-9, "{seconds:?}: {found}, {best} is possible");
        }
    }
}
