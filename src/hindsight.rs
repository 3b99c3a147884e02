//! What a run's stages should have taken for the micro-batches that they had, and the cut that would have been faster.
//!
//! Arithmetic of costs and counts, without a clock and without files. Blocks are scaled by what their stage has taken over what it
//! should have: what a cost model does not know of a block or a core is in there, and so is whatever else the machine did.

use actors::StepLoads;
use scheduler::{Costs, Extra, Piece, Problem, RankCosts, Span, StageDevice, least_bottleneck_on_seats};
use stages::Sharing;
use stages::cost::{CostModel, PieceShape};

/// Another cut is worth a line when it is faster by this share.
const BETTER_CUT: f64 = 1.03;

/// Of fewer micro-batches than these, chance would be most of what a cut is blamed for.
const LEAST_STEPS: u64 = 32;

/// What a stage has done.
#[derive(Debug, Clone)]
pub(crate) struct StageWork {
    /// A run of pieces.
    pub(crate) pieces: Span,
    /// How many devices share it.
    pub(crate) ranks: usize,
    /// How they share its blocks.
    pub(crate) sharing: Sharing,
    /// Time in the micro-batches of `loads`.
    pub(crate) seconds: f64,
    pub(crate) loads: Vec<StepLoads>,
}

/// A run as it should have been.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Hindsight {
    /// What each stage should have taken, in seconds.
    pub(crate) predicted: Vec<f64>,
    pub(crate) better: Option<BetterCut>,
}

/// A cut that is faster than the one that was run.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct BetterCut {
    pub(crate) spans: Vec<Span>,
    /// How much less the slowest device would take, in seconds of the whole run.
    pub(crate) saved: f64,
}

impl Hindsight {
    /// Of replicas of the same stages, each with its costs and its seats: what every stage should have taken, one replica
    /// after the other; and the cut that would have been better for all of them together.
    pub(crate) fn of_replicas(
        costs: &[Vec<&dyn CostModel>],
        pieces: &[PieceShape],
        replicas: &[Vec<StageWork>],
        seats: &[Vec<usize>],
    ) -> Self {
        let each = costs.iter().zip(replicas).zip(seats);
        let mut each = each.map(|((costs, stages), seats)| Self::of(costs, pieces, stages, seats));
        if let [_] = replicas {
            return each.next().expect("there is one");
        }
        let predicted = each.flat_map(|hindsight| hindsight.predicted).collect();
        let together = Self::of(&costs[0], pieces, &summed(replicas), &seats[0]);
        let of_one = |better: BetterCut| BetterCut { saved: better.saved / replicas.len() as f64, ..better };
        Hindsight { predicted, better: together.better.map(of_one) }
    }

    /// Of stages that cover all `pieces`. Each has its costs, and its (first) device by a number that all stages of the device
    /// have. A better cut is looked for where all are whole blocks on single devices.
    pub(crate) fn of(
        costs: &[&dyn CostModel],
        pieces: &[PieceShape],
        stages: &[StageWork],
        seats: &[usize],
    ) -> Self {
        let expected: Vec<Taken> =
            (costs.iter().zip(stages)).map(|(costs, stage)| Taken::by(*costs, pieces, stage)).collect();
        let predicted: Vec<f64> =
            expected.iter().zip(stages).map(|(taken, stage)| taken.stage(stage.pieces)).collect();
        let has_enough = stages.iter().all(|stage| num_steps(&stage.loads) >= LEAST_STEPS);
        let is_plain =
            stages.iter().all(|stage| stage.ranks == 1) && pieces.iter().all(|piece| piece.ends_block);
        let better =
            (has_enough && is_plain).then(|| scaled(&expected, &predicted, stages)).and_then(|taken| {
                let present: Vec<Span> = stages.iter().map(|stage| stage.pieces).collect();
                taken.better_cut(&present, seats)
            });
        Hindsight { predicted, better }
    }
}

/// Each stage with the work of its like in all replicas.
fn summed(replicas: &[Vec<StageWork>]) -> Vec<StageWork> {
    let stage = |(index, first): (usize, &StageWork)| {
        let all = || replicas.iter().map(|stages| &stages[index]);
        StageWork {
            seconds: all().map(|stage| stage.seconds).sum(),
            loads: all().flat_map(|stage| stage.loads.clone()).collect(),
            ..first.clone()
        }
    };
    replicas[0].iter().enumerate().map(stage).collect()
}

fn num_steps(loads: &[StepLoads]) -> u64 {
    loads.iter().map(|load| load.steps).sum()
}

/// What all micro-batches of a run take.
#[derive(Debug, Clone, PartialEq)]
struct Taken {
    /// By block, in seconds; the first has the embedding with it, and the last the output matrix.
    blocks: Vec<f64>,
    /// All hops from one stage to the next, in seconds.
    hops: f64,
    /// Giving all ranks of the stage what comes in, in seconds.
    entries: f64,
    /// How many times as much goes over the hop after each piece: twice, where an FFN is cut.
    arrays: Vec<f64>,
    /// What a stage takes more that ends with each piece, in seconds: the sum of an FFN that is shared and cut there.
    cuts: Vec<f64>,
}

impl Taken {
    fn by(costs: &dyn CostModel, pieces: &[PieceShape], stage: &StageWork) -> Self {
        let arrays = pieces.iter().map(|piece| if piece.ends_block { 1.0 } else { 2.0 }).collect();
        let none = vec![0.0; pieces.len()];
        let mut taken = Taken { blocks: none.clone(), hops: 0.0, entries: 0.0, arrays, cuts: none };
        for StepLoads { steps, load } in &stage.loads {
            let rank = costs.shared_costs(pieces, stage.ranks, &stage.sharing, *load);
            let (steps, entry) = (*steps as f64, rank.entry_seconds());
            for (block, seconds) in taken.blocks.iter_mut().enumerate() {
                *seconds += steps * (rank.seconds(block..block + 1) - entry);
            }
            for (piece, seconds) in
                taken.cuts.iter_mut().enumerate().filter(|(at, _)| !pieces[*at].ends_block)
            {
                *seconds += steps * rank.cut_seconds(piece + 1);
            }
            taken.entries += steps * entry;
            taken.hops += steps * costs.hop_seconds(*load);
        }
        taken
    }

    /// A stage has half of each hop that it takes part in.
    fn stage(&self, blocks: Span) -> f64 {
        let before = blocks.start.checked_sub(1).map_or(0.0, |piece| self.arrays[piece]);
        let (after, cut) = match blocks.end.checked_sub(1).filter(|_| blocks.end < self.blocks.len()) {
            Some(last) => (self.arrays[last], self.cuts[last]),
            None => (0.0, 0.0),
        };
        let own = self.blocks[blocks.range()].iter().sum::<f64>() + self.entries + cut;
        own + (before + after) * self.hops / 2.0
    }

    /// The slowest device's time for all of its stages.
    fn slowest(&self, spans: &[Span], seats: &[usize]) -> f64 {
        let mut devices = vec![0.0; num_devices(seats)];
        for (span, seat) in spans.iter().zip(seats) {
            devices[*seat] += self.stage(*span);
        }
        devices.into_iter().fold(0.0, f64::max)
    }

    /// The best cut into as many stages, where it is better enough.
    fn better_cut(&self, present: &[Span], seats: &[usize]) -> Option<BetterCut> {
        let piece = |seconds: &f64| Piece { seconds: *seconds, ..Piece::default() };
        let costs = RankCosts::new(self.blocks.iter().map(piece), Extra::default(), Extra::default());
        let costs: [Costs; 1] = [vec![(1, costs)]];
        // All share the machine's memory, as where a job is placed.
        let device = StageDevice {
            kind: 0,
            memory_bytes: u64::MAX,
            hop_seconds: self.hops,
            cut_hop_seconds: self.hops,
        };
        let (devices, ends) = (vec![device; num_devices(seats)], vec![true; self.blocks.len()]);
        let problem = Problem::new(&devices, &ends, &costs);
        let stages = least_bottleneck_on_seats(&problem, seats).ok()?;
        let spans: Vec<Span> =
            stages.iter().map(|stage| Span { start: stage.pieces.start, end: stage.pieces.end }).collect();
        let (slowest, least) = (self.slowest(present, seats), self.slowest(&spans, seats));
        (slowest > BETTER_CUT * least).then_some(BetterCut { spans, saved: slowest - least })
    }
}

fn num_devices(seats: &[usize]) -> usize {
    seats.iter().map(|seat| seat + 1).max().unwrap_or(0)
}

/// Each stage's blocks as they were seen to be, and hops as slow or as fast as all stages together.
fn scaled(expected: &[Taken], predicted: &[f64], stages: &[StageWork]) -> Taken {
    let arrays = expected.first().map_or_else(Vec::new, |taken| taken.arrays.clone());
    // Whole blocks, at whose ends nothing is cut.
    let cuts = vec![0.0; arrays.len()];
    let mut taken = Taken { blocks: Vec::new(), hops: 0.0, entries: 0.0, arrays, cuts };
    for ((expected, predicted), stage) in expected.iter().zip(predicted).zip(stages) {
        let ratio = stage.seconds / predicted;
        taken.blocks.extend(expected.blocks[stage.pieces.range()].iter().map(|seconds| seconds * ratio));
        taken.hops += expected.hops * ratio / stages.len() as f64;
    }
    taken
}

#[cfg(test)]
mod tests {
    use stages::AttentionSharing;

    use super::*;

    /// Blocks that take so many milliseconds for each token, and cuts and hops that take four and one for a micro-batch.
    struct PerToken(Vec<f64>);

    impl CostModel for PerToken {
        fn shared_costs(
            &self,
            _: &[PieceShape],
            _: usize,
            _: &Sharing,
            load: stages::cost::Load,
        ) -> RankCosts {
            let piece = |ms: &f64| Piece { seconds: ms * 1e-3 * load.tokens(), ..Piece::default() };
            RankCosts::new(self.0.iter().map(piece), Extra::default(), Extra::default())
                .with_cuts(self.0.iter().map(|_| 4e-3))
        }

        fn sharing_in(
            &self,
            _: &[AttentionSharing],
            _: &[PieceShape],
            _: usize,
            _: stages::cost::Load,
        ) -> Sharing {
            Sharing::default()
        }

        fn hop_seconds(&self, _: stages::cost::Load) -> f64 {
            1e-3
        }
    }

    fn steps(steps: u64, tokens: f64) -> StepLoads {
        let load = stages::cost::Load { decode_tokens: tokens, ..stages::cost::Load::default() };
        StepLoads { steps, load }
    }

    fn judge(blocks: &[f64], cut: usize, steps: &[StepLoads], seconds: [f64; 2]) -> Hindsight {
        let shape = |block| PieceShape { block, columns: None, ends_block: true };
        let pieces: Vec<PieceShape> = (0..blocks.len()).map(shape).collect();
        let spans = [Span { start: 0, end: cut }, Span { start: cut, end: blocks.len() }];
        let stages: Vec<StageWork> = (spans.into_iter().zip(seconds))
            .map(|(pieces, seconds)| StageWork {
                pieces,
                ranks: 1,
                sharing: Sharing::default(),
                seconds,
                loads: steps.to_vec(),
            })
            .collect();
        let costs = PerToken(blocks.to_vec());
        Hindsight::of(&[&costs, &costs], &pieces, &stages, &[0, 1])
    }

    fn assert_close(left: f64, right: f64) {
        assert!((left - right).abs() < 1e-9, "{left} is not {right}");
    }

    #[test]
    fn a_stage_should_take_what_its_blocks_do_for_each_micro_batch_and_half_a_hop() {
        let hindsight = judge(&[1.0, 2.0, 4.0], 2, &[steps(10, 1.0), steps(30, 5.0)], [1.0, 1.0]);
        assert_close(hindsight.predicted[0], 0.160 * 3.0 + 40.0 * 0.0005);
        assert_close(hindsight.predicted[1], 0.160 * 4.0 + 40.0 * 0.0005);
    }

    #[test]
    fn a_stage_that_ends_in_a_cut_should_take_the_sum_there_and_a_hop_of_two_arrays() {
        let columns = [(0, None, true), (1, Some(0..64), false), (1, Some(64..256), true)];
        let pieces = columns.map(|(block, columns, ends_block)| PieceShape { block, columns, ends_block });
        let spans = [Span { start: 0, end: 2 }, Span { start: 2, end: 3 }];
        let (sharing, costs, steps) = (Sharing::default(), PerToken(vec![1.0, 2.0, 4.0]), steps(10, 3.0));
        let work = spans.map(|pieces| StageWork {
            pieces,
            ranks: 2,
            sharing: sharing.clone(),
            seconds: 1.0,
            loads: vec![steps],
        });
        let found = Hindsight::of(&[&costs, &costs], &pieces, &work, &[0, 1]).predicted;
        assert_close(found[0], 10.0 * (3.0 * 0.003 + 0.004 + 2.0 * 0.0005));
        assert_close(found[1], 10.0 * (3.0 * 0.004 + 2.0 * 0.0005));
        // As it was planned.
        for (found, span) in found.iter().zip(spans) {
            assert_close(*found, 10.0 * costs.step_seconds(&pieces, span.range(), 2, &sharing, steps.load));
        }
    }

    #[test]
    fn blocks_that_were_slower_than_predicted_move_the_cut() {
        // Six equal blocks cut in half; the first three took twice what they should: 6 to 3, and 4 to 5 is best.
        let (blocks, loads) = ([1.0; 6], [steps(100, 100.0)]);
        let (first, second) = (30.05, 30.05);
        assert_eq!(judge(&blocks, 3, &loads, [first, second]).better, None);
        let better = judge(&blocks, 3, &loads, [2.0 * first, second]).better.expect("another cut is better");
        assert_eq!(better.spans, [Span { start: 0, end: 2 }, Span { start: 2, end: 6 }]);
        assert!((better.saved - 10.0).abs() < 0.2, "{better:?}"); // Of 60 seconds.
    }

    #[test]
    fn a_gain_of_little_and_a_run_of_few_micro_batches_are_not_worth_a_line() {
        let loads = |count| [steps(count, 100.0)];
        let seconds = |blocks: f64, count: u64| blocks * 0.1 * count as f64;
        // The even cut is a block away: 4 % faster than 26 of 50, and 2 % faster than 51 of 100.
        let has_better = |num_blocks: usize, cut: usize, count: u64| {
            let taken = [cut, num_blocks - cut].map(|blocks| seconds(blocks as f64, count));
            judge(&vec![1.0; num_blocks], cut, &loads(count), taken).better.is_some()
        };
        assert!(has_better(50, 26, LEAST_STEPS));
        assert!(!has_better(100, 51, LEAST_STEPS));
        assert!(!has_better(50, 26, LEAST_STEPS - 1));
    }

    #[test]
    fn replicas_are_judged_each_and_cut_together() {
        let shape = |block| PieceShape { block, columns: None, ends_block: true };
        let pieces: Vec<PieceShape> = (0..6).map(shape).collect();
        let spans = [Span { start: 0, end: 3 }, Span { start: 3, end: 6 }];
        let costs = PerToken(vec![1.0; 6]);
        let replica = |seconds: [f64; 2], steps: &StepLoads| -> Vec<StageWork> {
            let stage = |(pieces, seconds)| StageWork {
                pieces,
                ranks: 1,
                sharing: Sharing::default(),
                seconds,
                loads: vec![*steps],
            };
            spans.into_iter().zip(seconds).map(stage).collect()
        };
        // As in the test above, with the micro-batches shared out unevenly: a fifth and four fifths of them.
        let replicas =
            [replica([12.02, 6.01], &steps(20, 100.0)), replica([48.08, 24.04], &steps(80, 100.0))];
        let costs: Vec<Vec<&dyn CostModel>> = vec![vec![&costs, &costs]; 2];
        let hindsight = Hindsight::of_replicas(&costs, &pieces, &replicas, &[vec![0, 1], vec![2, 3]]);
        for (found, expected) in hindsight.predicted.iter().zip([6.01, 6.01, 24.04, 24.04]) {
            assert_close(*found, expected);
        }
        assert_eq!(hindsight.predicted.len(), 4);
        let better = hindsight.better.expect("another cut is better");
        assert_eq!(better.spans, [Span { start: 0, end: 2 }, Span { start: 2, end: 6 }]);
        assert!((better.saved - 5.0).abs() < 0.1, "{better:?}"); // Of 30 seconds side by side.
    }

    #[test]
    fn stages_that_had_nothing_to_do_are_predicted_to_take_nothing() {
        let hindsight = judge(&[1.0, 1.0], 1, &[], [0.0, 0.0]);
        assert_eq!(hindsight, Hindsight { predicted: vec![0.0, 0.0], better: None });
    }
}
