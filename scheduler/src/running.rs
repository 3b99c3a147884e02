//! The admitted sequences: a seat for each, and their order of age.
//!
//! A seat is where a sequence sits until it leaves the pipeline, so that each step finds it without
//! a search. Age is the order of submission: the scheduler favours the old, since that is what
//! makes sure that everything ends.

use std::collections::BTreeMap;
use std::ops::{Bound, Index, IndexMut};

use crate::request::SequenceId;
use crate::sequence::Sequence;

/// The place of one running sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Seat(usize);

#[derive(Debug, Default)]
pub(crate) struct Running {
    seats: Vec<Option<Sequence>>,
    vacant: Vec<Seat>,
    by_age: BTreeMap<SequenceId, Seat>,
    /// How many there are of each lane that ever had one.
    by_lane: Vec<usize>,
}

impl Running {
    pub(crate) fn len(&self) -> usize {
        self.by_age.len()
    }

    /// Those of a lane.
    pub(crate) fn len_in(&self, lane: usize) -> usize {
        self.by_lane.get(lane).copied().unwrap_or(0)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.by_age.is_empty()
    }

    pub(crate) fn enter(&mut self, sequence: Sequence) -> Seat {
        let seat = self.vacant.pop().unwrap_or_else(|| {
            self.seats.push(None);
            Seat(self.seats.len() - 1)
        });
        self.by_age.insert(sequence.id, seat);
        self.by_lane.resize(self.by_lane.len().max(sequence.lane + 1), 0);
        self.by_lane[sequence.lane] += 1;
        self.seats[seat.0] = Some(sequence);
        seat
    }

    pub(crate) fn leave(&mut self, seat: Seat) -> Sequence {
        let sequence = self.seats[seat.0].take().expect("a sequence leaves the seat it sits in");
        self.by_age.remove(&sequence.id);
        self.by_lane[sequence.lane] -= 1;
        self.vacant.push(seat);
        sequence
    }

    pub(crate) fn find(&self, id: SequenceId) -> Option<Seat> {
        self.by_age.get(&id).copied()
    }

    /// Where all of them sit, the oldest first.
    pub(crate) fn seats(&self) -> Vec<Seat> {
        self.by_age.values().copied().collect()
    }

    /// All of them, the oldest first.
    pub(crate) fn oldest_first(&self) -> impl Iterator<Item = &Sequence> {
        self.by_age.values().map(|&seat| &self[seat])
    }

    /// Those submitted after `id`, the newest first.
    pub(crate) fn newer_than(&self, id: SequenceId) -> impl Iterator<Item = Seat> {
        self.by_age.range((Bound::Excluded(id), Bound::Unbounded)).rev().map(|(_, &seat)| seat)
    }

    pub(crate) fn check_integrity(&self) {
        let num_seated = self.seats.iter().flatten().count();
        assert_eq!(num_seated, self.len(), "{num_seated} sequences seated, {} listed by age", self.len());
        assert_eq!(
            num_seated + self.vacant.len(),
            self.seats.len(),
            "{num_seated} seated, {:?} vacant",
            self.vacant
        );
        assert!(self.by_age.iter().all(|(&id, &seat)| self[seat].id == id), "a sequence is not in its seat");
        for (lane, counted) in self.by_lane.iter().enumerate() {
            let num_running = self.oldest_first().filter(|sequence| sequence.lane == lane).count();
            assert_eq!(*counted, num_running, "sequences counted in lane {lane} and running");
        }
    }
}

impl Index<Seat> for Running {
    type Output = Sequence;

    fn index(&self, seat: Seat) -> &Sequence {
        self.seats[seat.0].as_ref().expect("the seat is taken")
    }
}

impl IndexMut<Seat> for Running {
    fn index_mut(&mut self, seat: Seat) -> &mut Sequence {
        self.seats[seat.0].as_mut().expect("the seat is taken")
    }
}
