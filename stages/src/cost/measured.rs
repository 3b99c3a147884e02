//! Seconds from a profile of the device; bytes from shapes, as an estimate has them.
//!
//! Between measured points costs lie on straight lines; beyond the last they go on. Stages of several ranks were measured half
//! block by half block, with what ranks tell each other; what their longer contexts take is a share of what it is on one device.
//! Some columns of an FFN, and ranks of a number that was not measured, are a share of the whole, by its weights; so is a half that
//! the first rank has alone by choice.
//! [`Measured::basis`] says which of these a load needs. It refuses to guess: a profile without one of the model's blocks makes no
//! costs.

use scheduler::{Extra, Load, Piece, RankCosts};

use super::CostModel;
use super::curve::{Basis, Curve};
use super::estimate::hop_bytes;
use super::pieces::PieceShape;
use super::rank::{self, Meeting, Parts, Rank};
use super::roofline::{Channel, NumberTypes};
use crate::block::{Attention, Block, Ffn};
use crate::config::ModelConfig;
use crate::profile::{
    ContextPoint, Half, Missing, Neighbours, Profile, SHORT_CONTEXT, Seconds, SharedHalf, TokenPoint,
};
use crate::sharing::{AttentionSharing, Sharing};

/// Costs of one model on a device that was measured.
#[derive(Debug, Clone)]
pub struct Measured {
    config: ModelConfig,
    types: NumberTypes,
    hop: Curve,
    embedding: Curve,
    head: Curve,
    blocks: Vec<BlockCurves>,
    /// The same while nobody else uses the memory.
    alone: Vec<BlockCurves>,
    /// Devices that share the memory.
    num_devices: usize,
    shared: Vec<SharedCurves>,
    /// Among ranks of a number that was not measured.
    all_reduce: Channel,
}

/// Stages of so many ranks.
#[derive(Debug, Clone)]
struct SharedCurves {
    ranks: usize,
    all_reduce: Curve,
    all_gather: Curve,
    broadcast: Curve,
    head: Curve,
    halves: Vec<(Half, Curve)>,
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
    /// Costs beside such neighbours. `types` are the profile's own; `all_reduce` is what stages of several ranks are charged
    /// with where that was not measured.
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
        let missing = profile.missing(config, &[]);
        if !missing.is_empty() {
            return Err(Lacking(missing));
        }
        let blocks =
            |neighbours| config.blocks.iter().map(move |block| BlockCurves::of(*block, profile, neighbours));
        let shared = profile.shared.iter().map(|entry| SharedCurves {
            ranks: entry.ranks,
            all_reduce: by_tokens(&entry.all_reduce),
            all_gather: by_tokens(&entry.all_gather),
            broadcast: by_tokens(&entry.broadcast),
            head: by_tokens(entry.head.get(neighbours)),
            halves: (entry.halves.iter())
                .map(|half| (half.half, by_tokens(half.points.get(neighbours))))
                .collect(),
        });
        Ok(Measured {
            types,
            shared: shared.collect(),
            hop: by_tokens(profile.hop.get(neighbours)),
            embedding: by_tokens(profile.embedding.get(neighbours)),
            head: by_tokens(profile.head.get(neighbours)),
            blocks: blocks(neighbours).collect(),
            alone: blocks(Neighbours::Idle).collect(),
            num_devices: profile.key.device.devices,
            all_reduce,
            config: config.clone(),
        })
    }

    /// Where costs for a load come from, the least sure of all pieces counted.
    pub fn basis(&self, pieces: &[PieceShape], ranks: usize, sharing: &Sharing, load: Load) -> Basis {
        let of_piece = |piece: &PieceShape| self.piece_basis(piece, ranks, sharing, load);
        let head = self.shared(ranks).map_or(&self.head, |shared| &shared.head);
        let of_head = if load.logit_rows > 0.0 { head.basis(load.logit_rows) } else { Basis::Measured };
        pieces.iter().map(of_piece).chain([of_head]).max().unwrap_or(Basis::Measured)
    }

    fn piece_basis(&self, piece: &PieceShape, ranks: usize, sharing: &Sharing, load: Load) -> Basis {
        let block = self.config.blocks[piece.block];
        let is_whole = piece.ends_block && piece.columns.as_ref().is_none_or(|columns| columns.start == 0);
        let whole = self.blocks[piece.block].basis(load);
        if !is_whole {
            return Basis::Scaled;
        }
        if ranks == 1 {
            return whole;
        }
        let Parts { attention, ffn, .. } = Parts::of(&self.config, piece, ranks, sharing.of(piece.block));
        let all = matrix_params(block, &self.config);
        let halves = [(attention_half(block.attention, attention), attention), (ffn_half(block.ffn), ffn)];
        let of_half = |(half, rank): (Option<Half>, Rank)| match self.half(ranks, half?, rank) {
            Some(curve) => Some(curve.basis(load.tokens())),
            // The block, as one device has it.
            None if rank.matrix_params as f64 == all => None,
            None => Some(Basis::Scaled),
        };
        halves.into_iter().filter_map(of_half).chain([whole]).max().unwrap_or(whole)
    }

    /// The curves of stages of so many ranks, where they were measured.
    fn shared(&self, ranks: usize) -> Option<&SharedCurves> {
        self.shared.iter().find(|shared| shared.ranks == ranks)
    }

    /// The curve of a half on so many ranks, where it was measured as they have it: on the first rank alone was only what is too
    /// narrow for all.
    fn half(&self, ranks: usize, half: Half, rank: Rank) -> Option<&Curve> {
        let is_of_first_rank = rank.meeting == Meeting::Copy;
        if is_of_first_rank && !(SharedHalf { ranks, half }).is_of_first_rank(self.config.dims) {
            return None;
        }
        let halves = &self.shared(ranks)?.halves;
        halves.iter().find(|(other, _)| *other == half).map(|(_, curve)| curve)
    }

    /// The quartiles of what all blocks take for a load, as shares of the median: by their times at almost no context.
    pub fn spread(&self, load: Load) -> [f64; 2] {
        let sum = |curve: fn(&BlockCurves) -> &Curve| {
            self.blocks.iter().map(|block| curve(block).at(load.tokens())).sum::<f64>()
        };
        let median = sum(|block| &block.base);
        [sum(|block| &block.lower) / median, sum(|block| &block.upper) / median]
    }

    /// A chunk's attention may be cheaper than the single rows of the base, never than nothing.
    fn seconds(&self, piece: &PieceShape, parts: Parts, ranks: usize, load: Load) -> f64 {
        if load.tokens() == 0.0 {
            return 0.0;
        }
        let mut sum = self.attention_seconds(piece.block, parts.attention, ranks, load);
        sum += self.ffn_seconds(piece, parts, ranks, load);
        sum.max(0.0)
    }

    /// What a block was measured to take beside what others do meanwhile: of a half that the first rank has alone they wait for it,
    /// where all devices are in its stage.
    fn block(&self, block: usize, rank: Rank, ranks: usize) -> &BlockCurves {
        let all_wait = rank.meeting == Meeting::Copy && ranks >= self.num_devices;
        if all_wait { &self.alone[block] } else { &self.blocks[block] }
    }

    /// The share of a block's time at almost no context that a half's matrices have.
    fn base_seconds(&self, block: usize, rank: Rank, ranks: usize, load: Load) -> f64 {
        let whole = matrix_params(self.config.blocks[block], &self.config);
        rank.matrix_params as f64 / whole * self.block(block, rank, ranks).base.at(load.tokens())
    }

    fn attention_seconds(&self, block: usize, rank: Rank, ranks: usize, load: Load) -> f64 {
        let attention = self.config.blocks[block].attention;
        let own = rank.load(load, ranks);
        let half = attention_half(attention, rank).filter(|_| rank.matrix_params > 0);
        let mut sum = match half.and_then(|half| self.half(ranks, half, rank)) {
            // It was measured with as many rows on each rank, and is as long as the busiest one's.
            Some(curve) if rank.by_sequences => curve.at(own.tokens() * ranks as f64),
            Some(curve) => curve.at(load.tokens()) + self.handed_on_seconds(rank, ranks, load),
            None => {
                self.base_seconds(block, rank, ranks, own) + self.meeting_seconds(rank.meeting, ranks, load)
            }
        };
        if rank.kv_values > 0 {
            let dims = self.config.dims;
            // Heads are shared out, and with them the keys that are read; the one or the other is what takes the time.
            let of_keys = rank.kv_values as f64 / attention.kv_values_per_token(dims) as f64;
            let of_heads = rank.flops_per_context_token / (4 * dims.heads * dims.head_dim) as f64;
            sum += of_keys.max(of_heads) * self.block(block, rank, ranks).attention_seconds(own);
        }
        sum
    }

    /// All of an FFN half, or of the columns of a piece their share; what ranks tell each other comes with the last.
    fn ffn_seconds(&self, piece: &PieceShape, parts: Parts, ranks: usize, load: Load) -> f64 {
        let Parts { ffn: rank, ends_block, .. } = parts;
        let ffn = self.config.blocks[piece.block].ffn;
        if rank.matrix_params == 0 {
            return 0.0;
        }
        let meeting = if ends_block { self.meeting_seconds(rank.meeting, ranks, load) } else { 0.0 };
        let Some(curve) = self.half(ranks, Half::Ffn(ffn), rank) else {
            return self.base_seconds(piece.block, rank, ranks, load) + meeting;
        };
        let is_whole = ends_block && piece.columns.as_ref().is_none_or(|columns| columns.start == 0);
        if is_whole {
            return curve.at(load.tokens()) + self.handed_on_seconds(rank, ranks, load);
        }
        let (Some(columns), Ffn::SwiGlu { width }) = (&piece.columns, ffn) else {
            unreachable!("only columns are parted")
        };
        let summed = self.meeting_seconds(Meeting::Sum, ranks, load);
        let share = columns.len() as f64 / width as f64;
        share * (curve.at(load.tokens()) - summed).max(0.0) + meeting
    }

    /// What a half of the first rank alone leaves to be handed to the others; other halves were measured with what ranks tell
    /// each other.
    fn handed_on_seconds(&self, rank: Rank, ranks: usize, load: Load) -> f64 {
        if rank.meeting == Meeting::Copy { self.meeting_seconds(Meeting::Copy, ranks, load) } else { 0.0 }
    }

    fn piece(&self, piece: &PieceShape, ranks: usize, sharing: &Sharing, load: Load) -> Piece {
        let parts = Parts::of(&self.config, piece, ranks, sharing.of(piece.block));
        Piece {
            seconds: self.seconds(piece, parts, ranks, load),
            weight_bytes: parts.weight_bytes(self.types),
            kv_bytes_per_token: parts.kv_bytes_per_token(self.types, self.config.dims, ranks),
        }
    }

    /// What a stage takes more that ends with this piece and cuts a block.
    fn cut_seconds(&self, piece: &PieceShape, ranks: usize, sharing: &Sharing, load: Load) -> f64 {
        let parts = Parts::of(&self.config, piece, ranks, sharing.of(piece.block));
        self.stage_meeting_seconds(parts.meeting_at_cut(), ranks, load)
    }

    fn meeting_seconds(&self, meeting: Meeting, ranks: usize, load: Load) -> f64 {
        match (meeting, self.shared(ranks)) {
            (Meeting::Sum, Some(shared)) => shared.all_reduce.at(load.tokens()),
            (Meeting::Gather, Some(shared)) => shared.all_gather.at(load.tokens()),
            (Meeting::Copy, Some(shared)) => shared.broadcast.at(load.tokens()),
            (Meeting::None, _) => 0.0,
            (_, None) => meeting.seconds(self.all_reduce, hop_bytes(self.config.dims, load.tokens()), ranks),
        }
    }

    /// A meeting that a stage has beside those of its blocks.
    fn stage_meeting_seconds(&self, meeting: Meeting, ranks: usize, load: Load) -> f64 {
        if ranks > 1 && load.tokens() > 0.0 { self.meeting_seconds(meeting, ranks, load) } else { 0.0 }
    }

    fn extra(curve: &Curve, tokens: f64, bytes: u64, share: f64) -> Extra {
        let seconds = if tokens > 0.0 { curve.at(tokens) * share } else { 0.0 };
        Extra { seconds, bytes }
    }
}

impl CostModel for Measured {
    fn shared_costs(&self, pieces: &[PieceShape], ranks: usize, sharing: &Sharing, load: Load) -> RankCosts {
        let costs = pieces.iter().map(|piece| self.piece(piece, ranks, sharing, load));
        let embedding_bytes = rank::embedding_bytes(&self.config, self.types);
        let head_bytes = rank::head_bytes(&self.config, self.types, ranks);
        // The first rank looks up tokens by itself; all have a part of the output matrix.
        let embedding = Self::extra(&self.embedding, load.tokens(), embedding_bytes, 1.0);
        let table = |ranks| rank::table_params(&self.config, ranks) as f64;
        let head = match self.shared(ranks) {
            Some(shared) => Self::extra(&shared.head, load.logit_rows, head_bytes, 1.0),
            None => Self::extra(&self.head, load.logit_rows, head_bytes, table(ranks) / table(1)),
        };
        RankCosts::new(costs, embedding, head)
            .with_shared(rank::shared_bytes(&self.config, self.types, ranks))
            .with_cuts(pieces.iter().map(|piece| self.cut_seconds(piece, ranks, sharing, load)))
            .with_entry(self.stage_meeting_seconds(Meeting::Copy, ranks, load))
    }

    fn sharing_in(
        &self,
        ways: &[AttentionSharing],
        pieces: &[PieceShape],
        ranks: usize,
        load: Load,
    ) -> Sharing {
        let seconds = |piece: &PieceShape, parts| self.seconds(piece, parts, ranks, load);
        Parts::sharing(&self.config, ways, pieces, ranks, seconds)
    }

    fn hop_seconds(&self, load: Load) -> f64 {
        if load.tokens() > 0.0 { self.hop.at(load.tokens()) } else { 0.0 }
    }
}

/// How a block's attention half is called in a profile of shared stages, if there is one.
fn attention_half(attention: Attention, rank: Rank) -> Option<Half> {
    match attention {
        Attention::None => None,
        Attention::Gqa { .. } if rank.by_sequences => Some(Half::AttentionBySequences(attention)),
        Attention::Gqa { .. } | Attention::Linear => Some(Half::Attention(attention)),
    }
}

/// The same of an FFN half.
fn ffn_half(ffn: Ffn) -> Option<Half> {
    (ffn != Ffn::None).then_some(Half::Ffn(ffn))
}

fn matrix_params(block: Block, config: &ModelConfig) -> f64 {
    (block.flops_per_token(config.dims) / 2) as f64
}

impl BlockCurves {
    /// Of a block that the profile has.
    fn of(block: Block, profile: &Profile, neighbours: Neighbours) -> Self {
        let points = profile.block(block.into()).expect("none is missing").points.get(neighbours);
        let attention = |kv_heads| {
            let entry = profile.attention(kv_heads).expect("none is missing");
            AttentionCurves {
                decode: decode_curve(entry.decode.get(neighbours)),
                prefill: by_context(entry.prefill.get(neighbours)),
            }
        };
        BlockCurves {
            base: by_tokens(points),
            lower: quartile(points, |seconds| seconds.lower),
            upper: quartile(points, |seconds| seconds.upper),
            attention: match block.attention {
                Attention::Gqa { kv_heads } => Some(attention(kv_heads)),
                Attention::Linear | Attention::None => None,
            },
        }
    }

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

fn by_tokens(points: &[TokenPoint]) -> Curve {
    quartile(points, |seconds| seconds.median)
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
