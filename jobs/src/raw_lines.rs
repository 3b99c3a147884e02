//! The input file as lines of bytes, in memory that does not depend on the file.
//!
//! A line too long to be a row is passed over without being held. Every byte that is read goes into
//! the file's hash.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Bytes read from the system at once.
const BUFFER_BYTES: usize = 1 << 16;

/// Lines of one file.
pub(crate) struct RawLines {
    path: PathBuf,
    file: BufReader<File>,
    hasher: blake3::Hasher,
    size: u64,
    bytes: u64,
    line: u64,
    max_line_bytes: usize,
}

/// One line, without its end and without a byte order mark.
#[derive(Debug, PartialEq)]
pub(crate) enum RawLine {
    /// Its bytes.
    Whole(Vec<u8>),
    /// Too long to be held: how many bytes it has, and their hash.
    TooLong { bytes: u64, hash: blake3::Hash },
}

impl RawLines {
    pub(crate) fn open(path: &Path, max_line_bytes: usize) -> Result<RawLines> {
        let file = File::open(path).map_err(|source| Error::read(path, source))?;
        // A directory opens like a file, and only reading it fails, after the job has begun.
        let metadata = file.metadata().map_err(|source| Error::read(path, source))?;
        if metadata.is_dir() {
            return Err(Error::malformed(path, "is a directory, expected a file"));
        }
        Ok(RawLines {
            path: path.to_owned(),
            file: BufReader::with_capacity(BUFFER_BYTES, file),
            hasher: blake3::Hasher::new(),
            size: metadata.len(),
            bytes: 0,
            line: 0,
            max_line_bytes,
        })
    }

    /// The next line that is not blank, with its number.
    pub(crate) fn next(&mut self) -> Result<Option<(u64, RawLine)>> {
        while let Some(line) = self.next_line()? {
            if !matches!(&line, RawLine::Whole(bytes) if bytes.trim_ascii().is_empty()) {
                return Ok(Some((self.line, line)));
            }
        }
        Ok(None)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The file's bytes when it was opened.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Bytes read so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes read so far, and their hash.
    pub(crate) fn read_so_far(&self) -> (u64, blake3::Hash) {
        (self.bytes, self.hasher.finalize())
    }

    fn next_line(&mut self) -> Result<Option<RawLine>> {
        let mut held = Vec::new();
        // Set once the line has outgrown what may be held.
        let mut passed: Option<(u64, blake3::Hasher)> = None;
        let mut is_ended = false;
        let start = self.bytes;
        while !is_ended {
            let part = self.file.fill_buf().map_err(|source| Error::read(&self.path, source))?;
            if part.is_empty() {
                break;
            }
            let newline = part.iter().position(|&byte| byte == b'\n');
            let (content, taken) = newline.map_or((part, part.len()), |at| (&part[..at], at + 1));
            match &mut passed {
                Some((bytes, hasher)) => {
                    *bytes += content.len() as u64;
                    hasher.update(content);
                }
                None => held.extend_from_slice(content),
            }
            if passed.is_none() && held.len() > self.max_line_bytes {
                let mut hasher = blake3::Hasher::new();
                hasher.update(&held);
                passed = Some((held.len() as u64, hasher));
                held = Vec::new();
            }
            is_ended = newline.is_some();
            self.hasher.update(&part[..taken]);
            self.bytes += taken as u64;
            self.file.consume(taken);
        }
        if self.bytes == start {
            return Ok(None);
        }
        self.line += 1;
        Ok(Some(match passed {
            Some((bytes, hasher)) => RawLine::TooLong { bytes, hash: hasher.finalize() },
            None => RawLine::Whole(trim(held, self.line == 1)),
        }))
    }
}

/// A line without a byte order mark in front of the file, and without a carriage return behind it.
fn trim(mut line: Vec<u8>, is_first: bool) -> Vec<u8> {
    if line.ends_with(b"\r") {
        line.pop();
    }
    if is_first && line.starts_with("\u{feff}".as_bytes()) {
        line.drain(..3);
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(content: &[u8], max_line_bytes: usize) -> Vec<(u64, RawLine)> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        let mut lines = RawLines::open(file.path(), max_line_bytes).unwrap();
        let all = std::iter::from_fn(|| lines.next().unwrap()).collect();
        assert_eq!(lines.read_so_far(), (content.len() as u64, blake3::hash(content)));
        all
    }

    fn whole(line: u64, text: &str) -> (u64, RawLine) {
        (line, RawLine::Whole(text.as_bytes().to_vec()))
    }

    #[test]
    fn line_ends_byte_order_marks_and_blank_lines_are_no_content() {
        let content = "\u{feff}{}\r\n\n  \t\r\n[1]\n\"last\"";
        assert_eq!(lines(content.as_bytes(), 100), [whole(1, "{}"), whole(4, "[1]"), whole(5, "\"last\"")]);
        assert_eq!(lines(b"", 100), []);
        assert_eq!(lines(b"\n\n", 100), []);
    }

    #[test]
    fn a_line_too_long_is_passed_over_and_the_next_one_is_whole() {
        let long = "x".repeat(200_000);
        let content = format!("a\n{long}\nb\n");
        let passed = RawLine::TooLong { bytes: 200_000, hash: blake3::hash(long.as_bytes()) };
        assert_eq!(lines(content.as_bytes(), 150_000), [whole(1, "a"), (2, passed), whole(3, "b")]);
        assert_eq!(lines(content.as_bytes(), 200_000)[1], whole(2, &long));
    }
}
