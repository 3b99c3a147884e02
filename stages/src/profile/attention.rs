//! The points of one attention, and its entry made of their times.

use kernels::PAGE_TOKENS;

use super::AttentionEntry;
use super::grid::{self, Grid};
use super::points::{Both, ContextPoint, Seconds};
use super::subject::{self, Pages, SHORT_CONTEXT, Step};
use crate::block::Dims;

/// Rows that decode or a chunk of a prompt at some context, to be compared with as many rows of almost none.
#[derive(Clone, Copy)]
struct Point {
    /// What every token attends to, on average.
    context: f64,
    tokens: usize,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Decode { context: usize },
    Prefill { first: usize },
}

/// What is measured of an attention.
pub(super) struct AttentionGrid {
    points: Vec<Point>,
    /// Tokens of micro-batches of almost no context.
    bases: Vec<usize>,
}

impl AttentionGrid {
    pub(super) fn new(grid: Grid, context_tokens: usize, micro_batch_tokens: usize) -> Self {
        let contexts = grid::contexts(context_tokens);
        let decode = |context: &usize| Point {
            context: *context as f64,
            tokens: grid.decode_rows(*context, micro_batch_tokens),
            kind: Kind::Decode { context: *context },
        };
        let prefill = |context: &usize| {
            let (first, tokens) = grid.chunk(*context, micro_batch_tokens);
            let context = first as f64 + (tokens as f64 + 1.0) / 2.0;
            Point { context, tokens, kind: Kind::Prefill { first } }
        };
        let points: Vec<Point> = contexts.iter().map(decode).chain(contexts.iter().map(prefill)).collect();
        let mut bases: Vec<usize> = points.iter().map(|point| point.tokens).collect();
        bases.sort_unstable();
        bases.dedup();
        AttentionGrid { points, bases }
    }

    /// Pages that its sequences write.
    pub(super) fn own_pages(&self) -> usize {
        let most = self.bases.last().map_or(1, |tokens| *tokens);
        most.max(subject::pages_of_chunk(most))
    }

    /// Pages that its rows read beside those, where none is to be read twice in a step.
    pub(super) fn shared_pages(&self) -> usize {
        let pages = |point: &Point| match point.kind {
            Kind::Decode { context } => point.tokens * (context.div_ceil(PAGE_TOKENS) - 1),
            Kind::Prefill { first } => {
                let pages = (first + point.tokens).div_ceil(PAGE_TOKENS);
                pages.saturating_sub(subject::pages_of_chunk(point.tokens))
            }
        };
        self.points.iter().map(pages).max().unwrap_or(0)
    }

    /// Micro-batches of almost no context, and then those of its points.
    pub(super) fn steps(&self, pages: Pages, dims: Dims) -> Vec<Step> {
        let Dims { hidden, vocab, .. } = dims;
        let base = |tokens: &usize| subject::short_rows(*tokens, 1, Some(hidden), vocab);
        let point = |point: &Point| match point.kind {
            Kind::Decode { context } => pages.decode(point.tokens, context, Some(hidden), vocab),
            Kind::Prefill { first } => pages.chunk(first, point.tokens, hidden, vocab),
        };
        self.bases.iter().map(base).chain(self.points.iter().map(point)).collect()
    }

    /// What the times of its steps over so many copies say.
    pub(super) fn entry(
        &self,
        kv_heads: usize,
        copies: usize,
        kv_bytes_per_token: u64,
        times: &[Both<Seconds>],
    ) -> AttentionEntry {
        let (bases, times) = times.split_at(self.bases.len());
        let curve = |is_wanted: fn(Kind) -> bool| {
            Both { alone: (), busy: () }.map(|(), neighbours| {
                let of_kind = self.points.iter().zip(times).filter(|(point, _)| is_wanted(point.kind));
                let context_point = |(point, times): (&Point, &Both<Seconds>)| {
                    let base = self.bases.binary_search(&point.tokens).expect("every point has its base");
                    let base = bases[base].get(neighbours).median;
                    let parts = (copies * point.tokens) as f64;
                    let seconds = times.get(neighbours).share(base, parts);
                    let kv_bytes = kv_bytes_per_token as f64 * (point.context - SHORT_CONTEXT);
                    // Less than no time for more positions is chance, or a chunk that is cheaper than single rows.
                    let bytes_per_second = if seconds.median > 0.0 { kv_bytes / seconds.median } else { 0.0 };
                    ContextPoint { context: point.context, seconds, bytes_per_second }
                };
                of_kind.map(context_point).collect()
            })
        };
        AttentionEntry {
            kv_heads,
            decode: curve(|kind| matches!(kind, Kind::Decode { .. })),
            prefill: curve(|kind| matches!(kind, Kind::Prefill { .. })),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::stage::Device;

    const DIMS: Dims = Dims { hidden: 8, heads: 1, head_dim: 8, vocab: 100 };

    #[test]
    fn on_cores_no_row_of_a_step_reads_a_page_of_another_and_no_page_is_there_for_nothing() {
        for (context_tokens, micro_batch_tokens) in
            [(64, 6), (500, 512), (2000, 512), (8192, 64), (40_000, 512)]
        {
            let grid = AttentionGrid::new(Grid::of(&Device::Reference), context_tokens, micro_batch_tokens);
            let pages = Pages { own: grid.own_pages(), shared: grid.shared_pages() };
            let mut read = HashSet::new();
            for step in grid.steps(pages, DIMS).iter().skip(grid.bases.len()) {
                let all: Vec<_> =
                    step.batch.slices.iter().flat_map(|slice| slice.pages.iter().copied()).collect();
                assert_eq!(
                    all.iter().collect::<HashSet<_>>().len(),
                    all.len(),
                    "{context_tokens}: a page twice"
                );
                read.extend(all.into_iter().map(|page| page as usize));
            }
            assert!(read.iter().all(|page| *page < pages.total()), "{context_tokens}");
            let shared = read.iter().filter(|page| **page >= pages.own).count();
            assert_eq!(shared, pages.shared, "{context_tokens}: so many are read");
        }
    }
}
