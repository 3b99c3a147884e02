//! Finished rows in the order of their lines, for the reader that mostly comes by them in that order.
//!
//! A look at the map of all digests reads a block of a file, 2 µs; rows whose lines lie near those of the
//! rows before are found in memory. An unnamed file holds all of them, and two blocks of it are in hash
//! maps: rows that were completed out of order lie in one or the other. Where the input goes on somewhere
//! else, the blocks follow it.

use std::collections::HashMap;
use std::fs::File;
use std::hash::BuildHasherDefault;
use std::io::{Result, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::digest_map::{Digest, DigestHasher};

/// A digest and a place.
const ENTRY_BYTES: usize = 24;

/// Entries of a block, 98 KB: several times the rows that a pipeline has in flight.
const BLOCK_ENTRIES: usize = 4096;

type Block = HashMap<Digest, u64, BuildHasherDefault<DigestHasher>>;

/// Digests with a number each, which only rises.
pub(super) struct InOrder {
    file: File,
    entries: u64,
    written: Vec<u8>,
    older: Block,
    newer: Block,
    /// Entries of the file before the end of the newer block.
    loaded: u64,
    /// The number in the middle of the newer block: from there on the next one is wanted.
    middle: u64,
    /// Digests that were elsewhere since it was loaded.
    missed: usize,
}

impl InOrder {
    pub(super) fn new(folder: &Path) -> Result<InOrder> {
        Ok(InOrder {
            file: tempfile::tempfile_in(folder)?,
            entries: 0,
            written: Vec::with_capacity(BLOCK_ENTRIES * ENTRY_BYTES),
            older: Block::default(),
            newer: Block::default(),
            loaded: 0,
            middle: 0,
            missed: 0,
        })
    }

    /// Adds an entry, before the first is looked for.
    pub(super) fn push(&mut self, digest: &Digest, number: u64) -> Result<()> {
        self.written.extend_from_slice(digest);
        self.written.extend_from_slice(&number.to_le_bytes());
        self.entries += 1;
        if self.written.len() == BLOCK_ENTRIES * ENTRY_BYTES { self.flush() } else { Ok(()) }
    }

    /// All entries are there.
    pub(super) fn finish(&mut self) -> Result<()> {
        self.flush()?;
        self.written = vec![];
        self.load()
    }

    /// The number of a digest that is near the ones before; nothing says little.
    pub(super) fn get(&mut self, digest: &Digest) -> Result<Option<u64>> {
        let Some(&number) = self.newer.get(digest) else { return Ok(self.older.get(digest).copied()) };
        if number >= self.middle && self.loaded < self.entries {
            self.load()?;
        }
        Ok(Some(number))
    }

    /// A digest was not near, and is elsewhere: the next ones may be there too. A block is loaded for as
    /// many misses as it has entries, so that a shuffled input costs little more than it must.
    pub(super) fn miss(&mut self, number: u64) -> Result<()> {
        self.missed += 1;
        if self.missed < BLOCK_ENTRIES {
            return Ok(());
        }
        let (mut low, mut high) = (0, self.entries);
        while low < high {
            let middle = low + (high - low) / 2;
            let mut bytes = [0; 8];
            self.file.read_exact_at(&mut bytes, (middle + 1) * ENTRY_BYTES as u64 - 8)?;
            match u64::from_le_bytes(bytes) < number {
                true => low = middle + 1,
                false => high = middle,
            }
        }
        self.loaded = low.saturating_sub(BLOCK_ENTRIES as u64 / 2);
        self.load()
    }

    fn flush(&mut self) -> Result<()> {
        self.file.write_all(&self.written)?;
        self.written.clear();
        Ok(())
    }

    /// The next block of the file becomes the newer one.
    fn load(&mut self) -> Result<()> {
        std::mem::swap(&mut self.older, &mut self.newer);
        self.newer.clear();
        let entries = (self.entries - self.loaded).min(BLOCK_ENTRIES as u64) as usize;
        let mut bytes = vec![0; entries * ENTRY_BYTES];
        self.file.read_exact_at(&mut bytes, self.loaded * ENTRY_BYTES as u64)?;
        let (entries, _) = bytes.as_chunks::<ENTRY_BYTES>();
        let digest_of = |entry: &[u8; ENTRY_BYTES]| *entry.first_chunk().expect("16 of 24 bytes");
        let number_of = |entry: &[u8; ENTRY_BYTES]| u64::from_le_bytes(*entry.last_chunk().expect("8 of 24"));
        self.newer.extend(entries.iter().map(|entry| (digest_of(entry), number_of(entry))));
        self.middle = entries.get(entries.len() / 2).map_or(0, number_of);
        self.loaded += entries.len() as u64;
        self.missed = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nth(number: u64) -> Digest {
        *blake3::hash(&number.to_le_bytes()).as_bytes().first_chunk().unwrap()
    }

    /// How many of these are found without a look elsewhere; every one that is found is right.
    fn near(rows: u64, asked: impl Iterator<Item = u64>) -> u64 {
        let folder = tempfile::tempdir().unwrap();
        let mut keys = InOrder::new(folder.path()).unwrap();
        // Numbers have gaps, as where rows were refused.
        (0..rows).for_each(|row| keys.push(&nth(row), 3 * row).unwrap());
        keys.finish().unwrap();
        let mut found = 0;
        for row in asked {
            match keys.get(&nth(row)).unwrap() {
                Some(number) => {
                    assert_eq!(number, 3 * row);
                    found += 1;
                }
                None if row < rows => keys.miss(3 * row).unwrap(),
                None => {}
            }
        }
        found
    }

    #[test]
    fn rows_that_come_about_in_order_are_all_near() {
        assert_eq!(near(50_000, 0..50_000), 50_000);
        let stirred =
            (0..50_000 / 1000).flat_map(|block| (0..1000).map(move |at| 1000 * block + at * 617 % 1000));
        assert_eq!(near(50_000, stirred), 50_000);
        assert_eq!(near(10, (0..10).rev()), 10);
        assert_eq!(near(0, 0..10), 0);
    }

    #[test]
    fn an_input_that_goes_on_elsewhere_is_followed() {
        let asked = (30_000..50_000).chain(60_000..70_000).chain(0..30_000);
        let found = near(50_000, asked);
        assert!(found > 50_000 - 3 * BLOCK_ENTRIES as u64, "{found}");
    }
}
