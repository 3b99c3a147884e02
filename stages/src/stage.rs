//! A stage as its actor sees it: a span of blocks on some device, one micro-batch at a time.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kernels::{
    Arrival, Cpu, CpuOptions, Cuda, CudaOptions, Gate, GroupExit, KvDtype, NcclRank, Parcel, Reference, Simd,
    WeightType,
};
use scheduler::{MicroBatch, MicroBatchOutput};

use crate::error::Result;
use crate::host_rows::HostRows;
use crate::model::Model;
use crate::ranks::{RankGroup, RankStep};
use crate::shared_weights::CpuWeights;
use crate::span::{SpanOptions, SpanStage};

/// The residual stream between two stages: f32, never rounded.
#[derive(Debug, Clone)]
pub struct Activations {
    /// `[tokens, hidden]`, row-major.
    pub values: Rows,
    /// Where an FFN is cut by columns between the two stages, what the product with its down matrix has come to, alike.
    pub sums: Option<Rows>,
    /// Width of a row.
    pub hidden: usize,
}

/// Rows between two stages: on the host, or still on the device of the one that made them.
#[derive(Debug, Clone)]
pub enum Rows {
    /// Row-major.
    Host(HostRows),
    /// Of a GPU.
    Device(Parcel),
}

impl From<Vec<f32>> for Rows {
    fn from(values: Vec<f32>) -> Rows {
        Rows::Host(values.into())
    }
}

impl Rows {
    /// Those that are on a device.
    pub fn into_parcel(self) -> Option<Parcel> {
        match self {
            Rows::Host(_) => None,
            Rows::Device(parcel) => Some(parcel),
        }
    }

    fn into_host(self) -> Result<HostRows> {
        match self {
            Rows::Host(values) => Ok(values),
            Rows::Device(parcel) => Ok(parcel.values()?.into()),
        }
    }
}

impl Activations {
    /// Whether they are on a device, and there perhaps not computed yet.
    pub fn are_on_a_device(&self) -> bool {
        matches!(self.values, Rows::Device(_))
    }

    /// Parcels that come from another device: the residual stream, and sums beside it if there are two. Nothing where there is none.
    pub fn on_a_device(parcels: Vec<Parcel>, hidden: usize) -> Option<Activations> {
        let mut parcels = parcels.into_iter().map(Rows::Device);
        parcels.next().map(|values| Activations { values, sums: parcels.next(), hidden })
    }

    /// The same on the host; from any thread.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn into_host(self) -> Result<Activations> {
        let bring = |rows: Rows| rows.into_host().map(Rows::Host);
        let sums = self.sums.map(bring).transpose()?;
        Ok(Activations { values: bring(self.values)?, sums, hidden: self.hidden })
    }

    /// Those of the first rows, and those of the rest.
    pub(crate) fn split(&self, rows: usize) -> Result<(Activations, Activations)> {
        let at = rows * self.hidden;
        let halves = |rows: &Rows| -> Result<(Rows, Rows)> {
            let mut front = rows.clone().into_host()?;
            let back = front.split_off(at);
            Ok((Rows::Host(front), back.into()))
        };
        let (front, back) = halves(&self.values)?;
        let sums = self.sums.as_ref().map(halves).transpose()?;
        let (front_sums, back_sums) = sums.unzip();
        let hidden = self.hidden;
        let front = Activations { values: front, sums: front_sums, hidden };
        Ok((front, Activations { values: back, sums: back_sums, hidden }))
    }

    /// These and then those of further rows.
    fn joined(self, rest: Activations) -> Result<Activations> {
        let join = |front: Rows, back: Rows| -> Result<Rows> {
            let mut front = front.into_host()?;
            front.extend_from_slice(&back.into_host()?);
            Ok(Rows::Host(front))
        };
        let sums = self.sums.zip(rest.sums).map(|(front, back)| join(front, back)).transpose()?;
        Ok(Activations { values: join(self.values, rest.values)?, sums, hidden: self.hidden })
    }
}

/// What a stage passes on.
#[derive(Debug)]
pub enum StageOutput {
    /// To the next stage.
    Activations(Activations),
    /// From the last stage, back to the scheduler.
    Tokens(MicroBatchOutput),
}

impl StageOutput {
    /// What a micro-batch gives, from what its halves gave.
    pub(crate) fn joined(self, back: StageOutput) -> Result<StageOutput> {
        match (self, back) {
            (StageOutput::Activations(front), StageOutput::Activations(back)) => {
                front.joined(back).map(StageOutput::Activations)
            }
            (StageOutput::Tokens(front), StageOutput::Tokens(back)) => {
                Ok(StageOutput::Tokens(front.joined(back)))
            }
            _ => panic!("one stage gave activations and tokens"),
        }
    }
}

/// A loaded span. Calls come in the order of micro-batches, from one thread.
pub trait Stage: Send {
    /// Computes one micro-batch. The first stage takes no activations, every other one takes those of the
    /// stage before it.
    ///
    /// # Errors
    /// What the device refuses; the stage is then of no more use.
    fn step(&mut self, batch: &MicroBatch, input: Option<Activations>) -> Result<StageOutput>;

    /// Waits until what the last step has made is there: a device may hand it on before. Of a step that was given what was not
    /// there yet, how long the device was at it itself.
    ///
    /// # Errors
    /// As of [`Stage::step`].
    fn finish(&mut self) -> Result<Option<Duration>> {
        Ok(None)
    }

    /// Its device's way to those of other processes, where it has one that is not through the host.
    fn gate(&self) -> Option<Gate> {
        None
    }

    /// The ways out of groups in which its devices may wait for each other, for whoever gives it up. Its queues then go on with numbers
    /// that are none: so only when it is known that all that it is at is lost. [`Stage::finish`] is an error from then on.
    fn exits(&self) -> Vec<GroupExit> {
        Vec::new()
    }

    /// Whether its device works beside its host, so that another micro-batch may be queued behind the one that is computed.
    fn is_ahead(&self) -> bool {
        false
    }

    /// Begins with a micro-batch, as [`Stage::step`], and does not wait for what comes of it: a device goes on with it by itself, a
    /// host has computed it when this returns. Where the stage is the whole model, some tokens may be those that the micro-batch before
    /// draws. Nothing where there is no room for it and others are under way: it goes in parts, each of which is waited for, when these
    /// are collected and it is queued once more.
    ///
    /// # Errors
    /// As of [`Stage::step`]; what was queued before may have been the reason, which [`Stage::collect`] then says too.
    ///
    /// # Panics
    /// Where two were queued and not collected, and where the stage has several ranks.
    fn queue(&mut self, batch: &Arc<MicroBatch>, _input: Option<&Activations>) -> Result<Option<Queued>> {
        panic!("{:?} was queued on a stage that takes no step before the last one's end", batch.id)
    }

    /// What came of the oldest micro-batch that was queued and not collected; waits for it.
    ///
    /// # Errors
    /// As of [`Stage::step`].
    ///
    /// # Panics
    /// Where there is none.
    fn collect(&mut self) -> Result<Collected> {
        panic!("nothing was queued")
    }

    /// Writes keys and values into every page of so many, for whoever asks how long steps take and not what they give: a device's memory
    /// begins as anything, zeros and what is no number among it, and a host's is none before it is written.
    ///
    /// # Errors
    /// As of [`Stage::step`].
    ///
    /// # Panics
    /// Where the stage has several ranks.
    fn fill_pages(&mut self, _num_pages: usize) -> Result<()> {
        panic!("pages are filled of a lone device")
    }
}

/// A micro-batch that a stage has begun with.
#[derive(Debug, Default)]
pub struct Queued {
    /// What the next stage goes on with; nothing of the last one.
    pub activations: Option<Activations>,
    /// When the device will be done with it, and an answer there.
    pub arrival: Arrival,
}

/// What came of a micro-batch that was queued.
#[derive(Debug, Clone)]
pub struct Collected {
    /// The last stage's answer.
    pub output: Option<MicroBatchOutput>,
    /// As of [`Stage::finish`].
    pub device_time: Option<Duration>,
}

/// A rank beside the first of a stage. Calls come in the order of micro-batches, from one thread.
pub trait Follower: Send {
    /// Computes this rank's part of a micro-batch, together with the others.
    ///
    /// # Errors
    /// What the device refuses, or another rank that is gone; the rank is then of no more use.
    fn follow(&mut self, step: &RankStep) -> Result<()>;
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
    /// A GPU.
    Cuda {
        /// Which one, as the driver counts them.
        index: usize,
        /// Where CUDA's libraries are looked for first.
        libraries: Option<PathBuf>,
        /// Where compiled kernels are kept.
        cubins: Option<PathBuf>,
        /// Whether rows have the same bits in any batch; else contexts are split to fill the device, and products are
        /// cuBLASLt's.
        is_deterministic: bool,
        /// Whether steps of rows that decode are captured and launched as a whole.
        has_graphs: bool,
    },
}

impl Device {
    /// Which GPU it is, as the driver counts them, if it is one.
    pub fn gpu(&self) -> Option<usize> {
        match self {
            Device::Cuda { index, .. } => Some(*index),
            Device::Cpu { .. } | Device::Reference => None,
        }
    }
}

/// Number types of a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dtypes {
    /// Weights of blocks, which decide what matmul inputs, embedding and output matrix are.
    pub weights: WeightType,
    /// Keys and values.
    pub kv: KvDtype,
}

/// Loads a span of a model onto a device. The calling thread becomes the device's own: it is the one that
/// takes the steps, and is pinned where the device is a group of cores. Its weights are its own, those of blocks with the same tensors
/// too: measuring rests on that.
///
/// # Errors
/// What the device refuses.
pub fn load(model: &Model, device: &Device, dtypes: Dtypes, options: SpanOptions) -> Result<Box<dyn Stage>> {
    match device {
        Device::Reference => {
            Ok(Box::new(SpanStage::load(Reference::new(dtypes.weights, dtypes.kv), model, options, None)?))
        }
        Device::Cpu { .. } => Ok(Box::new(SpanStage::load(cpu(device, dtypes)?, model, options, None)?)),
        Device::Cuda { .. } => Ok(Box::new(SpanStage::load(cuda(device, dtypes)?, model, options, None)?)),
    }
}

/// Loads a span as [`load`] does, on cores with the weights that stages of this process may hold already.
///
/// # Errors
/// As [`load`].
pub fn load_beside(
    model: &Model,
    device: &Device,
    dtypes: Dtypes,
    options: SpanOptions,
    weights: &CpuWeights,
) -> Result<Box<dyn Stage>> {
    match device {
        Device::Cpu { .. } => {
            let backend = cpu(device, dtypes)?;
            Ok(Box::new(SpanStage::load_beside(backend, model, options, None, Some(weights))?))
        }
        Device::Reference | Device::Cuda { .. } => load(model, device, dtypes, options),
    }
}

/// Loads the first rank's part of a span, as [`load`] does; the other ranks must follow each of its steps.
///
/// # Errors
/// As [`load`].
pub fn load_first_rank(
    model: &Model,
    device: &Device,
    dtypes: Dtypes,
    options: SpanOptions,
    group: RankGroup,
) -> Result<Box<dyn Stage>> {
    Ok(match device {
        Device::Reference => Box::new(reference_rank(model, dtypes, options, group)?),
        Device::Cpu { .. } => Box::new(cpu_rank(model, device, dtypes, options, group)?),
        Device::Cuda { .. } => Box::new(cuda_rank(model, device, dtypes, options, group)?),
    })
}

/// Loads another rank's part of a span, as [`load`] does.
///
/// # Errors
/// As [`load`].
pub fn load_follower(
    model: &Model,
    device: &Device,
    dtypes: Dtypes,
    options: SpanOptions,
    group: RankGroup,
) -> Result<Box<dyn Follower>> {
    Ok(match device {
        Device::Reference => Box::new(reference_rank(model, dtypes, options, group)?),
        Device::Cpu { .. } => Box::new(cpu_rank(model, device, dtypes, options, group)?),
        Device::Cuda { .. } => Box::new(cuda_rank(model, device, dtypes, options, group)?),
    })
}

fn reference_rank(
    model: &Model,
    dtypes: Dtypes,
    options: SpanOptions,
    group: RankGroup,
) -> Result<SpanStage<Reference>> {
    SpanStage::load(Reference::new(dtypes.weights, dtypes.kv), model, options, Some(group.into()))
}

fn cpu_rank(
    model: &Model,
    device: &Device,
    dtypes: Dtypes,
    options: SpanOptions,
    group: RankGroup,
) -> Result<SpanStage<Cpu>> {
    SpanStage::load(cpu(device, dtypes)?, model, options, Some(group.into()))
}

pub(crate) fn cuda_rank(
    model: &Model,
    device: &Device,
    dtypes: Dtypes,
    options: SpanOptions,
    group: RankGroup,
) -> Result<SpanStage<Cuda>> {
    let cuda = cuda(device, dtypes)?;
    let ranks = group.join(|control, exit| Ok(Box::new(NcclRank::join(&cuda, control, exit)?)))?;
    SpanStage::load(cuda, model, options, Some(ranks))
}

/// A group of cores, with the calling thread on the first of them.
pub(crate) fn cpu(device: &Device, dtypes: Dtypes) -> Result<Cpu> {
    let Device::Cpu { cores, threads, simd } = device else { unreachable!("the device is a group of cores") };
    let Dtypes { weights, kv } = dtypes;
    let cpu = Cpu::new(CpuOptions { cores: cores.clone(), threads: *threads, simd: *simd, weights, kv })?;
    cpu.pin_caller();
    Ok(cpu)
}

/// A GPU.
pub(crate) fn cuda(device: &Device, dtypes: Dtypes) -> Result<Cuda> {
    let Device::Cuda { index, libraries, cubins, is_deterministic, has_graphs } = device else {
        unreachable!("the device is a GPU")
    };
    let Dtypes { weights, kv } = dtypes;
    let cuda = Cuda::new(CudaOptions {
        device: *index,
        weights,
        kv,
        is_deterministic: *is_deterministic,
        has_graphs: *has_graphs,
        ffn_columns: Cuda::FFN_COLUMNS,
        libraries: libraries.clone(),
        cubins: cubins.clone(),
    })?;
    if let Some(why) = cuda.own_products() {
        tracing::warn!("cuda:{index}: products are by our own kernel, which is slower: {why}");
    }
    Ok(cuda)
}
