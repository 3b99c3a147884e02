//! Prefill that is admitted and not yet issued.
//!
//! Pages are taken only when a slice needs them, so the backlog also counts the pages that it will
//! come to need: whoever admits the next sequence leaves those alone.

use std::collections::BTreeMap;
use std::ops::Bound;

use crate::request::SequenceId;
use crate::running::Seat;

/// Work that a sequence in prefill has still to issue.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Need {
    pub(crate) tokens: usize,
    pub(crate) pages: Pages,
}

/// Pages of one lane.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Pages {
    pub(crate) lane: usize,
    pub(crate) count: usize,
}

#[derive(Debug, Default)]
pub(crate) struct Backlog {
    seats: BTreeMap<SequenceId, Seat>,
    tokens: usize,
    /// Of each lane that was ever asked for.
    pages: Vec<usize>,
}

impl Backlog {
    /// Tokens that all its sequences have to issue together.
    pub(crate) fn tokens(&self) -> usize {
        self.tokens
    }

    /// Pages of a lane that they need together.
    pub(crate) fn pages_in(&self, lane: usize) -> usize {
        self.pages.get(lane).copied().unwrap_or(0)
    }

    pub(crate) fn enter(&mut self, id: SequenceId, seat: Seat, need: Need) {
        self.seats.insert(id, seat);
        self.tokens += need.tokens;
        let Pages { lane, count } = need.pages;
        self.pages.resize(self.pages.len().max(lane + 1), 0);
        self.pages[lane] += count;
    }

    /// Part of a sequence's need is met.
    pub(crate) fn meet(&mut self, need: Need) {
        self.tokens -= need.tokens;
        self.pages[need.pages.lane] -= need.pages.count;
    }

    /// A sequence goes, with whatever it still needs.
    pub(crate) fn leave(&mut self, id: SequenceId, need: Need) {
        let seat = self.seats.remove(&id);
        assert!(seat.is_some(), "{id:?} is not in the backlog");
        self.meet(need);
    }

    /// The oldest sequence, or the oldest that is newer than `after`.
    pub(crate) fn next(&self, after: Option<SequenceId>) -> Option<(SequenceId, Seat)> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        self.seats.range((from, Bound::Unbounded)).next().map(|(&id, &seat)| (id, seat))
    }

    pub(crate) fn seats(&self) -> impl Iterator<Item = Seat> {
        self.seats.values().copied()
    }
}
