//! `output.jsonl` and `errors.jsonl`: where lines end up.
//!
//! Lines are appended as they are completed, so that what is on disk is always whole lines up to the
//! last flush. A job that wants the order of its input gets it at the end: each file is rewritten
//! beside itself and takes its own place in one step. Memory holds the place of each line, never its
//! text.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::line::{Line, LineFile};
use crate::manifest::Manifest;

/// Bytes gathered before the system is asked to write, for each file.
const BUFFER_BYTES: usize = 1 << 18;

/// The order of lines in a finished file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Order {
    /// That of the input.
    #[default]
    Input,
    /// That in which rows were completed.
    Completion,
}

/// Writes the lines of one job.
pub struct Writer {
    order: Order,
    output: LinesFile,
    errors: LinesFile,
}

/// What a job has written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Written {
    /// Lines in `output.jsonl`.
    pub output_lines: u64,
    /// Lines in `errors.jsonl`.
    pub error_lines: u64,
}

impl Writer {
    /// Opens both files of an output folder, which is made where there is none.
    ///
    /// A folder that holds the lines of an earlier run is refused, unless the job starts `fresh`:
    /// then they are thrown away, and the manifest that speaks of them too.
    pub fn create(folder: &Path, order: Order, fresh: bool) -> Result<Writer> {
        std::fs::create_dir_all(folder).map_err(|source| Error::write(folder, source))?;
        let paths = [LineFile::Output, LineFile::Errors].map(|file| folder.join(file.name()));
        if fresh {
            paths.iter().chain([&folder.join(Manifest::FILE_NAME)]).try_for_each(|path| remove(path))?;
        } else if let Some(path) = paths.iter().find(|path| path.exists()) {
            return Err(Error::OutputExists { path: path.clone() });
        }
        let [output, errors] = paths;
        Ok(Writer { order, output: LinesFile::create(output)?, errors: LinesFile::create(errors)? })
    }

    /// Appends a line to the file it belongs to.
    pub fn write(&mut self, line: &Line) -> Result<()> {
        match line.file {
            LineFile::Output => self.output.append(line),
            LineFile::Errors => self.errors.append(line),
        }
    }

    /// Hands all lines so far to the system, so that another process sees them.
    pub fn flush(&mut self) -> Result<()> {
        self.output.flush()?;
        self.errors.flush()
    }

    /// Lines so far.
    pub fn written(&self) -> Written {
        Written { output_lines: self.output.index.len() as u64, error_lines: self.errors.index.len() as u64 }
    }

    /// Puts both files in order and on disk. A job that was interrupted ends so too.
    pub fn finish(self) -> Result<Written> {
        let written = self.written();
        self.output.finish(self.order)?;
        self.errors.finish(self.order)?;
        Ok(written)
    }
}

/// One file of lines and where each of them lies.
struct LinesFile {
    path: PathBuf,
    file: BufWriter<File>,
    len: u64,
    index: Vec<Place>,
}

/// Where the line of a row lies; it ends at its newline.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    row: u64,
    offset: u64,
}

impl LinesFile {
    fn create(path: PathBuf) -> Result<LinesFile> {
        let file =
            OpenOptions::new().write(true).create_new(true).open(&path).map_err(|source| {
                match source.kind() {
                    ErrorKind::AlreadyExists => Error::OutputExists { path: path.clone() },
                    _ => Error::write(&path, source),
                }
            })?;
        Ok(LinesFile { path, file: BufWriter::with_capacity(BUFFER_BYTES, file), len: 0, index: Vec::new() })
    }

    fn append(&mut self, line: &Line) -> Result<()> {
        assert!(!line.json.contains('\n'), "the line of row {} holds a newline", line.row);
        let write = self.file.write_all(line.json.as_bytes()).and_then(|()| self.file.write_all(b"\n"));
        write.map_err(|source| Error::write(&self.path, source))?;
        self.index.push(Place { row: line.row, offset: self.len });
        self.len += line.json.len() as u64 + 1;
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        self.file.flush().map_err(|source| Error::write(&self.path, source))
    }

    fn finish(mut self, order: Order) -> Result<()> {
        self.flush()?;
        self.file.get_ref().sync_all().map_err(|source| Error::write(&self.path, source))?;
        if order == Order::Completion || self.index.is_sorted() {
            return Ok(());
        }
        self.index.sort_unstable();
        let temporary = self.path.with_extension("jsonl.sorting");
        copy_in_order(&self.path, &self.index, &temporary)?;
        std::fs::rename(&temporary, &self.path).map_err(|source| Error::write(&self.path, source))
    }
}

/// Writes the lines of `from` into a new file, in the order of `places`.
fn copy_in_order(from: &Path, places: &[Place], to: &Path) -> Result<()> {
    let read_error = |source| Error::read(from, source);
    let write_error = |source| Error::write(to, source);
    let mut source = BufReader::new(File::open(from).map_err(read_error)?);
    let mut target = BufWriter::with_capacity(BUFFER_BYTES, File::create(to).map_err(write_error)?);
    let mut position = 0u64;
    let mut line = Vec::new();
    for place in places {
        // Neighbours in the input are mostly near in the file too: a relative seek keeps the buffer.
        source.seek_relative(place.offset as i64 - position as i64).map_err(read_error)?;
        line.clear();
        position = place.offset + source.read_until(b'\n', &mut line).map_err(read_error)? as u64;
        target.write_all(&line).map_err(write_error)?;
    }
    let file = target.into_inner().map_err(|error| write_error(error.into_error()))?;
    file.sync_all().map_err(write_error)
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::write(path, error)),
        _ => Ok(()),
    }
}
