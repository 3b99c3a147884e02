//! Why a run would refuse a plan, where it would: of devices that are not the job's own a plan says what could be.

use std::collections::BTreeSet;

use configs::DeviceKind;
use scheduler::PlannedStage;
use stages::cost::PieceShape;

use crate::abilities::Abilities;
use crate::plan::setting::Setting;

/// What of such stages is refused, if anything is.
pub(crate) fn not_run(setting: &Setting, pieces: &[PieceShape], stages: &[PlannedStage]) -> Option<String> {
    let names: Vec<&str> = setting.devices.names().collect();
    let names = stages.iter().flat_map(|stage| &names[stage.devices.clone()]);
    let kinds: BTreeSet<bool> = names.map(|name| configs::cpu_of(name).is_some()).collect();
    let (kind, kind_names) = match kinds.into_iter().collect::<Vec<_>>()[..] {
        [true] => (DeviceKind::Cpu, "CPUs"),
        [false] => (DeviceKind::Cuda, "GPUs"),
        _ => return Some("CPUs and GPUs have no pipeline together".to_owned()),
    };
    let weights = setting.types.weights;
    let Some(own) = weights.stored().and_then(|weights| Abilities::of(weights, kind)) else {
        return Some(format!("{kind_names} have no weights in {}", weights.name()));
    };
    let is_shared = |stage: &PlannedStage| stage.devices.len() > 1 && !own.may_share;
    let is_cut = |stage: &PlannedStage| {
        let last = &pieces[stage.pieces.end - 1];
        let column = last.columns.as_ref().map_or(0, |columns| columns.end);
        !last.ends_block && own.sum_cut.is_none_or(|multiple| !column.is_multiple_of(multiple))
    };
    let what = match (stages.iter().any(is_shared), stages.iter().any(is_cut)) {
        (true, true) => "neither share stages nor cut FFNs",
        (true, false) => "share no stages",
        (false, true) => "cut no FFNs",
        (false, false) => return None,
    };
    let shares = if own.may_share { "" } else { " --set pipeline.tensor_parallel=off" };
    let cuts = if own.sum_cut.is_some() { "" } else { " --set pipeline.column_cuts=off" };
    Some(format!("{kind_names} {what} with weights in {}; what runs:{shares}{cuts}", weights.name()))
}
