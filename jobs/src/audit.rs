//! Proves a result complete, or names what is wrong with it: each row of the input has one line, each
//! line is the one that was written, and nothing else is there.
//!
//! Files, journal and input are each read once from their beginning to their end, and memory does not
//! grow with them. Nothing is changed. The model is not needed: the journal knows what keys are made of.

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind};
use std::path::{Path, PathBuf};

use crate::bit_set::BitSet;
use crate::error::{Error, Result};
use crate::folder;
use crate::journal::{Entry, FinishedRows, JournalView, line_hash};
use crate::key::KeyMaker;
use crate::line::{LineFile, hex};
use crate::raw_lines::RawLines;
use crate::reader::MAX_LINE_BYTES;
use crate::row_keys::{KeyedLine, RowKeys};
use crate::writer::Order;

/// What is looked at.
#[derive(Debug, Clone)]
pub struct AuditOptions {
    /// The output folder.
    pub folder: PathBuf,
    /// The rows that must have a line.
    pub input: PathBuf,
    /// The order that lines are to have, where it is known.
    pub order: Option<Order>,
    /// Rows that the job was to read, where not all: those behind them need no line.
    pub limit: Option<u64>,
    /// Findings that are spelled out; the others are counted.
    pub most_findings: usize,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Audit {
    /// Rows of the input.
    pub rows: u64,
    /// Lines in `output.jsonl` that the journal has.
    pub output_lines: u64,
    /// Lines in `errors.jsonl` that the journal has.
    pub error_lines: u64,
    /// The first things that are wrong.
    pub findings: Vec<Finding>,
    /// All things that are wrong.
    pub num_findings: u64,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The file.
    pub file: PathBuf,
    /// The line of it, from 1.
    pub line: u64,
    /// What is wrong there.
    pub what: String,
}

impl Audit {
    /// Whether nothing is wrong.
    pub fn is_complete(&self) -> bool {
        self.num_findings == 0
    }

    /// Looks at the result of a job that nobody works on.
    ///
    /// # Errors
    /// A folder without a job, or one that a run works on; an input that cannot be read.
    pub fn of(options: &AuditOptions) -> Result<Audit> {
        let folder = &options.folder;
        let view = JournalView::of_job(folder)?;
        if let Some(holder) = folder::at_work(folder)? {
            return Err(Error::FolderInUse { path: folder.clone(), holder });
        }
        let mut findings = Findings { all: 0, most: options.most_findings, named: vec![] };
        let mut finished = view.finished()?;
        let [output_lines, error_lines] = check_lines(&view, folder, &mut finished, &mut findings)?;
        let rows = check_rows(&view, options, &mut finished, &mut findings)?;
        let Findings { all, named, .. } = findings;
        Ok(Audit { rows, output_lines, error_lines, findings: named, num_findings: all })
    }
}

struct Findings {
    all: u64,
    most: usize,
    named: Vec<Finding>,
}

impl Findings {
    fn add(&mut self, file: &Path, line: u64, what: impl FnOnce() -> String) {
        self.all += 1;
        if self.named.len() < self.most {
            self.named.push(Finding { file: file.to_owned(), line, what: what() });
        }
    }
}

/// The files that hold rows.
const FILES: [LineFile; 2] = [LineFile::Output, LineFile::Errors];

/// Compares the files with the journal, both in the order of lines; how many lines each has by the journal.
fn check_lines(
    view: &JournalView,
    folder: &Path,
    finished: &mut FinishedRows,
    findings: &mut Findings,
) -> Result<[u64; 2]> {
    for file in view.replaced()? {
        let what =
            || "waits to be replaced by the file beside it; the job's own command does that".to_owned();
        findings.add(&folder.join(file.name()), 1, what);
    }
    let mut lines = FILES.map(|file| Lines::open(folder, file));
    let mut counts = [0; 2];
    view.for_each_entry(|entry| {
        let index = entry.file.index();
        let lines = match &mut lines[index] {
            Ok(lines) => lines,
            Err(_) => return Ok(()),
        };
        counts[index] += 1;
        lines.expect(entry, finished, findings)
    })?;
    for lines in lines {
        lines?.expect_end(findings)?;
    }
    let stale = folder.join(LineFile::Stale.name());
    let found = std::fs::metadata(&stale).map_or(0, |file| file.len());
    let expected = view.length(LineFile::Stale)?;
    if found != expected {
        findings.add(&stale, 1, || format!("the file has {found} bytes, the journal vouches for {expected}"));
    }
    Ok(counts)
}

/// One file of lines on its way from the first to the last.
struct Lines {
    path: PathBuf,
    file: LineFile,
    reader: Option<BufReader<File>>,
    /// Of the line in `line`, or of the last that was taken.
    number: u64,
    line: Vec<u8>,
    is_ahead: bool,
}

impl Lines {
    fn open(folder: &Path, file: LineFile) -> Result<Lines> {
        let path = folder.join(file.name());
        let reader = match File::open(&path) {
            Ok(file) => Some(BufReader::with_capacity(1 << 18, file)),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(source) => return Err(Error::read(&path, source)),
        };
        Ok(Lines { path, file, reader, number: 0, line: vec![], is_ahead: false })
    }

    /// Reads a line ahead, where it is not read yet; whether there is one.
    fn peek(&mut self) -> Result<bool> {
        if !self.is_ahead
            && let Some(reader) = &mut self.reader
        {
            self.line.clear();
            reader.read_until(b'\n', &mut self.line).map_err(|source| Error::read(&self.path, source))?;
            self.is_ahead = !self.line.is_empty();
            self.number += u64::from(self.is_ahead);
        }
        Ok(self.is_ahead)
    }

    /// Takes the line of an entry, and tells of what stands there in its place.
    fn expect(&mut self, entry: &Entry, finished: &mut FinishedRows, findings: &mut Findings) -> Result<()> {
        loop {
            if !self.peek()? {
                findings.add(&self.path, self.number + 1, || missing(entry));
                return Ok(());
            }
            let is_whole = self.line.last() == Some(&b'\n');
            if is_whole && line_hash(&self.line[..self.line.len() - 1]) == entry.hash {
                self.is_ahead = false;
                return Ok(());
            }
            let key = key_of(&self.line);
            let place = |finished: &mut FinishedRows, key| finished.find(key, 0);
            let found = match key {
                Some(key) if key != entry.key => Some((key, place(finished, key)?)),
                _ => None,
            };
            match found {
                // What stands here says that it is this row's line, or nothing that can be read.
                None => {
                    let what = if is_whole { "altered since it was written" } else { "torn" };
                    findings.add(&self.path, self.number, || format!("{what}{}", name(&self.line)));
                    self.is_ahead = false;
                    return Ok(());
                }
                Some((_, Some(other))) if other.file == self.file => {
                    let own = place(finished, entry.key)?.map_or(0, |row| row.seq);
                    if other.seq > own {
                        findings.add(&self.path, self.number, || missing(entry));
                        return Ok(());
                    }
                    let what = || format!("a line that stands elsewhere too{}", name(&self.line));
                    findings.add(&self.path, self.number, what);
                }
                Some(_) => {
                    let what = || format!("a line that the job did not write{}", name(&self.line));
                    findings.add(&self.path, self.number, what);
                }
            }
            self.is_ahead = false;
        }
    }

    /// Tells of all that stands behind the last line.
    fn expect_end(&mut self, findings: &mut Findings) -> Result<()> {
        while self.peek()? {
            let what = || format!("a line behind the last that the job wrote{}", name(&self.line));
            findings.add(&self.path, self.number, what);
            self.is_ahead = false;
        }
        Ok(())
    }
}

fn missing(entry: &Entry) -> String {
    format!("the line batch_req_{} is missing here", hex(entry.key))
}

/// The key that a line carries in its first field.
fn key_of(line: &[u8]) -> Option<scheduler::RequestKey> {
    let digits = line.strip_prefix(br#"{"id":"batch_req_"#)?.get(..32)?;
    let digits = std::str::from_utf8(digits).ok()?;
    u128::from_str_radix(digits, 16).ok().map(scheduler::RequestKey)
}

/// A line's `custom_id` in brackets, where it has one.
fn name(line: &[u8]) -> String {
    let line: Option<serde_json::Value> = serde_json::from_slice(line).ok();
    let custom_id = line.as_ref().and_then(|line| line["custom_id"].as_str());
    custom_id.map(|custom_id| format!(" ({custom_id})")).unwrap_or_default()
}

/// Looks for the line of each row of the input; how many rows there are.
fn check_rows(
    view: &JournalView,
    options: &AuditOptions,
    finished: &mut FinishedRows,
    findings: &mut Findings,
) -> Result<u64> {
    let settings = view.settings()?;
    let [_, prompt, ..] = settings.identity.as_slice() else {
        let message = "the journal does not say what keys are made of; run the job again, and it will";
        return Err(Error::malformed(&options.folder, message));
    };
    let maker = KeyMaker::new(&settings.identity.iter().map(String::as_str).collect::<Vec<_>>());
    let mut keys = RowKeys::new(maker, prompt != "null");
    keys.keep_files_in(&std::env::temp_dir());
    let mut input = RawLines::open(&options.input, MAX_LINE_BYTES)?;
    let (mut rows, mut seen) = (0, BitSet::default());
    let mut last_seqs = [0; FILES.len()];
    while let Some((number, raw)) = input.next()? {
        let (key, line) = keys.next(number, &raw)?;
        let Some(row) = finished.find(key, rows)? else {
            let name = match &line {
                KeyedLine::Batch { custom_id, .. } | KeyedLine::Repeated { custom_id, .. } => {
                    format!(" ({custom_id})")
                }
                _ => String::new(),
            };
            if options.limit.is_none_or(|limit| rows < limit) {
                findings.add(&options.input, number, || format!("a row without a line{name}"));
            }
            rows += 1;
            continue;
        };
        rows += 1;
        seen.insert(row.seq);
        let last = &mut last_seqs[row.file.index()];
        // Lines of rows behind a limit stand as they were done.
        let is_ordered =
            options.order == Some(Order::Input) && options.limit.is_none_or(|limit| rows <= limit);
        if row.seq < *last && is_ordered {
            let file = row.file.name();
            findings
                .add(&options.input, number, || format!("the line in {file} stands before an earlier row's"));
        }
        *last = row.seq.max(*last);
    }
    if seen.len() < finished.len() {
        name_strangers(view, options, finished, &seen, findings)?;
    }
    Ok(rows)
}

/// Names the lines of rows that the input does not have, and second lines of those it has.
fn name_strangers(
    view: &JournalView,
    options: &AuditOptions,
    finished: &mut FinishedRows,
    seen: &BitSet,
    findings: &mut Findings,
) -> Result<()> {
    let mut numbers = [0; FILES.len()];
    let mut met = BitSet::default();
    view.for_each_entry(|entry| {
        let index = entry.file.index();
        numbers[index] += 1;
        let what = match finished.find(entry.key, 0)? {
            Some(row) if seen.contains(row.seq) => match met.insert(row.seq) {
                true => return Ok(()),
                false => "a second line of its row",
            },
            _ => "the line of no row of the input",
        };
        let what = || format!("batch_req_{} is {what}", hex(entry.key));
        findings.add(&options.folder.join(entry.file.name()), numbers[index], what);
        Ok(())
    })
}
