//! Which tensors a model has: their names and shapes, by block, and the check of a checkpoint against them.

use std::collections::BTreeSet;

use kernels::{CpuMatrix, WeightType};

use crate::block::{Attention, Block, Dims, Ffn};
use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::quantized;

/// The embedding, `[vocab, hidden]`.
pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
/// The norm before the output matrix, `[hidden]`.
pub(crate) const LAST_NORM: &str = "model.norm.weight";
/// The output matrix, `[vocab, hidden]`, absent where it is tied to the embedding.
pub(crate) const HEAD: &str = "lm_head.weight";

/// How many misfits one error or warning spells out.
const MAX_NAMES: usize = 8;

/// The name of a tensor of a slot, such as `model.layers.3.mlp.up_proj.weight`.
pub(crate) fn slot_tensor(slot: usize, part: &str) -> String {
    format!("model.layers.{slot}.{part}.weight")
}

/// The tensors of one block with their shapes (NeMo and TensorRT-LLM name them alike).
pub(crate) fn block_tensors(block: Block, dims: Dims) -> Vec<(String, Vec<usize>)> {
    let Dims { hidden, heads, head_dim, .. } = dims;
    let mut tensors = Vec::new();
    let mut add = |part: &str, shape: &[usize]| tensors.push((slot_tensor(block.slot, part), shape.to_vec()));
    if block.attention != Attention::None {
        add("input_layernorm", &[hidden]);
    }
    match block.attention {
        Attention::Gqa { kv_heads } => {
            add("self_attn.q_proj", &[heads * head_dim, hidden]);
            add("self_attn.k_proj", &[kv_heads * head_dim, hidden]);
            add("self_attn.v_proj", &[kv_heads * head_dim, hidden]);
            add("self_attn.o_proj", &[hidden, heads * head_dim]);
        }
        Attention::Linear => add("self_attn.linear_attn", &[hidden, hidden]),
        Attention::None => {}
    }
    if block.ffn != Ffn::None {
        add("post_attention_layernorm", &[hidden]);
    }
    match block.ffn {
        Ffn::SwiGlu { width } => {
            add("mlp.gate_proj", &[width, hidden]);
            add("mlp.up_proj", &[width, hidden]);
            add("mlp.down_proj", &[hidden, width]);
        }
        Ffn::Linear => add("mlp.linear_mlp", &[hidden, hidden]),
        Ffn::None => {}
    }
    tensors
}

/// Every tensor of a model with its shape.
pub(crate) fn model_tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let Dims { vocab, hidden, .. } = config.dims;
    let mut tensors = vec![(EMBEDDING.to_owned(), vec![vocab, hidden])];
    tensors.extend(config.blocks.iter().flat_map(|&block| block_tensors(block, config.dims)));
    tensors.push((LAST_NORM.to_owned(), vec![hidden]));
    if !config.tied_embeddings {
        tensors.push((HEAD.to_owned(), vec![vocab, hidden]));
    }
    tensors
}

/// Memory that a model's weights take on a CPU, in bytes: scales and padding counted. Zeros that a checkpoint of 4 bits may have
/// take a fortieth more.
pub fn weight_bytes(config: &ModelConfig, weights: WeightType) -> u64 {
    let table = weights.operands().into();
    (model_tensors(config).iter())
        .map(|(name, shape)| match (name.as_str(), shape.as_slice()) {
            (EMBEDDING | HEAD, &[rows, cols]) => CpuMatrix::bytes_of(table, rows, cols) as u64,
            (_, &[rows, cols]) => CpuMatrix::bytes_of(weights, rows, cols) as u64,
            (_, shape) => shape.iter().product::<usize>() as u64 * size_of::<f32>() as u64,
        })
        .sum()
}

/// Checks a checkpoint against its configuration; returns the surplus tensors, which nothing reads.
///
/// # Errors
/// Missing and misshapen tensors, types that are not implemented, weights of a half that the
/// configuration calls absent: all of them in one [`Error::Tensors`].
pub(crate) fn check(config: &ModelConfig, checkpoint: &Checkpoint) -> Result<Vec<String>> {
    let expected = model_tensors(config);
    let mut problems = Vec::new();
    for (name, shape) in &expected {
        problems.extend(quantized::view(checkpoint, name, shape).err());
    }
    let names: BTreeSet<&str> = expected.iter().map(|(name, _)| name.as_str()).collect();
    let mut surplus = Vec::new();
    let is_part = |name: &str| quantized::whole_of(name).is_some_and(|whole| names.contains(whole.as_str()));
    for (name, _) in checkpoint.iter().filter(|(name, _)| !names.contains(name) && !is_part(name)) {
        match contradiction(config, name) {
            Some(problem) => problems.push(problem),
            None if is_harmless(config, name) => {}
            None => surplus.push(name.to_owned()),
        }
    }
    if problems.is_empty() {
        return Ok(surplus);
    }
    let hidden = problems.len().saturating_sub(MAX_NAMES);
    problems.truncate(MAX_NAMES);
    if hidden > 0 {
        problems.push(format!("and {hidden} more"));
    }
    Err(Error::Tensors { path: checkpoint.directory().to_owned(), problems })
}

/// Tensors that may stand in a checkpoint unread: computed frequencies, and a tied model's copy of its
/// embedding.
fn is_harmless(config: &ModelConfig, name: &str) -> bool {
    name.ends_with("rotary_emb.inv_freq") || (config.tied_embeddings && name == HEAD)
}

/// What is wrong with a surplus tensor that belongs to a half which the configuration describes otherwise.
fn contradiction(config: &ModelConfig, name: &str) -> Option<String> {
    let (slot, part) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let slot: usize = slot.parse().ok().filter(|&slot| slot < config.num_slots)?;
    let block = config.blocks.iter().find(|block| block.slot == slot);
    let attention = block.map_or(Attention::None, |block| block.attention);
    let ffn = block.map_or(Ffn::None, |block| block.ffn);
    let half = |is_attention: bool| if is_attention { "attention" } else { "FFN" };
    let (is_attention, kind) = match part.split_once('.')?.0 {
        _ if part.ends_with("rotary_emb.inv_freq") => return None,
        "self_attn" | "input_layernorm" => match attention {
            Attention::Gqa { .. } => (true, "grouped-query attention"),
            Attention::Linear => (true, "linear"),
            Attention::None => (true, "absent"),
        },
        "mlp" | "post_attention_layernorm" => match ffn {
            Ffn::SwiGlu { .. } => (false, "SwiGLU"),
            Ffn::Linear => (false, "linear"),
            Ffn::None => (false, "absent"),
        },
        _ => return None,
    };
    let half = half(is_attention);
    if part.ends_with(".bias") {
        return Some(format!("tensor {name} is a bias, and biases are not implemented"));
    }
    let is_weight_of_other_kind =
        kind == "absent" || part.ends_with("_proj.weight") || part.contains("linear_");
    is_weight_of_other_kind
        .then(|| format!("tensor {name} is there, but config.json calls the {half} of slot {slot} {kind}"))
}

/// A list of names for a message, cut where it grows long.
pub(crate) fn name_list(names: &[String]) -> String {
    let shown = names.iter().take(MAX_NAMES).cloned().collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(MAX_NAMES) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}
