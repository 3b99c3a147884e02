//! Colours of half blocks by what they are. A model and its plan are drawn with the same ones.

use std::collections::BTreeSet;

use stages::{Attention, Block, Ffn, ModelConfig};

use crate::inspect::{ffn_width, kv_heads};

/// Attention, from few KV heads to many; further counts share the darkest.
const ATTENTION: [&str; 4] = ["#93c1ea", "#4f94d4", "#1f63ad", "#0b3a75"];
/// Attention where all blocks have as many KV heads.
const ONLY_ATTENTION: &str = "#1f63ad";
const LINEAR: &str = "#9a6cc4";
const SWIGLU: &str = "#4fae8f";
const FUSED: &str = "#e8801c";

/// Which kinds a model has.
#[derive(Debug)]
pub(crate) struct Kinds {
    kv_heads: Vec<usize>,
    /// The widest FFN in a block that has attention.
    widest_beside_attention: Option<usize>,
    blocks: Vec<Block>,
}

impl Kinds {
    pub(crate) fn of(config: &ModelConfig) -> Self {
        let counts: BTreeSet<usize> = config.blocks.iter().filter_map(kv_heads).collect();
        let with_attention = config.blocks.iter().filter(|block| kv_heads(block).is_some());
        Kinds {
            widest_beside_attention: with_attention.filter_map(ffn_width).max(),
            kv_heads: counts.into_iter().collect(),
            blocks: config.blocks.clone(),
        }
    }

    /// The colour of a block's attention half, if it has one.
    pub(crate) fn attention(&self, block: Block) -> Option<&'static str> {
        match block.attention {
            Attention::Gqa { kv_heads } => Some(self.gqa(kv_heads)),
            Attention::Linear => Some(LINEAR),
            Attention::None => None,
        }
    }

    /// The colour of a block's FFN half, if it has one.
    pub(crate) fn ffn(&self, block: Block) -> Option<&'static str> {
        match block.ffn {
            Ffn::SwiGlu { .. } if self.is_fused(block) => Some(FUSED),
            Ffn::SwiGlu { .. } => Some(SWIGLU),
            Ffn::Linear => Some(LINEAR),
            Ffn::None => None,
        }
    }

    /// Whether a block is the FFNs of several that had lost their attention, made one. No configuration says
    /// so: such a block has no attention, and an FFN wider than any beside attention.
    pub(crate) fn is_fused(&self, block: Block) -> bool {
        let widest = self.widest_beside_attention;
        block.attention == Attention::None && widest.is_some() && ffn_width(&block) > widest
    }

    /// How many blocks are fused ones.
    pub(crate) fn num_fused(&self) -> usize {
        self.blocks.iter().filter(|block| self.is_fused(**block)).count()
    }

    /// What the colours of this model mean.
    pub(crate) fn legend(&self) -> Vec<(&'static str, String)> {
        let gqa = |heads: &usize| (self.gqa(*heads), format!("attention, {}", heads_words(*heads)));
        let mut legend: Vec<(&str, String)> = self.kv_heads.iter().map(gqa).collect();
        let blocks = &self.blocks;
        let is_linear = |block: &Block| block.attention == Attention::Linear || block.ffn == Ffn::Linear;
        if blocks.iter().any(|block| self.ffn(*block) == Some(SWIGLU)) {
            legend.push((SWIGLU, "FFN".to_owned()));
        }
        if self.num_fused() > 0 {
            legend.push((FUSED, "fused FFN".to_owned()));
        }
        if blocks.iter().any(is_linear) {
            legend.push((LINEAR, "linear".to_owned()));
        }
        legend
    }

    fn gqa(&self, kv_heads: usize) -> &'static str {
        match self.kv_heads.iter().position(|heads| *heads == kv_heads) {
            Some(index) if self.kv_heads.len() > 1 => ATTENTION[index.min(ATTENTION.len() - 1)],
            _ => ONLY_ATTENTION,
        }
    }
}

/// A half block in words.
pub(crate) fn attention_words(block: Block) -> String {
    match block.attention {
        Attention::Gqa { kv_heads } => format!("attention with {}", heads_words(kv_heads)),
        Attention::Linear => "linear in the place of attention".to_owned(),
        Attention::None => "no attention".to_owned(),
    }
}

fn heads_words(kv_heads: usize) -> String {
    format!("{kv_heads} KV head{}", if kv_heads == 1 { "" } else { "s" })
}

/// A half block in words.
pub(crate) fn ffn_words(block: Block) -> String {
    match block.ffn {
        Ffn::SwiGlu { width } => format!("FFN of {width} columns"),
        Ffn::Linear => "linear in the place of an FFN".to_owned(),
        Ffn::None => "no FFN".to_owned(),
    }
}
