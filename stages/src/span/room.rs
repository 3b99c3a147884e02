//! Room for steps: arrays that are made at load, so that no step allocates, and once more where steps had to give them back.

use std::sync::Arc;

use kernels::Backend;

use super::{SpanStage, Work};
use crate::config::ModelConfig;
use crate::error::Result;
use crate::memory::StepSize;
use crate::part::Part;
use crate::ranks::Ranks;
use crate::shard::RankPlace;
use crate::sharing::Sharing;
use crate::work_shapes::WorkShapes;

/// What decides the arrays of a stage's steps.
pub(super) struct Room {
    pub(super) config: Arc<ModelConfig>,
    pub(super) part: Part,
    pub(super) place: RankPlace,
    pub(super) sharing: Sharing,
    pub(super) largest: StepSize,
    /// Rows of steps for which there is room, or was none when it was asked for. Of ranks all have the same.
    pub(super) rows: usize,
    /// Whether room was given back in the step that runs.
    pub(super) is_given_back: bool,
    /// What ranks know of steps that found none. Of ranks all know the same.
    pub(super) refusals: Refusals,
}

/// So many steps, or parts of steps, go in halves untried for want of room, and the next one is tried as a whole. One that fails
/// has every rank free what it works in and make it again, some twenty arrays, each of which waits for the device: should that
/// take as long as two steps, it is 1 % of so many. Where there is memory again, it is found after half a minute of steps of
/// 100 ms.
const UNTRIED: u32 = 255;

/// Which steps would find no room if they were tried as a whole.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    /// Rows of the smallest step that found none.
    least_rows: Option<usize>,
    /// Steps that went in halves untried, since one was tried.
    pub(super) num_untried: u32,
}

impl Refusals {
    /// A step of so many rows has found no room.
    pub(super) fn add(&mut self, rows: usize) {
        self.least_rows = Some(self.least_rows.map_or(rows, |least| least.min(rows)));
    }

    /// Whether a step of so many rows is to go in halves untried.
    pub(super) fn is_foreseen(&mut self, rows: usize) -> bool {
        if self.least_rows.is_none_or(|least| rows < least) {
            return false;
        }
        if self.num_untried == UNTRIED {
            *self = Refusals::default();
            return false;
        }
        self.num_untried += 1;
        true
    }
}

impl Room {
    fn shapes(&self, step: StepSize) -> WorkShapes {
        WorkShapes::of(&self.config, self.part, (self.place, &self.sharing), step)
    }

    /// Those of a step of so many rows. Parcels come by and by, some of which are on their way.
    fn shapes_of_rows(&self, rows: usize) -> WorkShapes {
        let sequences = rows.min(self.largest.sequences);
        self.shapes(StepSize { rows, sequences, micro_batches: 0, arrivals: 0, ..self.largest })
    }

    /// Makes room for the largest step, also for what ranks tell each other.
    ///
    /// # Errors
    /// What the device refuses.
    pub(super) fn make<B: Backend>(
        &self,
        backend: &B,
        work: &mut Work<B>,
        ranks: Option<&mut Ranks<B::Array>>,
    ) -> Result<()> {
        let shapes = self.shapes(self.largest);
        work.reserve(backend, &shapes)?;
        ranks.map_or(Ok(()), |ranks| ranks.reserve(shapes.told))
    }
}

impl<B: Backend> SpanStage<B> {
    /// Gives back what larger steps had. From then on arrays grow with the steps.
    pub(super) fn give_room_back(&mut self) {
        self.work = Work::new(&self.backend);
        self.backend.free_workspace();
        if let Some(ranks) = &mut self.ranks {
            ranks.free();
        }
        if let Some(room) = &mut self.room {
            (room.rows, room.is_given_back) = (0, true);
        }
    }

    /// Of several ranks makes room for the step that begins, where it is larger than those for which there is some: what another
    /// rank has been told that it may send does not wait for it.
    ///
    /// # Errors
    /// There is no such room.
    pub(super) fn make_room_to_share(&mut self) -> Result<()> {
        let (Some(ranks), Some(room)) = (&mut self.ranks, &mut self.room) else { return Ok(()) };
        let rows = self.batch.num_rows();
        if room.rows < rows {
            let shapes = room.shapes_of_rows(self.backend.padding_of(rows).min(room.largest.rows).max(rows));
            self.work.reserve(&self.backend, &shapes)?;
            ranks.reserve(shapes.told)?;
            room.rows = shapes.kept.rows;
        }
        Ok(())
    }

    /// Makes room once more, for steps like the last one and what they are padded to: a device captures steps of rows that decode
    /// only where arrays do not grow. Not after a step that has just given room back: where the next one finds none either, it
    /// would be made in vain. Ranks capture nothing, and have made theirs before the step.
    pub(super) fn make_room_again(&mut self) {
        let Some(room) = &mut self.room else { return };
        if std::mem::take(&mut room.is_given_back) || !self.batch.is_decode() || self.ranks.is_some() {
            return;
        }
        let rows = self.backend.padding_of(self.batch.num_rows()).min(room.largest.rows);
        if room.rows >= rows {
            return;
        }
        room.rows = rows;
        let shapes = room.shapes_of_rows(rows);
        if let Err(error) = self.work.reserve(&self.backend, &shapes) {
            tracing::debug!("{error}: steps of {rows} rows are not captured");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_of_as_many_rows_as_found_no_room_are_tried_once_in_a_while() {
        let mut refusals = Refusals::default();
        assert!(!refusals.is_foreseen(1000), "nothing is known");
        refusals.add(400);
        refusals.add(100);
        refusals.add(200);
        assert!(!refusals.is_foreseen(99));
        for _ in 0..3 {
            let rows = [100, 400, 7000].into_iter().cycle();
            assert!(rows.take(UNTRIED as usize).all(|rows| refusals.is_foreseen(rows)));
            assert!(!refusals.is_foreseen(100), "there may be room again");
            assert!(!refusals.is_foreseen(100), "as it has turned out");
            refusals.add(100);
        }
    }
}
