//! Which part of each block a rank of a stage has: arithmetic of shapes alone, the same on every rank.
//!
//! Shares are whole units, as equal as they get: [`SUM_CUT`] columns of an FFN or of a linear half, heads of attention.
//! What has fewer units than there are ranks runs on the first rank whatever a [`Sharing`](crate::Sharing) says of it.

use std::ops::Range;

use kernels::SUM_CUT;

use crate::block::{Attention, Dims, Ffn};
use crate::sharing::{AttentionSharing, FfnSharing};

/// One of the ranks of a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RankPlace {
    /// Which it is, from 0.
    pub rank: usize,
    /// How many there are.
    pub num_ranks: usize,
}

/// A rank's part of an attention half.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum AttentionShard {
    /// Some heads, maybe none; the ranks' results are added up.
    Heads {
        /// Query heads.
        query: Range<usize>,
        /// KV heads that those read.
        kv: Range<usize>,
    },
    /// All heads, of the rank's sequences.
    Sequences,
    /// Some columns of what a linear half gives; the ranks' results lie side by side.
    Columns(Range<usize>),
    /// All of it on the first rank, nothing on the others.
    FirstRank,
    /// There is none.
    None,
}

/// A rank's part of an FFN half.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum FfnShard {
    /// Some columns of gate and up, and the same of the inputs of down; the ranks' results are added up.
    Inner(Range<usize>),
    /// As for attention.
    Columns(Range<usize>),
    /// As for attention.
    FirstRank(Range<usize>),
    /// There is none.
    None,
}

impl RankPlace {
    /// The only rank.
    pub const ALONE: RankPlace = RankPlace { rank: 0, num_ranks: 1 };

    /// Its share of `count` units.
    pub(crate) fn share(self, count: usize) -> Range<usize> {
        let RankPlace { rank, num_ranks } = self;
        count * rank / num_ranks..count * (rank + 1) / num_ranks
    }

    /// Whether a page of the pool is its own where sequences are shared out: ranks have pages in turn.
    pub(crate) fn has_page(self, page: u32) -> bool {
        page as usize % self.num_ranks == self.rank
    }

    /// Which of its own pages that is.
    pub(crate) fn own_page(self, page: u32) -> u32 {
        assert!(self.has_page(page), "page {page} is not of {self:?}, where another of its sequence is");
        page / self.num_ranks as u32
    }

    /// How many of the pool's pages are its own, where each has as many.
    pub(crate) fn own_pages(self, num_pages: usize) -> usize {
        assert!(num_pages.is_multiple_of(self.num_ranks), "{num_pages} pages of {} ranks", self.num_ranks);
        num_pages / self.num_ranks
    }

    /// Its share of `columns` in whole units, the last of which may be smaller; `None` where not every rank would have
    /// one.
    pub(crate) fn columns(self, columns: Range<usize>) -> Option<Range<usize>> {
        let units = columns.len().div_ceil(SUM_CUT);
        (units >= self.num_ranks).then(|| {
            let Range { start, end } = self.share(units);
            let place = |unit: usize| (columns.start + unit * SUM_CUT).min(columns.end);
            place(start)..place(end)
        })
    }

    /// Its part of an attention half.
    pub(crate) fn attention(
        self,
        attention: Attention,
        dims: Dims,
        sharing: AttentionSharing,
    ) -> AttentionShard {
        match (attention, sharing) {
            (Attention::Gqa { .. }, AttentionSharing::Sequences) if self.num_ranks > 1 => {
                AttentionShard::Sequences
            }
            (Attention::None, _) => AttentionShard::None,
            (_, AttentionSharing::FirstRank) => AttentionShard::FirstRank,
            (Attention::Gqa { .. }, _) if dims.heads < self.num_ranks => AttentionShard::FirstRank,
            (Attention::Gqa { kv_heads }, _) => self.heads(dims.heads, kv_heads),
            (Attention::Linear, _) => {
                self.columns(0..dims.hidden).map_or(AttentionShard::FirstRank, AttentionShard::Columns)
            }
        }
    }

    /// Its heads: a rank has whole groups, or a part of one group.
    fn heads(self, heads: usize, kv_heads: usize) -> AttentionShard {
        let RankPlace { rank, num_ranks } = self;
        let group = heads / kv_heads;
        if kv_heads >= num_ranks {
            let kv = self.share(kv_heads);
            return AttentionShard::Heads { query: kv.start * group..kv.end * group, kv };
        }
        // Ranks are shared out to KV heads, and each head's group to its ranks.
        let ranks_of = |head: usize| head * num_ranks / kv_heads..(head + 1) * num_ranks / kv_heads;
        let head = (0..kv_heads).find(|head| ranks_of(*head).contains(&rank)).expect("each rank has a head");
        let ranks = ranks_of(head);
        let own = RankPlace { rank: rank - ranks.start, num_ranks: ranks.len() }.share(group);
        AttentionShard::Heads { query: head * group + own.start..head * group + own.end, kv: head..head + 1 }
    }

    /// Its part of an FFN half, of which the stage has these columns of a SwiGLU.
    pub(crate) fn ffn(self, ffn: Ffn, dims: Dims, columns: Range<usize>, sharing: FfnSharing) -> FfnShard {
        let (columns, part): (_, fn(_) -> _) = match ffn {
            Ffn::SwiGlu { .. } => (columns, FfnShard::Inner),
            Ffn::Linear => (0..dims.hidden, FfnShard::Columns),
            Ffn::None => return FfnShard::None,
        };
        let own = match sharing {
            FfnSharing::Columns => self.columns(columns.clone()),
            FfnSharing::FirstRank => None,
        };
        own.map_or(FfnShard::FirstRank(columns), part)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIMS: Dims = Dims { hidden: 512, heads: 32, head_dim: 16, vocab: 1000 };

    fn ranks(num_ranks: usize) -> impl Iterator<Item = RankPlace> {
        (0..num_ranks).map(move |rank| RankPlace { rank, num_ranks })
    }

    #[test]
    fn columns_are_shared_out_whole_and_once_in_units() {
        for num_ranks in 1..=8 {
            for columns in [0..64, 0..512, 64..1000, 128..425_984, 7..3000] {
                let shares: Option<Vec<_>> =
                    ranks(num_ranks).map(|place| place.columns(columns.clone())).collect();
                let Some(shares) = shares else {
                    assert!(columns.len().div_ceil(SUM_CUT) < num_ranks, "{columns:?} to {num_ranks}");
                    continue;
                };
                assert_eq!((shares[0].start, shares[num_ranks - 1].end), (columns.start, columns.end));
                assert!(shares.windows(2).all(|pair| pair[0].end == pair[1].start));
                let is_whole = |share: &Range<usize>| (share.start - columns.start).is_multiple_of(SUM_CUT);
                assert!(shares.iter().all(|share| !share.is_empty() && is_whole(share)), "{shares:?}");
                let sizes = || shares.iter().map(Range::len);
                assert!(sizes().max().unwrap() - sizes().min().unwrap() < 2 * SUM_CUT, "{shares:?}");
            }
        }
    }

    #[test]
    fn every_query_head_is_on_one_rank_together_with_the_kv_head_that_it_reads() {
        for kv_heads in [1, 2, 4, 8, 32] {
            let group = DIMS.heads / kv_heads;
            for num_ranks in 1..=8 {
                let mut next = 0;
                for place in ranks(num_ranks) {
                    let shard = place.attention(Attention::Gqa { kv_heads }, DIMS, AttentionSharing::Heads);
                    let AttentionShard::Heads { query, kv } = shard else { panic!("{shard:?}") };
                    assert_eq!(query.start, next, "{kv_heads} KV heads on {num_ranks} ranks");
                    next = query.end;
                    assert!(query.clone().all(|head| kv.contains(&(head / group))));
                    // As the operation needs it: equally many query heads for each KV head.
                    assert!(query.len().is_multiple_of(kv.len()), "{query:?} {kv:?}");
                    assert!(kv.len() == 1 || query.len() == kv.len() * group, "{query:?} {kv:?}");
                }
                assert_eq!(next, DIMS.heads);
            }
        }
    }

    #[test]
    fn what_is_too_small_to_share_runs_on_the_first_rank() {
        let place = RankPlace { rank: 1, num_ranks: 3 };
        let narrow = place.ffn(Ffn::SwiGlu { width: 128 }, DIMS, 0..128, FfnSharing::Columns);
        assert_eq!(narrow, FfnShard::FirstRank(0..128));
        let few = Dims { heads: 2, hidden: 128, ..DIMS };
        let gqa = Attention::Gqa { kv_heads: 1 };
        assert_eq!(place.attention(gqa, few, AttentionSharing::Heads), AttentionShard::FirstRank);
        assert_eq!(
            place.attention(Attention::Linear, few, AttentionSharing::Heads),
            AttentionShard::FirstRank
        );
        assert_eq!(place.attention(gqa, few, AttentionSharing::Sequences), AttentionShard::Sequences);
    }

    #[test]
    fn what_a_sharing_leaves_to_the_first_rank_is_nowhere_else() {
        for place in ranks(3) {
            let wide = place.ffn(Ffn::SwiGlu { width: 4096 }, DIMS, 64..4096, FfnSharing::FirstRank);
            assert_eq!(wide, FfnShard::FirstRank(64..4096));
            let linear = place.ffn(Ffn::Linear, DIMS, 0..0, FfnSharing::FirstRank);
            assert_eq!(linear, FfnShard::FirstRank(0..512));
            for attention in [Attention::Gqa { kv_heads: 8 }, Attention::Linear] {
                let shard = place.attention(attention, DIMS, AttentionSharing::FirstRank);
                assert_eq!(shard, AttentionShard::FirstRank);
            }
            assert_eq!(
                place.attention(Attention::None, DIMS, AttentionSharing::FirstRank),
                AttentionShard::None
            );
        }
    }
}
