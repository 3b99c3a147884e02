//! What can be typed.

use std::num::NonZeroU64;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use configs::{Device, DeviceList};
use jobs::faults::Faults;

/// Turns a file of prompts into a file of completions, with language models whose blocks are not alike.
#[derive(Debug, Parser)]
#[command(name = "spanwise", version, max_term_width = 100, arg_required_else_help = true)]
pub(crate) struct Cli {
    /// A plan of faults, for tests of the program: see jobs/src/faults.rs
    #[arg(long, hide = true, value_name = "PLAN")]
    pub(crate) faults: Option<Faults>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a job, or resume it: every row of the input becomes a line of output.jsonl or errors.jsonl
    Run(RunArgs),
    /// Show the progress of a job, running or not, from its output folder
    Status(StatusArgs),
    /// Check that a result is complete: each row of the input has one line, and no line was changed
    Audit(AuditArgs),
    /// Run the failed rows of a job again
    Retry(RetryArgs),
    /// Answer one prompt, printed as it is generated
    Generate(GenerateArgs),
    /// Estimate the best placement of a model on devices, and the time a job takes; nothing is run
    Plan(PlanArgs),
    /// Simulate a job on the planned pipeline, to estimate its speed and where stages wait
    Simulate(SimulateArgs),
    /// Measure what a model's blocks cost on a device of this machine, for plans and for `run`
    Profile(ProfileArgs),
    /// Measure the prefill and decode throughput of a model on a device of this machine, by batch size
    Bench(BenchArgs),
    /// List the devices of this machine that a job can name, and why there is no GPU where there is none
    Devices(DevicesArgs),
    /// Show a model's blocks: attention, FFN, parameters, FLOPs and KV cache
    Inspect(InspectArgs),
    /// Be a rank of a stage: what a run starts by itself, and talks to by standard input and output
    #[command(hide = true)]
    Rank,
    /// Be a stage: what a run starts by itself, and talks to by standard input and output
    #[command(hide = true)]
    Stage,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Exit codes: 0 done (some rows may have failed: see errors.jsonl), 1 the job failed, \
                        2 bad job file, model or folder, 3 too many rows failed (a greater share than \
                        [job] max_error_rate, or all), 130 interrupted. After 1, 3 and 130, and after any crash, \
                        the same command resumes the job.\n\
                        Every key of the job file can be set by --set section.key=value and by \
                        SPANWISE__SECTION__KEY=value; docs/job_file.md lists them."
)]
pub(crate) struct RunArgs {
    /// The job file
    #[arg(value_name = "JOB.toml")]
    pub(crate) job: PathBuf,
    /// Override a key of the job file; a value that is not valid TOML is taken as a string
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub(crate) sets: Vec<String>,
    /// Run only the first N rows
    #[arg(long, value_name = "N")]
    pub(crate) limit: Option<u64>,
    /// Discard the results of earlier runs in the output folder, and start over
    #[arg(long)]
    pub(crate) fresh: bool,
    /// Resume although earlier lines were computed by another backend, SIMD level or tensor-parallel layout
    #[arg(long)]
    pub(crate) accept_numerics: bool,
    /// Progress display; auto is a bar on a terminal and plain lines elsewhere
    #[arg(long, value_enum, default_value_t = ProgressKind::Auto)]
    pub(crate) progress: ProgressKind,
    /// Write a trace of every step of every stage for ui.perfetto.dev (Chrome's format, 150 bytes a step)
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    /// The output folder of a job
    #[arg(value_name = "OUT")]
    pub(crate) output: PathBuf,
    /// Output format
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub(crate) format: Format,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Exit codes: 0 complete, 1 problems found, 2 nothing to audit. The model is not needed; input and \
                        result are read once, and nothing is changed."
)]
pub(crate) struct AuditArgs {
    /// The output folder of a job
    #[arg(value_name = "OUT")]
    pub(crate) output: PathBuf,
    /// Input to check against, such as a copy [default: the job's own]
    #[arg(long, value_name = "FILE")]
    pub(crate) input: Option<PathBuf>,
    /// List at most N problems, and count the others
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub(crate) most: usize,
    /// Output format
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub(crate) format: Format,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Runs the job as manifest.json records it, overrides included, on the input as it is now. \
                        Answers stay; a row that fails again gets an error line again. Exit codes are those of spanwise run."
)]
pub(crate) struct RetryArgs {
    /// The output folder of a job
    #[arg(value_name = "OUT")]
    pub(crate) output: PathBuf,
    /// Resume although earlier lines were computed by another backend, SIMD level or tensor-parallel layout
    #[arg(long)]
    pub(crate) accept_numerics: bool,
    /// Progress display; auto is a bar on a terminal and plain lines elsewhere
    #[arg(long, value_enum, default_value_t = ProgressKind::Auto)]
    pub(crate) progress: ProgressKind,
}

/// How progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ProgressKind {
    Auto,
    Bar,
    Plain,
    None,
}

#[derive(Debug, Args)]
pub(crate) struct GenerateArgs {
    /// The model's folder, as downloaded from Hugging Face
    #[arg(value_name = "MODEL_DIR")]
    pub(crate) model: PathBuf,
    /// The prompt: a user's message
    pub(crate) prompt: String,
    /// The system message, such as "detailed thinking on"
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// Continue the prompt as it is, without the chat template
    #[arg(long, conflicts_with = "system")]
    pub(crate) raw: bool,
    /// Most tokens to generate [default: what the context leaves]
    #[arg(long, value_name = "N")]
    pub(crate) max_tokens: Option<u32>,
    /// Sampling temperature from 0 to 2; 0 is greedy decoding
    #[arg(long, value_name = "T")]
    pub(crate) temperature: Option<f64>,
    /// Sample only from the most likely tokens whose probabilities sum to P
    #[arg(long, value_name = "P")]
    pub(crate) top_p: Option<f64>,
    /// Sample only from the K most likely tokens
    #[arg(long, value_name = "K")]
    pub(crate) top_k: Option<u32>,
    /// Drop tokens that are less likely than P times the most likely one
    #[arg(long, value_name = "P")]
    pub(crate) min_p: Option<f64>,
    /// Penalty on tokens of the prompt and the answer; 1 is none
    #[arg(long, value_name = "P")]
    pub(crate) repetition_penalty: Option<f64>,
    /// Penalty on tokens of the answer for each time that they were generated, -2 to 2
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub(crate) frequency_penalty: Option<f64>,
    /// Penalty on tokens that the answer already has, -2 to 2
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub(crate) presence_penalty: Option<f64>,
    /// Stop before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Vec<String>,
    /// Random seed
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// Number type of weights
    #[arg(long, value_name = "TYPE", value_enum, default_value_t = DtypeArg::Bf16)]
    pub(crate) dtype: DtypeArg,
    /// Longest prompt plus answer, in tokens [default: the model's limit]
    #[arg(long, value_name = "N")]
    pub(crate) max_context_tokens: Option<usize>,
    /// Threads [default: one for each core]
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<usize>,
}

/// `[model] dtype`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DtypeArg {
    Bf16,
    F32,
    Int8,
    Int8Weight,
    Int4Weight,
}

impl From<DtypeArg> for configs::Dtype {
    fn from(dtype: DtypeArg) -> Self {
        match dtype {
            DtypeArg::Bf16 => Self::Bf16,
            DtypeArg::F32 => Self::F32,
            DtypeArg::Int8 => Self::Int8,
            DtypeArg::Int8Weight => Self::Int8Weight,
            DtypeArg::Int4Weight => Self::Int4Weight,
        }
    }
}

#[derive(Debug, Args)]
#[command(after_help = "All figures are estimates by the devices' rooflines, except with --cost measured.\n\
                        Exit codes: 0 the plan fits, 2 it does not (the plan says how much memory is missing, and \
                        which change would fit), or bad job file, model or devices.")]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    pub(crate) setting: SettingArgs,
    /// What the stages balance; flops and weights are for comparison
    #[arg(long, value_enum, default_value_t = BalanceArg::Roofline)]
    pub(crate) cost: BalanceArg,
    /// Output format
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub(crate) format: Format,
    /// Also draw the plan, as SVG: time and memory of each stage, and of the even split
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
}

/// What plans are made for.
#[derive(Debug, Args)]
pub(crate) struct SettingArgs {
    /// The job file; `[job]` may be missing where `[plan]` gives both lengths
    #[arg(value_name = "JOB.toml")]
    pub(crate) job: PathBuf,
    /// Devices in pipeline order, such as 8xh200 or 4xh100-80gb,2xh200 [default: the job's]
    #[arg(long, value_name = "LIST")]
    pub(crate) devices: Option<DeviceList>,
    /// Device descriptions to use instead of the built-in ones (configs/devices.toml)
    #[arg(long, value_name = "FILE")]
    pub(crate) devices_file: Option<PathBuf>,
    /// Number type of weights [default: the job's]; with fp8 and fp4 the KV cache is fp8
    #[arg(long, value_name = "TYPE", value_enum)]
    pub(crate) dtype: Option<PlanDtype>,
    /// Distribution of output lengths around `[plan] output_tokens` [default: fixed (plan), exponential (simulate)]
    #[arg(long, value_enum)]
    pub(crate) lengths: Option<LengthsArg>,
    /// Tokenize only every N-th row of the input, which stands for those between
    #[arg(long, value_name = "N", default_value = "1")]
    pub(crate) sample: NonZeroU64,
    /// Override a key of the job file; a value that is not valid TOML is taken as a string
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub(crate) sets: Vec<String>,
}

#[derive(Debug, Args)]
#[command(
    after_help = "All figures are estimates: stages take the time of the devices' rooflines, or with --cost measured of a profile; \
                        the scheduler is the one that runs jobs. The same command gives the same output.\n\
                        Exit codes: 0 simulated, 2 the model does not fit, or bad job file, model or devices."
)]
pub(crate) struct SimulateArgs {
    #[command(flatten)]
    pub(crate) setting: SettingArgs,
    /// Simulate N rows [default: `[plan] rows`, or else four times the rows in flight]
    #[arg(long, value_name = "N")]
    pub(crate) rows: Option<u64>,
    /// Where times come from: the devices' rooflines, or what spanwise profile has measured on the job's devices
    #[arg(long, value_enum, default_value_t = TimesArg::Roofline)]
    pub(crate) cost: TimesArg,
    /// Random seed
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
    /// Output format
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub(crate) format: Format,
    /// Write a trace of every step of every stage for ui.perfetto.dev (Chrome's format, 150 bytes a step)
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,
    /// Also draw it, as SVG: what each stage does over time, with KV pages, sequences and tokens
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
}

/// `--cost` of a simulation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum TimesArg {
    Roofline,
    Measured,
}

/// `--lengths`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LengthsArg {
    /// Every output has the mean length
    Fixed,
    /// Geometric: every token is equally likely to be the last one
    Exponential,
    /// Log-normal with a sigma of 1: half of the rows are shorter than 0.61 of the mean, one in a hundred is 6 times
    /// as long
    Lognormal,
}

/// Number types that plans know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PlanDtype {
    F32,
    Bf16,
    Fp8,
    Fp4,
    Int8,
    Int8Weight,
    Int4Weight,
}

/// `--cost`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum BalanceArg {
    /// Time, by the devices' rooflines
    Roofline,
    /// FLOPs of a decode token
    Flops,
    /// Bytes of weights
    Weights,
    /// Time, by what spanwise profile has measured on this machine
    Measured,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Run it on an idle machine: other load makes the device seem slower. The profile is kept in \
                        $SPANWISE_PROFILES, $XDG_CACHE_HOME/spanwise/profiles or ~/.cache/spanwise/profiles."
)]
pub(crate) struct ProfileArgs {
    #[command(flatten)]
    pub(crate) target: TargetArgs,
    /// Longest context to measure, in tokens [default: the model's limit]
    #[arg(long, value_name = "N", value_parser = positive)]
    pub(crate) max_context_tokens: Option<usize>,
    /// Seconds to measure each point, once alone and once with all devices busy [default: 0.15]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub(crate) point_seconds: Option<f64>,
    /// Output format
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub(crate) format: Format,
}

/// What is measured.
#[derive(Debug, Args)]
pub(crate) struct TargetArgs {
    /// A model's folder, a config.json alone (measured with random weights), or a job file, whose devices are measured
    #[arg(value_name = "MODEL_DIR|config.json|JOB.toml")]
    pub(crate) path: PathBuf,
    /// Device to measure [default: cpu:0]
    #[arg(long, value_name = "DEVICE")]
    pub(crate) device: Option<Device>,
    /// Threads per device; the machine is split into cores / N equal devices [default: one device of all cores]
    #[arg(long, value_name = "N", value_parser = positive)]
    pub(crate) threads: Option<usize>,
    /// Number type of weights [default: bf16]
    #[arg(long, value_name = "TYPE", value_enum)]
    pub(crate) dtype: Option<DtypeArg>,
    /// Largest micro-batch, in tokens [default: 512; on a GPU profile measures up to 4096]
    #[arg(long, value_name = "N", value_parser = positive)]
    pub(crate) micro_batch_tokens: Option<usize>,
    /// Override a key of the job file; a value that is not valid TOML is taken as a string
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub(crate) sets: Vec<String>,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Run it on an idle machine. Percentages are of the roofline: the device's peak of matrix products and its memory \
                        bandwidth, both measured in the same run. Ctrl-C ends it at once, and keeps the lines that \
                        were printed."
)]
pub(crate) struct BenchArgs {
    #[command(flatten)]
    pub(crate) target: TargetArgs,
    /// Prompt length for prefill, and context length for decode [default: 256, or the model's limit if lower]
    #[arg(long, value_name = "N", value_parser = positive)]
    pub(crate) context_tokens: Option<usize>,
    /// Batch sizes, in rows
    #[arg(long, value_name = "N,...", value_delimiter = ',', value_parser = positive,
          default_value = "1,2,4,8,16,32,64,128,256")]
    pub(crate) batches: Vec<usize>,
    /// Seconds to measure each distinct micro-batch [default: 0.15]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub(crate) point_seconds: Option<f64>,
    /// Output format
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub(crate) format: Format,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// A model's folder, or a config.json alone
    #[arg(value_name = "MODEL_DIR|config.json")]
    pub(crate) model: PathBuf,
    /// Output format
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub(crate) format: Format,
    /// Also draw the model, as SVG: each block's attention and FFN, to scale
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct DevicesArgs {
    /// Output format
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub(crate) format: Format,
}

/// How something is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Text,
    Json,
}

fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if number > 0 => Ok(number),
        _ => Err("expected a whole number above 0".to_owned()),
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if seconds > 0.0 && f64::is_finite(seconds) => Ok(seconds),
        _ => Err("expected a number of seconds above 0".to_owned()),
    }
}
