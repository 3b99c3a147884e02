//! What can go wrong on a device.

/// An operation's error, with the numbers.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An operand's shape is not what the operation needs.
    #[error("{op}: {operand} has shape {found:?}, expected {expected:?}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// Which operand.
        operand: &'static str,
        /// Its shape.
        found: Vec<usize>,
        /// The shape it should have.
        expected: Vec<usize>,
    },
    /// A value points outside what it indexes.
    #[error("{op}: {what} {value} is outside 0..{bound}")]
    OutOfRange {
        /// The operation.
        op: &'static str,
        /// What the value is.
        what: &'static str,
        /// The value.
        value: u64,
        /// One past the largest allowed value.
        bound: u64,
    },
    /// An operand is of another kind than the operation needs, as one of another device may be.
    #[error("{op}: {operand}'s {what} is {found}, expected {expected}")]
    Kind {
        /// The operation.
        op: &'static str,
        /// Which operand.
        operand: &'static str,
        /// What of it.
        what: &'static str,
        /// What that is.
        found: &'static str,
        /// What it should be.
        expected: &'static str,
    },
    /// This machine or this build cannot do what was asked.
    #[error("{0}")]
    Unsupported(String),
    /// The ranks of a stage could not do something together.
    #[error("{op} on rank {rank}: {message}")]
    Collective {
        /// The operation.
        op: &'static str,
        /// The rank whose error it is.
        rank: usize,
        /// What kept it.
        message: String,
    },
    /// There is no GPU that can be used here.
    #[error("{0}")]
    NoCuda(String),
    /// A GPU refused.
    #[error("cuda:{device}: {op}: {message}")]
    Cuda {
        /// Which GPU.
        device: usize,
        /// What was asked of it.
        op: &'static str,
        /// The driver's word.
        message: String,
    },
    /// A GPU has too little memory left.
    #[error("cuda:{device}: {what} takes {needed_bytes} bytes, and {free_bytes} are free")]
    OutOfMemory {
        /// Which GPU.
        device: usize,
        /// What it is for.
        what: &'static str,
        /// How much.
        needed_bytes: u64,
        /// How much there was.
        free_bytes: u64,
    },
    /// Another GPU of the stage has too little memory left, of which its ranks have told each other.
    #[error("rank {rank} has too little memory left")]
    NoRoomOnRank {
        /// Which rank.
        rank: usize,
    },
    /// A file could not be mapped.
    #[error("map {path}: {source}")]
    Map {
        /// The file.
        path: std::path::PathBuf,
        /// The system's word.
        source: std::io::Error,
    },
}

impl Error {
    /// Whether it says no more than that ranks did not come together, or that one lacks memory: another one is to blame.
    pub fn is_of_other_rank(&self) -> bool {
        matches!(self, Error::Collective { .. } | Error::NoRoomOnRank { .. })
    }

    /// Whether a device has no room for what it was asked, or another rank's has not, and might have for less.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, Error::OutOfMemory { .. } | Error::NoRoomOnRank { .. })
    }
}

/// This crate's result.
pub type Result<T> = std::result::Result<T, Error>;
