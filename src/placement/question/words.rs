//! What is said of layouts, as a job file has them.

use configs::TensorParallel;
use scheduler::PlannedStage;
use stages::Part;
use stages::cost::PieceShape;

use super::{BETTER_LAYOUT, Kept, Question, Source, parts};
use crate::layout::{self, StageLayout, part_of, ranges};
use crate::plan::answer;

/// A given cut is worth a line when the planned one is faster by this share.
const BETTER_CUT: f64 = 1.03;

impl Question {
    pub(in crate::placement) fn announcement(
        &self,
        planned: &[StageLayout],
        profile_command: &str,
    ) -> String {
        let (stages, source) = (self.described(planned), self.source(&self.with_sharing(planned)));
        let measure = match source {
            Source::Measured(_) => String::new(),
            Source::Estimate => format!(" ({profile_command} measures)"),
        };
        format!("stages: {stages}, {}{measure}", source.words())
    }

    /// What a job should know whose micro-batches are smaller than they might be.
    pub(in crate::placement) fn small_micro_batches(&self, tokens: usize, most: usize) -> Option<String> {
        (tokens < most).then(|| {
            format!(
                "micro-batches: of at most {tokens} tokens, each of which takes hardly longer than in those of {most}, so that \
                 stages wait less for each other"
            )
        })
    }

    pub(in crate::placement) fn going_on(&self, stages: &[StageLayout]) -> String {
        format!("stages: {}, as in the job's first run", self.described(stages))
    }

    /// What a job should know whose own cut is slower than need be.
    pub(in crate::placement) fn compare(
        &self,
        given: &[StageLayout],
        planned: &[StageLayout],
    ) -> Option<String> {
        let ratio = self.speed(planned) / self.speed(given);
        (ratio > BETTER_CUT).then(|| {
            let (planned, words) = (ranges(&parts(planned)), self.source(planned).words());
            format!("stages: the given cut takes {ratio:.2} times as long as {planned}, {words}")
        })
    }

    /// The fastest of all layouts that a plan knows, where that is faster than the planned stages: with as many rows in flight,
    /// shared stages and FFNs, several pipelines, stages in another order; of a job that keeps a device for each stage, whose numerics
    /// shared ones would change, without those.
    pub(in crate::placement) fn better_layout(&self, planned: &[StageLayout], kept: &Kept) -> Option<String> {
        let sequences = self.replicas as u64 * self.sequences(&self.with_sharing(planned));
        let mut setting = self.with_memory(&self.setting, sequences);
        if *kept == Kept::OneEach {
            setting.tensor_parallel = TensorParallel::Off;
        }
        let pieces = setting.pieces();
        let (replicas, layout) = answer::plan(&setting, &pieces)?;
        let ratio = layout.tokens_per_second / self.speed(planned);
        if ratio <= BETTER_LAYOUT {
            return None;
        }
        let found = layout.stages.iter().map(|stage| (part_of(&pieces, &stage.pieces), stage.devices.len()));
        let is_planned = found.eq(planned.iter().map(|stage| (stage.part, stage.devices.len())));
        if replicas == self.replicas && is_planned {
            return None;
        }
        let to_paste = self.to_paste(replicas, &pieces, &layout.stages);
        Some(format!("stages: {to_paste} would be {ratio:.2} times as fast"))
    }

    /// Replicas where they change, devices, widths where they are not all 1, and stages, as a job file has them.
    fn to_paste<'a>(&'a self, replicas: usize, pieces: &[PieceShape], stages: &[PlannedStage]) -> String {
        let groups = self.own.names.chunks(self.own.names.len() / replicas);
        let of_group = |names: &'a [String]| stages.iter().flat_map(|stage| &names[stage.devices.clone()]);
        let devices: Vec<&String> = groups.flat_map(of_group).collect();
        let replicas = match replicas == self.replicas {
            true => String::new(),
            false => format!("replicas = {replicas}, "),
        };
        let widths: Vec<usize> = stages.iter().map(|stage| stage.devices.len()).collect();
        let parts: Vec<Part> = stages.iter().map(|stage| part_of(pieces, &stage.pieces)).collect();
        let widths = match widths.iter().all(|width| *width == 1) {
            true => String::new(),
            false => format!(", tensor_parallel = {widths:?}"),
        };
        format!("{replicas}devices = {devices:?}{widths} and stages = {}", ranges(&parts))
    }

    /// Stages, and their widths where they are not all 1, or all devices where some are in two.
    fn described(&self, stages: &[StageLayout]) -> String {
        let ranges = ranges(&parts(stages));
        let widths: Vec<usize> = stages.iter().map(|stage| stage.devices.len()).collect();
        if widths.iter().any(|width| *width > 1) {
            return format!("{ranges} with tensor_parallel = {widths:?}");
        }
        if layout::is_one_each(stages) {
            return ranges;
        }
        let seats = (0..self.replicas).flat_map(|replica| self.seats(stages, replica));
        let devices: Vec<&String> = seats.map(|seat| &self.own.names[seat]).collect();
        format!("{ranges} with devices = {devices:?}")
    }
}
