//! Are the log-probabilities of prompts, and of rows that decode after them, those that plain loops find in f32?
//!
//! Of the model that ships with the program, and of small ones with random weights. Rows decode as in a job: several together, token
//! after token, across the end of a page, by steps that are captured and launched again.

use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use scheduler::{
    MicroBatch, MicroBatchId, Request, RequestKey, Sampling, SequenceId, Slice, SliceOutput, SliceTokens,
    Span,
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

/// Log-probabilities that are compared of each row that decodes: the most likely tokens', whichever these are.
const TOP: u32 = 8;

/// Where one comes from.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Source {
    /// The one that ships with the program.
    Abacus,
    /// One of [`nas::models`].
    Nas(usize),
}

/// All models, by name.
pub(crate) fn sources() -> Vec<(String, Source)> {
    let small = nas::models().into_iter().enumerate();
    let small = small.map(|(index, (name, _))| (name.to_owned(), Source::Nas(index)));
    std::iter::once(("Abacus".to_owned(), Source::Abacus)).chain(small).collect()
}

/// What is asked of a model.
struct Work {
    /// Tokens of each prompt.
    prompts: &'static [usize],
    /// Tokens that each row decodes after its prompt.
    decoded: usize,
}

impl Work {
    fn of(setting: &Setting) -> Work {
        match setting.is_small {
            true => Work { prompts: &[8, 62], decoded: 4 },
            false => Work { prompts: &[200, 61, 3, 1, 120], decoded: 8 },
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
        StepSize { rows, sequences, context_tokens: self.longest(), micro_batches: 1, arrivals: 0 }
    }
}

/// A line for jobs as they are unless they say otherwise, and one for the fast ones.
pub(crate) fn measure(source: Source, setting: &Setting) -> Result<Vec<String>> {
    let (model, work) = (open(source, setting)?, Work::of(setting));
    let f32s = Dtypes { weights: WeightType::F32, kv: KvDtype::F32 };
    let expected = logprobs(&model, &Device::Reference, f32s, &work)?;
    let bf16 = Dtypes { weights: WeightType::Bf16, kv: KvDtype::Bf16 };
    let modes = [("deterministic", models::device_of_jobs(setting)), ("fast", models::device(setting))];
    let line = |(name, device): &(&str, Device)| {
        let found = logprobs(&model, device, bf16, &work)?;
        let (of_prompts, bound) = compare(&found.of_prompts, &expected.of_prompts)?;
        let (decoded, _) = compare(&found.decoded, &expected.decoded)?;
        let off = of_prompts.max(decoded);
        ensure!(
            off <= bound,
            "{name}: prompts are off by {of_prompts}, decoded rows by {decoded}, expected {bound} at most"
        );
        Ok(format!(
            "{name}: {} log-probabilities of prompts are off by {of_prompts:.4} at most, {} of rows that decode by {decoded:.4}, of {bound:.4}",
            found.of_prompts.len(),
            found.decoded.len()
        ))
    };
    modes.iter().map(line).collect()
}

fn open(source: Source, setting: &Setting) -> Result<Model> {
    let folder = setting.cache.join(format!("logits-{}", std::process::id()));
    std::fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    let write = |name: &str, bytes: &[u8]| {
        std::fs::write(folder.join(name), bytes).with_context(|| format!("write {name}"))
    };
    let is_random = match source {
        Source::Abacus => {
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
#[derive(Default)]
struct Logprobs {
    /// Of each token of a prompt after those before it.
    of_prompts: Vec<f32>,
    /// The largest ones after each row that decodes, in falling order: their largest difference is none larger than the logits'.
    decoded: Vec<f32>,
}

/// The largest difference, and the most that it may be.
fn compare(found: &[f32], expected: &[f32]) -> Result<(f32, f32)> {
    ensure!(found.len() == expected.len(), "{} figures, expected {}", found.len(), expected.len());
    // What is no number is farther off than any bound.
    let off = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
    let off = off.fold(0.0, |most: f32, off| if off <= most { most } else { off });
    // Of tokens without a pattern log-probabilities deviate as logits do.
    Ok((off, BOUND * deviation(expected)))
}

/// Their standard deviation.
fn deviation(numbers: &[f32]) -> f32 {
    let count = numbers.len() as f32;
    let mean = numbers.iter().sum::<f32>() / count;
    (numbers.iter().map(|number| (number - mean).powi(2)).sum::<f32>() / count).sqrt()
}

/// Of all prompts in one step, and then of a token of each row in one step after the other.
fn logprobs(model: &Model, device: &Device, dtypes: Dtypes, work: &Work) -> Result<Logprobs> {
    let part = Span { start: 0, end: model.config.blocks.len() }.into();
    let pages_of_row = work.pages_of_row();
    let options = SpanOptions {
        part,
        num_pages: work.prompts.len() * pages_of_row,
        context_tokens: pages_of_row * PAGE_TOKENS,
        largest_step: Some(work.largest_step()),
    };
    let mut stage = stages::load(model, device, dtypes, options)?;
    let row = |row: usize| Row { row, pages_of_row, vocab: model.config.dims.vocab };
    let mut answers = Logprobs::default();
    let prompts = work.prompts.iter().enumerate().map(|(index, &tokens)| row(index).prompt(tokens));
    for answer in step(&mut *stage, prompts.collect())? {
        answers.of_prompts.extend(answer.prompt_logprobs.iter().map(|scored| scored.logprob));
    }
    for decoded in 0..work.decoded {
        let rows = work.prompts.iter().enumerate();
        let rows = rows.map(|(index, &tokens)| row(index).decode(tokens + decoded));
        for answer in step(&mut *stage, rows.collect())? {
            let top = answer.logprobs.context("a row that decodes has log-probabilities")?.top;
            answers.decoded.extend(top.iter().map(|(_, logprob)| logprob));
        }
    }
    Ok(answers)
}

fn step(stage: &mut dyn Stage, slices: Vec<Slice>) -> Result<Vec<SliceOutput>> {
    match stage.step(&MicroBatch { id: MicroBatchId(0), slices }, None)? {
        StageOutput::Tokens(output) => Ok(output.slices),
        StageOutput::Activations(_) => bail!("the only stage hands activations over"),
    }
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
