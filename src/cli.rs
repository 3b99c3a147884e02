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
    /// Run a job, or go on with it: every row of its input becomes a line of output.jsonl or of errors.jsonl
    Run(RunArgs),
    /// Show how far a job is, running or not, from its output folder
    Status(StatusArgs),
    /// Prove a result complete: each row of the input has one line, and no line was changed
    Audit(AuditArgs),
    /// Run once more the rows of a job that failed
    Retry(RetryArgs),
    /// Answer one prompt on the terminal, as it is generated
    Generate(GenerateArgs),
    /// Estimate the best placement of a model on devices, and what a job on it takes; nothing is started
    Plan(PlanArgs),
    /// Play a job on a plan's pipeline under a virtual clock: an estimate of its speed, and of where stages wait
    Simulate(SimulateArgs),
    /// Measure what a model's blocks cost on a device of this machine, for plans and for `run`
    Profile(ProfileArgs),
    /// Measure how many tokens a second a model prefills and decodes on a device of this machine, by batch size
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
#[command(after_help = "Exit codes: 0 done (rows may have failed: see errors.jsonl), 1 the job failed, \
                        2 bad job file, model or folder, 3 more errors than [job] max_error_rate, \
                        130 interrupted. After 1, 3 and 130, and after any crash, the same command goes on \
                        where the job was.\n\
                        Every key of the job file can be set by --set section.key=value and by \
                        SPANWISE__SECTION__KEY=value; docs/job_file.md lists them.")]
pub(crate) struct RunArgs {
    /// The job file
    #[arg(value_name = "JOB.toml")]
    pub(crate) job: PathBuf,
    /// Override a key of the job file; a value that is not TOML is taken as a text
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub(crate) sets: Vec<String>,
    /// Run the first N rows only
    #[arg(long, value_name = "N")]
    pub(crate) limit: Option<u64>,
    /// Throw away what an earlier run left in the output folder
    #[arg(long)]
    pub(crate) fresh: bool,
    /// Go on with a job whose lines were computed by another backend or on another SIMD level
    #[arg(long)]
    pub(crate) accept_numerics: bool,
    /// How to show progress; auto is a bar on a terminal and plain lines elsewhere
    #[arg(long, value_enum, default_value_t = ProgressKind::Auto)]
    pub(crate) progress: ProgressKind,
    /// Write every step of every stage in Chrome's trace format, for ui.perfetto.dev; some 150 bytes each
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    /// The output folder of a job
    #[arg(value_name = "OUT")]
    pub(crate) output: PathBuf,
    /// Lines to read, or JSON for programs
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub(crate) format: Format,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Exit codes: 0 complete, 1 something is wrong, 2 there is nothing to audit. The model is not \
                        needed; input and result are read once, and nothing is changed."
)]
pub(crate) struct AuditArgs {
    /// The output folder of a job
    #[arg(value_name = "OUT")]
    pub(crate) output: PathBuf,
    /// The rows that must have a line; the job's own input if not given
    #[arg(long, value_name = "FILE")]
    pub(crate) input: Option<PathBuf>,
    /// Name so many things that are wrong, and count the others
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub(crate) most: usize,
    /// Lines to read, or JSON for programs
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub(crate) format: Format,
}

#[derive(Debug, Args)]
#[command(
    after_help = "The job is the one that manifest.json records, overrides included, over the input as it is now. \
                        A row that fails again has its error line again. Exit codes are those of spanwise run."
)]
pub(crate) struct RetryArgs {
    /// The output folder of a job
    #[arg(value_name = "OUT")]
    pub(crate) output: PathBuf,
    /// Go on with a job whose lines were computed by another backend or on another SIMD level
    #[arg(long)]
    pub(crate) accept_numerics: bool,
    /// How to show progress; auto is a bar on a terminal and plain lines elsewhere
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
    /// The model's folder, as it comes from Hugging Face
    #[arg(value_name = "MODEL_DIR")]
    pub(crate) model: PathBuf,
    /// What to answer
    pub(crate) prompt: String,
    /// The system message, such as "detailed thinking on"
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// Continue the prompt as it is, without the chat template
    #[arg(long, conflicts_with = "system")]
    pub(crate) raw: bool,
    /// Most tokens to generate; what the context leaves if not given
    #[arg(long, value_name = "N")]
    pub(crate) max_tokens: Option<u32>,
    /// Divides the logits; 0 is greedy
    #[arg(long, value_name = "T")]
    pub(crate) temperature: Option<f64>,
    /// Keep the most likely tokens whose probabilities sum to P
    #[arg(long, value_name = "P")]
    pub(crate) top_p: Option<f64>,
    /// Keep the K most likely tokens
    #[arg(long, value_name = "K")]
    pub(crate) top_k: Option<u32>,
    /// Drop tokens less likely than this share of the most likely one
    #[arg(long, value_name = "P")]
    pub(crate) min_p: Option<f64>,
    /// Make tokens of the prompt and the answer less likely; 1 changes nothing
    #[arg(long, value_name = "P")]
    pub(crate) repetition_penalty: Option<f64>,
    /// Make tokens of the answer less likely by the number of times that they were generated, -2 to 2
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub(crate) frequency_penalty: Option<f64>,
    /// Make tokens of the answer less likely, -2 to 2
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub(crate) presence_penalty: Option<f64>,
    /// End before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Vec<String>,
    /// Source of chance
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// Number type of weights
    #[arg(long, value_name = "TYPE", value_enum, default_value_t = DtypeArg::Bf16)]
    pub(crate) dtype: DtypeArg,
    /// Longest prompt plus completion; the model's own limit if not given
    #[arg(long, value_name = "N")]
    pub(crate) max_context_tokens: Option<usize>,
    /// Threads; all cores if not given
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
#[command(after_help = "All figures are estimates by devices' rooflines, but with --cost measured.\n\
                        Exit codes: 0 the plan fits, 2 it does not (the plan says what is missing, and the nearest \
                        that fits), or bad job file, model or devices.")]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    pub(crate) setting: SettingArgs,
    /// What is balanced: time by the roofline, or FLOPs of a decode token or weights alone, for comparison
    #[arg(long, value_enum, default_value_t = BalanceArg::Roofline)]
    pub(crate) cost: BalanceArg,
    /// A table to read, or JSON for programs
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub(crate) format: Format,
    /// Draw the plan too: each stage's time and memory, and the even split beneath
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
}

/// What plans are made for.
#[derive(Debug, Args)]
pub(crate) struct SettingArgs {
    /// The job file; with the lengths of `[plan]` it may lack its `[job]`
    #[arg(value_name = "JOB.toml")]
    pub(crate) job: PathBuf,
    /// Devices in the order of the pipeline, such as 8xh200 or 4xh100-80gb,2xh200
    #[arg(long, value_name = "LIST")]
    pub(crate) devices: Option<DeviceList>,
    /// A file to read in the place of the devices that are shipped, configs/devices.toml
    #[arg(long, value_name = "FILE")]
    pub(crate) devices_file: Option<PathBuf>,
    /// Number type of weights; keys and values are fp8 beside fp8 and fp4
    #[arg(long, value_name = "TYPE", value_enum)]
    pub(crate) dtype: Option<PlanDtype>,
    /// How output lengths are spread around `[plan] output_tokens`; plan takes fixed if not given, simulate exponential
    #[arg(long, value_enum)]
    pub(crate) lengths: Option<LengthsArg>,
    /// Tokenize each N-th row of the input only, which stands for those between; all lines are read
    #[arg(long, value_name = "N", default_value = "1")]
    pub(crate) sample: NonZeroU64,
    /// Override a key of the job file; a value that is not TOML is taken as a text
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub(crate) sets: Vec<String>,
}

#[derive(Debug, Args)]
#[command(
    after_help = "All figures are estimates: the stages' times are the devices' rooflines, or with --cost measured a profile's, the scheduler is \
                        the one that runs jobs. The same command gives the same bytes.\n\
                        Exit codes: 0 played, 2 the model does not fit, or bad job file, model or devices."
)]
pub(crate) struct SimulateArgs {
    #[command(flatten)]
    pub(crate) setting: SettingArgs,
    /// Play so many rows; `[plan] rows` if not given, or else four times those in flight
    #[arg(long, value_name = "N")]
    pub(crate) rows: Option<u64>,
    /// Where times come from: the devices' rooflines, or what was measured on those of the job
    #[arg(long, value_enum, default_value_t = TimesArg::Roofline)]
    pub(crate) cost: TimesArg,
    /// Source of chance
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
    /// A table to read, or JSON for programs
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub(crate) format: Format,
    /// Write every step of every stage in Chrome's trace format, for ui.perfetto.dev; some 150 bytes each
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,
    /// Draw it too: what each stage does over time, and the KV pages, sequences and tokens beneath
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
    /// All of the mean length
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
    Roofline,
    Flops,
    Weights,
    /// Time by the profile of this machine's devices: see spanwise profile
    Measured,
}

#[derive(Debug, Args)]
#[command(
    after_help = "With nothing else running: what others take is taken for the device's own. The profile is kept in \
                        $SPANWISE_PROFILES, $XDG_CACHE_HOME/spanwise/profiles or ~/.cache/spanwise/profiles."
)]
pub(crate) struct ProfileArgs {
    #[command(flatten)]
    pub(crate) target: TargetArgs,
    /// Longest context; the model's own limit if not given
    #[arg(long, value_name = "N", value_parser = positive)]
    pub(crate) max_context_tokens: Option<usize>,
    /// Time for each point, alone and beside busy neighbours each
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub(crate) point_seconds: Option<f64>,
    /// A table to read, or JSON for programs
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub(crate) format: Format,
}

/// What is measured.
#[derive(Debug, Args)]
pub(crate) struct TargetArgs {
    /// A model's folder, a config.json alone (random weights of its shapes), or a job file, whose devices are measured
    #[arg(value_name = "MODEL_DIR|config.json|JOB.toml")]
    pub(crate) path: PathBuf,
    /// The device
    #[arg(long, value_name = "DEVICE")]
    pub(crate) device: Option<Device>,
    /// Threads of a device, of which there are as many as the cores have room for; one device of all cores if not given
    #[arg(long, value_name = "N", value_parser = positive)]
    pub(crate) threads: Option<usize>,
    /// Number type of weights
    #[arg(long, value_name = "TYPE", value_enum)]
    pub(crate) dtype: Option<DtypeArg>,
    /// Largest micro-batch; 512 if not given
    #[arg(long, value_name = "N", value_parser = positive)]
    pub(crate) micro_batch_tokens: Option<usize>,
    /// Override a key of the job file; a value that is not TOML is taken as a text
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub(crate) sets: Vec<String>,
}

#[derive(Debug, Args)]
#[command(
    after_help = "With nothing else running. A share is of the roofline that the device's peak of products and its memory \
                        bandwidth make, both measured in the same run. Ctrl-C ends it at once; a table has then the \
                        batches that were measured."
)]
pub(crate) struct BenchArgs {
    #[command(flatten)]
    pub(crate) target: TargetArgs,
    /// Tokens of each prompt, and positions that each row attends to which decodes; 256 if not given, or the
    /// longest context
    #[arg(long, value_name = "N", value_parser = positive)]
    pub(crate) context_tokens: Option<usize>,
    /// Rows of the batches
    #[arg(long, value_name = "N,...", value_delimiter = ',', value_parser = positive,
          default_value = "1,2,4,8,16,32,64,128,256")]
    pub(crate) batches: Vec<usize>,
    /// Time for each distinct micro-batch
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub(crate) point_seconds: Option<f64>,
    /// A table to read, or JSON for programs
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub(crate) format: Format,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// A model's folder, or a config.json alone
    #[arg(value_name = "MODEL_DIR|config.json")]
    pub(crate) model: PathBuf,
    /// A table to read, or JSON for programs
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub(crate) format: Format,
    /// Draw the model too: each block's attention and FFN, to scale
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct DevicesArgs {
    /// How to print
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
