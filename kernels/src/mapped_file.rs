//! A file mapped into memory, for reading weights without a copy.

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

use crate::error::{Error, Result};

/// A whole file in memory, read-only; pages are read from disk when they are touched.
///
/// The file must not be changed or cut while it is mapped: no system guards a mapping against that. The
/// project maps model files alone, which are written once and replaced by renaming.
#[derive(Debug)]
pub struct MappedFile {
    /// `None` for an empty file, which systems refuse to map.
    map: Option<Mmap>,
}

impl MappedFile {
    /// Maps the file at `path`.
    pub fn open(path: impl AsRef<Path>) -> Result<MappedFile> {
        let path = path.as_ref();
        Self::map(path).map_err(|source| Error::Map { path: path.to_owned(), source })
    }

    fn map(path: &Path) -> std::io::Result<MappedFile> {
        let file = File::open(path)?;
        if file.metadata()?.len() == 0 {
            return Ok(MappedFile { map: None });
        }
        // SAFETY: the bytes are handed out as `&[u8]`, so nobody may write them while the map lives. This
        // process never writes a model file, the mapping is private and read-only, and the type's contract
        // asks the same of others: who edits a model in place while a job reads it gets wrong weights, and
        // who cuts it gets a bus error, as with every program that maps its weights.
        let map = unsafe { Mmap::map(&file)? };
        Ok(MappedFile { map: Some(map) })
    }

    /// The file's bytes.
    pub fn bytes(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_shareable<T: Send + Sync>(value: T) -> T {
        value
    }

    #[test]
    fn bytes_are_the_files() {
        let path = std::env::temp_dir().join(format!("spanwise-mapped-{}", std::process::id()));
        for content in [&b"some weights"[..], b""] {
            std::fs::write(&path, content).unwrap();
            assert_eq!(assert_shareable(MappedFile::open(&path).unwrap()).bytes(), content);
        }
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = MappedFile::open("/no/such/model.safetensors").unwrap_err().to_string();
        assert!(error.starts_with("map /no/such/model.safetensors: "), "{error}");
    }
}
