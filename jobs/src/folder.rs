//! The output folder of a job: one run at a time, and only what belongs to the same job.
//!
//! The lock is the system's, on a file of its own: it ends with the process that holds it, however that
//! ends. What stands in the file tells others who it is.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::calendar::strftime;
use crate::disk;
use crate::error::{Error, Result};
use crate::journal::{self, EarlierRuns, Journal, Progress, unix_now};
use crate::line::LineFile;
use crate::lines_file::LinesFile;
use crate::manifest::Manifest;
use crate::settings::{Settings, changes};
use crate::settle;
use crate::writer::{Order, Writer};

/// The file that is locked.
const LOCK_NAME: &str = "job.lock";

/// A process that was killed holds its lock until the system has taken down its memory, which takes some
/// tenths of a second for a large model. Who starts again at once waits for that.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

/// Between two tries of the lock.
const LOCK_INTERVAL: Duration = Duration::from_millis(50);

/// A folder that no other run works on.
#[derive(Debug)]
pub(crate) struct LockedFolder {
    path: PathBuf,
    lock: FolderLock,
}

/// Keeps other runs out of a folder as long as there is one.
#[derive(Debug, Clone)]
pub struct FolderLock(#[expect(dead_code, reason = "locked as long as it is open")] Arc<File>);

/// An output folder before its job's settings are known to fit.
pub struct OutputFolder {
    folder: LockedFolder,
    /// That of an earlier run, if this one is to go on where it was.
    journal: Option<Journal>,
    /// Rows that failed are computed once more.
    is_retry: bool,
}

impl OutputFolder {
    /// Locks a folder, which is made where there is none, and opens the journal of the job in it.
    ///
    /// Lines without a journal are refused. A `fresh` start does not ask what is there; nothing is thrown
    /// away before [`OutputFolder::begin`].
    pub fn open(path: &Path, fresh: bool) -> Result<OutputFolder> {
        std::fs::create_dir_all(path)
            .map_err(|source| Error::CreateFolder { path: path.to_owned(), source })?;
        let folder = LockedFolder { path: path.to_owned(), lock: FolderLock(Arc::new(lock(path)?)) };
        if fresh {
            return Ok(OutputFolder { folder, journal: None, is_retry: false });
        }
        let journal = Journal::open(path)?;
        let lines = [LineFile::Output, LineFile::Errors].map(|file| path.join(file.name()));
        match lines.into_iter().find(|lines| journal.is_none() && lines.exists()) {
            Some(path) => Err(Error::OutputExists { path }),
            None => Ok(OutputFolder { folder, journal, is_retry: false }),
        }
    }

    /// This folder for a run that computes rows once more that have failed.
    pub fn for_retry(self) -> OutputFolder {
        OutputFolder { is_retry: true, ..self }
    }

    /// When the job's first run began, in Unix seconds: the moment its chat template's dates speak of.
    pub fn unix_seconds(&self) -> Result<Option<u64>> {
        self.journal.as_ref().map(Journal::unix_seconds).transpose()
    }

    /// What the job was begun with, or has gone on with where its user accepted other numerics, where there was a run.
    pub fn settings(&self) -> Result<Option<Settings>> {
        self.journal.as_ref().map(Journal::settings).transpose()
    }

    /// Lines that earlier runs have written for rows which this one need not compute, whether they are in its input or not.
    pub fn finished_rows(&self) -> Result<u64> {
        let Some(journal) = &self.journal else { return Ok(0) };
        let Progress { output_lines, error_lines, pending_lines, .. } = journal.progress()?;
        Ok(output_lines + if self.is_retry { 0 } else { error_lines - pending_lines })
    }

    /// Whether a run with these settings may go on with what is there; nothing is changed.
    ///
    /// Refused where the folder's lines were made with other settings, or computed in another way unless
    /// the caller accepts that.
    pub fn check(&self, settings: &Settings, accept_numerics: bool) -> Result<()> {
        match &self.journal {
            Some(journal) => check(journal, self.folder.path(), settings, accept_numerics).map(drop),
            None => Ok(()),
        }
    }

    /// Begins a run: the writer of its lines, and for its reader what earlier ones have done.
    ///
    /// Refused as by [`OutputFolder::check`].
    pub fn begin(
        self,
        order: Order,
        settings: &Settings,
        unix_seconds: u64,
        accept_numerics: bool,
    ) -> Result<(Writer, EarlierRuns)> {
        let OutputFolder { folder, journal, is_retry } = self;
        let mut journal = match journal {
            Some(mut journal) => {
                if check(&journal, folder.path(), settings, accept_numerics)? == Numerics::Others {
                    journal.adopt_numerics(settings)?;
                }
                journal
            }
            None => {
                clear(folder.path())?;
                Journal::create(folder.path(), settings, unix_seconds)?
            }
        };
        settle::finish_replacing(&mut journal, folder.path())?;
        check_lines(&journal, folder.path())?;
        // It speaks of a run that has ended, and is written again when this one has.
        disk::remove(&folder.path().join(Manifest::FILE_NAME))?;
        cut_stale_lines(&mut journal, folder.path())?;
        if is_retry {
            journal.look_at_errors_again()?;
        }
        let earlier = journal.begin_run(folder.path())?;
        Ok((Writer::open(folder, journal, order)?, earlier))
    }
}

impl LockedFolder {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn lock(&self) -> FolderLock {
        self.lock.clone()
    }
}

/// How the lines that are there were computed.
#[derive(Debug, PartialEq, Eq)]
enum Numerics {
    Same,
    Others,
}

fn lock(folder: &Path) -> Result<File> {
    let path = folder.join(LOCK_NAME);
    let error = |source| Error::write(&path, source);
    let mut options = OpenOptions::new();
    let mut file = options.read(true).write(true).create(true).truncate(false).open(&path).map_err(error)?;
    let began = Instant::now();
    while let Err(refused) = file.try_lock() {
        match refused {
            TryLockError::Error(source) => return Err(error(source)),
            TryLockError::WouldBlock if began.elapsed() < LOCK_PATIENCE => std::thread::sleep(LOCK_INTERVAL),
            TryLockError::WouldBlock => {
                return Err(Error::FolderInUse { path: folder.to_owned(), holder: holder(&mut file) });
            }
        }
    }
    let now = strftime(unix_now(), "%Y-%m-%d %H:%M:%S").expect("directives that are known");
    let holder = format!("process {}, which began at {now} UTC\n", std::process::id());
    disk::cut(&path, &file, 0)?;
    disk::append(&path, &mut file, holder.as_bytes())?;
    Ok(file)
}

/// Who works on a folder at this moment. Nothing is written there.
pub(crate) fn at_work(folder: &Path) -> Result<Option<String>> {
    let path = folder.join(LOCK_NAME);
    let mut file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(source) => return Err(Error::read(&path, source)),
    };
    match file.try_lock_shared() {
        Ok(()) => Ok(None),
        Err(TryLockError::WouldBlock) => Ok(Some(holder(&mut file))),
        Err(TryLockError::Error(source)) => Err(Error::read(&path, source)),
    }
}

/// Who holds the lock; that somebody does matters more than who it is.
fn holder(lock: &mut File) -> String {
    let mut holder = String::new();
    match lock.read_to_string(&mut holder) {
        Ok(length) if length > 0 => holder.trim().to_owned(),
        _ => "another process".to_owned(),
    }
}

fn check(journal: &Journal, folder: &Path, now: &Settings, accept_numerics: bool) -> Result<Numerics> {
    let before = journal.settings()?;
    if let Some(changes) = changes(&before.answers, &now.answers) {
        return Err(Error::SettingsChanged { path: folder.to_owned(), changes });
    }
    match changes(&before.numerics, &now.numerics) {
        None => Ok(Numerics::Same),
        Some(changes) if !accept_numerics => Err(Error::NumericsChanged { path: folder.to_owned(), changes }),
        Some(_) => Ok(Numerics::Others),
    }
}

/// Throws away what an earlier job has left in a folder, and nothing else. The journal goes first: lines
/// without one are never taken for a job's.
fn clear(folder: &Path) -> Result<()> {
    let lines = LineFile::ALL.into_iter().map(|file| folder.join(file.name()));
    let rewritten = LineFile::ALL.into_iter().map(|file| settle::rewritten_path(folder, file));
    let names = [journal::FILE_NAME].into_iter().chain(journal::COMPANIONS).chain([Manifest::FILE_NAME]);
    names
        .map(|name| folder.join(name))
        .chain(lines)
        .chain(rewritten)
        .try_for_each(|path| disk::remove(&path))?;
    disk::sync_folder(folder)
}

/// Opens the files of lines, so that a run is refused that could not write to them while all of the earlier
/// one is still there.
fn check_lines(journal: &Journal, folder: &Path) -> Result<()> {
    let lengths = journal.lengths()?;
    let mut files = [LineFile::Output, LineFile::Errors].into_iter();
    files.try_for_each(|file| LinesFile::open(folder.join(file.name()), lengths[file.index()]).map(drop))
}

/// Cuts off lines that were on their way to `stale.jsonl` when a run died; they are still where they were. Those that its
/// owner has thrown away are of no row of the job, and are not missed.
fn cut_stale_lines(journal: &mut Journal, folder: &Path) -> Result<()> {
    let path = folder.join(LineFile::Stale.name());
    let committed = journal.lengths()?[LineFile::Stale.index()];
    let found = std::fs::metadata(&path).map_or(0, |file| file.len());
    if found < committed {
        journal.set_length(LineFile::Stale, found)?;
    }
    match committed.min(found) {
        0 => disk::remove(&path),
        kept => LinesFile::open(path, kept).map(drop),
    }
}
