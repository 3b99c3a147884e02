//! Micro-batches of rows that decode, for whoever asks for times alone.

use std::sync::Arc;

use scheduler::{MicroBatch, MicroBatchId, Request, RequestKey, Sampling, SequenceId, Slice, TokenId};

/// Rows that decode at the same position of sequences of their own, greedily, each with pages of its own. What
/// these hold is anything, unless a stage has filled them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Decoding {
    pub(crate) rows: usize,
    /// Positions that each row attends to.
    pub(crate) context: usize,
    pub(crate) pages_of_row: usize,
}

impl Decoding {
    /// A micro-batch, with the token of each row.
    pub(crate) fn micro_batch(self, id: u64, token: impl Fn(usize) -> TokenId) -> MicroBatch {
        let Decoding { rows, context, pages_of_row } = self;
        let sampling = Arc::new(Sampling::greedy(1));
        let slice = |row: usize| Slice {
            sequence: SequenceId(row as u64),
            first_position: (context - 1) as u32,
            tokens: std::iter::once(token(row)).collect(),
            pages: Arc::new((row * pages_of_row..(row + 1) * pages_of_row).map(|page| page as u32).collect()),
            sample: true,
            bars_stops: false,
            score: Vec::new(),
            counts: None,
            mask: None,
            fed_back: None,
            request: Arc::new(Request {
                key: RequestKey(row as u128),
                prompt: vec![0],
                sampling: Arc::clone(&sampling),
                sample: 0,
            }),
        };
        MicroBatch { id: MicroBatchId(id), slices: (0..rows).map(slice).collect() }
    }
}
