//! Steps that are captured once and then launched as a whole: a step of rows that decode is hundreds of small kernels, and to queue
//! them one by one takes a thread as long as some of them take the device.
//!
//! What a graph repeats are kernels with their arguments. So all that changes from step to step lies in tables at fixed places, which are
//! sent before; rows are padded to the next of a few numbers, and rows that nobody asked for write no keys; and how contexts are split
//! is a part of what a graph is found by. Nothing that a graph points to may have been freed since: it holds as long as the device's memory is what
//! it was (`Stream::changes`).
//!
//! The first step of a kind runs as it is, for libraries try algorithms then; the second is captured.

use std::collections::HashMap;

use super::attention::{Plan, PlanShape};
use super::stream::Graph;
use super::{Cuda, locked};
use crate::backend::{AttentionSlice, DecodeStep};
use crate::error::{Error, Result};

/// Graphs that are kept: when there are more all are captured anew. A model of hundreds of blocks has some thousand kernels in each.
const MOST_GRAPHS: usize = 256;

/// What is known of steps that repeat.
#[derive(Debug, Default)]
pub(super) struct Graphs {
    /// Rows that there is room for; none where nothing is captured.
    most_rows: usize,
    /// Ways in which attention was shared out.
    shapes: Vec<PlanShape>,
    /// State of the device's memory for which they hold.
    changes: u64,
    kinds: HashMap<Key, Kind>,
    /// Rows beyond those of the step that runs.
    padding: usize,
    num_launched: u64,
}

/// What steps have in common that one graph serves.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    /// Rows, padded.
    rows: usize,
    /// Parts of contexts and pages of each, for each way of sharing out.
    parts: Vec<(usize, usize)>,
}

#[derive(Debug)]
enum Kind {
    /// It has run once.
    Seen,
    Captured(Graph),
    /// It cannot be captured.
    Unfit,
}

/// The number of rows that so many are padded to: multiples of 8, and of 16 beyond 256, so that what is computed in vain is little
/// where rows cost time; powers of two below.
pub(super) fn padded(rows: usize) -> usize {
    match rows {
        0..=8 => rows.next_power_of_two(),
        9..=256 => rows.next_multiple_of(8),
        _ => rows.next_multiple_of(16),
    }
}

impl Graphs {
    /// Captures steps of up to so many rows from now on.
    pub(super) fn begin(&mut self, most_rows: usize) {
        *self = Graphs { most_rows, ..Graphs::default() };
    }

    /// What rows of a step are padded to.
    pub(super) fn padded_rows(&self, rows: usize) -> usize {
        let padded = padded(rows);
        if padded <= self.most_rows { padded } else { rows }
    }

    /// Rows of the step that runs beyond those that were asked for.
    pub(super) fn padding(&self) -> usize {
        self.padding
    }

    /// Takes note of how attention is shared out.
    pub(super) fn saw(&mut self, shape: PlanShape) {
        if !self.shapes.contains(&shape) {
            self.shapes.push(shape);
        }
    }

    /// Forgets what points to memory that is not there any more.
    fn forget(&mut self, changes: u64) {
        if self.changes != changes || self.kinds.len() > MOST_GRAPHS {
            self.kinds.clear();
            self.changes = changes;
        }
    }
}

impl Cuda {
    /// Runs a step's work, or what an earlier one has queued of the same kind.
    pub(super) fn repeat_step<E: From<Error>>(
        &self,
        step: &DecodeStep<'_>,
        mut work: impl FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let most_rows = locked(&self.graphs).most_rows;
        if most_rows == 0 || step.rows > most_rows {
            return work();
        }
        locked(&self.graphs).padding = step.rows - step.positions.len();
        let done = self.repeat_padded(step, &mut work);
        locked(&self.graphs).padding = 0;
        done
    }

    fn repeat_padded<E: From<Error>>(
        &self,
        step: &DecodeStep<'_>,
        work: &mut impl FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        const OP: &str = "repeat a step";
        let key = self.send_tables(step)?;
        let kind = key.as_ref().and_then(|key| {
            let mut graphs = locked(&self.graphs);
            graphs.forget(self.stream.changes());
            graphs.kinds.remove(key)
        });
        let (done, kind) = match kind {
            Some(Kind::Captured(graph)) => (graph.launch(OP).map_err(E::from), Kind::Captured(graph)),
            Some(Kind::Seen) => match self.capture(work)? {
                Some(graph) => (graph.launch(OP).map_err(E::from), Kind::Captured(graph)),
                None => (work(), Kind::Unfit),
            },
            Some(Kind::Unfit) => (work(), Kind::Unfit),
            None => (work(), Kind::Seen),
        };
        // How attention is shared out is known when it has been.
        let key = self.key(step);
        let mut graphs = locked(&self.graphs);
        graphs.forget(self.stream.changes());
        if done.is_ok() {
            graphs.num_launched += u64::from(matches!(kind, Kind::Captured(_)));
            graphs.kinds.insert(key, kind);
        }
        done
    }

    /// What work queues, or nothing where it does what cannot be captured.
    fn capture<E>(
        &self,
        work: &mut impl FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<Option<Graph>, E>
    where
        E: From<Error>,
    {
        const OP: &str = "capture a step";
        self.stream.begin_capture(OP)?;
        let queued = work();
        let graph = self.stream.end_capture(OP);
        // What work refuses it refuses again when it runs as it is.
        Ok(graph.ok().filter(|_| queued.is_ok()))
    }

    /// Sends the tables that blocks of a step ask for; what the step is found by, where these are the same for all blocks.
    fn send_tables(&self, step: &DecodeStep<'_>) -> Result<Option<Key>> {
        const OP: &str = "tables of a step";
        let padding = step.rows - step.positions.len();
        let plans = self.plans(step.slices, padding);
        let mut tables = locked(&self.tables);
        tables.put_positions(&self.stream, OP, step.positions, padding)?;
        tables.put_places(&self.stream, OP, step.slices, padding)?;
        let Some(first) = plans.first() else { return Ok(Some(Key { rows: step.rows, parts: Vec::new() })) };
        tables.put_plan(&self.stream, OP, first)?;
        let are_alike = plans.iter().all(|plan| (&plan.tiles, &plan.rows) == (&first.tiles, &first.rows));
        Ok(are_alike.then(|| Key { rows: step.rows, parts: plans.iter().map(Plan::parts).collect() }))
    }

    fn key(&self, step: &DecodeStep<'_>) -> Key {
        let plans = self.plans(step.slices, step.rows - step.positions.len());
        Key { rows: step.rows, parts: plans.iter().map(Plan::parts).collect() }
    }

    fn plans(&self, slices: &[AttentionSlice], padding: usize) -> Vec<Plan> {
        let shapes = locked(&self.graphs).shapes.clone();
        shapes.into_iter().map(|shape| Plan::new(slices, padding, shape)).collect()
    }

    /// Steps that were launched as a graph so far.
    pub fn launched_graphs(&self) -> u64 {
        locked(&self.graphs).num_launched
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_padded_by_less_than_an_eighth_where_they_are_many() {
        assert_eq!(
            [1, 2, 3, 5, 8, 9, 184, 250, 257, 500].map(padded),
            [1, 2, 4, 8, 8, 16, 184, 256, 272, 512]
        );
        assert!((64..600).all(|rows| padded(rows) * 8 <= rows * 9));
        let graphs = Graphs { most_rows: 20, ..Graphs::default() };
        assert_eq!([3, 17, 19].map(|rows| graphs.padded_rows(rows)), [4, 17, 19]);
        assert_eq!(Graphs::default().padded_rows(3), 3);
    }
}
