//! What the blocks of a model cost on a device, measured there.
//!
//! [`measure`] runs the same spans as a pipeline does, over blocks of one shape at a time, so that a model which does
//! not fit can be measured too. A [`Profile`] holds what came of it: one entry for each *distinct* block, one
//! for the embedding, one for the head, and what attention takes on top at longer contexts. [`Store`] keeps profiles
//! as files. docs/profile.md describes them. [`throughput`] runs a whole model instead and says how many tokens a second
//! that is, by the rows of a batch (docs/bench.md).
//!
//! Two invariants. Weights are as cold as in a real pass: the same ones come again only after as many others as a
//! stage would walk through. And a figure is what all devices that share the memory got at the same time, beside
//! what one gets alone: neither says anything about the other.

mod at_work;
mod attention;
mod ceilings;
mod gang;
mod grid;
mod key;
mod machine;
mod measure;
mod points;
mod store;
mod subject;
mod throughput;

use serde::{Deserialize, Serialize};

use crate::block::{Attention, Block, Ffn};
use crate::config::ModelConfig;

pub use ceilings::Ceilings;
pub use key::{DeviceKey, ProfileKey};
pub use measure::{Effort, MeasureOptions, measure};
pub use points::{Both, ContextPoint, Neighbours, Seconds, TokenPoint};
pub use store::{Store, Stored};
pub(crate) use subject::SHORT_CONTEXT;
pub use throughput::{Rate, Throughput, ThroughputOptions, throughput};

/// The format of the file, which grows with each change of what is measured or how.
pub const FORMAT: u32 = 1;

/// What was measured on one device for models of the same dimensions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    /// [`FORMAT`] when it was written.
    pub format: u32,
    /// The version of the program that measured.
    pub program: String,
    /// When, in Unix seconds.
    pub measured_at: u64,
    /// What it holds for.
    pub key: ProfileKey,
    /// Taking over a micro-batch from the stage before and handing it on, together.
    pub hop: Both<Vec<TokenPoint>>,
    /// The embedding, without handing on.
    pub embedding: Both<Vec<TokenPoint>>,
    /// Last norm, output matrix and greedy draws, by rows of logits.
    pub head: Both<Vec<TokenPoint>>,
    /// Each distinct block.
    pub blocks: Vec<BlockEntry>,
    /// Each distinct attention.
    pub attention: Vec<AttentionEntry>,
    /// What the memory had no room for, and what it would have taken: it is not tried again before there is as much.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub too_large: Vec<TooLarge>,
}

/// A part that is not there because it did not fit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TooLarge {
    /// Which.
    pub part: Part,
    /// What it takes on one device.
    pub needed_bytes: u64,
}

/// A part of a model that has an entry of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// A distinct block.
    Block(BlockShape),
    /// Attention of so many KV heads.
    Attention(usize),
}

/// What makes blocks alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockShape {
    /// The first half.
    pub attention: Attention,
    /// The second half.
    pub ffn: Ffn,
}

/// A distinct block: the time for tokens with almost no context.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BlockEntry {
    /// Which.
    pub shape: BlockShape,
    /// Bytes of its weights.
    pub weight_bytes: u64,
    /// Copies that were walked through.
    pub copies: usize,
    /// By tokens of the micro-batch.
    pub points: Both<Vec<TokenPoint>>,
}

/// Attention of some KV heads: the time beyond that of [`BlockEntry`], for each token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AttentionEntry {
    /// Which.
    pub kv_heads: usize,
    /// Tokens that decode.
    pub decode: Both<Vec<ContextPoint>>,
    /// Tokens of prompts.
    pub prefill: Both<Vec<ContextPoint>>,
}

/// What a profile lacks for a model.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Missing {
    /// Distinct blocks, in the order of the model.
    pub blocks: Vec<BlockShape>,
    /// Distinct attention.
    pub kv_heads: Vec<usize>,
}

impl From<Block> for BlockShape {
    fn from(Block { attention, ffn, .. }: Block) -> Self {
        BlockShape { attention, ffn }
    }
}

impl std::fmt::Display for BlockShape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.attention {
            Attention::Gqa { kv_heads } => write!(f, "gqa {kv_heads}, ")?,
            Attention::Linear => write!(f, "linear, ")?,
            Attention::None => write!(f, "none, ")?,
        }
        match self.ffn {
            Ffn::SwiGlu { width } => write!(f, "swiglu {width}"),
            Ffn::Linear => write!(f, "linear"),
            Ffn::None => write!(f, "none"),
        }
    }
}

impl Missing {
    /// All that a profile of a model must have.
    pub fn all_of(config: &ModelConfig) -> Self {
        let mut missing = Missing::default();
        for block in &config.blocks {
            let shape = BlockShape::from(*block);
            if !missing.blocks.contains(&shape) {
                missing.blocks.push(shape);
            }
            if let Attention::Gqa { kv_heads } = block.attention
                && !missing.kv_heads.contains(&kv_heads)
            {
                missing.kv_heads.push(kv_heads);
            }
        }
        missing
    }

    /// Whether nothing is.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty() && self.kv_heads.is_empty()
    }
}

impl Profile {
    /// The entry of a block.
    pub fn block(&self, shape: BlockShape) -> Option<&BlockEntry> {
        self.blocks.iter().find(|entry| entry.shape == shape)
    }

    /// The entry of attention with so many KV heads.
    pub fn attention(&self, kv_heads: usize) -> Option<&AttentionEntry> {
        self.attention.iter().find(|entry| entry.kv_heads == kv_heads)
    }

    /// Whether it reaches to micro-batches of so many tokens: beyond its last points costs are only extrapolated. Contexts
    /// may be longer than those measured, as attention is linear in them.
    pub fn reaches(&self, micro_batch_tokens: usize) -> bool {
        self.hop.alone.last().is_some_and(|point| point.tokens >= micro_batch_tokens)
    }

    /// Of what it lacks, all that there may be room for where one device has `room_bytes`.
    pub fn measurable(&self, mut missing: Missing, room_bytes: u64) -> Missing {
        let may_fit = |part: Part| {
            let known = self.too_large.iter().find(|too_large| too_large.part == part);
            known.is_none_or(|known| known.needed_bytes <= room_bytes)
        };
        missing.blocks.retain(|shape| may_fit(Part::Block(*shape)));
        missing.kv_heads.retain(|kv_heads| may_fit(Part::Attention(*kv_heads)));
        missing
    }

    /// What it lacks for a model.
    pub fn missing(&self, config: &ModelConfig) -> Missing {
        let mut missing = Missing::all_of(config);
        missing.blocks.retain(|shape| self.block(*shape).is_none());
        missing.kv_heads.retain(|kv_heads| self.attention(*kv_heads).is_none());
        missing
    }

    /// This one with the entries of an earlier one of the same key that it lacks itself.
    #[must_use]
    pub fn with_entries_of(mut self, earlier: Profile) -> Self {
        assert_eq!(self.key, earlier.key, "profiles of two devices");
        let own = self.clone();
        self.blocks.extend(earlier.blocks.into_iter().filter(|entry| own.block(entry.shape).is_none()));
        self.attention
            .extend(earlier.attention.into_iter().filter(|entry| own.attention(entry.kv_heads).is_none()));
        let is_new = |too_large: &TooLarge| own.too_large.iter().all(|other| other.part != too_large.part);
        self.too_large.extend(earlier.too_large.into_iter().filter(is_new));
        let has = |part: Part| match part {
            Part::Block(shape) => self.blocks.iter().any(|entry| entry.shape == shape),
            Part::Attention(kv_heads) => self.attention.iter().any(|entry| entry.kv_heads == kv_heads),
        };
        self.too_large.retain(|too_large| !has(too_large.part));
        self
    }
}
