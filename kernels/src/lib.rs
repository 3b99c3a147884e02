//! Arrays and operations of a decoder block.
//!
//! This crate knows numbers and no requests. [`Backend`] is the contract of a device; [`Reference`]
//! is the plain, obviously right implementation, [`Cpu`] the fast one, and [`Cuda`] a GPU's. All `unsafe` code of the
//! project lives here.
//!
//! What is written for a [`Backend`] runs on each of them:
//!
//! ```
//! use kernels::{Backend, Cpu, CpuOptions, KvDtype, Reference, Result, Simd, TensorView, ViewDtype, WeightType};
//!
//! /// `norm(x) · wᵀ` for one row of two numbers.
//! fn project<B: Backend>(backend: &B, x: [f32; 2], w: [[f32; 2]; 3]) -> Result<Vec<f32>> {
//!     let bytes = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>();
//!     let w = backend.matrix(TensorView::new(ViewDtype::F32, 3, 2, &bytes(w.as_flattened())))?;
//!     let ones = backend.vector(TensorView::new(ViewDtype::F32, 1, 2, &bytes(&[1.0; 2])))?;
//!     let (mut rows, mut normed, mut out) = (backend.array(), backend.operand(), backend.array());
//!     backend.upload(&x, 1, 2, &mut rows)?;
//!     backend.rms_norm(&rows, &ones, 0.0, &mut normed)?;
//!     backend.matmul(&normed, &w, &mut out)?;
//!     let mut values = vec![];
//!     backend.download(&out, &mut values)?;
//!     Ok(values)
//! }
//!
//! let (weights, kv) = (WeightType::F32, KvDtype::F32);
//! let cpu = Cpu::new(CpuOptions { cores: vec![], threads: 2, simd: Simd::detect(), weights, kv })?;
//! let (x, w) = ([3.0, 4.0], [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]);
//! let plain = project(&Reference::new(weights, kv), x, w)?;
//! let fast = project(&cpu, x, w)?;
//! assert!(plain.iter().zip(&fast).all(|(plain, fast)| (plain - fast).abs() < 1e-6));
//! # Ok::<(), kernels::Error>(())
//! ```

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
pub use cpu::caches::{cold_bytes, cold_bytes_with_room};
pub use cpu::pool::{ThreadPool, available_cores};
pub use cpu::simd::Simd;
pub use cpu::{Ceilings, Cpu, CpuMatrix, CpuOperand, CpuOptions, KvCache, Rung};
pub use cuda::{
    Compiled, CudaLibrary, Gpu, Parcel, Source, StepTimes, cuda_allocated_bytes, cuda_libraries,
    cuda_sum_bytes, cuda_work_bytes, has_cuda_driver, pack_cubins,
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
