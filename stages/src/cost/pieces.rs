//! A model's blocks, and their FFNs' columns, as the pieces that a plan may part.

use std::ops::Range;

use kernels::SUM_CUT;

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

/// A piece has at least so many columns, so that each of 8 ranks has a unit of it: fewer would be the first rank's.
const LEAST_COLUMNS: usize = 8 * SUM_CUT;

/// All pieces of a model, in order: its blocks, or where FFNs may be cut at multiples of `column_cut` parts of them of equal
/// columns.
pub fn pieces(config: &ModelConfig, column_cut: Option<usize>) -> Vec<PieceShape> {
    let widths = || config.blocks.iter().filter_map(|block| width(block.ffn));
    let (widest, all) = (widths().max().unwrap_or(0), widths().sum::<usize>());
    let least = widest.div_ceil(MAX_PIECES).max(all.div_ceil(MAX_PIECES_IN_ALL));
    let unit = match column_cut {
        Some(multiple) => least.max(LEAST_COLUMNS).next_multiple_of(COLUMN_TILE.max(multiple)),
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
    // What would be too little for a piece of its own is the last one's.
    let count = width.saturating_sub(LEAST_COLUMNS - SUM_CUT).div_ceil(unit).max(1);
    (0..count)
        .map(|index| {
            let start = index * unit;
            let end = if index + 1 == count { width } else { start + unit };
            PieceShape { block, columns: Some(start..end), ends_block: end == width }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_of_eight_ranks_has_a_unit_of_every_piece_of_what_is_cut() {
        for unit in [512, 768, 3328] {
            for width in [1, 64, 512, 513, 1000, 1024, 1088, 3328, 3400, 14_336, 425_984] {
                let pieces = block_pieces(3, Ffn::SwiGlu { width }, unit);
                let columns: Vec<&Range<usize>> =
                    pieces.iter().map(|piece| piece.columns.as_ref().expect("an FFN of columns")).collect();
                assert_eq!((columns[0].start, columns[columns.len() - 1].end), (0, width));
                assert!(columns.windows(2).all(|pair| pair[0].end == pair[1].start), "{columns:?}");
                let is_shared = |columns: &&Range<usize>| columns.len().div_ceil(SUM_CUT) >= 8;
                assert!(pieces.len() == 1 || columns.iter().all(is_shared), "{unit}: {columns:?}");
                assert!(columns.iter().all(|columns| columns.len() < unit + LEAST_COLUMNS), "{columns:?}");
            }
        }
    }
}
