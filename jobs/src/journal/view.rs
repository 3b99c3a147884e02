//! The journal as others see it: beside a job that runs, after one that ended, in a folder that may only
//! be read. Nothing that it says is changed (SQLite may fold its log into it), and the folder's lock is not asked for.

use std::path::{Path, PathBuf};

use rusqlite::{Connection, ErrorCode, OpenFlags};

use super::{BUSY_TIMEOUT, COMPANIONS, Entry, FILE_NAME, FinishedRows, Journal, Progress, Selection};
use crate::error::{Error, Result};
use crate::line::LineFile;
use crate::settings::Settings;

/// The journal at one moment. As long as somebody looks at it, what a running job commits piles up in
/// SQLite's log beside it.
pub struct JournalView {
    journal: Journal,
}

impl JournalView {
    /// Opens the journal of a folder, where there is one.
    pub fn open(folder: &Path) -> Result<Option<JournalView>> {
        let path = folder.join(FILE_NAME);
        if !path.exists() {
            return Ok(None);
        }
        let db = connect(folder, &path)?;
        let journal = Journal::of(path, db);
        if !journal.has_tables()? {
            return Ok(None);
        }
        let mut view = JournalView { journal };
        // The first question that is asked inside fixes the moment for all others.
        view.journal.sql(|db| db.execute_batch("BEGIN"))?;
        view.journal.next_seq = view.journal.read_next_seq()?;
        Ok(Some(view))
    }

    /// Opens the journal of a folder that holds a job.
    ///
    /// # Errors
    /// A folder that is not there, or holds none.
    pub fn of_job(folder: &Path) -> Result<JournalView> {
        match JournalView::open(folder)? {
            Some(view) => Ok(view),
            None if !folder.is_dir() => Err(Error::malformed(folder, "there is no such folder")),
            None => Err(Error::malformed(folder, "holds no job: there is no journal.sqlite")),
        }
    }

    /// What the job is.
    pub fn settings(&self) -> Result<Settings> {
        self.journal.settings()
    }

    /// When the job's first run began, in Unix seconds.
    pub fn unix_seconds(&self) -> Result<u64> {
        self.journal.unix_seconds()
    }

    /// How far the job is.
    pub fn progress(&self) -> Result<Progress> {
        self.journal.progress()
    }

    /// Bytes of a file that count.
    pub fn length(&self, file: LineFile) -> Result<u64> {
        Ok(self.journal.lengths()?[file.index()])
    }

    /// Files that a rewritten one beside them is to replace, and of which the journal speaks as if it had.
    pub fn replaced(&self) -> Result<Vec<LineFile>> {
        self.journal.replaced()
    }

    /// Every line that counts, by the key of its row; what memory does not hold lies in the system's
    /// folder for temporary files.
    pub fn finished(&self) -> Result<FinishedRows> {
        let (finished, _) = FinishedRows::load(&self.journal, &std::env::temp_dir(), None)?;
        Ok(finished)
    }

    /// Shows every line that counts, as the lines stand in their files.
    pub fn for_each_entry(&self, mut visit: impl FnMut(&Entry) -> Result<()>) -> Result<()> {
        self.journal.walk(&[Selection::All], |walked| visit(&walked.entry))
    }
}

fn connect(folder: &Path, path: &Path) -> Result<Connection> {
    let error = |source| Error::journal(path, source);
    let open = |name: &Path, flags: OpenFlags| {
        let db = Connection::open_with_flags(name, flags | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
        db.busy_timeout(BUSY_TIMEOUT)?;
        // Who may write opens for writing, for SQLite shares its log through a file; nothing is written
        // to the tables. Otherwise a look would leave such files behind.
        db.pragma_update(None, "query_only", true)?;
        db.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(()))?;
        Ok(db)
    };
    match open(path, OpenFlags::SQLITE_OPEN_READ_WRITE) {
        Err(source) if is_for_want_of_leave(&source) && !has_log(folder) => {
            // Nobody can write here, and all there is stands in the one file.
            let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI;
            open(&immutable(path), flags).map_err(error)
        }
        Err(source) if is_for_want_of_leave(&source) => {
            let message = "its log was left by a run that died, and this folder may not be written; \
                copy the folder to where it may";
            Err(Error::malformed(path, message))
        }
        opened => opened.map_err(error),
    }
}

fn is_for_want_of_leave(error: &rusqlite::Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::CannotOpen | ErrorCode::ReadOnly))
}

fn has_log(folder: &Path) -> bool {
    std::fs::metadata(folder.join(COMPANIONS[0])).is_ok_and(|log| log.len() > 0)
}

/// The file as a URI that tells SQLite that it does not change.
fn immutable(path: &Path) -> PathBuf {
    let escaped = path.as_os_str().as_encoded_bytes().iter().map(|&byte| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b'-' | b'_' => char::from(byte).to_string(),
        _ => format!("%{byte:02x}"),
    });
    PathBuf::from(format!("file:{}?immutable=1", escaped.collect::<String>()))
}
