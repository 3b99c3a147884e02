//! What stages are given.

use std::ops::Range;
use std::sync::Arc;

use scheduler::{
    MicroBatch, MicroBatchId, Request, RequestKey, Sampling, SequenceId, Slice, SliceTokens, TokenId,
};
use stages::PAGE_TOKENS;

/// A multiple of all numbers of ranks here: sequences that are numbered through are on one rank each, in turn.
const LANES: usize = 12;
pub(crate) const NUM_PAGES: usize = 2 * LANES;

/// How long prompts are.
#[derive(Clone, Copy)]
pub(crate) struct Prompts {
    /// The first one's tokens in its first micro-batch, and all of them.
    first: [usize; 2],
    second: usize,
}

impl Prompts {
    /// The first has two pages.
    pub(crate) const LONG: Prompts = Prompts { first: [70, 90], second: 33 };
    /// For models that take their time.
    pub(crate) const SHORT: Prompts = Prompts { first: [7, 9], second: 4 };

    /// Rows whose log-probabilities are asked for.
    pub(crate) fn num_scored(self) -> usize {
        let mut sum = self.first[1] + self.second;
        sum += 3; // All decode once,
        sum += 1; // and one once more.
        sum
    }

    /// Three sequences: one is prefilled in two chunks, one beside it, all decode together, and two draw.
    pub(crate) fn micro_batches(self, vocab: u32) -> Vec<MicroBatch> {
        let Prompts { first: [chunk, first], second } = self;
        let batches = [
            vec![scored(vocab, 0, 0..chunk)],
            vec![scored(vocab, 0, chunk..first), scored(vocab, 1, 0..second)],
            vec![
                scored(vocab, 2, 0..1),
                scored(vocab, 1, second..second + 1),
                scored(vocab, 0, first..first + 1),
            ],
            vec![
                scored(vocab, 1, second + 1..second + 2),
                greedy(scored(vocab, 2, 1..2)),
                greedy(scored(vocab, 0, first + 1..first + 3)),
            ],
        ];
        (0..).zip(batches).map(|(id, slices)| MicroBatch { id: MicroBatchId(id), slices }).collect()
    }
}

/// Tokens at some positions of a sequence, each with the one behind it, whose log-probability is asked for.
fn scored(vocab: u32, sequence: usize, positions: Range<usize>) -> Slice {
    let token = |position: usize| (sequence as u32 * 131 + position as u32 * 37 + 5) % vocab;
    let tokens: SliceTokens = positions.clone().map(token).collect();
    let score: Vec<TokenId> = positions.clone().map(|position| token(position + 1)).collect();
    let sampling = Sampling { logprobs: Some(5), prompt_logprobs: true, ..Sampling::greedy(4) };
    let request = Request {
        key: RequestKey(sequence as u128),
        prompt: vec![0],
        sampling: Arc::new(sampling),
        sample: 0,
    };
    let pages =
        (0..positions.end.div_ceil(PAGE_TOKENS)).map(|page| (LANES * page + sequence) as u32).collect();
    Slice {
        sequence: SequenceId(sequence as u64),
        first_position: positions.start as u32,
        tokens,
        pages: Arc::new(pages),
        sample: false,
        bars_stops: false,
        score,
        counts: None,
        mask: None,
        fed_back: None,
        request: Arc::new(request),
    }
}

/// The same that draws a token and asks for nothing else.
fn greedy(slice: Slice) -> Slice {
    let request = Request { sampling: Arc::new(Sampling::greedy(4)), ..(*slice.request).clone() };
    Slice { sample: true, score: Vec::new(), request: Arc::new(request), ..slice }
}
