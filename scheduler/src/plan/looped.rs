//! Layouts that go through the devices twice: each takes a slice of the front part of the model and, later, one of
//! the back part, such as an attention-rich one and one that keeps no keys and values.
//!
//! Whole blocks, single devices, in the order of the list both times. A device's time is that of both its slices with
//! their hops, and its memory is shared by both; either may be empty. Exact within this class: for a border between
//! the parts, what remains to be done depends only on how far both parts are, and of two ways to get as far
//! in the front part the one that is further in the back part is never worse.

use std::cmp::Reverse;
use std::ops::Range;

use super::furthest::Bounds;
use super::problem::{Costs, PlannedStage, Problem, RankCosts};
use super::search::{Case, Choice, KvTokens, Search};

/// The fastest layout over all `cases` that goes through the devices twice, or none where none makes more than
/// `rows_per_second`.
///
/// Its stages are in the order of the pipeline, so that a device may be in two of them. Stages of the widths beyond
/// 1 and cuts through blocks are not looked at, and devices at the front of the list are filled first.
///
/// # Panics
/// If a kind of device has no costs for stages of one device.
pub fn faster_looped(
    cases: &[Case],
    ends_block: &[bool],
    kv: KvTokens,
    rows_per_second: f64,
) -> Option<Choice> {
    // Where each block begins, and the end.
    let ends = (1..=ends_block.len()).filter(|end| ends_block[end - 1]);
    let places: Vec<usize> = std::iter::once(0).chain(ends).collect();
    let whole = vec![true; places.len() - 1];
    let cases: Vec<Case> = cases.iter().map(|case| of_whole_blocks(case, &places)).collect();
    let mut search = Search::new(&whole, None, kv, rows_per_second, layout);
    search.run(&cases, |num_devices| 2..=2 * num_devices);
    let mut choice = search.best?;
    for stage in &mut choice.stages {
        stage.pieces = places[stage.pieces.start]..places[stage.pieces.end];
    }
    Some(choice)
}

fn of_whole_blocks(case: &Case, places: &[usize]) -> Case {
    let of_kind = |costs: &Costs| {
        let alone = costs.iter().find(|(width, _)| *width == 1).expect("costs for a stage of one device");
        vec![(1, alone.1.at(places))]
    };
    Case { costs: case.costs.iter().map(of_kind).collect(), ..case.clone() }
}

/// The stages of such a layout within `bounds`, if there is one.
fn layout(problem: &Problem<'_>, bounds: Bounds) -> Option<Vec<PlannedStage>> {
    let least = Least::of(problem, bounds.kv_tokens);
    (1..problem.num_pieces()).find_map(|border| Passes { problem, bounds, least: &least, border }.layout())
}

/// How far both parts are after some of the devices.
#[derive(Debug, Clone, Copy)]
struct State {
    /// Where the front part goes on.
    front: usize,
    /// Where the back part goes on.
    back: usize,
    /// Slices so far, empty ones not counted.
    stages: usize,
    /// The state it came from, among those after one device less.
    before: usize,
}

/// The layouts whose back part begins at one border.
struct Passes<'a> {
    problem: &'a Problem<'a>,
    bounds: Bounds,
    least: &'a Least,
    border: usize,
}

impl Passes<'_> {
    fn layout(&self) -> Option<Vec<PlannedStage>> {
        let start = State { front: 0, back: self.border, stages: 0, before: 0 };
        if self.is_hopeless(0, start) {
            return None;
        }
        let num_devices = self.problem.devices.len();
        let mut table = vec![vec![start]];
        for device in 0..num_devices {
            let states = undominated(self.after(device, &table[device]), self.bounds.max_stages);
            table.push(states);
        }
        // No device is left: what is before its end has blocks left over that take nothing.
        let end = table[num_devices]
            .iter()
            .position(|state| state.front == self.border && state.back == self.problem.num_pieces())?;
        Some(self.trace(&table, end))
    }

    /// What may be reached with a device more; for each end of its front slice only the furthest of the back one.
    fn after(&self, device: usize, states: &[State]) -> Vec<State> {
        let mut next = vec![];
        for (before, state) in states.iter().enumerate() {
            for front in state.front..=self.border {
                let Some(left) = self.left(device, state.front..front) else { break };
                let stages = state.stages + usize::from(front > state.front);
                let without = State { front, stages, before, ..*state };
                next.push(without);
                let back = self.back_end(device, state.back, left);
                if back > state.back {
                    next.push(State { back, stages: stages + 1, ..without });
                }
            }
        }
        next.retain(|state| !self.is_hopeless(device + 1, *state));
        next
    }

    /// What a device's slice of the front part leaves of it, or none where it is too much alone.
    fn left(&self, device: usize, pieces: Range<usize>) -> Option<Left> {
        let room = self.problem.devices[device].memory_bytes;
        if pieces.is_empty() {
            return Some(Left { seconds: self.bounds.seconds, bytes: room, has_first: false });
        }
        let costs = self.costs(device);
        let seconds = costs.seconds(pieces.clone()) + self.problem.devices[device].hop_seconds;
        let has_first = pieces.start == 0;
        let bytes = room.checked_sub(costs.memory_bytes(pieces, self.bounds.kv_tokens))?;
        let is_within = seconds <= self.bounds.seconds;
        is_within.then_some(Left { seconds: self.bounds.seconds - seconds, bytes, has_first })
    }

    /// The furthest end of a slice of the back part that begins at `start`, in what is left of a device; `start`
    /// where not even one block has room.
    fn back_end(&self, device: usize, start: usize, left: Left) -> usize {
        let (costs, end) = (self.costs(device), self.problem.num_pieces());
        let kv_tokens = self.bounds.kv_tokens;
        let shared = if left.has_first { costs.shared_bytes() } else { 0 };
        let is_whole_rest = costs.seconds(start..end) <= left.seconds
            && costs.memory_bytes(start..end, kv_tokens) <= left.bytes.saturating_add(shared);
        if is_whole_rest {
            return end;
        }
        let seconds = left.seconds - self.problem.devices[device].hop_seconds;
        // The last block comes with the head, and was just found too much.
        costs.furthest(start, seconds, left.bytes, kv_tokens).min(end - 1).max(start)
    }

    fn costs(&self, device: usize) -> &RankCosts {
        &self.problem.costs[self.problem.devices[device].kind][0].1
    }

    /// Whether what remains is too much for the devices from `device` on, or for the slices that may still be.
    fn is_hopeless(&self, device: usize, state: State) -> bool {
        let Some(slices) = self.bounds.max_stages.checked_sub(state.stages) else { return true };
        let parts = [state.front..self.border, state.back..self.problem.num_pieces()];
        let devices = slices.min(self.problem.devices.len() - device) as f64;
        parts.clone().map(|pieces| self.least.seconds(pieces)).iter().sum::<f64>()
            > devices * self.bounds.seconds
            || parts.map(|pieces| self.least.bytes(pieces)).iter().sum::<u64>() > self.least.rooms[device]
    }

    /// Follows the table back from one of its last states.
    fn trace(&self, table: &[Vec<State>], end: usize) -> Vec<PlannedStage> {
        let (mut states, mut index) = (vec![], end);
        for row in table.iter().rev() {
            states.push(row[index]);
            index = row[index].before;
        }
        states.reverse();
        let slices = |place: fn(&State) -> usize| {
            let ends = states.windows(2).map(move |pair| place(&pair[0])..place(&pair[1])).enumerate();
            ends.map(|(device, pieces)| PlannedStage { pieces, devices: device..device + 1 })
        };
        let stages = slices(|state| state.front).chain(slices(|state| state.back));
        stages.filter(|stage| !stage.pieces.is_empty()).collect()
    }
}

/// What a device has left beside its slice of the front part.
#[derive(Debug, Clone, Copy)]
struct Left {
    seconds: f64,
    bytes: u64,
    /// Whether that slice has the embedding.
    has_first: bool,
}

/// Without the states beside which another is as far in both parts, with as few slices.
fn undominated(mut states: Vec<State>, max_stages: usize) -> Vec<State> {
    states.sort_unstable_by_key(|state| (Reverse(state.front), Reverse(state.back), state.stages));
    // For each number of slices: how far the back part is in states that are as far in the front part.
    let mut furthest = vec![None; max_stages + 1];
    states.retain(|state| {
        let is_further = furthest[state.stages] < Some(state.back);
        furthest[state.stages..].iter_mut().for_each(|back| *back = (*back).max(Some(state.back)));
        is_further
    });
    states
}

/// What blocks take at least, whatever device they are on: most that is hopeless is seen from these sums.
pub(super) struct Least {
    /// Of the blocks before each place.
    seconds: Vec<f64>,
    bytes: Vec<u64>,
    /// Room on the devices from each on, and what a tied table may save on one of them.
    rooms: Vec<u64>,
}

impl Least {
    pub(super) fn of(problem: &Problem<'_>, kv_tokens: u64) -> Self {
        let kinds = || problem.costs.iter().map(|costs| &costs[0].1);
        let shared = kinds().map(RankCosts::shared_bytes).max().unwrap_or(0);
        let mut least = Least { seconds: vec![0.0], bytes: vec![0], rooms: vec![shared] };
        for block in 0..problem.num_pieces() {
            let seconds = kinds().map(|costs| costs.seconds(block..block + 1));
            let bytes =
                kinds().map(|costs| costs.memory_bytes(block..block + 1, kv_tokens)).min().unwrap_or(0);
            least.seconds.push(least.seconds[block] + seconds.fold(f64::INFINITY, f64::min));
            least.bytes.push(least.bytes[block].saturating_add(bytes));
        }
        for (after, device) in problem.devices.iter().rev().enumerate() {
            least.rooms.push(least.rooms[after].saturating_add(device.memory_bytes));
        }
        least.rooms.reverse();
        least
    }

    pub(super) fn seconds(&self, pieces: Range<usize>) -> f64 {
        self.seconds[pieces.end] - self.seconds[pieces.start]
    }

    fn bytes(&self, pieces: Range<usize>) -> u64 {
        self.bytes[pieces.end] - self.bytes[pieces.start]
    }
}
