//! One block of a NAS model, and what it weighs.
//!
//! A block is an attention half and an FFN half, each with its norm and residual add, and each of which
//! the search may have replaced or removed. A plain Llama is the case where all blocks are alike.

use serde::{Deserialize, Serialize};

/// A block that does something. Slots that are wholly empty are not blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Block {
    /// Index in the checkpoint's tensor names, empty slots counted.
    pub slot: usize,
    /// The first half.
    pub attention: Attention,
    /// The second half.
    pub ffn: Ffn,
}

/// What stands in a block's attention half.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Attention {
    /// Grouped-query attention; the only kind that owns KV.
    Gqa {
        /// Number of key and value heads.
        kv_heads: usize,
    },
    /// One `hidden × hidden` matrix; norm and residual stay.
    Linear,
    /// Nothing: no norm, no residual, no tensors.
    None,
}

/// What stands in a block's FFN half.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Ffn {
    /// `down(silu(gate(x)) ∘ up(x))`.
    SwiGlu {
        /// Rows of gate and up.
        width: usize,
    },
    /// One `hidden × hidden` matrix; norm and residual stay.
    Linear,
    /// Nothing.
    None,
}

/// The dimensions of a model that every block shares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dims {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Entries of the vocabulary.
    pub vocab: usize,
}

impl Attention {
    /// Parameters, the norm's included.
    pub fn params(self, dims: Dims) -> u64 {
        let hidden = dims.hidden as u64;
        match self {
            Attention::Gqa { .. } => self.matrix_params(dims) + hidden,
            Attention::Linear => hidden * hidden + hidden,
            Attention::None => 0,
        }
    }

    pub(crate) fn matrix_params(self, dims: Dims) -> u64 {
        let hidden = dims.hidden as u64;
        match self {
            Attention::Gqa { kv_heads } => {
                let mut rows = 0;
                rows += 2 * dims.heads; // q and o.
                rows += 2 * kv_heads; // k and v.
                rows as u64 * dims.head_dim as u64 * hidden
            }
            Attention::Linear => hidden * hidden,
            Attention::None => 0,
        }
    }

    /// Key and value numbers that one token leaves in the cache.
    pub fn kv_values_per_token(self, dims: Dims) -> u64 {
        match self {
            Attention::Gqa { kv_heads } => 2 * kv_heads as u64 * dims.head_dim as u64,
            Attention::Linear | Attention::None => 0,
        }
    }
}

impl Ffn {
    /// Parameters, the norm's included.
    pub fn params(self, dims: Dims) -> u64 {
        match self {
            Ffn::None => 0,
            Ffn::SwiGlu { .. } | Ffn::Linear => self.matrix_params(dims) + dims.hidden as u64,
        }
    }

    pub(crate) fn matrix_params(self, dims: Dims) -> u64 {
        let hidden = dims.hidden as u64;
        match self {
            Ffn::SwiGlu { width } => 3 * width as u64 * hidden,
            Ffn::Linear => hidden * hidden,
            Ffn::None => 0,
        }
    }
}

impl Block {
    /// Parameters of both halves.
    pub fn params(self, dims: Dims) -> u64 {
        self.attention.params(dims) + self.ffn.params(dims)
    }

    /// Floating-point operations of the matrix products for one token: two per weight. Attention over
    /// the context comes on top; see [`Block::flops_per_context_token`].
    pub fn flops_per_token(self, dims: Dims) -> u64 {
        2 * (self.attention.matrix_params(dims) + self.ffn.matrix_params(dims))
    }

    /// Further operations for one token and each position that it attends to: a product and a sum for
    /// each query dimension against the key, and again for the value.
    pub fn flops_per_context_token(self, dims: Dims) -> u64 {
        match self.attention {
            Attention::Gqa { .. } => 4 * dims.heads as u64 * dims.head_dim as u64,
            Attention::Linear | Attention::None => 0,
        }
    }
}
