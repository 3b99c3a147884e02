//! Keys and values that are needed next, fetched in small parts while others are worked on.
//!
//! A decode step reads each page once and does little with it: it takes as long as the pages take to arrive. A core has
//! few lines under way at once, so that they must be asked for all the time, and never faster than they arrive.

use super::super::{Attend, Entries};
use crate::backend::PAGE_TOKENS;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Lines asked for at once.
const PART: usize = 24;

/// Query rows of a tile above which there is more to compute than to fetch.
const FEW_ROWS: usize = super::BLOCK;

/// Entries of some neighbouring heads in a page: what is left of them to fetch.
pub(super) struct Ahead {
    at: *const u8,
    /// Lines left of the present keys or values.
    lines: usize,
    key_lines: usize,
    value_lines: usize,
    key_bytes: usize,
    /// Bytes of a head's values.
    value_bytes: usize,
    /// Keys and values of a head count for one each.
    halves_left: usize,
}

impl Ahead {
    /// What comes after a page of a tile: the next one, or the first of the tile after it.
    pub(super) fn new(job: &Attend<'_>, page_idx: usize, last_page: usize) -> Ahead {
        let nothing = Ahead {
            at: std::ptr::null(),
            lines: 0,
            key_lines: 0,
            value_lines: 0,
            key_bytes: 0,
            value_bytes: 0,
            halves_left: 0,
        };
        if job.num_heads * job.num_positions * job.group > FEW_ROWS {
            return nothing;
        }
        let next = if page_idx < last_page {
            let end = job.first_position + job.num_positions - (page_idx + 1) * PAGE_TOKENS;
            let (first_head, num_heads) = (job.first_head, job.num_heads);
            let page = job.slice.pages[page_idx + 1];
            Some(Entries { page, first_head, num_heads, num_keys: end.min(PAGE_TOKENS) })
        } else {
            job.next
        };
        let Some(Entries { page, first_head, num_heads, num_keys }) = next else { return nothing };
        let (keys, values) = (job.cache.keys(page, first_head), job.cache.values(page, first_head));
        let key_lines = (num_keys * job.cache.key_stride() * 4).div_ceil(LINE);
        Ahead {
            at: keys.as_ptr().cast(),
            lines: key_lines,
            key_lines,
            value_lines: (num_keys.div_ceil(2) * job.cache.value_stride() * 4).div_ceil(LINE),
            key_bytes: size_of_val(keys),
            value_bytes: size_of_val(values),
            halves_left: 2 * num_heads,
        }
    }

    /// Asks for the next few lines.
    #[inline]
    pub(super) fn fetch_part(&mut self) {
        self.fetch(PART);
    }

    /// Asks for all that is left.
    #[inline]
    pub(super) fn fetch_rest(&mut self) {
        self.fetch(usize::MAX);
    }

    fn fetch(&mut self, mut most: usize) {
        while self.halves_left > 0 && most > 0 {
            let lines = self.lines.min(most);
            for _ in 0..lines {
                prefetch(self.at);
                self.at = self.at.wrapping_add(LINE);
            }
            most -= lines;
            self.lines -= lines;
            if self.lines == 0 {
                self.halves_left -= 1;
                let (fetched, bytes, next) = match self.halves_left.is_multiple_of(2) {
                    false => (self.key_lines, self.key_bytes, self.value_lines),
                    true => (self.value_lines, self.value_bytes, self.key_lines),
                };
                self.at = self.at.wrapping_add(bytes - fetched * LINE);
                self.lines = next;
            }
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
