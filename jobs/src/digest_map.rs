//! A map from 128-bit digests to numbers that stays small however many there are, and never errs.
//!
//! New entries gather in a buffer. A full one is sorted and written to an unnamed file, a run, and runs
//! of like size are merged, so that their number grows with the logarithm of the entries. Of each run
//! memory keeps a Bloom filter, which sends nearly every digest that is not there past the file, and the
//! first digest of each block, so that one read of a block finds the others. What the filter and the
//! fences say is only where not to look: it is the digests in the file that decide.
//!
//! Memory for n entries: 1.5 bytes each of filter, 0.25 of fences, and 13 MB for the buffer, with 11 MB
//! while it is sorted: 42 MB for ten million. The files hold 24 bytes an entry, and while runs are merged
//! the same again: 480 MB for ten million at most. A hash map of ten million took 400 MB of memory.

mod run;

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use run::{Run, RunWriter};

/// 128 bits of a cryptographic hash, of which any are as good as any others.
pub(crate) type Digest = [u8; 16];

/// Entries of a full buffer: what a hash map of 2^19 places takes before it grows.
pub(crate) const BUFFER_ENTRIES: usize = (1 << 19) / 8 * 7;

/// Runs of like size that become one.
const MERGED_RUNS: usize = 8;

/// Digests with a number each.
pub(crate) struct DigestMap {
    folder: PathBuf,
    buffer: HashMap<Digest, u64, BuildHasherDefault<DigestHasher>>,
    buffer_entries: usize,
    /// From the oldest to the newest; what a newer one says of a digest counts.
    runs: Vec<Run>,
}

/// An empty map, which would keep its files in the system's folder for temporary ones.
impl Default for DigestMap {
    fn default() -> DigestMap {
        DigestMap::with_buffer(BUFFER_ENTRIES)
    }
}

impl DigestMap {
    /// A map whose buffer takes so many entries.
    pub(crate) fn with_buffer(buffer_entries: usize) -> DigestMap {
        assert!(buffer_entries > 0, "a buffer holds at least one entry");
        let folder = std::env::temp_dir();
        DigestMap { folder, buffer: HashMap::default(), buffer_entries, runs: vec![] }
    }

    /// From now on files are made in this folder.
    pub(crate) fn keep_files_in(&mut self, folder: &Path) {
        self.folder = folder.to_owned();
    }

    /// The number of a digest.
    pub(crate) fn get(&self, digest: &Digest) -> Result<Option<u64>> {
        if let Some(&number) = self.buffer.get(digest) {
            return Ok(Some(number));
        }
        for run in self.runs.iter().rev() {
            if let Some(number) = run.get(digest).map_err(|source| self.error(source))? {
                return Ok(Some(number));
            }
        }
        Ok(None)
    }

    /// Gives a digest a number, in place of any that it has.
    pub(crate) fn insert(&mut self, digest: Digest, number: u64) -> Result<()> {
        self.buffer.insert(digest, number);
        if self.buffer.len() >= self.buffer_entries {
            self.spill().map_err(|source| self.error(source))?;
        }
        Ok(())
    }

    /// Makes what is on disk one run, so that a look-up reads one block, and gives the buffer's memory
    /// back: for a map that is complete.
    pub(crate) fn compact(&mut self) -> Result<()> {
        if self.runs.is_empty() {
            self.buffer.shrink_to_fit();
            return Ok(());
        }
        let compact = |map: &mut Self| {
            map.write_buffer()?;
            map.buffer = HashMap::default();
            map.merge(0)
        };
        compact(self).map_err(|source| self.error(source))
    }

    /// What went wrong with a file beside the map's own.
    pub(crate) fn error(&self, source: std::io::Error) -> Error {
        Error::Spill { folder: self.folder.clone(), source }
    }

    fn spill(&mut self) -> std::io::Result<()> {
        self.write_buffer()?;
        // Newer runs are never larger than older ones: equals stand together at the end.
        while let Some(first) = self.runs.len().checked_sub(MERGED_RUNS)
            && self.runs[first].tier == self.runs.last().expect("some").tier
        {
            self.merge(first)?;
        }
        Ok(())
    }

    fn write_buffer(&mut self) -> std::io::Result<()> {
        let mut entries: Vec<(Digest, u64)> = self.buffer.drain().collect();
        entries.sort_unstable();
        let mut writer = RunWriter::new(&self.folder, entries.len() as u64, 0)?;
        entries.iter().try_for_each(|(digest, number)| writer.push(digest, *number))?;
        self.runs.push(writer.finish()?);
        Ok(())
    }

    /// Makes one run of those from `first` on.
    fn merge(&mut self, first: usize) -> std::io::Result<()> {
        let merged = match &self.runs[first..] {
            [] | [_] => return Ok(()),
            runs => run::merge(&self.folder, runs)?,
        };
        self.runs.truncate(first);
        self.runs.push(merged);
        Ok(())
    }
}

/// A digest is a hash already.
#[derive(Default)]
pub(crate) struct DigestHasher(u64);

impl Hasher for DigestHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        if let Some(last) = bytes.last_chunk() {
            self.0 = u64::from_le_bytes(*last);
        }
    }

    /// An array's length comes before its bytes.
    fn write_usize(&mut self, _: usize) {}
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// Digests of which many share their first bytes, or all but the last.
    fn digest() -> impl Strategy<Value = Digest> {
        (0..3u8, 0..40u8, 0..3u8).prop_map(|(first, middle, last)| {
            let mut digest = [0; 16];
            (digest[0], digest[9], digest[15]) = (first * 127, middle, last);
            digest
        })
    }

    #[derive(Debug, Clone)]
    enum Step {
        Insert(Digest, u64),
        Compact,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            60 => (digest(), any::<u64>()).prop_map(|(digest, number)| Step::Insert(digest, number)),
            1 => Just(Step::Compact),
        ]
    }

    proptest! {
        #[test]
        fn a_map_of_any_buffer_is_a_hash_map(buffer in 1..9usize, steps in vec(step(), 0..500)) {
            let mut map = DigestMap::with_buffer(buffer);
            let mut model = HashMap::new();
            for step in steps {
                match step {
                    Step::Insert(digest, number) => {
                        prop_assert_eq!(map.get(&digest).unwrap(), model.get(&digest).copied());
                        map.insert(digest, number).unwrap();
                        model.insert(digest, number);
                    }
                    Step::Compact => map.compact().unwrap(),
                }
            }
            for first in 0..3u8 {
                for middle in 0..40u8 {
                    let mut digest = [0; 16];
                    (digest[0], digest[9]) = (first * 127, middle);
                    prop_assert_eq!(map.get(&digest).unwrap(), model.get(&digest).copied());
                }
            }
        }
    }

    fn nth(number: u64) -> Digest {
        *blake3::hash(&number.to_le_bytes()).as_bytes().first_chunk().unwrap()
    }

    #[test]
    fn runs_stay_few_and_filters_send_strangers_past_them() {
        let mut map = DigestMap::with_buffer(100);
        for number in 0..100_000 {
            map.insert(nth(number), number).unwrap();
        }
        // 1000 buffers: 1 of 512, 7 of 64, 5 of 8.
        assert_eq!(map.runs.len(), 1 + 7 + 5);
        assert!((0..100_000).all(|number| map.get(&nth(number)).unwrap() == Some(number)));
        let strangers = 100_000..200_000u64;
        let looks = strangers.clone().flat_map(|number| map.runs.iter().map(move |run| (number, run)));
        let looks = looks.filter(|(number, run)| run.may_have(&nth(*number))).count();
        assert!(looks < 13_000, "{looks} of 1.3 million looks at a file");
        assert!(strangers.clone().all(|number| map.get(&nth(number)).unwrap().is_none()));
        map.compact().unwrap();
        assert_eq!((map.runs.len(), map.buffer.capacity()), (1, 0));
        assert!((0..100_000).all(|number| map.get(&nth(number)).unwrap() == Some(number)));
    }

    #[test]
    fn a_folder_that_takes_no_files_is_one_clear_error() {
        let folder = tempfile::tempdir().unwrap();
        let mut map = DigestMap::with_buffer(2);
        map.keep_files_in(&folder.path().join("gone"));
        map.insert(nth(0), 0).unwrap();
        let error = map.insert(nth(1), 1).unwrap_err();
        let words = format!("keep keys in a temporary file in {}", folder.path().join("gone").display());
        assert_eq!(error.to_string(), words);
    }
}
