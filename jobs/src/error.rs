//! What can go wrong: with the job as a whole ([`Error`]), and with one row ([`RowError`]).
//!
//! The two are never mixed. A row's error is data: it becomes a line of the error file and the job
//! goes on. An [`Error`] ends the job before or while it runs.

use std::path::{Path, PathBuf};

/// The result of what concerns the whole job.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a job cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read.
    #[error("read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file could not be written.
    #[error("write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The output folder is not there and could not be made.
    #[error("cannot create the output folder {}", path.display())]
    CreateFolder {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file of the model directory does not hold what its name promises.
    #[error("{}: {message}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and where.
        message: String,
    },
    /// A named list of chat templates has none called `default`.
    #[error("{}: chat_template has no entry named default, only {}", path.display(), names.join(", "))]
    NoDefaultTemplate {
        /// The file.
        path: PathBuf,
        /// The names that are there.
        names: Vec<String>,
    },
    /// A key of the job file has a value that cannot be.
    #[error("{key}: {message}")]
    Setting {
        /// The key, with its section.
        key: String,
        /// What is wrong with its value.
        message: String,
    },
    /// The job asks for what the model directory does not offer.
    #[error("{key} needs {needed}, and the model {model} has none")]
    ModelLacks {
        /// What asks for it.
        key: String,
        /// The file or ability that is missing.
        needed: &'static str,
        /// The model directory's name.
        model: String,
    },
    /// The output folder holds lines that no journal speaks of.
    #[error(
        "{} exists, and no journal beside it says whose lines it holds; \
         pass --fresh to start over, or name another folder in [job] output",
        path.display()
    )]
    OutputExists {
        /// The file in the way.
        path: PathBuf,
    },
    /// The input is a file that the job itself writes.
    #[error(
        "[job] input: {} is {}, which the job writes; copy it to another place first",
        path.display(),
        own.display()
    )]
    InputIsOwn {
        /// As it was given.
        path: PathBuf,
        /// Where it is.
        own: PathBuf,
    },
    /// The input has no row, and earlier runs found some in it.
    #[error(
        "[job] input: {} has no rows, and the output folder has {lines} lines of earlier runs; \
         restore the input, or pass --fresh to throw them away",
        path.display()
    )]
    InputEmpty {
        /// The input.
        path: PathBuf,
        /// Lines that are there.
        lines: u64,
    },
    /// Another run works on the output folder.
    #[error("{} is in use by {holder}; wait for its end, or stop it", path.display())]
    FolderInUse {
        /// The folder.
        path: PathBuf,
        /// Who it is, as far as that is known.
        holder: String,
    },
    /// The lines in the output folder were made with other settings.
    #[error(
        "{} holds lines that were made otherwise:{changes}\n\
         set this back, pass --fresh to start over, or name another folder in [job] output",
        path.display()
    )]
    SettingsChanged {
        /// The folder.
        path: PathBuf,
        /// What is different, a line each.
        changes: String,
    },
    /// The lines in the output folder were computed in another way, and may differ in their last bits.
    #[error(
        "{} holds lines that were computed otherwise:{changes}\n\
         an answer may differ in a few tokens from the one it would have had; pass --accept-numerics to go on \
         all the same, set this back, or pass --fresh to start over",
        path.display()
    )]
    NumericsChanged {
        /// The folder.
        path: PathBuf,
        /// What is different, a line each.
        changes: String,
    },
    /// A file of lines has fewer bytes than were written to it.
    #[error(
        "{} has {found} bytes, and the journal vouches for {committed}; \
         restore it, or pass --fresh to start over",
        path.display()
    )]
    LinesMissing {
        /// The file.
        path: PathBuf,
        /// Its length.
        found: u64,
        /// What it should have at least.
        committed: u64,
    },
    /// Keys that memory does not hold could not be written beside it, or not read again.
    #[error("keep keys in a temporary file in {}", folder.display())]
    Spill {
        /// Where the file is; it has no name.
        folder: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// SQLite could not do what it was asked, such as for want of room.
    #[error("journal {}", path.display())]
    Journal {
        /// The file.
        path: PathBuf,
        /// What SQLite said.
        source: rusqlite::Error,
    },
    /// The journal is no journal any more.
    #[error(
        "the journal {} is damaged; restore it, pass --fresh to start over, or name another folder in [job] output",
        path.display()
    )]
    JournalDamaged {
        /// The file.
        path: PathBuf,
        /// What SQLite said.
        source: rusqlite::Error,
    },
}

impl Error {
    pub(crate) fn read(path: &Path, source: std::io::Error) -> Self {
        Error::Read { path: path.to_owned(), source }
    }

    pub(crate) fn write(path: &Path, source: std::io::Error) -> Self {
        Error::Write { path: path.to_owned(), source }
    }

    pub(crate) fn journal(path: &Path, source: rusqlite::Error) -> Self {
        use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};

        let path = path.to_owned();
        match source.sqlite_error_code() {
            // A query that does not fit the tables is the work of another hand, too.
            Some(DatabaseCorrupt | NotADatabase) => Error::JournalDamaged { path, source },
            None => Error::JournalDamaged { path, source },
            Some(_) => Error::Journal { path, source },
        }
    }

    pub(crate) fn malformed(path: &Path, message: impl ToString) -> Self {
        Error::Malformed { path: path.to_owned(), message: message.to_string() }
    }
}

/// Why one row has no answer: the message, and the words OpenAI's clients read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RowError {
    /// A word for programs, such as `unknown_parameter`.
    pub code: &'static str,
    /// The parameter at fault, as a path into the line.
    pub param: Option<String>,
    /// A sentence for people, with the values that matter.
    pub message: String,
}

impl RowError {
    /// An error that no single parameter is at fault for.
    pub fn new(code: &'static str, message: impl Into<String>) -> Self {
        RowError { code, param: None, message: message.into() }
    }

    /// An error of one parameter; the message begins with its name.
    pub fn of(param: impl Into<String>, code: &'static str, message: impl std::fmt::Display) -> Self {
        let param = param.into();
        RowError { code, message: format!("{param}: {message}"), param: Some(param) }
    }
}
