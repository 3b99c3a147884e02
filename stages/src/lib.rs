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
mod edits;
mod error;
mod fields;
mod head;
mod host_rows;
mod memory;
mod model;
mod part;
pub mod profile;
mod quantization_config;
mod quantized;
pub mod random;
mod ranks;
mod rope;
mod shard;
mod shared_weights;
mod sharing;
mod span;
mod stage;
mod tensors;
mod weights;
mod work_shapes;

pub use block::{Attention, Block, Dims, Ffn};
pub use config::{ModelConfig, swiglu_width};
pub use error::{Error, Result};
pub use host_rows::{HostRows, RowPool};
pub use kernels::{
    Array, Arrival, AttentionSlice, Collective, CudaLibrary, FRAME_HEADER_BYTES, Frame, Gate, Gpu, GroupExit,
    GroupId, INT8_BLOCK, KvDtype, NcclReceiver, NcclSender, PAGE_TOKENS, Parcel, SUM_CUT, Simd, TcpRank,
    ThreadRank, WeightType, available_cores, cuda_libraries, has_cuda_driver, thread_ranks,
};
pub use memory::{GpuMemory, StepSize};
pub use model::{Model, Narrow, Warnings};
pub use part::Part;
pub use ranks::{CollectiveClock, CollectiveTimes, RankGroup, RankStep, RankSteps, rank_steps};
pub use rope::Rope;
pub use shard::RankPlace;
pub use shared_weights::{CpuWeights, SharedWeights};
pub use sharing::{Alike, AttentionSharing, BlockSharing, Exceptions, FfnSharing, Sharing};
pub use span::SpanOptions;
pub use stage::{
    Activations, Collected, Device, Dtypes, Follower, Queued, Rows, Stage, StageOutput, load, load_beside,
    load_first_rank, load_follower,
};
pub use tensors::weight_bytes;
