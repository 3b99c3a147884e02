//! `output.jsonl` and `errors.jsonl`: where lines end up.
//!
//! Lines are appended as they are completed. Every so often they are put on disk and then committed to
//! the journal, so that a run that dies at any moment loses what it did since the last commit and
//! nothing else. A job that has come to its end gets the order it wants (`settle`).

use scheduler::{Generated, RequestKey};

use crate::disk;
use crate::error::Result;
use crate::folder::{FolderLock, LockedFolder};
use crate::journal::{Entry, FinishedRow, Journal, Uncommitted, line_hash};
use crate::line::{Line, LineFile};
use crate::lines_file::LinesFile;
use crate::settle;

/// Most rows between two commits, which bounds the memory of what waits for one: 16,384 rows of about
/// 100 bytes are 1.6 MB. A job of 20,000 rows/s reaches it about as often as a clock of half a second.
const COMMIT_ROWS: usize = 1 << 14;

/// The order of lines in a finished file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Order {
    /// That of the input.
    #[default]
    Input,
    /// That in which rows were completed.
    Completion,
}

/// What a finished row that the run did not come across in its input has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unread {
    /// It has left the input: its line is moved to `stale.jsonl`.
    HasLeft,
    /// It may stand behind what the run has read: its line stays, after those of the rows that were read.
    Stays,
}

/// Writes the lines of one job. The folder stays locked as long as there is one.
pub struct Writer {
    order: Order,
    folder: LockedFolder,
    journal: Journal,
    output: LinesFile,
    errors: LinesFile,
    stale_length: u64,
    uncommitted: Uncommitted,
}

/// What there is when a run ends, with what earlier runs have written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Written {
    /// Lines in `output.jsonl`.
    pub output_lines: u64,
    /// Lines in `errors.jsonl`.
    pub error_lines: u64,
    /// Lines that this run has moved to `stale.jsonl`.
    pub stale_lines: u64,
    /// Tokens of the prompts that were answered.
    pub prompt_tokens: u64,
    /// Tokens generated for them.
    pub generated_tokens: u64,
}

impl Writer {
    pub(crate) fn open(folder: LockedFolder, journal: Journal, order: Order) -> Result<Writer> {
        let lengths = journal.lengths()?;
        let open = |file: LineFile| LinesFile::open(folder.path().join(file.name()), lengths[file.index()]);
        let (output, errors) = (open(LineFile::Output)?, open(LineFile::Errors)?);
        // Their names too must outlast a power cut once the journal speaks of their bytes.
        disk::sync_folder(folder.path())?;
        let stale_length = lengths[LineFile::Stale.index()];
        Ok(Writer {
            order,
            folder,
            journal,
            output,
            errors,
            stale_length,
            uncommitted: Uncommitted::default(),
        })
    }

    /// What keeps others out of the folder, for whoever has to write there when this writer has ended.
    pub fn lock(&self) -> FolderLock {
        self.folder.lock()
    }

    /// Appends a line to the file it belongs to.
    pub fn write(&mut self, line: &Line) -> Result<()> {
        assert!(!line.json.contains('\n'), "the line of row {} holds a newline", line.row);
        let file = match line.file {
            LineFile::Output => &mut self.output,
            LineFile::Errors => &mut self.errors,
            LineFile::Stale => unreachable!("row {} is of this run", line.row),
        };
        let json = line.json.as_bytes();
        let (offset, length, hash) = (file.append(json)?, json.len() as u64 + 1, line_hash(json));
        let Line { key, file, is_refusal, prompt_tokens, generated_tokens, .. } = *line;
        let entry = Entry { key, file, offset, length, hash, is_refusal, prompt_tokens, generated_tokens };
        self.uncommitted.written.push((line.row, entry));
        self.commit_when_many()
    }

    /// The input has a row whose line an earlier run has written.
    pub fn keep(&mut self, row: FinishedRow) -> Result<()> {
        self.uncommitted.met_again.push(row.row, row.seq);
        self.commit_when_many()
    }

    /// Keeps tokens of a row that has no line yet, for a run that has to go on from here: those from
    /// `first` on, counted from 0. They take the place of all that is there from `first` on. Scores of
    /// the prompt belong to the piece that begins at 0.
    ///
    /// The next commit speaks of them, and the one that speaks of the row's line forgets them.
    pub fn checkpoint(&mut self, key: RequestKey, first: u64, more: &Generated) -> Result<()> {
        self.uncommitted.checkpoints.push((key, first, more.clone()));
        self.commit_when_many()
    }

    /// Puts all lines so far on disk, and then has the journal vouch for them.
    pub fn commit(&mut self) -> Result<()> {
        if self.uncommitted.len() > 0 { self.commit_now() } else { Ok(()) }
    }

    /// Ends a run that stops before its end: what was done is kept for the next one.
    pub fn pause(mut self) -> Result<Written> {
        self.commit_now()?;
        Ok(self.committed())
    }

    /// Ends a job whose rows all have their line: each file holds them in order, and no other.
    pub fn finish(mut self, unread: Unread) -> Result<Written> {
        self.commit_now()?;
        let stale_lines = settle::settle(&mut self.journal, self.folder.path(), self.order, unread)?;
        Ok(Written { stale_lines, ..self.committed() })
    }

    /// What the journal vouches for as of the last commit, of this run and of earlier ones: after an error
    /// that is all that counts.
    pub fn committed(&self) -> Written {
        let totals = self.journal.totals();
        Written {
            output_lines: totals.output_lines,
            error_lines: totals.error_lines,
            stale_lines: 0,
            prompt_tokens: totals.prompt_tokens,
            generated_tokens: totals.generated_tokens,
        }
    }

    fn commit_when_many(&mut self) -> Result<()> {
        if self.uncommitted.len() >= COMMIT_ROWS { self.commit_now() } else { Ok(()) }
    }

    fn commit_now(&mut self) -> Result<()> {
        self.output.sync()?;
        self.errors.sync()?;
        let lengths = [self.output.length(), self.errors.length(), self.stale_length];
        self.journal.commit(&self.uncommitted, &lengths)?;
        self.uncommitted.clear();
        Ok(())
    }
}
