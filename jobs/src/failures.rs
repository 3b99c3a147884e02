//! Why rows of a job have failed, by the error lines that count.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use crate::error::{Error, Result};
use crate::journal::JournalView;
use crate::line::LineFile;
use crate::lines_file::PlacedLines;

/// Why rows have failed, of all runs of a job.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Failures {
    /// How many rows have failed with each code.
    pub by_code: BTreeMap<String, u64>,
    /// That of the first line.
    pub first: Option<FirstFailure>,
}

/// What the first error line says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirstFailure {
    /// Its line of the input, from 1; a row that failed while it was computed has none.
    pub line: Option<u64>,
    /// Its `custom_id`, if it has one.
    pub custom_id: Option<String>,
    /// What is wrong with it.
    pub message: String,
}

impl Failures {
    /// Those of an output folder, as its journal has them. Memory does not grow with their number.
    ///
    /// # Errors
    /// A folder without a job; an error line that cannot be read, or is another than the one that was written.
    pub fn of(folder: &Path) -> Result<Failures> {
        let path = folder.join(LineFile::Errors.name());
        let mut failures = Failures::default();
        let mut lines = None;
        JournalView::of_job(folder)?.for_each_entry(|entry| {
            if entry.file != LineFile::Errors {
                return Ok(());
            }
            let lines = match &mut lines {
                Some(open) => open,
                none => none.insert(PlacedLines::open(path.clone())?),
            };
            let line = serde_json::from_slice(lines.read(entry)?);
            failures.add(line.map_err(|error| Error::malformed(&path, error))?);
            Ok(())
        })?;
        Ok(failures)
    }

    fn add(&mut self, ErrorLine { custom_id, response, error }: ErrorLine) {
        let Some(Reason { code, message, line }) = error.or_else(|| response.map(|it| it.body.error)) else {
            return;
        };
        *self.by_code.entry(code).or_default() += 1;
        self.first.get_or_insert(FirstFailure { line, custom_id, message });
    }
}

/// What [`crate::Line`] writes into `errors.jsonl`.
#[derive(Deserialize)]
struct ErrorLine {
    custom_id: Option<String>,
    response: Option<Response>,
    error: Option<Reason>,
}

#[derive(Deserialize)]
struct Response {
    body: Body,
}

#[derive(Deserialize)]
struct Body {
    error: Reason,
}

#[derive(Deserialize)]
struct Reason {
    code: String,
    message: String,
    line: Option<u64>,
}
