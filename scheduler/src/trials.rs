//! Finding the sequence that ends a stage.
//!
//! A stage that ends takes one micro-batch with it. The first time nobody is blamed: its sequences are
//! suspects, and everything is computed again. When a micro-batch that ends a stage holds suspects, those
//! are tried: half of them at a time, with nobody beside them. A half that ends a stage is halved again,
//! down to a sequence alone; one that has ended a stage alone [`LONE_DEATHS`] times is convicted. Whoever has
//! been computed up to where its fatal micro-batch ended, or is done, is cleared.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::request::SequenceId;

/// How often a sequence must end a stage with nothing beside it.
///
/// Any one of these may be the device's own weakness. Where it ends by itself in one micro-batch of twenty, a
/// sequence alone, which is cleared after one or two, is ended in a tenth of its trials: four in a row are one
/// in ten thousand, where two convicted an innocent in a third of the jobs of a few hundred rows. Each costs
/// the true culprit one more start of its stage.
pub const LONE_DEATHS: u32 = 4;

#[derive(Debug, Default)]
pub(crate) struct Trials {
    suspects: BTreeMap<SequenceId, Suspect>,
    /// Those to be tried, the first of them now. A group loses its members as they are cleared.
    groups: VecDeque<BTreeSet<SequenceId>>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Suspect {
    /// Positions that must be computed for it to be cleared.
    until: usize,
    lone_deaths: u32,
}

impl Trials {
    /// Whether a sequence may run now.
    pub(crate) fn admit(&self, id: SequenceId) -> bool {
        self.groups.front().is_none_or(|group| group.contains(&id))
    }

    /// Whether anybody is on trial.
    pub(crate) fn are_under_way(&self) -> bool {
        !self.groups.is_empty()
    }

    /// A stage has ended over a micro-batch of these sequences, each up to that many positions. The one
    /// that is convicted, if so.
    pub(crate) fn blame(&mut self, fatal: &[(SequenceId, usize)]) -> Option<SequenceId> {
        let (again, new): (Vec<_>, Vec<_>) =
            fatal.iter().copied().partition(|(id, _)| self.suspects.contains_key(id));
        for (id, until) in again.iter().chain(&new).copied() {
            let suspect = self.suspects.entry(id).or_default();
            suspect.until = suspect.until.max(until);
            suspect.lone_deaths += u32::from(fatal.len() == 1);
        }
        let again: Vec<SequenceId> = again.into_iter().map(|(id, _)| id).collect();
        if let [id] = again[..]
            && self.suspects[&id].lone_deaths >= LONE_DEATHS
        {
            self.clear(id);
            return Some(id);
        }
        if !again.is_empty() {
            self.try_halves(&again);
        }
        None
    }

    /// Lets a sequence run alone, before all others, until it is done.
    pub(crate) fn probe(&mut self, id: SequenceId) {
        self.suspects.insert(id, Suspect { until: usize::MAX, lone_deaths: 0 });
        self.groups.push_front(BTreeSet::from([id]));
    }

    fn try_halves(&mut self, suspects: &[SequenceId]) {
        if let Some(mut rest) = self.groups.pop_front() {
            rest.retain(|id| !suspects.contains(id));
            self.groups.push_front(rest);
        }
        let (first, second) = suspects.split_at(suspects.len().div_ceil(2));
        for half in [second, first] {
            self.groups.push_front(half.iter().copied().collect());
        }
        self.drop_empty_groups();
    }

    /// A sequence has been computed up to there.
    pub(crate) fn computed(&mut self, id: SequenceId, positions: usize) {
        if self.suspects.get(&id).is_some_and(|suspect| suspect.until <= positions) {
            self.clear(id);
        }
    }

    /// A sequence is innocent, or gone.
    pub(crate) fn clear(&mut self, id: SequenceId) {
        if self.suspects.remove(&id).is_some() {
            for group in &mut self.groups {
                group.remove(&id);
            }
            self.drop_empty_groups();
        }
    }

    fn drop_empty_groups(&mut self) {
        self.groups.retain(|group| !group.is_empty());
    }

    /// Asserts that everybody to be tried is a suspect that is still there.
    pub(crate) fn check_integrity(&self, is_there: impl Fn(SequenceId) -> bool) {
        for &id in self.suspects.keys() {
            assert!(is_there(id), "{id:?} is suspected and gone");
        }
        for group in &self.groups {
            assert!(!group.is_empty(), "a trial of nobody");
            for id in group {
                assert!(self.suspects.contains_key(id), "{id:?} is on trial and no suspect");
            }
        }
    }
}
