//! Keys and values that are needed next, fetched in small parts while others are worked on.
//!
//! A decode step reads each page once and does little with it: it takes as long as the pages take to arrive. A core has
//! few lines under way at once, so that they are to be asked for all the time. Keys and values of all heads are asked
//! for side by side: several streams arrive faster than one after the other (measured on pages of 48 KiB in random
//! order: 27 GB/s for 23).

use super::super::{Attend, Entries};
use crate::backend::PAGE_TOKENS;
use crate::cpu::kv_cache::KvCache;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Parts that a page is fetched in: about as many as the steps of the page that is worked on meanwhile.
const PARTS: usize = 8;

/// Query rows of a tile above which there is more to compute than to fetch.
const FEW_ROWS: usize = super::BLOCK;

/// Entries of some neighbouring heads in a page: what is left of them to fetch.
pub(super) struct Ahead {
    /// The first head's keys.
    at: *const u8,
    /// Bytes from keys to values, and from head to head.
    key_bytes: usize,
    head_bytes: usize,
    heads: usize,
    /// Lines of a head's keys and values, and those that have been asked for.
    key_lines: usize,
    value_lines: usize,
    fetched: usize,
    part: usize,
}

impl Ahead {
    /// What comes after a page of a tile: the next one, or the first of the tile after it.
    pub(super) fn new(job: &Attend<'_>, page_idx: usize, last_page: usize) -> Ahead {
        let next = if page_idx < last_page {
            let end = job.first_position + job.num_positions - (page_idx + 1) * PAGE_TOKENS;
            let (first_head, num_heads) = (job.first_head, job.num_heads);
            let page = job.slice.pages[page_idx + 1];
            Some(Entries { page, first_head, num_heads, num_keys: end.min(PAGE_TOKENS) })
        } else {
            job.next
        };
        let is_worth_it = job.num_heads * job.num_positions * job.group <= FEW_ROWS;
        match next.filter(|_| is_worth_it) {
            Some(entries) => Ahead::of(job.cache, entries),
            None => Ahead {
                at: std::ptr::null(),
                key_bytes: 0,
                head_bytes: 0,
                heads: 0,
                key_lines: 0,
                value_lines: 0,
                fetched: 0,
                part: 0,
            },
        }
    }

    fn of(cache: &KvCache, entries: Entries) -> Ahead {
        let Entries { page, first_head, num_heads, num_keys } = entries;
        let keys = cache.keys(page, first_head);
        let key_lines = (num_keys * cache.key_stride() * 4).div_ceil(LINE);
        let value_lines = (num_keys.div_ceil(2) * cache.value_stride() * 4).div_ceil(LINE);
        Ahead {
            at: keys.as_ptr().cast(),
            key_bytes: size_of_val(keys),
            head_bytes: cache.head_words() * 4,
            heads: num_heads,
            key_lines,
            value_lines,
            fetched: 0,
            part: key_lines.max(value_lines).div_ceil(PARTS),
        }
    }

    /// Asks for the next few lines of each.
    #[inline]
    pub(super) fn fetch_part(&mut self) {
        self.fetch(self.part);
    }

    /// Asks for all that is left.
    #[inline]
    pub(super) fn fetch_rest(&mut self) {
        self.fetch(usize::MAX);
    }

    fn fetch(&mut self, most: usize) {
        let end = self.key_lines.max(self.value_lines);
        for line in self.fetched..end.min(self.fetched.saturating_add(most)) {
            for head in 0..self.heads {
                let keys = self.at.wrapping_add(head * self.head_bytes + line * LINE);
                if line < self.key_lines {
                    prefetch(keys);
                }
                if line < self.value_lines {
                    prefetch(keys.wrapping_add(self.key_bytes));
                }
            }
            self.fetched = line + 1;
        }
    }
}

/// Into L2: a page and the next are more than L1 holds.
#[inline(always)]
fn prefetch(at: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
    // SAFETY: a prefetch reads nothing and never faults, and SSE is part of x86-64.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
}
