//! Small tables of a step on the device: tokens, positions, places in the cache, what attention is shared out into.
//!
//! All blocks of a stage ask for the same ones, so that each is sent once in a step.

use std::sync::Arc;

use super::attention::Plan;
use super::attention::{ROW_WORDS, TILE_WORDS};
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
    pub(crate) tokens: Table,
    pub(crate) gathered: Table,
    pub(crate) positions: Table,
    pub(crate) places: Table,
    pub(crate) tiles: Table,
    pub(crate) rows: Table,
    pub(crate) pages: Table,
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

    /// Makes room for those of a step.
    pub(crate) fn reserve(&mut self, size: &WorkSize) -> Result<()> {
        let Tables { tokens, gathered, positions, places, tiles, rows, pages } = self;
        let tables = [tokens, gathered, positions, places, tiles, rows, pages];
        tables.into_iter().zip(Tables::words(size)).try_for_each(|(table, words)| {
            table.sent.clear();
            table.sent.reserve(words);
            table.memory.reserve("tables", words * size_of::<u32>())
        })
    }
}

impl Tables {
    /// Positions of a step's rows, 0 for so many more that nobody asked for.
    pub(crate) fn put_positions(
        &mut self,
        stream: &Stream,
        op: &'static str,
        positions: &[u32],
        padding: usize,
    ) -> Result<Argument> {
        if padding == 0 {
            return self.positions.put(stream, op, positions);
        }
        let all: Vec<u32> = positions.iter().copied().chain(std::iter::repeat_n(0, padding)).collect();
        self.positions.put(stream, op, &all)
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
        self.places.put(stream, op, &all)
    }

    /// What attention is shared out into: pages, tiles and rows.
    pub(crate) fn put_plan(
        &mut self,
        stream: &Stream,
        op: &'static str,
        plan: &Plan,
    ) -> Result<[Argument; 3]> {
        Ok([
            self.pages.put(stream, op, &plan.pages)?,
            self.tiles.put(stream, op, &plan.tiles)?,
            self.rows.put(stream, op, &plan.rows)?,
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
    pub(crate) fn put(&mut self, stream: &Stream, op: &'static str, words: &[u32]) -> Result<Argument> {
        if self.sent != words {
            self.sent.clear();
            self.memory.reserve(op, size_of_val(words))?;
            stream.upload(op, bytemuck::cast_slice(words), &mut self.memory, 0)?;
            self.sent.extend_from_slice(words);
        }
        Ok(self.memory.start())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_has_its_place() {
        let slices = [
            AttentionSlice { first_row: 0, num_rows: 3, first_position: 62, pages: vec![5, 2] },
            AttentionSlice { first_row: 3, num_rows: 1, first_position: 0, pages: vec![9] },
        ];
        assert_eq!(places(&slices), [5 * 64 + 62, 5 * 64 + 63, 2 * 64, 9 * 64]);
    }
}
