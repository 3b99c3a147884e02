//! Arrays and operations of a decoder block.
//!
//! This crate knows numbers and no requests. [`Backend`] is the contract of a device; [`Reference`]
//! is the plain, obviously right implementation, [`Cpu`] the fast one, and [`Cuda`] a GPU's. All `unsafe` code of the
//! project lives here.

mod array;
mod backend;
mod check;
mod choice;
mod collective;
mod cpu;
mod cuda;
mod draws;
mod dtype;
mod error;
mod fp8;
mod mapped_file;
mod quantize;
mod random_tensor;
mod reference;
mod tensor_view;
mod view;

pub use array::Array;
pub use backend::{
    AttentionSlice, Backend, DecodeStep, Dtype, INT8_BLOCK, Int4Groups, KvDtype, Largest, LogitStats,
    PAGE_TOKENS, RopeTable, SUM_CUT, WeightType, WorkSize,
};
pub use choice::{Choice, ChoiceScratch, Chosen, Edit, Edits, RowEdits, choose_row};
pub use collective::{Axis, Collective, FRAME_HEADER_BYTES, Frame, TcpRank, ThreadRank, thread_ranks};
pub use cpu::pool::{ThreadPool, available_cores};
pub use cpu::simd::Simd;
pub use cpu::{Ceilings, Cpu, CpuMatrix, CpuOperand, CpuOptions, KvCache};
pub use cuda::{
    Compiled, Gpu, Parcel, Source, cuda_allocated_bytes, cuda_sum_bytes, cuda_work_bytes, pack_cubins,
};
pub use cuda::{
    Cuda, CudaArray, CudaKvCache, CudaMatrix, CudaOperand, CudaOptions, CudaRope, CudaVector, NcclRank,
};
pub use cuda::{Gate, GroupExit, GroupId, NcclReceiver, NcclSender};
pub use draws::{Arrival, Drawn, Draws, FedTokens};
pub use error::{Error, Result};
pub use mapped_file::MappedFile;
pub use random_tensor::RandomTensor;
pub use reference::{Reference, ReferenceKvCache, ReferenceMatrix, ReferenceOperand};
pub use tensor_view::{Scales, TensorView, ViewDtype};
