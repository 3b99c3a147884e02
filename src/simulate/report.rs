//! A simulated job as programs read it. Stable; docs/simulate.md says what each key is.

use std::time::Duration;

use scheduler::{Options, Problem, Share, Simulated, Timeline, Waits};
use serde::Serialize;
use stages::cost::PieceShape;

use super::lengths::{LengthDraw, SIGMA};
use crate::cli::LengthsArg;
use crate::plan::answer::{self, Layout};
use crate::plan::report::device_names;
use crate::plan::setting::Setting;

/// A whole simulation.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) devices: String,
    pub(crate) dtype: &'static str,
    pub(crate) kv_cache_dtype: &'static str,
    /// Whether nothing was measured.
    pub(crate) estimate: bool,
    pub(crate) lengths: LengthsPart,
    pub(crate) pipeline: PipelinePart,
    pub(crate) rows: u64,
    pub(crate) prompt_tokens: u64,
    pub(crate) generated_tokens: u64,
    pub(crate) micro_batches: u64,
    pub(crate) wall_seconds: f64,
    pub(crate) wall_ns: u64,
    pub(crate) tokens_per_second: f64,
    pub(crate) plan: PlanPart,
    pub(crate) preemptions: u64,
    pub(crate) recomputed_tokens: u64,
    pub(crate) kv: KvPart,
    pub(crate) tail_ns: u64,
    pub(crate) stages: Vec<StagePart>,
    pub(crate) timeline: TimelinePart,
}

#[derive(Debug, Serialize)]
pub(crate) struct LengthsPart {
    pub(crate) distribution: &'static str,
    pub(crate) sigma: Option<f64>,
    pub(crate) seed: u64,
    pub(crate) prompt_tokens: f64,
    pub(crate) output_tokens: f64,
    pub(crate) max_tokens: u32,
}

#[derive(Debug, Serialize)]
pub(crate) struct PipelinePart {
    pub(crate) micro_batch_rows: u64,
    pub(crate) micro_batch_tokens: usize,
    pub(crate) max_sequences: usize,
    pub(crate) window: usize,
    pub(crate) num_pages: usize,
    pub(crate) page_tokens: usize,
}

/// What the plan says of the same layout.
#[derive(Debug, Serialize)]
pub(crate) struct PlanPart {
    pub(crate) tokens_per_second: f64,
    /// Simulated over planned.
    pub(crate) ratio: f64,
    /// The stage for which all others wait.
    pub(crate) bottleneck: usize,
}

#[derive(Debug, Serialize)]
pub(crate) struct KvPart {
    pub(crate) mean: f64,
    pub(crate) most: f64,
}

#[derive(Debug, Serialize)]
pub(crate) struct StagePart {
    pub(crate) blocks: [usize; 2],
    pub(crate) devices: Vec<String>,
    /// Share of its time that it would be busy by the plan.
    pub(crate) planned_busy: f64,
    pub(crate) busy_ns: u64,
    pub(crate) starved_ns: u64,
    pub(crate) kv_limited_ns: u64,
    pub(crate) tail_ns: u64,
    pub(crate) idle_ns: u64,
}

#[derive(Debug, Serialize)]
pub(crate) struct TimelinePart {
    pub(crate) bin_seconds: f64,
    pub(crate) stages: Vec<Vec<SharePart>>,
    pub(crate) kv: Vec<f64>,
    pub(crate) running: Vec<f64>,
    pub(crate) tokens: Vec<f64>,
}

#[derive(Debug, Serialize)]
pub(crate) struct SharePart {
    pub(crate) busy: f64,
    pub(crate) starved: f64,
    pub(crate) kv_limited: f64,
    pub(crate) tail: f64,
    pub(crate) idle: f64,
}

/// What a report is made of.
pub(super) struct Played<'a> {
    pub(super) setting: &'a Setting,
    pub(super) pieces: &'a [PieceShape],
    pub(super) layout: &'a Layout,
    pub(super) options: &'a Options,
    pub(super) window: usize,
    pub(super) max_tokens: u32,
    pub(super) draw: LengthDraw,
    pub(super) simulated: Simulated,
}

impl Report {
    pub(super) fn of(played: Played<'_>) -> Self {
        let stages = stages(&played);
        let bottleneck = bottleneck(&played);
        let Played { setting, layout, options, window, max_tokens, draw, simulated, .. } = played;
        let tokens_per_second = simulated.tokens_per_second();
        Report {
            devices: setting.devices.to_string(),
            dtype: setting.types.weights.name(),
            kv_cache_dtype: setting.types.kv.name(),
            estimate: setting.measured.is_none(),
            lengths: LengthsPart {
                distribution: match draw.distribution {
                    LengthsArg::Fixed => "fixed",
                    LengthsArg::Exponential => "exponential",
                    LengthsArg::Lognormal => "lognormal",
                },
                sigma: (draw.distribution == LengthsArg::Lognormal).then_some(SIGMA),
                seed: draw.seed,
                prompt_tokens: setting.mix.prompt_tokens,
                output_tokens: setting.mix.output_tokens,
                max_tokens,
            },
            pipeline: PipelinePart {
                micro_batch_rows: layout.case.rows,
                micro_batch_tokens: options.micro_batch_tokens,
                max_sequences: options.max_sequences,
                window,
                num_pages: options.num_pages,
                page_tokens: options.page_tokens,
            },
            rows: simulated.rows,
            prompt_tokens: simulated.prompt_tokens,
            generated_tokens: simulated.generated_tokens,
            micro_batches: simulated.micro_batches,
            wall_seconds: simulated.wall.as_secs_f64(),
            wall_ns: ns(simulated.wall),
            tokens_per_second,
            plan: PlanPart {
                tokens_per_second: layout.tokens_per_second,
                ratio: tokens_per_second / layout.tokens_per_second,
                bottleneck,
            },
            preemptions: simulated.stats.preemptions,
            recomputed_tokens: simulated.stats.recomputed_tokens,
            kv: KvPart { mean: simulated.kv, most: simulated.kv_most },
            tail_ns: ns(simulated.tail),
            stages,
            timeline: TimelinePart::of(simulated.timeline),
        }
    }
}

fn stages(played: &Played<'_>) -> Vec<StagePart> {
    let Played { setting, pieces, layout, simulated, .. } = played;
    let ends = answer::ends_block(pieces);
    let problem: Problem<'_> = layout.problem(&ends);
    let bottleneck = problem.bottleneck(&layout.stages);
    (layout.stages.iter().zip(&simulated.stages))
        .map(|(stage, waits)| {
            let Waits { busy, starved, kv_limited, tail, idle } = *waits;
            StagePart {
                blocks: [pieces[stage.pieces.start].block, pieces[stage.pieces.end - 1].block + 1],
                devices: device_names(setting, stage.devices.clone()),
                planned_busy: (problem.stage_seconds(stage) - problem.hop_seconds(stage)) / bottleneck,
                busy_ns: ns(busy),
                starved_ns: ns(starved),
                kv_limited_ns: ns(kv_limited),
                tail_ns: ns(tail),
                idle_ns: ns(idle),
            }
        })
        .collect()
}

/// The first of the stages that take longest by the plan, which charges the sender for hops.
fn bottleneck(played: &Played<'_>) -> usize {
    let ends = answer::ends_block(played.pieces);
    let problem = played.layout.problem(&ends);
    let seconds: Vec<f64> = played.layout.stages.iter().map(|stage| problem.stage_seconds(stage)).collect();
    let longest = seconds.iter().copied().fold(0.0, f64::max);
    seconds.iter().position(|seconds| *seconds == longest).unwrap_or(0)
}

impl TimelinePart {
    fn of(timeline: Timeline) -> Self {
        let Timeline { bin_seconds, stages, kv, running, tokens } = timeline;
        let share = |share: Share| {
            let Share { busy, starved, kv_limited, tail, idle } = share;
            SharePart { busy, starved, kv_limited, tail, idle }
        };
        let stages = stages.into_iter().map(|bins| bins.into_iter().map(share).collect()).collect();
        TimelinePart { bin_seconds, stages, kv, running, tokens }
    }
}

/// Whole nanoseconds: 584 years of them fit.
fn ns(time: Duration) -> u64 {
    time.as_nanos() as u64
}
