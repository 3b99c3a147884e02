//! The journal: which rows have their line, and where it lies.
//!
//! A SQLite file in the output folder. It vouches for the first bytes of each file of lines; what lies
//! beyond them was never committed and is cut off. Lines are synced before the journal speaks of them,
//! so it never vouches for bytes that are not there.
//!
//! Rows are only ever appended, in the order of their lines, so that a commit writes a few pages at the
//! end of a table whatever the number of rows. Keys are random: an index over them in the file would
//! have every commit write thousands of pages all over it. The one who asks for keys is the reader of
//! the next run, and takes them along once ([`FinishedRows`]).

mod finished;
mod walk;

use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, Transaction, TransactionBehavior, params};
use scheduler::RequestKey;

pub use finished::{FinishedRow, FinishedRows};
pub(crate) use walk::Selection;

use crate::error::{Error, Result};
use crate::line::LineFile;
use crate::settings::Settings;

/// The file's name in the output folder.
pub(crate) const FILE_NAME: &str = "journal.sqlite";

/// What SQLite keeps beside the file while it is open, and after a crash.
pub(crate) const COMPANIONS: [&str; 2] = ["journal.sqlite-wal", "journal.sqlite-shm"];

/// The shape of the tables below. A file without one was never finished being made.
const VERSION: u32 = 1;

/// How long to wait for somebody who reads the journal from another process.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

const TABLES: &str = "
    CREATE TABLE job (unix_seconds INTEGER NOT NULL, settings TEXT NOT NULL);
    -- is_replaced: a rewritten file lies beside it and is to take its place.
    CREATE TABLE files (file INTEGER PRIMARY KEY, length INTEGER NOT NULL, is_replaced INTEGER NOT NULL);
    -- Every line that counts.
    CREATE TABLE rows (
        seq INTEGER PRIMARY KEY,
        key BLOB NOT NULL,
        file INTEGER NOT NULL,
        offset INTEGER NOT NULL,
        length INTEGER NOT NULL,
        is_refusal INTEGER NOT NULL,
        prompt_tokens INTEGER NOT NULL,
        generated_tokens INTEGER NOT NULL
    );
    -- Which of them are rows of the input that the present run reads, by their index in it.
    CREATE TABLE present (row INTEGER PRIMARY KEY, seq INTEGER NOT NULL);
";

/// A line that was appended to a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) key: RequestKey,
    pub(crate) file: LineFile,
    pub(crate) offset: u64,
    /// With its newline.
    pub(crate) length: u64,
    pub(crate) is_refusal: bool,
    pub(crate) prompt_tokens: u64,
    pub(crate) generated_tokens: u64,
}

/// Lines that count, and the tokens behind them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    pub(crate) output_lines: u64,
    pub(crate) error_lines: u64,
    pub(crate) prompt_tokens: u64,
    pub(crate) generated_tokens: u64,
}

/// Bytes of each file that the journal vouches for, by [`LineFile::index`].
pub(crate) type Lengths = [u64; LineFile::ALL.len()];

/// The journal of one output folder, which the caller has locked.
pub(crate) struct Journal {
    path: PathBuf,
    db: Connection,
    next_seq: u64,
}

impl Journal {
    /// Opens the journal of an earlier run, where the folder has one.
    pub(crate) fn open(folder: &Path) -> Result<Option<Journal>> {
        let path = folder.join(FILE_NAME);
        if !path.exists() {
            return Ok(None);
        }
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let journal = Journal::connect(path, flags)?;
        match journal.get::<u32>("PRAGMA user_version")? {
            0 => Ok(None),
            VERSION => journal.with_next_seq().map(Some),
            version => Err(Error::malformed(
                &journal.path,
                format!("a journal of version {version}, this program writes version {VERSION}"),
            )),
        }
    }

    /// Makes the journal of a folder that has none, and remembers what the job is.
    pub(crate) fn create(folder: &Path, settings: &Settings, unix_seconds: u64) -> Result<Journal> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
            | OpenFlags::SQLITE_OPEN_CREATE
            | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let mut journal = Journal::connect(folder.join(FILE_NAME), flags)?;
        let json = serde_json::to_string(settings).expect("settings are JSON");
        journal.transact(|db| {
            db.execute_batch(TABLES)?;
            db.execute("INSERT INTO job VALUES (?, ?)", params![unix_seconds as i64, json])?;
            for file in LineFile::ALL {
                db.execute("INSERT INTO files VALUES (?, 0, 0)", [file.index() as i64])?;
            }
            db.pragma_update(None, "user_version", VERSION)
        })?;
        Ok(journal)
    }

    fn connect(path: PathBuf, flags: OpenFlags) -> Result<Journal> {
        let connect = || {
            let db = Connection::open_with_flags(&path, flags)?;
            db.busy_timeout(BUSY_TIMEOUT)?;
            db.pragma_update_and_check(None, "journal_mode", "wal", |_| Ok(()))?;
            // With NORMAL a power cut may take back commits that were reported. FULL is one more sync
            // beside those of the lines, twice a second; and rewritten files take their place only
            // after a commit that must then be on disk.
            db.pragma_update(None, "synchronous", "full")?;
            Ok(db)
        };
        let db = connect().map_err(|source| Error::journal(&path, source))?;
        Ok(Journal { path, db, next_seq: 1 })
    }

    fn with_next_seq(mut self) -> Result<Journal> {
        self.next_seq = self.get::<i64>("SELECT coalesce(max(seq), 0) + 1 FROM rows")? as u64;
        Ok(self)
    }

    /// What the first run said the job is.
    pub(crate) fn settings(&self) -> Result<Settings> {
        let json: String = self.get("SELECT settings FROM job")?;
        serde_json::from_str(&json).map_err(|error| Error::malformed(&self.path, error))
    }

    /// From now on the job is this.
    pub(crate) fn set_settings(&mut self, settings: &Settings) -> Result<()> {
        let json = serde_json::to_string(settings).expect("settings are JSON");
        self.transact(|db| db.execute("UPDATE job SET settings = ?", [json]).map(drop))
    }

    /// The moment of the first run, which the chat template's dates speak of.
    pub(crate) fn unix_seconds(&self) -> Result<u64> {
        self.get::<i64>("SELECT unix_seconds FROM job").map(|seconds| seconds as u64)
    }

    /// Files that a rewritten one beside them is to replace: the last run ended before that was done.
    pub(crate) fn replaced(&self) -> Result<Vec<LineFile>> {
        let is_replaced =
            |file: LineFile| self.file_column::<bool>("is_replaced", file).map(|is| is.then_some(file));
        LineFile::ALL.into_iter().filter_map(|file| is_replaced(file).transpose()).collect()
    }

    /// The rewritten files have taken their places.
    pub(crate) fn forget_replaced(&mut self) -> Result<()> {
        self.transact(|db| db.execute("UPDATE files SET is_replaced = 0", []).map(drop))
    }

    /// Bytes that count, of each file.
    pub(crate) fn lengths(&self) -> Result<Lengths> {
        let mut lengths = Lengths::default();
        for file in LineFile::ALL {
            lengths[file.index()] = self.file_column::<i64>("length", file)? as u64;
        }
        Ok(lengths)
    }

    /// Begins a run: no row is known to be in its input yet, and rows that were refused are to be looked
    /// at again. Their lines name line numbers, which move, and limits, which may be others now; making
    /// them costs nothing.
    pub(crate) fn begin_run(&mut self) -> Result<FinishedRows> {
        self.transact(|db| {
            db.execute("DELETE FROM present", [])?;
            db.execute("DELETE FROM rows WHERE is_refusal", []).map(drop)
        })?;
        FinishedRows::load(&self.db).map_err(|source| Error::journal(&self.path, source))
    }

    /// Commits lines that are on disk: those of rows by their index in the input, those of finished rows
    /// that the input has again, and how much of each file counts now.
    pub(crate) fn commit(
        &mut self,
        written: &[(u64, Entry)],
        met_again: &[(u64, u64)],
        lengths: &Lengths,
    ) -> Result<()> {
        let first = self.next_seq;
        self.transact(|db| {
            let mut add_present = db.prepare_cached("INSERT INTO present VALUES (?, ?)")?;
            for ((row, entry), seq) in written.iter().zip(first..) {
                insert(db, seq, entry)?;
                add_present.execute([*row as i64, seq as i64])?;
            }
            for (row, seq) in met_again {
                add_present.execute([*row as i64, *seq as i64])?;
            }
            LineFile::ALL.into_iter().try_for_each(|file| set_length(db, file, lengths[file.index()], false))
        })?;
        self.next_seq += written.len() as u64;
        Ok(())
    }

    /// Lines that count, and the tokens behind them.
    pub(crate) fn totals(&self) -> Result<Totals> {
        let sum = || {
            let mut statement = self.db.prepare(
                "SELECT file, count(*), sum(prompt_tokens), sum(generated_tokens) FROM rows GROUP BY file",
            )?;
            let mut groups = statement.query([])?;
            let mut totals = Totals::default();
            while let Some(group) = groups.next()? {
                let lines = group.get::<_, i64>(1)? as u64;
                match LineFile::of_index(group.get::<_, i64>(0)? as usize) {
                    Some(LineFile::Output) => totals.output_lines = lines,
                    Some(LineFile::Errors) => totals.error_lines = lines,
                    Some(LineFile::Stale) | None => {}
                }
                totals.prompt_tokens += group.get::<_, i64>(2)? as u64;
                totals.generated_tokens += group.get::<_, i64>(3)? as u64;
            }
            Ok(totals)
        };
        sum().map_err(|source| Error::journal(&self.path, source))
    }

    fn file_column<T: rusqlite::types::FromSql>(&self, column: &str, file: LineFile) -> Result<T> {
        self.get(&format!("SELECT {column} FROM files WHERE file = {}", file.index()))
    }

    fn get<T: rusqlite::types::FromSql>(&self, query: &str) -> Result<T> {
        let value = self.db.query_row(query, [], |row| row.get(0));
        value.map_err(|source| Error::journal(&self.path, source))
    }

    fn transact<T>(&mut self, change: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T>) -> Result<T> {
        let transact = || {
            let transaction = self.db.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let changed = change(&transaction)?;
            transaction.commit()?;
            Ok(changed)
        };
        transact().map_err(|source| Error::journal(&self.path, source))
    }
}

fn insert(db: &Connection, seq: u64, entry: &Entry) -> rusqlite::Result<()> {
    db.prepare_cached("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?)")?
        .execute(params![
            seq as i64,
            entry.key.0.to_be_bytes(),
            entry.file.index() as i64,
            entry.offset as i64,
            entry.length as i64,
            entry.is_refusal,
            entry.prompt_tokens as i64,
            entry.generated_tokens as i64,
        ])
        .map(drop)
}

fn set_length(db: &Connection, file: LineFile, length: u64, is_replaced: bool) -> rusqlite::Result<()> {
    db.prepare_cached("UPDATE files SET length = ?, is_replaced = ? WHERE file = ?")?
        .execute(params![length as i64, is_replaced, file.index() as i64])
        .map(drop)
}
