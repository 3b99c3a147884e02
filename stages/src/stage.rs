//! A stage as its actor sees it: a span of blocks on some device, one micro-batch at a time.

use kernels::{Cpu, CpuOptions, Dtype, Reference, Simd, WeightType};
use scheduler::{MicroBatch, MicroBatchOutput};

use crate::error::Result;
use crate::model::Model;
use crate::span::{SpanOptions, SpanStage};

/// The residual stream between two stages: f32, never rounded.
#[derive(Debug, Clone)]
pub struct Activations {
    /// `[tokens, hidden]`, row-major.
    pub values: Vec<f32>,
    /// Width of a row.
    pub hidden: usize,
}

/// What a stage passes on.
#[derive(Debug)]
pub enum StageOutput {
    /// To the next stage.
    Activations(Activations),
    /// From the last stage, back to the scheduler.
    Tokens(MicroBatchOutput),
}

/// A loaded span. Calls come in the order of micro-batches, from one thread.
pub trait Stage: Send {
    /// Computes one micro-batch. The first stage takes no activations, every other one takes those of the
    /// stage before it.
    ///
    /// # Errors
    /// What the device refuses; the stage is then of no more use.
    fn step(&mut self, batch: &MicroBatch, input: Option<Activations>) -> Result<StageOutput>;
}

/// Where a stage runs.
#[derive(Debug, Clone)]
pub enum Device {
    /// The plain loops that everything is compared with.
    Reference,
    /// A group of the machine's cores.
    Cpu {
        /// Cores to pin threads to.
        cores: Vec<usize>,
        /// Threads of a step.
        threads: usize,
        /// Instruction set.
        simd: Simd,
    },
}

/// Number types of a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dtypes {
    /// Weights of blocks, which decide what matmul inputs, embedding and output matrix are.
    pub weights: WeightType,
    /// Keys and values.
    pub kv: Dtype,
}

/// Loads a span of a model onto a device. The calling thread becomes the device's own: it is the one that
/// takes the steps, and is pinned where the device is a group of cores.
///
/// # Errors
/// What the device refuses.
pub fn load(model: &Model, device: &Device, dtypes: Dtypes, options: SpanOptions) -> Result<Box<dyn Stage>> {
    let Dtypes { weights, kv } = dtypes;
    match device {
        Device::Reference => Ok(Box::new(SpanStage::load(Reference::new(weights, kv), model, options)?)),
        Device::Cpu { cores, threads, simd } => {
            let cpu = CpuOptions { cores: cores.clone(), threads: *threads, simd: *simd, weights, kv };
            let cpu = Cpu::new(cpu)?;
            cpu.pin_caller();
            Ok(Box::new(SpanStage::load(cpu, model, options)?))
        }
    }
}
