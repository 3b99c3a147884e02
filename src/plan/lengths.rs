//! How long a job's rows are: counts and sums, in memory that does not depend on how many rows there are.

use std::collections::BTreeMap;

use crate::cli::LengthsArg;
use crate::plan::setting::Mix;

/// Rows by their lengths.
///
/// Prompts are counted exactly, and so are the sums that costs depend on where lengths are known. Kinds of rows may be as many
/// as rows: beyond [`MAX_KINDS`] those that are near each other are counted as one.
#[derive(Debug, Clone)]
pub(crate) struct Lengths {
    /// Rows with a prompt of so many tokens, by that number.
    prompts: Vec<u64>,
    /// Rows with a prompt, an output and a limit of the output of so many times `grain` tokens.
    kinds: BTreeMap<[u64; 3], Count>,
    grain: u64,
    rows: u64,
    sums: Sums,
}

/// How often there are such rows, and sequences: a row with several choices is as many.
#[derive(Debug, Clone, Copy, Default)]
struct Count {
    rows: u64,
    sequences: u64,
}

/// Rows that are alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RowKind {
    pub(crate) prompt: u64,
    /// Tokens of the output, or their mean.
    pub(crate) output: u64,
    /// The most that the output may have.
    pub(crate) limit: u64,
    /// How many rows these are.
    pub(crate) rows: u64,
    sequences: u64,
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

/// Kinds of rows that are kept apart: some 4 MB of them.
const MAX_KINDS: usize = 1 << 16;

impl Default for Lengths {
    fn default() -> Self {
        Lengths { prompts: vec![], kinds: BTreeMap::new(), grain: 1, rows: 0, sums: Sums::default() }
    }
}

impl Lengths {
    /// Rows that are all alike, counted as one. Their output may have up to `limit` tokens.
    pub(crate) fn alike(prompt: u64, output: u64, limit: u64) -> Self {
        let mut lengths = Self::default();
        lengths.add(prompt, output, limit, 1);
        lengths
    }

    /// Counts one more row, with so many choices.
    pub(crate) fn add(&mut self, prompt: u64, output: u64, limit: u64, choices: u64) {
        let place = usize::try_from(prompt).expect("a prompt in memory");
        if self.prompts.len() <= place {
            self.prompts.resize(place + 1, 0);
        }
        self.prompts[place] += 1;
        self.rows += 1;
        let kind = [prompt, output, limit].map(|tokens| tokens / self.grain);
        self.kinds.entry(kind).or_default().add(Count { rows: 1, sequences: choices });
        if self.kinds.len() > MAX_KINDS {
            self.coarsen();
        }
        self.sums.add(prompt.into(), output.into(), choices.into());
    }

    /// Counts lengths in steps twice as wide: an eighth of the kinds are left where they are dense.
    fn coarsen(&mut self) {
        self.grain *= 2;
        for (kind, count) in std::mem::take(&mut self.kinds) {
            self.kinds.entry(kind.map(|steps| steps / 2)).or_default().add(count);
        }
    }

    /// The rows, those that are alike together; where kinds are more than can be kept, those of the middle of a step.
    pub(crate) fn kinds(&self) -> impl Iterator<Item = RowKind> {
        let middle = |steps: u64| steps.saturating_mul(self.grain).saturating_add((self.grain - 1) / 2);
        self.kinds.iter().map(move |(kind, count)| {
            let [prompt, output, limit] = kind.map(middle);
            RowKind { prompt, output, limit: limit.max(output), rows: count.rows, sequences: count.sequences }
        })
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
        let is_longer = |kind: &RowKind| (kind.prompt + kind.output).saturating_sub(1) > tokens;
        self.kinds().filter(is_longer).map(|kind| kind.rows).sum()
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

    /// What a job of such rows asks on average where outputs are spread around theirs, or none if they generate nothing.
    pub(crate) fn mix(&self, spread: LengthsArg) -> Option<Mix> {
        let sums = &self.sums;
        let ratio = |over: u128, under: u128| over as f64 / under as f64;
        let outputs = match spread {
            LengthsArg::Fixed => Outputs::of(sums),
            LengthsArg::Exponential | LengthsArg::Lognormal => self.spread(spread),
        };
        // A row is in flight for as long as it generates, and in the middle of that it keeps half of its output. Long
        // ones are in flight more often.
        let attended = (outputs.prompt_output + outputs.output_output / 2.0) / outputs.output;
        (sums.output > 0).then(|| Mix {
            prompt_tokens: ratio(sums.prompt, sums.sequences),
            output_tokens: outputs.output / sums.sequences as f64,
            decode_context: attended,
            prefill_context: ratio(sums.prompt_prompt, 2 * sums.prompt.max(1)),
            kv_tokens_per_row: attended.ceil() as u64,
        })
    }

    fn spread(&self, spread: LengthsArg) -> Outputs {
        let mut sums = Outputs::default();
        for kind in self.kinds().filter(|kind| kind.output > 0) {
            let (sequences, prompt) = (kind.sequences as f64, kind.prompt as f64);
            let moments = spread.moments(kind.output as f64, kind.limit as f64);
            sums.output += sequences * moments.first;
            sums.prompt_output += sequences * prompt * moments.first;
            sums.output_output += sequences * moments.second;
        }
        sums
    }
}

impl Count {
    fn add(&mut self, more: Count) {
        self.rows += more.rows;
        self.sequences += more.sequences;
    }
}

/// Sums over all sequences in which outputs have a part.
#[derive(Debug, Clone, Copy, Default)]
struct Outputs {
    output: f64,
    prompt_output: f64,
    output_output: f64,
}

impl Outputs {
    /// Of outputs that are known.
    fn of(sums: &Sums) -> Self {
        Outputs {
            output: sums.output as f64,
            prompt_output: sums.prompt_output as f64,
            output_output: sums.output_output as f64,
        }
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
            (0..1000).for_each(|_| lengths.add(prompt, output, output, 3));
            let mix = lengths.mix(LengthsArg::Fixed).unwrap();
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
        lengths.add(100, 10, 10, 1);
        lengths.add(1000, 90, 90, 1);
        let steps = |prompt: f64, output: usize| (0..output).map(move |step| prompt + step as f64 + 0.5);
        let attended: f64 = steps(100.0, 10).chain(steps(1000.0, 90)).sum();
        let mix = lengths.mix(LengthsArg::Fixed).unwrap();
        assert!((mix.decode_context - attended / 100.0).abs() < 1e-9, "{mix:?}");
        assert!((mix.prefill_context - (100.0 * 50.0 + 1000.0 * 500.0) / 1100.0).abs() < 1e-9, "{mix:?}");
        assert_eq!((mix.kv_tokens_per_row, mix.output_tokens), (951, 50.0));
    }

    /// Whoever looks at a moment of a job of geometric lengths finds rows with a whole mean behind them.
    #[test]
    fn long_rows_are_in_flight_more_often() {
        let mut lengths = Lengths::default();
        (0..10).for_each(|_| lengths.add(100, 200, 1_000_000, 1));
        let mix = |spread| lengths.mix(spread).unwrap();
        assert_eq!(mix(LengthsArg::Fixed).kv_tokens_per_row, 200);
        assert_eq!(mix(LengthsArg::Exponential).kv_tokens_per_row, 300);
        let (exponential, lognormal) = (mix(LengthsArg::Exponential), mix(LengthsArg::Lognormal));
        assert!((exponential.output_tokens - 200.0).abs() < 1e-6, "{exponential:?}");
        assert!((lognormal.decode_context - (100.0 + 100.0 * 1f64.exp())).abs() < 0.5, "{lognormal:?}");
    }

    #[test]
    fn prompts_are_told_by_their_ranks() {
        let mut lengths = Lengths::default();
        (1..=100).rev().for_each(|prompt| lengths.add(prompt, 5, 5, 1));
        let quantiles = [0.0, 0.5, 0.95, 1.0].map(|share| lengths.prompt_quantile(share));
        assert_eq!(quantiles, [1, 50, 95, 100]);
        assert_eq!((lengths.longer_than(103), lengths.longer_than(104), lengths.longer_than(0)), (1, 0, 100));
    }

    #[test]
    fn nothing_is_asked_where_nothing_is_generated() {
        assert!(Lengths::alike(5, 0, 0).mix(LengthsArg::Fixed).is_none());
        assert!(Lengths::default().mix(LengthsArg::Fixed).is_none());
    }

    #[test]
    fn kinds_beyond_counting_are_joined_with_their_neighbours() {
        let mut lengths = Lengths::default();
        let pair = |row: u64| (1 + row % 1000, 1 + row / 1000);
        (0..300_000).map(pair).for_each(|(prompt, output)| lengths.add(prompt, output, output, 1));
        assert!(lengths.kinds.len() <= MAX_KINDS && lengths.grain == 4, "{}", lengths.grain);
        assert_eq!(lengths.kinds().map(|kind| kind.rows).sum::<u64>(), 300_000);
        let mean = lengths.kinds().map(|kind| (kind.prompt * kind.rows) as f64).sum::<f64>() / 300_000.0;
        assert!((mean - 500.5).abs() < 2.0, "{mean}");
        assert_eq!(
            (lengths.prompt_quantile(0.5), lengths.mix(LengthsArg::Fixed).unwrap().prompt_tokens),
            (500, 500.5)
        );
    }
}
