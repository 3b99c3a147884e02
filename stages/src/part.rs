//! The part of a model that a stage holds.

use std::fmt;
use std::ops::Range;

use scheduler::Span;

use crate::block::Ffn;
use crate::config::ModelConfig;

/// A run of blocks, the first and the last of which may be shared with the neighbouring stages by columns of their FFNs.
///
/// Of a shared block the stage with column 0 has the attention. A stage that has the columns before others hands on,
/// beside the residual stream, what the product with the down matrix has come to; the next goes on with those
/// sums in the order of columns, so that a cut changes no bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// All blocks that it has something of.
    pub blocks: Span,
    /// The first column that it has of the first block's FFN; 0 where it has the whole block.
    pub first_column: usize,
    /// The end of its columns of the last block's FFN, where it has not all.
    pub end_column: Option<usize>,
}

impl From<Span> for Part {
    fn from(blocks: Span) -> Self {
        Part { blocks, first_column: 0, end_column: None }
    }
}

impl Part {
    /// Whether it embeds tokens.
    pub fn is_first(&self) -> bool {
        self.blocks.start == 0 && self.first_column == 0
    }

    /// Whether it has the last norm and the output matrix.
    pub fn is_last(&self, config: &ModelConfig) -> bool {
        self.blocks.end == config.blocks.len() && self.end_column.is_none()
    }

    /// Whether it has the attention of a block.
    pub(crate) fn has_attention(&self, block: usize) -> bool {
        block > self.blocks.start || self.first_column == 0
    }

    /// The columns that it has of a block's FFN of `width`.
    pub(crate) fn columns(&self, block: usize, width: usize) -> Range<usize> {
        let start = if block == self.blocks.start { self.first_column } else { 0 };
        let end = if block + 1 == self.blocks.end { self.end_column } else { None };
        start..end.unwrap_or(width)
    }

    /// Whether parts follow each other and cover a model, each cut inside of an FFN of columns.
    pub fn cover(parts: &[Part], config: &ModelConfig) -> bool {
        let is_inside = |block: usize, column: usize| match config.blocks.get(block).map(|block| block.ffn) {
            Some(Ffn::SwiGlu { width }) => column < width,
            _ => column == 0,
        };
        let mut next = (0, 0);
        for part in parts {
            let Part { blocks, first_column, end_column } = *part;
            let end = match end_column {
                Some(column) => (blocks.end.saturating_sub(1), column),
                None => (blocks.end, 0),
            };
            if (blocks.start, first_column) != next || end <= next || !is_inside(end.0, end.1) {
                return false;
            }
            next = end;
        }
        next == (config.blocks.len(), 0)
    }
}

/// Such as `[3, 6)`, or `[3:5120, 7:256)` from column 5,120 of block 3 to column 256 of block 7.
impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Span { start, end } = self.blocks;
        match self.first_column {
            0 => write!(f, "[{start}, ")?,
            column => write!(f, "[{start}:{column}, ")?,
        }
        match self.end_column {
            Some(column) => write!(f, "{}:{column})", end - 1),
            None => write!(f, "{end})"),
        }
    }
}
