//! Whether the pages that a micro-batch writes to are each one sequence's alone.

use std::cell::RefCell;

use crate::backend::{AttentionSlice, PAGE_TOKENS};

thread_local! {
    /// The pages that the caller's slices write to, kept for the next call.
    static WRITTEN: RefCell<PageSet> = const { RefCell::new(PageSet(Vec::new())) };
}

/// Whether every page that a slice writes to is in that slice alone, and once; of slices that have been checked against a cache of
/// so many pages.
pub(super) fn are_own(slices: &[AttentionSlice], num_pages: usize) -> bool {
    WRITTEN.with_borrow_mut(|written| {
        written.clear(num_pages);
        let slices = || slices.iter().filter(|slice| slice.num_rows > 0);
        // No page is written for two, and none that is written is read as an earlier one.
        slices().all(|slice| new_pages(slice).iter().all(|&page| written.insert(page)))
            && !slices().any(|slice| old_pages(slice).iter().any(|&page| written.contains(page)))
    })
}

/// The pages of a slice's own rows.
fn new_pages(slice: &AttentionSlice) -> &[u32] {
    let end = slice.first_position + slice.num_rows;
    &slice.pages[slice.first_position / PAGE_TOKENS..end.div_ceil(PAGE_TOKENS)]
}

/// Those before them.
fn old_pages(slice: &AttentionSlice) -> &[u32] {
    &slice.pages[..slice.first_position / PAGE_TOKENS]
}

/// Some pages of a cache, a bit for each that there is.
struct PageSet(Vec<u64>);

impl PageSet {
    /// Takes all out, with room for so many. Of a cache of 100,000 pages that is 12 KiB.
    fn clear(&mut self, num_pages: usize) {
        self.0.clear();
        self.0.resize(num_pages.div_ceil(64), 0);
    }

    /// Puts a page in; false where it was there.
    fn insert(&mut self, page: u32) -> bool {
        let (word, bit) = place(page);
        let is_new = self.0[word] & bit == 0;
        self.0[word] |= bit;
        is_new
    }

    fn contains(&self, page: u32) -> bool {
        let (word, bit) = place(page);
        self.0[word] & bit != 0
    }
}

/// The word of a page's bit, and the bit.
fn place(page: u32) -> (usize, u64) {
    (page as usize / 64, 1 << (page % 64))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn are_own(slices: &[(usize, usize, &[u32])]) -> bool {
        let slice = |&(num_rows, first_position, pages): &(usize, usize, &[u32])| AttentionSlice {
            first_row: 0,
            num_rows,
            first_position,
            pages: pages.to_vec(),
        };
        super::are_own(&slices.iter().map(slice).collect::<Vec<_>>(), 100)
    }

    #[test]
    fn sequences_with_pages_of_their_own_may_read_the_same_ones_before() {
        assert!(are_own(&[]));
        assert!(are_own(&[(1, 63, &[5]), (1, 64, &[6, 70]), (60, 40, &[99, 7])]));
        assert!(are_own(&[(1, 130, &[1, 2, 3]), (1, 140, &[1, 2, 4]), (9, 128, &[2, 2, 5])]));
        // What no row reaches is nobody's, and a slice without rows has nothing.
        assert!(are_own(&[(1, 63, &[5, 6]), (1, 0, &[6, 5]), (0, 3, &[5])]));
    }

    #[test]
    fn a_page_that_is_written_for_one_and_another_has_is_found() {
        assert!(!are_own(&[(1, 3, &[5]), (1, 9, &[5])]), "written for both");
        assert!(!are_own(&[(1, 64, &[5, 6]), (1, 9, &[5])]), "read by the one before");
        assert!(!are_own(&[(1, 9, &[5]), (1, 64, &[5, 6])]), "and by the one behind");
        assert!(!are_own(&[(60, 40, &[5, 6]), (1, 130, &[7, 6, 8])]), "written by a prompt");
        assert!(!are_own(&[(1, 64, &[5, 5])]), "in one slice twice");
        // No call leaves anything for the next one.
        assert!(are_own(&[(1, 3, &[5])]));
    }
}
