//! One run: sorted entries in an unnamed file, and what memory keeps of them.

use std::fs::File;
use std::io::{Result, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{Digest, MERGED_RUNS};

/// A digest and a number.
const ENTRY_BYTES: usize = 24;

/// Entries of a block, of which one has its digest in memory. A look-up reads a block: 1.5 KB.
const BLOCK_ENTRIES: usize = 64;

/// Bytes written or, in merging, read at once: whole blocks.
const BUFFER_BYTES: usize = 64 * BLOCK_ENTRIES * ENTRY_BYTES;

/// Entries in the order of their digests, none twice.
pub(super) struct Run {
    file: File,
    entries: u64,
    filter: Filter,
    /// The first digest of each block.
    fences: Vec<Digest>,
    /// How often its entries were merged: 8 runs of one tier make one of the next.
    pub(super) tier: u32,
}

impl Run {
    pub(super) fn get(&self, digest: &Digest) -> Result<Option<u64>> {
        if !self.may_have(digest) {
            return Ok(None);
        }
        let Some(block) = self.fences.partition_point(|fence| fence <= digest).checked_sub(1) else {
            return Ok(None);
        };
        let first = (block * BLOCK_ENTRIES) as u64;
        let entries = (self.entries - first).min(BLOCK_ENTRIES as u64) as usize;
        let mut bytes = [0; BLOCK_ENTRIES * ENTRY_BYTES];
        let bytes = &mut bytes[..entries * ENTRY_BYTES];
        self.file.read_exact_at(bytes, first * ENTRY_BYTES as u64)?;
        let (entries, _) = bytes.as_chunks::<ENTRY_BYTES>();
        let found = entries.binary_search_by(|entry| digest_of(entry).cmp(digest));
        Ok(found.ok().map(|at| number_of(&entries[at])))
    }

    /// Whether the file is worth a look.
    pub(super) fn may_have(&self, digest: &Digest) -> bool {
        self.filter.may_have(digest)
    }
}

fn digest_of(entry: &[u8; ENTRY_BYTES]) -> &Digest {
    entry.first_chunk().expect("16 of 24 bytes")
}

fn number_of(entry: &[u8; ENTRY_BYTES]) -> u64 {
    u64::from_le_bytes(*entry.last_chunk().expect("8 of 24 bytes"))
}

/// Writes entries in their order.
pub(super) struct RunWriter {
    run: Run,
    buffer: Vec<u8>,
}

impl RunWriter {
    /// `most` entries are to come, or fewer.
    pub(super) fn new(folder: &Path, most: u64, tier: u32) -> Result<RunWriter> {
        let file = tempfile::tempfile_in(folder)?;
        let fences = Vec::with_capacity(most.div_ceil(BLOCK_ENTRIES as u64) as usize);
        let run = Run { file, entries: 0, filter: Filter::new(most), fences, tier };
        Ok(RunWriter { run, buffer: Vec::with_capacity(BUFFER_BYTES) })
    }

    pub(super) fn push(&mut self, digest: &Digest, number: u64) -> Result<()> {
        if self.run.entries.is_multiple_of(BLOCK_ENTRIES as u64) {
            self.run.fences.push(*digest);
        }
        self.run.filter.add(digest);
        self.run.entries += 1;
        self.buffer.extend_from_slice(digest);
        self.buffer.extend_from_slice(&number.to_le_bytes());
        if self.buffer.len() == BUFFER_BYTES { self.flush() } else { Ok(()) }
    }

    pub(super) fn finish(mut self) -> Result<Run> {
        self.flush()?;
        Ok(self.run)
    }

    fn flush(&mut self) -> Result<()> {
        self.run.file.write_all(&self.buffer)?;
        self.buffer.clear();
        Ok(())
    }
}

/// Makes one run of several, the oldest first: of a digest that more have, the newest's number stays.
pub(super) fn merge(folder: &Path, runs: &[Run]) -> Result<Run> {
    let most = runs.iter().map(|run| run.entries).sum();
    let tier = runs.iter().map(|run| run.tier).max().expect("some runs") + 1;
    let mut writer = RunWriter::new(folder, most, tier)?;
    let mut cursors = runs.iter().map(Cursor::new).collect::<Result<Vec<_>>>()?;
    while let Some(least) = cursors.iter().filter_map(Cursor::digest).min().copied() {
        let mut number = None;
        for cursor in cursors.iter_mut().filter(|cursor| cursor.digest() == Some(&least)) {
            number = Some(cursor.take()?);
        }
        writer.push(&least, number.expect("one has the least"))?;
    }
    writer.finish()
}

/// Walks over a run.
struct Cursor<'a> {
    run: &'a Run,
    buffer: Vec<u8>,
    /// Bytes taken of the buffer.
    taken: usize,
    /// Bytes of the file in the buffer and before it.
    read: u64,
}

impl<'a> Cursor<'a> {
    fn new(run: &'a Run) -> Result<Self> {
        let mut cursor = Cursor { run, buffer: vec![], taken: 0, read: 0 };
        cursor.fill()?;
        Ok(cursor)
    }

    fn digest(&self) -> Option<&Digest> {
        self.buffer[self.taken..].first_chunk()
    }

    /// The number of the present digest, which is passed.
    fn take(&mut self) -> Result<u64> {
        let entry = self.buffer[self.taken..].first_chunk().expect("not at its end");
        let number = number_of(entry);
        self.taken += ENTRY_BYTES;
        if self.taken == self.buffer.len() {
            self.fill()?;
        }
        Ok(number)
    }

    fn fill(&mut self) -> Result<()> {
        let left = self.run.entries * ENTRY_BYTES as u64 - self.read;
        self.buffer.resize(left.min((BUFFER_BYTES / MERGED_RUNS) as u64) as usize, 0);
        self.run.file.read_exact_at(&mut self.buffer, self.read)?;
        self.read += self.buffer.len() as u64;
        self.taken = 0;
        Ok(())
    }
}

/// A Bloom filter in blocks of 256 bits, so that a look touches one cache line: each digest sets one bit
/// in each of a block's eight words. With 12 bits an entry it mistakes about 1 stranger in 200.
struct Filter {
    blocks: Vec<[u32; 8]>,
}

const FILTER_BITS: u64 = 12;

impl Filter {
    fn new(entries: u64) -> Filter {
        Filter { blocks: vec![[0; 8]; (entries * FILTER_BITS).div_ceil(256).max(1) as usize] }
    }

    fn add(&mut self, digest: &Digest) {
        let (block, bits) = self.place(digest);
        self.blocks[block].iter_mut().zip(bits).for_each(|(word, bit)| *word |= bit);
    }

    fn may_have(&self, digest: &Digest) -> bool {
        let (block, bits) = self.place(digest);
        self.blocks[block].iter().zip(bits).all(|(word, bit)| word & bit != 0)
    }

    /// The first half of a digest says which block, so that sorted entries fill it from its beginning
    /// to its end; eight times five bits of the other half say which bits.
    fn place(&self, digest: &Digest) -> (usize, [u32; 8]) {
        let half = |at| u64::from_be_bytes(*digest[at..].first_chunk().expect("8 of 16 bytes"));
        let block = (u128::from(half(0)) * self.blocks.len() as u128) >> 64;
        (block as usize, std::array::from_fn(|word| 1 << (half(8) >> (5 * word) & 31)))
    }
}
