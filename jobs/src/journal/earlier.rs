//! What the reader of a run takes along from those before it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use scheduler::{Generated, Request, RequestKey};

use super::in_order::InOrder;
use super::progress::InputProgress;
use super::refused::Refused;
use super::{Journal, Totals};
use crate::digest_map::{BUFFER_ENTRIES, Digest, DigestMap};
use crate::error::{Error, Result};
use crate::line::LineFile;

/// What earlier runs have done, and where the present one says how far it has read.
#[derive(Default)]
pub struct EarlierRuns {
    /// The output folder; nothing where there was no journal.
    pub(crate) folder: Option<PathBuf>,
    /// Lines that are there, those of rows that are looked at again among them.
    pub(crate) lines: u64,
    /// Rows that need not be computed again.
    pub finished: FinishedRows,
    /// Tokens of rows that have no line. Memory holds them all: they are no more than what earlier runs
    /// had in flight when they ended.
    so_far: HashMap<RequestKey, Generated>,
    pub(crate) input: Arc<InputProgress>,
}

/// Rows that need not be computed again.
#[derive(Default)]
pub struct FinishedRows {
    /// By their keys twice the number in the journal, and one more for an error line.
    rows: DigestMap,
    in_order: Option<InOrder>,
    count: u64,
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

impl EarlierRuns {
    pub(super) fn new(
        folder: &Path,
        lines: u64,
        finished: FinishedRows,
        so_far: HashMap<RequestKey, Generated>,
        input: Arc<InputProgress>,
    ) -> EarlierRuns {
        EarlierRuns { folder: Some(folder.to_owned()), lines, finished, so_far, input }
    }

    /// What is there of the answer to a request; it is handed out once.
    pub fn take_so_far(&mut self, request: &Request) -> Generated {
        // It always can where the journal is as it was written; what it is not is computed anew.
        self.so_far.remove(&request.key).filter(|so_far| request.goes_on_from(so_far)).unwrap_or_default()
    }
}

impl FinishedRows {
    /// How many there are.
    pub fn len(&self) -> u64 {
        self.count
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The finished row of a key, which stands at this position of the present input.
    pub fn find(&mut self, key: RequestKey, row: u64) -> Result<Option<FinishedRow>> {
        let place = self.place(&key.0.to_be_bytes())?;
        Ok(place.map(|place| {
            let file = if place.is_multiple_of(2) { LineFile::Output } else { LineFile::Errors };
            FinishedRow { row, file, seq: place / 2 }
        }))
    }

    fn place(&mut self, key: &Digest) -> Result<Option<u64>> {
        let Some(in_order) = &mut self.in_order else { return self.rows.get(key) };
        if let Some(place) = in_order.get(key).map_err(|source| self.rows.error(source))? {
            return Ok(Some(place));
        }
        let place = self.rows.get(key)?;
        if let Some(place) = place {
            in_order.miss(place).map_err(|source| self.rows.error(source))?;
        }
        Ok(place)
    }

    /// All rows of a journal, and what they sum up to. Where somebody takes those that are to be looked at again, they are not among
    /// the finished ones. What memory does not hold lies in the folder.
    pub(super) fn load(
        journal: &Journal,
        folder: &Path,
        mut refused: Option<&mut Refused>,
    ) -> Result<(FinishedRows, Totals)> {
        let error = |source| Error::journal(&journal.path, source);
        let (mut finished, mut totals) = (FinishedRows::default(), Totals::default());
        finished.rows.keep_files_in(folder);
        let query =
            "SELECT seq, key, file, prompt_tokens, generated_tokens, is_refusal FROM rows ORDER BY seq";
        // Fewer rows all lie in memory anyway, and need no file.
        let are_many = journal.next_seq > BUFFER_ENTRIES as u64;
        let in_order = are_many.then(|| InOrder::new(folder)).transpose();
        let mut in_order = in_order.map_err(|source| finished.rows.error(source))?;
        let mut statement = journal.db.prepare(query).map_err(error)?;
        let mut rows = statement.query([]).map_err(error)?;
        while let Some(row) = rows.next().map_err(error)? {
            let number = |column| row.get::<_, i64>(column).map(|number| number as u64).map_err(error);
            let file = LineFile::of_index(number(2)? as usize);
            let is_error = file == Some(LineFile::Errors);
            match is_error {
                true => totals.error_lines += 1,
                false => totals.output_lines += 1,
            }
            totals.prompt_tokens += number(3)?;
            totals.generated_tokens += number(4)?;
            let (key, seq) = (row.get(1).map_err(error)?, number(0)?);
            if let Some(refused) = &mut refused
                && row.get(5).map_err(error)?
            {
                refused.add(key, seq)?;
                continue;
            }
            let place = 2 * seq + u64::from(is_error);
            finished.rows.insert(key, place)?;
            if let Some(in_order) = &mut in_order {
                in_order.push(&key, place).map_err(|source| finished.rows.error(source))?;
            }
            finished.count += 1;
        }
        finished.rows.compact()?;
        if let Some(in_order) = &mut in_order {
            in_order.finish().map_err(|source| finished.rows.error(source))?;
        }
        finished.in_order = in_order;
        Ok((finished, totals))
    }
}
