//! The pool of KV pages.
//!
//! A page is taken by one sequence at a time and the pool does not know by which; it only refuses
//! to hand a page out twice or to take one back twice. Lowest indices go first, so that memory
//! which the operating system backs on first touch stays as small as the most pages ever in use.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::micro_batch::PageIdx;

/// Free and taken pages; every page is one or the other.
#[derive(Debug)]
pub(crate) struct PagePool {
    /// Free pages below `untouched`.
    returned: BinaryHeap<Reverse<PageIdx>>,
    /// Pages from here on have never been taken.
    untouched: PageIdx,
    is_taken: Vec<bool>,
}

impl PagePool {
    pub(crate) fn new(num_pages: usize) -> Self {
        Self { returned: BinaryHeap::new(), untouched: 0, is_taken: vec![false; num_pages] }
    }

    pub(crate) fn num_pages(&self) -> usize {
        self.is_taken.len()
    }

    pub(crate) fn num_free(&self) -> usize {
        self.returned.len() + self.num_pages() - self.untouched as usize
    }

    /// The lowest free page.
    pub(crate) fn take(&mut self) -> Option<PageIdx> {
        let page_idx = match self.returned.pop() {
            Some(Reverse(page_idx)) => page_idx,
            None if (self.untouched as usize) < self.num_pages() => {
                self.untouched += 1;
                self.untouched - 1
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
            self.returned.push(Reverse(page_idx));
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
        let mut pool = PagePool::new(4);
        assert_eq!([pool.take(), pool.take(), pool.take()], [Some(0), Some(1), Some(2)]);
        pool.give_back(&[1, 0]);
        assert_eq!([pool.take(), pool.take(), pool.take(), pool.take()], [Some(0), Some(1), Some(3), None]);
        pool.check_integrity(0..4);
    }

    #[test]
    #[should_panic(expected = "page 0 was given back twice")]
    fn a_page_is_given_back_once() {
        let mut pool = PagePool::new(1);
        let pages = [pool.take().unwrap()];
        pool.give_back(&pages);
        pool.give_back(&pages);
    }

    #[test]
    #[should_panic(expected = "page 0 has two owners")]
    fn a_page_with_two_owners_is_found() {
        let mut pool = PagePool::new(2);
        pool.take();
        pool.check_integrity([0, 0]);
    }

    #[test]
    #[should_panic(expected = "pages held by sequences differ from pages taken")]
    fn a_lost_page_is_found() {
        let mut pool = PagePool::new(2);
        pool.take();
        pool.check_integrity([]);
    }
}
