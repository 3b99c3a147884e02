//! From a job file's words to each crate's options: deciding only, nothing is started here.

use std::ops::Range;

use actors::{PipelineOptions, StagePlacement};
use anyhow::{Result, bail};
use configs::{KvCacheTokens, Stages};
use jobs::NumericProfile;
use scheduler::Span;
use stages::{Device, Dtype, Dtypes, ModelConfig, PAGE_TOKENS, Simd};

/// A micro-batch of fewer tokens leaves a CPU waiting for its weights: 22 FLOP per byte balance bf16 dot
/// products against memory on two cores, so each token beyond about 16 is no longer nearly free.
const CPU_EFFICIENT_TOKENS: usize = 16;

/// The share of the memory left beside the weights that an automatic KV pool takes. Pages are touched
/// when they are first used, lowest first, so a job that needs less takes less.
const KV_MEMORY_SHARE: f64 = 0.5;

/// A pipeline, ready to start, and what a user may want to know about it.
#[derive(Debug)]
pub(crate) struct Lowered {
    pub(crate) options: PipelineOptions,
    /// Decisions that the job file left open and that a user may trip over.
    pub(crate) notes: Vec<String>,
}

/// What the machine has.
#[derive(Debug, Clone)]
pub(crate) struct Machine {
    /// Cores that this process may use.
    pub(crate) cores: Vec<usize>,
    /// Bytes that are free.
    pub(crate) free_bytes: u64,
}

/// Lowers `[model]` and `[pipeline]` for a model on a machine.
pub(crate) fn pipeline(
    model: &configs::Model,
    pipeline: &configs::Pipeline,
    config: &ModelConfig,
    machine: &Machine,
) -> Result<Lowered> {
    let dtypes =
        Dtypes { weights: dtype(model.dtype), kv: dtype(pipeline.kv_cache_dtype.beside(model.dtype)) };
    let spans = spans(&pipeline.stages, pipeline.devices.len(), config)?;
    let devices = devices(pipeline, machine)?;
    let stages =
        devices.into_iter().zip(spans).map(|(device, span)| StagePlacement { device, span }).collect();

    let mut notes = Vec::new();
    let (context_tokens, num_pages) =
        context_and_pages(model, pipeline, config, dtypes, machine, &mut notes)?;
    let scheduler = scheduler::Options {
        num_stages: pipeline.devices.len(),
        micro_batch_tokens: pipeline.micro_batch_tokens,
        max_sequences: pipeline.max_sequences,
        num_pages,
        page_tokens: PAGE_TOKENS,
        context_tokens,
        efficient_tokens: CPU_EFFICIENT_TOKENS,
    };
    let window = window(pipeline.max_sequences);
    Ok(Lowered { options: PipelineOptions { stages, dtypes, scheduler, window }, notes })
}

/// Rows offered to the pipeline at once.
fn window(max_sequences: usize) -> usize {
    let mut sum = 0;
    sum += max_sequences; // Running.
    sum += max_sequences; // Waiting, so that one that ends is replaced at once; the rest is being written.
    sum
}

/// What the bits of a pipeline's results depend on beside the row, the model and the seed.
pub(crate) fn numeric_profile(options: &PipelineOptions) -> NumericProfile {
    // One machine runs all its stages on one level.
    let (backend, simd) = match &options.stages[0].device {
        Device::Reference => ("reference", "none"),
        Device::Cpu { simd, .. } => ("cpu", simd.name()),
    };
    NumericProfile {
        backend: backend.to_owned(),
        simd: simd.to_owned(),
        dtype: options.dtypes.weights.name().to_owned(),
        kv_cache_dtype: options.dtypes.kv.name().to_owned(),
        tensor_parallel: 1,
    }
}

fn dtype(dtype: configs::Dtype) -> Dtype {
    match dtype {
        configs::Dtype::Bf16 => Dtype::Bf16,
        configs::Dtype::F32 => Dtype::F32,
    }
}

fn spans(stages: &Stages, num_stages: usize, config: &ModelConfig) -> Result<Vec<Span>> {
    let num_blocks = config.blocks.len();
    match stages {
        Stages::Auto => {
            let costs = stages::cost::flops(config);
            Ok(scheduler::partition(&costs.blocks, num_stages, costs.first, costs.last)?)
        }
        Stages::Blocks(ranges) => {
            let end = ranges.last().map_or(0, |range| range.end);
            if end != num_blocks {
                let slots = match config.num_slots - num_blocks {
                    0 => String::new(),
                    empty => {
                        format!(" ({} slots, of which {empty} are empty and no blocks)", config.num_slots)
                    }
                };
                bail!(
                    "[pipeline] stages: the last one ends at block {end}, the model has {num_blocks} blocks{slots}"
                );
            }
            Ok(ranges.iter().map(|range| Span { start: range.start, end: range.end }).collect())
        }
    }
}

fn devices(pipeline: &configs::Pipeline, machine: &Machine) -> Result<Vec<Device>> {
    let simd = match pipeline.simd {
        configs::Simd::Reference => return Ok(vec![Device::Reference; pipeline.devices.len()]),
        configs::Simd::Auto => Simd::detect(),
        configs::Simd::Avx512 => Simd::Avx512,
        configs::Simd::Avx2 => Simd::Avx2,
        configs::Simd::Portable => Simd::Portable,
    };
    if !simd.is_available() {
        bail!(
            "[pipeline] simd: this processor lacks {}, the best it has is {}",
            simd.name(),
            Simd::detect().name()
        );
    }
    let num_groups = pipeline.devices.iter().map(|device| device.index + 1).max().unwrap_or(1);
    Ok((pipeline.devices.iter())
        .map(|device| {
            let cores = machine.cores[core_group(machine.cores.len(), num_groups, device.index)].to_vec();
            let threads = pipeline.threads.unwrap_or(cores.len());
            Device::Cpu { cores, threads, simd }
        })
        .collect())
}

/// The `index`-th of `num_groups` equal groups of cores. Where there are more groups than cores,
/// neighbours share one.
fn core_group(num_cores: usize, num_groups: usize, index: usize) -> Range<usize> {
    let start = index * num_cores / num_groups;
    let end = ((index + 1) * num_cores / num_groups).max(start + 1);
    start..end
}

fn context_and_pages(
    model: &configs::Model,
    pipeline: &configs::Pipeline,
    config: &ModelConfig,
    dtypes: Dtypes,
    machine: &Machine,
    notes: &mut Vec<String>,
) -> Result<(usize, usize)> {
    let longest = config.max_position_embeddings;
    let context = model.max_context_tokens.unwrap_or(longest);
    if context > longest {
        bail!(
            "[model] max_context_tokens: found {context}, the model's max_position_embeddings is {longest}"
        );
    }
    let wanted = context.next_multiple_of(PAGE_TOKENS) * pipeline.max_sequences;
    let tokens = match pipeline.kv_cache_tokens {
        KvCacheTokens::Tokens(tokens) => tokens.next_multiple_of(PAGE_TOKENS),
        KvCacheTokens::Auto => {
            let room = tokens_with_room(config, dtypes, machine);
            wanted.min(room / PAGE_TOKENS * PAGE_TOKENS).max(PAGE_TOKENS)
        }
    };
    // Where the user fixed neither, the pool bounds the context; where the user fixed the pool, a row that
    // does not fit is an error line, so that no answer depends on it.
    let is_clipped = pipeline.kv_cache_tokens == KvCacheTokens::Auto
        && model.max_context_tokens.is_none()
        && tokens < context;
    if is_clipped {
        notes.push(format!(
            "the context is {tokens} tokens of the model's {longest}: more KV cache does not fit into memory"
        ));
        return Ok((tokens, tokens / PAGE_TOKENS));
    }
    Ok((context, tokens / PAGE_TOKENS))
}

/// KV tokens that the memory beside the weights has room for.
fn tokens_with_room(config: &ModelConfig, dtypes: Dtypes, machine: &Machine) -> usize {
    let weights = config.params() * bytes(dtypes.weights);
    let values: u64 =
        config.blocks.iter().map(|block| block.attention.kv_values_per_token(config.dims)).sum();
    let per_token = values * bytes(dtypes.kv);
    let room = (machine.free_bytes.saturating_sub(weights) as f64 * KV_MEMORY_SHARE) as u64;
    match room.checked_div(per_token) {
        Some(tokens) => tokens as usize,
        None => usize::MAX, // Without attention there is nothing to keep.
    }
}

fn bytes(dtype: Dtype) -> u64 {
    match dtype {
        Dtype::F32 => 4,
        Dtype::Bf16 => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn core_groups_are_equal_and_cover_the_machine() {
        let groups = |cores, groups| (0..groups).map(|i| core_group(cores, groups, i)).collect::<Vec<_>>();
        assert_eq!(core_group(2, 1, 0), 0..2);
        assert_eq!(groups(2, 2), [0..1, 1..2]);
        assert_eq!(groups(8, 3), [0..2, 2..5, 5..8]);
        assert_eq!(groups(2, 4), [0..1, 0..1, 1..2, 1..2]);
        assert_eq!(groups(1, 3), [0..1, 0..1, 0..1]);
    }
}
