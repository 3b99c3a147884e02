//! A file mapped into memory, for reading weights without a copy.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use memmap2::Mmap;
#[cfg(unix)]
use memmap2::UncheckedAdvice;

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

    /// Gives the memory of a range back to the system, which reads it from the file again if it is touched. Without it
    /// a model's file counts for the process as long as it is mapped. A wish: a system may keep the memory.
    ///
    /// # Panics
    /// When the range is not inside of the file.
    pub fn release(&self, range: Range<usize>) {
        assert!(range.start <= range.end && range.end <= self.bytes().len(), "{range:?} of the file");
        #[cfg(unix)]
        if let Some(map) = self.map.as_ref().filter(|_| !range.is_empty()) {
            // SAFETY: the mapping is private, of a file and never written, so that its pages come back with the same
            // bytes, also under those who have borrowed them.
            unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len()).ok() };
        }
    }

    /// Takes the whole pages inside of a range away, for good: a read of one of their bytes ends the process, as one of a file that
    /// was cut does. So a test sees who reads what. Returns how many bytes that are.
    ///
    /// # Errors
    /// What the system refuses.
    ///
    /// # Panics
    /// When the range is not inside of the file.
    #[cfg(unix)]
    pub fn forbid(&self, range: Range<usize>) -> std::io::Result<usize> {
        let bytes = &self.bytes()[range];
        let page = rustix::param::page_size();
        let start = bytes.as_ptr().addr().next_multiple_of(page) - bytes.as_ptr().addr();
        let length = bytes.len().saturating_sub(start) / page * page;
        if length > 0 {
            let first = bytes[start..].as_ptr().cast_mut().cast();
            // SAFETY: the pages lie inside of the mapping, which nobody writes; who reads them is ended and sees nothing else.
            unsafe { rustix::mm::mprotect(first, length, rustix::mm::MprotectFlags::empty())? };
        }
        Ok(length)
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

    /// Bytes of the mapping that are in memory, as Linux counts them.
    #[cfg(target_os = "linux")]
    fn resident_bytes(file: &MappedFile) -> usize {
        let start = format!("{:x}-", file.bytes().as_ptr().addr());
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut lines = maps.lines().skip_while(|line| !line.starts_with(&start));
        let resident = lines.find_map(|line| line.strip_prefix("Rss:")).unwrap();
        1024 * resident.trim().trim_end_matches(" kB").parse::<usize>().unwrap()
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn what_is_released_is_out_of_memory_and_comes_back() {
        let path = std::env::temp_dir().join(format!("spanwise-released-{}", std::process::id()));
        let content: Vec<u8> = (0..1 << 20).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let file = MappedFile::open(&path).unwrap();
        assert_eq!(file.bytes(), content);
        assert_eq!(resident_bytes(&file), 1 << 20);
        file.release(0..1 << 19);
        assert!(resident_bytes(&file) <= 1 << 19, "{} bytes", resident_bytes(&file));
        assert_eq!(file.bytes(), content);
        file.release(7..7);
        std::fs::remove_file(&path).unwrap();
    }

    /// The system refuses to write out what it may not read, where a read by ourselves would end the test.
    #[cfg(unix)]
    #[test]
    fn what_is_forbidden_cannot_be_read_and_all_else_can() {
        use std::io::Write;
        let path = std::env::temp_dir().join(format!("spanwise-forbidden-{}", std::process::id()));
        let page = rustix::param::page_size();
        std::fs::write(&path, vec![7; 4 * page]).unwrap();
        let file = MappedFile::open(&path).unwrap();
        assert_eq!(file.forbid(page - 1..3 * page + 1).unwrap(), 2 * page);
        assert_eq!(file.forbid(5..page - 5).unwrap(), 0, "no whole page");
        let sink = tempfile::tempfile().unwrap();
        let is_read = |at: usize| (&sink).write(&file.bytes()[at..][..1]).is_ok();
        let found = [0, page - 1, page, 2 * page, 3 * page - 1, 3 * page, 4 * page - 1].map(is_read);
        assert_eq!(found, [true, true, false, false, false, true, true]);
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = MappedFile::open("/no/such/model.safetensors").unwrap_err().to_string();
        assert!(error.starts_with("map /no/such/model.safetensors: "), "{error}");
    }
}
