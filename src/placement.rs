//! Which blocks each stage of a job gets: cut by what was measured on the device, or by an estimate.
//!
//! One stage of whole blocks for each device that the job names, where a device that is named several times has the time for all
//! of its stages. Where another layout would be faster, or a job's own cut is slower than need be, a line says so. A profile that
//! is stale or lacks blocks is measured again, where it decides something; one that is not there is never measured unasked.

use std::sync::Arc;
use std::time::Instant;

use actors::StageTimes;
use anyhow::{Context, Result};
use configs::{ColumnCuts, DeviceCatalog, DeviceKind, JobFile, KvCacheDtype};
use scheduler::{PlannedStage, Span, in_flight, least_bottleneck, least_bottleneck_on_seats};
use stages::cost::{Balance, Basis, Load, Measured, NumberType, NumberTypes, PieceShape, pieces};
use stages::profile::{Effort, MeasureOptions, Missing, Neighbours, Profile, Stored};
use stages::{Model, Part};

use crate::cli::LengthsArg;
use crate::hindsight::{Hindsight, StageWork};
use crate::layout::{self, StageLayout, part_of, ranges};
use crate::plan::answer::{self, ends_block};
use crate::plan::own::OwnDevices;
use crate::plan::setting::{Setting, roofline};
use crate::plan::{Lengths, Work, first_rows};
use crate::{lower, machine, profile, runs, say};

/// Rows of the input whose lengths stand for all: some thousand tokens are enough to tell short prompts from long ones.
const SAMPLED_ROWS: u64 = 256;

/// Tokens of answers where nobody says how long they are, and of prompts where the input cannot be read: a few hundred,
/// so that a row has 512 positions in the middle of its answer.
const TYPICAL_TOKENS: usize = 341;

/// Another layout is worth a line when it is faster by this share.
const BETTER_LAYOUT: f64 = 1.02;

/// A given cut is worth a line when the planned one is faster by this share.
const BETTER_CUT: f64 = 1.03;

/// Memory of each device as a cut has it: all share the machine's, which is checked as a whole elsewhere.
const MEMORY_MIB: f64 = (1_u64 << 40) as f64;

/// A job's stages.
#[derive(Debug, Clone)]
pub(crate) struct Placement {
    pub(crate) stages: Vec<StageLayout>,
    pub(crate) source: Source,
    /// The micro-batch that it was planned for.
    pub(crate) load: Load,
    /// What each stage takes for it.
    pub(crate) seconds: Vec<f64>,
    /// What the user should know.
    pub(crate) lines: Vec<String>,
    /// What it was planned for.
    setting: Setting,
    /// For each stage, the place of its (first) device among the setting's.
    seats: Vec<usize>,
}

/// Where costs come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// Measured, at just these points or between or beyond them.
    Measured(Basis),
    Estimate,
}

impl Source {
    /// Its word in manifests.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Measured(_) => "measured",
            Self::Estimate => "estimate",
        }
    }

    pub(crate) fn words(self) -> &'static str {
        match self {
            Self::Measured(Basis::Measured) => "by measured costs",
            Self::Measured(Basis::Interpolated) => "by measured costs, interpolated",
            Self::Measured(Basis::Extrapolated) => "by measured costs, extrapolated",
            Self::Measured(Basis::Scaled) => "by shares of measured costs",
            Self::Estimate => "by an estimate",
        }
    }

    /// Where the costs of pieces come from for such micro-batches, on one of so many ranks.
    fn of(setting: &Setting, pieces: &[PieceShape], ranks: usize, loads: &[Load]) -> Self {
        match &setting.measured {
            Some(measured) => {
                let basis = loads.iter().map(|load| measured.basis(pieces, ranks, *load)).max();
                Self::Measured(basis.unwrap_or(Basis::Measured))
            }
            None => Self::Estimate,
        }
    }
}

/// What a run is about to do, as far as placing depends on it.
#[derive(Debug, Clone)]
pub(crate) struct Occasion {
    /// Whether there is a row to run: else nothing is worth measuring.
    pub(crate) has_rows: bool,
    /// The command that measures the job's devices.
    pub(crate) profile_command: String,
}

/// Refuses stages that are not the model's, without placing any.
///
/// # Errors
/// Stages or devices that are wrong.
pub(crate) fn check(job: &JobFile, model: &Model) -> Result<()> {
    lower::check(&job.pipeline)?;
    layout::given(&job.pipeline, lower::dtypes(&job.model, &job.pipeline).weights, &model.config).map(drop)
}

/// Places a job's stages.
///
/// # Errors
/// Stages or devices that are wrong, more stages than blocks.
pub(crate) fn place(job: &JobFile, model: &Model, occasion: &Occasion) -> Result<Placement> {
    let pipeline = &job.pipeline;
    let weights = lower::dtypes(&job.model, pipeline).weights;
    let given = layout::given(pipeline, weights, &model.config)?;
    let options = profile::options(&job.model, pipeline, model, Effort::default())?;
    let decides = given.is_none() && pipeline.devices.len() > 1 && occasion.has_rows;
    let profile = stored(job, model, &options, decides);
    let own = OwnDevices::of(pipeline, &machine::detect())?;
    let question = Question::new(job, model, &options, profile.as_ref(), own, occasion)?;
    let widths = layout::widths(pipeline);
    let planned = question.plan(widths, layout::keeps_bits(weights))?;
    let mut lines = vec![];
    let stages = match given {
        Some(given) => {
            let given = layout::stages(given, widths);
            lines.extend(question.compare(&given, &planned));
            given
        }
        None => {
            if pipeline.devices.len() > 1 {
                lines.push(question.announcement(&planned, occasion));
                lines.extend(question.better_layout(&planned));
            }
            planned
        }
    };
    let (seconds, source) = (question.seconds(&stages), question.source(&stages));
    let seats = question.seats(&stages);
    let Question { setting, load, .. } = question;
    Ok(Placement { load, stages, source, seconds, lines, setting, seats })
}

impl Placement {
    /// Holds what the stages have taken against the costs that they were cut by.
    pub(crate) fn judge(&self, times: &[StageTimes]) -> (Hindsight, Source) {
        let parts: Vec<Part> = self.stages.iter().map(|stage| stage.part).collect();
        let (pieces, spans) = layout::pieces_of(&self.setting.config, &parts);
        let work = |((times, pieces), stage): ((&StageTimes, &Span), &StageLayout)| StageWork {
            pieces: *pieces,
            ranks: stage.devices.len(),
            seconds: times.in_steps.as_secs_f64(),
            loads: times.loads.clone(),
        };
        let stages: Vec<StageWork> = times.iter().zip(&spans).zip(&self.stages).map(work).collect();
        let (kinds, each) = (self.setting.kinds(), self.setting.kind_of_each());
        let models: Vec<_> = kinds.iter().map(|spec| self.setting.cost_model(spec)).collect();
        let costs: Vec<_> = self.seats.iter().map(|seat| &*models[each[*seat]]).collect();
        let loads: Vec<Load> = stages.iter().flat_map(|stage| &stage.loads).map(|loads| loads.load).collect();
        let ranks = stages.iter().map(|stage| stage.ranks).max().unwrap_or(1);
        let source = Source::of(&self.setting, &pieces, ranks, &loads);
        (Hindsight::of(&costs, &pieces, &stages, &self.seats), source)
    }
}

/// The profile of the job's devices, measured again where it must be and decides something.
fn stored(job: &JobFile, model: &Model, options: &MeasureOptions, decides: bool) -> Option<Profile> {
    let are_gpus = job.pipeline.devices.iter().any(|device| device.kind == DeviceKind::Cuda);
    if job.pipeline.profile == configs::Profile::Off || are_gpus {
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
            missing if profile.measurable(missing.clone(), options.room_bytes()).is_empty() => {
                say(&format!("profile: {}, and the memory has no room to measure it", lacks(&missing)));
                return None;
            }
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

/// How long rows are: as `[plan]` says, or else as the first of the input are.
fn lengths(job: &JobFile, model: &Model, context_tokens: usize, has_rows: bool) -> Lengths {
    let plan = job.plan.clone().unwrap_or_default();
    let typical = TYPICAL_TOKENS.min(context_tokens / 2).max(1);
    let given =
        |tokens: Option<usize>| tokens.map_or(typical, |tokens| tokens.min(context_tokens).max(1)) as u64;
    let (prompt, output) = (given(plan.prompt_tokens), given(plan.output_tokens));
    let alike = || Lengths::alike(prompt, output, output);
    match (plan.prompt_tokens, plan.output_tokens) {
        (Some(_), Some(_)) => alike(),
        // There is nothing to cut, and a tokenizer takes a second to read.
        _ if job.pipeline.devices.len() == 1 || !has_rows => alike(),
        // What is wrong with an input is said when it is run.
        _ => first_rows(job, &model.config, SAMPLED_ROWS, typical as u64).unwrap_or_else(|_| alike()),
    }
}

/// What is asked of the planner.
struct Question {
    /// The job's own devices, and no more rows in flight than it allows.
    setting: Setting,
    own: OwnDevices,
    /// The model's blocks, whole.
    pieces: Vec<PieceShape>,
    /// Rows of a micro-batch in the middle of the job, and that micro-batch.
    rows: u64,
    load: Load,
}

impl Question {
    fn new(
        job: &JobFile,
        model: &Model,
        options: &MeasureOptions,
        profile: Option<&Profile>,
        own: OwnDevices,
        occasion: &Occasion,
    ) -> Result<Self> {
        let types = number_types(options);
        let mut catalog = own.in_catalog(DeviceCatalog::shipped(), &machine::detect());
        for (_, name) in own.list.runs() {
            catalog = catalog.with_memory(name, MEMORY_MIB);
        }
        let all_reduce = roofline(catalog.get(&own.list.runs()[0].1)?, types.weights).all_reduce;
        let costs = |profile| Measured::new(&model.config, profile, neighbours(job), types, all_reduce).ok();
        let lengths = lengths(job, model, options.context_tokens, occasion.has_rows);
        let mix = lengths.mix(LengthsArg::Fixed).expect("an answer has a token");
        let pipeline = &job.pipeline;
        let setting = Setting {
            config: (*model.config).clone(),
            catalog,
            devices: own.list.clone(),
            types,
            is_kv_type_given: pipeline.kv_cache_dtype != KvCacheDtype::Auto,
            mix,
            lengths: LengthsArg::Fixed,
            tokens_in_flight: Some((pipeline.max_sequences as u64).saturating_mul(mix.kv_tokens_per_row)),
            max_tokens: pipeline.micro_batch_tokens as f64,
            rows: None,
            work: Arc::new(Work { lengths, ..Work::default() }),
            tensor_parallel: pipeline.tensor_parallel.clone(),
            column_cuts: pipeline.column_cuts,
            balance: Balance::Roofline,
            measured: profile.and_then(costs),
            profile_command: None,
        };
        let rows = pipeline.max_sequences as u64 / in_flight(own.seats.len() as u64);
        let rows = rows.min(setting.max_rows()).max(1);
        let (load, pieces) = (setting.load(rows), pieces(&model.config, false));
        Ok(Question { setting, own, pieces, rows, load })
    }

    fn source(&self, stages: &[StageLayout]) -> Source {
        let (pieces, _) = layout::pieces_of(&self.setting.config, &parts(stages));
        let ranks = stages.iter().map(|stage| stage.devices.len()).max().unwrap_or(1);
        Source::of(&self.setting, &pieces, ranks, &[self.load])
    }

    /// The place of each stage's (first) device among the setting's.
    fn seats(&self, stages: &[StageLayout]) -> Vec<usize> {
        stages.iter().map(|stage| self.own.seats[stage.devices.start]).collect()
    }

    fn announcement(&self, planned: &[StageLayout], occasion: &Occasion) -> String {
        let (ranges, source) = (ranges(&parts(planned)), self.source(planned));
        let measure = match source {
            Source::Measured(_) => String::new(),
            Source::Estimate if self.own.has_gpus() => String::new(), // They cannot be measured yet.
            Source::Estimate => format!(" ({} measures)", occasion.profile_command),
        };
        format!("stages: {ranges}, {}{measure}", source.words())
    }

    /// The best cut: stages of the given widths, or one for each device, of whole blocks or where that is faster with FFNs that
    /// are cut. Whoever names a device several times has whole blocks.
    fn plan(&self, widths: Option<&[usize]>, may_cut: bool) -> Result<Vec<StageLayout>> {
        let may_cut = may_cut && runs::COLUMN_CUTS && self.setting.column_cuts == ColumnCuts::Auto;
        let is_once = self.own.seats.iter().enumerate().all(|(entry, seat)| entry == *seat);
        let Some(widths) = widths else {
            let case = self.setting.case(&self.pieces, &[1], Balance::Roofline, self.rows);
            let ends = ends_block(&self.pieces);
            let stages = least_bottleneck_on_seats(&case.problem(&ends), &self.own.seats)?;
            let whole: Vec<Part> = stages.iter().map(|stage| part_of(&self.pieces, &stage.pieces)).collect();
            let whole = layout::stages(whole, None);
            let cut = if may_cut && is_once && whole.len() > 1 {
                self.least_bottleneck(&[1], None, true)
            } else {
                None
            };
            let is_faster = |cut: &Vec<StageLayout>| self.slowest(&whole) > BETTER_LAYOUT * self.slowest(cut);
            return Ok(cut.filter(is_faster).unwrap_or(whole));
        };
        let mut kinds = widths.to_vec();
        kinds.sort_unstable();
        kinds.dedup();
        self.least_bottleneck(&kinds, Some(widths), may_cut).with_context(|| {
            format!("[pipeline] tensor_parallel: found {widths:?}, which no cut of the model fits")
        })
    }

    /// The cut whose slowest stage takes least, of stages of such widths.
    fn least_bottleneck(
        &self,
        kinds: &[usize],
        widths: Option<&[usize]>,
        may_cut: bool,
    ) -> Option<Vec<StageLayout>> {
        let pieces = pieces(&self.setting.config, may_cut);
        let case = self.setting.case(&pieces, kinds, Balance::Roofline, self.rows);
        let ends = ends_block(&pieces);
        let problem = case.problem(&ends).with_widths(widths);
        let stages = least_bottleneck(&problem, 0, problem.devices.len())?;
        let stage = |stage: &PlannedStage| StageLayout {
            part: part_of(&pieces, &stage.pieces),
            devices: stage.devices.clone(),
        };
        Some(stages.iter().map(stage).collect())
    }

    /// What each stage takes.
    fn seconds(&self, stages: &[StageLayout]) -> Vec<f64> {
        let (kinds, each) = (self.setting.kinds(), self.setting.kind_of_each());
        let (pieces, spans) = layout::pieces_of(&self.setting.config, &parts(stages));
        let stage = |(stage, span): (&StageLayout, &Span)| {
            let costs = self.setting.cost_model(kinds[each[self.own.seats[stage.devices.start]]]);
            costs.step_seconds(&pieces, span.range(), stage.devices.len(), self.load)
        };
        stages.iter().zip(&spans).map(stage).collect()
    }

    /// What the slowest device takes for all of its stages.
    fn slowest(&self, stages: &[StageLayout]) -> f64 {
        let mut devices = vec![0.0; self.own.names.len()];
        for (stage, seconds) in stages.iter().zip(self.seconds(stages)) {
            for seat in &self.own.seats[stage.devices.clone()] {
                devices[*seat] += seconds;
            }
        }
        devices.into_iter().fold(0.0, f64::max)
    }

    /// What a job should know whose own cut is slower than need be.
    fn compare(&self, given: &[StageLayout], planned: &[StageLayout]) -> Option<String> {
        let ratio = self.slowest(given) / self.slowest(planned);
        (ratio > BETTER_CUT).then(|| {
            let (planned, words) = (ranges(&parts(planned)), self.source(planned).words());
            format!("stages: the given cut takes {ratio:.2} times as long as {planned}, {words}")
        })
    }

    /// The fastest of all layouts that a plan knows, where that is faster than the planned stages: with as many rows in flight,
    /// shared stages and FFNs, several pipelines, stages in another order.
    fn better_layout(&self, planned: &[StageLayout]) -> Option<String> {
        let pieces = self.setting.pieces();
        let (replicas, layout) = answer::plan(&self.setting, &pieces)?;
        let case = self.setting.case(&self.pieces, &[1], Balance::Roofline, self.rows);
        let ratio = layout.tokens_per_second / case.rows_per_second(self.slowest(planned));
        if ratio <= BETTER_LAYOUT {
            return None;
        }
        let found = layout.stages.iter().map(|stage| (part_of(&pieces, &stage.pieces), stage.devices.len()));
        let is_planned = found.eq(planned.iter().map(|stage| (stage.part, stage.devices.len())));
        if replicas == 1 && is_planned {
            return None;
        }
        if runs::executes(replicas, &layout.stages, &ends_block(&pieces)) {
            let to_paste = self.to_paste(&pieces, &layout.stages);
            return Some(format!("stages: {to_paste} would be {ratio:.2} times as fast"));
        }
        let stages: Vec<String> = layout.stages.iter().map(|stage| layout_stage(&pieces, stage)).collect();
        let times =
            if replicas > 1 { format!(", {replicas} times on devices of their own,") } else { String::new() };
        let stages = stages.join(", ");
        Some(format!("stages: {stages}{times} would be {ratio:.2} times as fast, and cannot be run yet"))
    }

    /// Devices, widths where they are not all 1, and stages, as a job file has them.
    fn to_paste(&self, pieces: &[PieceShape], stages: &[PlannedStage]) -> String {
        let devices: Vec<&String> =
            stages.iter().flat_map(|stage| &self.own.names[stage.devices.clone()]).collect();
        let widths: Vec<usize> = stages.iter().map(|stage| stage.devices.len()).collect();
        let parts: Vec<Part> = stages.iter().map(|stage| part_of(pieces, &stage.pieces)).collect();
        let widths = match widths.iter().all(|width| *width == 1) {
            true => String::new(),
            false => format!(", tensor_parallel = {widths:?}"),
        };
        format!("devices = {devices:?}{widths} and stages = {}", ranges(&parts))
    }
}

fn parts(stages: &[StageLayout]) -> Vec<Part> {
    stages.iter().map(|stage| stage.part).collect()
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
