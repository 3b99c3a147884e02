//! Tokens a second of a whole model on one device, by the rows of a batch, beside the device's roofline.
//!
//! A batch of B rows is two passes. Prefill: B prompts of `context_tokens` each, from nothing to the first token.
//! Decode: one token for each of B sequences that attend to `context_tokens` positions. A pass is made of the
//! micro-batches that a pipeline would cut it into, and those that are alike are timed once.

use kernels::PAGE_TOKENS;
use scheduler::Load;
use serde::Serialize;

use super::at_work::{AtHand, AtWork};
use super::ceilings::Ceilings;
use super::machine;
use super::measure::Effort;
use super::points::Seconds;
use super::subject::{self, Pages, Step, Subject};
use crate::cost::{Balance, Estimator, NumberType, NumberTypes, pieces};
use crate::error::Result;
use crate::model::Model;
use crate::sharing::Sharing;
use crate::stage::{Device, Dtypes};

/// Pages that rows share, at most: many times what any cache holds of a small model.
const MAX_SHARED_PAGES: usize = 4096;

/// What is measured, and with what.
#[derive(Debug, Clone)]
pub struct ThroughputOptions {
    /// Where.
    pub device: Device,
    /// Number types.
    pub dtypes: Dtypes,
    /// Tokens of each prompt, and positions that each row attends to which decodes.
    pub context_tokens: usize,
    /// Largest micro-batch.
    pub micro_batch_tokens: usize,
    /// Rows of each batch.
    pub batches: Vec<usize>,
    /// How long to look at a micro-batch.
    pub effort: Effort,
}

/// One batch.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Throughput {
    /// Its rows.
    pub batch: usize,
    /// The device's ceilings: the higher of what was measured before and after.
    pub ceilings: Ceilings,
    /// Prompts, to the first token of each.
    pub prefill: Rate,
    /// One token for each row.
    pub decode: Rate,
}

/// How fast a pass is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rate {
    /// Tokens of the pass.
    pub tokens: usize,
    /// Its time: that of its micro-batches, one after the other.
    pub seconds: Seconds,
    /// The least that it could take by the ceilings.
    pub roofline_seconds: f64,
    /// By the median.
    pub tokens_per_second: f64,
    /// `roofline_seconds` of the median.
    pub roofline_share: f64,
}

impl ThroughputOptions {
    /// KV pages that the device needs.
    pub fn num_pages(&self, model: &Model) -> usize {
        self.pages(model).total()
    }

    fn largest_batch(&self) -> usize {
        self.batches.iter().copied().max().unwrap_or(1)
    }

    /// Rows write pages of their own. What they read before those they share: so many pages that no cache holds them.
    fn pages(&self, model: &Model) -> Pages {
        let config = &model.config;
        let values: u64 =
            config.blocks.iter().map(|block| block.attention.kv_values_per_token(config.dims)).sum();
        let page_bytes = NumberType::from(self.dtypes.kv).bytes(values) * PAGE_TOKENS as u64;
        let cold = machine::cold_bytes(&self.device).div_ceil(page_bytes.max(1)) as usize;
        let rows = self.largest_batch().min(self.micro_batch_tokens);
        let before = self.context_tokens.div_ceil(PAGE_TOKENS) - 1;
        let prompts = self.prompts_of_step() * subject::pages_of_chunk(self.chunk_tokens());
        Pages {
            own: rows.max(prompts),
            shared: (rows * before).min(cold.max(before)).clamp(1, MAX_SHARED_PAGES),
        }
    }

    /// Tokens of a prompt that go into one micro-batch.
    fn chunk_tokens(&self) -> usize {
        self.context_tokens.min(self.micro_batch_tokens)
    }

    /// Whole prompts that go into one micro-batch, or parts of one.
    fn prompts_of_step(&self) -> usize {
        (self.micro_batch_tokens / self.context_tokens).clamp(1, self.largest_batch())
    }

    /// Distinct micro-batches of the prompts of `batch` rows, and how often each comes.
    fn prefill(&self, batch: usize, pages: Pages, vocab: usize) -> Vec<(usize, Step)> {
        let context = self.context_tokens;
        if context <= self.micro_batch_tokens {
            let step = |(count, prompts)| (count, pages.prompts(prompts, 0, context, true, vocab));
            return cut(batch, self.prompts_of_step()).into_iter().map(step).collect();
        }
        let chunk = |first| {
            let tokens = self.micro_batch_tokens.min(context - first);
            (batch, pages.prompts(1, first, tokens, first + tokens == context, vocab))
        };
        (0..context).step_by(self.micro_batch_tokens).map(chunk).collect()
    }

    /// Distinct micro-batches of a decode step of `batch` rows, and how often each comes.
    fn decode(&self, batch: usize, pages: Pages, vocab: usize) -> Vec<(usize, Step)> {
        let step = |(count, rows)| (count, pages.decode(rows, self.context_tokens, None, vocab));
        cut(batch, self.micro_batch_tokens).into_iter().map(step).collect()
    }
}

/// `rows` in parts of at most `most`: how many parts, and of how many rows.
fn cut(rows: usize, most: usize) -> Vec<(usize, usize)> {
    let parts = [(rows / most, most), (1, rows % most)];
    parts.into_iter().filter(|(count, rows)| count * rows > 0).collect()
}

/// Measures a model batch by batch. `say` hears what is done before, and `hear` of each batch as soon as it has its figures.
///
/// # Errors
/// What the device refuses.
pub fn throughput(
    model: &Model,
    options: &ThroughputOptions,
    say: &mut (dyn FnMut(&str) + Send),
    hear: &mut (dyn FnMut(&Throughput) + Send),
) -> Result<()> {
    // The device's threads are pinned, and the caller's is not to be.
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| on_device_thread(model, options, say, hear));
        thread.join().expect("the device thread panicked")
    })
}

fn on_device_thread(
    model: &Model,
    options: &ThroughputOptions,
    say: &mut dyn FnMut(&str),
    hear: &mut dyn FnMut(&Throughput),
) -> Result<()> {
    let ThroughputOptions { device, dtypes, context_tokens, .. } = options;
    let vocab = model.config.dims.vocab;
    let pages = options.pages(model);
    // Whole pages are filled.
    let largest = [options.micro_batch_tokens, options.largest_batch()];
    let subject = Subject::whole(model, pages.total(), context_tokens.next_multiple_of(PAGE_TOKENS), largest);
    let mut bench = Bench {
        model,
        options,
        at_work: AtWork::load(&subject, std::slice::from_ref(device), *dtypes, AtHand::default())?,
    };
    say("model loaded");
    for step in pages.fill(None, vocab) {
        bench.at_work.seconds(&step);
    }
    bench.at_work.result()?;
    say("KV cache filled");
    let mut before = Ceilings::measure(device, *dtypes)?;
    for &batch in &options.batches {
        let prefill = bench.time(&options.prefill(batch, pages, vocab));
        let decode = bench.time(&options.decode(batch, pages, vocab));
        bench.at_work.result()?;
        let after = Ceilings::measure(device, *dtypes)?;
        let ceilings = before.max(after);
        before = after;
        let (prefill, decode) = (bench.rate(&prefill, ceilings), bench.rate(&decode, ceilings));
        hear(&Throughput { batch, ceilings, prefill, decode });
    }
    Ok(())
}

/// A model on the device.
struct Bench<'a> {
    model: &'a Model,
    options: &'a ThroughputOptions,
    at_work: AtWork,
}

/// A micro-batch that was timed.
struct Timed {
    /// How often it comes.
    count: usize,
    load: Load,
    seconds: Seconds,
}

impl Bench<'_> {
    fn time(&mut self, steps: &[(usize, Step)]) -> Vec<Timed> {
        let time = |(count, step): &(usize, Step)| {
            self.at_work.seconds(step); // Arrays find their size.
            let seconds = Seconds::of(self.at_work.repeat(step, self.options.effort));
            Timed { count: *count, load: step.batch.load(), seconds }
        };
        steps.iter().map(time).collect()
    }

    /// Of a pass.
    fn rate(&self, pass: &[Timed], ceilings: Ceilings) -> Rate {
        let config = &self.model.config;
        let Dtypes { weights, kv } = self.options.dtypes;
        let types = NumberTypes { weights: weights.into(), kv: kv.into() };
        let estimator =
            Estimator { config, roofline: ceilings.roofline(), types, balance: Balance::Roofline };
        let pieces = pieces(config, None);
        let floor = estimator.stage_seconds(&pieces, 0..pieces.len(), 1, &Sharing::default());
        let sum = |of: &dyn Fn(&Timed) -> f64| -> f64 {
            pass.iter().map(|timed| timed.count as f64 * of(timed)).sum()
        };
        let seconds = Seconds {
            median: sum(&|timed| timed.seconds.median),
            lower: sum(&|timed| timed.seconds.lower),
            upper: sum(&|timed| timed.seconds.upper),
            repeats: pass.iter().map(|timed| timed.seconds.repeats).min().unwrap_or(0),
        };
        let tokens = sum(&|timed| timed.load.tokens());
        let roofline_seconds = sum(&|timed| floor.of(timed.load));
        Rate {
            tokens: tokens as usize,
            seconds,
            roofline_seconds,
            tokens_per_second: tokens / seconds.median,
            roofline_share: roofline_seconds / seconds.median,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kernels::{KvDtype, WeightType};

    const PAGES: Pages = Pages { own: 64, shared: 8 };

    fn options(context_tokens: usize) -> ThroughputOptions {
        let dtypes = Dtypes { weights: WeightType::Bf16, kv: KvDtype::Bf16 };
        let (device, effort) = (Device::Reference, Effort::default());
        let batches = vec![1, 32];
        ThroughputOptions { device, dtypes, context_tokens, micro_batch_tokens: 100, batches, effort }
    }

    /// How often, first position, tokens and tokens that are drawn, of each distinct micro-batch.
    fn shapes(steps: &[(usize, Step)]) -> Vec<(usize, u32, usize, usize)> {
        let shape = |(count, step): &(usize, Step)| {
            let batch = &step.batch;
            let drawn = batch.slices.iter().filter(|slice| slice.sample).count();
            (*count, batch.slices[0].first_position, batch.num_tokens(), drawn)
        };
        steps.iter().map(shape).collect()
    }

    #[test]
    fn short_prompts_travel_together_and_long_ones_in_chunks() {
        assert_eq!(shapes(&options(30).prefill(7, PAGES, 50)), [(2, 0, 90, 3), (1, 0, 30, 1)]);
        assert_eq!(
            shapes(&options(250).prefill(7, PAGES, 50)),
            [(7, 0, 100, 0), (7, 100, 100, 0), (7, 200, 50, 1)]
        );
    }

    #[test]
    fn rows_that_decode_fill_micro_batches() {
        assert_eq!(shapes(&options(250).decode(230, PAGES, 50)), [(2, 249, 100, 100), (1, 249, 30, 30)]);
        assert_eq!(shapes(&options(1).decode(1, PAGES, 50)), [(1, 0, 1, 1)]);
    }
}
