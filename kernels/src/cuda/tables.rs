//! Small tables of a step on the device: tokens, positions, places in the cache, what attention is shared out into.
//!
//! All blocks of a stage ask for the same ones, so that each is sent once in a step.

use std::sync::Arc;

use super::attention::Plan;
use super::attention::{ROW_WORDS, TILE_WORDS};
use super::staging::Pinned;
use super::stream::{Argument, Memory, Stream};
use crate::backend::{AttentionSlice, PAGE_TOKENS, WorkSize};
use crate::error::Result;

/// A table on the device, and what was last sent of it.
#[derive(Debug)]
pub(crate) struct Table {
    sent: Vec<u32>,
    memory: Memory,
}

/// Every table.
#[derive(Debug)]
pub(crate) struct Tables {
    tokens: Table,
    gathered: Table,
    positions: Table,
    places: Table,
    tiles: Table,
    rows: Table,
    pages: Table,
    pub(crate) outbox: Outbox,
}

/// What is on its way to the device, by pinned memory: other memory the driver may only take when all is done that was queued before,
/// and the host is to go ahead. Two buffers take turns, each filled with the tables of a step and more; so the one that is turned to
/// was copied from long ago.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    /// None before anybody said how much a step sends.
    buffers: Option<[Pinned; 2]>,
    next: usize,
    used: usize,
}

impl Outbox {
    fn reserve(&mut self, stream: &Arc<Stream>, bytes: usize) -> Result<()> {
        let buffer = || Pinned::new(stream, bytes);
        *self = Outbox { buffers: Some([buffer()?, buffer()?]), ..Outbox::default() };
        Ok(())
    }

    /// Queues a copy to the start of a device's memory.
    pub(crate) fn send(
        &mut self,
        stream: &Stream,
        op: &'static str,
        bytes: &[u8],
        to: &mut Memory,
    ) -> Result<()> {
        let Some(buffers) = self.buffers.as_mut().filter(|buffers| bytes.len() <= buffers[0].bytes()) else {
            return stream.upload(op, bytes, to, 0);
        };
        if self.used + bytes.len() > buffers[self.next].bytes() {
            buffers[self.next].mark(op)?;
            (self.next, self.used) = (1 - self.next, 0);
            buffers[self.next].settle()?;
        }
        buffers[self.next].pass_on(op, bytes, self.used, to)?;
        self.used += bytes.len().next_multiple_of(16);
        Ok(())
    }
}

impl Tables {
    pub(crate) fn new(stream: &Arc<Stream>) -> Tables {
        let table = || Table { sent: Vec::new(), memory: Memory::none(stream) };
        Tables {
            tokens: table(),
            gathered: table(),
            positions: table(),
            places: table(),
            tiles: table(),
            rows: table(),
            pages: table(),
            outbox: Outbox::default(),
        }
    }
}

impl Tables {
    /// The tables, each with the words that it has for a step at most.
    pub(crate) fn words(size: &WorkSize) -> [usize; 7] {
        let WorkSize { rows, sequences, context_tokens, .. } = *size;
        // And a page for rows that nobody asked for.
        let pages = rows.min(sequences) * context_tokens.div_ceil(PAGE_TOKENS) + 1;
        // A tile has a row at least.
        [rows, rows, rows, rows, TILE_WORDS * rows, ROW_WORDS * rows, pages]
    }

    /// Makes room for those of a step, and for `others`, bytes of what else it sends.
    pub(crate) fn reserve(&mut self, stream: &Arc<Stream>, size: &WorkSize, others: usize) -> Result<()> {
        let Tables { tokens, gathered, positions, places, tiles, rows, pages, outbox } = self;
        let words: usize = Tables::words(size).iter().sum();
        outbox.reserve(stream, 2 * (words * size_of::<u32>() + others))?;
        let tables = [tokens, gathered, positions, places, tiles, rows, pages];
        tables.into_iter().zip(Tables::words(size)).try_for_each(|(table, words)| {
            table.sent.clear();
            table.sent.reserve(words);
            table.memory.reserve("tables", words * size_of::<u32>())
        })
    }
}

impl Tables {
    /// Tokens of a step's rows, or where they are found.
    pub(crate) fn put_tokens(
        &mut self,
        stream: &Stream,
        op: &'static str,
        tokens: &[u32],
    ) -> Result<Argument> {
        self.tokens.put(stream, &mut self.outbox, op, tokens)
    }

    /// Rows of an array.
    pub(crate) fn put_gathered(
        &mut self,
        stream: &Stream,
        op: &'static str,
        rows: &[u32],
    ) -> Result<Argument> {
        self.gathered.put(stream, &mut self.outbox, op, rows)
    }

    /// Positions of a step's rows, 0 for so many more that nobody asked for.
    pub(crate) fn put_positions(
        &mut self,
        stream: &Stream,
        op: &'static str,
        positions: &[u32],
        padding: usize,
    ) -> Result<Argument> {
        if padding == 0 {
            return self.positions.put(stream, &mut self.outbox, op, positions);
        }
        let all: Vec<u32> = positions.iter().copied().chain(std::iter::repeat_n(0, padding)).collect();
        self.positions.put(stream, &mut self.outbox, op, &all)
    }

    /// Where keys and values of a step's rows belong, nowhere for so many more.
    pub(crate) fn put_places(
        &mut self,
        stream: &Stream,
        op: &'static str,
        slices: &[AttentionSlice],
        padding: usize,
    ) -> Result<Argument> {
        let mut all = places(slices);
        all.extend(std::iter::repeat_n(NOWHERE, padding));
        self.places.put(stream, &mut self.outbox, op, &all)
    }

    /// What attention is shared out into: pages, tiles and rows.
    pub(crate) fn put_plan(
        &mut self,
        stream: &Stream,
        op: &'static str,
        plan: &Plan,
    ) -> Result<[Argument; 3]> {
        Ok([
            self.pages.put(stream, &mut self.outbox, op, &plan.pages)?,
            self.tiles.put(stream, &mut self.outbox, op, &plan.tiles)?,
            self.rows.put(stream, &mut self.outbox, op, &plan.rows)?,
        ])
    }
}

/// As kv_append.cu has it.
const NOWHERE: u32 = u32::MAX;

/// Where in a cache each row of a batch belongs: its page times PAGE_TOKENS, and its place there.
fn places(slices: &[AttentionSlice]) -> Vec<u32> {
    let place = |slice: &AttentionSlice, row: usize| {
        let position = slice.first_position + row;
        slice.pages[position / PAGE_TOKENS] * PAGE_TOKENS as u32 + (position % PAGE_TOKENS) as u32
    };
    slices.iter().flat_map(|slice| (0..slice.num_rows).map(move |row| place(slice, row))).collect()
}

impl Table {
    /// Sends these words, unless they are there.
    fn put(
        &mut self,
        stream: &Stream,
        outbox: &mut Outbox,
        op: &'static str,
        words: &[u32],
    ) -> Result<Argument> {
        if self.sent != words {
            self.sent.clear();
            self.memory.reserve(op, size_of_val(words))?;
            outbox.send(stream, op, bytemuck::cast_slice(words), &mut self.memory)?;
            self.sent.extend_from_slice(words);
        }
        Ok(self.memory.start())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Backend, WeightType};
    use crate::cuda::{locked, tests::emulated};

    /// Choices, masks and edits of three times 64 rows.
    #[test]
    fn all_that_a_step_chooses_by_has_room_in_one_pinned_buffer() {
        let cuda = emulated(WeightType::Bf16);
        let (rows, vocab) = (192, 1000);
        let size = WorkSize {
            rows,
            sequences: rows,
            logit_rows: rows,
            choice_rows: 64,
            vocab,
            ..WorkSize::default()
        };
        cuda.reserve_work(&size).unwrap();
        let (asked, mask, edits) = (11 * size_of::<u32>(), vocab.div_ceil(32) * size_of::<u32>(), 16 * vocab);
        let mut to = Memory::none(&cuda.stream);
        to.reserve("a test", edits).unwrap();
        let outbox = &mut locked(&cuda.tables).outbox;
        for bytes in [64 * asked, 64 * mask, edits].into_iter().cycle().take(9) {
            outbox.send(&cuda.stream, "a test", &vec![0; bytes], &mut to).unwrap();
        }
        let sent = 3 * (64 * (asked + mask) + edits);
        assert!(outbox.next == 0 && outbox.used >= sent, "{} of {sent} bytes", outbox.used);
    }

    #[test]
    fn each_row_has_its_place() {
        let slices = [
            AttentionSlice { first_row: 0, num_rows: 3, first_position: 62, pages: vec![5, 2] },
            AttentionSlice { first_row: 3, num_rows: 1, first_position: 0, pages: vec![9] },
        ];
        assert_eq!(places(&slices), [5 * 64 + 62, 5 * 64 + 63, 2 * 64, 9 * 64]);
    }
}
