//! The model: `config.json` into blocks, safetensors into weights, one span's forward pass, sampling.
//!
//! This crate joins requests (`scheduler`) with numbers (`kernels`). It does not know where micro-batches
//! come from or where activations go: that is the actors' work.
#![forbid(unsafe_code)]

mod batch;
mod block;
mod checkpoint;
mod config;
pub mod cost;
mod error;
mod fields;
mod head;
mod model;
pub mod profile;
pub mod random;
mod rope;
mod sampling;
mod span;
mod stage;
mod tensors;
mod weights;

pub use block::{Attention, Block, Dims, Ffn};
pub use config::{ModelConfig, swiglu_width};
pub use error::{Error, Result};
pub use kernels::{Dtype, PAGE_TOKENS, Simd, WeightType, available_cores};
pub use model::{Model, Warnings};
pub use rope::Rope;
pub use span::SpanOptions;
pub use stage::{Activations, Device, Dtypes, Stage, StageOutput, load};
pub use tensors::weight_bytes;
