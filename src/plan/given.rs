//! The stages that a job gives itself.

use std::ops::Range;

use anyhow::{Result, bail};
use configs::JobFile;
use scheduler::PlannedStage;
use stages::cost::{Balance, PieceShape};

use crate::layout;
use crate::plan::answer;
use crate::plan::own::OwnDevices;
use crate::plan::setting::Setting;
use crate::{machine, text};

/// A job's own stages.
#[derive(Debug, Clone)]
pub(crate) struct GivenStages {
    /// The model in pieces of their own: whole blocks, but for FFNs that they cut, which need not be where a plan would cut them.
    pub(crate) pieces: Vec<PieceShape>,
    pub(crate) stages: Vec<PlannedStage>,
}

/// The stages that a job gives one replica, if it does: on its own devices as it names them, on others in order. Where these are fewer than
/// stages, it goes through all of them as often as need be.
///
/// # Errors
/// Stages that are not the model's, or not the devices'.
pub(crate) fn given_stages(setting: &Setting, job: &JobFile) -> Result<Option<GivenStages>> {
    let (sum_cut, weights) = (setting.sum_cut(), setting.types.weights.name());
    let Some(parts) = layout::given_where(&job.pipeline, sum_cut, weights, &setting.config)? else {
        return Ok(None);
    };
    check_count(setting, parts.len())?;
    let replica = setting.given_replica();
    let devices = match layout::widths(&job.pipeline) {
        Some(widths) => of_widths(&replica, widths)?,
        None => of_one_each(&replica, job, parts.len())?,
    };
    let (pieces, spans) = layout::pieces_of(&setting.config, &parts);
    let stages = spans.iter().zip(devices);
    let stages = stages.map(|(span, devices)| PlannedStage { pieces: span.range(), devices }).collect();
    Ok(Some(GivenStages { pieces, stages }))
}

/// Refuses stages that are not as many as the widths that the job gives, where it gives any.
fn check_count(setting: &Setting, num_stages: usize) -> Result<()> {
    match setting.given_widths().map(<[usize]>::len) {
        Some(num_widths) if num_widths != num_stages => bail!(
            "[pipeline] tensor_parallel: found {num_widths} widths for {num_stages} block ranges in stages, expected one for \
             each stage"
        ),
        _ => Ok(()),
    }
}

/// The devices of each stage, where these have the widths that the job gives. They may be unlike, as where a run shares out cores
/// that the number of its devices does not divide.
fn of_widths(setting: &Setting, widths: &[usize]) -> Result<Vec<Range<usize>>> {
    let mut next = 0;
    let mut stages = vec![];
    for (stage, &width) in widths.iter().enumerate() {
        if !setting.widths().contains(&width) {
            bail!("[pipeline] tensor_parallel: found {width}, expected one of {:?}", setting.widths());
        }
        let first = next;
        next += width;
        if next > setting.devices.num_devices() {
            return Err(beyond(setting, stage));
        }
        stages.push(first..next);
    }
    Ok(stages)
}

/// The device of each stage, where each has one.
fn of_one_each(setting: &Setting, job: &JobFile, num_stages: usize) -> Result<Vec<Range<usize>>> {
    let num_devices = setting.devices.num_devices();
    let own = OwnDevices::of(&job.pipeline, &machine::detect())?;
    let seats = &own.seats[..own.seats.len() / job.pipeline.replicas];
    let is_own = setting.devices == own.first_of(job.pipeline.replicas);
    let seats = match is_own && seats.len() == num_stages {
        true => seats.to_vec(),
        false if num_stages <= num_devices || num_stages.is_multiple_of(num_devices) => {
            (0..num_stages).map(|stage| stage % num_devices).collect()
        }
        false => return Err(beyond(setting, num_devices)),
    };
    Ok(seats.into_iter().map(|seat| seat..seat + 1).collect())
}

fn beyond(setting: &Setting, stage: usize) -> anyhow::Error {
    let (there, list) = (setting.devices.num_devices(), &setting.devices);
    anyhow::anyhow!("[pipeline] stages: stage {stage} is beyond the {there} devices {list}")
}

/// Why the job's own stages have no room for a single row.
pub(crate) fn lacking(setting: &Setting, given: &GivenStages) -> String {
    let GivenStages { pieces, stages } = given;
    let ends = answer::ends_block(pieces);
    let case = setting.case(pieces, &setting.widths(), Balance::Roofline, 1);
    let problem = case.problem(&ends);
    let kv_tokens = setting.kv().needed(1, stages.len() as u64).unwrap_or(0);
    let missing = stages.iter().map(|stage| problem.stage_missing_bytes(stage, kv_tokens));
    let hint = "hint: spanwise plan finds stages that fit, or says what would";
    match missing.enumerate().find(|(_, bytes)| *bytes > 0) {
        Some((stage, bytes)) => {
            let bytes = text::bytes(bytes);
            format!("[pipeline] stages: stage {stage} lacks {bytes} on each of its devices\n{hint}")
        }
        None => format!("[plan] tokens_in_flight: fewer than one row in each micro-batch needs\n{hint}"),
    }
}
