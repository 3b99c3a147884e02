//! What `run` executes of the layouts that plans know. All that depends on it asks here.

use scheduler::PlannedStage;

/// Stages of several devices that share each matrix.
pub(crate) const TENSOR_PARALLEL: bool = true;

/// Stages that share an FFN with a neighbour, by its columns.
pub(crate) const COLUMN_CUTS: bool = true;

/// Whether these stages can be run. Devices may be in several of them, and there may be several replicas: a job names its
/// devices as often.
pub(crate) fn executes(stages: &[PlannedStage], ends_block: &[bool]) -> bool {
    let is_shared = |stage: &PlannedStage| stage.devices.len() > 1;
    let is_cut = |stage: &PlannedStage| !ends_block[stage.pieces.end - 1];
    (TENSOR_PARALLEL || !stages.iter().any(is_shared)) && (COLUMN_CUTS || !stages.iter().any(is_cut))
}
