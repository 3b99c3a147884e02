//! What `run` executes of the layouts that plans know. All that depends on it asks here.

use scheduler::PlannedStage;

/// Stages of several devices that share each matrix.
pub(crate) const TENSOR_PARALLEL: bool = true;

/// Stages that share an FFN with a neighbour, by its columns.
pub(crate) const COLUMN_CUTS: bool = true;

/// Several pipelines for one job.
pub(crate) const REPLICAS: bool = false;

/// Whether so many replicas of these stages can be run. Devices may be in several stages: a job names them as often.
pub(crate) fn executes(replicas: usize, stages: &[PlannedStage], ends_block: &[bool]) -> bool {
    let is_shared = |stage: &PlannedStage| stage.devices.len() > 1;
    let is_cut = |stage: &PlannedStage| !ends_block[stage.pieces.end - 1];
    (REPLICAS || replicas == 1)
        && (TENSOR_PARALLEL || !stages.iter().any(is_shared))
        && (COLUMN_CUTS || !stages.iter().any(is_cut))
}
