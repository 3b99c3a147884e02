//! A micro-batch as a device takes it: flat lists of tokens, positions and slices.
//!
//! The lists are filled anew for every micro-batch and keep their memory, so that the steady state allocates nothing.

use kernels::AttentionSlice;
use scheduler::{FedBack, MicroBatch, TokenId};

use crate::ranks::RankStep;

/// The lists of one micro-batch.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    tokens: Vec<TokenId>,
    fed: Vec<(u32, u32)>,
    positions: Vec<u32>,
    /// Those beyond `num_slices` wait with their memory for a micro-batch of more.
    slices: Vec<AttentionSlice>,
    num_slices: usize,
}

/// A token that is fed back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fed {
    Known(TokenId),
    /// The place of its answer among those of the step before.
    Drawn(u32),
}

impl Batch {
    /// Takes on a micro-batch; `find` says of a token that is fed back what it is, or which of another step's answers.
    pub(crate) fn assign(&mut self, batch: &MicroBatch, find: impl Fn(FedBack) -> Fed) {
        self.tokens.clear();
        self.fed.clear();
        self.make_room(batch.slices.len());
        for (slice, out) in batch.slices.iter().zip(&mut self.slices) {
            let (first_position, num_rows) = (slice.first_position, slice.tokens.len());
            out.first_row = self.tokens.len();
            out.num_rows = num_rows;
            out.first_position = first_position as usize;
            out.pages.clear();
            out.pages.extend_from_slice(&slice.pages);
            match slice.fed_back.map(&find) {
                None => self.tokens.extend_from_slice(&slice.tokens),
                Some(Fed::Known(token)) => self.tokens.push(token),
                Some(Fed::Drawn(place)) => {
                    self.fed.push((self.tokens.len() as u32, place));
                    self.tokens.push(0);
                }
            }
            self.positions.extend(first_position..first_position + num_rows as u32);
        }
    }

    /// Takes on what a rank beside the first is told of a micro-batch: all but its tokens.
    pub(crate) fn follow(&mut self, step: &RankStep) {
        self.tokens.clear();
        self.make_room(step.slices.len());
        for (slice, out) in step.slices.iter().zip(&mut self.slices) {
            let AttentionSlice { first_row, num_rows, first_position, pages } = slice;
            (out.first_row, out.num_rows, out.first_position) = (*first_row, *num_rows, *first_position);
            out.pages.clone_from(pages);
            self.positions
                .extend((*first_position..first_position + num_rows).map(|position| position as u32));
        }
    }

    fn make_room(&mut self, num_slices: usize) {
        self.positions.clear();
        self.num_slices = num_slices;
        let empty = || AttentionSlice { first_row: 0, num_rows: 0, first_position: 0, pages: Vec::new() };
        if self.slices.len() < num_slices {
            self.slices.resize_with(num_slices, empty);
        }
    }

    /// Rows, a token each.
    pub(crate) fn num_rows(&self) -> usize {
        self.positions.len()
    }

    /// Whether each row is a sequence of its own.
    pub(crate) fn is_decode(&self) -> bool {
        self.num_slices > 0 && self.num_slices == self.num_rows()
    }

    /// Tokens to embed, a row each.
    pub(crate) fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    /// Rows whose token is an answer of the step before instead, and which of them.
    pub(crate) fn fed(&self) -> &[(u32, u32)] {
        &self.fed
    }

    /// The rows' positions in their sequences.
    pub(crate) fn positions(&self) -> &[u32] {
        &self.positions
    }

    /// The sequences' rows and pages.
    pub(crate) fn slices(&self) -> &[AttentionSlice] {
        &self.slices[..self.num_slices]
    }
}
