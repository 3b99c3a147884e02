//! Which lines are those of rows of the present input.
//!
//! Rows and lines that follow each other are one range: a job that goes on from ordered files says in one
//! word that all its rows are there. Where every row were a range of its own, it would be a few bytes each.

use rusqlite::{Connection, Row, params};

/// Rows that follow each other in the input, and whose lines follow each other in the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) row: u64,
    pub(super) seq: u64,
    pub(super) lines: u64,
}

/// Ranges, as long as they can be.
#[derive(Debug, Default)]
pub(crate) struct Ranges(Vec<Range>);

impl Ranges {
    /// Adds a row and the number of its line.
    pub(crate) fn push(&mut self, row: u64, seq: u64) {
        match self.0.last_mut() {
            Some(last) if (row, seq) == (last.row + last.lines, last.seq + last.lines) => last.lines += 1,
            _ => self.0.push(Range { row, seq, lines: 1 }),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Range> {
        self.0.iter().copied()
    }

    pub(super) fn insert(&self, db: &Connection) -> rusqlite::Result<()> {
        let mut add = db.prepare_cached("INSERT INTO present VALUES (?, ?, ?)")?;
        for Range { row, seq, lines } in &self.0 {
            add.execute(params![*row as i64, *seq as i64, *lines as i64])?;
        }
        Ok(())
    }
}

/// The ranges in the order of the input, for [`read`].
pub(super) const RANGES: &str = "SELECT row, seq, lines FROM present ORDER BY row";

pub(super) fn read(row: &Row<'_>) -> rusqlite::Result<Range> {
    let number = |column| row.get::<_, i64>(column).map(|number| number as u64);
    Ok(Range { row: number(0)?, seq: number(1)?, lines: number(2)? })
}
