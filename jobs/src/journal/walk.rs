//! Walking over all lines that count, and putting them in order: memory holds one bit a row.

use rusqlite::{Connection, Row};
use scheduler::RequestKey;

use super::{Entry, Journal, Lengths, insert, set_length};
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

const COLUMNS: &str = "seq, key, file, offset, length, is_refusal, prompt_tokens, generated_tokens";

impl Journal {
    /// Shows each line of the selections, one selection after the other.
    pub(crate) fn walk(
        &self,
        selections: &[Selection],
        mut visit: impl FnMut(Entry) -> Result<()>,
    ) -> Result<()> {
        let present = self.present()?;
        selections.iter().try_for_each(|selection| self.walk_one(*selection, &present, &mut visit))
    }

    /// Rewrites which lines of these files count. `rewrite` walks over the old ones and hands out each
    /// that stays with its new place; the files it makes take their places after this.
    pub(crate) fn replace(
        &mut self,
        files: &[LineFile],
        rewrite: impl FnOnce(&Journal, &mut dyn FnMut(Entry) -> Result<()>) -> Result<Lengths>,
    ) -> Result<()> {
        let journal: &Journal = self;
        let error = |source| Error::journal(&journal.path, source);
        journal.db.execute_batch("BEGIN IMMEDIATE").map_err(error)?;
        let first = journal.next_seq;
        let mut seq = first;
        let replaced = rewrite(journal, &mut |entry| {
            insert(&journal.db, seq, &entry).map_err(error)?;
            seq += 1;
            Ok(())
        })
        .and_then(|lengths| {
            let finish = || {
                for file in LineFile::ALL {
                    set_length(&journal.db, file, lengths[file.index()], files.contains(&file))?;
                }
                for file in files {
                    let old = [file.index() as i64, first as i64];
                    journal.db.execute("DELETE FROM rows WHERE file = ? AND seq < ?", old)?;
                }
                journal.db.execute_batch("DELETE FROM present; COMMIT")
            };
            finish().map_err(error)
        });
        if replaced.is_err() {
            // What went wrong is said already; a connection that cannot roll back does so when it ends.
            let _ = self.db.execute_batch("ROLLBACK");
        } else {
            self.next_seq = seq;
        }
        replaced
    }

    fn walk_one(
        &self,
        selection: Selection,
        present: &Bits,
        visit: &mut impl FnMut(Entry) -> Result<()>,
    ) -> Result<()> {
        let error = |source| Error::journal(&self.path, source);
        // Lines that a rewriting adds meanwhile come behind those that were there.
        let query = match selection {
            Selection::PresentByRow => {
                format!("SELECT {COLUMNS} FROM present JOIN rows USING (seq) WHERE seq < ? ORDER BY row")
            }
            _ => format!("SELECT {COLUMNS} FROM rows WHERE seq < ? ORDER BY seq"),
        };
        let mut statement = self.db.prepare(&query).map_err(error)?;
        let mut rows = statement.query([self.next_seq as i64]).map_err(error)?;
        while let Some(row) = rows.next().map_err(error)? {
            let (seq, entry) = read(row).map_err(error)?;
            let is_wanted = match selection {
                Selection::PresentByRow | Selection::All => true,
                Selection::Present => present.has(seq),
                Selection::Absent => !present.has(seq),
            };
            if is_wanted {
                visit(entry)?;
            }
        }
        Ok(())
    }

    fn present(&self) -> Result<Bits> {
        Bits::load(&self.db).map_err(|source| Error::journal(&self.path, source))
    }
}

fn read(row: &Row<'_>) -> rusqlite::Result<(u64, Entry)> {
    let number = |column| row.get::<_, i64>(column).map(|number| number as u64);
    let file = LineFile::of_index(row.get::<_, i64>(2)? as usize);
    let entry = Entry {
        key: RequestKey(u128::from_be_bytes(row.get(1)?)),
        file: file.ok_or(rusqlite::Error::IntegralValueOutOfRange(2, row.get(2)?))?,
        offset: number(3)?,
        length: number(4)?,
        is_refusal: row.get(5)?,
        prompt_tokens: number(6)?,
        generated_tokens: number(7)?,
    };
    Ok((number(0)?, entry))
}

/// A bit for each line in the journal: its row is in the present input.
#[derive(Default)]
struct Bits(Vec<u64>);

impl Bits {
    fn load(db: &Connection) -> rusqlite::Result<Bits> {
        let mut bits = Bits::default();
        let mut statement = db.prepare("SELECT seq FROM present")?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            bits.set(row.get::<_, i64>(0)? as u64);
        }
        Ok(bits)
    }

    fn set(&mut self, seq: u64) {
        let word = (seq / 64) as usize;
        if word >= self.0.len() {
            self.0.resize(word + 1, 0);
        }
        self.0[word] |= 1 << (seq % 64);
    }

    fn has(&self, seq: u64) -> bool {
        self.0.get((seq / 64) as usize).is_some_and(|word| word >> (seq % 64) & 1 == 1)
    }
}
