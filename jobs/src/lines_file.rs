//! One file of lines that only grows: what lies beyond what the journal vouches for is cut off when it
//! is opened.

use std::fs::{File, OpenOptions};
use std::io::{BufReader, ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crate::disk;
use crate::error::{Error, Result};
use crate::journal::{Entry, line_hash};

/// Bytes gathered before the system is asked to write, for each file.
const BUFFER_BYTES: usize = 1 << 18;

/// Appends lines to a file.
pub(crate) struct LinesFile {
    path: PathBuf,
    file: File,
    buffer: Vec<u8>,
    length: u64,
    is_synced: bool,
}

impl LinesFile {
    /// Opens a file of which `committed` bytes count, and makes it where nothing does.
    pub(crate) fn open(path: PathBuf, committed: u64) -> Result<LinesFile> {
        let mut options = OpenOptions::new();
        let opened = options.write(true).create(committed == 0).truncate(false).open(&path);
        let mut file = opened.map_err(|source| missing(&path, source, committed))?;
        let found = file.metadata().map_err(|source| Error::write(&path, source))?.len();
        if found < committed {
            return Err(Error::LinesMissing { path, found, committed });
        }
        if found > committed {
            disk::cut(&path, &file, committed)?;
        }
        file.seek(SeekFrom::Start(committed)).map_err(|source| Error::write(&path, source))?;
        Ok(LinesFile { path, file, buffer: vec![], length: committed, is_synced: true })
    }

    /// Appends a line; where it begins.
    pub(crate) fn append(&mut self, json: &[u8]) -> Result<u64> {
        if self.buffer.len() + json.len() >= BUFFER_BYTES {
            self.flush()?;
        }
        self.buffer.extend_from_slice(json);
        self.buffer.push(b'\n');
        let offset = self.length;
        self.length += json.len() as u64 + 1;
        self.is_synced = false;
        Ok(offset)
    }

    /// Bytes so far.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// Puts all lines so far on disk.
    pub(crate) fn sync(&mut self) -> Result<()> {
        if !self.is_synced {
            self.flush()?;
            disk::sync(&self.path, &self.file)?;
            self.is_synced = true;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        disk::append(&self.path, &mut self.file, &self.buffer)?;
        self.buffer.clear();
        Ok(())
    }
}

fn missing(path: &Path, source: std::io::Error, committed: u64) -> Error {
    match source.kind() {
        ErrorKind::NotFound if committed > 0 => {
            Error::LinesMissing { path: path.to_owned(), found: 0, committed }
        }
        _ => Error::write(path, source),
    }
}

/// Reads lines whose places are known.
pub(crate) struct PlacedLines {
    path: PathBuf,
    file: BufReader<File>,
    position: u64,
    line: Vec<u8>,
}

impl PlacedLines {
    pub(crate) fn open(path: PathBuf) -> Result<PlacedLines> {
        let file = File::open(&path).map_err(|source| Error::read(&path, source))?;
        let file = BufReader::with_capacity(BUFFER_BYTES, file);
        Ok(PlacedLines { path, file, position: 0, line: Vec::new() })
    }

    /// A line without its newline; another than the one that was written is refused.
    pub(crate) fn read(&mut self, entry: &Entry) -> Result<&[u8]> {
        let Entry { offset, length, hash, .. } = *entry;
        let mut read = || {
            // Neighbours in the input are mostly near in the file too: a relative seek keeps the buffer.
            self.file.seek_relative(offset as i64 - self.position as i64)?;
            self.line.resize(length as usize, 0);
            self.file.read_exact(&mut self.line)
        };
        read().map_err(|source| Error::read(&self.path, source))?;
        self.position = offset + length;
        match self.line.split_last() {
            Some((b'\n', line)) if line_hash(line) == hash => Ok(line),
            _ => {
                let message = format!(
                    "bytes {offset} to {} are not the line that was written there; \
                     restore the file, or pass --fresh to start over",
                    offset + length
                );
                Err(Error::malformed(&self.path, message))
            }
        }
    }
}
