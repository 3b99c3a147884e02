//! The rows that earlier runs have finished, by their keys.

use rusqlite::Connection;
use scheduler::RequestKey;

use crate::line::LineFile;

/// Rows that need not be computed again. 20 bytes a row: a job of ten million finished rows takes 200 MB
/// to go on, a job that begins takes none.
#[derive(Debug, Default)]
pub struct FinishedRows {
    /// By key.
    rows: Vec<Packed>,
}

/// A row whose line is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FinishedRow {
    /// Position among the rows of the present input.
    pub row: u64,
    /// Where its line is.
    pub file: LineFile,
    pub(crate) seq: u64,
}

/// Bytes and not numbers, for 16-byte numbers would be padded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Packed {
    key: [u8; 16],
    /// Twice the number in the journal, and one more for an error line.
    place: u32,
}

impl FinishedRows {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The finished row of a key, which stands at this position of the present input.
    pub fn find(&self, key: RequestKey, row: u64) -> Option<FinishedRow> {
        let key = key.0.to_be_bytes();
        let found = self.rows.binary_search_by(|packed| packed.key.cmp(&key)).ok()?;
        let place = self.rows[found].place;
        let file = if place.is_multiple_of(2) { LineFile::Output } else { LineFile::Errors };
        Some(FinishedRow { row, file, seq: u64::from(place / 2) })
    }

    pub(super) fn load(db: &Connection) -> rusqlite::Result<FinishedRows> {
        let count: i64 = db.query_row("SELECT count(*) FROM rows", [], |row| row.get(0))?;
        let mut rows = Vec::with_capacity(count as usize);
        let mut statement = db.prepare("SELECT seq, key, file FROM rows")?;
        let mut found = statement.query([])?;
        while let Some(row) = found.next()? {
            let (seq, is_error): (i64, bool) = (row.get(0)?, row.get(2)?);
            let place = u32::try_from(2 * seq + i64::from(is_error));
            let place = place.expect("2^31 lines would be months of the fastest machine");
            rows.push(Packed { key: row.get(1)?, place });
        }
        rows.sort_unstable();
        Ok(FinishedRows { rows })
    }
}
