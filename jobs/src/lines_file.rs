//! One file of lines that only grows: what lies beyond what the journal vouches for is cut off when it
//! is opened.

use std::fs::{File, OpenOptions};
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Bytes gathered before the system is asked to write, for each file.
const BUFFER_BYTES: usize = 1 << 18;

/// Appends lines to a file.
pub(crate) struct LinesFile {
    path: PathBuf,
    file: BufWriter<File>,
    length: u64,
    is_synced: bool,
}

impl LinesFile {
    /// Opens a file of which `committed` bytes count, and makes it where nothing does.
    pub(crate) fn open(path: PathBuf, committed: u64) -> Result<LinesFile> {
        let open = || {
            let mut file =
                OpenOptions::new().write(true).create(committed == 0).truncate(false).open(&path)?;
            let found = file.metadata()?.len();
            if found > committed {
                file.set_len(committed)?;
            }
            file.seek(SeekFrom::Start(committed.min(found)))?;
            Ok((file, found))
        };
        let (file, found) = open().map_err(|source: std::io::Error| match source.kind() {
            std::io::ErrorKind::NotFound if committed > 0 => {
                Error::LinesMissing { path: path.clone(), found: 0, committed }
            }
            _ => Error::write(&path, source),
        })?;
        if found < committed {
            return Err(Error::LinesMissing { path, found, committed });
        }
        let file = BufWriter::with_capacity(BUFFER_BYTES, file);
        Ok(LinesFile { path, file, length: committed, is_synced: true })
    }

    /// Appends a line; where it begins, and its length with its newline.
    pub(crate) fn append(&mut self, json: &[u8]) -> Result<(u64, u64)> {
        let write = self.file.write_all(json).and_then(|()| self.file.write_all(b"\n"));
        write.map_err(|source| Error::write(&self.path, source))?;
        let (offset, length) = (self.length, json.len() as u64 + 1);
        self.length += length;
        self.is_synced = false;
        Ok((offset, length))
    }

    /// Bytes so far.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// Puts all lines so far on disk.
    pub(crate) fn sync(&mut self) -> Result<()> {
        if !self.is_synced {
            let sync = self.file.flush().and_then(|()| self.file.get_ref().sync_data());
            sync.map_err(|source| Error::write(&self.path, source))?;
            self.is_synced = true;
        }
        Ok(())
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

    /// The line at a place, without its newline.
    pub(crate) fn read(&mut self, offset: u64, length: u64) -> Result<&[u8]> {
        let mut read = || {
            // Neighbours in the input are mostly near in the file too: a relative seek keeps the buffer.
            self.file.seek_relative(offset as i64 - self.position as i64)?;
            self.line.resize(length as usize, 0);
            self.file.read_exact(&mut self.line)
        };
        read().map_err(|source| Error::read(&self.path, source))?;
        self.position = offset + length;
        match self.line.split_last() {
            Some((b'\n', line)) if !line.contains(&b'\n') => Ok(line),
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

/// Makes what was created, renamed or removed in a folder last.
pub(crate) fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(|source| Error::write(folder, source))
}
