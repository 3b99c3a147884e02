//! A simulated job as programs read it. Stable; docs/simulate.md says what each key is.

use std::time::Duration;

use scheduler::{Options, Problem, Share, Simulated, Timeline, Waits};
use serde::Serialize;
use stages::cost::PieceShape;

use super::lengths::LengthDraw;
use crate::cli::LengthsArg;
use crate::plan::answer::{self, Layout};
use crate::plan::report::device_names;
use crate::plan::setting::Setting;
use crate::plan::spread::SIGMA;

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
    /// How many pipelines there are, each with a part of the rows.
    pub(crate) replicas: usize,
    /// The one that ends last, of which `kv`, `tail_ns`, `stages` and `timeline` are.
    pub(crate) last_replica: usize,
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
    /// Of each replica.
    pub(super) simulated: Vec<Simulated>,
}

impl Report {
    pub(super) fn of(played: Played<'_>) -> Self {
        let last_replica = played.last_replica();
        let stages = stages(&played, &played.simulated[last_replica]);
        let bottleneck = bottleneck(&played);
        let Played { setting, layout, options, window, max_tokens, draw, mut simulated, .. } = played;
        let sum = |part: fn(&Simulated) -> u64| simulated.iter().map(part).sum::<u64>();
        let (rows, prompt_tokens) = (sum(|one| one.rows), sum(|one| one.prompt_tokens));
        let (generated_tokens, micro_batches) =
            (sum(|one| one.generated_tokens), sum(|one| one.micro_batches));
        let (preemptions, recomputed_tokens) =
            (sum(|one| one.stats.preemptions), sum(|one| one.stats.recomputed_tokens));
        let replicas = simulated.len();
        let simulated = simulated.swap_remove(last_replica);
        let seconds = simulated.wall.as_secs_f64();
        let tokens_per_second = if seconds > 0.0 { generated_tokens as f64 / seconds } else { 0.0 };
        Report {
            devices: setting.devices.to_string(),
            dtype: setting.types.weights.name(),
            kv_cache_dtype: setting.types.kv.name(),
            estimate: setting.measured.is_none(),
            lengths: LengthsPart {
                distribution: draw.distribution.name(),
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
            replicas,
            last_replica,
            rows,
            prompt_tokens,
            generated_tokens,
            micro_batches,
            wall_seconds: simulated.wall.as_secs_f64(),
            wall_ns: ns(simulated.wall),
            tokens_per_second,
            plan: PlanPart {
                tokens_per_second: layout.tokens_per_second,
                ratio: tokens_per_second / layout.tokens_per_second,
                bottleneck,
            },
            preemptions,
            recomputed_tokens,
            kv: KvPart { mean: simulated.kv, most: simulated.kv_most },
            tail_ns: ns(simulated.tail),
            stages,
            timeline: TimelinePart::of(simulated.timeline),
        }
    }
}

impl Played<'_> {
    /// The replica for which the job's end waits; of several the first.
    fn last_replica(&self) -> usize {
        let wall = |index: &usize| (self.simulated[*index].wall, std::cmp::Reverse(*index));
        (0..self.simulated.len()).max_by_key(wall).unwrap_or(0)
    }
}

/// The stages of the replica that ends last.
fn stages(played: &Played<'_>, simulated: &Simulated) -> Vec<StagePart> {
    let Played { setting, pieces, layout, .. } = played;
    let first_device = played.last_replica() * setting.devices.num_devices() / played.simulated.len();
    let ends = answer::ends_block(pieces);
    let problem: Problem<'_> = layout.problem(&ends);
    let bottleneck = problem.bottleneck(&layout.stages);
    (layout.stages.iter().zip(&simulated.stages))
        .map(|(stage, waits)| {
            let Waits { busy, starved, kv_limited, tail, idle } = *waits;
            StagePart {
                blocks: [pieces[stage.pieces.start].block, pieces[stage.pieces.end - 1].block + 1],
                devices: device_names(
                    setting,
                    first_device + stage.devices.start..first_device + stage.devices.end,
                ),
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

/// The first of the stages whose devices take longest by the plan, which charges the sender for hops.
fn bottleneck(played: &Played<'_>) -> usize {
    let ends = answer::ends_block(played.pieces);
    let problem = played.layout.problem(&ends);
    let devices = problem.device_seconds(&played.layout.stages);
    let seconds: Vec<f64> = played.layout.stages.iter().map(|stage| devices[stage.devices.start]).collect();
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
