//! How many KV pages the stages of a pipeline have, and how many a row may have of them: deciding only.

use anyhow::{Result, bail};
use configs::{KvCacheTokens, Pipeline};
use stages::PAGE_TOKENS;

use crate::layout::{self, StageLayout};
use crate::{gpu_memory, lower};

/// What says how many pages there are.
#[derive(Debug, Clone)]
pub(crate) enum KvPages {
    /// CPU devices have one memory: it does not matter which of them has which stage.
    Cpus {
        /// Pages of each replica.
        num_pages: usize,
        /// Pages that must be there for each row, whatever memory says.
        of_row: usize,
        /// Rows that they must be there for: all in flight where memory has room for them, else one.
        rows: usize,
    },
    /// Each GPU has its own.
    Gpus(Box<gpu_memory::Question>),
}

/// What there is memory for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct KvRoom {
    /// Of all rows together.
    pub(crate) tokens: usize,
    /// Of the longest row: those of a lane.
    pub(crate) row_tokens: usize,
}

impl KvPages {
    /// Those of CPU devices whose memory has room for so many.
    pub(crate) fn of_cpus(pipeline: &Pipeline, num_pages: usize, context_tokens: usize) -> Self {
        let sequences = lower::sequences_per_replica(pipeline);
        let (of_row, rows) = match pipeline.kv_cache_tokens {
            KvCacheTokens::Auto => {
                let of_row = context_tokens.div_ceil(PAGE_TOKENS);
                (of_row, if num_pages >= of_row.saturating_mul(sequences) { sequences } else { 1 })
            }
            KvCacheTokens::Tokens(_) => (1, 1),
        };
        KvPages::Cpus { num_pages, of_row, rows }
    }

    pub(crate) fn gpus(&self) -> Option<&gpu_memory::Question> {
        match self {
            KvPages::Cpus { .. } => None,
            KvPages::Gpus(gpus) => Some(gpus),
        }
    }

    /// Pages of each replica, as many in each of the stages' lanes. Those of CPUs are memory only when they are first used.
    ///
    /// # Errors
    /// A GPU that its stages do not fit.
    pub(crate) fn num_pages(&self, stages: &[StageLayout]) -> Result<usize> {
        let num_lanes = layout::num_lanes(stages);
        match self {
            KvPages::Cpus { num_pages, of_row, rows } => {
                let lane_pages = num_pages.div_ceil(num_lanes).max(of_row * rows.div_ceil(num_lanes));
                Ok(lane_pages * num_lanes)
            }
            KvPages::Gpus(gpus) => gpus.num_pages(stages),
        }
    }

    /// Whether each GPU has room for its stages.
    pub(crate) fn fit(&self, stages: &[StageLayout]) -> bool {
        self.num_pages(stages).is_ok()
    }

    /// What there is memory for; none where a GPU has no room for its stages.
    pub(crate) fn room(&self, stages: &[StageLayout]) -> Option<KvRoom> {
        let num_pages = match self {
            KvPages::Cpus { num_pages, .. } => *num_pages,
            KvPages::Gpus(gpus) => gpus.num_pages(stages).ok()?,
        };
        let lane_pages = num_pages / layout::num_lanes(stages);
        Some(KvRoom { tokens: num_pages * PAGE_TOKENS, row_tokens: lane_pages * PAGE_TOKENS })
    }

    /// Refuses stages that share out sequences as in the job's first run where that leaves less room for a row than the job's cache
    /// has: where the job does not say how large that is, each lane has room for the longest row.
    ///
    /// # Errors
    /// A cache that is too small for the stages' lanes.
    pub(crate) fn check_rows(
        &self,
        stages: &[StageLayout],
        kv_cache_tokens: KvCacheTokens,
        context_tokens: usize,
    ) -> Result<()> {
        let (num_lanes, KvCacheTokens::Tokens(tokens)) = (layout::num_lanes(stages), kv_cache_tokens) else {
            return Ok(());
        };
        let row_tokens = self.num_pages(stages)? / num_lanes * PAGE_TOKENS;
        if row_tokens < context_tokens.min(tokens) {
            let needed = context_tokens.next_multiple_of(PAGE_TOKENS) * num_lanes;
            bail!(
                "[pipeline] kv_cache_tokens: found {tokens}, expected at least {needed}: devices share out sequences, as in the job's first \
                 run, and a row of {context_tokens} tokens has a part in {num_lanes} of the cache, room for {row_tokens}\nhint: set \
                 kv_cache_tokens to {needed} or \"auto\", or pass --accept-numerics with split_blocks = \"all\""
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use scheduler::Span;
    use stages::{AttentionSharing, BlockSharing, Sharing};

    use super::*;

    #[test]
    fn ranks_that_share_out_sequences_have_as_many_pages_each_and_rows_those_of_one() {
        let by_sequences = BlockSharing { attention: AttentionSharing::Sequences, ..Default::default() };
        let stages =
            |sharing| [StageLayout { part: Span { start: 0, end: 4 }.into(), devices: 0..3, sharing }];
        let by_heads = stages(Sharing::default());
        let by_sequences = stages(Sharing::uniform([2], by_sequences));
        for (kv_cache_tokens, pages) in
            [(KvCacheTokens::Auto, [10, 12]), (KvCacheTokens::Tokens(640), [10, 12])]
        {
            let pipeline = Pipeline { kv_cache_tokens, ..Pipeline::default() };
            let found = KvPages::of_cpus(&pipeline, 10, 200);
            let num_pages = [&by_heads, &by_sequences].map(|stages| found.num_pages(stages).unwrap());
            assert_eq!(num_pages, pages, "{kv_cache_tokens:?}");
            let rooms = [&by_heads, &by_sequences].map(|stages| found.room(stages).unwrap());
            assert_eq!(rooms.map(|room| (room.tokens, room.row_tokens)), [(640, 640), (640, 192)]);
        }
        // A context of 640 tokens has room on each rank, where nobody says how large the cache is.
        let long = KvPages::of_cpus(&Pipeline::default(), 10, 640);
        assert_eq!(long.num_pages(&by_sequences).unwrap(), 30);
        // Where there is memory for all rows in flight, four of four pages each, none has to wait for a lane's second row.
        let pipeline = Pipeline { max_sequences: 4, ..Pipeline::default() };
        let all = KvPages::of_cpus(&pipeline, 16, 200);
        assert_eq!([&by_heads, &by_sequences].map(|stages| all.num_pages(stages).unwrap()), [16, 24]);
    }

    #[test]
    fn a_cache_is_refused_whose_lanes_hold_shorter_rows_than_the_whole_of_it() {
        let by_sequences = BlockSharing { attention: AttentionSharing::Sequences, ..Default::default() };
        let stages =
            |sharing| [StageLayout { part: Span { start: 0, end: 4 }.into(), devices: 0..3, sharing }];
        let refused = |tokens, context_tokens, sharing: Sharing| {
            let kv_cache_tokens = KvCacheTokens::Tokens(tokens);
            let pipeline = Pipeline { kv_cache_tokens, ..Pipeline::default() };
            let found = KvPages::of_cpus(&pipeline, tokens.div_ceil(PAGE_TOKENS), context_tokens);
            let checked = found.check_rows(&stages(sharing), kv_cache_tokens, context_tokens);
            checked.err().map(|error| error.to_string())
        };
        let by_sequences = || Sharing::uniform([2], by_sequences);
        // Lanes of 3 pages, and of 4.
        let error = refused(576, 200, by_sequences()).expect("a row has 192 tokens only");
        for words in
            ["kv_cache_tokens: found 576, expected at least 768", "room for 192", "split_blocks = \"all\""]
        {
            assert!(error.contains(words), "{words} is not in {error}");
        }
        assert_eq!(refused(577, 200, by_sequences()), None);
        assert_eq!(refused(576, 192, by_sequences()), None);
        assert_eq!(refused(128, 200, Sharing::default()), None, "no row has had more room");
        assert!(refused(128, 200, by_sequences()).is_some());
    }
}
