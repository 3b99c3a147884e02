//! Are the log-probabilities of prompts, and of rows that decode after them, those that plain loops find in f32?
//!
//! Of the model that ships with the program, and of small ones with random weights. Rows decode as in a job: several together, token
//! after token, across the end of a page, by steps that are captured and launched again. Where a row's bits do not depend on its batch,
//! two stages must have those of one: they hand over on the device and are given each micro-batch before they are done with the one
//! before, so that nothing but events keeps one queue from reading what the other has yet to write.

use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use scheduler::{
    MicroBatch, MicroBatchId, MicroBatchOutput, Request, RequestKey, Sampling, SequenceId, Slice,
    SliceTokens, Span,
};
use stages::{
    Device, Dtypes, KvDtype, Model, PAGE_TOKENS, SpanOptions, Stage, StageOutput, StepSize, WeightType,
};

use crate::items::Setting;
use crate::{models, nas};

const CONFIG: &[u8] = include_bytes!("../../models/abacus/config.json");
const WEIGHTS: &[u8] = include_bytes!("../../models/abacus/model.safetensors");

/// As of whole jobs in bf16, see tests/jobs/logits.rs, which says why: of models whose logits have a standard deviation of 1, to which all
/// errors are in proportion.
const BOUND: f32 = 0.08;

/// The same of Abacus in fp8, keys and values too, and in 4 bits: what quantising costs it. On the emulator it is off by 0.65 and 1.10
/// deviations at the prompts of [`Work::SHORT`]; bounds are half as much again. Over longer ones, whose tokens have no pattern, it comes to be
/// as far off as logits that have nothing to do with each other, which no bound would tell from an error.
const FP8_BOUND: f32 = 1.0;
const INT4_BOUND: f32 = 1.65;

const F32: Dtypes = Dtypes { weights: WeightType::F32, kv: KvDtype::F32 };
const BF16: Dtypes = Dtypes { weights: WeightType::Bf16, kv: KvDtype::Bf16 };
const FP8: Dtypes = Dtypes { weights: WeightType::Fp8, kv: KvDtype::Fp8 };
const INT4: Dtypes = Dtypes { weights: WeightType::Int4Weight, kv: KvDtype::Bf16 };

/// Log-probabilities that are compared of each row that decodes: the most likely tokens', whichever these are.
const TOP: u32 = 8;

/// Micro-batches that stages have begun with.
const QUEUED: usize = 2;

/// Where a model comes from, and how it is run.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Source {
    /// The one that ships with the program.
    Abacus,
    /// The same in fp8 and in 4 bits.
    NarrowAbacus,
    /// One of [`nas::models`].
    Nas(usize),
}

/// All models, by name.
pub(crate) fn sources() -> Vec<(String, Source)> {
    let small = nas::models().into_iter().enumerate();
    let small = small.map(|(index, (name, _))| (name.to_owned(), Source::Nas(index)));
    let abacus = [("Abacus", Source::Abacus), ("Abacus in fp8 and in 4 bits", Source::NarrowAbacus)];
    abacus.map(|(name, source)| (name.to_owned(), source)).into_iter().chain(small).collect()
}

/// A way to compute.
struct Way {
    name: &'static str,
    /// Whether a row has the same bits in any batch.
    is_deterministic: bool,
    dtypes: Dtypes,
    /// How far it may be off, in deviations of the logits.
    bound: f32,
}

impl Source {
    pub(crate) fn bar(self) -> &'static str {
        match self {
            Source::NarrowAbacus => "the bounds of narrow weights, 1.0 and 1.65 deviations of the logits",
            _ => "the bf16 bound of 0.08 of a deviation of the logits",
        }
    }

    /// As jobs are unless they say otherwise, and as they are fast.
    fn ways(self) -> Vec<Way> {
        let way = |name, is_deterministic, dtypes, bound| Way { name, is_deterministic, dtypes, bound };
        match self {
            Source::NarrowAbacus => vec![
                way("fp8, deterministic", true, FP8, FP8_BOUND),
                way("fp8, fast", false, FP8, FP8_BOUND),
                way("4 bits, deterministic", true, INT4, INT4_BOUND),
            ],
            _ => vec![way("deterministic", true, BF16, BOUND), way("fast", false, BF16, BOUND)],
        }
    }
}

/// What is asked of a model.
struct Work {
    /// Tokens of each prompt.
    prompts: &'static [usize],
    /// Tokens that each row decodes after its prompt.
    decoded: usize,
}

impl Work {
    const SHORT: Work = Work { prompts: &[8, 62], decoded: 4 };

    fn of(source: Source, setting: &Setting) -> Work {
        match source {
            Source::Abacus | Source::Nas(_) if !setting.is_small => {
                Work { prompts: &[200, 61, 3, 1, 120], decoded: 8 }
            }
            _ => Work::SHORT,
        }
    }

    fn longest(&self) -> usize {
        self.prompts.iter().max().map_or(0, |prompt| prompt + self.decoded)
    }

    fn pages_of_row(&self) -> usize {
        self.longest().div_ceil(PAGE_TOKENS)
    }

    fn largest_step(&self) -> StepSize {
        let (rows, sequences) = (self.prompts.iter().sum(), self.prompts.len());
        StepSize { rows, sequences, context_tokens: self.longest(), micro_batches: QUEUED + 1, arrivals: 0 }
    }

    /// All prompts in one, and then a token of each row in one after the other.
    fn micro_batches(&self, vocab: usize) -> Vec<Arc<MicroBatch>> {
        let pages_of_row = self.pages_of_row();
        let row = move |(row, &tokens): (usize, &usize)| (Row { row, pages_of_row, vocab }, tokens);
        let rows = || self.prompts.iter().enumerate().map(row);
        let prompts: Vec<Slice> = rows().map(|(row, tokens)| row.prompt(tokens)).collect();
        let decoded =
            |index| -> Vec<Slice> { rows().map(|(row, tokens)| row.decode(tokens + index)).collect() };
        let all = std::iter::once(prompts).chain((0..self.decoded).map(decoded)).enumerate();
        all.map(|(id, slices)| Arc::new(MicroBatch { id: MicroBatchId(id as u64), slices })).collect()
    }
}

/// A line for each way to compute, and one for two stages where they must have the bits of one.
pub(crate) fn measure(source: Source, setting: &Setting) -> Result<Vec<String>> {
    let (model, work) = (open(source, setting)?, Work::of(source, setting));
    let expected = of_one_stage(&model, &Device::Reference, F32, &work)?;
    let mut lines = Vec::new();
    for Way { name, is_deterministic, dtypes, bound } in source.ways() {
        let device = if is_deterministic { models::device_of_jobs(setting) } else { models::device(setting) };
        let found = of_one_stage(&model, &device, dtypes, &work)?;
        lines.push(compared(name, &found, &expected, bound)?);
        if is_deterministic {
            let of_two = of_two_stages(&model, &device, dtypes, &work)?;
            let (of_prompts, _) = compare(&of_two.of_prompts, &found.of_prompts, 0.0)?;
            let (decoded, _) = compare(&of_two.decoded, &found.decoded, 0.0)?;
            ensure!(
                of_two == found,
                "{name}: two stages are off from one by {of_prompts} at prompts and by {decoded} at decoded rows, expected the same numbers"
            );
            lines.push(format!("{name}, by two stages that are ahead of their host: the same numbers"));
        }
    }
    Ok(lines)
}

/// A line; an error where something is off by more than so many deviations.
fn compared(name: &str, found: &Logprobs, expected: &Logprobs, bound: f32) -> Result<String> {
    let (of_prompts, most) = compare(&found.of_prompts, &expected.of_prompts, bound)?;
    let (decoded, _) = compare(&found.decoded, &expected.decoded, bound)?;
    ensure!(
        of_prompts.max(decoded) <= most,
        "{name}: prompts are off by {of_prompts}, decoded rows by {decoded}, expected {most} at most"
    );
    Ok(format!(
        "{name}: {} log-probabilities of prompts are off by {of_prompts:.4} at most, {} of rows that decode by {decoded:.4}, of {most:.4}",
        found.of_prompts.len(),
        found.decoded.len()
    ))
}

fn open(source: Source, setting: &Setting) -> Result<Model> {
    let folder = setting.cache.join(format!("logits-{}", std::process::id()));
    std::fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    let write = |name: &str, bytes: &[u8]| {
        std::fs::write(folder.join(name), bytes).with_context(|| format!("write {name}"))
    };
    let is_random = match source {
        Source::Abacus | Source::NarrowAbacus => {
            write("model.safetensors", WEIGHTS)?;
            write("config.json", CONFIG)?;
            false
        }
        Source::Nas(index) => {
            write("config.json", nas::models()[index].1.to_string().as_bytes())?;
            true
        }
    };
    Ok(Model::open(&folder, is_random)?.0)
}

/// What a model says.
#[derive(Debug, Default, PartialEq)]
struct Logprobs {
    /// Of each token of a prompt after those before it.
    of_prompts: Vec<f32>,
    /// The largest ones after each row that decodes, in falling order: their largest difference is none larger than the logits'.
    decoded: Vec<f32>,
}

impl Logprobs {
    /// Adds what is said of a micro-batch of prompts, or of rows that decode.
    fn add(&mut self, output: MicroBatchOutput) -> Result<()> {
        for answer in output.slices {
            ensure!(answer.failure.is_none(), "a row has failed: {:?}", answer.failure);
            self.of_prompts.extend(answer.prompt_logprobs.iter().map(|scored| scored.logprob));
            if let Some(logprobs) = answer.logprobs {
                self.decoded.extend(logprobs.top.iter().map(|(_, logprob)| logprob));
            }
        }
        Ok(())
    }
}

/// The largest difference, and the most that it may be with a bound of so many deviations.
fn compare(found: &[f32], expected: &[f32], bound: f32) -> Result<(f32, f32)> {
    ensure!(found.len() == expected.len(), "{} figures, expected {}", found.len(), expected.len());
    // What is no number is farther off than any bound.
    let off = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
    let off = off.fold(0.0, |most: f32, off| if off <= most { most } else { off });
    // Of tokens without a pattern log-probabilities deviate as logits do.
    Ok((off, bound * deviation(expected)))
}

/// Their standard deviation.
fn deviation(numbers: &[f32]) -> f32 {
    let count = numbers.len() as f32;
    let mean = numbers.iter().sum::<f32>() / count;
    (numbers.iter().map(|number| (number - mean).powi(2)).sum::<f32>() / count).sqrt()
}

/// By a stage that is the whole model, one step after the other.
fn of_one_stage(model: &Model, device: &Device, dtypes: Dtypes, work: &Work) -> Result<Logprobs> {
    let all = Span { start: 0, end: model.config.blocks.len() };
    let mut stage = load(model, device, dtypes, (all, work))?;
    let mut found = Logprobs::default();
    for batch in work.micro_batches(model.config.dims.vocab) {
        match stage.step(&batch, None)? {
            StageOutput::Tokens(output) => found.add(output)?,
            StageOutput::Activations(_) => bail!("the only stage hands activations over"),
        }
    }
    Ok(found)
}

/// By two stages, each of which is given a micro-batch while it is at the one before.
fn of_two_stages(model: &Model, device: &Device, dtypes: Dtypes, work: &Work) -> Result<Logprobs> {
    let end = model.config.blocks.len();
    let spans = [Span { start: 0, end: end / 2 }, Span { start: end / 2, end }];
    let stages = spans.map(|span| load(model, device, dtypes, (span, work)));
    let mut stages = stages.into_iter().collect::<Result<Vec<_>>>()?;
    let (mut found, mut under_way) = (Logprobs::default(), 0);
    for batch in work.micro_batches(model.config.dims.vocab) {
        if under_way == QUEUED {
            found.add(collect(&mut stages)?)?;
            under_way -= 1;
        }
        let mut input = None;
        for stage in &mut stages {
            input = stage.queue(&batch, input.as_ref())?.context("a step has no room")?.activations;
        }
        under_way += 1;
    }
    for _ in 0..under_way {
        found.add(collect(&mut stages)?)?;
    }
    Ok(found)
}

/// What came of the oldest micro-batch.
fn collect(stages: &mut [Box<dyn Stage>]) -> Result<MicroBatchOutput> {
    let mut output = None;
    for stage in stages {
        output = stage.collect()?.output;
    }
    output.context("the last stage answers")
}

fn load(
    model: &Model,
    device: &Device,
    dtypes: Dtypes,
    (span, work): (Span, &Work),
) -> Result<Box<dyn Stage>> {
    let pages_of_row = work.pages_of_row();
    let options = SpanOptions {
        part: span.into(),
        num_pages: work.prompts.len() * pages_of_row,
        context_tokens: pages_of_row * PAGE_TOKENS,
        largest_step: Some(work.largest_step()),
    };
    Ok(stages::load(model, device, dtypes, options)?)
}

/// A sequence, whose tokens are given.
#[derive(Debug, Clone, Copy)]
struct Row {
    row: usize,
    pages_of_row: usize,
    vocab: usize,
}

impl Row {
    /// Knuth's multiplicative hash: tokens that lie apart.
    fn token(&self, position: usize) -> u32 {
        ((self.row * 1009 + position) * 2_654_435_761 % self.vocab) as u32
    }

    /// All of it, each token scored after those before it.
    fn prompt(&self, tokens: usize) -> Slice {
        let score = (1..tokens).map(|position| self.token(position)).collect();
        Slice { score, ..self.slice(0, tokens) }
    }

    /// One token more.
    fn decode(&self, position: usize) -> Slice {
        Slice { sample: true, ..self.slice(position, 1) }
    }

    fn slice(&self, first: usize, tokens: usize) -> Slice {
        let sampling = Sampling { logprobs: Some(TOP), prompt_logprobs: true, ..Sampling::greedy(1) };
        let pages = self.row * self.pages_of_row..(self.row + 1) * self.pages_of_row;
        Slice {
            sequence: SequenceId(self.row as u64),
            first_position: first as u32,
            tokens: (first..first + tokens).map(|position| self.token(position)).collect::<SliceTokens>(),
            pages: Arc::new(pages.map(|page| page as u32).collect()),
            sample: false,
            bars_stops: false,
            score: Vec::new(),
            counts: None,
            mask: None,
            fed_back: None,
            request: Arc::new(Request {
                key: RequestKey(self.row as u128),
                prompt: vec![self.token(0)],
                sampling: Arc::new(sampling),
                sample: 0,
            }),
        }
    }
}
