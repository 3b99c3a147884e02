//! The rows of an input file, one after the other.
//!
//! A line that cannot be a request is handed out as a rejected row with its line number; only a file
//! that cannot be read ends the reading. A row that an earlier run has finished is known by its key and
//! is not prepared again. What is remembered of the lines so far is 128 bits of the hash of each name, so
//! that a repeated one is noticed, and most of that on disk (`digest_map`).

use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;

use scheduler::RequestKey;
use serde_json::{Map, Value};

use crate::batch_line;
use crate::body::Body;
use crate::error::{Error, Result, RowError};
use crate::grade::Truth;
use crate::journal::EarlierRuns;
use crate::line::hex;
use crate::manifest::InputRecord;
use crate::plain_row::{self, PromptTemplates};
use crate::prepare::Preparer;
use crate::prepared::{PreparedRow, RejectedRow, Row};
use crate::raw_lines::{RawLine, RawLines};
use crate::row_keys::{KeyedLine, RowKeys};

/// Longest line that is read as a row. Far beyond any context of a model, and little beside its weights.
pub const MAX_LINE_BYTES: usize = 64 << 20;

/// Streams the rows of one input file.
pub struct Reader {
    lines: RawLines,
    preparer: Preparer,
    keys: RowKeys,
    earlier: EarlierRuns,
    rows: u64,
    limit: u64,
    every: u64,
    is_ended: bool,
}

impl Reader {
    /// Opens an input file, of which the first `limit` rows are read.
    pub fn open(path: &Path, preparer: Preparer, limit: Option<u64>) -> Result<Reader> {
        Ok(Reader {
            lines: RawLines::open(path, MAX_LINE_BYTES)?,
            keys: RowKeys::new(preparer.key_maker(), preparer.templates().is_some()),
            preparer,
            earlier: EarlierRuns::default(),
            rows: 0,
            limit: limit.unwrap_or(u64::MAX),
            every: 1,
            is_ended: false,
        })
    }

    /// This reader in a run after others: rows that those have finished are told by their places only.
    /// The run's commits tell from now on how far it has read.
    pub fn after(mut self, earlier: EarlierRuns) -> Reader {
        if let Some(folder) = &earlier.folder {
            self.keys.keep_files_in(folder);
        }
        earlier.input.size.store(self.lines.size(), Relaxed);
        Reader { earlier, ..self }
    }

    /// This reader handing out each `every`-th row only, from the first on, for a look at a job rather than its run: the
    /// others are counted and not looked into, so that a name they repeat goes unnoticed.
    pub fn sampled(self, every: NonZeroU64) -> Reader {
        Reader { every: every.get(), ..self }
    }

    /// What was read so far, for the manifest: of the whole file, once the iterator has ended without
    /// a limit.
    pub fn record(&self) -> InputRecord {
        let (bytes, hash) = self.lines.read_so_far();
        let path = PathBuf::from(self.lines.path());
        InputRecord { path, blake3: hash.to_hex().to_string(), bytes, rows: self.rows }
    }

    /// How many rows, and how many of the file's bytes, were read so far.
    pub fn position(&self) -> (u64, u64) {
        (self.rows, self.lines.bytes())
    }

    /// Whether the reading ended, or will, before the file does.
    pub fn is_limited(&self) -> bool {
        self.rows == self.limit
    }

    fn read(&mut self) -> Result<Option<Row>> {
        let Some((place, raw)) = self.next_line()? else { return Ok(None) };
        let line = place.line;
        let (key, line) = self.keys.next(line, &raw)?;
        Ok(Some(match line {
            KeyedLine::Broken(error) => place.rejected(key, None, error),
            KeyedLine::Plain(row) => self.plain_row(place, key, row)?,
            KeyedLine::Nameless(line) => {
                let error = batch_line::parse(&line).expect_err("a batch line without custom_id is refused");
                place.rejected(key, None, error)
            }
            KeyedLine::Batch { custom_id, line } => self.batch_line(place, key, custom_id, &line)?,
            KeyedLine::Repeated { custom_id, first } => {
                let message = format!("{custom_id:?} was used on line {first} already");
                let error = RowError::of("custom_id", "duplicate_custom_id", message);
                place.rejected(key, Some(custom_id), error)
            }
        }))
    }

    /// The next line to look into.
    fn next_line(&mut self) -> Result<Option<(Place, RawLine)>> {
        while self.rows < self.limit {
            let Some((line, raw)) = self.lines.next()? else { return self.end() };
            let place = Place { index: self.rows, line };
            self.rows += 1;
            self.earlier.input.rows.store(self.rows, Relaxed);
            self.earlier.input.bytes.store(self.lines.bytes(), Relaxed);
            if place.index.is_multiple_of(self.every) {
                return Ok(Some((place, raw)));
            }
        }
        Ok(None)
    }

    /// An input that has lost all of its rows was hardly meant to: it is not read as one that they have left.
    fn end<T>(&self) -> Result<Option<T>> {
        if let (0, lines @ 1..) = (self.rows, self.earlier.lines) {
            return Err(Error::InputEmpty { path: self.lines.path().to_owned(), lines });
        }
        self.earlier.input.is_ended.store(true, Relaxed);
        Ok(None)
    }

    fn plain_row(&mut self, place: Place, key: RequestKey, row: Map<String, Value>) -> Result<Row> {
        if let Some(row) = self.earlier.finished.find(key, place.index)? {
            return Ok(Row::Finished(row));
        }
        let custom_id = plain_row::own_id(&row).unwrap_or_else(|| format!("row-{}", hex(key)));
        let templates: &PromptTemplates =
            self.preparer.templates().expect("rows are plain where there are any");
        let truth = self.preparer.grader().map(|grader| grader.truth(&row)).transpose();
        let asked = templates.render(&row).and_then(|prompt| {
            let body = Body::of(prompt, Default::default());
            Ok(Asked { body, truth: truth? })
        });
        Ok(self.prepared(place, key, custom_id, asked))
    }

    fn batch_line(
        &mut self,
        place: Place,
        key: RequestKey,
        custom_id: String,
        line: &Map<String, Value>,
    ) -> Result<Row> {
        let asked = batch_line::parse(line).map(|body| Asked { body, truth: None });
        Ok(match self.earlier.finished.find(key, place.index)? {
            // The envelope is no part of the key, and may have been broken since.
            Some(row) if asked.is_ok() => Row::Finished(row),
            _ => self.prepared(place, key, custom_id, asked),
        })
    }

    fn prepared(
        &mut self,
        place: Place,
        key: RequestKey,
        custom_id: String,
        asked: Result<Asked, RowError>,
    ) -> Row {
        let prepare = |asked: Asked| Ok((self.preparer.prepare(asked.body, key)?, asked.truth));
        match asked.and_then(prepare) {
            Ok(((request, reply), truth)) => {
                let Place { index, line } = place;
                let so_far = self.earlier.take_so_far(&request);
                Row::Request(Box::new(PreparedRow { index, line, custom_id, request, so_far, reply, truth }))
            }
            Err(error) => place.rejected(key, Some(custom_id), error),
        }
    }
}

impl Iterator for Reader {
    type Item = Result<Row>;

    fn next(&mut self) -> Option<Result<Row>> {
        if self.is_ended {
            return None;
        }
        let row = self.read().transpose();
        self.is_ended = !matches!(row, Some(Ok(_)));
        row
    }
}

/// What a row asks.
struct Asked {
    body: Body,
    truth: Option<Truth>,
}

/// Where a row stands.
#[derive(Clone, Copy)]
struct Place {
    index: u64,
    line: u64,
}

impl Place {
    fn rejected(self, key: RequestKey, custom_id: Option<String>, error: RowError) -> Row {
        Row::Rejected(RejectedRow { index: self.index, line: self.line, custom_id, key, error })
    }
}
