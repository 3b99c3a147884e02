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
    pub(crate) pages: usize,
}

#[derive(Debug, Default)]
pub(crate) struct Backlog {
    seats: BTreeMap<SequenceId, Seat>,
    need: Need,
}

impl Backlog {
    /// What all its sequences need together.
    pub(crate) fn need(&self) -> Need {
        self.need
    }

    pub(crate) fn enter(&mut self, id: SequenceId, seat: Seat, need: Need) {
        self.seats.insert(id, seat);
        self.need.tokens += need.tokens;
        self.need.pages += need.pages;
    }

    /// Part of a sequence's need is met.
    pub(crate) fn meet(&mut self, need: Need) {
        self.need.tokens -= need.tokens;
        self.need.pages -= need.pages;
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
