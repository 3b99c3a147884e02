//! How many KV pages the stages of a pipeline have, and how many a row may have of them: deciding only.

use anyhow::Result;
use configs::{KvCacheTokens, Pipeline};
use stages::PAGE_TOKENS;

use crate::gpu_memory;
use crate::layout::{self, StageLayout};

/// What says how many pages there are.
#[derive(Debug, Clone)]
pub(crate) enum KvPages {
    /// CPU devices have one memory: it does not matter which of them has which stage.
    Cpus {
        /// Pages of each replica.
        num_pages: usize,
        /// Pages that must be there for each row, whatever memory says.
        of_row: usize,
    },
    /// Each GPU has its own.
    Gpus(Box<gpu_memory::Question>),
}

impl KvPages {
    /// Those of CPU devices whose memory has room for so many.
    pub(crate) fn of_cpus(pipeline: &Pipeline, num_pages: usize, context_tokens: usize) -> Self {
        let of_row = match pipeline.kv_cache_tokens {
            KvCacheTokens::Auto => context_tokens.div_ceil(PAGE_TOKENS),
            KvCacheTokens::Tokens(_) => 1,
        };
        KvPages::Cpus { num_pages, of_row }
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
            KvPages::Cpus { num_pages, of_row } => {
                Ok((*num_pages).max(of_row * num_lanes).next_multiple_of(num_lanes))
            }
            KvPages::Gpus(gpus) => gpus.num_pages(stages),
        }
    }

    /// Whether each GPU has room for its stages.
    pub(crate) fn fit(&self, stages: &[StageLayout]) -> bool {
        self.num_pages(stages).is_ok()
    }

    /// Tokens of the longest row that there is memory for: of a lane.
    pub(crate) fn row_tokens(&self, stages: &[StageLayout]) -> usize {
        let num_pages = match self {
            KvPages::Cpus { num_pages, .. } => *num_pages,
            KvPages::Gpus(gpus) => gpus.num_pages(stages).unwrap_or(0),
        };
        num_pages / layout::num_lanes(stages) * PAGE_TOKENS
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
            assert_eq!((found.row_tokens(&by_heads), found.row_tokens(&by_sequences)), (640, 192));
        }
        // A context of 640 tokens has room on each rank, where nobody says how large the cache is.
        let long = KvPages::of_cpus(&Pipeline::default(), 10, 640);
        assert_eq!(long.num_pages(&by_sequences).unwrap(), 30);
    }
}
