//! A model's blocks, and their FFNs' columns, as the pieces that a plan may part.

use std::ops::Range;

use crate::block::Ffn;
use crate::config::ModelConfig;

/// A block, or some columns of its FFN.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PieceShape {
    /// Index of the block.
    pub block: usize,
    /// The columns of its FFN, if that is a SwiGLU. The piece with column 0 has the attention too.
    pub columns: Option<Range<usize>>,
    /// Whether the block ends with it.
    pub ends_block: bool,
}

impl PieceShape {
    /// All of a block.
    pub(super) fn whole(config: &ModelConfig, block: usize) -> Self {
        let columns = width(config.blocks[block].ffn).map(|width| 0..width);
        PieceShape { block, columns, ends_block: true }
    }
}

/// The widest FFN is cut into at most this many pieces: a 128th of Ultra's is 0.16 B parameters, half a percent
/// of an eighth of the model.
const MAX_PIECES: usize = 128;

/// All FFNs together are cut into no more than about this many pieces, a few for each of Super's 80 blocks: the planner's
/// time goes with their number, and a thousandth of a model evens out what a stage of it may weigh.
const MAX_PIECES_IN_ALL: usize = 1536;

/// Columns come in multiples of this, so that 8 ranks have whole tiles of 32.
const COLUMN_TILE: usize = 256;

/// All pieces of a model, in order: its blocks, or where FFNs may be cut at multiples of `column_cut` parts of them of equal
/// columns.
pub fn pieces(config: &ModelConfig, column_cut: Option<usize>) -> Vec<PieceShape> {
    let widths = || config.blocks.iter().filter_map(|block| width(block.ffn));
    let (widest, all) = (widths().max().unwrap_or(0), widths().sum::<usize>());
    let least = widest.div_ceil(MAX_PIECES).max(all.div_ceil(MAX_PIECES_IN_ALL));
    let unit = match column_cut {
        Some(multiple) => least.max(1).next_multiple_of(COLUMN_TILE.max(multiple)),
        None => usize::MAX,
    };
    (config.blocks.iter().enumerate())
        .flat_map(|(index, block)| block_pieces(index, block.ffn, unit))
        .collect()
}

fn width(ffn: Ffn) -> Option<usize> {
    match ffn {
        Ffn::SwiGlu { width } => Some(width),
        Ffn::Linear | Ffn::None => None,
    }
}

fn block_pieces(block: usize, ffn: Ffn, unit: usize) -> Vec<PieceShape> {
    let Some(width) = width(ffn) else { return vec![PieceShape { block, columns: None, ends_block: true }] };
    (0..width.div_ceil(unit))
        .map(|index| {
            let start = index * unit;
            let end = start.saturating_add(unit).min(width);
            PieceShape { block, columns: Some(start..end), ends_block: end == width }
        })
        .collect()
}
