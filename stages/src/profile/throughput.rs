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
use crate::memory::GpuMemory;
use crate::model::Model;
use crate::shard::RankPlace;
use crate::sharing::Sharing;
use crate::span::SpanOptions;
use crate::stage::{Device, Dtypes};

/// Pages that rows share, at most: many times what any cache holds of a small model.
const MAX_SHARED_PAGES: usize = 4096;

/// Of a GPU's memory so much is left to measuring its ceilings, by matrices of up to 8,192 rows and some workspace, to loaded kernels and
/// to captured steps.
const BESIDE_BYTES: u64 = 3 << 30;

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
    /// KV pages that there is room for, see [`ThroughputOptions::pages_in`]: rows then have pages of their own as far as these go. Where nobody says,
    /// rows share what they read of: so many pages that no cache holds those of a block, and no more, for a processor is long at filling
    /// them.
    pub most_pages: Option<usize>,
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

    /// KV pages that a GPU of so many multiprocessors has room for beside the model and its ceilings.
    pub fn pages_in(&self, model: &Model, free_bytes: u64, multiprocessors: usize) -> usize {
        let SpanOptions { part, largest_step, .. } = self.subject(model).options;
        let step = largest_step.expect("a whole model's steps are known");
        let alone = (RankPlace::ALONE, &Sharing::default());
        let memory = GpuMemory::of(&model.config, part, alone, self.dtypes, (step, Some(multiprocessors)));
        memory.pages_in(free_bytes.saturating_sub(BESIDE_BYTES))
    }

    fn largest_batch(&self) -> usize {
        self.batches.iter().copied().max().unwrap_or(1)
    }

    /// Rows write pages of their own. What they read before those they share where there is no room for as many.
    fn pages(&self, model: &Model) -> Pages {
        let rows = self.largest_batch().min(self.micro_batch_tokens);
        let before = self.context_tokens.div_ceil(PAGE_TOKENS) - 1;
        let prompts = self.prompts_of_step() * subject::pages_of_chunk(self.chunk_tokens());
        let own = rows.max(prompts);
        let most = match self.most_pages {
            Some(pages) => pages.saturating_sub(own),
            None => self.cold_pages(model).min(MAX_SHARED_PAGES),
        };
        Pages { own, shared: (rows * before).min(most.max(before)).max(1) }
    }

    /// Pages that no cache holds of one block: what rows share they read within its attention, and then not before the next step.
    fn cold_pages(&self, model: &Model) -> usize {
        let config = &model.config;
        let values = config.blocks.iter().map(|block| block.attention.kv_values_per_token(config.dims));
        let page_bytes =
            NumberType::from(self.dtypes.kv).bytes(values.max().unwrap_or(0)) * PAGE_TOKENS as u64;
        machine::cold_bytes(&self.device).div_ceil(page_bytes.max(1)) as usize
    }

    /// What the model is measured as on its device.
    fn subject(&self, model: &Model) -> Subject {
        let num_pages = self.pages(model).total();
        // Whole pages are filled.
        let context_tokens = self.context_tokens.next_multiple_of(PAGE_TOKENS);
        Subject::whole(model, num_pages, context_tokens, [self.micro_batch_tokens, self.largest_batch()])
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
    let ThroughputOptions { device, dtypes, .. } = options;
    let vocab = model.config.dims.vocab;
    let (pages, subject) = (options.pages(model), options.subject(model));
    let mut bench = Bench {
        model,
        options,
        at_work: AtWork::load(&subject, std::slice::from_ref(device), *dtypes, AtHand::default())?,
    };
    say("model loaded");
    bench.at_work.fill_pages(pages.total())?;
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
    use std::path::Path;

    const PAGES: Pages = Pages { own: 64, shared: 8 };

    fn options(context_tokens: usize) -> ThroughputOptions {
        let dtypes = Dtypes { weights: WeightType::Bf16, kv: KvDtype::Bf16 };
        let (device, effort) = (Device::Reference, Effort::default());
        let batches = vec![1, 32];
        let (micro_batch_tokens, most_pages) = (100, None);
        ThroughputOptions { device, dtypes, context_tokens, micro_batch_tokens, batches, most_pages, effort }
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
    fn rows_have_pages_of_their_own_as_far_as_memory_goes() {
        let config = Path::new("../configs/models/Llama-3_3-Nemotron-Super-49B-v1");
        let model = Model::open(config, true).unwrap().0;
        let options = |most_pages| ThroughputOptions {
            micro_batch_tokens: 2048,
            batches: vec![256],
            most_pages,
            ..options(2048)
        };
        let pages = |most_pages| {
            let Pages { own, shared } = options(most_pages).pages(&model);
            [own, shared]
        };
        assert_eq!(pages(Some(usize::MAX)), [256, 256 * 31]);
        assert_eq!(pages(Some(1000)), [256, 744]);
        // A row has all of its own context in any case.
        assert_eq!(pages(Some(0)), [256, 31]);
        // A page of one block is 256 KB, and more of them are read over than a cache holds.
        let [own, shared] = pages(None);
        let cold = machine::cold_bytes(&Device::Reference).div_ceil(256 << 10) as usize;
        assert_eq!([own, shared], [256, cold.clamp(31, MAX_SHARED_PAGES)]);
    }

    #[test]
    fn a_gpu_has_room_for_the_pages_that_weights_and_ceilings_leave() {
        let config = Path::new("../configs/models/Llama-3_3-Nemotron-Super-49B-v1");
        let model = Model::open(config, true).unwrap().0;
        let options = ThroughputOptions { micro_batch_tokens: 2048, batches: vec![256], ..options(640) };
        let pages = |free_bytes| options.pages_in(&model, free_bytes, 132);
        assert_eq!(pages(90_000_000_000), 0);
        // 49 blocks' pages of 256 KB.
        let found = pages(148_000_000_000) - pages(148_000_000_000 - 1000 * 49 * (256 << 10));
        assert_eq!(found, 1000);
    }

    #[test]
    fn rows_that_decode_fill_micro_batches() {
        assert_eq!(shapes(&options(250).decode(230, PAGES, 50)), [(2, 249, 100, 100), (1, 249, 30, 30)]);
        assert_eq!(shapes(&options(1).decode(1, PAGES, 50)), [(1, 0, 1, 1)]);
    }
}
