//! Walking over all lines that count, and putting them in order: memory holds one bit a row.

use rusqlite::{Transaction, TransactionBehavior, params};

use super::entry::{self, Entry};
use super::present::{self, Range, Ranges};
use super::{Journal, Lengths, Totals, progress};
use crate::bit_set::BitSet;
use crate::disk;
use crate::error::{Error, Result};
use crate::line::LineFile;

/// Which lines to walk over, and in which order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Selection {
    /// Rows of the present input, as they stand in it.
    PresentByRow,
    /// Rows of the present input, as their lines were written.
    Present,
    /// Rows that the present input was not seen to have, as their lines were written.
    Absent,
    /// All rows, as their lines were written.
    All,
}

/// A line on the way.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Walked {
    /// The index of its row in the present input, where the walk goes by it.
    pub(crate) row: Option<u64>,
    pub(crate) entry: Entry,
}

/// Ranges of rows that are looked up at once.
const NEAR_RANGES: usize = 2048;

/// Lines of a range that is looked up by itself.
const LONG_RANGE: u64 = 8;

/// What a visitor wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Go {
    On,
    Home,
}

impl Journal {
    /// Shows each line of the selections, one selection after the other.
    pub(crate) fn walk(
        &self,
        selections: &[Selection],
        mut visit: impl FnMut(Walked) -> Result<()>,
    ) -> Result<()> {
        self.walk_while(selections, |walked| visit(walked).map(|()| Go::On))
    }

    /// The same, as long as the visitor wants to.
    pub(crate) fn walk_while(
        &self,
        selections: &[Selection],
        mut visit: impl FnMut(Walked) -> Result<Go>,
    ) -> Result<()> {
        for selection in selections {
            if self.walk_one(*selection, &mut visit)? == Go::Home {
                break;
            }
        }
        Ok(())
    }

    /// Rewrites which lines count. `rewrite` walks over the old ones and hands out each that stays, with
    /// its new place where that is another; the files that it has made anew take their places after this.
    pub(crate) fn replace(
        &mut self,
        files: &[LineFile],
        rewrite: impl FnOnce(&Journal, &mut dyn FnMut(Walked) -> Result<()>) -> Result<Lengths>,
    ) -> Result<()> {
        let journal: &Journal = self;
        let error = |source| Error::journal(&journal.path, source);
        // It rolls back when it is dropped.
        let transaction = Transaction::new_unchecked(&journal.db, TransactionBehavior::Immediate);
        let transaction = transaction.map_err(error)?;
        // Rows are renumbered in a table of their own, for deleting ten million old ones one by one takes
        // longer than writing the new ones.
        let insert = entry::INSERT.replace("rows", "new_rows");
        journal.sql(|db| db.execute_batch(&entry::TABLE.replace("rows", "new_rows")))?;
        let mut seq = 1;
        let (mut totals, mut present) = (Totals::default(), Ranges::default());
        let lengths = rewrite(journal, &mut |Walked { row, entry }| {
            entry::insert(&journal.db, &insert, seq, &entry).map_err(error)?;
            totals.add(&entry);
            if let Some(row) = row {
                present.push(row, seq);
            }
            seq += 1;
            Ok(())
        })?;
        let finish = || {
            for file in LineFile::ALL {
                let is_replaced = files.contains(&file);
                entry::set_length(&journal.db, file, lengths[file.index()], is_replaced)?;
            }
            journal
                .db
                .execute_batch("DROP TABLE rows; ALTER TABLE new_rows RENAME TO rows; DELETE FROM present")?;
            present.insert(&journal.db)?;
            progress::update(&journal.db, &journal.input, &totals, journal.checkpointed.tokens())
        };
        finish().map_err(error)?;
        disk::commit(&journal.path, transaction)?;
        (self.next_seq, self.totals) = (seq, totals);
        self.empty_log()
    }

    fn walk_one(&self, selection: Selection, visit: &mut impl FnMut(Walked) -> Result<Go>) -> Result<Go> {
        let all = Range { row: 0, seq: 0, lines: self.next_seq };
        match selection {
            Selection::PresentByRow => {
                let mut near = Vec::with_capacity(NEAR_RANGES);
                let met = self.for_each_range(|range| {
                    near.push(range);
                    match near.len() == NEAR_RANGES || range.lines >= LONG_RANGE {
                        true => self.walk_near(&mut near, visit),
                        false => Ok(Go::On),
                    }
                })?;
                if met == Go::On { self.walk_near(&mut near, visit) } else { Ok(Go::Home) }
            }
            Selection::All => self.walk_range(all, |_, entry| visit(Walked { row: None, entry })),
            Selection::Present | Selection::Absent => {
                let mut present = BitSet::default();
                self.for_each_range(|range| {
                    present.extend(range.seq..range.seq + range.lines);
                    Ok(Go::On)
                })?;
                let is_wanted = |seq| present.contains(seq) == (selection == Selection::Present);
                self.walk_range(all, |seq, entry| match is_wanted(seq) {
                    true => visit(Walked { row: None, entry }),
                    false => Ok(Go::On),
                })
            }
        }
    }

    /// Walks over some ranges, and forgets them. Lines that were written about in the order of their rows
    /// lie side by side: one look at all of them takes less time than one for each.
    fn walk_near(&self, ranges: &mut Vec<Range>, visit: &mut impl FnMut(Walked) -> Result<Go>) -> Result<Go> {
        let near = span(ranges).map(|span| self.load(span)).transpose()?;
        for range in ranges.drain(..) {
            let mut visit = |seq, entry| visit(Walked { row: Some(range.row + seq - range.seq), entry });
            let Some((first, lines)) = &near else {
                if self.walk_range(range, visit)? == Go::Home {
                    return Ok(Go::Home);
                }
                continue;
            };
            for seq in range.seq..range.seq + range.lines {
                if let Some(entry) = lines[(seq - first) as usize]
                    && visit(seq, entry)? == Go::Home
                {
                    return Ok(Go::Home);
                }
            }
        }
        Ok(Go::On)
    }

    /// The lines from a number on.
    fn load(&self, span: Range) -> Result<(u64, Vec<Option<Entry>>)> {
        let mut lines = vec![None; span.lines as usize];
        self.walk_range(span, |seq, entry| {
            lines[(seq - span.seq) as usize] = Some(entry);
            Ok(Go::On)
        })?;
        Ok((span.seq, lines))
    }

    fn walk_range(&self, range: Range, mut visit: impl FnMut(u64, Entry) -> Result<Go>) -> Result<Go> {
        let error = |source| Error::journal(&self.path, source);
        let mut statement = self.db.prepare_cached(entry::LINES).map_err(error)?;
        let bounds = params![range.seq as i64, (range.seq + range.lines) as i64];
        let mut rows = statement.query(bounds).map_err(error)?;
        while let Some(row) = rows.next().map_err(error)? {
            let (seq, entry) = entry::read(row).map_err(error)?;
            if visit(seq, entry)? == Go::Home {
                return Ok(Go::Home);
            }
        }
        Ok(Go::On)
    }

    pub(super) fn for_each_range(&self, mut visit: impl FnMut(Range) -> Result<Go>) -> Result<Go> {
        let error = |source| Error::journal(&self.path, source);
        let mut statement = self.db.prepare(present::RANGES).map_err(error)?;
        let mut ranges = statement.query([]).map_err(error)?;
        while let Some(range) = ranges.next().map_err(error)? {
            if visit(present::read(range).map_err(error)?)? == Go::Home {
                return Ok(Go::Home);
            }
        }
        Ok(Go::On)
    }
}

/// What several ranges lie in, where it is little more than they are: at most 4 * 16,384 lines of about
/// 112 bytes, 7 MB.
fn span(ranges: &[Range]) -> Option<Range> {
    let seq = ranges.iter().map(|range| range.seq).min()?;
    let end = ranges.iter().map(|range| range.seq + range.lines).max()?;
    let wanted: u64 = ranges.iter().map(|range| range.lines).sum();
    let is_little = wanted <= NEAR_RANGES as u64 * LONG_RANGE && end - seq <= 4 * wanted;
    (ranges.len() > 1 && is_little).then_some(Range { row: 0, seq, lines: end - seq })
}
