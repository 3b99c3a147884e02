//! Which blocks each stage of a job gets: cut by what was measured on the device, or by an estimate.
//!
//! One stage of whole blocks for each device that the job names, where a device that is named several times has the time for all
//! of its stages. Where another layout would be faster, or a job's own cut is slower than need be, a line says so. A profile that
//! is stale or lacks blocks is measured again, where it decides something; one that is not there is never measured unasked.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use configs::{DeviceCatalog, JobFile, KvCacheDtype};
use scheduler::{PlannedStage, Span, in_flight, least_bottleneck_on_seats};
use stages::Model;
use stages::cost::{Balance, Basis, Load, Measured, NumberType, NumberTypes, PieceShape, pieces};
use stages::profile::{Effort, MeasureOptions, Missing, Neighbours, Profile, Stored};

use crate::hindsight::{Hindsight, StageWork};
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
    pub(crate) spans: Vec<Span>,
    pub(crate) source: Source,
    /// The micro-batch that it was planned for.
    pub(crate) load: Load,
    /// What each stage takes for it.
    pub(crate) seconds: Vec<f64>,
    /// What the user should know.
    pub(crate) lines: Vec<String>,
    /// What it was planned for.
    setting: Setting,
    /// For each stage, the place of its device among the setting's.
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

    /// Where the costs of whole blocks come from for such micro-batches.
    fn of(setting: &Setting, pieces: &[PieceShape], loads: &[Load]) -> Self {
        match &setting.measured {
            Some(measured) => {
                let basis = loads.iter().map(|load| measured.basis(pieces, 1, *load)).max();
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
    lower::given_spans(&job.pipeline.stages, &model.config).map(drop)
}

/// Places a job's stages.
///
/// # Errors
/// Stages or devices that are wrong, more stages than blocks.
pub(crate) fn place(job: &JobFile, model: &Model, occasion: &Occasion) -> Result<Placement> {
    let pipeline = &job.pipeline;
    let given = lower::given_spans(&pipeline.stages, &model.config)?;
    let options = profile::options(&job.model, pipeline, model, Effort::default())?;
    let decides = given.is_none() && pipeline.devices.len() > 1 && occasion.has_rows;
    let profile = stored(job, model, &options, decides);
    let own = OwnDevices::of(pipeline, &machine::detect())?;
    let question = Question::new(job, model, &options, profile.as_ref(), own, occasion)?;
    let planned = question.plan()?;
    let mut lines = vec![];
    let spans = match given {
        Some(given) => {
            lines.extend(question.compare(&given, &planned));
            given
        }
        None => {
            if planned.len() > 1 {
                lines.push(question.announcement(&planned, occasion));
                lines.extend(question.better_layout(&planned));
            }
            planned
        }
    };
    let (seconds, source) = (question.seconds(&spans), question.source());
    let Question { setting, own, load, .. } = question;
    Ok(Placement { load, spans, source, seconds, lines, setting, seats: own.seats })
}

impl Placement {
    /// Holds what the stages have taken against the costs that they were cut by.
    pub(crate) fn judge(&self, stages: &[StageWork]) -> (Hindsight, Source) {
        let pieces = pieces(&self.setting.config, false);
        let (kinds, each) = (self.setting.kinds(), self.setting.kind_of_each());
        let models: Vec<_> = kinds.iter().map(|spec| self.setting.cost_model(spec)).collect();
        let costs: Vec<_> = self.seats.iter().map(|seat| &*models[each[*seat]]).collect();
        let loads: Vec<Load> = stages.iter().flat_map(|stage| &stage.loads).map(|loads| loads.load).collect();
        let source = Source::of(&self.setting, &pieces, &loads);
        (Hindsight::of(&costs, &pieces, stages, &self.seats), source)
    }
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

/// How long rows are: as `[plan]` says, or else as the first of the input are.
fn lengths(job: &JobFile, model: &Model, context_tokens: usize, has_rows: bool) -> Lengths {
    let plan = job.plan.clone().unwrap_or_default();
    let typical = TYPICAL_TOKENS.min(context_tokens / 2).max(1);
    let given =
        |tokens: Option<usize>| tokens.map_or(typical, |tokens| tokens.min(context_tokens).max(1)) as u64;
    let alike = || Lengths::alike(given(plan.prompt_tokens), given(plan.output_tokens));
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
        let all_reduce = roofline(catalog.get(configs::CPU_CORE)?, types.weights).all_reduce;
        let costs = |profile| Measured::new(&model.config, profile, neighbours(job), types, all_reduce).ok();
        let lengths = lengths(job, model, options.context_tokens, occasion.has_rows);
        let mix = lengths.mix().expect("an answer has a token");
        let pipeline = &job.pipeline;
        let setting = Setting {
            config: (*model.config).clone(),
            catalog,
            devices: own.list.clone(),
            types,
            is_kv_type_given: pipeline.kv_cache_dtype != KvCacheDtype::Auto,
            mix,
            tokens_in_flight: Some((pipeline.max_sequences as u64).saturating_mul(mix.kv_tokens_per_row)),
            max_tokens: pipeline.micro_batch_tokens as f64,
            rows: None,
            work: Arc::new(Work { lengths, ..Work::default() }),
            tensor_parallel: pipeline.tensor_parallel.clone(),
            column_cuts: pipeline.column_cuts,
            balance: Balance::Roofline,
            measured: profile.and_then(costs),
        };
        let rows = pipeline.max_sequences as u64 / in_flight(own.seats.len() as u64);
        let rows = rows.min(setting.max_rows()).max(1);
        let (load, pieces) = (setting.load(rows), pieces(&model.config, false));
        Ok(Question { setting, own, pieces, rows, load })
    }

    fn source(&self) -> Source {
        Source::of(&self.setting, &self.pieces, &[self.load])
    }

    fn announcement(&self, planned: &[Span], occasion: &Occasion) -> String {
        let (ranges, source) = (ranges(planned), self.source());
        let measure = match source {
            Source::Measured(_) => String::new(),
            Source::Estimate => format!(" ({} measures)", occasion.profile_command),
        };
        format!("stages: {ranges}, {}{measure}", source.words())
    }

    /// The best cut that can be run.
    fn plan(&self) -> Result<Vec<Span>> {
        let case = self.setting.case(&self.pieces, &[1], Balance::Roofline, self.rows);
        let ends = ends_block(&self.pieces);
        let stages = least_bottleneck_on_seats(&case.problem(&ends), &self.own.seats)?;
        Ok(stages.iter().map(|stage| Span { start: stage.pieces.start, end: stage.pieces.end }).collect())
    }

    /// What each stage takes.
    fn seconds(&self, spans: &[Span]) -> Vec<f64> {
        let (kinds, each) = (self.setting.kinds(), self.setting.kind_of_each());
        let stage = |(span, seat): (&Span, &usize)| {
            let costs = self.setting.cost_model(kinds[each[*seat]]);
            costs.step_seconds(&self.pieces, span.range(), self.load)
        };
        spans.iter().zip(&self.own.seats).map(stage).collect()
    }

    /// What the slowest device takes for all of its stages.
    fn slowest(&self, spans: &[Span]) -> f64 {
        let mut devices = vec![0.0; self.own.names.len()];
        for (seat, seconds) in self.own.seats.iter().zip(self.seconds(spans)) {
            devices[*seat] += seconds;
        }
        devices.into_iter().fold(0.0, f64::max)
    }

    /// What a job should know whose own cut is slower than need be.
    fn compare(&self, given: &[Span], planned: &[Span]) -> Option<String> {
        let ratio = self.slowest(given) / self.slowest(planned);
        (ratio > BETTER_CUT).then(|| {
            let (planned, words) = (ranges(planned), self.source().words());
            format!("stages: the given cut takes {ratio:.2} times as long as {planned}, {words}")
        })
    }

    /// The fastest of all layouts that a plan knows, where that is faster than the planned stages: with as many rows in flight,
    /// shared stages and FFNs, several pipelines, stages in another order.
    fn better_layout(&self, planned: &[Span]) -> Option<String> {
        let pieces = self.setting.pieces();
        let (replicas, layout) = answer::plan(&self.setting, &pieces)?;
        let case = self.setting.case(&self.pieces, &[1], Balance::Roofline, self.rows);
        let on_seat =
            |(span, seat): (&Span, &usize)| PlannedStage { pieces: span.range(), devices: *seat..seat + 1 };
        let own: Vec<PlannedStage> = planned.iter().zip(&self.own.seats).map(on_seat).collect();
        let ends = ends_block(&self.pieces);
        let ratio = layout.tokens_per_second / case.rows_per_second(case.problem(&ends).bottleneck(&own));
        if ratio <= BETTER_LAYOUT {
            return None;
        }
        if runs::executes(replicas, &layout.stages, &ends_block(&pieces)) {
            let (devices, stages) = self.to_paste(&pieces, &layout.stages);
            return Some(format!(
                "stages: devices = {devices} and stages = {stages} would be {ratio:.2} times as fast"
            ));
        }
        let stages: Vec<String> = layout.stages.iter().map(|stage| layout_stage(&pieces, stage)).collect();
        let times =
            if replicas > 1 { format!(", {replicas} times on devices of their own,") } else { String::new() };
        let stages = stages.join(", ");
        Some(format!("stages: {stages}{times} would be {ratio:.2} times as fast, and cannot be run yet"))
    }

    /// Devices and stages of whole blocks, as a job file has them.
    fn to_paste(&self, pieces: &[PieceShape], stages: &[PlannedStage]) -> (String, String) {
        let devices: Vec<&String> = stages.iter().map(|stage| &self.own.names[stage.devices.start]).collect();
        let block = |piece: usize| pieces.get(piece).map_or(self.pieces.len(), |piece| piece.block);
        let span =
            |stage: &PlannedStage| Span { start: block(stage.pieces.start), end: block(stage.pieces.end) };
        (format!("{devices:?}"), ranges(&stages.iter().map(span).collect::<Vec<_>>()))
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
