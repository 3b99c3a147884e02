//! A bit for each line in the journal: far smaller than a set of numbers, as nearly all of them are in it.

use std::ops::Range;

/// A set of line numbers.
#[derive(Debug, Default)]
pub(crate) struct BitSet {
    words: Vec<u64>,
    len: u64,
}

impl BitSet {
    /// Adds a number; whether it was not there before.
    pub(crate) fn insert(&mut self, number: u64) -> bool {
        let is_new = !self.contains(number);
        let word = (number / 64) as usize;
        self.words.resize(self.words.len().max(word + 1), 0);
        self.words[word] |= 1 << (number % 64);
        self.len += u64::from(is_new);
        is_new
    }

    /// Adds all numbers of a range.
    pub(crate) fn extend(&mut self, numbers: Range<u64>) {
        for number in numbers {
            self.insert(number);
        }
    }

    /// Whether a number is there.
    pub(crate) fn contains(&self, number: u64) -> bool {
        self.words.get((number / 64) as usize).is_some_and(|word| word >> (number % 64) & 1 == 1)
    }

    /// Whether there is none.
    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many there are.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_what_was_added_and_counts_it_once() {
        let mut set = BitSet::default();
        set.extend(62..66);
        assert!(!set.insert(64) && set.insert(200));
        let held: Vec<u64> = (0..300).filter(|&number| set.contains(number)).collect();
        assert_eq!((held, set.len()), (vec![62, 63, 64, 65, 200], 5));
    }
}
