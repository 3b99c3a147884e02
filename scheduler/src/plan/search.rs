//! The fastest layout over micro-batch sizes and numbers of stages.
//!
//! A larger micro-batch makes more of each read of the weights, and keeps more keys and values; a longer
//! pipeline needs more micro-batches in flight, which keep more still. The search halves the number of stages: were
//! no layout of the most stages fast enough even with the keys and values of the fewest, none between is.

use std::ops::RangeInclusive;

use super::even::even_out;
use super::furthest::{Bounds, layout};
use super::problem::{Costs, PlannedStage, Problem, StageDevice};

/// One micro-batch size, with what everything costs for it.
#[derive(Debug, Clone, PartialEq)]
pub struct Case {
    /// Rows that keep keys and values for one micro-batch, at least 1.
    pub rows: u64,
    /// Rows that decode in one micro-batch, on average: fewer than `rows` where a row's prompt is so long that it comes in
    /// chunks, a micro-batch each.
    pub decode_rows: f64,
    /// The devices, with their times for a hop.
    pub devices: Vec<StageDevice>,
    /// Costs for each kind of device.
    pub costs: Vec<Costs>,
}

impl Case {
    /// The planner's problem of this micro-batch.
    pub fn problem<'a>(&'a self, ends_block: &'a [bool]) -> Problem<'a> {
        Problem::new(&self.devices, ends_block, &self.costs)
    }

    /// Rows that decode in a second, where a micro-batch takes so many: their tokens are the generated ones.
    pub fn rows_per_second(&self, bottleneck: f64) -> f64 {
        self.decode_rows / bottleneck
    }
}

/// How many tokens' keys and values every stage must have room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvTokens {
    /// What the rows in flight keep.
    PerRow {
        /// Tokens that a row keeps.
        tokens: u64,
        /// Rows of the whole job: no more are in flight, but one for each micro-batch that keeps the stages busy.
        rows: u64,
    },
    /// So many in all, which also bounds the rows in flight, each of which keeps `per_row`.
    Wanted {
        /// Tokens in flight.
        tokens: u64,
        /// Tokens that a row keeps.
        per_row: u64,
    },
}

/// The fastest layout.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// Index of its micro-batch size.
    pub case: usize,
    /// The stages, in the order of the pipeline; none is empty.
    pub stages: Vec<PlannedStage>,
    /// The slowest device's time for a micro-batch.
    pub bottleneck: f64,
}

/// Micro-batches in flight that keep every stage busy.
pub const fn in_flight(num_stages: u64) -> u64 {
    let mut sum = 0;
    sum += num_stages; // One computing in every stage.
    sum += if num_stages > 1 { 1 } else { 0 }; // One hopping, or being sampled.
    sum
}

/// Sums of seconds differ by 1e-12 or so with the order of adding; what differs by less than this is equal.
const TIE: f64 = 1e-10;

/// The search first goes roughly over all cases, and then exactly over the few that are nearly as fast as the
/// fastest.
const TOLERANCES: [f64; 2] = [1e-2, TIE];

impl KvTokens {
    /// Tokens to make room for, or none where fewer are wanted than rows in flight need.
    pub fn needed(self, rows: u64, num_stages: u64) -> Option<u64> {
        let in_flight = rows.saturating_mul(in_flight(num_stages));
        match self {
            Self::PerRow { tokens, rows: most } => {
                (rows <= 1 || in_flight <= most).then(|| in_flight.saturating_mul(tokens))
            }
            Self::Wanted { tokens, per_row } => {
                (in_flight.saturating_mul(per_row) <= tokens).then_some(tokens)
            }
        }
    }
}

/// The layout of most rows per second over all `cases`, or none when nothing fits.
///
/// Exact: no contiguous layout of any case within every stage's memory is faster. Of equally fast ones it
/// is of the last case; its cuts are the most even ones.
pub fn best_layout(
    cases: &[Case],
    ends_block: &[bool],
    widths: Option<&[usize]>,
    kv: KvTokens,
) -> Option<Choice> {
    faster_layout(cases, ends_block, widths, kv, 0.0)
}

/// The same, or none where no layout makes more than `rows_per_second`.
pub fn faster_layout(
    cases: &[Case],
    ends_block: &[bool],
    widths: Option<&[usize]>,
    kv: KvTokens,
    rows_per_second: f64,
) -> Option<Choice> {
    let mut search = Search::new(ends_block, widths, kv, rows_per_second, layout);
    search.run(cases, |num_devices| 1..=num_devices);
    let choice = search.best?;
    let case = &cases[choice.case];
    let problem = case.problem(ends_block).with_widths(widths);
    let kv_tokens = kv.needed(case.rows, choice.stages.len() as u64).expect("it was found within memory");
    let bounds = Bounds { seconds: choice.bottleneck, kv_tokens, max_stages: choice.stages.len() };
    let stages = even_out(&problem, choice.stages, bounds);
    Some(Choice { bottleneck: problem.bottleneck(&stages), stages, ..choice })
}

/// The layout whose slowest stage takes least, with room for `kv_tokens` in flight and at most `max_stages`.
///
/// Four blocks on two devices, one of them with a fused FFN as long as the others together: where its columns are pieces of
/// their own, the slower stage takes 4 ms for 6.
///
/// ```
/// use scheduler::{Extra, Piece, Problem, RankCosts, StageDevice, least_bottleneck};
///
/// let bottleneck = |milliseconds: &[f64], ends_block: &[bool]| {
///     let pieces = milliseconds.iter().map(|ms| Piece { seconds: ms / 1e3, ..Piece::default() });
///     let one_rank = RankCosts::new(pieces, Extra::default(), Extra::default());
///     let device = StageDevice { kind: 0, memory_bytes: 80 << 30, hop_seconds: 0.0, cut_hop_seconds: 0.0 };
///     let (devices, costs) = ([device; 2], [vec![(1, one_rank)]]);
///     let problem = Problem::new(&devices, ends_block, &costs);
///     let stages = least_bottleneck(&problem, 0, 2).expect("there is room");
///     (stages[0].pieces.clone(), problem.bottleneck(&stages))
/// };
/// let (_, whole) = bottleneck(&[2.0, 4.0, 1.0, 1.0], &[true; 4]);
/// assert!((whole - 6e-3).abs() < 1e-9);
/// let (first, cut) = bottleneck(&[2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], &[true, false, false, false, true, true, true]);
/// assert_eq!(first, 0..3);
/// assert!((cut - 4e-3).abs() < 1e-9);
/// ```
pub fn least_bottleneck(
    problem: &Problem<'_>,
    kv_tokens: u64,
    max_stages: usize,
) -> Option<Vec<PlannedStage>> {
    let any = Bounds { seconds: f64::INFINITY, kv_tokens, max_stages };
    let stages = halve(problem, any, layout(problem, any)?, TIE, layout);
    let bounds = Bounds { seconds: problem.bottleneck(&stages), ..any };
    Some(even_out(problem, stages, bounds))
}

/// Says whether there is a layout within bounds, and which.
type Find = fn(&Problem<'_>, Bounds) -> Option<Vec<PlannedStage>>;

/// What was found so far.
pub(super) struct Search<'a> {
    ends_block: &'a [bool],
    widths: Option<&'a [usize]>,
    kv: KvTokens,
    find: Find,
    /// What is faster by a smaller share is passed over.
    tolerance: f64,
    pub(super) best: Option<Choice>,
    rows_per_second: f64,
}

impl<'a> Search<'a> {
    /// A search for what makes more than `rows_per_second`.
    pub(super) fn new(
        ends_block: &'a [bool],
        widths: Option<&'a [usize]>,
        kv: KvTokens,
        rows_per_second: f64,
        find: Find,
    ) -> Self {
        Search { ends_block, widths, kv, find, tolerance: 0.0, best: None, rows_per_second }
    }

    /// Goes through all cases, for the numbers of stages that so many devices may have.
    pub(super) fn run(&mut self, cases: &[Case], num_stages: impl Fn(usize) -> RangeInclusive<usize>) {
        for tolerance in TOLERANCES {
            self.tolerance = tolerance;
            for (index, case) in cases.iter().enumerate().rev() {
                if !case.devices.is_empty() && !self.ends_block.is_empty() {
                    let (fewest, most) = num_stages(case.devices.len()).into_inner();
                    self.explore(index, case, fewest, most);
                }
            }
        }
    }

    /// Looks for something faster among layouts of `fewest..=most` stages.
    fn explore(&mut self, index: usize, case: &Case, fewest: usize, most: usize) {
        let Some(kv_tokens) = self.kv.needed(case.rows, fewest as u64) else { return };
        let problem = case.problem(self.ends_block).with_widths(self.widths);
        // Without anything to be faster than, the time is endless.
        let seconds = case.decode_rows / self.rows_per_second * (1.0 - self.tolerance);
        let bounds = Bounds { seconds, kv_tokens, max_stages: most };
        let Some(stages) = (self.find)(&problem, bounds) else { return };
        if fewest < most {
            let middle = fewest.midpoint(most);
            self.explore(index, case, fewest, middle);
            self.explore(index, case, middle + 1, most);
            return;
        }
        let stages = halve(&problem, bounds, stages, self.tolerance, self.find);
        let bottleneck = problem.bottleneck(&stages);
        self.rows_per_second = case.rows_per_second(bottleneck);
        self.best = Some(Choice { case: index, stages, bottleneck });
    }
}

/// Halves the time between what is too little and what `stages` take, until only `tolerance` is left
/// between.
///
/// Each layout found takes less than the time it was looked for, and that is where it goes on: 34 halvings at most.
fn halve(
    problem: &Problem<'_>,
    bounds: Bounds,
    mut stages: Vec<PlannedStage>,
    tolerance: f64,
    find: Find,
) -> Vec<PlannedStage> {
    let (mut too_little, mut enough) = (0.0, problem.bottleneck(&stages));
    while enough - too_little > tolerance * enough {
        let seconds = too_little + (enough - too_little) / 2.0;
        match find(problem, Bounds { seconds, ..bounds }) {
            Some(faster) => {
                enough = problem.bottleneck(&faster);
                stages = faster;
            }
            None => too_little = seconds,
        }
    }
    stages
}
