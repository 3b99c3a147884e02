//! Rows that have a line and are looked at again all the same: those that were refused without work, and in a retry those that failed.
//!
//! Their old line counts until there is a new one. A run that does not come by a row, for it has a limit, or stops, leaves it as it is.

use std::path::Path;

use rusqlite::Connection;
use scheduler::RequestKey;

use super::present::{Range, Ranges};
use super::{Totals, entry, progress};
use crate::bit_set::BitSet;
use crate::digest_map::{Digest, DigestMap};
use crate::error::Result;

/// Lines of such rows that earlier runs have written.
#[derive(Default)]
pub(super) struct Refused {
    /// The lines' numbers, by the keys of their rows.
    by_key: DigestMap,
    lines: BitSet,
    /// Where their rows stood in the input of the run before, as far as it came by them.
    places: Ranges,
    /// The first number of a line of this run.
    first_seq: u64,
}

impl Refused {
    /// None so far, before a run whose first line has this number. What memory does not hold lies in the folder.
    pub(super) fn before(first_seq: u64, folder: &Path) -> Refused {
        let mut refused = Refused { first_seq, ..Refused::default() };
        refused.by_key.keep_files_in(folder);
        refused
    }

    pub(super) fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    pub(super) fn len(&self) -> u64 {
        self.lines.len()
    }

    pub(super) fn add(&mut self, key: Digest, seq: u64) -> Result<()> {
        self.lines.insert(seq);
        self.by_key.insert(key, seq)
    }

    /// Notes the places of those lines that are among these of the run before, once all are there.
    pub(super) fn note_places(&mut self, Range { row, seq, lines }: Range) {
        let refused = (0..lines).filter(|at| self.lines.contains(seq + at));
        refused.for_each(|at| self.places.push(row + at, seq + at));
    }

    /// The old lines of those of these rows that have one.
    pub(super) fn lines_of(&self, keys: impl Iterator<Item = RequestKey>) -> Result<Vec<u64>> {
        keys.filter_map(|key| self.by_key.get(&key.0.to_be_bytes()).transpose()).collect()
    }

    /// The lines whose rows stood among the first so many. Those of rows that have since moved behind these are among them: what stands
    /// there now has not been read.
    pub(super) fn lines_among(&self, rows: u64) -> impl Iterator<Item = u64> {
        let among =
            move |range: Range| range.seq..range.seq + rows.saturating_sub(range.row).min(range.lines);
        self.places.iter().flat_map(among)
    }

    /// Deletes all that have no new line.
    pub(super) fn forget_all(&self, db: &Connection, totals: &mut Totals) -> rusqlite::Result<()> {
        let gone = entry::delete(db, "is_refusal AND seq < ?", self.first_seq)?;
        totals.take(&gone);
        progress::forget_pending(db, gone.lines())
    }
}

/// Deletes these lines, as far as they are still there.
pub(super) fn forget(
    db: &Connection,
    lines: impl IntoIterator<Item = u64>,
    totals: &mut Totals,
) -> rusqlite::Result<()> {
    let mut forgotten = 0;
    for seq in lines {
        let gone = entry::delete(db, "seq = ?", seq)?;
        totals.take(&gone);
        forgotten += gone.lines();
    }
    match forgotten {
        0 => Ok(()),
        lines => progress::forget_pending(db, lines),
    }
}
