//! Which blocks each stage of a job gets: cut by what was measured on the device, or by an estimate.
//!
//! One stage of whole blocks for each device that the job names is all that can be run yet. Where a layout that cannot be
//! would be faster, or a job's own cut is slower than need be, a line says so. A profile that is stale or lacks blocks is
//! measured again, where it decides something; one that is not there is never measured unasked.

use std::time::Instant;

use anyhow::{Context, Result};
use configs::{ColumnCuts, DeviceCatalog, JobFile, TENSOR_PARALLEL_WIDTHS, TensorParallel};
use scheduler::{
    Costs, PlannedStage, Problem, Span, StageDevice, in_flight, least_bottleneck, least_bottleneck_on_each,
};
use stages::cost::{
    Balance, CostModel, Estimator, Load, Measured, NumberType, NumberTypes, PieceShape, pieces,
};
use stages::profile::{Effort, MeasureOptions, Missing, Neighbours, Profile, Stored};
use stages::{Device, Model};

use crate::hindsight::{Hindsight, StageWork};
use crate::plan::{CPU_CORE, Lengths, first_rows, roofline};
use crate::{lower, profile, say};

/// Rows of the input whose lengths stand for all: some thousand tokens are enough to tell short prompts from long ones.
const SAMPLED_ROWS: u64 = 256;

/// Tokens of answers where nobody says how long they are, and of prompts where the input cannot be read: a few hundred,
/// so that a row has 512 positions in the middle of its answer.
const TYPICAL_TOKENS: usize = 341;

/// A layout that cannot be run is worth a line when it is faster by this share.
const BETTER_LAYOUT: f64 = 1.02;

/// A given cut is worth a line when the planned one is faster by this share.
const BETTER_CUT: f64 = 1.03;

/// A job's stages.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Placement {
    pub(crate) spans: Vec<Span>,
    pub(crate) source: Source,
    /// The micro-batch that it was planned for.
    pub(crate) load: Load,
    /// What each stage takes for it.
    pub(crate) seconds: Vec<f64>,
    /// What the user should know.
    pub(crate) lines: Vec<String>,
    /// What was measured, where it is by that.
    profile: Option<Profile>,
}

/// Where costs come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    Measured,
    Estimate,
}

impl Source {
    /// Its word in manifests.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Measured => "measured",
            Self::Estimate => "estimate",
        }
    }

    pub(crate) fn words(self) -> &'static str {
        match self {
            Self::Measured => "by measured costs",
            Self::Estimate => "by an estimate",
        }
    }
}

/// Places a job's stages.
///
/// # Errors
/// Stages or devices that are wrong, more stages than blocks.
pub(crate) fn place(job: &JobFile, model: &Model) -> Result<Placement> {
    let pipeline = &job.pipeline;
    let given = lower::given_spans(&pipeline.stages, &model.config)?;
    let options = profile::options(&job.model, pipeline, model, Effort::default())?;
    let decides = given.is_none() && pipeline.devices.len() > 1;
    let profile = stored(job, model, &options, decides);
    let (source, costs) = costs(job, model, &options, profile.as_ref())?;
    let load = load(job, model, options.context_tokens);
    let question = Question { job, model, costs: &*costs, load };
    let planned = question.plan()?;
    let mut lines = vec![];
    let spans = match given {
        Some(given) => {
            lines.extend(question.compare(&given, &planned, source));
            given
        }
        None => {
            if planned.len() > 1 {
                lines.push(format!("stages: {}, {}", ranges(&planned), source.words()));
                lines.extend(question.better_layout(&planned));
            }
            planned
        }
    };
    let seconds = question.seconds(&spans);
    Ok(Placement { load: question.load, spans, source, seconds, lines, profile })
}

impl Placement {
    /// Holds what the stages have taken against the costs that they were cut by.
    ///
    /// # Errors
    /// Those of [`place`].
    pub(crate) fn judge(&self, job: &JobFile, model: &Model, stages: &[StageWork]) -> Result<Hindsight> {
        let options = profile::options(&job.model, &job.pipeline, model, Effort::default())?;
        let (_, costs) = costs(job, model, &options, self.profile.as_ref())?;
        Ok(Hindsight::of(&*costs, &pieces(&model.config, false), stages))
    }
}

/// Costs by a profile, where there is one that holds for the model, else by an estimate.
fn costs<'a>(
    job: &JobFile,
    model: &'a Model,
    options: &MeasureOptions,
    profile: Option<&Profile>,
) -> Result<(Source, Box<dyn CostModel + 'a>)> {
    let (roofline, types) = (cpu_roofline(options)?, number_types(options));
    let measured = profile.and_then(|profile| {
        Measured::new(&model.config, profile, neighbours(job), types, roofline.all_reduce).ok()
    });
    Ok(match measured {
        Some(measured) => (Source::Measured, Box::new(measured)),
        None => {
            let config = &model.config;
            let estimator = Estimator { config, roofline, types, balance: Balance::Roofline };
            (Source::Estimate, Box::new(estimator))
        }
    })
}

/// The profile of the job's devices, measured again where it must be and decides something.
fn stored(job: &JobFile, model: &Model, options: &MeasureOptions, decides: bool) -> Option<Profile> {
    if job.pipeline.profile == configs::Profile::Off {
        return None;
    }
    let store = profile::store().ok()?;
    let (why, earlier) = match store.load(&options.key(model)) {
        Stored::Absent => return None,
        Stored::Damaged(why) => {
            say(&format!("warning: damaged profile, not used: {why}"));
            return None;
        }
        Stored::Stale(why) => (why, None),
        Stored::Usable(profile) if !profile.reaches(options.micro_batch_tokens) => {
            ("does not reach to the job's micro-batches".to_owned(), None)
        }
        Stored::Usable(profile) => match profile.missing(&model.config) {
            missing if missing.is_empty() => return Some(*profile),
            missing => (lacks(&missing), Some(*profile)),
        },
    };
    if !decides {
        return None;
    }
    say(&format!("profile: {why}; it is measured again"));
    let begun = Instant::now();
    match profile::refresh(model, options, &store, earlier) {
        Ok(profile) => {
            say(&format!("profile: measured in {:.0} s", begun.elapsed().as_secs_f64()));
            Some(profile)
        }
        Err(error) => {
            say(&format!("warning: the profile was not measured: {error:#}"));
            None
        }
    }
}

fn lacks(missing: &Missing) -> String {
    match missing.blocks.len() {
        0 => "lacks attention of this model".to_owned(),
        1 => "lacks 1 block of this model".to_owned(),
        blocks => format!("lacks {blocks} blocks of this model"),
    }
}

/// One device in use has the memory to itself.
pub(crate) fn neighbours(job: &JobFile) -> Neighbours {
    let devices = &job.pipeline.devices;
    match devices.iter().all(|device| *device == devices[0]) {
        true => Neighbours::Idle,
        false => Neighbours::Busy,
    }
}

fn number_types(options: &MeasureOptions) -> NumberTypes {
    let dtypes = options.dtypes;
    NumberTypes { weights: NumberType::from(dtypes.weights), kv: NumberType::from(dtypes.kv) }
}

/// So many times what one core has as the device has threads.
fn cpu_roofline(options: &MeasureOptions) -> Result<stages::cost::Roofline> {
    let catalog = DeviceCatalog::shipped();
    let core = roofline(catalog.get(CPU_CORE).context("find this CPU")?, number_types(options).weights);
    let threads = match &options.devices[0] {
        Device::Cpu { threads, .. } => *threads as f64,
        Device::Reference => 1.0,
    };
    Ok(stages::cost::Roofline {
        flops_per_second: core.flops_per_second * threads,
        bf16_flops_per_second: core.bf16_flops_per_second * threads,
        bytes_per_second: core.bytes_per_second * threads,
        ..core
    })
}

/// How long rows are: as `[plan]` says, or else as the first of the input are.
fn lengths(job: &JobFile, model: &Model, context_tokens: usize) -> Lengths {
    let plan = job.plan.clone().unwrap_or_default();
    let typical = TYPICAL_TOKENS.min(context_tokens / 2).max(1);
    let given =
        |tokens: Option<usize>| tokens.map_or(typical, |tokens| tokens.min(context_tokens).max(1)) as u64;
    let alike = || Lengths::alike(given(plan.prompt_tokens), given(plan.output_tokens));
    match (plan.prompt_tokens, plan.output_tokens) {
        (Some(_), Some(_)) => alike(),
        _ if job.pipeline.devices.len() == 1 => alike(), // There is nothing to cut, and a tokenizer takes a second to read.
        // What is wrong with an input is said when it is run.
        _ => first_rows(job, &model.config, SAMPLED_ROWS, typical as u64).unwrap_or_else(|_| alike()),
    }
}

/// A micro-batch in the middle of the job.
fn load(job: &JobFile, model: &Model, context_tokens: usize) -> Load {
    let mix = lengths(job, model, context_tokens).mix().expect("an answer has a token");
    let rows = job.pipeline.max_sequences as u64 / in_flight(job.pipeline.devices.len() as u64);
    let tokens_per_row = mix.load(1).tokens();
    let most = (job.pipeline.micro_batch_tokens as f64 / tokens_per_row) as u64;
    mix.load(rows.min(most).max(1))
}

/// What is asked of the planner.
struct Question<'a> {
    job: &'a JobFile,
    model: &'a Model,
    costs: &'a dyn CostModel,
    load: Load,
}

impl Question<'_> {
    fn devices(&self) -> Vec<StageDevice> {
        let hop_seconds = self.costs.hop_seconds(self.load);
        // All share the machine's memory, which is checked as a whole elsewhere.
        let device =
            StageDevice { kind: 0, memory_bytes: u64::MAX, hop_seconds, cut_hop_seconds: 2.0 * hop_seconds };
        vec![device; self.job.pipeline.devices.len()]
    }

    fn costs(&self, pieces: &[PieceShape], widths: &[usize]) -> Costs {
        widths.iter().map(|width| (*width, self.costs.rank_costs(pieces, *width, self.load))).collect()
    }

    /// The best cut that can be run.
    fn plan(&self) -> Result<Vec<Span>> {
        let pieces = pieces(&self.model.config, false);
        let (devices, costs) = (self.devices(), [self.costs(&pieces, &[1])]);
        let ends = vec![true; pieces.len()];
        let problem = Problem::new(&devices, &ends, &costs);
        let stages = least_bottleneck_on_each(&problem, 0)?.expect("memory is no limit");
        Ok(stages.iter().map(|stage| Span { start: stage.pieces.start, end: stage.pieces.end }).collect())
    }

    /// What each stage takes.
    fn seconds(&self, spans: &[Span]) -> Vec<f64> {
        let pieces = pieces(&self.model.config, false);
        spans.iter().map(|span| self.costs.step_seconds(&pieces, span.range(), self.load)).collect()
    }

    fn slowest(&self, spans: &[Span]) -> f64 {
        self.seconds(spans).into_iter().fold(0.0, f64::max)
    }

    /// What a job should know whose own cut is slower than need be.
    fn compare(&self, given: &[Span], planned: &[Span], source: Source) -> Option<String> {
        let ratio = self.slowest(given) / self.slowest(planned);
        (ratio > BETTER_CUT).then(|| {
            let (planned, words) = (ranges(planned), source.words());
            format!("stages: the given cut takes {ratio:.2} times as long as {planned}, {words}")
        })
    }

    /// The layout with shared FFNs or shared stages, where that is faster.
    fn better_layout(&self, planned: &[Span]) -> Option<String> {
        let pipeline = &self.job.pipeline;
        let column_cuts = pipeline.column_cuts == ColumnCuts::Auto;
        let heads = self.model.config.dims.heads;
        let most = match (&pipeline.tensor_parallel, neighbours(self.job)) {
            (TensorParallel::Auto, Neighbours::Busy) => pipeline.devices.len(),
            _ => 1,
        };
        let may_be = |width: &usize| *width <= most && heads.is_multiple_of(*width);
        let widths: Vec<usize> = TENSOR_PARALLEL_WIDTHS.into_iter().filter(may_be).collect();
        let pieces = pieces(&self.model.config, column_cuts);
        let ends: Vec<bool> = pieces.iter().map(|piece| piece.ends_block).collect();
        let (devices, costs) = (self.devices(), [self.costs(&pieces, &widths)]);
        let problem = Problem::new(&devices, &ends, &costs);
        let stages = least_bottleneck(&problem, 0, devices.len())?;
        let ratio = self.slowest(planned) / problem.bottleneck(&stages);
        (ratio > BETTER_LAYOUT).then(|| {
            let stages: Vec<String> = stages.iter().map(|stage| layout_stage(&pieces, stage)).collect();
            format!("stages: {} would be {ratio:.2} times as fast, and cannot be run yet", stages.join(", "))
        })
    }
}

/// Spans as a job file has them.
pub(crate) fn ranges(spans: &[Span]) -> String {
    let ranges: Vec<String> = spans.iter().map(|span| format!("[{}, {}]", span.start, span.end)).collect();
    format!("[{}]", ranges.join(", "))
}

/// Such as `blocks 40 (from column 5120) to 81 on 2 devices`.
fn layout_stage(pieces: &[PieceShape], stage: &PlannedStage) -> String {
    let place = |piece: usize| match pieces.get(piece) {
        Some(PieceShape { block, columns: Some(columns), .. }) if columns.start > 0 => {
            format!("{block} (column {})", columns.start)
        }
        Some(shape) => shape.block.to_string(),
        None => (pieces[piece - 1].block + 1).to_string(),
    };
    let (start, end) = (place(stage.pieces.start), place(stage.pieces.end));
    match stage.devices.len() {
        1 => format!("blocks {start} to {end}"),
        width => format!("blocks {start} to {end} on {width} devices"),
    }
}
