//! Seconds from a profile of the device; bytes from shapes, as an estimate has them.
//!
//! Between measured points costs lie on straight lines; beyond the last they go on. Some columns of an FFN and one rank of
//! several were not measured: they are a share of the whole block, by its weights. [`Measured::basis`] says which of
//! these a load needs. It refuses to guess: a profile without one of the model's blocks makes no costs.

use scheduler::{Extra, Load, Piece, RankCosts};

use super::CostModel;
use super::curve::{Basis, Curve};
use super::estimate::hop_bytes;
use super::pieces::PieceShape;
use super::rank::{self, Meeting, Parts, Rank};
use super::roofline::{Channel, NumberTypes};
use crate::block::{Attention, Block};
use crate::config::ModelConfig;
use crate::profile::{ContextPoint, Missing, Neighbours, Profile, SHORT_CONTEXT, Seconds, TokenPoint};
use crate::shard::{AttentionSharing, Sharing};

/// Costs of one model on a device that was measured.
#[derive(Debug, Clone)]
pub struct Measured {
    config: ModelConfig,
    types: NumberTypes,
    hop: Curve,
    embedding: Curve,
    head: Curve,
    blocks: Vec<BlockCurves>,
    /// Among the ranks of a stage, which was not measured.
    all_reduce: Channel,
}

#[derive(Debug, Clone)]
struct BlockCurves {
    /// By tokens of the micro-batch, at almost no context.
    base: Curve,
    /// The quartiles of the same.
    lower: Curve,
    upper: Curve,
    /// Beyond that, for each token by its context.
    attention: Option<AttentionCurves>,
}

#[derive(Debug, Clone)]
struct AttentionCurves {
    decode: Curve,
    prefill: Curve,
}

/// A profile that lacks blocks of the model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the profile lacks {} of the model's blocks: {}", .0.blocks.len(), names(.0))]
pub struct Lacking(pub Missing);

fn names(missing: &Missing) -> String {
    missing.blocks.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

impl Measured {
    /// Costs beside such neighbours. `types` are the profile's own; `all_reduce` is what plans with several ranks a stage
    /// are charged with.
    ///
    /// # Errors
    /// The profile lacks a block or an attention of the model.
    pub fn new(
        config: &ModelConfig,
        profile: &Profile,
        neighbours: Neighbours,
        types: NumberTypes,
        all_reduce: Channel,
    ) -> Result<Self, Lacking> {
        let missing = profile.missing(config);
        if !missing.is_empty() {
            return Err(Lacking(missing));
        }
        let by_tokens = |points: &[TokenPoint]| {
            Curve::new(points.iter().map(|point| (point.tokens as f64, point.seconds.median)))
        };
        let attention = |kv_heads| {
            let entry = profile.attention(kv_heads).expect("none is missing");
            AttentionCurves {
                decode: decode_curve(entry.decode.get(neighbours)),
                prefill: by_context(entry.prefill.get(neighbours)),
            }
        };
        let blocks = config.blocks.iter().map(|block| {
            let entry = profile.block((*block).into()).expect("none is missing");
            BlockCurves {
                base: by_tokens(entry.points.get(neighbours)),
                lower: quartile(entry.points.get(neighbours), |seconds| seconds.lower),
                upper: quartile(entry.points.get(neighbours), |seconds| seconds.upper),
                attention: match block.attention {
                    Attention::Gqa { kv_heads } => Some(attention(kv_heads)),
                    Attention::Linear | Attention::None => None,
                },
            }
        });
        Ok(Measured {
            types,
            hop: by_tokens(profile.hop.get(neighbours)),
            embedding: by_tokens(profile.embedding.get(neighbours)),
            head: by_tokens(profile.head.get(neighbours)),
            blocks: blocks.collect(),
            all_reduce,
            config: config.clone(),
        })
    }

    /// Where costs for a load come from, the least sure of all pieces counted.
    pub fn basis(&self, pieces: &[PieceShape], ranks: usize, load: Load) -> Basis {
        let is_whole = |piece: &PieceShape| self.share(piece, ranks) == 1.0;
        if !pieces.iter().all(is_whole) {
            return Basis::Scaled;
        }
        let of_block = |piece: &PieceShape| self.blocks[piece.block].basis(load);
        let of_head = if load.logit_rows > 0.0 { self.head.basis(load.logit_rows) } else { Basis::Measured };
        pieces.iter().map(of_block).chain([of_head]).max().unwrap_or(Basis::Measured)
    }

    /// Whether every cost for a load was measured at that very point.
    pub fn is_measured_at(&self, pieces: &[PieceShape], ranks: usize, load: Load) -> bool {
        self.basis(pieces, ranks, load) == Basis::Measured
    }

    /// The quartiles of what all blocks take for a load, as shares of the median: by their times at almost no context.
    pub fn spread(&self, load: Load) -> [f64; 2] {
        let sum = |curve: fn(&BlockCurves) -> &Curve| {
            self.blocks.iter().map(|block| curve(block).at(load.tokens())).sum::<f64>()
        };
        let median = sum(|block| &block.base);
        [sum(|block| &block.lower) / median, sum(|block| &block.upper) / median]
    }

    /// One rank's share of a block, by its matrices, where it has heads of the attention.
    fn share(&self, piece: &PieceShape, ranks: usize) -> f64 {
        let block = self.config.blocks[piece.block];
        let parts = Parts::of(&self.config, piece, ranks, AttentionSharing::Heads);
        parts.matrix_params() as f64 / matrix_params(block, &self.config)
    }

    fn faster(&self, piece: &PieceShape, ranks: usize, load: Load) -> Parts {
        Parts::faster(&self.config, piece, ranks, |parts| self.seconds(piece.block, parts, ranks, load))
    }

    /// A chunk's attention may be cheaper than the single rows of the base, never than nothing.
    fn seconds(&self, block: usize, parts: Parts, ranks: usize, load: Load) -> f64 {
        if load.tokens() == 0.0 {
            return 0.0;
        }
        let mut sum = self.attention_seconds(block, parts.attention, ranks, load);
        sum += self.base_seconds(block, parts.ffn, load);
        sum += if parts.ends_block { self.meeting_seconds(parts.ffn.meeting, ranks, load) } else { 0.0 };
        sum.max(0.0)
    }

    /// The share of a block's time at almost no context that a half's matrices have.
    fn base_seconds(&self, block: usize, rank: Rank, load: Load) -> f64 {
        let whole = matrix_params(self.config.blocks[block], &self.config);
        rank.matrix_params as f64 / whole * self.blocks[block].base.at(load.tokens())
    }

    fn attention_seconds(&self, block: usize, rank: Rank, ranks: usize, load: Load) -> f64 {
        let own = rank.load(load, ranks);
        let mut sum = self.base_seconds(block, rank, own);
        sum += self.meeting_seconds(rank.meeting, ranks, load);
        if rank.kv_values > 0 {
            let (attention, dims) = (self.config.blocks[block].attention, self.config.dims);
            // Heads are shared out, and with them the keys that are read; the one or the other is what takes the time.
            let of_keys = rank.kv_values as f64 / attention.kv_values_per_token(dims) as f64;
            let of_heads = rank.flops_per_context_token / (4 * dims.heads * dims.head_dim) as f64;
            let share = if rank.by_sequences { 1.0 } else { of_keys.max(of_heads) };
            sum += share * self.blocks[block].attention_seconds(own);
        }
        sum
    }

    fn piece(&self, piece: &PieceShape, ranks: usize, load: Load) -> Piece {
        let parts = self.faster(piece, ranks, load);
        Piece {
            seconds: self.seconds(piece.block, parts, ranks, load),
            weight_bytes: parts.weight_bytes(self.types),
            kv_bytes_per_token: self.types.kv.bytes(parts.attention.kv_values),
        }
    }

    fn meeting_seconds(&self, meeting: Meeting, ranks: usize, load: Load) -> f64 {
        meeting.seconds(self.all_reduce, hop_bytes(self.config.dims, load.tokens()), ranks)
    }

    fn extra(curve: &Curve, tokens: f64, bytes: u64, share: f64) -> Extra {
        let seconds = if tokens > 0.0 { curve.at(tokens) * share } else { 0.0 };
        Extra { seconds, bytes }
    }
}

impl CostModel for Measured {
    fn rank_costs(&self, pieces: &[PieceShape], ranks: usize, load: Load) -> RankCosts {
        let costs = pieces.iter().map(|piece| self.piece(piece, ranks, load));
        let embedding_bytes = rank::embedding_bytes(&self.config, self.types);
        let head_bytes = rank::head_bytes(&self.config, self.types, ranks);
        // The first rank looks up tokens by itself; all have a part of the output matrix.
        let embedding = Self::extra(&self.embedding, load.tokens(), embedding_bytes, 1.0);
        let table = |ranks| rank::table_params(&self.config, ranks) as f64;
        let head = Self::extra(&self.head, load.logit_rows, head_bytes, table(ranks) / table(1));
        RankCosts::new(costs, embedding, head)
            .with_shared(rank::shared_bytes(&self.config, self.types, ranks))
            .with_cut(self.meeting_seconds(if ranks > 1 { Meeting::Sum } else { Meeting::None }, ranks, load))
    }

    fn sharing(&self, pieces: &[PieceShape], ranks: usize, load: Load) -> Sharing {
        let is_faster = |piece: &&PieceShape| self.faster(piece, ranks, load).attention.by_sequences;
        Sharing::by_sequences(pieces.iter().filter(is_faster).map(|piece| piece.block))
    }

    fn hop_seconds(&self, load: Load) -> f64 {
        if load.tokens() > 0.0 { self.hop.at(load.tokens()) } else { 0.0 }
    }
}

fn matrix_params(block: Block, config: &ModelConfig) -> f64 {
    (block.flops_per_token(config.dims) / 2) as f64
}

impl BlockCurves {
    fn attention_seconds(&self, load: Load) -> f64 {
        let Some(attention) = &self.attention else { return 0.0 };
        let mut sum = 0.0;
        if load.decode_tokens > 0.0 {
            sum += load.decode_tokens * attention.decode.at(load.decode_context);
        }
        if load.prefill_tokens > 0.0 {
            sum += load.prefill_tokens * attention.prefill.at(load.prefill_context);
        }
        sum
    }

    fn basis(&self, load: Load) -> Basis {
        let mut basis = self.base.basis(load.tokens());
        if let Some(attention) = &self.attention {
            if load.decode_tokens > 0.0 {
                basis = basis.max(attention.decode.basis(load.decode_context));
            }
            if load.prefill_tokens > 0.0 {
                basis = basis.max(attention.prefill.basis(load.prefill_context));
            }
        }
        basis
    }
}

fn quartile(points: &[TokenPoint], of: fn(&Seconds) -> f64) -> Curve {
    Curve::new(points.iter().map(|point| (point.tokens as f64, of(&point.seconds))))
}

fn by_context(points: &[ContextPoint]) -> Curve {
    Curve::new(points.iter().map(|point| (point.context, point.seconds.median)))
}

/// Rows of a longer context take no less than those of a shorter one: where a time says so, it is chance.
fn decode_curve(points: &[ContextPoint]) -> Curve {
    let mut most = 0.0_f64;
    let beyond = points.iter().filter(|point| point.context > SHORT_CONTEXT).map(|point| {
        most = most.max(point.seconds.median);
        (point.context, most)
    });
    Curve::new(std::iter::once((SHORT_CONTEXT, 0.0)).chain(beyond))
}
