//! What the busiest rank of a stage has of each piece: pure arithmetic of shapes, which estimates and measured costs share.
//!
//! Ranks meet after each half, so that a half takes what its busiest rank does; which that is may differ from half to half.

use std::ops::Range;

use scheduler::Load;

use super::pieces::PieceShape;
use super::roofline::{Channel, NumberTypes};
use crate::block::{Attention, Dims, Ffn};
use crate::config::ModelConfig;
use crate::shard::{AttentionShard, RankPlace};
use crate::sharing::{AttentionSharing, BlockSharing, FfnSharing, Sharing};

/// One rank's part of a piece. Pieces of equal parts take equally long.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Parts {
    pub(super) attention: Rank,
    pub(super) ffn: Rank,
    pub(super) ends_block: bool,
}

impl Parts {
    /// Of the busiest of `ranks`, which share the block in one way.
    pub(super) fn of(config: &ModelConfig, shape: &PieceShape, ranks: usize, sharing: BlockSharing) -> Self {
        let block = config.blocks[shape.block];
        let dims = config.dims;
        let has_attention = shape.columns.as_ref().is_none_or(|columns| columns.start == 0);
        let attention = match has_attention {
            true => rank_attention(block.attention, dims, ranks, sharing.attention),
            false => Rank::NONE,
        };
        let ffn = match (&shape.columns, block.ffn) {
            (Some(columns), _) => columns_of((columns, shape.ends_block), dims, ranks, sharing.ffn),
            (None, Ffn::Linear) => linear(dims, ranks, sharing.ffn == FfnSharing::FirstRank),
            (None, _) => Rank::NONE,
        };
        Parts { attention, ffn, ends_block: shape.ends_block }
    }

    /// How `ranks` should share each block: each half as `seconds` says that it is fastest, attention in one of these `ways`, in
    /// the first of them and by columns where nothing else is faster. Halves of the first rank that follow one another need one
    /// broadcast together and are charged with one each: where that decides, ranks share. An FFN that is cut is shared as all of
    /// it would be, so that a block is shared in one way wherever it may be cut.
    pub(super) fn sharing(
        config: &ModelConfig,
        ways: &[AttentionSharing],
        pieces: &[PieceShape],
        ranks: usize,
        seconds: impl Fn(&PieceShape, Parts) -> f64,
    ) -> Sharing {
        if ranks == 1 {
            return Sharing::default();
        }
        let of_block = |block: usize| {
            let whole = PieceShape::whole(config, block);
            let parts = |sharing| Parts::of(config, &whole, ranks, sharing);
            let mut sharing = BlockSharing::default();
            sharing.attention = fastest(ways.iter().copied(), |attention| {
                seconds(&whole, parts(BlockSharing { attention, ..sharing }))
            });
            sharing.ffn = fastest([FfnSharing::Columns, FfnSharing::FirstRank], |ffn| {
                seconds(&whole, parts(BlockSharing { ffn, ..sharing }))
            });
            parts(sharing).as_it_comes(sharing)
        };
        let of_pieces = |pieces: &[PieceShape]| {
            let first = &pieces[0];
            let mut sharing = of_block(first.block);
            if first.columns.as_ref().is_some_and(|columns| columns.start > 0) {
                sharing.attention = AttentionSharing::default(); // It is another stage's.
            }
            (first.block, sharing)
        };
        pieces.chunk_by(|one, other| one.block == other.block).map(of_pieces).collect()
    }

    /// A way to share these parts as it comes out: what is too narrow to be shared is the first rank's.
    fn as_it_comes(self, mut sharing: BlockSharing) -> BlockSharing {
        if self.attention.meeting == Meeting::Copy {
            sharing.attention = AttentionSharing::FirstRank;
        }
        if self.ffn.meeting == Meeting::Copy {
            sharing.ffn = FfnSharing::FirstRank;
        }
        sharing
    }

    /// What ranks do where a stage ends after them and the block goes on: of an FFN that is shared its sums are added up.
    pub(super) fn meeting_at_cut(self) -> Meeting {
        match self.ffn.meeting {
            Meeting::Sum if !self.ends_block => Meeting::Sum,
            _ => Meeting::None,
        }
    }

    pub(super) fn matrix_params(self) -> u64 {
        self.attention.matrix_params + self.ffn.matrix_params
    }

    /// Keys and values that each of `ranks` keeps for each token of all sequences, as it has pages for them.
    pub(super) fn kv_bytes_per_token(self, types: NumberTypes, dims: Dims, ranks: usize) -> u64 {
        let Rank { kv_values, by_sequences, .. } = self.attention;
        let bytes = types.kv.kv_bytes(kv_values, dims.head_dim);
        if by_sequences { bytes.div_ceil(ranks as u64) } else { bytes }
    }

    pub(super) fn weight_bytes(self, types: NumberTypes) -> u64 {
        let mut bytes = 0;
        bytes += types.weights.bytes(self.matrix_params());
        bytes += types.table().bytes(self.attention.norm_params + self.ffn.norm_params);
        bytes
    }
}

/// The way that takes the fewest seconds, the first of those that take as few.
fn fastest<W: Copy>(ways: impl IntoIterator<Item = W>, seconds: impl Fn(W) -> f64) -> W {
    let timed = ways.into_iter().map(|way| (way, seconds(way)));
    timed.min_by(|(_, one), (_, other)| one.total_cmp(other)).expect("there is a way").0
}

/// Numbers of a rank's part of the output matrix.
pub(super) fn table_params(config: &ModelConfig, ranks: usize) -> u64 {
    let Dims { vocab, hidden, .. } = config.dims;
    (most_columns(0..vocab, ranks).unwrap_or(vocab) * hidden) as u64
}

/// The embedding, all of which the first rank has. Of tied models both ends hold the table.
pub(super) fn embedding_bytes(config: &ModelConfig, types: NumberTypes) -> u64 {
    types.table().bytes(table_params(config, 1))
}

/// What a stage that is both first and last holds only once: a tied model's table, where one rank has all of it.
pub(super) fn shared_bytes(config: &ModelConfig, types: NumberTypes, ranks: usize) -> u64 {
    if config.tied_embeddings && ranks == 1 { embedding_bytes(config, types) } else { 0 }
}

/// A rank's part of the output matrix, and the last norm.
pub(super) fn head_bytes(config: &ModelConfig, types: NumberTypes, ranks: usize) -> u64 {
    let mut bytes = types.table().bytes(table_params(config, ranks));
    bytes += types.table().bytes(config.dims.hidden as u64);
    bytes
}

/// One rank's part of a half block.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Rank {
    pub(super) matrix_params: u64,
    pub(super) norm_params: u64,
    /// Keys and values of a token, where it has some of it.
    pub(super) kv_values: u64,
    pub(super) flops_per_context_token: f64,
    /// Whether it has some of the rows alone.
    pub(super) by_sequences: bool,
    pub(super) meeting: Meeting,
}

/// How a half's results come together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Meeting {
    /// They do not: there is one rank, or no half.
    None,
    /// Added up.
    Sum,
    /// Put side by side.
    Gather,
    /// Handed by the first rank to the others.
    Copy,
}

impl Meeting {
    /// What it takes with arrays of so many bytes.
    pub(super) fn seconds(self, channel: Channel, bytes: f64, ranks: usize) -> f64 {
        match self {
            Meeting::None => 0.0,
            Meeting::Sum => channel.all_reduce_seconds(bytes, ranks),
            Meeting::Gather | Meeting::Copy => channel.all_gather_seconds(bytes, ranks),
        }
    }
}

impl Rank {
    pub(super) const NONE: Rank = Rank {
        matrix_params: 0,
        norm_params: 0,
        kv_values: 0,
        flops_per_context_token: 0.0,
        by_sequences: false,
        meeting: Meeting::None,
    };

    /// What it sees of a micro-batch.
    pub(super) fn load(self, load: Load, ranks: usize) -> Load {
        if self.by_sequences { busiest(load, ranks) } else { load }
    }
}

/// The expected largest of so many independent standard normal numbers (Harter 1961, "Expected values of normal order
/// statistics"); more than 8 ranks are taken for 8.
const EXPECTED_LARGEST: [f64; 9] = [0.0, 0.0, 0.564, 0.846, 1.029, 1.163, 1.267, 1.352, 1.424];

/// What the busiest rank has of a micro-batch whose sequences are shared out by their numbers: of rows that decode its part and as
/// much more as chance makes it, a deviation being the root of a part; of prompts, of which each is on one rank, at least one. A
/// prompt's tokens are twice as many as the positions that one of them attends to.
fn busiest(load: Load, ranks: usize) -> Load {
    let share = load.decode_tokens / ranks as f64;
    let chance = EXPECTED_LARGEST[ranks.min(EXPECTED_LARGEST.len() - 1)] * share.sqrt();
    let prompt = 2.0 * load.prefill_context;
    Load {
        decode_tokens: (share + chance).min(load.decode_tokens),
        prefill_tokens: (load.prefill_tokens / ranks as f64).max(prompt).min(load.prefill_tokens),
        ..load
    }
}

/// Columns of the rank that has most of them; none where they are too few to be shared.
fn most_columns(columns: Range<usize>, ranks: usize) -> Option<usize> {
    places(ranks).map(|place| place.columns(columns.clone()).map(|own| own.len())).max().flatten()
}

fn places(ranks: usize) -> impl Iterator<Item = RankPlace> {
    (0..ranks).map(move |rank| RankPlace { rank, num_ranks: ranks })
}

fn meeting(ranks: usize, meeting: Meeting) -> Meeting {
    if ranks > 1 { meeting } else { Meeting::None }
}

/// Query heads are shared out, and so are KV heads while there are as many as ranks; beyond that each rank has a copy
/// of one. By sequences each rank has all weights, and all keys and values of its own rows.
fn rank_attention(attention: Attention, dims: Dims, ranks: usize, sharing: AttentionSharing) -> Rank {
    let Attention::Gqa { kv_heads } = attention else {
        return match attention {
            Attention::Linear => linear(dims, ranks, sharing == AttentionSharing::FirstRank),
            _ => Rank::NONE,
        };
    };
    let part = |heads: usize, kv_heads: usize, how| {
        let part = Attention::Gqa { kv_heads };
        Rank {
            matrix_params: part.matrix_params(Dims { heads, ..dims }),
            norm_params: dims.hidden as u64,
            kv_values: part.kv_values_per_token(dims),
            flops_per_context_token: (4 * heads * dims.head_dim) as f64,
            by_sequences: false,
            meeting: meeting(ranks, how),
        }
    };
    let (mut most_heads, mut most_kv_heads) = (0, 0);
    for place in places(ranks) {
        match place.attention(attention, dims, sharing) {
            AttentionShard::Heads { query, kv } => {
                most_heads = most_heads.max(query.len());
                most_kv_heads = most_kv_heads.max(kv.len());
            }
            AttentionShard::Sequences => {
                return Rank { by_sequences: true, ..part(dims.heads, kv_heads, Meeting::Gather) };
            }
            AttentionShard::Columns(_) | AttentionShard::FirstRank | AttentionShard::None => {
                return part(dims.heads, kv_heads, Meeting::Copy);
            }
        }
    }
    part(most_heads, most_kv_heads, Meeting::Sum)
}

/// Some columns of an FFN; only its first piece brings the norm along. A whole FFN is shared in the units that ranks
/// share; of pieces of one each rank has a part, and all of them together come to its own. What has too few units for
/// all ranks is the first one's.
fn columns_of(
    (columns, ends_block): (&Range<usize>, bool),
    dims: Dims,
    ranks: usize,
    sharing: FfnSharing,
) -> Rank {
    let is_whole = columns.start == 0 && ends_block;
    let (most, how) = match (sharing, most_columns(columns.clone(), ranks)) {
        (FfnSharing::FirstRank, _) => (columns.len(), Meeting::Copy),
        (FfnSharing::Columns, None) => (columns.len(), Meeting::Copy),
        (FfnSharing::Columns, Some(most)) if is_whole => (most, Meeting::Sum),
        (FfnSharing::Columns, Some(_)) => {
            (columns.end.div_ceil(ranks) - columns.start.div_ceil(ranks), Meeting::Sum)
        }
    };
    Rank {
        matrix_params: 3 * (most * dims.hidden) as u64,
        norm_params: if columns.start == 0 { dims.hidden as u64 } else { 0 },
        meeting: meeting(ranks, how),
        ..Rank::NONE
    }
}

fn linear(dims: Dims, ranks: usize, is_of_first_rank: bool) -> Rank {
    let hidden = dims.hidden;
    let (most, how) = match most_columns(0..hidden, ranks).filter(|_| !is_of_first_rank) {
        Some(most) => (most, Meeting::Gather),
        None => (hidden, Meeting::Copy),
    };
    Rank {
        matrix_params: (hidden * most) as u64,
        norm_params: hidden as u64,
        meeting: meeting(ranks, how),
        ..Rank::NONE
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::NumberType;

    const DIMS: Dims = Dims { hidden: 512, heads: 32, head_dim: 16, vocab: 1000 };

    fn shared(kv_heads: usize, ranks: usize, sharing: AttentionSharing) -> Rank {
        rank_attention(Attention::Gqa { kv_heads }, DIMS, ranks, sharing)
    }

    #[test]
    fn the_busiest_rank_has_what_no_even_share_leaves_it() {
        // Of 8 KV heads 3, 3 and 2, with 4 query heads each.
        let three = shared(8, 3, AttentionSharing::Heads);
        assert_eq!(three.kv_values, 2 * 3 * 16);
        assert_eq!(three.flops_per_context_token, (4 * 12 * 16) as f64);
        // Too narrow for three: the first rank's, in a copy.
        let narrow = columns_of((&(0..128), true), DIMS, 3, FfnSharing::Columns);
        assert_eq!((narrow.matrix_params, narrow.meeting), (3 * 128 * 512, Meeting::Copy));
        // As are two units that a cut has left of a wider one, which has no sum then.
        let sliver = columns_of((&(512..640), false), DIMS, 3, FfnSharing::Columns);
        assert_eq!((sliver.matrix_params, sliver.meeting), (3 * 128 * 512, Meeting::Copy));
        // 1,000 columns are 16 units, the last of 40; of three ranks the last has 6 of them.
        assert_eq!(columns_of((&(0..1000), true), DIMS, 3, FfnSharing::Columns).matrix_params, 3 * 360 * 512);
    }

    #[test]
    fn sums_are_told_at_a_cut_where_ranks_share_what_is_cut() {
        let at_cut = |columns: Range<usize>, ends_block, sharing| {
            let ffn = columns_of((&columns, ends_block), DIMS, 3, sharing);
            Parts { attention: Rank::NONE, ffn, ends_block }.meeting_at_cut()
        };
        assert_eq!(at_cut(0..512, false, FfnSharing::Columns), Meeting::Sum);
        assert_eq!(at_cut(0..512, true, FfnSharing::Columns), Meeting::None);
        assert_eq!(at_cut(0..512, false, FfnSharing::FirstRank), Meeting::None);
        assert_eq!(at_cut(0..128, false, FfnSharing::Columns), Meeting::None);
    }

    #[test]
    fn by_sequences_a_rank_has_all_weights_and_pages_for_its_part_of_keys_and_values() {
        let (alone, four) =
            (shared(2, 1, AttentionSharing::Heads), shared(2, 4, AttentionSharing::Sequences));
        assert_eq!((four.matrix_params, four.kv_values), (alone.matrix_params, alone.kv_values));
        let types = NumberTypes { weights: NumberType::Bf16, kv: NumberType::Bf16 };
        let kept = |attention, ranks| {
            Parts { attention, ffn: Rank::NONE, ends_block: true }.kv_bytes_per_token(types, DIMS, ranks)
        };
        assert_eq!((kept(alone, 1), kept(four, 4), kept(four, 3)), (128, 32, 43));
        // By heads there are copies: two ranks have the same KV head.
        assert_eq!(shared(2, 4, AttentionSharing::Heads).kv_values, alone.kv_values / 2);
    }

    #[test]
    fn the_busiest_rank_has_more_than_its_part_of_few_rows_and_a_whole_prompt() {
        let load =
            Load { decode_tokens: 128.0, prefill_tokens: 100.0, prefill_context: 50.0, ..Load::default() };
        let own = busiest(load, 2);
        // 128 coins: half of them, and the root of 128 over 2 pi.
        assert!(
            (own.decode_tokens - (64.0 + (128.0 / std::f64::consts::TAU).sqrt())).abs() < 0.01,
            "{own:?}"
        );
        assert_eq!(own.prefill_tokens, 100.0);
        let short = Load { prefill_context: 5.0, ..load };
        assert_eq!(busiest(short, 4).prefill_tokens, 25.0);
        let one = Load { decode_tokens: 1.0, ..Load::default() };
        assert_eq!(busiest(one, 8).decode_tokens, (0.125_f64 + 1.424 * 0.125_f64.sqrt()).min(1.0));
    }
}
