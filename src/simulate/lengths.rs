//! Lengths of rows, drawn from a stated distribution: a function of the seed and the row's number alone.

use std::f64::consts::TAU;

use scheduler::Lengths;
use stages::random::Stream;

use crate::cli::LengthsArg;

/// Spread of the logarithm of log-normal lengths. Chat corpora have 0.9 to 1.3.
pub(super) const SIGMA: f64 = 1.0;

/// How long the rows of a job are.
#[derive(Debug, Clone, Copy)]
pub(super) struct LengthDraw {
    pub(super) distribution: LengthsArg,
    pub(super) seed: u64,
    pub(super) prompt_tokens: u32,
    /// Mean of the output, before the limit of a row's context cuts any.
    pub(super) output_tokens: u32,
}

impl LengthDraw {
    /// The first `rows` rows.
    pub(super) fn rows(self, rows: u64) -> impl Iterator<Item = Lengths> {
        (0..rows).map(move |row| self.row(row))
    }

    fn row(self, row: u64) -> Lengths {
        Lengths { prompt_tokens: self.prompt_tokens, output_tokens: self.output(row) }
    }

    fn output(self, row: u64) -> u32 {
        let mean = f64::from(self.output_tokens);
        let stream = Stream::new(self.seed, u128::from(row));
        // In (0, 1], for the logarithms.
        let uniform = |position| 1.0 - stream.uniform(0, position);
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
        let draw = LengthDraw { distribution, seed: 3, prompt_tokens: 5, output_tokens };
        draw.rows(ROWS).map(|lengths| f64::from(lengths.output_tokens)).collect()
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
    fn a_mean_of_one_is_one_token_and_no_row_has_none() {
        for distribution in [LengthsArg::Fixed, LengthsArg::Exponential] {
            assert!(draw(distribution, 1).into_iter().all(|length| length == 1.0));
        }
        assert!(draw(LengthsArg::Lognormal, 1).into_iter().all(|length| length >= 1.0));
    }
}
