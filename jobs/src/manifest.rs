//! `manifest.json`: what a job was and what came of it, beside its output.
//!
//! Figures that may differ between two runs of the same job (times, speed, hosts) live here and never
//! in an output line.

use std::fs::File;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize, Serializer};

use crate::disk;
use crate::error::{Error, Result};
use crate::grade::Scores;

/// The whole file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the program that wrote it.
    pub version: String,
    /// How the job ended.
    pub status: Status,
    /// Which model answered.
    pub model: ModelRecord,
    /// Which rows were read.
    pub input: InputRecord,
    /// How many rows were to be read, where not all were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u64>,
    /// The job's settings with all defaults, as they took effect.
    pub config: serde_json::Value,
    /// Which blocks ran where.
    pub plan: serde_json::Value,
    /// What each stage has done, in this run alone.
    #[serde(default)]
    pub stages: Vec<StageRecord>,
    /// The pipelines that failed for good while others went on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failed_replicas: Vec<FailedReplica>,
    /// What a row's bytes depend on beside the row, the model and the seed.
    pub numeric_profile: NumericProfile,
    /// Rows by outcome.
    pub counts: Counts,
    /// Tokens in all.
    pub tokens: TokenTotals,
    /// How well the rows were answered, where the job grades them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scores: Option<Scores>,
    /// When, and for how long.
    pub timings: Timings,
}

/// How a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Every row of the input has its line, up to a limit where there was one.
    Complete,
    /// Stopped by its user; the lines that are there are whole.
    Interrupted,
    /// Stopped by an error; the lines that are there are whole.
    Failed,
}

/// Which model answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelRecord {
    /// Directory it was read from.
    #[serde(serialize_with = "path_as_text")]
    pub path: PathBuf,
    /// Identity of its content, which two copies of a model share.
    pub identity: String,
}

/// Which rows were read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputRecord {
    /// The file.
    #[serde(serialize_with = "path_as_text")]
    pub path: PathBuf,
    /// BLAKE3 of the bytes that were read, in hex: the whole file, unless a limit ended the reading.
    pub blake3: String,
    /// How many bytes those are.
    pub bytes: u64,
    /// How many rows.
    pub rows: u64,
}

/// A pipeline that failed for good while others went on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedReplica {
    /// Which one, from 0.
    pub replica: usize,
    /// Why.
    pub error: String,
}

/// What one stage has done. The seconds of its six parts sum up to those of the run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageRecord {
    /// The pipeline that it is of, from 0.
    #[serde(default)]
    pub replica: usize,
    /// Its device, as the job file names it.
    pub device: String,
    /// Its blocks, `[start, end)`.
    pub blocks: [usize; 2],
    /// It computed.
    pub busy_seconds: f64,
    /// It waited while other stages were at work.
    pub starved_seconds: f64,
    /// It handed on what it had computed.
    pub blocked_seconds: f64,
    /// It waited while fewer micro-batches were in flight than the pipeline takes, for want of KV pages.
    pub kv_limited_seconds: f64,
    /// It waited while fewer micro-batches were in flight than the pipeline takes, and no row was left.
    pub tail_seconds: f64,
    /// Nothing was in flight, or the stage was being started again.
    pub idle_seconds: f64,
    /// What it should have been busy by the costs that the stages were cut by.
    pub predicted_seconds: Option<f64>,
    /// Where its first block's FFN is shared with the stage before: its first column of it, else 0.
    pub first_column: usize,
    /// Where its last block's FFN is shared with the next stage: the end of its columns.
    pub end_column: Option<usize>,
    /// Devices that share it.
    pub ranks: usize,
    /// Time that its first rank spent in collectives, waiting for others counted.
    pub collective_seconds: f64,
    /// Bytes of the arrays that these were about.
    pub collective_bytes: u64,
    /// The same of each rank, where there are several.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rank_collectives: Vec<RankRecord>,
    /// Bytes that it has handed on to the next stage.
    pub hop_bytes: u64,
    /// Time that these were on their way, one micro-batch after the other.
    #[serde(default)]
    pub hop_seconds: f64,
    /// Micro-batches that it computed.
    pub micro_batches: u64,
    /// Tokens of these.
    pub tokens: u64,
    /// How often it had to be started again.
    pub restarts: u64,
}

/// What a rank of a stage has spent in collectives.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RankRecord {
    /// Its device, as the job file names it.
    pub device: String,
    /// How many there were.
    pub collectives: u64,
    /// Time in them, waiting for others counted.
    pub collective_seconds: f64,
    /// Bytes of the arrays that they were about.
    pub collective_bytes: u64,
}

/// What a row's bytes depend on beside the row, the model and the seed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NumericProfile {
    /// Whose operations computed it, such as `cpu` or `reference`.
    pub backend: String,
    /// The processor's vector instructions that were used, such as `avx512`.
    pub simd: String,
    /// Number format of the weights.
    pub dtype: String,
    /// Number format of the KV cache.
    pub kv_cache_dtype: String,
    /// Most devices that share one stage.
    pub tensor_parallel: u32,
    /// The stages that several devices share, where there are any: where each begins and ends, and how many they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tensor_parallel_stages: Option<String>,
    /// Whether a row has the same bits in any batch.
    #[serde(default = "is_deterministic")]
    pub deterministic: bool,
}

/// What was true before there was a choice.
fn is_deterministic() -> bool {
    true
}

/// Rows by outcome.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Rows of the input that were read.
    pub total: u64,
    /// Lines in `output.jsonl`.
    pub completed: u64,
    /// Lines in `errors.jsonl`.
    pub failed: u64,
    /// Rows of these that earlier runs had finished.
    pub resumed: u64,
    /// Lines that this run has moved to `stale.jsonl`: their rows have left the input.
    pub stale: u64,
}

/// Tokens in all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenTotals {
    /// Tokens of the prompts that were answered.
    pub prompt: u64,
    /// Tokens generated.
    pub generated: u64,
}

/// When, and for how long.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Timings {
    /// When the job began, in Unix seconds.
    pub started_at: u64,
    /// When it ended, in Unix seconds.
    pub finished_at: u64,
    /// Seconds to load the model.
    pub load_seconds: f64,
    /// Seconds from the first row to the last line.
    pub run_seconds: f64,
    /// Seconds of these that scheduling and stop strings took, between the last stage and the first.
    #[serde(default)]
    pub scheduling_seconds: f64,
    /// CPU seconds of the thread that reads, renders and tokenizes rows.
    #[serde(default)]
    pub reader_cpu_seconds: f64,
    /// CPU seconds of the thread that detokenizes answers and writes lines.
    #[serde(default)]
    pub writer_cpu_seconds: f64,
}

// A path that is no UTF-8 is shown with replacement characters rather than not at all.
fn path_as_text<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

impl Manifest {
    /// The file's name in the output folder.
    pub const FILE_NAME: &str = "manifest.json";

    /// Writes the manifest of an output folder: a reader sees the old one or the new one, whole.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join(Self::FILE_NAME);
        let temporary = folder.join(".manifest.json.new");
        let mut json = serde_json::to_string_pretty(self).expect("a manifest is JSON");
        json.push('\n');
        let mut file = File::create(&temporary).map_err(|source| Error::write(&path, source))?;
        disk::append(&path, &mut file, json.as_bytes())?;
        disk::sync(&path, &file)?;
        disk::rename(&temporary, &path)
    }

    /// Reads the manifest of an output folder, where a run has ended there.
    ///
    /// # Errors
    /// A folder that is not there, or a manifest that cannot be read.
    pub fn find(folder: &Path) -> Result<Option<Manifest>> {
        match folder.join(Self::FILE_NAME).exists() {
            true => Manifest::read(folder).map(Some),
            false if !folder.is_dir() => Err(Error::malformed(folder, "there is no such folder")),
            false => Ok(None),
        }
    }

    /// Reads the manifest of an output folder.
    pub fn read(folder: &Path) -> Result<Manifest> {
        let path = folder.join(Self::FILE_NAME);
        let bytes = std::fs::read(&path).map_err(|source| Error::read(&path, source))?;
        serde_json::from_slice(&bytes).map_err(|error| Error::malformed(&path, error))
    }
}
