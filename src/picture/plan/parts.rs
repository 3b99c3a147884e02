//! What a stage's time is made of, in the order in which it is spent: the parts of its bar.
//!
//! The parts of a stage sum up to its time in the plan's own costs, for the plan's micro-batch.

use std::ops::Range;

use scheduler::{PlannedStage, Problem};
use stages::ModelConfig;
use stages::cost::PieceShape;

use crate::inspect::ffn_width;

/// A part of a stage and its time.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Segment {
    pub(super) part: Part,
    pub(super) seconds: f64,
}

/// What a stage has.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Part {
    Embedding,
    /// A block, or a share of its FFN's columns.
    Block {
        index: usize,
        share: f64,
        has_first_column: bool,
    },
    /// Output matrix and sampling.
    Head,
    /// Handing the micro-batch on, and round among the stage's devices before that.
    Hop,
}

/// The parts of a stage; those that take no time are left out, but for blocks.
pub(super) fn segments(
    config: &ModelConfig,
    pieces: &[PieceShape],
    problem: &Problem<'_>,
    stage: &PlannedStage,
) -> Vec<Segment> {
    let costs = problem.rank_costs(stage);
    let alone = costs.without_extras();
    let Range { start, end } = stage.pieces;
    // A run of no pieces costs what stands at its end of the model alone.
    let embedding = if start == 0 { costs.seconds(0..0) } else { 0.0 };
    let head = if end == pieces.len() { costs.seconds(end..end) } else { 0.0 };
    let mut segments = vec![Segment { part: Part::Embedding, seconds: embedding }];
    let mut piece = start;
    for of_block in pieces[start..end].chunk_by(|one, next| one.block == next.block) {
        let seconds = alone.seconds(piece..piece + of_block.len());
        segments.push(Segment { part: block_part(config, of_block), seconds });
        piece += of_block.len();
    }
    segments.push(Segment { part: Part::Head, seconds: head });
    let entry = if stage.pieces.is_empty() { 0.0 } else { costs.entry_seconds() };
    segments.push(Segment { part: Part::Hop, seconds: problem.hop_seconds(stage) + entry });
    segments.retain(|segment| segment.seconds > 0.0 || matches!(segment.part, Part::Block { .. }));
    segments
}

/// The part that neighbouring pieces of one block are.
fn block_part(config: &ModelConfig, pieces: &[PieceShape]) -> Part {
    let index = pieces[0].block;
    let columns: usize = pieces.iter().filter_map(|piece| piece.columns.as_ref()).map(|own| own.len()).sum();
    let share = match ffn_width(&config.blocks[index]) {
        Some(width) => columns as f64 / width as f64,
        None => 1.0,
    };
    let has_first_column = pieces[0].columns.as_ref().is_none_or(|columns| columns.start == 0);
    Part::Block { index, share, has_first_column }
}
