//! `config.json` into blocks.
//!
//! Reads the configurations of `LlamaForCausalLM` and of `DeciLMForCausalLM` (model types `nemotron-nas`
//! and `deci`). It refuses by name whatever would change the model's answers and is not implemented; it
//! never guesses.

use std::path::Path;

use serde_json::Value;

use crate::block::{Attention, Block, Dims, Ffn};
use crate::error::{Error, Result};
use crate::fields::{Fields, MAX_COUNT, as_count};
use crate::rope::Rope;

/// A model's shape, as its `config.json` tells it.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Dimensions that every block shares.
    pub dims: Dims,
    /// The blocks that do something, in order.
    pub blocks: Vec<Block>,
    /// Entries of the block list, empty ones counted.
    pub num_slots: usize,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f32,
    /// The output matrix is the embedding.
    pub tied_embeddings: bool,
    /// Rotary frequencies.
    pub rope: Rope,
    /// Longest sequence the model was made for.
    pub max_position_embeddings: usize,
    /// Tokens that end a sequence.
    pub eos_token_ids: Vec<u32>,
    /// The checkpoint asks for keys and values in fp8.
    pub asks_for_fp8_kv: bool,
}

/// Bounds beside [`MAX_COUNT`], and for the same reason.
const MAX_HIDDEN: usize = 1 << 19;
const MAX_HEADS: usize = 1 << 12;
const MAX_BLOCKS: usize = 1 << 12;

/// How the two architectures write their block lists.
enum Family {
    Llama,
    DeciLm,
}

impl ModelConfig {
    /// Reads `config.json`, or the file that `path` itself names.
    ///
    /// # Errors
    /// [`Error::Config`] names the key, what was found and what was expected.
    pub fn read(path: &Path) -> Result<Self> {
        let is_file = path.is_file() || path.extension().is_some_and(|extension| extension == "json");
        let path = if is_file { path.to_owned() } else { path.join("config.json") };
        let text =
            std::fs::read_to_string(&path).map_err(|source| Error::Read { path: path.clone(), source })?;
        Self::parse(&path, &text)
    }

    /// Parses the text of a `config.json`; `path` is named in errors.
    pub fn parse(path: &Path, text: &str) -> Result<Self> {
        let value: Value = serde_json::from_str(text)
            .map_err(|e| Error::Json { path: path.to_owned(), message: format!("not JSON: {e}") })?;
        let Value::Object(map) = &value else {
            return Err(Error::Json { path: path.to_owned(), message: "found no object at the top".into() });
        };
        let top = Fields { path, prefix: String::new(), map };
        let family = family(&top)?;
        refuse_unimplemented(&top)?;

        let dims = dims(&top)?;
        let slots = match family {
            Family::Llama => uniform_slots(&top, dims)?,
            Family::DeciLm if top.value("block_configs").is_some() => block_config_slots(&top, dims)?,
            Family::DeciLm => per_layer_slots(&top, dims)?,
        };
        let num_slots = slots.len();
        let blocks: Vec<Block> = (slots.into_iter().enumerate())
            .map(|(slot, (attention, ffn))| Block { slot, attention, ffn })
            .filter(|block| block.attention != Attention::None || block.ffn != Ffn::None)
            .collect();
        if blocks.is_empty() {
            return Err(top.error(
                "block_configs",
                format!("{num_slots} empty slots"),
                "a block that does something",
            ));
        }
        let max_position_embeddings = top.count("max_position_embeddings")?;
        Ok(ModelConfig {
            dims,
            blocks,
            num_slots,
            rms_norm_eps: rms_norm_eps(&top)?,
            tied_embeddings: top.flag("tie_word_embeddings")?,
            rope: rope(&top)?,
            max_position_embeddings,
            eos_token_ids: eos_token_ids(&top, dims.vocab)?,
            asks_for_fp8_kv: crate::quantization_config::asks_for_fp8_kv(&top)?,
        })
    }

    /// Parameters of the embedding, of every block, of the last norm and of the output matrix.
    pub fn params(&self) -> u64 {
        let table = self.dims.vocab as u64 * self.dims.hidden as u64;
        let mut sum = table; // The embedding.
        sum += self.blocks.iter().map(|block| block.params(self.dims)).sum::<u64>();
        sum += self.dims.hidden as u64; // The last norm.
        sum += if self.tied_embeddings { 0 } else { table }; // The output matrix.
        sum
    }
}

fn family(top: &Fields<'_>) -> Result<Family> {
    const KNOWN: &str = "LlamaForCausalLM or DeciLMForCausalLM";
    let named = match top.value("architectures") {
        Some(Value::Array(names)) => match names.first() {
            Some(Value::String(name)) => Some(name.as_str()),
            Some(other) => return Err(top.error("architectures", other, KNOWN)),
            None => None,
        },
        Some(other) => return Err(top.error("architectures", other, "a list of names")),
        None => None,
    };
    match (named, top.value("model_type").and_then(Value::as_str)) {
        (Some("LlamaForCausalLM"), _) | (None, Some("llama")) => Ok(Family::Llama),
        (Some("DeciLMForCausalLM"), _) | (None, Some("nemotron-nas" | "deci")) => Ok(Family::DeciLm),
        (Some(other), _) => Err(top.error("architectures", format!("{other:?}"), KNOWN)),
        (None, Some(other)) => {
            Err(top.error("model_type", format!("{other:?}"), "llama, nemotron-nas or deci"))
        }
        (None, None) => Err(top.error("architectures", "nothing", KNOWN)),
    }
}

/// Features that would change the answers and are not implemented.
fn refuse_unimplemented(top: &Fields<'_>) -> Result<()> {
    for key in ["attention_bias", "mlp_bias"] {
        if top.flag(key)? {
            return Err(top.error(key, "true", "false: biases are not implemented"));
        }
    }
    match top.value("hidden_act") {
        None => {}
        Some(Value::String(name)) if name == "silu" => {}
        Some(other) => return Err(top.error("hidden_act", other, "\"silu\"")),
    }
    crate::quantization_config::check(top)?;
    for key in ["sliding_window", "layer_types"] {
        let is_plain = match top.value(key) {
            None => true,
            Some(Value::Array(kinds)) => kinds.iter().all(|kind| kind == "full_attention"),
            Some(_) => false,
        };
        if !is_plain {
            return Err(top.error(
                key,
                top.value(key).unwrap_or(&Value::Null),
                "nothing: it is not implemented",
            ));
        }
    }
    match top.value("partial_rotary_factor").map(|v| v.as_f64()) {
        None | Some(Some(1.0)) => Ok(()),
        Some(_) => Err(top.error("partial_rotary_factor", &top.map["partial_rotary_factor"], "1")),
    }
}

fn dims(top: &Fields<'_>) -> Result<Dims> {
    let hidden = top.count_up_to("hidden_size", MAX_HIDDEN)?;
    let heads = top.count_up_to("num_attention_heads", MAX_HEADS)?;
    let head_dim = match top.value("head_dim") {
        Some(_) => top.count_up_to("head_dim", MAX_HEADS)?,
        None if hidden % heads == 0 => hidden / heads,
        None => {
            return Err(top.error(
                "num_attention_heads",
                heads,
                format!("a divisor of hidden_size {hidden}"),
            ));
        }
    };
    if head_dim % 2 != 0 {
        return Err(top.error("head_dim", head_dim, "an even number, for the rotary halves"));
    }
    Ok(Dims { hidden, heads, head_dim, vocab: top.count("vocab_size")? })
}

/// A Llama: every block alike.
fn uniform_slots(top: &Fields<'_>, dims: Dims) -> Result<Vec<(Attention, Ffn)>> {
    let kv_heads = match top.value("num_key_value_heads") {
        Some(_) => top.count("num_key_value_heads")?,
        None => dims.heads,
    };
    let attention = gqa(top, "num_key_value_heads", kv_heads, dims)?;
    let ffn = Ffn::SwiGlu { width: top.count("intermediate_size")? };
    Ok(vec![(attention, ffn); top.count_up_to("num_hidden_layers", MAX_BLOCKS)?])
}

/// DeciLM-7B's form: one FFN width, KV heads per layer.
fn per_layer_slots(top: &Fields<'_>, dims: Dims) -> Result<Vec<(Attention, Ffn)>> {
    const KEY: &str = "num_key_value_heads_per_layer";
    let Some(Value::Array(list)) = top.value(KEY) else {
        return Err(top.error(
            "block_configs",
            "nothing",
            format!("block_configs, or {KEY} with intermediate_size"),
        ));
    };
    let ffn = Ffn::SwiGlu { width: top.count("intermediate_size")? };
    let num_layers = top.count_up_to("num_hidden_layers", MAX_BLOCKS)?;
    if list.len() != num_layers {
        return Err(top.error(
            KEY,
            format!("{} entries", list.len()),
            format!("num_hidden_layers = {num_layers}"),
        ));
    }
    (list.iter().enumerate())
        .map(|(slot, kv_heads)| {
            let key = format!("{KEY}[{slot}]");
            let count =
                as_count(kv_heads).ok_or_else(|| top.error(&key, kv_heads, "a whole number above 0"))?;
            Ok((gqa(top, &key, count, dims)?, ffn))
        })
        .collect()
}

fn gqa(at: &Fields<'_>, key: &str, kv_heads: usize, dims: Dims) -> Result<Attention> {
    if !dims.heads.is_multiple_of(kv_heads) {
        return Err(at.error(key, kv_heads, format!("a divisor of num_attention_heads {}", dims.heads)));
    }
    Ok(Attention::Gqa { kv_heads })
}

/// The searched form: `block_configs`, one entry per slot.
fn block_config_slots(top: &Fields<'_>, dims: Dims) -> Result<Vec<(Attention, Ffn)>> {
    let list = match top.value("block_configs") {
        Some(Value::Array(list)) if !list.is_empty() => list,
        other => return Err(top.error("block_configs", other.unwrap_or(&Value::Null), "a list of blocks")),
    };
    let num_layers = top.count_up_to("num_hidden_layers", MAX_BLOCKS)?;
    if list.len() != num_layers {
        let found = format!("{num_layers}");
        return Err(top.error(
            "num_hidden_layers",
            found,
            format!("the {} entries of block_configs", list.len()),
        ));
    }
    (list.iter().enumerate())
        .map(|(slot, entry)| {
            let block = top.object(&format!("block_configs[{slot}]"), entry)?;
            for key in ["mamba", "moe", "llama4", "parallel_blocks"] {
                block.refuse(key)?;
            }
            Ok((attention_half(&block.half("attention")?, dims)?, ffn_half(&block.half("ffn")?, dims)?))
        })
        .collect()
}

/// What a half of a block says it is.
enum Half {
    NoOp,
    Linear,
    Whole,
}

fn half_kind(half: &Fields<'_>) -> Result<Half> {
    match (half.flag("no_op")?, half.flag("replace_with_linear")?) {
        (true, true) => Err(half.error("replace_with_linear", "true", "false where no_op is true")),
        (true, false) => Ok(Half::NoOp),
        (false, true) => Ok(Half::Linear),
        (false, false) => Ok(Half::Whole),
    }
}

fn attention_half(half: &Fields<'_>, dims: Dims) -> Result<Attention> {
    match half_kind(half)? {
        Half::NoOp => return Ok(Attention::None),
        Half::Linear => return Ok(Attention::Linear),
        Half::Whole => {}
    }
    for key in [
        "window_length",
        "num_sink_tokens",
        "use_prefill_window_in_sink_attention",
        "unshifted_sink",
        "sparsify",
        "mamba",
        "llama4",
    ] {
        half.refuse(key)?;
    }
    let group = half.count("n_heads_in_group")?;
    if !dims.heads.is_multiple_of(group) {
        let expected = format!("a divisor of num_attention_heads {}", dims.heads);
        return Err(half.error("n_heads_in_group", group, expected));
    }
    Ok(Attention::Gqa { kv_heads: dims.heads / group })
}

fn ffn_half(half: &Fields<'_>, dims: Dims) -> Result<Ffn> {
    match half_kind(half)? {
        Half::NoOp => return Ok(Ffn::None),
        Half::Linear => return Ok(Ffn::Linear),
        Half::Whole => {}
    }
    half.refuse("sparsify")?;
    half.refuse("moe")?;
    match half.value("hidden_act") {
        None => {}
        Some(Value::String(name)) if name == "silu" => {}
        Some(other) => return Err(half.error("hidden_act", other, "\"silu\"")),
    }
    match half.value("intermediate_size") {
        // Puzzletron writes the width itself.
        Some(_) => Ok(Ffn::SwiGlu { width: half.count("intermediate_size")? }),
        None => {
            let width = swiglu_width(half.positive("ffn_mult")?, dims.hidden);
            if !(1..=MAX_COUNT).contains(&width) {
                let found = format!("{}, a width of {width}", half.map["ffn_mult"]);
                return Err(half.error("ffn_mult", found, format!("a width from 1 to {MAX_COUNT}")));
            }
            Ok(Ffn::SwiGlu { width })
        }
    }
}

/// DeciLM's width rule: `2 · mult · hidden / 3` truncated, then rounded up to a multiple of 256.
pub fn swiglu_width(ffn_mult: f64, hidden: usize) -> usize {
    // Six decimals, as the checkpoint's own configuration class rounds on load.
    let ffn_mult = (ffn_mult * 1e6).round() / 1e6;
    // Bounded, so that rounding up cannot overflow; no real width comes near.
    (((2.0 * ffn_mult * hidden as f64 / 3.0) as usize).min(1 << 40)).next_multiple_of(256)
}

fn rms_norm_eps(top: &Fields<'_>) -> Result<f32> {
    let eps = top.positive("rms_norm_eps")?;
    match eps as f32 {
        narrow if narrow > 0.0 && narrow.is_finite() => Ok(narrow),
        _ => Err(top.error("rms_norm_eps", eps, "a number above 0, also in f32")),
    }
}

fn rope(top: &Fields<'_>) -> Result<Rope> {
    // transformers 5 writes rope_parameters; earlier ones rope_theta and rope_scaling.
    let (key, scaling) = match (top.value("rope_parameters"), top.value("rope_scaling")) {
        (Some(value), _) => ("rope_parameters", Some(value)),
        (None, value) => ("rope_scaling", value),
    };
    let scaling = scaling.map(|value| top.object(key, value)).transpose()?;
    let theta = match &scaling {
        Some(fields) if fields.value("rope_theta").is_some() => fields.positive("rope_theta")?,
        _ if top.value("rope_theta").is_some() => top.positive("rope_theta")?,
        _ => 10_000.0, // The default of transformers' LlamaConfig.
    };
    let Some(fields) = scaling else { return Ok(Rope::Default { theta }) };
    let kind = fields.value("rope_type").or_else(|| fields.value("type"));
    match kind.map(|kind| kind.as_str().ok_or(kind)).transpose() {
        // Dynamic scaling equals default up to max_position_embeddings, and longer contexts are refused.
        Ok(None | Some("default" | "dynamic")) => Ok(Rope::Default { theta }),
        Ok(Some("linear")) => Ok(Rope::Linear { theta, factor: fields.positive("factor")? }),
        Ok(Some("llama3")) => llama3(&fields, theta),
        Ok(Some(other)) => {
            Err(fields.error("rope_type", format!("{other:?}"), "default, linear, dynamic or llama3"))
        }
        Err(other) => Err(fields.error("rope_type", other, "default, linear, dynamic or llama3")),
    }
}

fn llama3(fields: &Fields<'_>, theta: f64) -> Result<Rope> {
    let (low, high) = (fields.positive("low_freq_factor")?, fields.positive("high_freq_factor")?);
    if high < low {
        return Err(fields.error("high_freq_factor", high, format!("no less than low_freq_factor {low}")));
    }
    Ok(Rope::Llama3 {
        theta,
        factor: fields.positive("factor")?,
        low_freq_factor: low,
        high_freq_factor: high,
        original_max_position_embeddings: fields.positive("original_max_position_embeddings")?,
    })
}

fn eos_token_ids(top: &Fields<'_>, vocab: usize) -> Result<Vec<u32>> {
    let expected = || format!("token ids below vocab_size {vocab}");
    let ids = match top.value("eos_token_id") {
        None => return Ok(Vec::new()),
        Some(Value::Array(ids)) => ids.iter().collect(),
        Some(id) => vec![id],
    };
    ids.into_iter()
        .map(|id| match id.as_u64() {
            Some(id) if id < vocab as u64 => Ok(id as u32),
            _ => Err(top.error("eos_token_id", id, expected())),
        })
        .collect()
}
