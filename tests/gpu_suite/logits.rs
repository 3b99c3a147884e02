//! Are the log-probabilities of the model that ships with the program those that plain loops find in f32?

use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use scheduler::{
    MicroBatch, MicroBatchId, Request, RequestKey, Sampling, SequenceId, Slice, SliceTokens, Span,
};
use stages::{Device, Dtypes, KvDtype, Model, PAGE_TOKENS, SpanOptions, StageOutput, WeightType};

use crate::items::Setting;
use crate::models;

const CONFIG: &[u8] = include_bytes!("../../models/abacus/config.json");
const WEIGHTS: &[u8] = include_bytes!("../../models/abacus/model.safetensors");

/// As of whole jobs in bf16, see tests/jobs/logits.rs, which says why: of models whose logits have a standard deviation of 1.
const BOUND: f32 = 0.08;

/// A line.
pub(crate) fn measure(setting: &Setting) -> Result<Vec<String>> {
    let folder = setting.cache.join(format!("abacus-{}", std::process::id()));
    std::fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    for (name, bytes) in [("config.json", CONFIG), ("model.safetensors", WEIGHTS)] {
        std::fs::write(folder.join(name), bytes).with_context(|| format!("write {name}"))?;
    }
    let (model, _) = Model::open(&folder, false)?;
    let tokens = if setting.is_small { 8 } else { 200 };
    let bf16 = Dtypes { weights: WeightType::Bf16, kv: KvDtype::Bf16 };
    let found = logprobs(&model, &models::device_of_jobs(setting), bf16, tokens)?;
    let f32s = Dtypes { weights: WeightType::F32, kv: KvDtype::F32 };
    let expected = logprobs(&model, &Device::Reference, f32s, tokens)?;
    ensure!(found.len() == expected.len(), "{} figures, expected {}", found.len(), expected.len());
    // What is no number is farther off than any bound.
    let off = found.iter().zip(&expected).map(|(a, b)| (a - b).abs());
    let off = off.fold(0.0, |most: f32, off| if off <= most { most } else { off });
    // Of tokens without a pattern log-probabilities deviate as logits do.
    let bound = BOUND * deviation(&expected).max(1.0);
    ensure!(off <= bound, "off by {off}, expected {bound} at most");
    Ok(vec![format!("{} log-probabilities are off by {off:.4} at most, of {bound:.4}", found.len())])
}

/// Their standard deviation.
fn deviation(numbers: &[f32]) -> f32 {
    let count = numbers.len() as f32;
    let mean = numbers.iter().sum::<f32>() / count;
    (numbers.iter().map(|number| (number - mean).powi(2)).sum::<f32>() / count).sqrt()
}

/// Of each token of a prompt after those before it.
fn logprobs(model: &Model, device: &Device, dtypes: Dtypes, tokens: usize) -> Result<Vec<f32>> {
    let part = Span { start: 0, end: model.config.blocks.len() }.into();
    let num_pages = tokens.div_ceil(PAGE_TOKENS);
    let options =
        SpanOptions { part, num_pages, context_tokens: num_pages * PAGE_TOKENS, largest_step: None };
    let mut stage = stages::load(model, device, dtypes, options)?;
    let vocab = model.config.dims.vocab;
    let prompt: Vec<u32> = (0..tokens).map(|at| (at * 2_654_435_761 % vocab) as u32).collect();
    let sampling = Sampling { logprobs: Some(1), prompt_logprobs: true, ..Sampling::greedy(1) };
    let slice = Slice {
        sequence: SequenceId(0),
        first_position: 0,
        tokens: prompt.iter().copied().collect::<SliceTokens>(),
        pages: Arc::new((0..num_pages as u32).collect()),
        sample: false,
        score: prompt[1..].to_vec(),
        counts: None,
        mask: None,
        fed_back: None,
        request: Arc::new(Request {
            key: RequestKey(0),
            prompt: prompt.clone(),
            sampling: Arc::new(sampling),
            sample: 0,
        }),
    };
    let batch = MicroBatch { id: MicroBatchId(0), slices: vec![slice] };
    let StageOutput::Tokens(output) = stage.step(&batch, None)? else {
        bail!("the only stage hands activations over")
    };
    let scored = output.slices.iter().flat_map(|slice| &slice.prompt_logprobs);
    Ok(scored.map(|scored| scored.logprob).collect())
}
