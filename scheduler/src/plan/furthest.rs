//! Is there a layout within a time? How far can stages get?
//!
//! What later stages have to do depends only on where earlier ones end, and the further that is the
//! better: a run that starts later takes no more time and no more memory (hops are charged to the sender, so a start
//! costs the same wherever it is). So it is enough to know, for each number of stages and of devices, the
//! furthest piece they can reach, and one pass over that table decides exactly.

use std::ops::Range;

use super::problem::{PlannedStage, Problem, RankCosts};

/// What a stage may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    pub(super) seconds: f64,
    pub(super) kv_tokens: u64,
    pub(super) max_stages: usize,
}

/// An entry of the table: the furthest end, and the width of the stage that ends there. A width of 0: the
/// device is idle, and the end is that of one device less.
#[derive(Debug, Clone, Copy)]
struct Reach {
    end: usize,
    width: usize,
}

/// The stages of a layout within `bounds`, if there is one.
///
/// The table has stages · devices entries of a few widths, each two binary searches: for 64 devices 8,192 reaches.
pub(super) fn layout(problem: &Problem<'_>, bounds: Bounds) -> Option<Vec<PlannedStage>> {
    let num_devices = problem.devices.len();
    let last_block_end: Vec<usize> = last_block_ends(problem.ends_block);
    let mut table = vec![vec![Reach { end: 0, width: 0 }; num_devices + 1]];
    for stage in 0..bounds.max_stages.min(num_devices) {
        let before = &table[stage];
        let mut row = vec![Reach { end: 0, width: 0 }; num_devices + 1];
        for devices in stage + 1..=num_devices {
            row[devices] = Reach { end: row[devices - 1].end, width: 0 };
            for (width, costs) in &problem.costs[problem.devices[devices - 1].kind] {
                let Some(first) = devices.checked_sub(*width) else { continue };
                let Some(costs) = problem.costs_of_stage(stage, first..devices, costs) else { continue };
                let start = before[first].end;
                let is_started = start > 0 || stage == 0;
                let best = row[devices].end;
                // Most runs are ruled out by one look: they do not even get one piece beyond the best so far.
                if !is_started
                    || best == problem.num_pieces()
                    || !costs.may_reach(start, best + 1, bounds.seconds)
                {
                    continue;
                }
                let end = stage_end(problem, costs, start, first..devices, bounds, &last_block_end);
                if end > row[devices].end && end > start {
                    row[devices] = Reach { end, width: *width };
                }
            }
        }
        let is_done = row[num_devices].end == problem.num_pieces();
        // Where one stage more gets nowhere further, no number of them does.
        let is_further = row.iter().zip(before).any(|(now, before)| now.end > before.end);
        table.push(row);
        if is_done {
            return Some(trace(&table, num_devices));
        }
        if !is_further {
            return None;
        }
    }
    None
}

impl Problem<'_> {
    /// Costs on each rank of the `stage`-th stage where it may have these devices, the last of which has costs `of_last`: ranks
    /// are of one kind, but in stages whose width is given.
    fn costs_of_stage<'a>(
        &'a self,
        stage: usize,
        devices: Range<usize>,
        of_last: &'a RankCosts,
    ) -> Option<&'a RankCosts> {
        if let Some(widths) = self.widths {
            return self.costs_on(devices.clone()).filter(|_| widths.get(stage) == Some(&devices.len()));
        }
        let devices = &self.devices[devices];
        devices.iter().all(|device| device.kind == devices[0].kind).then_some(of_last)
    }
}

/// For each position the last one at or before it where a block ends; 0 counts as one.
fn last_block_ends(ends_block: &[bool]) -> Vec<usize> {
    let mut last = 0;
    let mut ends = vec![0];
    ends.extend(ends_block.iter().enumerate().map(|(piece, ends)| {
        last = if *ends { piece + 1 } else { last };
        last
    }));
    ends
}

/// The furthest end of a stage that begins at `start`, or `start` when not even one piece is within bounds.
fn stage_end(
    problem: &Problem<'_>,
    costs: &RankCosts,
    start: usize,
    devices: Range<usize>,
    bounds: Bounds,
    last_block_end: &[usize],
) -> usize {
    let num_pieces = problem.num_pieces();
    let sender = &problem.devices[devices.end - 1];
    let room = problem.room(devices);
    let is_whole_rest = costs.seconds(start..num_pieces) <= bounds.seconds
        && costs.memory_bytes(start..num_pieces, bounds.kv_tokens) <= room;
    if is_whole_rest {
        return num_pieces;
    }
    let furthest = |hop: f64| {
        // The last piece comes with the head, and was just found too much.
        costs.furthest(start, bounds.seconds - hop, room, bounds.kv_tokens).min(num_pieces - 1)
    };
    let at_block = last_block_end[furthest(sender.hop_seconds)];
    let surely = at_block.max(furthest(sender.cut_hop_seconds + costs.most_cut_seconds())).max(start);
    // Beyond that are only cuts, some of which may take less than others.
    let is_within = |end: &usize| {
        let hop = sender.cut_hop_seconds + costs.cut_seconds(*end);
        costs.seconds(start..*end) + hop <= bounds.seconds
    };
    let perhaps = furthest(sender.cut_hop_seconds);
    (surely + 1..=perhaps).rev().find(is_within).unwrap_or(surely)
}

/// Follows the table back from its last entry.
fn trace(table: &[Vec<Reach>], num_devices: usize) -> Vec<PlannedStage> {
    let mut stages = Vec::with_capacity(table.len() - 1);
    let mut devices = num_devices;
    for (stage, row) in table.iter().enumerate().skip(1).rev() {
        while row[devices].width == 0 {
            devices -= 1;
        }
        let Reach { end, width } = row[devices];
        let start = table[stage - 1][devices - width].end;
        stages.push(PlannedStage { pieces: start..end, devices: devices - width..devices });
        devices -= width;
    }
    stages.reverse();
    stages
}
