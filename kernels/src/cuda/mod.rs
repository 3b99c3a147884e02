//! The CUDA backend: a GPU as the same contract as the CPU's.
//!
//! Matmul inputs are bf16, and so are weights, keys and values that are not narrower; sums and the residual stream are f32. Work is queued and not waited
//! for, but where numbers come back to the host. Device code lies in `cu/` and is compiled for the GPU that is there;
//! without a GPU `emulator/` runs the same code, which is how it is tested on any machine.
//!
//! Only `stream.rs`, `event.rs`, `staging.rs`, `gpu.rs`, `program.rs`, `libraries.rs`, `cublaslt/calls.rs` and `nccl/calls.rs` call NVIDIA's libraries, and no library is
//! called before it has been found: a machine without CUDA gets an error, never a panic.

mod arrays;
mod attention;
mod ceilings;
mod choices;
mod cublaslt;
mod draws;
mod event;
mod fp8;
mod gemm;
mod gpu;
mod graphs;
mod int4;
mod libraries;
mod memory;
mod nccl;
mod operations;
mod packed;
mod parcels;
mod products;
mod program;
mod rope;
mod staging;
mod step_times;
mod stopwatch;
mod stream;
mod tables;
mod weights;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use arrays::{CudaArray, CudaKvCache, CudaMatrix, CudaOperand, CudaRope, CudaVector};
pub(crate) use draws::CudaDraws;
pub use gpu::{CudaLibrary, Gpu, cuda_libraries, has_cuda_driver};
pub use memory::{cuda_allocated_bytes, cuda_work_bytes};
pub use nccl::{Gate, GroupExit, GroupId, NcclRank, NcclReceiver, NcclSender, cuda_sum_bytes};
pub use packed::pack_cubins;
pub use parcels::Parcel;
pub use program::{Compiled, Source};
pub use step_times::StepTimes;

use crate::backend::{KvDtype, WeightType};
use crate::error::{Error, Result};
use attention::AttentionKernels;
use choices::ChoiceWork;
use cublaslt::CublasLt;
use fp8::Fp8Kernels;
use gemm::Gemm;
use graphs::Graphs;
use int4::Int4Kernels;
use parcels::Parcels;
use staging::Staging;
use stream::{Argument, Grid, Kernel, Memory, Stream};
use tables::Tables;

/// What a GPU device is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CudaOptions {
    /// Which GPU, as the driver counts them.
    pub device: usize,
    /// What the weights of blocks are kept in: bf16, fp8 or int4, which has groups of 128 here.
    pub weights: WeightType,
    /// Number type of keys and values: bf16 or fp8.
    pub kv: KvDtype,
    /// Whether a row has the same bits in any batch: contexts are then not split, and matrix products are our own kernel's
    /// and not cuBLASLt's, both of which is slower.
    pub is_deterministic: bool,
    /// Whether steps of rows that decode are captured and launched as a whole.
    pub has_graphs: bool,
    /// Most columns of an FFN that are computed at once, a multiple of 64; see [`Cuda::FFN_COLUMNS`].
    pub ffn_columns: usize,
    /// Where CUDA's libraries are looked for first.
    pub libraries: Option<PathBuf>,
    /// Where compiled kernels are kept, if anywhere.
    pub cubins: Option<PathBuf>,
}

/// The CUDA backend.
#[derive(Debug)]
pub struct Cuda {
    options: CudaOptions,
    gpu: Gpu,
    kernels: Kernels,
    /// Attention for each width of heads that was asked for.
    attention: Mutex<HashMap<usize, Arc<AttentionKernels>>>,
    staging: Mutex<Option<Staging>>,
    tables: Mutex<Tables>,
    workspace: Mutex<Workspace>,
    graphs: Mutex<Graphs>,
    parcels: Arc<Parcels>,
    /// What has come from another GPU or process, or is yet to come, by a queue of its own.
    arrived: Arc<Parcels>,
    arrivals: Arc<Stream>,
    /// A product before it is added.
    product: Mutex<Memory>,
    /// Nothing where products are our own kernel's.
    library: Option<CublasLt>,
    own_products: Option<String>,
    /// Where weights are of 4 bits.
    int4: Option<Int4Kernels>,
    /// Where they are in E4M3.
    fp8: Option<Fp8Kernels>,
    /// Numbers on their way to a narrower type.
    source: Mutex<Memory>,
    // Last, so that everything above is freed before it.
    stream: Arc<Stream>,
}

#[derive(Debug)]
struct Kernels {
    add: Kernel,
    embed: Kernel,
    gather: Kernel,
    rms_norm: Kernel,
    rope: Kernel,
    kv_append: Kernel,
    rope_append: Kernel,
    swiglu: Kernel,
    random_uniform: Kernel,
    logit_stats: Kernel,
    choose: Kernel,
    attention_merge: Kernel,
    gemm: Gemm,
}

/// Memory of operations that nobody outside sees.
#[derive(Debug)]
struct Workspace {
    gate: Memory,
    up: Memory,
    partial: Memory,
    maxima: Memory,
    sums: Memory,
    stats: Memory,
    host_stats: Vec<[u32; 3]>,
    choices: ChoiceWork,
}

impl Workspace {
    fn new(stream: &Arc<Stream>) -> Workspace {
        Workspace {
            gate: Memory::none(stream),
            up: Memory::none(stream),
            partial: Memory::none(stream),
            maxima: Memory::none(stream),
            sums: Memory::none(stream),
            stats: Memory::none(stream),
            host_stats: Vec::new(),
            choices: ChoiceWork::new(|| Memory::none(stream)),
        }
    }
}

impl Cuda {
    /// Columns of an FFN that are computed at once where nobody says otherwise. NVIDIA's fused FFNs are 5,376 to 425,984
    /// wide, their parents 53,248: a chunk is one of those.
    pub const FFN_COLUMNS: usize = 53_248;

    /// Opens a GPU and compiles its kernels, where they are not on disk.
    ///
    /// # Errors
    /// No driver, no such device, a library that is missing, number types that are not there; the message says which.
    pub fn new(options: CudaOptions) -> Result<Cuda> {
        let CudaOptions { device, weights, kv, ffn_columns, .. } = options;
        assert!(ffn_columns > 0 && ffn_columns.is_multiple_of(64), "chunks of {ffn_columns} columns");
        if !matches!(weights, WeightType::Bf16 | WeightType::Fp8 | WeightType::Int4Weight)
            || kv == KvDtype::F32
        {
            return Err(Error::Unsupported(format!(
                "cuda:{device}: found weights of {} with keys and values of {}, expected bf16, fp8 or int4-weight, and bf16 or fp8: the CUDA backend has no other types yet",
                weights.name(),
                kv.name()
            )));
        }
        let gpu = Gpu::nth(options.libraries.as_deref(), device)?;
        if gpu.capability.0 < 8 {
            let (major, minor) = gpu.capability;
            return Err(Error::NoCuda(format!(
                "cuda:{device} is a {} of compute capability {major}.{minor}, expected 8.0 at least: bf16 tensor cores",
                gpu.name
            )));
        }
        program::find_kernels(options.libraries.as_deref())?;
        let stream = Stream::open(device)?;
        let cubin = |source: Source| source.cubin(options.cubins.as_deref(), &gpu.architecture(), 0);
        let load = |source, name| Arc::new(stream.module(&cubin(source)?)?).kernel(name, 0);
        let [kv_append, rope_append] = match kv {
            KvDtype::Fp8 => ["kv_append_fp8", "rope_append_fp8"],
            KvDtype::Bf16 | KvDtype::F32 => ["kv_append", "rope_append"],
        };
        let kernels = Kernels {
            add: load(program::ADD, "add")?,
            embed: load(program::EMBED, "embed")?,
            gather: load(program::GATHER, "gather")?,
            rms_norm: load(program::RMS_NORM, "rms_norm")?,
            rope: load(program::ROPE, "rope")?,
            kv_append: load(program::KV_APPEND, kv_append)?,
            rope_append: load(program::KV_APPEND, rope_append)?,
            swiglu: load(program::SWIGLU, "swiglu")?,
            random_uniform: load(program::RANDOM, "random_uniform")?,
            logit_stats: load(program::LOGIT_STATS, "logit_stats")?,
            choose: load(program::CHOOSE, "choose")?,
            attention_merge: load(program::ATTENTION_MERGE, "attention_merge")?,
            gemm: Gemm::load(&stream, "gemm", &cubin(program::GEMM)?, &gpu)?,
        };
        let int4 = (weights == WeightType::Int4Weight)
            .then(|| Int4Kernels::load(&stream, cubin, &gpu))
            .transpose()?;
        let fp8 = (weights == WeightType::Fp8).then(|| Fp8Kernels::load(&stream, cubin, &gpu)).transpose()?;
        let (library, own_products) = product_library(&stream, &gpu, &options);
        Ok(Cuda {
            kernels,
            attention: Mutex::default(),
            staging: Mutex::default(),
            tables: Mutex::new(Tables::new(&stream)),
            workspace: Mutex::new(Workspace::new(&stream)),
            graphs: Mutex::default(),
            parcels: Arc::default(),
            arrived: Arc::default(),
            arrivals: Stream::open(device)?,
            product: Mutex::new(Memory::none(&stream)),
            library,
            own_products,
            int4,
            fp8,
            source: Mutex::new(Memory::none(&stream)),
            stream,
            gpu,
            options,
        })
    }

    /// The GPU.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Why products that cuBLASLt might do are our own kernel's, where they are: it is missing, or does not do them on this device.
    pub fn own_products(&self) -> Option<&str> {
        self.own_products.as_deref()
    }

    /// Bytes that are free on it.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn free_bytes(&self) -> Result<u64> {
        Ok(self.stream.free_bytes()? as u64)
    }

    /// Memory that is handed out from now on begins as numbers that are none, so that a test sees what was never written.
    pub fn poison_memory(&self) {
        self.stream.poison_memory();
        self.arrivals.poison_memory();
    }

    fn attention_kernels(&self, head_dim: usize) -> Result<Arc<AttentionKernels>> {
        let mut known = locked(&self.attention);
        if let Some(kernels) = known.get(&head_dim) {
            return Ok(Arc::clone(kernels));
        }
        let (cubins, architecture) = (self.options.cubins.as_deref(), self.gpu.architecture());
        let cubin = |source: Source, head_dim| source.cubin(cubins, &architecture, head_dim);
        let (shape, most_bytes) = ((head_dim, self.options.kv), self.gpu.block_bytes as usize);
        let kernels = AttentionKernels::load(&self.stream, cubin, shape, most_bytes)?;
        Ok(Arc::clone(known.entry(head_dim).or_insert(Arc::new(kernels))))
    }

    fn numbers(&self, op: &'static str, values: &[f32]) -> Result<Memory> {
        let mut memory = self.stream.allocate(op, size_of_val(values))?;
        self.stream.upload(op, bytemuck::cast_slice(values), &mut memory, 0)?;
        Ok(memory)
    }
}

/// cuBLASLt, where a row may depend on its batch and the library is there; and what [`Cuda::own_products`] says. Without it our own
/// kernel serves, and the numeric profile says which does.
fn product_library(
    stream: &Arc<Stream>,
    gpu: &Gpu,
    options: &CudaOptions,
) -> (Option<CublasLt>, Option<String>) {
    if options.is_deterministic {
        return (None, None);
    }
    match CublasLt::load(stream, gpu, options.libraries.as_deref(), options.cubins.as_deref()) {
        Err(error) => (None, Some(error.to_string())),
        Ok(library) => {
            let lacks_fp8 = options.weights == WeightType::Fp8 && !library.takes_fp8().unwrap_or(false);
            let why = format!("{} has no product of fp8 with a scale for each row on it", library.name());
            (Some(library), lacks_fp8.then_some(why))
        }
    }
}

/// A lock that a panic elsewhere does not spoil: what it holds is valid after every step.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A block for each row.
fn row_grid(rows: usize, threads: usize) -> Grid {
    Grid { blocks: [rows, 1, 1], threads, block_bytes: 0 }
}

/// A thread for each of so many numbers.
fn flat_grid(numbers: usize) -> Grid {
    row_grid(numbers.div_ceil(256), 256)
}

fn u32_of(value: usize) -> Argument {
    Argument::U32(value as u32)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// A GPU of the emulator, with chunks of 64 columns.
    pub(super) fn emulated(weights: WeightType) -> Cuda {
        let libraries = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/cuda-emulator");
        assert!(libraries.join("libcuda.so").is_file(), "no emulator\nhint: cargo xtask emulator");
        Cuda::new(CudaOptions {
            device: 0,
            weights,
            kv: KvDtype::Bf16,
            is_deterministic: true,
            has_graphs: false,
            ffn_columns: 64,
            libraries: Some(libraries),
            cubins: None,
        })
        .unwrap()
    }
}
