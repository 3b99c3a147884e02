//! What one rank of a stage holds of each piece: pure arithmetic of shapes, which estimates and measured costs share.

use super::pieces::PieceShape;
use super::roofline::NumberTypes;
use crate::block::{Attention, Dims, Ffn};
use crate::config::ModelConfig;

/// One rank's part of a piece. Pieces of equal parts take equally long.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Parts {
    pub(super) attention: Rank,
    pub(super) ffn: Rank,
    pub(super) ends_block: bool,
}

impl Parts {
    pub(super) fn of(config: &ModelConfig, shape: &PieceShape, ranks: usize) -> Self {
        let block = config.blocks[shape.block];
        let dims = config.dims;
        let has_attention = shape.columns.as_ref().is_none_or(|columns| columns.start == 0);
        let attention = if has_attention { rank_attention(block.attention, dims, ranks) } else { Rank::NONE };
        let ffn = match (&shape.columns, block.ffn) {
            (Some(columns), _) => {
                // Ranks share a piece's columns; only the FFN's first piece brings the norm along.
                let columns_of_rank = (columns.end as u64).div_ceil(ranks as u64)
                    - (columns.start as u64).div_ceil(ranks as u64);
                let norm = if columns.start == 0 { dims.hidden as u64 } else { 0 };
                Rank {
                    matrix_params: 3 * columns_of_rank * dims.hidden as u64,
                    norm_params: norm,
                    ..Rank::NONE
                }
            }
            (None, Ffn::Linear) => linear(dims, ranks),
            (None, _) => Rank::NONE,
        };
        Parts { attention, ffn, ends_block: shape.ends_block }
    }

    pub(super) fn matrix_params(self) -> u64 {
        self.attention.matrix_params + self.ffn.matrix_params
    }

    pub(super) fn weight_bytes(self, types: NumberTypes) -> u64 {
        let mut bytes = 0;
        bytes += types.weights.bytes(self.matrix_params());
        bytes += types.table().bytes(self.attention.norm_params + self.ffn.norm_params);
        bytes
    }
}

/// Numbers of a rank's part of the embedding, or of the output matrix.
pub(super) fn table_params(config: &ModelConfig, ranks: usize) -> u64 {
    (config.dims.vocab as u64).div_ceil(ranks as u64) * config.dims.hidden as u64
}

/// A rank's part of the embedding. Of tied models both ends hold the table.
pub(super) fn embedding_bytes(config: &ModelConfig, types: NumberTypes, ranks: usize) -> u64 {
    types.table().bytes(table_params(config, ranks))
}

/// What a stage that is both first and last holds only once: a tied model's table.
pub(super) fn shared_bytes(config: &ModelConfig, types: NumberTypes, ranks: usize) -> u64 {
    if config.tied_embeddings { embedding_bytes(config, types, ranks) } else { 0 }
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
    pub(super) kv_values: u64,
    pub(super) flops_per_context_token: f64,
}

impl Rank {
    pub(super) const NONE: Rank =
        Rank { matrix_params: 0, norm_params: 0, kv_values: 0, flops_per_context_token: 0.0 };
}

/// Query heads are shared out, and so are KV heads while there are as many as ranks; beyond that each rank has a copy
/// of one.
fn rank_attention(attention: Attention, dims: Dims, ranks: usize) -> Rank {
    match attention {
        Attention::Gqa { kv_heads } => {
            let heads = dims.heads.div_ceil(ranks);
            let kv_heads = kv_heads.div_ceil(ranks);
            let part = Attention::Gqa { kv_heads };
            Rank {
                matrix_params: part.matrix_params(Dims { heads, ..dims }),
                norm_params: dims.hidden as u64,
                kv_values: part.kv_values_per_token(dims),
                flops_per_context_token: (4 * heads * dims.head_dim) as f64,
            }
        }
        Attention::Linear => linear(dims, ranks),
        Attention::None => Rank::NONE,
    }
}

fn linear(dims: Dims, ranks: usize) -> Rank {
    let hidden = dims.hidden as u64;
    Rank { matrix_params: hidden * hidden.div_ceil(ranks as u64), norm_params: hidden, ..Rank::NONE }
}
