//! The journal: which rows have their line, where it lies, and what is there of rows that have none yet.
//!
//! A SQLite file in the output folder. It vouches for the first bytes of each file of lines; what lies
//! beyond them was never committed and is cut off. Lines are synced before the journal speaks of them,
//! so it never vouches for bytes that are not there.
//!
//! Rows are only ever appended, in the order of their lines, so that a commit writes a few pages at the
//! end of a table whatever the number of rows. Keys are random: an index over them in the file would
//! have every commit write thousands of pages all over it. The one who asks for keys is the reader of
//! the next run, and takes them along once ([`EarlierRuns`]).

mod checkpoints;
mod earlier;
mod entry;
mod in_order;
mod present;
mod progress;
mod refused;
mod view;
mod walk;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use rusqlite::types::FromSql;
use rusqlite::{Connection, OpenFlags, Transaction, TransactionBehavior, params};
use scheduler::{Generated, RequestKey};

use checkpoints::Checkpointed;
pub use earlier::{EarlierRuns, FinishedRow, FinishedRows};
pub use entry::Entry;
pub(crate) use entry::{Totals, line_hash};
pub(crate) use present::Ranges;
pub use progress::Progress;
pub(crate) use progress::{InputProgress, unix_now};
use refused::Refused;
pub use view::JournalView;
pub(crate) use walk::{Go, Selection, Walked};

use crate::disk;
use crate::error::{Error, Result};
use crate::line::LineFile;
use crate::settings::Settings;
use crate::writer::Unread;

/// The file's name in the output folder.
pub(crate) const FILE_NAME: &str = "journal.sqlite";

/// What SQLite keeps beside the file while it is open, and after a crash.
pub(crate) const COMPANIONS: [&str; 2] = ["journal.sqlite-wal", "journal.sqlite-shm"];

/// The shape of the tables below. A file without one was never finished being made.
const VERSION: u32 = 3;

/// How long to wait for somebody who reads the journal from another process.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

const TABLES: &str = "
    CREATE TABLE job (unix_seconds INTEGER NOT NULL, settings TEXT NOT NULL);
    -- is_replaced: a rewritten file lies beside it and is to take its place.
    CREATE TABLE files (file INTEGER PRIMARY KEY, length INTEGER NOT NULL, is_replaced INTEGER NOT NULL);
    -- Which lines are rows of the input that the present run reads: so many lines from seq on are
    -- those of as many rows of the input from row on.
    CREATE TABLE present (row INTEGER PRIMARY KEY, seq INTEGER NOT NULL, lines INTEGER NOT NULL);
    -- Tokens of rows that have no line yet; the first of a piece is the row's token of that index.
    CREATE TABLE checkpoints (
        key BLOB NOT NULL,
        first INTEGER NOT NULL,
        tokens INTEGER NOT NULL,
        piece BLOB NOT NULL,
        PRIMARY KEY (key, first)
    );
    -- One row: how far the job was at the last commit, for those who look on from elsewhere.
    CREATE TABLE progress (
        began INTEGER NOT NULL,
        earlier_lines INTEGER NOT NULL,
        pending_lines INTEGER NOT NULL,
        earlier_generated_tokens INTEGER NOT NULL,
        committed INTEGER NOT NULL,
        rows_read INTEGER NOT NULL,
        bytes_read INTEGER NOT NULL,
        input_bytes INTEGER NOT NULL,
        is_read_to_end INTEGER NOT NULL,
        output_lines INTEGER NOT NULL,
        error_lines INTEGER NOT NULL,
        prompt_tokens INTEGER NOT NULL,
        generated_tokens INTEGER NOT NULL,
        unfinished_tokens INTEGER NOT NULL
    );
    INSERT INTO progress VALUES (0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
";

/// Bytes of each file that the journal vouches for, by [`LineFile::index`].
pub(crate) type Lengths = [u64; LineFile::ALL.len()];

/// What a run has done since its last commit.
#[derive(Default)]
pub(crate) struct Uncommitted {
    /// Lines, by the index of their row in the input.
    pub(crate) written: Vec<(u64, Entry)>,
    /// Finished rows that the input has again.
    pub(crate) met_again: Ranges,
    /// Tokens of unfinished rows, from the one of an index on.
    pub(crate) checkpoints: Vec<(RequestKey, u64, Generated)>,
}

impl Uncommitted {
    /// Things that memory holds until they are committed.
    pub(crate) fn len(&self) -> usize {
        self.written.len() + self.met_again.len() + self.checkpoints.len()
    }

    pub(crate) fn clear(&mut self) {
        self.written.clear();
        self.met_again.clear();
        self.checkpoints.clear();
    }
}

/// The journal of one output folder, which the caller has locked.
pub(crate) struct Journal {
    path: PathBuf,
    db: Connection,
    next_seq: u64,
    totals: Totals,
    checkpointed: Checkpointed,
    refused: Refused,
    input: Arc<InputProgress>,
}

impl Journal {
    /// Opens the journal of an earlier run, where the folder has one.
    pub(crate) fn open(folder: &Path) -> Result<Option<Journal>> {
        let path = folder.join(FILE_NAME);
        if !path.exists() {
            return Ok(None);
        }
        let mut journal = Journal::connect(path, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
        if !journal.has_tables()? {
            return Ok(None);
        }
        journal.next_seq = journal.read_next_seq()?;
        Ok(Some(journal))
    }

    /// Makes the journal of a folder that has none, and remembers what the job is.
    pub(crate) fn create(folder: &Path, settings: &Settings, unix_seconds: u64) -> Result<Journal> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE;
        let mut journal = Journal::connect(folder.join(FILE_NAME), flags)?;
        let json = serde_json::to_string(settings).expect("settings are JSON");
        journal.transact(|db| {
            db.execute_batch(TABLES)?;
            db.execute_batch(entry::TABLE)?;
            db.execute("INSERT INTO job VALUES (?, ?)", params![unix_seconds as i64, json])?;
            for file in LineFile::ALL {
                db.execute("INSERT INTO files VALUES (?, 0, 0)", [file.index() as i64])?;
            }
            db.pragma_update(None, "user_version", VERSION)
        })?;
        journal.empty_log()?;
        Ok(journal)
    }

    /// Moves what SQLite's log holds into the file itself: a log that is torn later costs commits, and
    /// never the journal.
    pub(crate) fn empty_log(&self) -> Result<()> {
        self.sql(|db| db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())))
    }

    fn connect(path: PathBuf, flags: OpenFlags) -> Result<Journal> {
        let connect = || {
            let db = Connection::open_with_flags(&path, flags | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
            db.busy_timeout(BUSY_TIMEOUT)?;
            db.pragma_update_and_check(None, "journal_mode", "wal", |_| Ok(()))?;
            // With NORMAL a power cut may take back commits that were reported. FULL is one more sync
            // beside those of the lines, twice a second; and rewritten files take their place only
            // after a commit that must then be on disk.
            db.pragma_update(None, "synchronous", "full")?;
            Ok(db)
        };
        let db = connect().map_err(|source| Error::journal(&path, source))?;
        Ok(Journal::of(path, db))
    }

    fn of(path: PathBuf, db: Connection) -> Journal {
        let (totals, checkpointed, refused) = Default::default();
        Journal { path, db, next_seq: 1, totals, checkpointed, refused, input: Arc::default() }
    }

    /// Whether it was ever finished being made; tables of another version are refused.
    fn has_tables(&self) -> Result<bool> {
        match self.get::<u32>("PRAGMA user_version")? {
            0 => Ok(false),
            VERSION => Ok(true),
            version => {
                let message = format!(
                    "a journal of version {version}, this program writes version {VERSION}; \
                     go on with the program that wrote it, or pass --fresh to start over"
                );
                Err(Error::malformed(&self.path, message))
            }
        }
    }

    /// What the first run said the job is.
    pub(crate) fn settings(&self) -> Result<Settings> {
        let json: String = self.get("SELECT settings FROM job")?;
        serde_json::from_str(&json).map_err(|error| Error::malformed(&self.path, error))
    }

    /// From now on lines are computed as these settings say. What there is of unfinished rows was computed
    /// otherwise, and half of either would be neither.
    pub(crate) fn adopt_numerics(&mut self, settings: &Settings) -> Result<()> {
        let json = serde_json::to_string(settings).expect("settings are JSON");
        self.transact(|db| {
            db.execute("UPDATE job SET settings = ?", [json])?;
            db.execute("DELETE FROM checkpoints", []).map(drop)
        })
    }

    /// The moment of the first run, which the chat template's dates speak of.
    pub(crate) fn unix_seconds(&self) -> Result<u64> {
        self.get::<i64>("SELECT unix_seconds FROM job").map(|seconds| seconds as u64)
    }

    /// How far the job is.
    pub(crate) fn progress(&self) -> Result<Progress> {
        self.sql(progress::read)
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

    /// From now on so many bytes of a file count.
    pub(crate) fn set_length(&mut self, file: LineFile, length: u64) -> Result<()> {
        self.transact(|db| entry::set_length(db, file, length, false))
    }

    /// Begins a run: no row is known to be in its input yet, and rows that were refused are to be looked
    /// at again. Their lines name line numbers, which move, and limits, which may be others now; making
    /// them costs nothing. The old ones count until there are new ones.
    pub(crate) fn begin_run(&mut self, folder: &Path) -> Result<EarlierRuns> {
        let mut refused = Refused::before(self.next_seq, folder);
        let (finished, totals) = FinishedRows::load(self, folder, Some(&mut refused))?;
        self.for_each_range(|range| {
            refused.note_places(range);
            Ok(Go::On)
        })?;
        let (checkpointed, so_far) = self.sql(checkpoints::load)?;
        self.input = Arc::default();
        self.transact(|db| {
            db.execute("DELETE FROM present", [])?;
            progress::begin(db, &totals, refused.len(), checkpointed.tokens())
        })?;
        (self.totals, self.checkpointed, self.refused) = (totals, checkpointed, refused);
        Ok(EarlierRuns::new(folder, totals.lines(), finished, so_far, Arc::clone(&self.input)))
    }

    /// Rows that failed are to be looked at again, as those are that were refused.
    pub(crate) fn look_at_errors_again(&mut self) -> Result<()> {
        let errors = LineFile::Errors.index() as i64;
        self.transact(|db| db.execute("UPDATE rows SET is_refusal = 1 WHERE file = ?", [errors]).map(drop))
    }

    /// Commits what a run has done, after its lines were put on disk, and how much of each file counts now.
    pub(crate) fn commit(&mut self, done: &Uncommitted, lengths: &Lengths) -> Result<()> {
        let first = self.next_seq;
        let replaced = self.refused.lines_of(done.written.iter().map(|(_, entry)| entry.key))?;
        let mut totals = self.totals;
        let mut checkpointed = self.checkpointed.clone();
        let input = Arc::clone(&self.input);
        self.transact(|db| {
            let mut present = Ranges::default();
            for ((row, entry), seq) in done.written.iter().zip(first..) {
                entry::insert(db, entry::INSERT, seq, entry)?;
                present.push(*row, seq);
                totals.add(entry);
            }
            present.insert(db)?;
            done.met_again.insert(db)?;
            refused::forget(db, replaced, &mut totals)?;
            checkpointed.add(db, &done.checkpoints)?;
            checkpointed.remove(db, done.written.iter().map(|(_, entry)| entry.key))?;
            for file in LineFile::ALL {
                entry::set_length(db, file, lengths[file.index()], false)?;
            }
            progress::update(db, &input, &totals, checkpointed.tokens())
        })?;
        self.next_seq += done.written.len() as u64;
        (self.totals, self.checkpointed) = (totals, checkpointed);
        Ok(())
    }

    /// The run is at its end, and drops lines of rows that it was to look at again and did not come across: all of them where it has
    /// read the whole input, and else those whose rows stood among as many rows as it has read. These were edited since, or
    /// moved behind the limit by rows that were put in front of them, where the run that comes to them makes their line anew.
    pub(crate) fn forget_refused(&mut self, unread: Unread) -> Result<()> {
        let refused = std::mem::take(&mut self.refused);
        if refused.is_empty() {
            return Ok(());
        }
        let (input, mut totals) = (Arc::clone(&self.input), self.totals);
        let unfinished_tokens = self.checkpointed.tokens();
        self.transact(|db| {
            match unread {
                Unread::HasLeft => refused.forget_all(db, &mut totals),
                Unread::Stays => {
                    refused::forget(db, refused.lines_among(input.rows.load(Relaxed)), &mut totals)
                }
            }?;
            progress::update(db, &input, &totals, unfinished_tokens)
        })?;
        self.totals = totals;
        Ok(())
    }

    /// Rows that have no line are no rows of this job any more.
    pub(crate) fn forget_checkpoints(&mut self) -> Result<()> {
        if self.checkpointed.is_empty() {
            return Ok(());
        }
        let (input, totals) = (Arc::clone(&self.input), self.totals);
        self.transact(|db| {
            db.execute("DELETE FROM checkpoints", [])?;
            progress::update(db, &input, &totals, 0)
        })?;
        self.checkpointed = Checkpointed::default();
        Ok(())
    }

    /// Lines that count as of the last commit, and the tokens behind them.
    pub(crate) fn totals(&self) -> Totals {
        self.totals
    }

    fn read_next_seq(&self) -> Result<u64> {
        self.get::<i64>("SELECT coalesce(max(seq), 0) + 1 FROM rows").map(|seq| seq as u64)
    }

    fn file_column<T: FromSql>(&self, column: &str, file: LineFile) -> Result<T> {
        self.get(&format!("SELECT {column} FROM files WHERE file = {}", file.index()))
    }

    fn get<T: FromSql>(&self, query: &str) -> Result<T> {
        self.sql(|db| db.query_row(query, [], |row| row.get(0)))
    }

    fn sql<T>(&self, ask: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T> {
        ask(&self.db).map_err(|source| Error::journal(&self.path, source))
    }

    fn transact<T>(&mut self, change: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T> {
        let error = |source| Error::journal(&self.path, source);
        let begin = || Transaction::new_unchecked(&self.db, TransactionBehavior::Immediate);
        let transaction = begin().map_err(error)?;
        let changed = change(&transaction).map_err(error)?;
        disk::commit(&self.path, transaction)?;
        Ok(changed)
    }
}
