//! One line in the journal.

use rusqlite::{Connection, Row, params};
use scheduler::RequestKey;

use crate::digest_map::Digest;
use crate::line::LineFile;

/// A line that was appended to a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Identity of its row.
    pub key: RequestKey,
    /// The file.
    pub file: LineFile,
    /// Where it begins.
    pub offset: u64,
    /// Its bytes, the newline among them.
    pub length: u64,
    /// 128 bits of BLAKE3 of these bytes.
    pub hash: [u8; 16],
    /// The row is looked at again by each run: it was refused without work, or failed and is to be retried.
    pub is_refusal: bool,
    /// Tokens of the prompt that was answered.
    pub prompt_tokens: u64,
    /// Tokens generated for it.
    pub generated_tokens: u64,
}

/// Lines that count, and the tokens behind them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    pub(crate) output_lines: u64,
    pub(crate) error_lines: u64,
    pub(crate) prompt_tokens: u64,
    pub(crate) generated_tokens: u64,
}

impl Totals {
    pub(crate) fn add(&mut self, entry: &Entry) {
        match entry.file {
            LineFile::Output => self.output_lines += 1,
            LineFile::Errors => self.error_lines += 1,
            LineFile::Stale => {}
        }
        self.prompt_tokens += entry.prompt_tokens;
        self.generated_tokens += entry.generated_tokens;
    }

    pub(super) fn take(&mut self, gone: &Totals) {
        self.output_lines -= gone.output_lines;
        self.error_lines -= gone.error_lines;
        self.prompt_tokens -= gone.prompt_tokens;
        self.generated_tokens -= gone.generated_tokens;
    }

    pub(super) fn lines(&self) -> u64 {
        self.output_lines + self.error_lines
    }
}

/// Every line that counts; length and hash are those of its bytes with the newline.
pub(super) const TABLE: &str = "
    CREATE TABLE rows (
        seq INTEGER PRIMARY KEY,
        key BLOB NOT NULL,
        file INTEGER NOT NULL,
        offset INTEGER NOT NULL,
        length INTEGER NOT NULL,
        hash BLOB NOT NULL,
        is_refusal INTEGER NOT NULL,
        prompt_tokens INTEGER NOT NULL,
        generated_tokens INTEGER NOT NULL
    )";

/// A line more, for [`insert`].
pub(super) const INSERT: &str = "INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)";

/// Lines from one number up to another, for [`read`].
pub(super) const LINES: &str = "
    SELECT seq, key, file, offset, length, hash, is_refusal, prompt_tokens, generated_tokens
    FROM rows WHERE seq >= ? AND seq < ? ORDER BY seq";

/// The 128 bits of BLAKE3 of a line with its newline.
pub(crate) fn line_hash(line: &[u8]) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(line).update(b"\n");
    *hasher.finalize().as_bytes().first_chunk().expect("16 of 32 bytes")
}

pub(super) fn insert(db: &Connection, insert: &str, seq: u64, entry: &Entry) -> rusqlite::Result<()> {
    db.prepare_cached(insert)?
        .execute(params![
            seq as i64,
            entry.key.0.to_be_bytes(),
            entry.file.index() as i64,
            entry.offset as i64,
            entry.length as i64,
            entry.hash,
            entry.is_refusal,
            entry.prompt_tokens as i64,
            entry.generated_tokens as i64,
        ])
        .map(drop)
}

pub(super) fn read(row: &Row<'_>) -> rusqlite::Result<(u64, Entry)> {
    let number = |column| row.get::<_, i64>(column).map(|number| number as u64);
    let file = LineFile::of_index(row.get::<_, i64>(2)? as usize);
    let entry = Entry {
        key: RequestKey(u128::from_be_bytes(row.get(1)?)),
        file: file.ok_or(rusqlite::Error::IntegralValueOutOfRange(2, row.get(2)?))?,
        offset: number(3)?,
        length: number(4)?,
        hash: row.get(5)?,
        is_refusal: row.get(6)?,
        prompt_tokens: number(7)?,
        generated_tokens: number(8)?,
    };
    Ok((number(0)?, entry))
}

/// Deletes the lines of which `condition` is true with this number; what they summed up to.
pub(super) fn delete(db: &Connection, condition: &str, number: u64) -> rusqlite::Result<Totals> {
    let sums = format!(
        "SELECT count(*) FILTER (WHERE file = {}), count(*) FILTER (WHERE file = {}), \
         coalesce(sum(prompt_tokens), 0), coalesce(sum(generated_tokens), 0) FROM rows WHERE {condition}",
        LineFile::Output.index(),
        LineFile::Errors.index(),
    );
    let gone = db.prepare_cached(&sums)?.query_row([number as i64], |row| {
        let number = |column| row.get::<_, i64>(column).map(|number| number as u64);
        Ok(Totals {
            output_lines: number(0)?,
            error_lines: number(1)?,
            prompt_tokens: number(2)?,
            generated_tokens: number(3)?,
        })
    })?;
    db.prepare_cached(&format!("DELETE FROM rows WHERE {condition}"))?.execute([number as i64])?;
    Ok(gone)
}

/// So many bytes of a file count.
pub(super) fn set_length(
    db: &Connection,
    file: LineFile,
    length: u64,
    is_replaced: bool,
) -> rusqlite::Result<()> {
    db.prepare_cached("UPDATE files SET length = ?, is_replaced = ? WHERE file = ?")?
        .execute(params![length as i64, is_replaced, file.index() as i64])
        .map(drop)
}
