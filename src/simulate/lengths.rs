//! Lengths of rows, drawn from a stated distribution: a function of the seed and the row's number alone.
//!
//! Each row is like one of the job's, by chance and as often as the job has it: it has that one's prompt, and around that
//! one's output the distribution draws. Where `[plan]` says both lengths all rows are alike.

use std::f64::consts::TAU;

use scheduler::Lengths;
use stages::random::Stream;

use crate::cli::LengthsArg;
use crate::plan::spread::SIGMA;

/// How long the rows of a job are.
#[derive(Debug, Clone)]
pub(super) struct LengthDraw {
    pub(super) distribution: LengthsArg,
    pub(super) seed: u64,
    pub(super) kinds: Vec<Kind>,
}

/// Rows of the job that are alike.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kind {
    pub(super) prompt_tokens: u32,
    /// Mean of the output, before any limit cuts it.
    pub(super) output_tokens: u32,
    /// The rows' own limit.
    pub(super) max_tokens: u32,
    /// How many rows these are and those of the kinds before, together.
    pub(super) rows_so_far: u64,
}

impl LengthDraw {
    /// Those of the first `rows` rows that the `replica`-th of so many has: each has every `replicas`-th.
    pub(super) fn rows(&self, replica: usize, replicas: usize, rows: u64) -> impl Iterator<Item = Lengths> {
        (replica as u64..rows).step_by(replicas).map(move |row| self.row(row))
    }

    fn row(&self, row: u64) -> Lengths {
        let stream = Stream::new(self.seed, u128::from(row));
        // In (0, 1], for the logarithms.
        let uniform = |position| 1.0 - stream.uniform(0, position);
        let all = self.kinds[self.kinds.len() - 1].rows_so_far;
        let place = stream.uniform(0, 2) * all as f64;
        let kind = self.kinds.partition_point(|kind| kind.rows_so_far as f64 <= place);
        let Kind { prompt_tokens, output_tokens, max_tokens, .. } =
            self.kinds[kind.min(self.kinds.len() - 1)];
        Lengths { prompt_tokens, output_tokens: self.output(output_tokens.into(), uniform).min(max_tokens) }
    }

    fn output(&self, mean: f64, uniform: impl Fn(u32) -> f64) -> u32 {
        let length = match self.distribution {
            LengthsArg::Fixed => mean,
            // Each token is the last one with a chance of 1 / mean.
            LengthsArg::Exponential => 1.0 + (uniform(0).ln() / (-1.0 / mean).ln_1p()).floor(),
            LengthsArg::Lognormal => {
                // Box and Muller. The mean of exp(sigma z) is exp(sigma² / 2).
                let normal = (-2.0 * uniform(0).ln()).sqrt() * (TAU * uniform(1)).cos();
                (mean * (SIGMA * normal - SIGMA * SIGMA / 2.0).exp()).round()
            }
        };
        length.max(1.0) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROWS: u64 = 20_000;

    fn draw(distribution: LengthsArg, output_tokens: u32) -> Vec<f64> {
        let kinds = vec![Kind { prompt_tokens: 5, output_tokens, max_tokens: u32::MAX, rows_so_far: 1 }];
        let draw = LengthDraw { distribution, seed: 3, kinds };
        draw.rows(0, 1, ROWS).map(|lengths| f64::from(lengths.output_tokens)).collect()
    }

    fn mean(lengths: &[f64]) -> f64 {
        lengths.iter().sum::<f64>() / lengths.len() as f64
    }

    #[test]
    fn the_mean_is_the_one_asked_for() {
        for (distribution, spread) in
            [(LengthsArg::Fixed, 0.0), (LengthsArg::Exponential, 1.0), (LengthsArg::Lognormal, 1.32)]
        {
            let lengths = draw(distribution, 200);
            // Five standard deviations of a mean of so many draws, and half a token for rounding.
            let off = 200.0 * 5.0 * spread / (ROWS as f64).sqrt() + 0.5;
            assert!((mean(&lengths) - 200.0).abs() <= off, "{distribution:?}: {}", mean(&lengths));
        }
    }

    #[test]
    fn half_of_the_rows_are_shorter_than_the_median() {
        for (distribution, median) in
            [(LengthsArg::Exponential, 200.0 * 2f64.ln()), (LengthsArg::Lognormal, 200.0 * (-0.5f64).exp())]
        {
            let shorter = draw(distribution, 200).into_iter().filter(|length| *length < median).count();
            let share = shorter as f64 / ROWS as f64;
            assert!((share - 0.5).abs() < 0.02, "{distribution:?}: {share}");
        }
    }

    #[test]
    fn rows_are_as_often_of_a_kind_as_those_of_the_job() {
        let kind = |prompt_tokens, rows_so_far| Kind {
            prompt_tokens,
            output_tokens: prompt_tokens,
            max_tokens: u32::MAX,
            rows_so_far,
        };
        let kinds = vec![kind(10, 1), kind(20, 4)];
        let draw = LengthDraw { distribution: LengthsArg::Fixed, seed: 3, kinds };
        let rows: Vec<Lengths> = draw.rows(0, 1, ROWS).collect();
        assert!(rows.iter().all(|row| row.output_tokens == row.prompt_tokens));
        let short = rows.iter().filter(|row| row.prompt_tokens == 10).count() as f64 / ROWS as f64;
        assert!((short - 0.25).abs() < 0.02, "{short}");
    }

    #[test]
    fn no_row_is_longer_than_it_may_be() {
        let kinds = vec![Kind { prompt_tokens: 5, output_tokens: 40, max_tokens: 40, rows_so_far: 1 }];
        let draw = LengthDraw { distribution: LengthsArg::Exponential, seed: 3, kinds };
        let lengths: Vec<u32> = draw.rows(0, 1, ROWS).map(|row| row.output_tokens).collect();
        assert!(lengths.iter().all(|length| *length <= 40) && lengths.contains(&40) && lengths.contains(&1));
    }

    #[test]
    fn a_mean_of_one_is_one_token_and_no_row_has_none() {
        for distribution in [LengthsArg::Fixed, LengthsArg::Exponential] {
            assert!(draw(distribution, 1).into_iter().all(|length| length == 1.0));
        }
        assert!(draw(LengthsArg::Lognormal, 1).into_iter().all(|length| length >= 1.0));
    }
}
