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
mod meetings;
mod points;
mod shared;
mod store;
mod subject;
mod team;
mod throughput;

use serde::{Deserialize, Serialize};

use crate::block::{Attention, Block, Dims, Ffn};
use crate::config::ModelConfig;
use crate::shard::{AttentionShard, FfnShard, RankPlace};
use crate::sharing::{AttentionSharing, FfnSharing};

pub use ceilings::Ceilings;
pub use key::{DeviceKey, ProfileKey};
pub use measure::{Effort, MeasureOptions, measure};
pub use points::{Both, ContextPoint, Neighbours, Seconds, TokenPoint};
pub use store::{Store, Stored};
pub(crate) use subject::SHORT_CONTEXT;
pub use throughput::{Rate, Throughput, ThroughputOptions, throughput};

/// The format of the file, which grows with each change of what is measured or how.
pub const FORMAT: u32 = 4;

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
    /// What stages take that several devices share, for each number of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shared: Vec<SharedEntry>,
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
    /// A half block that several devices share.
    Half(SharedHalf),
}

/// A half block on a stage of several devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedHalf {
    /// How many devices.
    pub ranks: usize,
    /// Which half.
    pub half: Half,
}

/// A half of a block, and how ranks share it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Half {
    /// Attention by heads, or a linear matrix in its place.
    Attention(Attention),
    /// Attention by sequences.
    AttentionBySequences(Attention),
    /// An FFN by columns, or a linear matrix in its place.
    Ffn(Ffn),
}

/// What stages of so many devices take.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SharedEntry {
    /// How many devices.
    pub ranks: usize,
    /// To add up the residual stream over all ranks, by its tokens.
    pub all_reduce: Vec<TokenPoint>,
    /// To put the ranks' columns of it side by side on all of them.
    pub all_gather: Vec<TokenPoint>,
    /// To give all ranks the first one's.
    pub broadcast: Vec<TokenPoint>,
    /// Last norm, output matrix and greedy draws, by rows of logits.
    pub head: Both<Vec<TokenPoint>>,
    /// Each distinct half, what its ranks tell each other with it.
    pub halves: Vec<HalfEntry>,
}

/// A distinct half: the time for tokens with almost no context.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HalfEntry {
    /// Which.
    pub half: Half,
    /// Bytes of all ranks' weights together, no copy counted.
    pub weight_bytes: u64,
    /// Copies that were walked through.
    pub copies: usize,
    /// By tokens of the micro-batch.
    pub points: Both<Vec<TokenPoint>>,
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
    /// Distinct halves of stages that several devices share.
    pub halves: Vec<SharedHalf>,
}

impl From<Block> for BlockShape {
    fn from(Block { attention, ffn, .. }: Block) -> Self {
        BlockShape { attention, ffn }
    }
}

impl std::fmt::Display for BlockShape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, {}", Half::Attention(self.attention), Half::Ffn(self.ffn))
    }
}

impl std::fmt::Display for Half {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Half::Attention(Attention::Gqa { kv_heads }) => write!(f, "gqa {kv_heads}"),
            Half::AttentionBySequences(attention) => {
                write!(f, "{} by sequences", Half::Attention(*attention))
            }
            Half::Ffn(Ffn::SwiGlu { width }) => write!(f, "swiglu {width}"),
            Half::Attention(Attention::Linear) | Half::Ffn(Ffn::Linear) => write!(f, "linear"),
            Half::Attention(Attention::None) | Half::Ffn(Ffn::None) => write!(f, "none"),
        }
    }
}

impl SharedEntry {
    /// All that has a curve for idle and for busy neighbours.
    fn curves(&self) -> impl Iterator<Item = &Both<Vec<TokenPoint>>> {
        self.halves.iter().map(|half| &half.points).chain([&self.head])
    }

    /// What ranks tell each other with nothing between two calls.
    fn meetings(&self) -> [&Vec<TokenPoint>; 3] {
        [&self.all_reduce, &self.all_gather, &self.broadcast]
    }
}

impl SharedHalf {
    /// Whether it has too few units to be shared, so that the first rank has all of it.
    pub(crate) fn is_of_first_rank(self, dims: Dims) -> bool {
        let place = RankPlace { rank: 0, num_ranks: self.ranks };
        match self.half {
            Half::Attention(attention) => {
                place.attention(attention, dims, AttentionSharing::Heads) == AttentionShard::FirstRank
            }
            Half::AttentionBySequences(_) => false,
            Half::Ffn(ffn) => {
                let columns = 0..if let Ffn::SwiGlu { width } = ffn { width } else { 0 };
                matches!(place.ffn(ffn, dims, columns, FfnSharing::Columns), FfnShard::FirstRank(_))
            }
        }
    }
}

impl Half {
    /// The distinct ones of a model.
    fn all_of(config: &ModelConfig) -> Vec<Half> {
        let of_block = |block: &Block| {
            let by_heads = (block.attention != Attention::None).then_some(Half::Attention(block.attention));
            let by_sequences = matches!(block.attention, Attention::Gqa { .. })
                .then_some(Half::AttentionBySequences(block.attention));
            let ffn = (block.ffn != Ffn::None).then_some(Half::Ffn(block.ffn));
            [by_heads, by_sequences, ffn].into_iter().flatten()
        };
        let mut halves = Vec::new();
        for half in config.blocks.iter().flat_map(of_block) {
            if !halves.contains(&half) {
                halves.push(half);
            }
        }
        halves
    }
}

impl Missing {
    /// All that a profile of a model must have, with stages that are shared by so many devices as in `widths`.
    pub fn all_of(config: &ModelConfig, widths: &[usize]) -> Self {
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
        let halves = Half::all_of(config);
        let of_width = |ranks: &usize| {
            let ranks = *ranks;
            halves.iter().map(move |half| SharedHalf { ranks, half: *half })
        };
        missing.halves = widths.iter().flat_map(of_width).collect();
        missing
    }

    /// Whether nothing is.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty() && self.kv_heads.is_empty() && self.halves.is_empty()
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

    /// The entry of stages of so many devices.
    pub fn shared(&self, ranks: usize) -> Option<&SharedEntry> {
        self.shared.iter().find(|entry| entry.ranks == ranks)
    }

    /// The entry of a half block that several devices share.
    fn half(&self, wanted: SharedHalf) -> Option<&HalfEntry> {
        self.shared(wanted.ranks)?.halves.iter().find(|entry| entry.half == wanted.half)
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
        missing.halves.retain(|half| may_fit(Part::Half(*half)));
        missing
    }

    /// What it lacks for a model, with stages that are shared by so many devices as in `widths`.
    pub fn missing(&self, config: &ModelConfig, widths: &[usize]) -> Missing {
        let mut missing = Missing::all_of(config, widths);
        missing.blocks.retain(|shape| self.block(*shape).is_none());
        missing.kv_heads.retain(|kv_heads| self.attention(*kv_heads).is_none());
        missing.halves.retain(|half| self.half(*half).is_none());
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
        for entry in earlier.shared {
            match self.shared.iter_mut().find(|own| own.ranks == entry.ranks) {
                Some(own) => {
                    let has = own.halves.clone();
                    let is_new = |half: &HalfEntry| has.iter().all(|own| own.half != half.half);
                    own.halves.extend(entry.halves.into_iter().filter(is_new));
                }
                None => self.shared.push(entry),
            }
        }
        let is_new = |too_large: &TooLarge| own.too_large.iter().all(|other| other.part != too_large.part);
        self.too_large.extend(earlier.too_large.into_iter().filter(is_new));
        let has = |part: Part| match part {
            Part::Block(shape) => self.blocks.iter().any(|entry| entry.shape == shape),
            Part::Attention(kv_heads) => self.attention.iter().any(|entry| entry.kv_heads == kv_heads),
            Part::Half(half) => self.half(half).is_some(),
        };
        let kept: Vec<TooLarge> =
            self.too_large.iter().filter(|too_large| !has(too_large.part)).cloned().collect();
        self.too_large = kept;
        self
    }
}
