//! Sums of some rows while the next ones are computed: how rows are cut into pieces, and the queue beside the one that computes.

use std::ops::Range;
use std::sync::Arc;

use crate::cuda::event::Event;
use crate::cuda::gemm::TILE_ROWS;
use crate::cuda::stream::Stream;
use crate::error::Result;

const OP: &str = "sum beside products";

/// Rows of a piece, where there are several; the last may have half as many.
///
/// Every piece reads the weights anew, which costs nothing as long as to multiply takes longer: from 184 rows of bf16 on, and 163
/// of fp8, where an H200 reads 4.3 TB/s and multiplies at 790 and 1,400 TFLOP/s. Each piece begins three pieces of work, some
/// 15 µs. Of `down` in Ultra's blocks on eight ranks (hidden 16,384, of 53,248 columns 6,656 each) 256 rows take 71 µs, and their
/// 16.8 MB of sums, of which a rank sends 2 · 7/8 by NVLink's 450 GB/s, 65 µs: 512 rows take 142 + 131 + 15 = 288 µs one after
/// the other, and 71 + 80 + 80 = 231 µs in two pieces. Half a piece takes the 51 µs in which the weights are read, and its sums
/// 33: behind another it is computed while that is summed, so that 384 rows take 71 + 80 + 48 = 199 µs for 106 + 98 + 15 = 219.
/// Of 256 rows two halves, 51 + 51 + 48 = 150 µs, gain nothing on 71 + 80 = 151.
const PIECE_ROWS: usize = 256;

/// The queue, and what it waits for.
pub(super) struct Beside {
    pub(super) stream: Arc<Stream>,
    /// Pieces of an array that will be summed.
    marks: Vec<Mark>,
    /// Moments that no piece has.
    spare: Vec<Event>,
    /// Behind all sums.
    summed: Event,
}

/// A piece.
pub(super) struct Mark {
    pub(super) rows: Range<usize>,
    computed: Event,
}

/// As many pieces as there may be, the last no larger than the others. They begin with a tile of the products, and so at 256 bytes.
pub(super) fn pieces(rows: usize) -> Vec<Range<usize>> {
    let count = ((rows + PIECE_ROWS / 2) / PIECE_ROWS).max(1);
    let start = |piece: usize| (rows * piece / count).next_multiple_of(TILE_ROWS).min(rows);
    (0..count).map(|piece| start(piece)..start(piece + 1)).collect()
}

impl Beside {
    /// Beside what `stream` computes. It comes first where both want room: who waits for sums are all ranks.
    pub(super) fn new(stream: &Arc<Stream>) -> Result<Beside> {
        let beside = Stream::open_urgent(stream.index())?;
        let summed = Event::new(OP, &beside, false)?;
        Ok(Beside { stream: beside, marks: Vec::new(), spare: Vec::new(), summed })
    }

    /// A piece is computed by what is queued.
    pub(super) fn mark(&mut self, rows: Range<usize>, stream: &Arc<Stream>) -> Result<()> {
        if rows.start == 0 {
            let of_a_failed_step = self.marks.drain(..).map(|mark| mark.computed);
            self.spare.extend(of_a_failed_step);
        }
        assert_eq!(rows.start, self.marks.last().map_or(0, |mark| mark.rows.end), "pieces follow each other");
        let computed = self.spare.pop().map_or_else(|| Event::new(OP, stream, false), Ok)?;
        computed.record(OP)?;
        self.marks.push(Mark { rows, computed });
        Ok(())
    }

    /// The pieces.
    pub(super) fn take_marks(&mut self) -> Vec<Mark> {
        std::mem::take(&mut self.marks)
    }

    /// What is computed next waits for all sums that are queued, those of these pieces.
    pub(super) fn close(&mut self, marks: Vec<Mark>, stream: &Stream) -> Result<()> {
        self.spare.extend(marks.into_iter().map(|mark| mark.computed));
        self.summed.record(OP)?;
        self.summed.hold(OP, stream)
    }
}

impl Mark {
    /// What is queued next waits until the piece is computed.
    pub(super) fn hold(&self, stream: &Stream) -> Result<()> {
        self.computed.hold(OP, stream)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_follow_each_other_and_none_of_several_is_small() {
        for rows in [0, 1, 383] {
            assert!(pieces(rows).into_iter().eq(std::iter::once(0..rows)), "{rows} rows are one piece");
        }
        assert_eq!(pieces(384), [0..256, 256..384]);
        assert_eq!(pieces(512), [0..256, 256..512]);
        assert_eq!(pieces(767), [0..256, 256..512, 512..767]);
        assert_eq!(pieces(1200), [0..256, 256..512, 512..768, 768..1024, 1024..1200]);
        for rows in 384..3000 {
            let pieces = pieces(rows);
            let next = |end, piece: &Range<usize>| (piece.start == end).then_some(piece.end);
            assert_eq!(pieces.iter().try_fold(0, next), Some(rows));
            assert!(pieces.iter().all(|piece| piece.start.is_multiple_of(TILE_ROWS)), "{pieces:?}");
            let (last, others) = pieces.split_last().unwrap();
            assert!(last.len() >= PIECE_ROWS / 2 && !others.is_empty(), "{pieces:?}");
            assert!(others.iter().all(|piece| piece.len() >= PIECE_ROWS), "{pieces:?}");
        }
    }
}
