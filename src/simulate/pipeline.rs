//! The pipeline that is played: a layout's stages as virtual ones, and what the scheduler may use.

use std::collections::BTreeSet;

use anyhow::{Result, bail};
use scheduler::{Load, Options, PlannedStage, Simulation, VirtualStage, in_flight};
use stages::cost::{Balance, CostModel, Measured, PieceShape, hop_bytes};
use stages::{PAGE_TOKENS, Sharing};

use crate::efficient;
use crate::lower::window;
use crate::plan::answer::{self, Layout};
use crate::plan::setting::{Setting, hop_seconds};
use crate::simulate::lengths::Kind;

/// The scheduler's options for a layout, and the most tokens of any row's output: what the shortest prompt leaves.
///
/// # Errors
/// Where no page, or no prompt, has room.
pub(super) fn options(pieces: &[PieceShape], layout: &Layout, kinds: &[Kind]) -> Result<(Options, u32)> {
    let setting = &layout.setting;
    let (rows, context_tokens) = (layout.case.rows, setting.context_tokens);
    let num_stages = layout.stages.len();
    let max_sequences = (rows * in_flight(num_stages as u64)) as usize;
    let lanes = answer::lanes_of(pieces, layout);
    let shortest = kinds.iter().map(|kind| kind.prompt_tokens).min().unwrap_or(1);
    let prompt_tokens = shortest as usize;
    let lane_tokens = lanes.row_tokens();
    if lane_tokens < prompt_tokens {
        bail!("a row has room for {lane_tokens} tokens of KV, a prompt has {prompt_tokens}");
    }
    // The last token of a row is never computed.
    let max_tokens = (context_tokens - prompt_tokens).min(lane_tokens - prompt_tokens + 1);
    let (_, first) = &setting.devices.runs()[0];
    let options = Options {
        num_stages,
        micro_batch_tokens: setting.load(rows).tokens().ceil() as usize,
        max_sequences,
        num_pages: lanes.num_pages(),
        num_lanes: lanes.num_lanes,
        page_tokens: PAGE_TOKENS,
        context_tokens,
        efficient_tokens: efficient::tokens((first.as_str(), setting.kinds()[0]), setting.types.weights),
        num_memories: num_memories(setting, layout),
        feeds_back: false,
        is_ahead: false,
    };
    Ok((options, u32::try_from(max_tokens).unwrap_or(u32::MAX)))
}

/// Memories from which the stages read their weights: that of the cores of a machine is one, and each other device has its own.
fn num_memories(setting: &Setting, layout: &Layout) -> usize {
    let names: Vec<&str> = setting.devices.names().collect();
    let memory = |stage: &PlannedStage| {
        let device = stage.devices.start % names.len();
        configs::cpu_of(names[device]).is_none().then_some(device)
    };
    layout.stages.iter().map(memory).collect::<BTreeSet<_>>().len()
}

/// The layout as a simulation takes it.
pub(super) fn simulation<'a>(
    pieces: &'a [PieceShape],
    layout: &'a Layout,
    options: Options,
    max_tokens: u32,
) -> Simulation<'a> {
    let setting = &layout.setting;
    let load = setting.load(layout.case.rows);
    let stages = layout.stages.iter().map(|stage| virtual_stage(setting, pieces, stage, load)).collect();
    let window = window(options.max_sequences);
    Simulation { options, stages, window, max_tokens }
}

/// A stage whose ranks share blocks as is fastest for the plan's micro-batch, `load`.
fn virtual_stage<'a>(
    setting: &'a Setting,
    pieces: &'a [PieceShape],
    stage: &PlannedStage,
    load: Load,
) -> VirtualStage<'a> {
    let sharing = answer::sharing(setting, pieces, stage, load);
    if let Some(measured) = &setting.measured {
        return measured_stage(measured, pieces, stage, sharing);
    }
    let kind = setting.slowest_kind(stage.devices.clone(), load);
    let estimator = setting.estimator(setting.kinds()[kind], Balance::Roofline);
    let ranks = stage.devices.len();
    let seconds = estimator.stage_seconds(pieces, stage.pieces.clone(), ranks, &sharing);
    let links = setting.links_after(stage.devices.end - 1);
    // As the planner has it: nothing is charged for tokens on their way back, and twice the bytes for a cut FFN.
    let (is_last, is_cut) = (stage.pieces.end == pieces.len(), !pieces[stage.pieces.end - 1].ends_block);
    let bytes_per_token = hop_bytes(setting.config.dims, 1.0) * if is_cut { 2.0 } else { 1.0 };
    let hop = move |load: Load| match is_last {
        true => 0.0,
        false => hop_seconds(links, load.tokens() * bytes_per_token),
    };
    VirtualStage {
        device: stage.devices.start,
        seconds: Box::new(move |load| seconds.of(load)),
        hop_seconds: Box::new(hop),
    }
}

/// A stage by what was measured. Taking over and handing on were measured as its own work, half of a hop each.
fn measured_stage<'a>(
    measured: &'a Measured,
    pieces: &'a [PieceShape],
    stage: &PlannedStage,
    sharing: Sharing,
) -> VirtualStage<'a> {
    let (run, ranks) = (stage.pieces.clone(), stage.devices.len());
    let seconds = move |load: Load| measured.step_seconds(pieces, run.clone(), ranks, &sharing, load);
    let device = stage.devices.start;
    VirtualStage { device, seconds: Box::new(seconds), hop_seconds: Box::new(|_| 0.0) }
}
