//! Which blocks each stage owns.
//!
//! A pipeline is as fast as its slowest stage, so the cut that counts is the one whose largest sum
//! of costs is least. This module knows blocks by their cost alone; what a cost is (FLOPs, bytes,
//! measured time) is the caller's affair.

use std::fmt;
use std::ops::Range;

use crate::error::Error;

/// A run of consecutive blocks, `[start, end)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span {
    /// First block.
    pub start: usize,
    /// The block after the last.
    pub end: usize,
}

impl Span {
    /// How many blocks it holds.
    pub fn num_blocks(&self) -> usize {
        self.end - self.start
    }

    /// Its block indices.
    pub fn range(&self) -> Range<usize> {
        self.start..self.end
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}, {})", self.start, self.end)
    }
}

/// Costs that differ by less than this share are equal. Rounding alone parts the sums of equal spans by
/// 1e-12 or so, and no cost is known to nine digits.
const TIE: f64 = 1e-9;

/// Cuts blocks into `num_stages` non-empty spans whose largest cost is least.
///
/// The first stage also pays `first` (the embedding), the last one `last` (norm, head and sampling).
/// Of the cuts with that largest cost it is the most even one, by the sum of squared costs, and of
/// those that are equally even the one whose last stages start latest.
pub fn partition(costs: &[f64], num_stages: usize, first: f64, last: f64) -> Result<Vec<Span>, Error> {
    assert!(num_stages > 0, "a pipeline has at least one stage");
    let all = costs.iter().chain([&first, &last]);
    assert!(
        all.clone().all(|cost| cost.is_finite() && *cost >= 0.0),
        "a cost is negative or not finite: {costs:?}"
    );
    if costs.len() < num_stages {
        return Err(Error::TooFewBlocks { num_blocks: costs.len(), num_stages });
    }
    let costs = StageCosts { before: prefix_sums(costs), num_stages, first, last };
    let largest = costs.cheapest(f64::max, f64::INFINITY).total;
    let most_even = costs.cheapest(|sum, cost| sum + cost * cost, largest * (1.0 + TIE));
    Ok(most_even.spans)
}

/// `sums[i]` is the cost of the first `i` blocks.
fn prefix_sums(costs: &[f64]) -> Vec<f64> {
    let mut sums = vec![0.0];
    sums.extend(costs.iter().scan(0.0, |sum, cost| {
        *sum += cost;
        Some(*sum)
    }));
    sums
}

/// What each stage would pay for each span.
struct StageCosts {
    before: Vec<f64>,
    num_stages: usize,
    first: f64,
    last: f64,
}

/// A cut and what it costs under one measure.
struct Cut {
    total: f64,
    spans: Vec<Span>,
}

impl StageCosts {
    fn cost(&self, stage: usize, span: Span) -> f64 {
        let mut cost = self.before[span.end] - self.before[span.start];
        if stage == 0 {
            cost += self.first;
        }
        if stage + 1 == self.num_stages {
            cost += self.last;
        }
        cost
    }

    /// The cut whose costs, folded by `fold`, are least, among those with no stage above `limit`.
    ///
    /// A table over (stages so far, blocks so far): stages · blocks² steps, 5 million for 64 stages
    /// of 400 blocks.
    fn cheapest(&self, fold: impl Fn(f64, f64) -> f64, limit: f64) -> Cut {
        let num_blocks = self.before.len() - 1;
        // totals[end]: the least for the blocks before `end`; starts[stage][end]: where its last span starts.
        let mut totals = vec![f64::INFINITY; num_blocks + 1];
        totals[0] = 0.0;
        let mut starts = vec![vec![0; num_blocks + 1]; self.num_stages];
        for (stage, starts) in starts.iter_mut().enumerate() {
            let mut next = vec![f64::INFINITY; num_blocks + 1];
            for end in stage + 1..=num_blocks {
                for start in (stage..end).rev() {
                    let cost = self.cost(stage, Span { start, end });
                    let total = fold(totals[start], cost);
                    if cost <= limit && total < next[end] * (1.0 - TIE) {
                        next[end] = total;
                        starts[end] = start;
                    }
                }
            }
            totals = next;
        }
        Cut { total: totals[num_blocks], spans: trace(&starts, num_blocks) }
    }
}

/// Follows the table's starts back from the last stage.
fn trace(starts: &[Vec<usize>], num_blocks: usize) -> Vec<Span> {
    let mut end = num_blocks;
    let mut spans: Vec<Span> = Vec::with_capacity(starts.len());
    for starts in starts.iter().rev() {
        spans.push(Span { start: starts[end], end });
        end = starts[end];
    }
    spans.reverse();
    spans
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(costs: &[f64], num_stages: usize, first: f64, last: f64) -> String {
        let spans = partition(costs, num_stages, first, last).unwrap();
        spans.iter().map(Span::to_string).collect::<Vec<_>>().join(" ")
    }

    /// What the dearest stage pays.
    fn largest(costs: &[f64], spans: &[Span], first: f64, last: f64) -> f64 {
        let mut sums: Vec<f64> = spans.iter().map(|span| costs[span.range()].iter().sum()).collect();
        sums[0] += first;
        *sums.last_mut().unwrap() += last;
        sums.into_iter().fold(0.0, f64::max)
    }

    /// Every cut of `[start, end)` into `num_stages` spans.
    fn all_cuts(start: usize, end: usize, num_stages: usize) -> Vec<Vec<Span>> {
        if num_stages == 1 {
            return if start < end { vec![vec![Span { start, end }]] } else { vec![] };
        }
        let mut cuts = vec![];
        for middle in start + 1..end {
            for mut rest in all_cuts(middle, end, num_stages - 1) {
                rest.insert(0, Span { start, end: middle });
                cuts.push(rest);
            }
        }
        cuts
    }

    #[test]
    fn the_dearest_stage_is_as_cheap_as_in_any_cut() {
        let mut state = 1_u64;
        let mut draw = |bound: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % bound
        };
        for _ in 0..500 {
            let num_blocks = 1 + draw(9) as usize;
            let num_stages = 1 + draw(num_blocks as u64) as usize;
            let costs: Vec<f64> = (0..num_blocks).map(|_| draw(8) as f64 * 0.1).collect();
            let (first, last) = (draw(5) as f64 * 0.3, draw(5) as f64 * 0.3);
            let spans = partition(&costs, num_stages, first, last).unwrap();
            assert_eq!((spans.len(), spans[0].start, spans[num_stages - 1].end), (num_stages, 0, num_blocks));
            assert!(spans.windows(2).all(|pair| pair[0].end == pair[1].start), "{spans:?}");
            assert!(spans.iter().all(|span| span.num_blocks() > 0), "{spans:?}");
            let least = all_cuts(0, num_blocks, num_stages)
                .iter()
                .map(|spans| largest(&costs, spans, first, last))
                .fold(f64::INFINITY, f64::min);
            let ours = largest(&costs, &spans, first, last);
            assert!(ours <= least + 1e-9, "{costs:?} in {num_stages}: {ours} for {spans:?}, least {least}");
        }
    }

    #[test]
    fn equal_blocks_are_cut_evenly() {
        assert_eq!(cut(&[0.1; 30], 2, 0.0, 0.0), "[0, 15) [15, 30)");
        assert_eq!(cut(&[0.1; 5], 3, 0.0, 0.0), "[0, 2) [2, 4) [4, 5)");
    }

    #[test]
    fn the_even_cut_is_preferred_where_one_block_decides() {
        assert_eq!(cut(&[9.0, 1.0, 1.0, 1.0, 1.0], 3, 0.0, 0.0), "[0, 1) [1, 3) [3, 5)");
    }

    #[test]
    fn embedding_and_head_are_paid_by_the_outer_stages() {
        assert_eq!(cut(&[1.0; 8], 2, 0.0, 2.0), "[0, 5) [5, 8)");
        assert_eq!(cut(&[1.0; 8], 2, 2.0, 0.0), "[0, 3) [3, 8)");
        assert_eq!(cut(&[1.0; 8], 1, 2.0, 2.0), "[0, 8)");
    }

    #[test]
    fn more_stages_than_blocks_are_refused() {
        let error = partition(&[1.0, 1.0], 3, 0.0, 0.0).unwrap_err();
        assert_eq!(error.to_string(), "2 blocks cannot be cut into 3 stages");
    }
}
