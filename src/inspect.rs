//! `spanwise inspect`: a model's blocks, as a table, as JSON and as a picture.

use anyhow::Result;
use serde::Serialize;
use stages::{Attention, Block, Ffn, ModelConfig};

use crate::cli::{Format, InspectArgs};
use crate::picture;
use crate::text::grouped;

/// Bytes of a KV number in the table: bf16.
const KV_BYTES: u64 = 2;

/// A model as a list of blocks with totals. Stable: programs read it.
#[derive(Debug, Serialize)]
struct Inspection {
    hidden_size: usize,
    num_attention_heads: usize,
    head_dim: usize,
    vocab_size: usize,
    max_position_embeddings: usize,
    tied_embeddings: bool,
    /// Entries of the block list, empty ones counted.
    slots: usize,
    blocks: Vec<BlockLine>,
    total: Total,
}

/// One block; half kinds are `gqa`, `swiglu`, `linear` or `none`.
#[derive(Debug, Serialize)]
struct BlockLine {
    block: usize,
    slot: usize,
    attention: &'static str,
    kv_heads: Option<usize>,
    ffn: &'static str,
    ffn_width: Option<usize>,
    params: u64,
    flops_per_token: u64,
    flops_per_context_token: u64,
    /// In bf16.
    kv_bytes_per_token: u64,
}

#[derive(Debug, Serialize)]
struct Total {
    blocks: usize,
    attention_blocks: usize,
    /// Of the blocks alone.
    block_params: u64,
    /// With embedding, last norm and output matrix.
    params: u64,
    /// Of the blocks and the output matrix.
    flops_per_token: u64,
    flops_per_context_token: u64,
    /// In bf16.
    kv_bytes_per_token: u64,
}

/// Prints the blocks of a model, and draws them where that is asked for.
pub(crate) fn inspect(args: &InspectArgs) -> Result<()> {
    let config = ModelConfig::read(&args.model)?;
    let inspection = Inspection::of(&config);
    match args.format {
        Format::Json => crate::print(&serde_json::to_string_pretty(&inspection)?),
        Format::Text => inspection.table().iter().for_each(|line| crate::print(line)),
    }
    if let Some(path) = &args.svg {
        picture::save(path, &picture::draw_model(&picture::model_name(&args.model), &config))?;
    }
    Ok(())
}

impl Inspection {
    fn of(config: &ModelConfig) -> Self {
        let dims = config.dims;
        let blocks: Vec<BlockLine> = (config.blocks.iter().enumerate())
            .map(|(index, block)| BlockLine {
                block: index,
                slot: block.slot,
                attention: attention_word(block.attention),
                kv_heads: kv_heads(block),
                ffn: ffn_word(block.ffn),
                ffn_width: ffn_width(block),
                params: block.params(dims),
                flops_per_token: block.flops_per_token(dims),
                flops_per_context_token: block.flops_per_context_token(dims),
                kv_bytes_per_token: block.attention.kv_values_per_token(dims) * KV_BYTES,
            })
            .collect();
        let sum = |of: fn(&BlockLine) -> u64| blocks.iter().map(of).sum::<u64>();
        let total = Total {
            blocks: blocks.len(),
            attention_blocks: blocks.iter().filter(|block| block.kv_heads.is_some()).count(),
            block_params: sum(|block| block.params),
            params: config.params(),
            flops_per_token: sum(|block| block.flops_per_token) + 2 * dims.vocab as u64 * dims.hidden as u64,
            flops_per_context_token: sum(|block| block.flops_per_context_token),
            kv_bytes_per_token: sum(|block| block.kv_bytes_per_token),
        };
        Inspection {
            hidden_size: dims.hidden,
            num_attention_heads: dims.heads,
            head_dim: dims.head_dim,
            vocab_size: dims.vocab,
            max_position_embeddings: config.max_position_embeddings,
            tied_embeddings: config.tied_embeddings,
            slots: config.num_slots,
            blocks,
            total,
        }
    }

    fn table(&self) -> Vec<String> {
        let mut lines = vec![format!(
            "hidden {}, {} heads of {}, vocabulary {}, context {}, embeddings {}",
            self.hidden_size,
            self.num_attention_heads,
            self.head_dim,
            self.vocab_size,
            self.max_position_embeddings,
            if self.tied_embeddings { "tied" } else { "not tied" },
        )];
        lines.push(format!(
            "{:>5} {:>5}  {:<16} {:<15} {:>14} {:>14} {:>14}",
            "block", "slot", "attention", "FFN", "parameters", "FLOPs/token", "KV bytes/token"
        ));
        for block in &self.blocks {
            let attention = match block.kv_heads {
                Some(heads) => format!("gqa, {heads} KV heads"),
                None => block.attention.to_owned(),
            };
            let ffn = match block.ffn_width {
                Some(width) => format!("swiglu {width}"),
                None => block.ffn.to_owned(),
            };
            lines.push(format!(
                "{:>5} {:>5}  {attention:<16} {ffn:<15} {:>14} {:>14} {:>14}",
                block.block,
                block.slot,
                grouped(block.params),
                grouped(block.flops_per_token),
                grouped(block.kv_bytes_per_token),
            ));
        }
        let total = &self.total;
        lines.push(format!(
            "{} blocks in {} slots, {} with attention: {} parameters, {} with embedding and output matrix",
            total.blocks,
            self.slots,
            total.attention_blocks,
            grouped(total.block_params),
            grouped(total.params),
        ));
        lines.push(format!(
            "a token: {} FLOPs with the output matrix, {} more for each token of context, {} bytes of KV in bf16",
            grouped(total.flops_per_token),
            grouped(total.flops_per_context_token),
            grouped(total.kv_bytes_per_token),
        ));
        lines
    }
}

fn attention_word(attention: Attention) -> &'static str {
    match attention {
        Attention::Gqa { .. } => "gqa",
        Attention::Linear => "linear",
        Attention::None => "none",
    }
}

fn ffn_word(ffn: Ffn) -> &'static str {
    match ffn {
        Ffn::SwiGlu { .. } => "swiglu",
        Ffn::Linear => "linear",
        Ffn::None => "none",
    }
}

/// KV heads of a block whose attention is GQA.
pub(crate) fn kv_heads(block: &Block) -> Option<usize> {
    match block.attention {
        Attention::Gqa { kv_heads } => Some(kv_heads),
        Attention::Linear | Attention::None => None,
    }
}

/// Columns of a block whose FFN is a SwiGLU.
pub(crate) fn ffn_width(block: &Block) -> Option<usize> {
    match block.ffn {
        Ffn::SwiGlu { width } => Some(width),
        Ffn::Linear | Ffn::None => None,
    }
}
