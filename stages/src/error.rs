//! What can be wrong with a model directory.

use std::path::PathBuf;

/// An error that names the file, and the key or tensor in it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read.
    #[error("read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's word.
        source: std::io::Error,
    },
    /// A file could not be written.
    #[error("write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's word.
        source: std::io::Error,
    },
    /// A file is not JSON, or not the JSON it should be.
    #[error("{path}: {message}")]
    Json {
        /// The file.
        path: PathBuf,
        /// What was found and expected.
        message: String,
    },
    /// A key of `config.json` has a value that cannot be used.
    #[error("{path}: {key}: found {found}, expected {expected}")]
    Config {
        /// The file.
        path: PathBuf,
        /// The key, with the block's index where it belongs to one.
        key: String,
        /// The value found.
        found: String,
        /// What would have been right.
        expected: String,
    },
    /// A safetensors file is damaged.
    #[error("{path}: {message}")]
    Shard {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// The tensors of the checkpoint are not those of `config.json`.
    #[error("{path}: {}", .problems.join("\n  "))]
    Tensors {
        /// The model directory.
        path: PathBuf,
        /// Each misfit, with names and shapes.
        problems: Vec<String>,
    },
    /// The model has no weights to load.
    #[error(
        "{path}: found neither model.safetensors nor model.safetensors.index.json\n\
         hint: a job file may have random ones made from config.json alone, by [model] random_weights = true"
    )]
    NoWeights {
        /// The model directory.
        path: PathBuf,
    },
    /// A part of the model is too large to be measured here.
    #[error("{what} takes {needed_bytes} bytes on each device, and {free_bytes} of memory are free for it")]
    TooLargeToMeasure {
        /// Which part.
        what: String,
        /// Its weights.
        needed_bytes: u64,
        /// What there is for it.
        free_bytes: u64,
    },
    /// A rank of a stage beside the first has failed.
    #[error("rank {rank}: {message}")]
    Rank {
        /// Which, from 0.
        rank: usize,
        /// What it said, or what others saw of it.
        message: String,
    },
    /// A device has no room for the smallest step there is.
    #[error(
        "a step of one token: {0}, with all given back that larger steps had\n\
         hint: another program has taken memory of {gpu} since the model was loaded",
        gpu = short_gpu(.0)
    )]
    NoRoomForOneToken(kernels::Error),
    /// A device refused.
    #[error(transparent)]
    Device(#[from] kernels::Error),
}

impl Error {
    /// What a device's lack of room means where nothing smaller can be asked of it.
    pub(crate) fn of_one_token(self) -> Error {
        match self {
            Error::Device(error) if error.is_out_of_memory() => Error::NoRoomForOneToken(error),
            other => other,
        }
    }

    /// Whether a device of the stage has no room for what it was asked, and might have for less.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, Error::Device(error) if error.is_out_of_memory())
    }

    /// Whether it says no more than what became of another rank.
    pub fn is_of_other_rank(&self) -> bool {
        matches!(self, Error::Device(error) | Error::NoRoomForOneToken(error) if error.is_of_other_rank())
    }

    /// The rank that has no room, where it is another one's.
    pub fn rank_without_room(&self) -> Option<usize> {
        match self {
            Error::Device(kernels::Error::NoRoomOnRank { rank })
            | Error::NoRoomForOneToken(kernels::Error::NoRoomOnRank { rank }) => Some(*rank),
            _ => None,
        }
    }
}

/// Whose memory was too little.
fn short_gpu(error: &kernels::Error) -> String {
    match error {
        kernels::Error::NoRoomOnRank { rank } => format!("rank {rank}'s GPU"),
        _ => "this GPU".to_owned(),
    }
}

/// This crate's result.
pub type Result<T> = std::result::Result<T, Error>;
