//! Keys and values that are needed next, asked for while others are worked on.
//!
//! A decode step reads each page once and does little with it: it takes as long as the pages take to arrive. A core has
//! few lines under way at once, so that they are to be asked for all the time, and evenly: a hint that finds all places
//! taken holds up what comes after it. So each loop over a page issues its share of them, the loops of register loads
//! too. What is asked for are lines of several streams side by side, which arrive faster than those of one
//! after the other (measured on pages of 48 KiB in random order: 25 GB/s for 22).

use super::super::{Attend, Entries};
use crate::backend::PAGE_TOKENS;
use crate::cpu::kv_cache::KvCache;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Query rows of a tile above which there is more to compute than to fetch.
const FEW_ROWS: usize = super::BLOCK;

/// What each loop over a page asks for, of [`WHOLE`]: about as much as its time is of the page's. Shares that differed by a
/// third made no difference that could be told from the machine's own.
pub(super) const SCORES: usize = 30;
pub(super) const WEIGHTS: usize = 32;
pub(super) const UPRIGHT: usize = 8;
pub(super) const VALUES: usize = 42;
/// What is asked for while a tile's queries are put down, and while its end is written, when its last page is done.
pub(super) const START: usize = 16;
pub(super) const FINISH: usize = 16;
/// All lines of the next page.
const WHOLE: usize = SCORES + WEIGHTS + UPRIGHT + VALUES + FINISH;

/// Entries of some neighbouring heads in a page: what is left of them to ask for. A *row* is a line of each stream,
/// and a stream a head's keys or its values.
pub(super) struct Ahead {
    /// The first stream's line of the next row.
    at: *const u8,
    /// Bytes from stream to stream.
    stride: usize,
    streams: usize,
    rows: usize,
    left: usize,
}

/// Rows for every round of a loop, as the loop's assembly reads them.
#[repr(C)]
pub(super) struct Hints {
    pub(super) at: *const u8,
    pub(super) stride: usize,
    /// At least 1.
    pub(super) streams: usize,
    pub(super) rows: usize,
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
            None => Ahead { at: std::ptr::null(), stride: 0, streams: 1, rows: 0, left: 0 },
        }
    }

    fn of(cache: &KvCache, entries: Entries) -> Ahead {
        let Entries { page, first_head, num_heads, num_keys } = entries;
        let at = cache.entries(page, first_head).as_ptr();
        // As if values took as much as keys, which they do but for paddings: a hint beside the mark does no harm.
        let stride = cache.head_bytes() / 2;
        let rows = (stride * num_keys).div_ceil(PAGE_TOKENS * LINE);
        Ahead { at, stride, streams: 2 * num_heads, rows, left: rows }
    }

    /// A share of the page, over the rounds of a loop: what a round is to ask for. The loop has at least one.
    #[inline]
    pub(super) fn during(&mut self, share: usize, rounds: usize) -> Hints {
        let rows = (self.rows * share).div_ceil(WHOLE * rounds).min(self.left / rounds);
        let hints = Hints { at: self.at, stride: self.stride, streams: self.streams, rows };
        self.left -= rows * rounds;
        self.at = self.at.wrapping_add(rows * rounds * LINE);
        hints
    }

    /// Asks for a share at once.
    #[inline]
    pub(super) fn fetch(&mut self, share: usize) {
        self.during(share, 1).fetch();
    }

    /// Asks for all that is left.
    #[inline]
    pub(super) fn fetch_rest(&mut self) {
        self.fetch(WHOLE);
    }
}

impl Hints {
    /// Asks for the rows of a round.
    #[inline(always)]
    pub(super) fn fetch(&mut self) {
        for _ in 0..self.rows {
            let mut at = self.at;
            for _ in 0..self.streams {
                prefetch(at);
                at = at.wrapping_add(self.stride);
            }
            self.at = self.at.wrapping_add(LINE);
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
