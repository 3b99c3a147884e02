//! The cut for stages whose devices are given, where a device may have several of them.
//!
//! Stages of one device share its time, so that it is devices which are balanced. Within a time, the furthest that a stage can
//! go is best where it leaves nothing to share; elsewhere any end may be. So every way to share out the
//! blocks is followed from stage to stage, as the place that it has come to and the time that each device has left, and
//! those are dropped from which the end cannot be reached any more.

use super::each::least_bottleneck_on_each;
use super::looped::Least;
use super::problem::{PlannedStage, Problem, StageDevice};
use crate::error::Error;

/// Halving goes on until so small a share is left between a time that is enough and one that is not: no cost is known to
/// seven digits.
const TIE: f64 = 1e-7;

/// Ways that are followed at once where up to two devices are still to come: as many as there are pairs of 162 blocks.
const MAX_WAYS: usize = 1 << 14;

/// The same of more devices. Where that is too few, those that are followed are a sample, and the cut may be a little slower than
/// the best.
const MAX_WAYS_OF_MANY: usize = 1 << 9;

/// One stage of whole blocks for each of `seats`, an index into the problem's devices each, none empty, whose slowest
/// device takes least. Memory is no limit, and every piece must be a block.
///
/// # Errors
/// [`Error::TooFewBlocks`].
///
/// # Panics
/// If there is no seat, or one is none of the devices.
pub fn least_bottleneck_on_seats(problem: &Problem<'_>, seats: &[usize]) -> Result<Vec<PlannedStage>, Error> {
    let endless = |device: &StageDevice| StageDevice { memory_bytes: u64::MAX, ..*device };
    let devices: Vec<_> = problem.devices.iter().map(endless).collect();
    let stages = least_bottleneck_within(&Problem { devices: &devices, ..*problem }, seats, 0)?;
    Ok(stages.expect("memory is no limit"))
}

/// The same where each device has room for its stages, and in them for `kv_tokens` in flight; none where a stage finds no room.
/// The stages of a device that has several are sought with an equal share of its memory each, so that there may be a cut
/// beside none, or a faster one.
///
/// # Errors
/// As [`least_bottleneck_on_seats`].
///
/// # Panics
/// As [`least_bottleneck_on_seats`].
pub fn least_bottleneck_within(
    problem: &Problem<'_>,
    seats: &[usize],
    kv_tokens: u64,
) -> Result<Option<Vec<PlannedStage>>, Error> {
    // As if each seat had a device of its own.
    let apart = |seat: &usize| {
        let device = problem.devices[*seat];
        let stages = seats.iter().filter(|other| *other == seat).count() as u64;
        StageDevice { memory_bytes: device.memory_bytes / stages, ..device }
    };
    let devices: Vec<_> = seats.iter().map(apart).collect();
    let apart = Problem { devices: &devices, ..*problem };
    let Some(stages) = least_bottleneck_on_each(&apart, kv_tokens)? else { return Ok(None) };
    let is_shared = |(at, seat): (usize, &usize)| seats[..at].contains(seat);
    if !seats.iter().enumerate().any(is_shared) {
        return Ok(Some(seated(&stages, seats)));
    }
    let mut stages = seated(&stages, seats);
    let fits = |stages: &[PlannedStage]| problem.missing_bytes(stages, kv_tokens) == 0;
    let least = Least::of(problem, 0);
    let (mut too_little, mut enough) = (0.0, problem.bottleneck(&stages));
    while enough - too_little > TIE * enough {
        let seconds = too_little + (enough - too_little) / 2.0;
        match (Seats { problem, seats, least: &least, seconds }).cut().filter(|cut| fits(cut)) {
            Some(faster) => {
                enough = problem.bottleneck(&faster);
                stages = faster;
            }
            None => too_little = seconds,
        }
    }
    let even = evened_out(problem, stages.clone());
    Ok(Some(if fits(&even) { even } else { stages }))
}

/// The same stages on the devices of their seats.
fn seated(stages: &[PlannedStage], seats: &[usize]) -> Vec<PlannedStage> {
    let on = |(stage, seat): (&PlannedStage, &usize)| PlannedStage {
        pieces: stage.pieces.clone(),
        devices: *seat..seat + 1,
    };
    stages.iter().zip(seats).map(on).collect()
}

/// Cuts within a time.
struct Seats<'a> {
    problem: &'a Problem<'a>,
    seats: &'a [usize],
    least: &'a Least,
    seconds: f64,
}

/// A way to share out the blocks before `end`.
#[derive(Debug, Clone)]
struct Way {
    end: usize,
    /// What each device has left of its time.
    left: Vec<f64>,
    /// The way that it came from, among those of the stage before.
    before: usize,
}

impl Seats<'_> {
    fn cut(&self) -> Option<Vec<PlannedStage>> {
        let left = vec![self.seconds; self.problem.devices.len()];
        let mut ways = vec![vec![Way { end: 0, left, before: 0 }]];
        for (stage, before) in (0..self.seats.len()).zip(0..) {
            let next = self.next(stage, &ways[before]);
            if next.is_empty() {
                return None;
            }
            ways.push(next);
        }
        Some(self.trace(&ways))
    }

    fn next(&self, stage: usize, ways: &[Way]) -> Vec<Way> {
        let (device, followers) = (self.seats[stage], &self.seats[stage + 1..]);
        let most = self.problem.num_pieces() - followers.len();
        let mut next = vec![];
        for (before, way) in ways.iter().enumerate() {
            // The last stage takes all that is left.
            let ends = if followers.is_empty() { most..=most } else { way.end + 1..=most };
            let reached = ends.map_while(|end| {
                let taken = PlannedStage { pieces: way.end..end, devices: device..device + 1 };
                let seconds = self.problem.stage_seconds(&taken);
                (seconds <= way.left[device]).then_some((end, seconds))
            });
            let reach = |(end, seconds)| {
                let mut left = way.left.clone();
                left[device] -= seconds;
                Way { end, left, before }
            };
            match self.may_matter(stage) {
                true => next.extend(reached.map(reach).filter(|way| self.is_hopeful(way, followers))),
                false => next.extend(reached.last().map(reach).filter(|way| self.is_hopeful(way, followers))),
            }
        }
        thinned(next, followers)
    }

    /// Whether another end of a stage than the furthest may be better: where its device comes again, and where a stage after
    /// it, which must have a block, has not all of its device's time for it. One that is the last takes what is left.
    fn may_matter(&self, stage: usize) -> bool {
        let followers = &self.seats[stage + 1..];
        let is_shared = |seat: &usize| self.seats.iter().filter(|other| *other == seat).count() > 1;
        followers.contains(&self.seats[stage]) || followers.len() > 1 && followers.iter().any(is_shared)
    }

    /// Whether the devices that are still to come have time for what is left, hops not counted.
    fn is_hopeful(&self, way: &Way, followers: &[usize]) -> bool {
        let rest = way.end..self.problem.num_pieces();
        self.least.seconds(rest) <= distinct(followers).map(|device| way.left[device]).sum::<f64>()
    }

    fn trace(&self, ways: &[Vec<Way>]) -> Vec<PlannedStage> {
        let (mut stages, mut index) = (vec![], 0);
        for (stage, ways) in ways.iter().enumerate().skip(1).rev() {
            let (end, device) = (ways[index].end, self.seats[stage - 1]);
            stages.push((end, device));
            index = ways[index].before;
        }
        stages.reverse();
        let starts = std::iter::once(0).chain(stages.iter().map(|(end, _)| *end));
        let stage = |(start, (end, device)): (usize, &(usize, usize))| PlannedStage {
            pieces: start..*end,
            devices: *device..device + 1,
        };
        starts.zip(&stages).map(stage).collect()
    }
}

fn distinct(seats: &[usize]) -> impl Iterator<Item = usize> {
    seats.iter().enumerate().filter(|(at, seat)| !seats[..*at].contains(seat)).map(|(_, seat)| *seat)
}

/// Without the ways beside which another is as far and has as much time left; and a sample of those that are too many.
fn thinned(mut ways: Vec<Way>, followers: &[usize]) -> Vec<Way> {
    let left = |way: &Way| distinct(followers).map(|device| way.left[device]).collect::<Vec<f64>>();
    let mut ways: Vec<(Vec<f64>, Way)> = ways.drain(..).map(|way| (left(&way), way)).collect();
    ways.sort_by(|(left, way), (other_left, other)| {
        let by_time = |a: &Vec<f64>, b: &Vec<f64>| b.partial_cmp(a).unwrap_or(std::cmp::Ordering::Equal);
        other.end.cmp(&way.end).then_with(|| by_time(left, other_left))
    });
    ways.dedup_by(|(left, way), (kept_left, kept)| {
        way.end == kept.end && left.iter().zip(kept_left).all(|(left, kept)| *left <= *kept)
    });
    let most = if distinct(followers).count() > 2 { MAX_WAYS_OF_MANY } else { MAX_WAYS };
    let stride = ways.len().div_ceil(most);
    ways.into_iter().step_by(stride.max(1)).map(|(_, way)| way).collect()
}

/// Moves one cut at a time to where the sum of squared times of stages is less and no device is slower than the slowest.
fn evened_out(problem: &Problem<'_>, mut stages: Vec<PlannedStage>) -> Vec<PlannedStage> {
    let bottleneck = problem.bottleneck(&stages) * (1.0 + TIE);
    let squares = |stages: &[PlannedStage]| {
        stages.iter().map(|stage| problem.stage_seconds(stage).powi(2)).sum::<f64>()
    };
    let mut least = squares(&stages);
    loop {
        let better = neighbours(&stages)
            .map(|moved| (squares(&moved), moved))
            .find(|(sum, moved)| *sum < least * (1.0 - TIE) && problem.bottleneck(moved) <= bottleneck);
        let Some((sum, moved)) = better else { break };
        (least, stages) = (sum, moved);
    }
    stages
}

/// The cuts with one block more or less in one stage, and one less or more in the next.
fn neighbours(stages: &[PlannedStage]) -> impl Iterator<Item = Vec<PlannedStage>> {
    (1..stages.len()).flat_map(move |at| {
        let cut = stages[at].pieces.start;
        [cut - 1, cut + 1].into_iter().filter_map(move |cut| {
            let is_filled = stages[at - 1].pieces.start < cut && cut < stages[at].pieces.end;
            is_filled.then(|| {
                let mut moved = stages.to_vec();
                (moved[at - 1].pieces.end, moved[at].pieces.start) = (cut, cut);
                moved
            })
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{Costs, Extra, Piece, RankCosts};

    fn costs(seconds: &[f64], first: f64, last: f64) -> Costs {
        let pieces =
            seconds.iter().map(|seconds| Piece { seconds: *seconds, weight_bytes: 1, kv_bytes_per_token: 0 });
        let extra = |seconds| Extra { seconds, bytes: 0 };
        vec![(1, RankCosts::new(pieces, extra(first), extra(last)))]
    }

    fn device(kind: usize, hop_seconds: f64) -> StageDevice {
        StageDevice { kind, memory_bytes: u64::MAX, hop_seconds, cut_hop_seconds: hop_seconds }
    }

    fn ends(seconds: &[f64], num_devices: usize, seats: &[usize]) -> Vec<usize> {
        let (devices, costs) = (vec![device(0, 0.0); num_devices], [costs(seconds, 0.0, 0.0)]);
        let ends = vec![true; seconds.len()];
        let stages = least_bottleneck_on_seats(&Problem::new(&devices, &ends, &costs), seats).unwrap();
        stages.iter().map(|stage| stage.pieces.end).collect()
    }

    #[test]
    fn stages_of_one_device_share_its_time() {
        // 9 + 1 and 6 + 4, where four devices would be cut behind the first two blocks.
        assert_eq!(ends(&[9.0, 6.0, 1.0, 4.0], 2, &[0, 1, 0, 1]), [1, 2, 3, 4]);
        assert_eq!(ends(&[1.0, 2.0, 3.0, 9.0, 1.0], 2, &[0, 1, 0]), [3, 4, 5]);
        // One device has twice as many stages as the other, and no more time.
        let thirds = ends(&[1.0; 12], 2, &[0, 1, 0]);
        assert_eq!(thirds[1] - thirds[0], 6);
        assert_eq!(ends(&[1.0; 12], 2, &[0, 1]), [6, 12]);
    }

    #[test]
    fn one_device_alone_is_cut_evenly() {
        assert_eq!(ends(&[1.0; 8], 1, &[0, 0]), [4, 8]);
        assert_eq!(ends(&[1.0; 9], 1, &[0, 0, 0]), [3, 6, 9]);
    }

    #[test]
    fn fewer_blocks_than_seats_are_refused() {
        let costs = [costs(&[1.0, 1.0], 0.0, 0.0)];
        let (devices, ends) = ([device(0, 0.0)], [true; 2]);
        let error =
            least_bottleneck_on_seats(&Problem::new(&devices, &ends, &costs), &[0, 0, 0]).unwrap_err();
        assert_eq!(error, Error::TooFewBlocks { num_blocks: 2, num_stages: 3 });
    }

    /// All ways to cut `from..num_pieces` into one stage for each of the seats.
    fn least(problem: &Problem<'_>, seats: &[usize], stages: &mut Vec<PlannedStage>, from: usize) -> f64 {
        let (at, num_pieces) = (stages.len(), problem.num_pieces());
        if at == seats.len() {
            return if from == num_pieces { problem.bottleneck(stages) } else { f64::INFINITY };
        }
        (from + 1..=num_pieces)
            .map(|end| {
                stages.push(PlannedStage { pieces: from..end, devices: seats[at]..seats[at] + 1 });
                let seconds = least(problem, seats, stages, end);
                stages.pop();
                seconds
            })
            .fold(f64::INFINITY, f64::min)
    }

    /// Against all cuts of some thousand lists, for devices of two kinds, hops and both ends.
    #[test]
    fn no_other_cut_is_faster() {
        let mut state = 11_u64;
        let mut next = |bound: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % bound
        };
        for _ in 0..2_000 {
            let num_devices = 1 + next(3);
            let seats: Vec<usize> = (0..1 + next(4)).map(|_| next(num_devices) as usize).collect();
            let num_blocks = seats.len() as u64 + next(5);
            let draw = |next: &mut dyn FnMut(u64) -> u64| {
                let seconds: Vec<f64> = (0..num_blocks).map(|_| next(10) as f64).collect();
                costs(&seconds, next(5) as f64, next(5) as f64)
            };
            let costs = [draw(&mut next), draw(&mut next)];
            let devices: Vec<StageDevice> =
                (0..num_devices).map(|_| device(next(2) as usize, next(4) as f64)).collect();
            let ends = vec![true; num_blocks as usize];
            let problem = Problem::new(&devices, &ends, &costs);
            let stages = least_bottleneck_on_seats(&problem, &seats).unwrap();
            assert!(stages.iter().zip(&seats).all(|(stage, seat)| stage.devices == (*seat..seat + 1)));
            let (found, best) = (problem.bottleneck(&stages), least(&problem, &seats, &mut vec![], 0));
            assert!((found - best).abs() <= 1e-6 * best, "{seats:?} {costs:?}: {found}, {best} is possible");
        }
    }

    /// The first device has room for two blocks with what their four tokens keep, the second for six.
    #[test]
    fn each_device_has_room_for_its_own_stage() {
        let kept = |_| Piece { seconds: 1.0, weight_bytes: 100, kv_bytes_per_token: 5 };
        let costs = [vec![(1, RankCosts::new((0..8).map(kept), Extra::default(), Extra::default()))]];
        let devices = [240, 720].map(|memory_bytes| StageDevice { memory_bytes, ..device(0, 0.0) });
        let ends = [true; 8];
        let problem = Problem::new(&devices, &ends, &costs);
        let cut = |seats: &[usize], kv_tokens| {
            let stages = least_bottleneck_within(&problem, seats, kv_tokens).unwrap();
            stages.map(|stages| stages.iter().map(|stage| stage.pieces.end).collect::<Vec<_>>())
        };
        assert_eq!(cut(&[0, 1], 4), Some(vec![2, 8]));
        assert_eq!(cut(&[0, 1], 5), None);
        // Three stages on the second device, which has the time and the room for all of them.
        assert_eq!(cut(&[1, 0, 1, 1], 4).map(|ends| ends[1] - ends[0]), Some(2));
        assert_eq!(least_bottleneck_on_seats(&problem, &[0, 1]).unwrap()[0].pieces.end, 4);
    }

    #[test]
    fn many_seats_of_many_blocks_are_cut_at_once() {
        let seconds: Vec<f64> = (0..162).map(|block| 1.0 + f64::from(block % 7)).collect();
        for num_devices in [2, 3, 8] {
            let seats: Vec<usize> = (0..2 * num_devices).map(|seat| seat % num_devices).collect();
            let (devices, costs) = (vec![device(0, 0.0); num_devices], [costs(&seconds, 0.0, 0.0)]);
            let ends = vec![true; seconds.len()];
            let problem = Problem::new(&devices, &ends, &costs);
            let stages = least_bottleneck_on_seats(&problem, &seats).unwrap();
            assert!(problem.bottleneck_over_mean(&stages) < 1.03, "{num_devices}: {stages:?}");
        }
    }
}
