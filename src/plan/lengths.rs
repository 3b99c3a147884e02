//! How long a job's rows are: counts and sums, in memory that does not depend on how many rows there are.

use std::collections::BTreeMap;

use crate::plan::setting::Mix;

/// Rows by their lengths.
///
/// Prompts are counted exactly, and all that costs depend on are exact sums. Pairs of lengths may be as many as rows:
/// beyond [`MAX_PAIRS`] those that are near each other are counted as one.
#[derive(Debug, Clone)]
pub(crate) struct Lengths {
    /// Rows with a prompt of so many tokens, by that number.
    prompts: Vec<u64>,
    /// Rows with a prompt and an output of so many times `grain` tokens.
    pairs: BTreeMap<(u64, u64), u64>,
    grain: u64,
    rows: u64,
    sums: Sums,
}

/// Over all sequences: a row with several choices is as many.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    sequences: u128,
    prompt: u128,
    output: u128,
    prompt_prompt: u128,
    prompt_output: u128,
    output_output: u128,
}

/// Pairs of lengths that are kept apart: some 3 MB of them.
const MAX_PAIRS: usize = 1 << 16;

impl Default for Lengths {
    fn default() -> Self {
        Lengths { prompts: vec![], pairs: BTreeMap::new(), grain: 1, rows: 0, sums: Sums::default() }
    }
}

impl Lengths {
    /// Rows that are all alike, counted as one.
    pub(crate) fn alike(prompt: u64, output: u64) -> Self {
        let mut lengths = Self::default();
        lengths.add(prompt, output, 1);
        lengths
    }

    /// Counts one more row, with so many choices.
    pub(crate) fn add(&mut self, prompt: u64, output: u64, choices: u64) {
        let place = usize::try_from(prompt).expect("a prompt in memory");
        if self.prompts.len() <= place {
            self.prompts.resize(place + 1, 0);
        }
        self.prompts[place] += 1;
        self.rows += 1;
        *self.pairs.entry((prompt / self.grain, output / self.grain)).or_default() += 1;
        if self.pairs.len() > MAX_PAIRS {
            self.coarsen();
        }
        self.sums.add(prompt.into(), output.into(), choices.into());
    }

    /// Counts lengths in steps twice as wide: a fourth of the pairs are left where they are dense.
    fn coarsen(&mut self) {
        self.grain *= 2;
        for ((prompt, output), rows) in std::mem::take(&mut self.pairs) {
            *self.pairs.entry((prompt / 2, output / 2)).or_default() += rows;
        }
    }

    /// Lengths of prompt and output, and how many rows have them; where pairs are more than can be kept, those of
    /// the middle of a step.
    pub(crate) fn pairs(&self) -> impl Iterator<Item = (u64, u64, u64)> {
        let middle = |steps: u64| steps * self.grain + (self.grain - 1) / 2;
        self.pairs.iter().map(move |(&(prompt, output), &rows)| (middle(prompt), middle(output), rows))
    }

    /// How many rows were counted.
    pub(crate) fn rows(&self) -> u64 {
        self.rows
    }

    /// How many sequences they are.
    pub(crate) fn sequences(&self) -> u64 {
        self.sums.sequences as u64
    }

    /// Rows that keep more than so many tokens in the cache when they end: the last token is never fed back.
    pub(crate) fn longer_than(&self, tokens: u64) -> u64 {
        let kept = |prompt: u64, output: u64| (prompt + output).saturating_sub(1);
        self.pairs()
            .filter(|(prompt, output, _)| kept(*prompt, *output) > tokens)
            .map(|(.., rows)| rows)
            .sum()
    }

    /// Tokens that `share` of the prompts have at most.
    pub(crate) fn prompt_quantile(&self, share: f64) -> u64 {
        let rank = (share * self.rows as f64).ceil().max(1.0) as u64;
        let mut below = 0;
        let at_rank = self.prompts.iter().position(|rows| {
            below += rows;
            below >= rank
        });
        at_rank.unwrap_or(0) as u64
    }

    /// What a job of such rows asks on average, or none if they generate nothing.
    pub(crate) fn mix(&self) -> Option<Mix> {
        let sums = &self.sums;
        let ratio = |over: u128, under: u128| over as f64 / under as f64;
        // A row is in flight for as long as it generates, and in the middle of that it keeps half of its output.
        let attended_twice = 2 * sums.prompt_output + sums.output_output;
        (sums.output > 0).then(|| Mix {
            prompt_tokens: ratio(sums.prompt, sums.sequences),
            output_tokens: ratio(sums.output, sums.sequences),
            decode_context: ratio(attended_twice, 2 * sums.output),
            prefill_context: ratio(sums.prompt_prompt, 2 * sums.prompt.max(1)),
            kv_tokens_per_row: attended_twice.div_ceil(2 * sums.output) as u64,
        })
    }
}

impl Sums {
    fn add(&mut self, prompt: u128, output: u128, choices: u128) {
        self.sequences += choices;
        self.prompt += choices * prompt;
        self.output += choices * output;
        self.prompt_prompt += choices * prompt * prompt;
        self.prompt_output += choices * prompt * output;
        self.output_output += choices * output * output;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_are_alike_are_in_the_middle_of_their_output() {
        for (prompt, output) in [(1024, 1024), (1, 16_382), (7, 1), (131_000, 71)] {
            let mut lengths = Lengths::default();
            (0..1000).for_each(|_| lengths.add(prompt, output, 3));
            let mix = lengths.mix().unwrap();
            assert_eq!((mix.prompt_tokens, mix.output_tokens), (prompt as f64, output as f64));
            assert_eq!(mix.decode_context, prompt as f64 + output as f64 / 2.0);
            assert_eq!(mix.prefill_context, prompt as f64 / 2.0);
            assert_eq!(mix.kv_tokens_per_row, prompt + output.div_ceil(2));
        }
    }

    /// Two rows, step by step: each decode step attends to the prompt and to what there is of the output, and
    /// of all steps those of the long row are more.
    #[test]
    fn contexts_are_weighted_by_the_time_that_rows_are_in_flight() {
        let mut lengths = Lengths::default();
        lengths.add(100, 10, 1);
        lengths.add(1000, 90, 1);
        let steps = |prompt: f64, output: usize| (0..output).map(move |step| prompt + step as f64 + 0.5);
        let attended: f64 = steps(100.0, 10).chain(steps(1000.0, 90)).sum();
        let mix = lengths.mix().unwrap();
        assert!((mix.decode_context - attended / 100.0).abs() < 1e-9, "{mix:?}");
        assert!((mix.prefill_context - (100.0 * 50.0 + 1000.0 * 500.0) / 1100.0).abs() < 1e-9, "{mix:?}");
        assert_eq!((mix.kv_tokens_per_row, mix.output_tokens), (951, 50.0));
    }

    #[test]
    fn prompts_are_told_by_their_ranks() {
        let mut lengths = Lengths::default();
        (1..=100).rev().for_each(|prompt| lengths.add(prompt, 5, 1));
        let quantiles = [0.0, 0.5, 0.95, 1.0].map(|share| lengths.prompt_quantile(share));
        assert_eq!(quantiles, [1, 50, 95, 100]);
        assert_eq!((lengths.longer_than(103), lengths.longer_than(104), lengths.longer_than(0)), (1, 0, 100));
    }

    #[test]
    fn nothing_is_asked_where_nothing_is_generated() {
        assert!(Lengths::alike(5, 0).mix().is_none());
        assert!(Lengths::default().mix().is_none());
    }

    #[test]
    fn pairs_beyond_counting_are_joined_with_their_neighbours() {
        let mut lengths = Lengths::default();
        let pair = |row: u64| (1 + row % 1000, 1 + row / 1000);
        (0..300_000).map(pair).for_each(|(prompt, output)| lengths.add(prompt, output, 1));
        assert!(lengths.pairs.len() <= MAX_PAIRS && lengths.grain == 4, "{}", lengths.grain);
        assert_eq!(lengths.pairs().map(|(.., rows)| rows).sum::<u64>(), 300_000);
        let mean = lengths.pairs().map(|(prompt, _, rows)| (prompt * rows) as f64).sum::<f64>() / 300_000.0;
        assert!((mean - 500.5).abs() < 2.0, "{mean}");
        assert_eq!((lengths.prompt_quantile(0.5), lengths.mix().unwrap().prompt_tokens), (500, 500.5));
    }
}
