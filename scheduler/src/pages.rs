//! The pool of KV pages.
//!
//! A page is taken by one sequence at a time and the pool does not know by which; it only refuses
//! to hand a page out twice or to take one back twice. Lowest indices go first, so that memory
//! which the operating system backs on first touch stays as small as the most pages ever in use.
//!
//! Pages are in lanes, one after the other in turn. A stage of `R` ranks that share out sequences leaves page `p` to rank `p % R`,
//! which has it as its page `p / R`: with lanes by a multiple of `R` all pages of a sequence are on one rank, and no rank holds
//! pages of another's sequences.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::micro_batch::PageIdx;

/// Free and taken pages; every page is one or the other.
#[derive(Debug)]
pub(crate) struct PagePool {
    lanes: Vec<Lane>,
    is_taken: Vec<bool>,
}

/// The free pages of a lane.
#[derive(Debug)]
struct Lane {
    /// Those below `untouched`.
    returned: BinaryHeap<Reverse<PageIdx>>,
    /// The lane's pages from here on have never been taken.
    untouched: PageIdx,
}

impl PagePool {
    /// `num_pages` is a multiple of `num_lanes`, and page `p` is of lane `p % num_lanes`.
    pub(crate) fn new(num_pages: usize, num_lanes: usize) -> Self {
        let lane = |lane| Lane { returned: BinaryHeap::new(), untouched: lane as PageIdx };
        Self { lanes: (0..num_lanes).map(lane).collect(), is_taken: vec![false; num_pages] }
    }

    pub(crate) fn num_pages(&self) -> usize {
        self.is_taken.len()
    }

    /// Free pages of all lanes.
    pub(crate) fn num_free(&self) -> usize {
        (0..self.lanes.len()).map(|lane| self.num_free_in(lane)).sum()
    }

    /// Free pages of a lane.
    pub(crate) fn num_free_in(&self, lane: usize) -> usize {
        let Lane { returned, untouched } = &self.lanes[lane];
        let num_untouched = (self.num_pages() + lane - *untouched as usize) / self.lanes.len();
        returned.len() + num_untouched
    }

    /// The lowest free page of a lane.
    pub(crate) fn take(&mut self, lane: usize) -> Option<PageIdx> {
        let (num_pages, num_lanes) = (self.num_pages(), self.lanes.len());
        let Lane { returned, untouched } = &mut self.lanes[lane];
        let page_idx = match returned.pop() {
            Some(Reverse(page_idx)) => page_idx,
            None if (*untouched as usize) < num_pages => {
                *untouched += num_lanes as PageIdx;
                *untouched - num_lanes as PageIdx
            }
            None => return None,
        };
        let is_taken = &mut self.is_taken[page_idx as usize];
        assert!(!*is_taken, "page {page_idx} was handed out twice");
        *is_taken = true;
        Some(page_idx)
    }

    pub(crate) fn give_back(&mut self, pages: &[PageIdx]) {
        for &page_idx in pages {
            let is_taken = &mut self.is_taken[page_idx as usize];
            assert!(*is_taken, "page {page_idx} was given back twice");
            *is_taken = false;
            let lane = page_idx as usize % self.lanes.len();
            self.lanes[lane].returned.push(Reverse(page_idx));
        }
    }

    /// Asserts that the pages held by sequences and the free ones are together each page once.
    pub(crate) fn check_integrity(&self, held: impl IntoIterator<Item = PageIdx>) {
        let mut is_held = vec![false; self.num_pages()];
        for page_idx in held {
            assert!(!is_held[page_idx as usize], "page {page_idx} has two owners");
            is_held[page_idx as usize] = true;
        }
        assert_eq!(is_held, self.is_taken, "pages held by sequences differ from pages taken");
        let num_held = is_held.iter().filter(|&&is_held| is_held).count();
        assert_eq!(
            num_held + self.num_free(),
            self.num_pages(),
            "{num_held} pages held, {} free",
            self.num_free()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_free_page_goes_first() {
        let mut pool = PagePool::new(4, 1);
        assert_eq!([(); 3].map(|()| pool.take(0)), [Some(0), Some(1), Some(2)]);
        pool.give_back(&[1, 0]);
        assert_eq!([(); 4].map(|()| pool.take(0)), [Some(0), Some(1), Some(3), None]);
        pool.check_integrity(0..4);
    }

    #[test]
    fn a_lane_has_its_own_pages_alone() {
        let mut pool = PagePool::new(6, 3);
        assert_eq!([(); 3].map(|()| pool.take(1)), [Some(1), Some(4), None]);
        assert_eq!((0..3).map(|lane| pool.num_free_in(lane)).collect::<Vec<_>>(), [2, 0, 2]);
        assert_eq!([2, 2, 0].map(|lane| pool.take(lane)), [Some(2), Some(5), Some(0)]);
        pool.give_back(&[4]);
        assert_eq!((pool.take(2), pool.num_free(), pool.take(1)), (None, 2, Some(4)));
        pool.check_integrity([0, 1, 2, 4, 5]);
    }

    #[test]
    #[should_panic(expected = "page 0 was given back twice")]
    fn a_page_is_given_back_once() {
        let mut pool = PagePool::new(1, 1);
        let pages = [pool.take(0).unwrap()];
        pool.give_back(&pages);
        pool.give_back(&pages);
    }

    #[test]
    #[should_panic(expected = "page 0 has two owners")]
    fn a_page_with_two_owners_is_found() {
        let mut pool = PagePool::new(2, 1);
        pool.take(0);
        pool.check_integrity([0, 0]);
    }

    #[test]
    #[should_panic(expected = "pages held by sequences differ from pages taken")]
    fn a_lost_page_is_found() {
        let mut pool = PagePool::new(2, 1);
        pool.take(0);
        pool.check_integrity([]);
    }
}
