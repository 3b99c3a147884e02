//! The identity of a row: which answer it gets, wherever in the file it stands.
//!
//! A key is made of what the row says and what the job says about all rows. It does not change when
//! the file is sorted, extended or spelled otherwise. Rows that are identical are told apart by how
//! many came before, so that each has a random stream of its own.

use std::path::Path;

use scheduler::RequestKey;

use crate::digest_map::{Digest, DigestMap};
use crate::error::Result;

/// Makes the keys of one job.
pub(crate) struct KeyMaker {
    job: blake3::Hasher,
    /// How many rows had this content.
    seen: DigestMap,
}

/// What kind of line a key is for; lines of different kinds never share one.
#[derive(Clone, Copy)]
pub(crate) enum LineKind {
    /// A batch line, of which the body counts.
    Batch,
    /// A plain row, of which every field counts.
    Plain,
    /// A line that is neither, of which every byte counts.
    Broken,
}

impl KeyMaker {
    /// `job` holds what the job says about all its rows: model, templates, sampling, seed.
    pub(crate) fn new(job: &[&str]) -> KeyMaker {
        let mut hasher = blake3::Hasher::new();
        job.iter().for_each(|part| add(&mut hasher, part.as_bytes()));
        KeyMaker { job: hasher, seen: DigestMap::default() }
    }

    /// What memory does not hold is kept in this folder.
    pub(crate) fn keep_files_in(&mut self, folder: &Path) {
        self.seen.keep_files_in(folder);
    }

    /// The key of the next line with this content; `before` identical lines were not shown to this
    /// maker and count all the same.
    pub(crate) fn next(
        &mut self,
        kind: LineKind,
        custom_id: &str,
        content: &[u8],
        before: u64,
    ) -> Result<RequestKey> {
        let hasher = self.hasher(kind, custom_id, content);
        let digest = digest(&hasher);
        let ordinal = self.seen.get(&digest)?.unwrap_or(before);
        self.seen.insert(digest, ordinal + 1)?;
        Ok(key(hasher, u32::try_from(ordinal).expect("fewer than 2^32 identical lines")))
    }

    /// The key of a line that is known to have no twin; it is not remembered.
    pub(crate) fn only(&self, kind: LineKind, custom_id: &str, content: &[u8]) -> RequestKey {
        key(self.hasher(kind, custom_id, content), 0)
    }

    fn hasher(&self, kind: LineKind, custom_id: &str, content: &[u8]) -> blake3::Hasher {
        let mut hasher = self.job.clone();
        hasher.update(&[kind as u8]);
        add(&mut hasher, custom_id.as_bytes());
        add(&mut hasher, content);
        hasher
    }
}

/// The length in front keeps ("ab", "c") and ("a", "bc") apart.
fn add(hasher: &mut blake3::Hasher, part: &[u8]) {
    hasher.update(&(part.len() as u64).to_le_bytes());
    hasher.update(part);
}

fn key(mut hasher: blake3::Hasher, ordinal: u32) -> RequestKey {
    hasher.update(&ordinal.to_le_bytes());
    RequestKey(u128::from_be_bytes(digest(&hasher)))
}

fn digest(hasher: &blake3::Hasher) -> Digest {
    let mut digest = Digest::default();
    hasher.finalize_xof().fill(&mut digest);
    digest
}

/// Remembers which `custom_id` a file has used, and on which line first.
#[derive(Default)]
pub(crate) struct CustomIds {
    first_lines: DigestMap,
}

impl CustomIds {
    /// What memory does not hold is kept in this folder.
    pub(crate) fn keep_files_in(&mut self, folder: &Path) {
        self.first_lines.keep_files_in(folder);
    }

    /// Notes a `custom_id`; the line that had it first, where there is one.
    pub(crate) fn note(&mut self, custom_id: &str, line: u64) -> Result<Option<u64>> {
        let mut hasher = blake3::Hasher::new();
        hasher.update(custom_id.as_bytes());
        let digest = digest(&hasher);
        let first = self.first_lines.get(&digest)?;
        if first.is_none() {
            self.first_lines.insert(digest, line)?;
        }
        Ok(first)
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    impl KeyMaker {
        fn with_buffer(entries: usize) -> KeyMaker {
            KeyMaker { seen: DigestMap::with_buffer(entries), ..KeyMaker::new(&["m"]) }
        }

        fn nth(&mut self, content: &[u8], before: u64) -> RequestKey {
            self.next(LineKind::Plain, "", content, before).unwrap()
        }
    }

    proptest! {
        #[test]
        fn keys_and_names_do_not_depend_on_what_memory_holds(rows in vec(0..60u8, 0..400), buffer in 1..20usize) {
            let (mut small, mut large) = (KeyMaker::with_buffer(buffer), KeyMaker::new(&["m"]));
            let mut ids = CustomIds { first_lines: DigestMap::with_buffer(buffer) };
            let mut first_lines = std::collections::HashMap::new();
            for (line, row) in (1..).zip(rows) {
                prop_assert_eq!(small.nth(&[row], 0), large.nth(&[row], 0));
                let first = *first_lines.entry(row).or_insert(line);
                let before = ids.note(&row.to_string(), line).unwrap();
                prop_assert_eq!(before, (first != line).then_some(first));
            }
        }
    }

    #[test]
    fn a_key_depends_on_each_part_and_on_where_one_ends() {
        let mut keys = Vec::new();
        for job in [&["m", "p"][..], &["mp", ""], &["m", "q"]] {
            let mut maker = KeyMaker::new(job);
            for (custom_id, content) in [("a", "bc"), ("ab", "c"), ("a", "bc")] {
                keys.push(maker.next(LineKind::Batch, custom_id, content.as_bytes(), 0).unwrap());
            }
            keys.push(maker.only(LineKind::Plain, "a", b"bc"));
        }
        let all = keys.len();
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), all);
    }

    #[test]
    fn identical_lines_are_told_apart_by_their_ordinal_alone() {
        let mut first = KeyMaker::new(&["m"]);
        let keys: Vec<_> = (0..3).map(|_| first.nth(b"x", 0)).collect();
        let mut second = KeyMaker::new(&["m"]);
        second.nth(b"y", 0);
        let again: Vec<_> = (0..3).map(|_| second.nth(b"x", 0)).collect();
        assert_eq!(keys, again);
        assert_eq!(keys[0], second.only(LineKind::Plain, "", b"x"));
        assert_eq!(keys[1], KeyMaker::new(&["m"]).nth(b"x", 1));
    }
}
