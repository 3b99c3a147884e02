//! What is put on a device to be measured: spans of one kind of block, and micro-batches for them.

use std::sync::Arc;

use kernels::PAGE_TOKENS;
use scheduler::{
    MicroBatch, MicroBatchId, PageIdx, Request, RequestKey, Sampling, SequenceId, Slice, Span, TokenId,
};

use crate::block::{Attention, Block, Ffn};
use crate::memory::StepSize;
use crate::model::Model;
use crate::sharing::{AttentionSharing, BlockSharing, Sharing};
use crate::span::SpanOptions;
use crate::stage::Activations;

/// Rows of almost no context share pages in groups of this many: they stand at positions 0 to 7.
const ROWS_OF_PAGE: usize = 8;

/// The mean context of such rows.
pub(crate) const SHORT_CONTEXT: f64 = (ROWS_OF_PAGE as f64 + 1.0) / 2.0;

/// Tokens of the micro-batches that fill pages.
const FILL_TOKENS: usize = 512;

/// Positions between those that are written: 8 rows of values of a head of 128 in f32 are 4 KB.
const FILL_STEP: usize = 8;

/// A part of a model, made of blocks of the real one or of none.
#[derive(Debug, Clone)]
pub(super) struct Subject {
    pub(super) model: Model,
    pub(super) options: SpanOptions,
    /// Of several devices.
    pub(super) sharing: Sharing,
}

/// Where in a model a subject's blocks stand, which decides what it has beside them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    First,
    Middle,
    Last,
}

/// A micro-batch with what comes along.
#[derive(Debug, Clone)]
pub(super) struct Step {
    pub(super) batch: MicroBatch,
    /// None where tokens are embedded.
    pub(super) input: Option<Activations>,
}

impl Subject {
    /// `copies` of a block, each with memory of its own, with `num_pages` for each.
    pub(super) fn blocks(
        model: &Model,
        block: Block,
        copies: usize,
        num_pages: usize,
        context_tokens: usize,
    ) -> Self {
        // One block on either side is never loaded: the span is neither first nor last.
        Self::span(
            model,
            vec![block; copies + 2],
            Span { start: 1, end: copies + 1 },
            num_pages,
            context_tokens,
        )
    }

    /// All of a model, for steps of so many rows at most and as many sequences as a job would have.
    pub(super) fn whole(
        model: &Model,
        num_pages: usize,
        context_tokens: usize,
        [rows, sequences]: [usize; 2],
    ) -> Self {
        let part = Span { start: 0, end: model.config.blocks.len() }.into();
        let largest_step = Some(StepSize { rows, sequences, context_tokens, micro_batches: 1, arrivals: 0 });
        let options = SpanOptions { part, num_pages, context_tokens, largest_step };
        Subject { model: model.clone(), options, sharing: Sharing::default() }
    }

    /// What a stage has beside its blocks.
    pub(super) fn no_blocks(model: &Model, place: Place) -> Self {
        let nothing = Block { slot: 0, attention: Attention::None, ffn: Ffn::None };
        let at = match place {
            Place::First => 0,
            Place::Middle => 1,
            Place::Last => 2,
        };
        Self::span(model, vec![nothing; 2], Span { start: at, end: at }, 1, 1)
    }

    fn span(model: &Model, blocks: Vec<Block>, span: Span, num_pages: usize, context_tokens: usize) -> Self {
        let mut config = (*model.config).clone();
        config.blocks = blocks;
        let model = Model { config: Arc::new(config), ..model.clone() };
        let options = SpanOptions { part: span.into(), num_pages, context_tokens, largest_step: None };
        Subject { model, options, sharing: Sharing::default() }
    }

    /// The same whose attention is shared by sequences.
    pub(super) fn by_sequences(self) -> Self {
        let by_sequences = BlockSharing { attention: AttentionSharing::Sequences, ..Default::default() };
        let sharing = Sharing::uniform(self.options.part.blocks.range(), by_sequences);
        Subject { sharing, ..self }
    }
}

/// Pages that [`short_rows`] need.
pub(super) fn pages_of_short_rows(tokens: usize, num_lanes: usize) -> usize {
    tokens.div_ceil(ROWS_OF_PAGE * num_lanes) * num_lanes
}

/// Rows that decode at contexts of 1 to 8, whose pages are of one lane after the other: of ranks that share out sequences each has
/// as many.
pub(super) fn short_rows(tokens: usize, num_lanes: usize, hidden: Option<usize>, vocab: usize) -> Step {
    let row = |idx: usize| {
        let (lane, place) = (idx % num_lanes, idx / num_lanes);
        let page = place / ROWS_OF_PAGE * num_lanes + lane;
        slice(idx, place % ROWS_OF_PAGE, 1, vec![page as PageIdx], vocab)
    };
    step((0..tokens).map(row).collect(), hidden)
}

/// The pages of a cache for measuring attention: some that rows have of their own, and others that they all read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pages {
    pub(super) own: usize,
    pub(super) shared: usize,
}

impl Pages {
    pub(super) fn total(self) -> usize {
        self.own + self.shared
    }

    /// Micro-batches that write somewhat of every 4 KB of every page: what was never written is no memory yet.
    pub(super) fn fill(self, hidden: usize, vocab: usize) -> Vec<Step> {
        let places = |page: usize| (0..PAGE_TOKENS).step_by(FILL_STEP).map(move |position| (page, position));
        let places: Vec<_> = (0..self.total()).flat_map(places).collect();
        let row = |(idx, &(page, position)): (usize, &(usize, usize))| {
            slice(idx, position, 1, vec![page as PageIdx], vocab)
        };
        let rows = |places: &[(usize, usize)]| places.iter().enumerate().map(row).collect();
        places.chunks(FILL_TOKENS).map(|places| step(rows(places), Some(hidden))).collect()
    }

    /// Micro-batches that write every position: a GPU's memory begins as anything, and what is no number takes attention longer.
    pub(super) fn fill_whole(self, hidden: usize, vocab: usize) -> Vec<Step> {
        let pages: Vec<usize> = (0..self.total()).collect();
        let row = |&page: &usize| slice(page, 0, PAGE_TOKENS, vec![page as PageIdx], vocab);
        let rows = |pages: &[usize]| pages.iter().map(row).collect();
        pages.chunks(FILL_TOKENS / PAGE_TOKENS).map(|pages| step(rows(pages), Some(hidden))).collect()
    }

    /// Rows that decode at a context.
    pub(super) fn decode(self, rows: usize, context: usize, hidden: Option<usize>, vocab: usize) -> Step {
        let row = |idx: usize| slice(idx, context - 1, 1, self.table(idx, 1, context), vocab);
        step((0..rows).map(row).collect(), hidden)
    }

    /// A chunk of a prompt from a position on.
    pub(super) fn chunk(self, first: usize, tokens: usize, hidden: usize, vocab: usize) -> Step {
        step(vec![self.chunk_of(0, first, tokens, vocab)], Some(hidden))
    }

    /// Chunks of several prompts, tokens to be embedded; their last is drawn from where they end.
    pub(super) fn prompts(
        self,
        prompts: usize,
        first: usize,
        tokens: usize,
        is_end: bool,
        vocab: usize,
    ) -> Step {
        let chunk = |idx| Slice { sample: is_end, ..self.chunk_of(idx, first, tokens, vocab) };
        step((0..prompts).map(chunk).collect(), None)
    }

    fn chunk_of(self, idx: usize, first: usize, tokens: usize, vocab: usize) -> Slice {
        let table = self.table(idx, pages_of_chunk(tokens), first + tokens);
        slice(idx, first, tokens, table, vocab)
    }

    /// The pages of a sequence: its last `num_own` are those that it writes, what is before them is anybody's.
    fn table(self, idx: usize, num_own: usize, positions: usize) -> Vec<PageIdx> {
        let num_pages = positions.div_ceil(PAGE_TOKENS);
        let num_shared = num_pages.saturating_sub(num_own);
        let shared = (0..num_shared).map(|page| self.own + (idx * num_shared + page) % self.shared);
        let own = (0..num_pages - num_shared).map(|page| idx * num_own + page);
        shared.chain(own).map(|page| page as PageIdx).collect()
    }
}

/// Pages that a chunk of so many tokens writes, at most.
pub(super) fn pages_of_chunk(tokens: usize) -> usize {
    tokens.div_ceil(PAGE_TOKENS) + 1
}

fn slice(idx: usize, first_position: usize, tokens: usize, pages: Vec<PageIdx>, vocab: usize) -> Slice {
    Slice {
        sequence: SequenceId(idx as u64),
        first_position: first_position as u32,
        // Knuth's multiplicative hash: rows of an embedding that lie apart.
        tokens: (idx..idx + tokens).map(|token| (token * 2_654_435_761 % vocab) as TokenId).collect(),
        pages: Arc::new(pages),
        sample: tokens == 1,
        bars_stops: false,
        score: Vec::new(),
        counts: None,
        mask: None,
        fed_back: None,
        request: request(),
    }
}

/// Anything that is greedy.
fn request() -> Arc<Request> {
    let sampling = Sampling::greedy(1);
    Arc::new(Request { key: RequestKey(0), prompt: vec![0], sampling: Arc::new(sampling), sample: 0 })
}

fn step(slices: Vec<Slice>, hidden: Option<usize>) -> Step {
    let batch = MicroBatch { id: MicroBatchId(0), slices };
    let input = hidden.map(|hidden| {
        let numbers = 0..batch.num_tokens() * hidden;
        // Of the size that norms expect, and nothing that is a special case of arithmetic.
        let values: Vec<f32> = numbers.map(|i| (i * 7919 % 1000) as f32 / 500.0 - 0.999).collect();
        Activations { values: values.into(), sums: None, hidden }
    });
    Step { batch, input }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn rows_write_pages_of_their_own_and_read_shared_ones() {
        let pages = Pages { own: 4, shared: 3 };
        let step = pages.decode(4, 300, Some(8), 100);
        let tables: Vec<&[PageIdx]> = step.batch.slices.iter().map(|slice| &slice.pages[..]).collect();
        assert_eq!(tables[0], [4, 5, 6, 4, 0]);
        assert_eq!(tables[1], [5, 6, 4, 5, 1]);
        let chunk = pages.chunk(200, 128, 8, 100);
        assert_eq!(chunk.batch.slices[0].pages[..], [4, 5, 6, 0, 1, 2]);
        assert_eq!(pages.chunk(0, 128, 8, 100).batch.slices[0].pages[..], [0, 1]);
    }

    #[test]
    fn every_position_of_every_page_is_filled() {
        let steps = Pages { own: 7, shared: 3 }.fill_whole(8, 100);
        let tokens: Vec<usize> = steps.iter().map(|step| step.batch.num_tokens()).collect();
        assert_eq!(tokens, [512, 128]);
        let last = &steps[1].batch.slices[1];
        assert_eq!((&last.pages[..], last.first_position, last.sample), (&[9][..], 0, false));
    }

    #[test]
    fn short_rows_never_share_a_position() {
        for (num_lanes, num_pages) in [(1, 3), (2, 4), (3, 3)] {
            let step = short_rows(20, num_lanes, None, 50);
            let places: BTreeSet<_> =
                step.batch.slices.iter().map(|slice| (slice.pages[0], slice.first_position)).collect();
            assert_eq!((places.len(), pages_of_short_rows(20, num_lanes)), (20, num_pages));
            let lanes = step.batch.slices.iter().map(|slice| slice.pages[0] as usize % num_lanes);
            assert!(lanes.eq((0..20).map(|idx| idx % num_lanes)));
            assert!(step.batch.slices.iter().all(|slice| (slice.pages[0] as usize) < num_pages));
        }
        let load = short_rows(20, 1, None, 50).batch.load();
        assert_eq!((load.tokens(), load.logit_rows), (20.0, 20.0));
    }
}
