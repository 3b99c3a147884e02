//! How many KV pages the stages of a pipeline have, in which lanes: deciding only.

use anyhow::{Result, bail};
use configs::AutoCount;
use stages::PAGE_TOKENS;

use crate::gpu_memory;
use crate::lanes::{Lanes, WantedTokens};
use crate::layout::{self, StageLayout};

/// What says how many pages there are.
#[derive(Debug, Clone)]
pub(crate) enum KvPages {
    /// CPU devices have one memory: it does not matter which of them has which stage.
    Cpus {
        wanted: WantedTokens,
        /// Pages of each replica that memory has room for.
        room: usize,
    },
    /// Each GPU has its own.
    Gpus(Box<gpu_memory::Question>),
}

impl KvPages {
    pub(crate) fn gpus(&self) -> Option<&gpu_memory::Question> {
        match self {
            KvPages::Cpus { .. } => None,
            KvPages::Gpus(gpus) => Some(gpus),
        }
    }

    /// Tokens of all replicas together that devices with one memory have room for.
    pub(crate) fn shared_room(&self, replicas: usize) -> Option<u64> {
        match self {
            KvPages::Cpus { room, .. } => {
                Some((*room as u64).saturating_mul((PAGE_TOKENS * replicas) as u64))
            }
            KvPages::Gpus(_) => None,
        }
    }

    /// The pages of each replica, in the stages' lanes. Those of CPUs are memory only when they are first used.
    ///
    /// # Errors
    /// A GPU that its stages do not fit; a memory that has too few pages for lanes.
    pub(crate) fn lanes(&self, stages: &[StageLayout]) -> Result<Lanes> {
        let (wanted, room) = match self {
            KvPages::Cpus { wanted, room } => (wanted, *room),
            KvPages::Gpus(gpus) => return gpus.lanes(stages),
        };
        let lanes = wanted.lanes(layout::num_lanes(stages), room);
        let needed = lanes.num_lanes * wanted.least_pages(lanes.num_lanes);
        if lanes.num_pages() < needed {
            let what = match wanted.kv_cache_tokens {
                AutoCount::Given(tokens) => format!("[pipeline] kv_cache_tokens: {tokens} take"),
                AutoCount::Auto => format!("a context of {} tokens takes", wanted.context_tokens),
            };
            bail!(
                "{what} {} tokens of KV cache in {} lanes, and memory has room for {} beside the weights\nhint: devices share out \
                 sequences, as in the job's first run: free memory, or pass --accept-numerics with split_blocks = \"all\"",
                needed * PAGE_TOKENS,
                lanes.num_lanes,
                room * PAGE_TOKENS
            );
        }
        Ok(lanes)
    }

    /// Whether each GPU has room for its stages.
    pub(crate) fn fit(&self, stages: &[StageLayout]) -> bool {
        self.lanes(stages).is_ok()
    }

    /// Refuses stages that share out sequences as in the job's first run where that leaves less room for a row than the job's cache
    /// has: where the job does not say how large that is, each lane has room for the longest row.
    ///
    /// # Errors
    /// A cache that is too small for the stages' lanes.
    pub(crate) fn check_rows(&self, stages: &[StageLayout]) -> Result<()> {
        let WantedTokens { kv_cache_tokens, context_tokens, .. } = match self {
            KvPages::Cpus { wanted, .. } => *wanted,
            KvPages::Gpus(gpus) => gpus.wanted(),
        };
        let AutoCount::Given(tokens) = kv_cache_tokens else { return Ok(()) };
        let lanes = self.lanes(stages)?;
        if lanes.row_tokens() < context_tokens.min(tokens) {
            let (num_lanes, row_tokens) = (lanes.num_lanes, lanes.row_tokens());
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

    fn stages(num_lanes: usize) -> [StageLayout; 1] {
        let by_sequences = BlockSharing { attention: AttentionSharing::Sequences, ..Default::default() };
        let sharing = match num_lanes {
            1 => Sharing::default(),
            _ => Sharing::uniform([2], by_sequences),
        };
        [StageLayout { part: Span { start: 0, end: 4 }.into(), devices: 0..3, sharing }]
    }

    fn pages(kv_cache_tokens: AutoCount, context_tokens: usize, room: usize) -> KvPages {
        let wanted = WantedTokens { kv_cache_tokens, context_tokens, sequences: 4 };
        KvPages::Cpus { wanted, room }
    }

    /// The bound that is checked is what is allocated.
    #[test]
    fn lanes_take_no_more_pages_than_memory_has_room_for() {
        let found = |kv_cache_tokens, context_tokens, room| {
            let pages = pages(kv_cache_tokens, context_tokens, room);
            [1, 3].map(|num_lanes| pages.lanes(&stages(num_lanes)).ok().map(Lanes::num_pages))
        };
        // Four pages for a row; of four rows one lane has two, where there is room for them.
        assert_eq!(found(AutoCount::Auto, 200, 30), [Some(16), Some(24)]);
        assert_eq!(found(AutoCount::Auto, 200, 16), [Some(16), Some(15)]);
        assert_eq!(found(AutoCount::Auto, 200, 12), [Some(12), Some(12)]);
        assert_eq!(found(AutoCount::Auto, 200, 11), [Some(11), None]);
        assert_eq!(found(AutoCount::Given(640), 200, 12), [Some(10), Some(12)]);
        assert_eq!(found(AutoCount::Given(640), 200, 11), [Some(10), None]);
    }

    #[test]
    fn a_going_on_whose_lanes_no_longer_fit_the_memory_is_refused_with_the_cure() {
        for (kv_cache_tokens, words) in [
            (AutoCount::Auto, "a context of 200 tokens takes"),
            (AutoCount::Given(640), "[pipeline] kv_cache_tokens: 640 take"),
        ] {
            let error = pages(kv_cache_tokens, 200, 11).lanes(&stages(3)).unwrap_err().to_string();
            for words in
                [words, "768 tokens of KV cache in 3 lanes", "room for 704", "split_blocks = \"all\""]
            {
                assert!(error.contains(words), "{words} is not in {error}");
            }
        }
    }

    #[test]
    fn a_cache_is_refused_whose_lanes_hold_shorter_rows_than_the_whole_of_it() {
        let refused = |tokens, context_tokens, num_lanes| {
            let pages = pages(AutoCount::Given(tokens), context_tokens, 1000);
            pages.check_rows(&stages(num_lanes)).err().map(|error| error.to_string())
        };
        // Lanes of 3 pages, and of 4.
        let error = refused(576, 200, 3).expect("a row has 192 tokens only");
        for words in
            ["kv_cache_tokens: found 576, expected at least 768", "room for 192", "split_blocks = \"all\""]
        {
            assert!(error.contains(words), "{words} is not in {error}");
        }
        assert_eq!(refused(577, 200, 3), None);
        assert_eq!(refused(576, 192, 3), None);
        assert_eq!(refused(128, 200, 1), None, "no row has had more room");
        assert!(refused(128, 200, 3).is_some());
    }
}
