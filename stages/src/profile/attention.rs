//! The points of one attention, and its entry made of their times.

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
