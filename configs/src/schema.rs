//! What a job file says, with the defaults and where they come from.
//!
//! A field's name is the key's name. Each section can be read on its own with keys left out; the keys
//! that a job can't go without are empty then, and refused once all layers are joined.

use std::path::PathBuf;

use serde::{Deserialize, Serialize, Serializer};

use crate::devices::DeviceList;
use crate::read;
use crate::types::{
    AutoCount, ColumnCuts, Device, DeviceKind, Dtype, Grader, KvCacheDtype, Order, Profile, Ranks, Simd,
    SplitBlocks, Stages, StagesRunIn, TensorParallel, VirtualStages,
};

/// Tokens in one micro-batch. Two cores prefill SmolLM2-135M at about 1,700 tokens/s (llama.cpp, which takes
/// 512 too), so a full one takes 0.3 s: the longest that others' decode steps wait for a prompt.
pub const MICRO_BATCH_TOKENS: usize = 512;

/// Sequences in flight in all replicas together, on CPUs. On two cores llama.cpp decodes 518 tokens/s with 64 sequences
/// and 523 with 128, so 64 are enough for one stage; the smallest pipeline that is one has two stages.
pub const CPU_SEQUENCES: usize = 2 * 64;

/// No job has more sequences in flight: beyond it, sums would not fit their types.
pub const MOST_SEQUENCES: usize = 1 << 16;

/// A whole job file, defaults filled in and checked.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct JobFile {
    /// The model: where it is, and in which numbers it runs.
    pub model: Model,
    /// The devices, and what each may hold.
    pub pipeline: Pipeline,
    /// The files.
    pub job: Job,
    /// The template for plain rows; batch lines need none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt: Option<Prompt>,
    /// Sampling for the rows that don't say.
    pub sampling: Sampling,
    /// Grading, for rows that bring their answers along.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grade: Option<Grade>,
    /// What `spanwise plan` takes in the place of the rows and of the pipeline's devices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan: Option<Plan>,
}

/// `[model]`
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Model {
    /// The model's folder, as it comes from Hugging Face. Required; absolute after [`crate::load`].
    #[serde(deserialize_with = "read::path", serialize_with = "path_as_text")]
    pub path: PathBuf,
    /// Number type of weights and of the inputs of matrix products.
    pub dtype: Dtype,
    /// Longest prompt plus completion, in tokens, where that is less than the model's own limit.
    #[serde(deserialize_with = "read::positive", skip_serializing_if = "Option::is_none")]
    pub max_context_tokens: Option<usize>,
    /// Make seeded weights from `config.json` alone, for measuring; completions are noise.
    #[serde(deserialize_with = "read::flag")]
    pub random_weights: bool,
}

/// `[pipeline]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Pipeline {
    /// Those of each stage, in the order of the blocks: one, or as many as `tensor_parallel` says; of one replica after the
    /// other. A device may be named twice and hosts two stages then; see `virtual_stages`.
    #[serde(deserialize_with = "read::devices")]
    pub devices: Vec<Device>,
    /// Whole pipelines that share the job's rows.
    #[serde(deserialize_with = "read::positive")]
    pub replicas: usize,
    /// Threads per device; its cores when not set.
    #[serde(deserialize_with = "read::positive", skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// Which instructions the CPU backend uses.
    pub simd: Simd,
    /// Which blocks each stage holds.
    pub stages: Stages,
    /// Devices that share each stage's matrices.
    pub tensor_parallel: TensorParallel,
    /// Which blocks the devices of a stage share.
    pub split_blocks: SplitBlocks,
    /// Where the stages run.
    pub stages_run_in: StagesRunIn,
    /// Where the ranks of a stage run that has several devices.
    pub ranks: Ranks,
    /// Whether an FFN may be cut by its columns between neighbouring stages.
    pub column_cuts: ColumnCuts,
    /// Whether a pipeline may go through its devices twice.
    pub virtual_stages: VirtualStages,
    /// Whether stages are cut by what was measured on the device.
    pub profile: Profile,
    /// Most tokens in one micro-batch, prefill and decode together. `Auto`: [`MICRO_BATCH_TOKENS`], or fewer where that keeps
    /// several stages more even and a token takes hardly longer.
    pub micro_batch_tokens: AutoCount,
    /// Most sequences in flight in all replicas together. `Auto`: see [`Pipeline::most_sequences`].
    pub max_sequences: AutoCount,
    /// Tokens that the KV cache of one replica holds for all of its sequences together. `Auto`: as many as the memory has room for, and
    /// no more than [`Pipeline::most_sequences`] could use.
    pub kv_cache_tokens: AutoCount,
    /// Number type of the KV cache.
    pub kv_cache_dtype: KvCacheDtype,
    /// Whether a row's bits on a GPU are the same in any batch; CPUs always have them so.
    #[serde(deserialize_with = "read::flag")]
    pub deterministic: bool,
    /// Whether a GPU's decode steps are captured once and launched as a whole.
    #[serde(deserialize_with = "read::flag")]
    pub cuda_graphs: bool,
    /// Whether a GPU that is a pipeline of its own begins with a step before the tokens of the one before have come back.
    #[serde(deserialize_with = "read::flag")]
    pub token_feedback: bool,
    /// A stage that takes longer than this for one micro-batch is held to hang, and is started again.
    #[serde(deserialize_with = "read::positive")]
    pub step_timeout_seconds: usize,
}

impl Pipeline {
    /// Devices of one replica.
    pub fn devices_per_replica(&self) -> usize {
        self.devices.len() / self.replicas
    }

    /// The most that `micro_batch_tokens` can come to.
    pub fn most_micro_batch_tokens(&self) -> usize {
        match self.micro_batch_tokens {
            AutoCount::Auto => MICRO_BATCH_TOKENS,
            AutoCount::Given(tokens) => tokens,
        }
    }

    /// The most that `max_sequences` can come to on the job's devices: see [`Pipeline::sequences_on`].
    pub fn most_sequences(&self) -> usize {
        let are_gpus = self.devices.first().is_some_and(|device| device.kind == DeviceKind::Cuda);
        self.sequences_on(self.devices.len(), are_gpus)
    }

    /// The same on so many devices of all replicas: where the job leaves it to the program, [`CPU_SEQUENCES`] on CPUs, and on GPUs as
    /// many as decode in full micro-batches, of which a stage for each device has one and one is between them: where memory
    /// is short the KV cache limits them.
    pub fn sequences_on(&self, num_devices: usize, are_gpus: bool) -> usize {
        match self.max_sequences {
            AutoCount::Given(sequences) => sequences,
            AutoCount::Auto if are_gpus => {
                let in_flight = num_devices.saturating_add(self.replicas);
                self.most_micro_batch_tokens().saturating_mul(in_flight).min(MOST_SEQUENCES)
            }
            AutoCount::Auto => CPU_SEQUENCES,
        }
    }
}

impl Default for Pipeline {
    fn default() -> Self {
        Self {
            devices: vec![Device::cpu(0)],
            replicas: 1,
            threads: None,
            simd: Simd::Auto,
            stages: Stages::Auto,
            tensor_parallel: TensorParallel::Auto,
            split_blocks: SplitBlocks::Auto,
            stages_run_in: StagesRunIn::Threads,
            ranks: Ranks::Threads,
            column_cuts: ColumnCuts::Auto,
            virtual_stages: VirtualStages::Auto,
            profile: Profile::Auto,
            micro_batch_tokens: AutoCount::Auto,
            max_sequences: AutoCount::Auto,
            kv_cache_tokens: AutoCount::Auto,
            kv_cache_dtype: KvCacheDtype::Auto,
            deterministic: true, // A row's answer depends on the row alone, unless somebody gives that up.
            cuda_graphs: true,
            token_feedback: true,
            step_timeout_seconds: 600, // A micro-batch of a model that a CPU can hardly run takes a minute or two.
        }
    }
}

/// `[job]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Job {
    /// The rows, one JSON object a line. Required; absolute after [`crate::load`].
    #[serde(deserialize_with = "read::path", serialize_with = "path_as_text")]
    pub input: PathBuf,
    /// The folder for what the job writes. Required; absolute after [`crate::load`].
    #[serde(deserialize_with = "read::path", serialize_with = "path_as_text")]
    pub output: PathBuf,
    /// The order of the lines in `output.jsonl`.
    pub order: Order,
    /// Together with a row's content, the source of all chance in its completion.
    #[serde(deserialize_with = "read::seed")]
    pub seed: u64,
    /// The job stops once error lines are more than this share of the rows finished or in flight, 0 to 1.
    #[serde(deserialize_with = "read::share")]
    pub max_error_rate: f64,
    /// Every so many tokens of a row are kept, so that a run that goes on need not decode them again.
    #[serde(deserialize_with = "read::positive")]
    pub checkpoint_tokens: usize,
}

impl Default for Job {
    fn default() -> Self {
        Self {
            input: PathBuf::new(),
            output: PathBuf::new(),
            order: Order::default(),
            seed: 0,
            max_error_rate: 1.0,    // Bad rows are data, however many.
            checkpoint_tokens: 256, // A few seconds of decoding, and a thousand bytes for the journal.
        }
    }
}

/// `[prompt]`: minijinja templates over the fields of a plain row.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Prompt {
    /// The system message.
    #[serde(deserialize_with = "read::any_text", skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
    /// The user message. Required where there is a `[prompt]`.
    #[serde(deserialize_with = "read::text")]
    pub user: String,
}

/// `[sampling]`: what holds for a row that doesn't say. A key that is not set here either is taken from
/// the model's `generation_config.json`, and then from OpenAI's defaults.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sampling {
    /// Divides the logits, 0 to 2; 0 is greedy.
    #[serde(deserialize_with = "read::temperature", skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// Keep the smallest set of most likely tokens whose probabilities sum to at least this; above 0, up to 1.
    #[serde(deserialize_with = "read::positive_share", skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f64>,
    /// Keep this many most likely tokens; 0 keeps all.
    #[serde(deserialize_with = "read::top_k", skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    /// Drop tokens less likely than this share of the most likely one's probability, 0 to 1.
    #[serde(deserialize_with = "read::share", skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f64>,
    /// Divides the logits above 0 of tokens that stand in the prompt or were generated, and multiplies the others; 0.01 to 100.
    #[serde(deserialize_with = "read::repetition_penalty", skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f64>,
    /// Taken off a token's logit for each time that it was generated, -2 to 2.
    #[serde(deserialize_with = "read::penalty", skip_serializing_if = "Option::is_none")]
    pub frequency_penalty: Option<f64>,
    /// Taken off the logit of each token that was generated, -2 to 2.
    #[serde(deserialize_with = "read::penalty", skip_serializing_if = "Option::is_none")]
    pub presence_penalty: Option<f64>,
    /// Takes the place of the job's seed.
    #[serde(deserialize_with = "read::seed", skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Most tokens to generate.
    #[serde(deserialize_with = "read::small", skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
    /// Until this many tokens are generated, nothing but `max_tokens` ends the completion.
    #[serde(deserialize_with = "read::small", skip_serializing_if = "Option::is_none")]
    pub min_tokens: Option<u32>,
    /// Texts that end the completion; a single text may stand without its list.
    #[serde(deserialize_with = "read::texts", skip_serializing_if = "Option::is_none")]
    pub stop: Option<Vec<String>>,
    /// Tokens that end the completion, beside the model's own.
    #[serde(deserialize_with = "read::token_ids", skip_serializing_if = "Option::is_none")]
    pub stop_token_ids: Option<Vec<u32>>,
    /// Go on past the model's end-of-sequence tokens.
    #[serde(deserialize_with = "read::flag", skip_serializing_if = "Option::is_none")]
    pub ignore_eos: Option<bool>,
}

/// `[grade]`: plain rows have an `answer`, and perhaps a `kind`, by which scores are told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Grade {
    /// How the answer is found. Required where there is a `[grade]`.
    pub kind: Grader,
    /// Continuations of each row, whose mean is its score.
    #[serde(deserialize_with = "read::runs")]
    pub runs: u32,
}

impl Default for Grade {
    fn default() -> Self {
        Self { kind: Grader::default(), runs: 1 }
    }
}

/// `[plan]`: what is planned for, where it is not the input's rows on the pipeline's devices. `spanwise run` cuts
/// stages by its lengths.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Plan {
    /// Devices in the order of the pipeline, such as `8xh100-80gb`; those of `[pipeline]` when not set.
    #[serde(deserialize_with = "read::device_list", skip_serializing_if = "Option::is_none")]
    pub devices: Option<DeviceList>,
    /// Tokens of a prompt, on average; those of the input's rows when not set.
    #[serde(deserialize_with = "read::positive", skip_serializing_if = "Option::is_none")]
    pub prompt_tokens: Option<usize>,
    /// Tokens generated for a prompt, on average; each row's `max_tokens` when not set.
    #[serde(deserialize_with = "read::positive", skip_serializing_if = "Option::is_none")]
    pub output_tokens: Option<usize>,
    /// Tokens of KV cache that every stage has room for; what is fastest when not set.
    #[serde(deserialize_with = "read::positive", skip_serializing_if = "Option::is_none")]
    pub tokens_in_flight: Option<usize>,
    /// Rows of the job.
    #[serde(deserialize_with = "read::positive", skip_serializing_if = "Option::is_none")]
    pub rows: Option<usize>,
    /// What an hour of one device costs, in the place of the price in `devices.toml`.
    #[serde(deserialize_with = "read::price", skip_serializing_if = "Option::is_none")]
    pub price_per_hour: Option<f64>,
}

// A path that is no UTF-8 is shown with replacement characters rather than not at all.
fn path_as_text<S: Serializer>(path: &std::path::Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_have_as_many_sequences_as_decode_in_full_micro_batches_unless_the_job_says() {
        let gpu = |index| Device { kind: DeviceKind::Cuda, index };
        let gpus = Pipeline { devices: (0..8).map(gpu).collect(), ..Pipeline::default() };
        assert_eq!(gpus.most_sequences(), 9 * MICRO_BATCH_TOKENS);
        assert_eq!(Pipeline { replicas: 2, ..gpus.clone() }.most_sequences(), 2 * 5 * MICRO_BATCH_TOKENS);
        let small = AutoCount::Given(16);
        assert_eq!(Pipeline { micro_batch_tokens: small, ..gpus.clone() }.most_sequences(), 9 * 16);
        let large = AutoCount::Given(1 << 20);
        assert_eq!(Pipeline { micro_batch_tokens: large, ..gpus.clone() }.most_sequences(), MOST_SEQUENCES);
        assert_eq!(Pipeline { max_sequences: AutoCount::Given(7), ..gpus }.most_sequences(), 7);
        let cpus = Pipeline::default();
        assert_eq!(
            [cpus.most_sequences(), cpus.sequences_on(2, true)],
            [CPU_SEQUENCES, 3 * MICRO_BATCH_TOKENS]
        );
    }
}
