//! From a job file's words to each crate's options: deciding only, nothing is started here.

use std::collections::BTreeSet;
use std::time::Duration;

use actors::{Limits, PipelineOptions, RankHome, StageHome, StagePlacement};
use anyhow::{Result, bail};
use configs::{AutoCount, MOST_SEQUENCES};
use jobs::NumericProfile;
use stages::{Alike, Device, Dtypes, KvDtype, ModelConfig, Narrow, PAGE_TOKENS, Simd, WeightType};

use crate::cores::{core_group, num_groups};
use crate::kv_pages::KvPages;
use crate::lanes::WantedTokens;
use crate::layout::{self, StageLayout};

use crate::{efficient, gpu_memory, gpus, text};

/// Positions that page indices of 32 bits can name.
pub(crate) const MAX_KV_TOKENS: usize = (u32::MAX as usize) * PAGE_TOKENS;

/// The share of the memory left beside the weights that an automatic KV pool takes. Pages are touched
/// when they are first used, lowest first, so a job that needs less takes less.
const KV_MEMORY_SHARE: f64 = 0.5;

/// What the machine has.
#[derive(Debug, Clone)]
pub(crate) struct Machine {
    /// Cores that this process may use.
    pub(crate) cores: Vec<usize>,
    /// Bytes that are free.
    pub(crate) free_bytes: u64,
    /// All of its memory, in bytes.
    pub(crate) total_bytes: u64,
}

/// A pipeline whose stages have no blocks yet.
#[derive(Debug)]
pub(crate) struct Unplaced {
    /// Those that the job names, in its order: of one replica after the other.
    pub(crate) devices: Vec<Device>,
    replicas: usize,
    run_in: StageHome,
    ranks: RankHome,
    pub(crate) dtypes: Dtypes,
    /// Longest sequence.
    pub(crate) context_tokens: usize,
    scheduler: scheduler::Options,
    limits: Limits,
    /// Whether a lone GPU is to be given steps before the tokens of the last one have come back.
    token_feedback: bool,
    /// It depends on the stages how many pages there are.
    pub(crate) pages: KvPages,
}

impl Unplaced {
    /// The same with micro-batches of no more tokens than these, which are no more than the job allows.
    pub(crate) fn in_micro_batches_of(mut self, tokens: usize) -> Self {
        assert!(tokens <= self.scheduler.micro_batch_tokens, "{tokens} tokens: arrays have room for fewer");
        self.scheduler.micro_batch_tokens = tokens;
        self
    }

    /// A pipeline of these stages for each replica.
    ///
    /// # Errors
    /// A GPU that its stages do not fit.
    pub(crate) fn with(self, stages: &[StageLayout]) -> Result<Vec<PipelineOptions>> {
        let Unplaced {
            devices,
            replicas,
            run_in,
            ranks,
            dtypes,
            context_tokens: _,
            mut scheduler,
            limits,
            token_feedback,
            pages,
        } = self;
        let lanes = pages.lanes(stages)?;
        (scheduler.num_pages, scheduler.num_lanes) = (lanes.num_pages(), lanes.num_lanes);
        if pages.gpus().is_some() {
            // A CPU has computed its step when it has given it back: there is nothing to go ahead of.
            let is_lone = matches!(stages, [stage] if stage.devices.len() == 1);
            scheduler.feeds_back = token_feedback && is_lone && run_in == StageHome::Threads;
            // Ranks that share a stage go step by step.
            scheduler.is_ahead = stages.iter().any(|stage| stage.devices.len() == 1);
        }
        let num_memories = efficient::num_memories(stages.iter().map(|stage| &devices[stage.devices.start]));
        let scheduler = scheduler::Options { num_stages: stages.len(), num_memories, ..scheduler };
        let replica = |(replica, devices): (usize, &[Device])| {
            let stage = |stage: &StageLayout| StagePlacement {
                devices: devices[stage.devices.clone()].to_vec(),
                part: stage.part,
                sharing: stage.sharing.clone(),
            };
            PipelineOptions {
                first_stage: replica * stages.len(),
                stages: stages.iter().map(stage).collect(),
                run_in,
                ranks,
                dtypes,
                scheduler: scheduler.clone(),
                limits,
                step_log: None,
            }
        };
        Ok(devices.chunks(devices.len() / replicas).enumerate().map(replica).collect())
    }
}

/// Lowers `[model]` and `[pipeline]` for a model on a machine.
pub(crate) fn pipeline(
    model: &configs::Model,
    pipeline: &configs::Pipeline,
    config: &ModelConfig,
    machine: &Machine,
) -> Result<Unplaced> {
    check(pipeline)?;
    let dtypes = dtypes(model, pipeline, config);
    let groups = device_groups(pipeline, machine)?;
    let devices = pipeline.devices.iter().map(|device| groups[device.index].clone()).collect();

    let context_tokens = context_tokens(model, config)?;
    let replicas = pipeline.replicas;
    let max_sequences = sequences_per_replica(pipeline);
    let (pages, first_gpu) = match gpus::are_meant(pipeline)? {
        true => {
            let gpus = gpu_memory::Question::of(pipeline, config, dtypes, context_tokens)?;
            (KvPages::Gpus(Box::new(gpus)), Some(gpus::catalog_name(pipeline.devices[0].index)?))
        }
        false => {
            let memory = Memory::of(config, dtypes, machine.free_bytes, [replicas, weight_copies(pipeline)]);
            let room = memory.pages(pipeline.kv_cache_tokens, context_tokens)?;
            (KvPages::Cpus { wanted: WantedTokens::of(pipeline, context_tokens), room }, None)
        }
    };
    let scheduler = scheduler::Options {
        num_stages: pipeline.devices_per_replica(),
        micro_batch_tokens: pipeline.most_micro_batch_tokens(),
        max_sequences,
        num_pages: 0, // Until the stages are placed.
        num_lanes: 1, // As that.
        page_tokens: PAGE_TOKENS,
        context_tokens,
        efficient_tokens: efficient::tokens_of_first(first_gpu.as_deref(), dtypes.weights.into()),
        num_memories: 1, // As that.
        feeds_back: false,
        is_ahead: false,
    };
    let limits = Limits {
        window: window(max_sequences),
        step_timeout: Duration::from_secs(pipeline.step_timeout_seconds as u64),
    };
    let run_in = match pipeline.stages_run_in {
        configs::StagesRunIn::Threads => StageHome::Threads,
        configs::StagesRunIn::Processes => StageHome::Processes,
    };
    let ranks = match pipeline.ranks {
        configs::Ranks::Threads => RankHome::Threads,
        configs::Ranks::Processes => RankHome::Processes,
    };
    let token_feedback = pipeline.token_feedback;
    Ok(Unplaced {
        devices,
        replicas,
        run_in,
        ranks,
        dtypes,
        context_tokens,
        scheduler,
        limits,
        token_feedback,
        pages,
    })
}

/// One replica's share of the sequences in flight.
pub(crate) fn sequences_per_replica(pipeline: &configs::Pipeline) -> usize {
    pipeline.most_sequences().div_ceil(pipeline.replicas)
}

/// Rows offered to a pipeline at once.
pub(crate) fn window(max_sequences: usize) -> usize {
    let mut sum = 0;
    sum += max_sequences; // Running.
    sum += max_sequences; // Waiting, so that one that ends is replaced at once; the rest is being written.
    sum
}

/// What a numeric profile calls GPUs.
pub(crate) const GPU_BACKEND: &str = "cuda";

/// What the bits of a pipeline's results depend on beside the row, the model and the seed. A block is summed over the
/// ranks of its stage, so that it matters where stages of several ranks begin and end.
///
/// # Errors
/// A GPU that is not there any more.
pub(crate) fn numeric_profile(options: &PipelineOptions) -> Result<NumericProfile> {
    // One machine runs all its stages on one level, but for GPUs where nobody asks for the same bits.
    let (backend, simd, deterministic) = match &options.stages[0].devices[0] {
        Device::Reference => ("reference", "none".to_owned(), true),
        Device::Cpu { simd, .. } => ("cpu", simd.numerics().to_owned(), true),
        Device::Cuda { is_deterministic, .. } => (GPU_BACKEND, architectures(options)?, *is_deterministic),
    };
    let shared: Vec<String> = (options.stages.iter())
        .filter(|stage| stage.devices.len() > 1)
        .map(|stage| {
            let exceptions = stage.sharing.exceptions();
            let alike =
                exceptions.alike().map(|Alike { half, how, blocks }| format!("{half} of {blocks:?} {how}"));
            let with = match alike.collect::<Vec<_>>().join(" and ") {
                none if none.is_empty() => none,
                some => format!(" with {some}"),
            };
            format!("{} on {}{with}", stage.part, stage.devices.len())
        })
        .collect();
    Ok(NumericProfile {
        backend: backend.to_owned(),
        simd,
        dtype: options.dtypes.weights.name().to_owned(),
        kv_cache_dtype: options.dtypes.kv.name().to_owned(),
        tensor_parallel: options.stages.iter().map(|stage| stage.devices.len()).max().unwrap_or(1) as u32,
        tensor_parallel_stages: (!shared.is_empty()).then(|| shared.join(", ")),
        deterministic,
    })
}

/// The architectures of a pipeline's GPUs.
fn architectures(options: &PipelineOptions) -> Result<String> {
    let mut names = BTreeSet::new();
    for device in options.stages.iter().flat_map(|stage| &stage.devices) {
        if let Device::Cuda { index, .. } = device {
            names.insert(gpus::architecture(*index)?);
        }
    }
    Ok(names.into_iter().collect::<Vec<_>>().join(", "))
}

/// The type of weights that a job names.
pub(crate) fn weights(dtype: configs::Dtype) -> WeightType {
    match dtype {
        configs::Dtype::Bf16 => WeightType::Bf16,
        configs::Dtype::F32 => WeightType::F32,
        configs::Dtype::Fp8 => WeightType::Fp8,
        configs::Dtype::Int8 => WeightType::Int8,
        configs::Dtype::Int8Weight => WeightType::Int8Weight,
        configs::Dtype::Int4Weight => WeightType::Int4Weight,
    }
}

/// The number types of a job. A checkpoint that asks for keys and values in fp8 has them so where nobody says otherwise.
pub(crate) fn dtypes(model: &configs::Model, pipeline: &configs::Pipeline, config: &ModelConfig) -> Dtypes {
    let asked = match follows_checkpoint(model, pipeline, config) {
        true => configs::KvCacheDtype::Fp8,
        false => pipeline.kv_cache_dtype,
    };
    let kv = match asked.beside(model.dtype) {
        configs::KvCacheDtype::F32 => KvDtype::F32,
        configs::KvCacheDtype::Bf16 | configs::KvCacheDtype::Auto => KvDtype::Bf16,
        configs::KvCacheDtype::Fp8 => KvDtype::Fp8,
    };
    Dtypes { weights: weights(model.dtype), kv }
}

/// Whether keys and values are in fp8 because the checkpoint says so, and the job nothing. Weights in f32 are asked for by whoever
/// wants exact numbers.
fn follows_checkpoint(model: &configs::Model, pipeline: &configs::Pipeline, config: &ModelConfig) -> bool {
    config.asks_for_fp8_kv
        && pipeline.kv_cache_dtype == configs::KvCacheDtype::Auto
        && model.dtype != configs::Dtype::F32
}

/// What the user should know whose checkpoint decides how keys and values are kept.
pub(crate) fn kv_of_checkpoint(
    model: &configs::Model,
    pipeline: &configs::Pipeline,
    config: &ModelConfig,
) -> Option<&'static str> {
    follows_checkpoint(model, pipeline, config).then_some(
        "keys and values are in fp8, as the checkpoint asks for, with scales of our own: [pipeline] kv_cache_dtype = \"bf16\" \
         keeps them wider",
    )
}

/// What the user should know whose checkpoint is narrow and is widened.
///
/// # Errors
/// Devices of two kinds.
pub(crate) fn widened(
    stored: Option<Narrow>,
    model: &configs::Model,
    pipeline: &configs::Pipeline,
) -> Result<Option<String>> {
    let (Some(stored), configs::Dtype::Bf16 | configs::Dtype::F32) = (stored, model.dtype) else {
        return Ok(None);
    };
    let are_gpus = gpus::are_meant(pipeline)?;
    let (what, kept) = match stored {
        Narrow::Int4 => ("4 bits", "\"int4-weight\" keeps them as they are"),
        Narrow::OrderedInt4 if are_gpus => ("4 bits", "\"fp8\" has half of that"),
        Narrow::OrderedInt4 => ("4 bits", "\"int8-weight\" has half of that"),
        Narrow::Fp8 if are_gpus => ("fp8", "\"fp8\" keeps them as they are"),
        Narrow::Fp8 => ("fp8", "\"int8-weight\" has half of that"),
    };
    let dtype = weights(model.dtype).name();
    Ok(Some(format!(
        "the checkpoint's weights are in {what}, and [model] dtype = \"{dtype}\" widens them in memory: {kept}"
    )))
}

/// All devices that the machine is shared out to, as many as the highest one named needs; some may be idle.
pub(crate) fn device_groups(pipeline: &configs::Pipeline, machine: &Machine) -> Result<Vec<Device>> {
    let num_groups = num_groups(pipeline);
    if gpus::are_meant(pipeline)? {
        return Ok((0..num_groups).map(|index| gpus::device(index, pipeline)).collect());
    }
    let simd = match pipeline.simd {
        configs::Simd::Reference => return Ok(vec![Device::Reference; num_groups]),
        configs::Simd::Auto => Simd::detect(),
        configs::Simd::Amx => Simd::Amx,
        configs::Simd::Avx512 => Simd::Avx512,
        configs::Simd::Avx2 => Simd::Avx2,
        configs::Simd::Portable => Simd::Portable,
    };
    if !simd.is_available() {
        bail!(
            "[pipeline] simd: this processor lacks {}, the best it has is {}",
            simd.name(),
            Simd::detect().name()
        );
    }
    let device = |index| {
        let cores = machine.cores[core_group(machine.cores.len(), num_groups, index)].to_vec();
        let threads = pipeline.threads.unwrap_or(cores.len());
        Device::Cpu { cores, threads, simd }
    };
    Ok((0..num_groups).map(device).collect())
}

/// Refuses what cannot be meant, and what cannot be run.
pub(crate) fn check(pipeline: &configs::Pipeline) -> Result<()> {
    check_sizes(pipeline)?;
    gpus::are_meant(pipeline)?;
    check_layout(pipeline)
}

/// Sizes beyond which a key is a slip of the finger, and beyond which sums would not fit their types.
fn check_sizes(pipeline: &configs::Pipeline) -> Result<()> {
    let most = |key: &str, found: usize, most: usize| match found > most {
        true => bail!("[pipeline] {key}: found {found}, expected at most {most}"),
        false => Ok(()),
    };
    most("devices", pipeline.devices.len(), 1 << 10)?;
    most("replicas", pipeline.replicas, pipeline.devices.len())?;
    most("threads", pipeline.threads.unwrap_or(1), 1 << 10)?;
    most("step_timeout_seconds", pipeline.step_timeout_seconds, 1 << 30)?;
    most("max_sequences", pipeline.most_sequences(), MOST_SEQUENCES)?;
    most("micro_batch_tokens", pipeline.most_micro_batch_tokens(), 1 << 20)?;
    match pipeline.kv_cache_tokens {
        AutoCount::Given(tokens) => most("kv_cache_tokens", tokens, MAX_KV_TOKENS),
        AutoCount::Auto => Ok(()),
    }
}

/// Refuses stages of several devices where a device is in two of them.
fn check_layout(pipeline: &configs::Pipeline) -> Result<()> {
    let is_twice = |index: usize| pipeline.devices[..index].contains(&pipeline.devices[index]);
    let twice = (0..pipeline.devices.len()).find(|index| is_twice(*index));
    match (layout::widths(pipeline), twice) {
        (Some(widths), Some(index)) => bail!(
            "[pipeline] tensor_parallel: found {widths:?} with {} named twice, expected devices that are named once",
            pipeline.devices[index]
        ),
        _ => Ok(()),
    }
}

/// The longest prompt and completion together.
pub(crate) fn context_tokens(model: &configs::Model, config: &ModelConfig) -> Result<usize> {
    let longest = config.max_position_embeddings;
    let context = model.max_context_tokens.unwrap_or(longest);
    if context > longest {
        bail!(
            "[model] max_context_tokens: found {context}, the model's max_position_embeddings is {longest}"
        );
    }
    Ok(context)
}

/// How often the weights of a pipeline on cores are there: once for all replicas where their stages are threads of this process, and of
/// one device each; ranks hold their own.
fn weight_copies(pipeline: &configs::Pipeline) -> usize {
    let are_alone = pipeline.devices_per_replica() == 1
        || matches!(pipeline.tensor_parallel, configs::TensorParallel::Off);
    match pipeline.stages_run_in {
        configs::StagesRunIn::Threads if are_alone => 1,
        configs::StagesRunIn::Threads | configs::StagesRunIn::Processes => pipeline.replicas,
    }
}

/// What the weights take, and what they leave for keys and values: of all replicas together.
struct Memory {
    free_bytes: u64,
    weight_bytes: u64,
    /// Of as many tokens as there are replicas, one in each.
    kv_bytes_per_token: u64,
}

impl Memory {
    fn of(
        config: &ModelConfig,
        dtypes: Dtypes,
        free_bytes: u64,
        [replicas, weight_copies]: [usize; 2],
    ) -> Self {
        let dims = config.dims;
        let values: u64 = config.blocks.iter().map(|block| block.attention.kv_values_per_token(dims)).sum();
        let heads = values / dims.head_dim as u64;
        Memory {
            free_bytes,
            weight_bytes: weight_copies as u64 * stages::weight_bytes(config, dtypes.weights),
            kv_bytes_per_token: replicas as u64 * heads * dtypes.kv.head_bytes(dims.head_dim) as u64,
        }
    }

    /// Pages of each replica that there is room for: all that is left beside the weights for as many as the job names, or else a share
    /// of it. Never less than one context: then an answer would depend on how much memory is free.
    fn pages(&self, wanted: AutoCount, context_tokens: usize) -> Result<usize> {
        let left = self.free_bytes.saturating_sub(self.weight_bytes);
        if left == 0 {
            let (weights, free) = (text::bytes(self.weight_bytes), text::bytes(self.free_bytes));
            bail!("the weights take {weights}, and {free} of memory are free");
        }
        let page_bytes = self.kv_bytes_per_token * PAGE_TOKENS as u64;
        let pages_in = |bytes: u64| match bytes.checked_div(page_bytes) {
            Some(pages) => usize::try_from(pages).unwrap_or(usize::MAX),
            None => usize::MAX, // Without attention there is nothing to keep.
        };
        let bytes_of = |tokens: usize| text::bytes(tokens.div_ceil(PAGE_TOKENS) as u64 * page_bytes);
        let (tokens, room) = match wanted {
            AutoCount::Given(tokens) => (tokens, pages_in(left)),
            AutoCount::Auto => (context_tokens, pages_in((left as f64 * KV_MEMORY_SHARE) as u64)),
        };
        if room >= tokens.div_ceil(PAGE_TOKENS) {
            return Ok(room);
        }
        let (needed, left) = (bytes_of(tokens), text::bytes(left));
        match wanted {
            AutoCount::Given(_) => bail!(
                "[pipeline] kv_cache_tokens: {tokens} take {needed}, and {left} of memory are free beside the weights"
            ),
            AutoCount::Auto => bail!(
                "a context of {context_tokens} tokens takes {needed} of KV cache, and {left} of memory are free beside the \
                 weights\nhint: set [model] max_context_tokens to at most {}, or [pipeline] kv_cache_tokens",
                room * PAGE_TOKENS
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_of_replicas_count_once_where_they_are_there_once() {
        use configs::{Device, DeviceKind, Pipeline, StagesRunIn, TensorParallel};
        let copies = |devices: usize, stages_run_in, tensor_parallel| {
            let devices = (0..devices).map(|index| Device { kind: DeviceKind::Cpu, index }).collect();
            let pipeline =
                Pipeline { devices, replicas: 2, stages_run_in, tensor_parallel, ..Pipeline::default() };
            weight_copies(&pipeline)
        };
        assert_eq!(copies(2, StagesRunIn::Threads, TensorParallel::Auto), 1);
        assert_eq!(copies(4, StagesRunIn::Threads, TensorParallel::Off), 1);
        assert_eq!(
            copies(4, StagesRunIn::Threads, TensorParallel::Auto),
            2,
            "stages may have several devices"
        );
        assert_eq!(copies(4, StagesRunIn::Threads, TensorParallel::Widths(vec![2])), 2);
        assert_eq!(copies(2, StagesRunIn::Processes, TensorParallel::Off), 2);
    }

    #[test]
    fn a_checkpoint_says_how_keys_and_values_are_kept_where_the_job_does_not() {
        let path = std::path::Path::new("configs/models/Llama-3_3-Nemotron-Super-49B-v1");
        let plain = ModelConfig::read(path).unwrap();
        let config = |asks_for_fp8_kv| ModelConfig { asks_for_fp8_kv, ..plain.clone() };
        let kv = |dtype, kv_cache_dtype, asks| {
            let model = configs::Model { dtype, ..configs::Model::default() };
            let pipeline = configs::Pipeline { kv_cache_dtype, ..configs::Pipeline::default() };
            let told = kv_of_checkpoint(&model, &pipeline, &config(asks));
            (dtypes(&model, &pipeline, &config(asks)).kv, told.is_some())
        };
        use configs::{Dtype, KvCacheDtype};
        assert_eq!(kv(Dtype::Bf16, KvCacheDtype::Auto, true), (KvDtype::Fp8, true));
        assert_eq!(kv(Dtype::Int4Weight, KvCacheDtype::Auto, true), (KvDtype::Fp8, true));
        assert_eq!(kv(Dtype::F32, KvCacheDtype::Auto, true), (KvDtype::F32, false));
        assert_eq!(kv(Dtype::Bf16, KvCacheDtype::Bf16, true), (KvDtype::Bf16, false));
        assert_eq!(kv(Dtype::Bf16, KvCacheDtype::Auto, false), (KvDtype::Bf16, false));
    }

    #[test]
    fn whoever_widens_a_narrow_checkpoint_is_told_the_key() {
        let told = |stored, dtype, devices: &[configs::Device]| {
            let model = configs::Model { dtype, ..configs::Model::default() };
            let pipeline = configs::Pipeline { devices: devices.to_vec(), ..configs::Pipeline::default() };
            widened(stored, &model, &pipeline).unwrap()
        };
        let cpu = [configs::Device::cpu(0)];
        let gpu = [configs::Device { kind: configs::DeviceKind::Cuda, index: 0 }];
        assert_eq!(
            told(Some(Narrow::Int4), configs::Dtype::Bf16, &cpu).unwrap(),
            "the checkpoint's weights are in 4 bits, and [model] dtype = \"bf16\" widens them in memory: \"int4-weight\" \
             keeps them as they are"
        );
        assert!(told(Some(Narrow::Int4), configs::Dtype::F32, &gpu).unwrap().contains("\"int4-weight\""));
        assert!(told(Some(Narrow::Fp8), configs::Dtype::Bf16, &cpu).unwrap().contains("\"int8-weight\""));
        assert!(told(Some(Narrow::Fp8), configs::Dtype::Bf16, &gpu).unwrap().contains("\"fp8\" keeps"));
        assert_eq!(told(Some(Narrow::Fp8), configs::Dtype::Fp8, &gpu), None);
        assert_eq!(told(None, configs::Dtype::Bf16, &gpu), None);
    }
}
