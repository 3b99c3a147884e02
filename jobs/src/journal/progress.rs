//! How far a job is, for those who look on from another process. One row of a table, which each commit
//! writes anew: it costs nothing beside the commit.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{SystemTime, UNIX_EPOCH};

use rusqlite::{Connection, params};

use super::Totals;

/// How far a job was at the last commit of its latest run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// When the latest run began, in Unix seconds.
    pub began: u64,
    /// Lines that were there when it began, of rows that it need not look at again.
    pub earlier_lines: u64,
    /// Error lines that were there when it began, of rows that it is to look at again and has not yet.
    pub pending_lines: u64,
    /// Tokens generated for them, and those of unfinished rows at that time.
    pub earlier_generated_tokens: u64,
    /// When the commit was, in Unix seconds.
    pub committed: u64,
    /// Rows of the input that the run has read.
    pub rows_read: u64,
    /// Bytes of the input that it has read.
    pub bytes_read: u64,
    /// The input's size when it was opened.
    pub input_bytes: u64,
    /// The input was read to its end.
    pub is_read_to_end: bool,
    /// Lines in `output.jsonl`.
    pub output_lines: u64,
    /// Lines in `errors.jsonl`.
    pub error_lines: u64,
    /// Tokens of the prompts that were answered.
    pub prompt_tokens: u64,
    /// Tokens generated for them.
    pub generated_tokens: u64,
    /// Tokens generated for rows that have no line yet, as far as they are in the journal.
    pub unfinished_tokens: u64,
}

/// How far the reader is: it writes, the writer's commits read.
#[derive(Debug, Default)]
pub(crate) struct InputProgress {
    pub(crate) rows: AtomicU64,
    pub(crate) bytes: AtomicU64,
    pub(crate) size: AtomicU64,
    pub(crate) is_ended: AtomicBool,
}

/// This moment in Unix seconds.
pub(crate) fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// A run begins, and has read nothing; so many of the lines are of rows that it is to look at again.
pub(super) fn begin(
    db: &Connection,
    totals: &Totals,
    pending_lines: u64,
    unfinished_tokens: u64,
) -> rusqlite::Result<()> {
    let earlier_lines = totals.lines() - pending_lines;
    let earlier_tokens = totals.generated_tokens + unfinished_tokens;
    db.execute(
        "UPDATE progress SET began = ?, earlier_lines = ?, pending_lines = ?, earlier_generated_tokens = ?",
        params![unix_now() as i64, earlier_lines as i64, pending_lines as i64, earlier_tokens as i64],
    )?;
    update(db, &InputProgress::default(), totals, unfinished_tokens)
}

/// So many of the lines whose rows were to be looked at again are there no longer.
pub(super) fn forget_pending(db: &Connection, lines: u64) -> rusqlite::Result<()> {
    db.prepare_cached("UPDATE progress SET pending_lines = pending_lines - ?")?
        .execute([lines as i64])
        .map(drop)
}

/// A commit.
pub(super) fn update(
    db: &Connection,
    input: &InputProgress,
    totals: &Totals,
    unfinished_tokens: u64,
) -> rusqlite::Result<()> {
    let read = |counter: &AtomicU64| counter.load(Relaxed) as i64;
    db.prepare_cached(
        "UPDATE progress SET committed = ?, rows_read = ?, bytes_read = ?, input_bytes = ?, \
         is_read_to_end = ?, output_lines = ?, error_lines = ?, prompt_tokens = ?, generated_tokens = ?, \
         unfinished_tokens = ?",
    )?
    .execute(params![
        unix_now() as i64,
        read(&input.rows),
        read(&input.bytes),
        read(&input.size),
        input.is_ended.load(Relaxed),
        totals.output_lines as i64,
        totals.error_lines as i64,
        totals.prompt_tokens as i64,
        totals.generated_tokens as i64,
        unfinished_tokens as i64,
    ])
    .map(drop)
}

pub(super) fn read(db: &Connection) -> rusqlite::Result<Progress> {
    let query = "SELECT began, earlier_lines, pending_lines, earlier_generated_tokens, committed, rows_read, \
         bytes_read, input_bytes, is_read_to_end, output_lines, error_lines, prompt_tokens, \
         generated_tokens, unfinished_tokens FROM progress";
    db.query_row(query, [], |row| {
        let number = |column| row.get::<_, i64>(column).map(|number| number as u64);
        Ok(Progress {
            began: number(0)?,
            earlier_lines: number(1)?,
            pending_lines: number(2)?,
            earlier_generated_tokens: number(3)?,
            committed: number(4)?,
            rows_read: number(5)?,
            bytes_read: number(6)?,
            input_bytes: number(7)?,
            is_read_to_end: row.get(8)?,
            output_lines: number(9)?,
            error_lines: number(10)?,
            prompt_tokens: number(11)?,
            generated_tokens: number(12)?,
            unfinished_tokens: number(13)?,
        })
    })
}
