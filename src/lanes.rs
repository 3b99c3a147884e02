//! Lanes of KV pages, and whether a pipeline has more than one: deciding only, in one way for plans, simulations and runs.
//!
//! Where the ranks of a stage share out sequences each has the pages of its own, so that a row has no more than a lane. What a row
//! comes to must not depend on that: ranks share heads instead where a lane would hold shorter rows than the whole cache does. How
//! many rows a lane holds beside its longest one decides no answer, as those that find no page wait or give way; on GPUs, whose
//! memory bounds how many are in flight, it counts as speed. Nor is any way taken that does not fit where another does.

use configs::{AutoCount, Pipeline};
use stages::PAGE_TOKENS;

use crate::lower::{MAX_KV_TOKENS, sequences_per_replica};

/// Lanes that a pipeline's KV pages are in, as many in each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lanes {
    pub(crate) num_lanes: usize,
    /// Of each.
    pub(crate) pages: usize,
}

impl Lanes {
    pub(crate) fn num_pages(self) -> usize {
        self.num_lanes * self.pages
    }

    /// Positions that the longest row has room for.
    pub(crate) fn row_tokens(self) -> usize {
        self.pages.saturating_mul(PAGE_TOKENS)
    }
}

/// How many tokens of keys and values a pipeline wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WantedTokens {
    pub(crate) kv_cache_tokens: AutoCount,
    /// Longest sequence.
    pub(crate) context_tokens: usize,
    /// Most sequences in flight.
    pub(crate) sequences: usize,
}

impl WantedTokens {
    /// Those of each replica.
    pub(crate) fn of(pipeline: &Pipeline, context_tokens: usize) -> Self {
        let (kv_cache_tokens, sequences) = (pipeline.kv_cache_tokens, sequences_per_replica(pipeline));
        WantedTokens { kv_cache_tokens, context_tokens, sequences }
    }

    /// Lanes of what the job says, rounded up to as many pages each, or else of all that their sequences could fill; as far as there
    /// is room for so many pages in all.
    pub(crate) fn lanes(self, num_lanes: usize, room: usize) -> Lanes {
        let wanted = match self.kv_cache_tokens {
            AutoCount::Given(_) => self.least_pages(num_lanes),
            AutoCount::Auto => self.least_pages(num_lanes).saturating_mul(self.sequences.div_ceil(num_lanes)),
        };
        let room = room.min(MAX_KV_TOKENS / PAGE_TOKENS) / num_lanes;
        Lanes { num_lanes, pages: wanted.min(room) }
    }

    /// Pages that each lane must have: what the job says, or else those of the longest sequence.
    pub(crate) fn least_pages(self, num_lanes: usize) -> usize {
        match self.kv_cache_tokens {
            AutoCount::Given(tokens) => tokens.div_ceil(PAGE_TOKENS).div_ceil(num_lanes),
            AutoCount::Auto => self.context_tokens.div_ceil(PAGE_TOKENS),
        }
    }
}

/// What stages come to in one way of sharing blocks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Worth {
    pub(crate) num_lanes: usize,
    /// Positions that a row has room for; none where the stages do not fit.
    pub(crate) row_tokens: Option<usize>,
    /// In any unit, with as many rows in flight as the job allows, and on GPUs as there is room for.
    pub(crate) speed: f64,
}

impl Worth {
    /// Whether stages are taken in the place of others that are slower where memory is no question: these fit, and are as fast. Where
    /// one of both shares out sequences, what has room for longer rows comes first, of the context at most.
    fn is_taken_before(self, other: Worth, context_tokens: usize) -> bool {
        let room = |worth: Worth| worth.row_tokens.map(|tokens| tokens.min(context_tokens));
        match (room(self), room(other)) {
            (None, _) => false,
            (Some(_), Some(_)) if self.num_lanes == other.num_lanes => self.speed >= other.speed,
            (own, others) => (own, self.speed) >= (others, other.speed),
        }
    }
}

/// The best of what is found in several `ways` of sharing blocks, of which each is slower than the one before where memory is no
/// question; the last where none fits.
pub(crate) fn choose<T>(ways: Vec<T>, context_tokens: usize, worth: impl Fn(&T) -> Worth) -> Option<T> {
    let ways = ways.into_iter().map(|way| (worth(&way), way));
    let better = |best: (Worth, T), faster: (Worth, T)| {
        if faster.0.is_taken_before(best.0, context_tokens) { faster } else { best }
    };
    ways.rev().reduce(better).map(|(_, way)| way)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTEXT: usize = 1000;

    type Found = (Option<usize>, f64);

    /// Which way is taken: that with sequences in four lanes, or one of others.
    fn chosen(sequences: Found, others: &[(&'static str, Found)]) -> &'static str {
        let worth = |num_lanes, (row_tokens, speed)| Worth { num_lanes, row_tokens, speed };
        let mut ways = vec![("sequences", worth(4, sequences))];
        ways.extend(others.iter().map(|(name, found)| (*name, worth(1, *found))));
        choose(ways, CONTEXT, |(_, worth)| *worth).expect("there is a way").0
    }

    #[test]
    fn sequences_are_shared_out_where_a_lane_holds_the_longest_row_and_that_is_faster() {
        let chosen = |sequences, heads| chosen(sequences, &[("heads", heads)]);
        assert_eq!(chosen((Some(CONTEXT), 2.0), (Some(4 * CONTEXT), 1.0)), "sequences");
        assert_eq!(chosen((Some(CONTEXT), 1.0), (Some(4 * CONTEXT), 1.0)), "sequences");
        assert_eq!(chosen((Some(CONTEXT - 1), 2.0), (Some(4 * CONTEXT), 1.0)), "heads");
        // The whole cache holds no longer rows.
        assert_eq!(chosen((Some(300), 2.0), (Some(300), 1.0)), "sequences");
        // With fewer rows in flight, for which their weights leave room.
        assert_eq!(chosen((Some(CONTEXT), 1.0), (Some(CONTEXT), 2.0)), "heads");
        assert_eq!(chosen((None, 2.0), (Some(300), 1.0)), "heads");
        assert_eq!(chosen((Some(300), 1.0), (None, 2.0)), "sequences");
        assert_eq!(chosen((None, 2.0), (None, 1.0)), "heads");
    }

    #[test]
    fn of_ways_in_which_a_row_may_have_any_page_the_fastest_that_fits_is_taken() {
        let none = (None, 3.0);
        let chosen = |heads, all| chosen(none, &[("heads", heads), ("all", all)]);
        assert_eq!(chosen((Some(300), 2.0), (Some(400), 1.0)), "heads");
        assert_eq!(chosen((Some(300), 1.0), (Some(300), 1.0)), "heads");
        assert_eq!(chosen((Some(400), 1.0), (Some(300), 2.0)), "all");
        assert_eq!(chosen((None, 2.0), (Some(300), 1.0)), "all");
        assert_eq!(chosen((Some(300), 1.0), (None, 2.0)), "heads");
        assert_eq!(chosen((None, 2.0), (None, 1.0)), "all");
    }

    #[test]
    fn lanes_have_whole_rows_as_far_as_there_is_room_and_a_given_cache_is_rounded_up_to_them() {
        let lanes = |kv_cache_tokens, sequences, num_lanes, room| {
            let wanted = WantedTokens { kv_cache_tokens, context_tokens: CONTEXT, sequences };
            let lanes = wanted.lanes(num_lanes, room);
            (lanes.pages, lanes.num_pages(), lanes.row_tokens())
        };
        // Sixteen pages for a row of 1,000 tokens; two sequences in four lanes, and six.
        assert_eq!(lanes(AutoCount::Auto, 2, 4, usize::MAX), (16, 64, 1024));
        assert_eq!(lanes(AutoCount::Auto, 6, 4, usize::MAX), (32, 128, 2048));
        assert_eq!(lanes(AutoCount::Auto, 6, 4, 43), (10, 40, 640));
        assert_eq!(lanes(AutoCount::Given(640), 6, 4, 100), (3, 12, 192));
        assert_eq!(lanes(AutoCount::Given(640), 6, 4, 11), (2, 8, 128));
        assert_eq!(lanes(AutoCount::Given(640), 6, 1, 100), (10, 10, 640));
    }
}
