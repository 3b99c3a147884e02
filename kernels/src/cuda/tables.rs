//! Small tables of a step on the device: tokens, positions, places in the cache, what attention is shared out into.
//!
//! All blocks of a stage ask for the same ones, so that each is sent once in a step.

use std::sync::Arc;

use super::attention::{ROW_WORDS, TILE_WORDS};
use super::stream::{Argument, Memory, Stream};
use crate::backend::{PAGE_TOKENS, WorkSize};
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
        let pages = rows.min(sequences) * context_tokens.div_ceil(PAGE_TOKENS);
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
