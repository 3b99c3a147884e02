//! A plan as programs read it. Stable; docs/plan.md says what each key is.

use std::ops::Range;

use configs::{DeviceSpec, MOST_SEQUENCES};
use scheduler::PlannedStage;
use serde::Serialize;
use stages::cost::{Balance, Basis, Measured, PieceShape};
use stages::{Exceptions, Ffn};

use crate::plan::answer::{self, Answer, Layout, Other};
use crate::plan::missing::Missing;
use crate::plan::not_run::not_run;
use crate::plan::setting::{self, Setting};

/// Engines that were measured in bulk runs reach 31 to 76 % of such a roofline, time for reading keys and values not
/// counted (benchmarks of TensorRT-LLM 1.0, MLPerf 5.1): a job takes its estimate at best, and this many
/// times as long at worst.
const LONGEST: f64 = 1.0 / 0.31;

/// Stages of pipelines that were measured have taken up to this many times what their profile says, beside the spread of its
/// times: 1.03 to 1.08 (benches/results/2026-11-24-zen4-2-cores.md).
const LONGEST_MEASURED: f64 = 1.1;

/// A whole plan.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) model: ModelPart,
    pub(crate) devices: String,
    pub(crate) dtype: &'static str,
    pub(crate) kv_cache_dtype: &'static str,
    pub(crate) cost: &'static str,
    /// Whether nothing was measured.
    pub(crate) estimate: bool,
    pub(crate) fits: bool,
    pub(crate) missing: Option<Missing>,
    /// Why a run would refuse the plan, where it would.
    pub(crate) not_run: Option<String>,
    #[serde(flatten)]
    pub(crate) found: Option<Found>,
}

#[derive(Debug, Serialize)]
pub(crate) struct ModelPart {
    pub(crate) params: u64,
    pub(crate) blocks: usize,
    pub(crate) slots: usize,
}

/// What there is to say of a layout that fits.
#[derive(Debug, Serialize)]
pub(crate) struct Found {
    /// How often all stages are there; what follows up to the tokens in flight is of the first.
    pub(crate) replicas: usize,
    pub(crate) stages: Vec<StagePart>,
    pub(crate) micro_batch_rows: u64,
    /// Rows that decode in a micro-batch on average: less than one where a prompt comes in several.
    pub(crate) decode_rows: f64,
    /// Where measured times come from: `measured`, `interpolated`, `extrapolated` or `scaled`.
    pub(crate) basis: Option<&'static str>,
    pub(crate) tokens_in_flight: u64,
    /// Sequences in flight of all replicas together, which a run must be allowed.
    pub(crate) max_sequences: u64,
    pub(crate) tokens_per_second: f64,
    pub(crate) bottleneck_over_mean: f64,
    pub(crate) bubble: f64,
    pub(crate) blocks_only: BlocksOnly,
    /// The job's own stages, where it gives any.
    pub(crate) given_stages: Option<OtherStages>,
    pub(crate) even_split: OtherStages,
    pub(crate) uniform_tp: Option<UniformTp>,
    pub(crate) job: JobPart,
}

#[derive(Debug, Serialize)]
pub(crate) struct StagePart {
    pub(crate) blocks: [usize; 2],
    pub(crate) slots: [usize; 2],
    /// Blocks of which only some columns are here.
    pub(crate) columns: Vec<CutBlock>,
    pub(crate) devices: Vec<String>,
    /// Which time the pipeline is on these devices: 0, or 1 for the second.
    #[serde(rename = "virtual")]
    pub(crate) pass: usize,
    pub(crate) tensor_parallel: usize,
    /// Blocks that the devices do not share by heads and by columns.
    #[serde(flatten)]
    pub(crate) exceptions: Exceptions,
    pub(crate) params: u64,
    pub(crate) weight_bytes: u64,
    pub(crate) kv_bytes_per_token: u64,
    pub(crate) kv_tokens: Option<u64>,
    pub(crate) time_ms: Times,
    pub(crate) memory: MemoryPart,
}

#[derive(Debug, Serialize)]
pub(crate) struct CutBlock {
    pub(crate) block: usize,
    pub(crate) start: usize,
    pub(crate) end: usize,
    pub(crate) of: usize,
}

#[derive(Debug, Serialize)]
pub(crate) struct Times {
    pub(crate) prefill: f64,
    pub(crate) decode: f64,
    pub(crate) mix: f64,
}

/// Bytes on each device of a stage; what is free is so beside its other stage, where the pipeline passes it twice.
#[derive(Debug, Serialize)]
pub(crate) struct MemoryPart {
    pub(crate) total: u64,
    pub(crate) weights: u64,
    pub(crate) kv: u64,
    pub(crate) workspace: u64,
    pub(crate) free: u64,
}

#[derive(Debug, Serialize)]
pub(crate) struct BlocksOnly {
    pub(crate) bottleneck_over_mean: f64,
    pub(crate) even_split: f64,
}

/// Other stages of single devices.
#[derive(Debug, Serialize)]
pub(crate) struct OtherStages {
    pub(crate) bottleneck_over_mean: f64,
    pub(crate) fits: bool,
    pub(crate) tokens_per_second: Option<f64>,
    /// The plan's tokens a second over these.
    pub(crate) ratio: Option<f64>,
}

#[derive(Debug, Serialize)]
pub(crate) struct UniformTp {
    pub(crate) tensor_parallel: usize,
    pub(crate) fits: bool,
    pub(crate) tokens_per_second: Option<f64>,
    /// The plan's tokens a second over these.
    pub(crate) ratio: Option<f64>,
}

#[derive(Debug, Serialize)]
pub(crate) struct JobPart {
    pub(crate) rows: Option<u64>,
    /// Of these: lines that are no request.
    pub(crate) rows_refused: Option<u64>,
    /// Of these: longer than the context, or than the fullest stage has room for in one row.
    pub(crate) rows_that_cannot_fit: Option<u64>,
    /// Rows of the input whose lengths are known, refused ones counted.
    pub(crate) rows_looked_at: Option<u64>,
    pub(crate) prompt_tokens: PromptPart,
    /// What says how long outputs are: `plan`, or `max_tokens`, an upper bound.
    pub(crate) output_lengths: &'static str,
    /// How outputs are spread around theirs.
    pub(crate) lengths: &'static str,
    pub(crate) output_tokens: f64,
    /// Of all rows that are run.
    pub(crate) tokens: Option<TokensPart>,
    pub(crate) hours: Option<f64>,
    pub(crate) device_hours: Option<f64>,
    pub(crate) cost: Option<f64>,
    pub(crate) interval: Interval,
}

/// Tokens of the prompts.
#[derive(Debug, Serialize)]
pub(crate) struct PromptPart {
    pub(crate) mean: f64,
    pub(crate) p50: u64,
    pub(crate) p95: u64,
    pub(crate) max: u64,
}

/// Tokens in all.
#[derive(Debug, Serialize)]
pub(crate) struct TokensPart {
    pub(crate) prompt: u64,
    pub(crate) output: u64,
}

/// From the least to the most that is to be expected: of an estimate from itself to what engines have been seen to fall short of
/// it, of measured times by their spread and what pipelines have been seen to take beyond them.
#[derive(Debug, Serialize)]
pub(crate) struct Interval {
    pub(crate) hours: Option<[f64; 2]>,
    pub(crate) cost: Option<[f64; 2]>,
}

impl Report {
    pub(crate) fn of(setting: &Setting, answer: &Answer) -> Self {
        let not_run = not_run(setting, &answer.pieces, &answer.plan.stages);
        Report { fits: true, not_run, found: Some(Found::of(setting, answer)), ..Self::head(setting) }
    }

    pub(crate) fn of_missing(setting: &Setting, missing: Missing) -> Self {
        Report { missing: Some(missing), ..Self::head(setting) }
    }

    fn head(setting: &Setting) -> Self {
        let config = &setting.config;
        Report {
            model: ModelPart {
                params: config.params(),
                blocks: config.blocks.len(),
                slots: config.num_slots,
            },
            devices: setting.devices.to_string(),
            dtype: setting.types.weights.name(),
            kv_cache_dtype: setting.types.kv.name(),
            cost: match setting.balance {
                Balance::Roofline if setting.measured.is_some() => "measured",
                Balance::Roofline => "roofline",
                Balance::Flops => "flops",
                Balance::Weights => "weights",
            },
            estimate: setting.measured.is_none(),
            fits: false,
            missing: None,
            not_run: None,
            found: None,
        }
    }
}

impl Found {
    fn of(setting: &Setting, answer: &Answer) -> Self {
        let plan = &answer.plan;
        let replica = &plan.setting;
        let ends = answer::ends_block(&answer.pieces);
        let stages: Vec<StagePart> =
            (0..plan.stages.len()).map(|idx| StagePart::of(replica, answer, &ends, idx)).collect();
        let row_tokens = answer::lanes_of(&answer.pieces, plan).row_tokens() as u64;
        let speed = plan.tokens_per_second;
        let beside = |layout: &Option<Layout>| {
            let other = layout.as_ref().map(|layout| layout.tokens_per_second);
            (other, other.map(|other| speed / other))
        };
        let other = |other: &Other| {
            let (tokens_per_second, ratio) = beside(&other.layout);
            let (bottleneck_over_mean, fits) = (other.over_mean, other.layout.is_some());
            OtherStages { bottleneck_over_mean, fits, tokens_per_second, ratio }
        };
        let uniform_tp = answer.uniform.as_ref().map(|(ranks, layout)| {
            let (tokens_per_second, ratio) = beside(layout);
            UniformTp { tensor_parallel: *ranks, fits: layout.is_some(), tokens_per_second, ratio }
        });
        Found {
            replicas: answer.replicas,
            stages,
            micro_batch_rows: plan.case.rows,
            decode_rows: plan.case.decode_rows,
            basis: setting.measured.as_ref().map(|measured| basis(replica, measured, answer).name()),
            tokens_in_flight: answer::tokens_in_flight(replica, plan),
            max_sequences: (plan.sequences() * answer.replicas as u64)
                .min(setting.rows.unwrap_or(u64::MAX))
                .min(MOST_SEQUENCES as u64),
            tokens_per_second: speed,
            bottleneck_over_mean: answer.bottleneck_over_mean,
            bubble: 1.0 - 1.0 / plan.problem(&ends).bottleneck_over_mean(&plan.stages),
            blocks_only: BlocksOnly {
                bottleneck_over_mean: answer.blocks_only,
                even_split: answer.blocks_only_even,
            },
            given_stages: answer.given.as_ref().map(other),
            even_split: other(&answer.even),
            uniform_tp,
            job: JobPart::of(setting, row_tokens, speed, interval(replica, answer)),
        }
    }
}

/// Where the times of all stages come from, the least sure of them.
fn basis(setting: &Setting, measured: &Measured, answer: &Answer) -> Basis {
    let load = setting.load(answer.plan.case.rows);
    let stages = answer.plan.stages.iter();
    let of_stage = |stage: &PlannedStage| {
        let (pieces, ranks) = (&answer.pieces[stage.pieces.clone()], stage.devices.len());
        measured.basis(pieces, ranks, &setting.sharing(measured, pieces, ranks, load), load)
    };
    stages.map(of_stage).max().unwrap_or(Basis::Measured)
}

/// The shortest and the longest that a job may take, as shares of what it is said to take.
fn interval(setting: &Setting, answer: &Answer) -> [f64; 2] {
    match &setting.measured {
        Some(measured) => {
            let [least, most] = measured.spread(setting.load(answer.plan.case.rows));
            [least, most * LONGEST_MEASURED]
        }
        None => [1.0, LONGEST],
    }
}

impl StagePart {
    fn of(setting: &Setting, answer: &Answer, ends: &[bool], index: usize) -> Self {
        let plan = &answer.plan;
        let stage = &plan.stages[index];
        let problem = plan.problem(ends);
        let costs = problem.rank_costs(stage);
        let ranks = stage.devices.len() as u64;
        let (kinds, load) = (setting.kinds(), setting.load(plan.case.rows));
        let spec = kinds[setting.slowest_kind(stage.devices.clone(), load)];
        let smallest = problem.smallest(stage.devices.clone());
        let shapes = &answer.pieces[stage.pieces.clone()];
        let (first, last) = (&shapes[0], &shapes[shapes.len() - 1]);
        let slot = |block: usize| setting.config.blocks[block].slot;
        let sharing = setting.sharing(&*setting.cost_model(spec), shapes, stage.devices.len(), load);

        let weights = costs.weight_bytes(stage.pieces.clone());
        let kv_bytes_per_token = costs.kv_bytes_per_token(stage.pieces.clone());
        let held = problem.held_beside(&plan.stages, stage);
        let tokens_in_flight = answer::tokens_in_flight(setting, plan);
        let room = smallest.memory_bytes - held.weight_bytes;
        let total = setting::memory_bytes(kinds[smallest.kind]);
        StagePart {
            blocks: [first.block, last.block + 1],
            slots: [slot(first.block), slot(last.block) + 1],
            columns: cut_blocks(setting, shapes),
            devices: device_names(setting, stage.devices.clone()),
            pass: plan.stages[..index].iter().filter(|before| before.devices == stage.devices).count(),
            tensor_parallel: stage.devices.len(),
            exceptions: sharing.exceptions(),
            params: params(setting, answer, &stage.pieces),
            weight_bytes: weights * ranks,
            kv_bytes_per_token: kv_bytes_per_token * ranks,
            kv_tokens: (kv_bytes_per_token > 0).then(|| room / held.kv_bytes_per_token),
            time_ms: times(setting, answer, spec, stage),
            memory: MemoryPart {
                total,
                weights,
                kv: kv_bytes_per_token * tokens_in_flight,
                workspace: total - smallest.memory_bytes,
                free: room - held.kv_bytes_per_token * tokens_in_flight,
            },
        }
    }
}

/// Each device by its kind and its place in the list.
pub(crate) fn device_names(setting: &Setting, devices: Range<usize>) -> Vec<String> {
    let names = setting.devices.runs().iter().flat_map(|(count, name)| std::iter::repeat_n(name, *count));
    names
        .enumerate()
        .skip(devices.start)
        .take(devices.len())
        .map(|(idx, name)| format!("{name}:{idx}"))
        .collect()
}

fn cut_blocks(setting: &Setting, shapes: &[PieceShape]) -> Vec<CutBlock> {
    let mut cut: Vec<CutBlock> = vec![];
    for shape in [&shapes[0], &shapes[shapes.len() - 1]] {
        let Ffn::SwiGlu { width } = setting.config.blocks[shape.block].ffn else { continue };
        let columns =
            || shapes.iter().filter(|other| other.block == shape.block).filter_map(|s| s.columns.clone());
        let (Some(first), Some(last)) = (columns().next(), columns().next_back()) else { continue };
        let is_listed = cut.iter().any(|other| other.block == shape.block);
        if last.end - first.start < width && !is_listed {
            cut.push(CutBlock { block: shape.block, start: first.start, end: last.end, of: width });
        }
    }
    cut
}

/// Parameters of a stage, no rank's copies counted: over all stages they sum up to the model's.
fn params(setting: &Setting, answer: &Answer, pieces: &Range<usize>) -> u64 {
    let config = &setting.config;
    let hidden = config.dims.hidden as u64;
    let table = config.dims.vocab as u64 * hidden;
    let of_piece = |shape: &PieceShape| {
        let block = config.blocks[shape.block];
        match &shape.columns {
            None => block.params(config.dims),
            Some(columns) => {
                let beside = block.attention.params(config.dims) + hidden; // With the FFN's norm.
                let own = 3 * columns.len() as u64 * hidden;
                own + if columns.start == 0 { beside } else { 0 }
            }
        }
    };
    let mut sum: u64 = answer.pieces[pieces.clone()].iter().map(of_piece).sum();
    sum += if pieces.start == 0 { table } else { 0 };
    if pieces.end == answer.pieces.len() {
        sum += hidden; // The last norm.
        sum += if config.tied_embeddings { 0 } else { table };
    }
    sum
}

/// Times of a stage for the plan's micro-batch, and for its parts each alone.
fn times(setting: &Setting, answer: &Answer, spec: &DeviceSpec, stage: &PlannedStage) -> Times {
    let ends = answer::ends_block(&answer.pieces);
    let load = setting.load(answer.plan.case.rows);
    let shapes = &answer.pieces;
    let (ranks, costs) = (stage.devices.len(), setting.cost_model(spec));
    let sharing = setting.sharing(&*costs, shapes, ranks, load);
    let ms = |load| {
        let costs = costs.shared_costs(shapes, ranks, &sharing, load);
        costs.seconds(stage.pieces.clone()) * 1e3
    };
    let mix = answer.plan.problem(&ends).stage_seconds(stage) * 1e3;
    Times { prefill: ms(load.prefill_only()), decode: ms(load.decode_only()), mix }
}

impl JobPart {
    /// The job on stages of which the fullest has room for so many tokens of a row.
    fn of(setting: &Setting, row_tokens: u64, tokens_per_second: f64, interval: [f64; 2]) -> Self {
        let work = &setting.work;
        let lengths = &work.lengths;
        let in_all = |tokens: f64| setting.rows.map(|rows| rows as f64 * tokens);
        let (prompt, output) = (in_all(setting.mix.prompt_tokens), in_all(setting.mix.output_tokens));
        let hours = output.map(|output| output / tokens_per_second / 3600.0);
        let prices: Option<Vec<f64>> =
            (setting.kind_of_each().iter()).map(|kind| setting.kinds()[*kind].price_per_hour).collect();
        let price = prices.map(|prices| prices.iter().sum::<f64>());
        let cost = hours.zip(price).map(|(hours, price)| hours * price);
        let interval = |of: Option<f64>| of.map(|of| interval.map(|share| share * of));
        JobPart {
            rows: work.rows,
            rows_refused: work.read.and_then(|read| work.of_all(read.refused)),
            rows_that_cannot_fit: (work.read)
                .and_then(|read| work.of_all(read.too_long + lengths.longer_than(row_tokens))),
            rows_looked_at: work.read.map(|read| read.looked_at),
            prompt_tokens: PromptPart {
                mean: setting.mix.prompt_tokens,
                p50: lengths.prompt_quantile(0.5),
                p95: lengths.prompt_quantile(0.95),
                max: lengths.prompt_quantile(1.0),
            },
            output_lengths: match work.read {
                Some(read) if !read.is_output_given => "max_tokens",
                Some(_) | None => "plan",
            },
            lengths: setting.lengths.name(),
            output_tokens: setting.mix.output_tokens,
            tokens: prompt.zip(output).map(|(prompt, output)| TokensPart {
                prompt: prompt.round() as u64,
                output: output.round() as u64,
            }),
            hours,
            device_hours: hours.map(|hours| hours * setting.devices.num_devices() as f64),
            cost,
            interval: Interval { hours: interval(hours), cost: interval(cost) },
        }
    }
}
