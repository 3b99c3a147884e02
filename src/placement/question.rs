//! What is asked of the planner about a job's own devices, and what is said of its answers.
//!
//! Answers are layouts that run as they are: each device that the job names has a stage, or shares one.

use std::sync::Arc;

use anyhow::{Context, Result};
use configs::{ColumnCuts, DeviceCatalog, JobFile, KvCacheDtype, TensorParallel};
use scheduler::{PlannedStage, Span, in_flight, least_bottleneck, least_bottleneck_on_seats};
use stages::cost::{Balance, Load, Measured, NumberType, NumberTypes, PieceShape, pieces};
use stages::profile::{MeasureOptions, Profile};
use stages::{Model, Part, Sharing};

use super::{Kept, Source, neighbours};
use crate::cli::LengthsArg;
use crate::layout::{self, StageLayout, part_of, ranges};
use crate::plan::answer::{self, ends_block};
use crate::plan::own::OwnDevices;
use crate::plan::setting::{Setting, roofline};
use crate::plan::{Lengths, Work, first_rows};
use crate::{lower, machine, runs};

/// Rows of the input whose lengths stand for all: some thousand tokens are enough to tell short prompts from long ones.
const SAMPLED_ROWS: u64 = 256;

/// Tokens of answers where nobody says how long they are, and of prompts where the input cannot be read: a few hundred,
/// so that a row has 512 positions in the middle of its answer.
const TYPICAL_TOKENS: usize = 341;

/// Another layout is taken, or worth a line, when it is faster by this share.
const BETTER_LAYOUT: f64 = 1.02;

/// A given cut is worth a line when the planned one is faster by this share.
const BETTER_CUT: f64 = 1.03;

/// Memory of each device as a cut has it: all share the machine's, which is checked as a whole elsewhere.
const MEMORY_MIB: f64 = (1_u64 << 40) as f64;

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
pub(super) struct Question {
    /// The job's own devices, and no more rows in flight than it allows.
    pub(super) setting: Setting,
    /// The same of the first replica alone.
    first: Setting,
    own: OwnDevices,
    replicas: usize,
    /// The model's blocks, whole.
    pieces: Vec<PieceShape>,
    /// Most rows in flight in a replica.
    max_sequences: u64,
}

impl Question {
    /// # Errors
    /// Devices that the machine lacks.
    pub(super) fn new(
        job: &JobFile,
        model: &Model,
        options: &MeasureOptions,
        profile: Option<&Profile>,
        has_rows: bool,
    ) -> Result<Self> {
        let own = OwnDevices::of(&job.pipeline, &machine::detect())?;
        let types = number_types(options);
        let mut catalog = own.in_catalog(DeviceCatalog::shipped(), &machine::detect());
        for (_, name) in own.list.runs() {
            catalog = catalog.with_memory(name, MEMORY_MIB);
        }
        let all_reduce = roofline(catalog.get(&own.list.runs()[0].1)?, types.weights).all_reduce;
        let costs = |profile| Measured::new(&model.config, profile, neighbours(job), types, all_reduce).ok();
        let lengths = lengths(job, model, options.context_tokens, has_rows);
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
            replicas: if own.list.group(pipeline.replicas).is_some() { pipeline.replicas } else { 1 },
            tensor_parallel: pipeline.tensor_parallel.clone(),
            column_cuts: match layout::sum_cut(options.dtypes.weights, pipeline).is_some()
                && runs::COLUMN_CUTS
            {
                true => pipeline.column_cuts,
                false => ColumnCuts::Off,
            },
            balance: Balance::Roofline,
            measured: profile.and_then(costs),
            profile_command: None,
        };
        let (pieces, replicas) = (pieces(&model.config, None), pipeline.replicas);
        let max_sequences = lower::sequences_per_replica(pipeline) as u64;
        let first = Setting {
            devices: own.first_of(replicas),
            tokens_in_flight: Some(max_sequences.saturating_mul(mix.kv_tokens_per_row)),
            ..setting.clone()
        };
        Ok(Question { setting, first, own, replicas, pieces, max_sequences })
    }

    /// Rows of a micro-batch in the middle of the job, on so many stages.
    fn rows(&self, num_stages: usize) -> u64 {
        (self.max_sequences / in_flight(num_stages as u64)).min(self.setting.max_rows()).max(1)
    }

    /// That micro-batch.
    pub(super) fn load(&self, num_stages: usize) -> Load {
        self.setting.load(self.rows(num_stages))
    }

    pub(super) fn source(&self, stages: &[StageLayout]) -> Source {
        let (pieces, _) = layout::pieces_of(&self.setting.config, &parts(stages));
        let ranks = stages.iter().map(|stage| stage.devices.len()).max().unwrap_or(1);
        Source::of(&self.setting, &pieces, ranks, &[self.load(stages.len())])
    }

    /// The place of each device of a replica among the setting's.
    fn seats_of(&self, replica: usize) -> &[usize] {
        let num_devices = self.own.seats.len() / self.replicas;
        &self.own.seats[replica * num_devices..][..num_devices]
    }

    /// The place of each stage's (first) device among the setting's, in a replica.
    pub(super) fn seats(&self, stages: &[StageLayout], replica: usize) -> Vec<usize> {
        let seats = self.seats_of(replica);
        stages.iter().map(|stage| seats[stage.devices.start]).collect()
    }

    pub(super) fn announcement(&self, planned: &[StageLayout], profile_command: &str) -> String {
        let (stages, source) = (described(planned), self.source(planned));
        let measure = match source {
            Source::Measured(_) => String::new(),
            Source::Estimate if self.own.has_gpus() => String::new(), // Their blocks cannot be measured yet.
            Source::Estimate => format!(" ({profile_command} measures)"),
        };
        format!("stages: {stages}, {}{measure}", source.words())
    }

    pub(super) fn going_on(&self, stages: &[StageLayout]) -> String {
        format!("stages: {}, as in the job's first run", described(stages))
    }

    /// The best layout: of stages of the given widths, or else with one stage for each device, or where that is faster and nothing
    /// speaks against it with stages that devices share.
    pub(super) fn plan(&self, widths: Option<&[usize]>, kept: &Kept) -> Result<Vec<StageLayout>> {
        if let Some(widths) = widths {
            let mut kinds = widths.to_vec();
            kinds.sort_unstable();
            kinds.dedup();
            return self.least_bottleneck(&kinds, Some(widths), self.may_cut(), widths.len()).with_context(
                || format!("[pipeline] tensor_parallel: found {widths:?}, which no cut of the model fits"),
            );
        }
        let one_each = self.one_each()?;
        let may_share = *kept == Kept::Nothing && self.setting.tensor_parallel == TensorParallel::Auto;
        let shared = if may_share { self.shared() } else { None };
        let is_faster =
            |shared: &Vec<StageLayout>| self.speed(shared) > BETTER_LAYOUT * self.speed(&one_each);
        Ok(shared.filter(is_faster).unwrap_or(one_each))
    }

    fn may_cut(&self) -> bool {
        self.setting.column_cut().is_some()
    }

    /// Whether each device is named once, by one replica.
    fn is_once(&self) -> bool {
        self.own.seats.iter().enumerate().all(|(entry, seat)| entry == *seat)
    }

    /// The best cut with one stage for each device, of whole blocks or where that is faster with FFNs that are cut. Whoever
    /// names a device several times has whole blocks.
    fn one_each(&self) -> Result<Vec<StageLayout>> {
        let seats = self.seats_of(0);
        let num_stages = seats.len();
        let case = self.setting.case(&self.pieces, &[1], Balance::Roofline, self.rows(num_stages));
        let ends = ends_block(&self.pieces);
        let stages = least_bottleneck_on_seats(&case.problem(&ends), seats)?;
        let whole: Vec<Part> = stages.iter().map(|stage| part_of(&self.pieces, &stage.pieces)).collect();
        let whole = layout::stages(whole, None);
        let may_cut = self.may_cut() && self.is_once() && num_stages > 1;
        let cut = if may_cut { self.least_bottleneck(&[1], None, true, num_stages) } else { None };
        let is_faster = |cut: &Vec<StageLayout>| self.slowest(&whole) > BETTER_LAYOUT * self.slowest(cut);
        Ok(cut.filter(is_faster).unwrap_or(whole))
    }

    /// The fastest layout of a replica on devices that are named once, where that has stages which several share and gives
    /// every device something to do. GPUs cannot share a stage yet.
    fn shared(&self) -> Option<Vec<StageLayout>> {
        let num_devices = self.seats_of(0).len();
        if !runs::TENSOR_PARALLEL || !self.is_once() || self.own.has_gpus() || num_devices == 1 {
            return None;
        }
        let pieces = self.first.pieces();
        let stages = planned(&pieces, &answer::passed_once(&self.first, &pieces)?.stages);
        let is_shared = stages.iter().any(|stage| stage.devices.len() > 1);
        let used: usize = stages.iter().map(|stage| stage.devices.len()).sum();
        (is_shared && used == num_devices).then_some(stages)
    }

    /// The cut whose slowest stage takes least, of stages of such widths.
    fn least_bottleneck(
        &self,
        kinds: &[usize],
        widths: Option<&[usize]>,
        may_cut: bool,
        num_stages: usize,
    ) -> Option<Vec<StageLayout>> {
        let pieces = pieces(&self.setting.config, self.setting.column_cut().filter(|_| may_cut));
        let case = self.first.case(&pieces, kinds, Balance::Roofline, self.rows(num_stages));
        let ends = ends_block(&pieces);
        let problem = case.problem(&ends).with_widths(widths);
        Some(planned(&pieces, &least_bottleneck(&problem, 0, problem.devices.len())?))
    }

    /// What each stage takes, with attention shared as it says.
    pub(super) fn seconds(&self, stages: &[StageLayout]) -> Vec<f64> {
        let (kinds, each) = (self.setting.kinds(), self.setting.kind_of_each());
        let (pieces, spans) = layout::pieces_of(&self.setting.config, &parts(stages));
        let load = self.load(stages.len());
        let stage = |(stage, span): (&StageLayout, &Span)| {
            let costs = self.setting.cost_model(kinds[each[self.own.seats[stage.devices.start]]]);
            costs.step_seconds(&pieces, span.range(), stage.devices.len(), &stage.sharing, load)
        };
        stages.iter().zip(&spans).map(stage).collect()
    }

    /// How the ranks of one of so many stages share attention.
    pub(super) fn sharing(&self, stage: &StageLayout, num_stages: usize) -> Sharing {
        let (kinds, each) = (self.setting.kinds(), self.setting.kind_of_each());
        let (pieces, _) = layout::pieces_of(&self.setting.config, &[stage.part]);
        let costs = self.setting.cost_model(kinds[each[self.own.seats[stage.devices.start]]]);
        costs.sharing(&pieces, stage.devices.len(), self.load(num_stages))
    }

    /// What the slowest device takes for all of its stages, those of all replicas, with attention shared as is fastest.
    fn slowest(&self, stages: &[StageLayout]) -> f64 {
        let mut devices = vec![0.0; self.own.names.len()];
        let mut planned = stages.to_vec();
        for stage in planned.iter_mut().filter(|stage| stage.devices.len() > 1) {
            stage.sharing = self.sharing(stage, stages.len());
        }
        let seconds = self.seconds(&planned);
        for seats in (0..self.replicas).map(|replica| self.seats_of(replica)) {
            for (stage, seconds) in stages.iter().zip(&seconds) {
                for seat in &seats[stage.devices.clone()] {
                    devices[*seat] += seconds;
                }
            }
        }
        devices.into_iter().fold(0.0, f64::max)
    }

    /// Rows that decode in a second, in all replicas.
    fn speed(&self, stages: &[StageLayout]) -> f64 {
        self.replicas as f64 * self.setting.decode_rows(self.rows(stages.len())) / self.slowest(stages)
    }

    /// What a job should know whose own cut is slower than need be.
    pub(super) fn compare(&self, given: &[StageLayout], planned: &[StageLayout]) -> Option<String> {
        let ratio = self.speed(planned) / self.speed(given);
        (ratio > BETTER_CUT).then(|| {
            let (planned, words) = (ranges(&parts(planned)), self.source(planned).words());
            format!("stages: the given cut takes {ratio:.2} times as long as {planned}, {words}")
        })
    }

    /// The fastest of all layouts that a plan knows, where that is faster than the planned stages: with as many rows in flight,
    /// shared stages and FFNs, several pipelines, stages in another order.
    pub(super) fn better_layout(&self, planned: &[StageLayout]) -> Option<String> {
        let pieces = self.setting.pieces();
        let (replicas, layout) = answer::plan(&self.setting, &pieces)?;
        let ratio = layout.tokens_per_second / self.speed(planned);
        if ratio <= BETTER_LAYOUT {
            return None;
        }
        let found = layout.stages.iter().map(|stage| (part_of(&pieces, &stage.pieces), stage.devices.len()));
        let is_planned = found.eq(planned.iter().map(|stage| (stage.part, stage.devices.len())));
        if replicas == self.replicas && is_planned {
            return None;
        }
        if runs::executes(&layout.stages, &ends_block(&pieces)) {
            let to_paste = self.to_paste(replicas, &pieces, &layout.stages);
            return Some(format!("stages: {to_paste} would be {ratio:.2} times as fast"));
        }
        let stages: Vec<String> = layout.stages.iter().map(|stage| layout_stage(&pieces, stage)).collect();
        let stages = stages.join(", ");
        Some(format!("stages: {stages} would be {ratio:.2} times as fast, and cannot be run yet"))
    }

    /// Replicas where they change, devices, widths where they are not all 1, and stages, as a job file has them.
    fn to_paste<'a>(&'a self, replicas: usize, pieces: &[PieceShape], stages: &[PlannedStage]) -> String {
        let groups = self.own.names.chunks(self.own.names.len() / replicas);
        let of_group = |names: &'a [String]| stages.iter().flat_map(|stage| &names[stage.devices.clone()]);
        let devices: Vec<&String> = groups.flat_map(of_group).collect();
        let replicas = match replicas == self.replicas {
            true => String::new(),
            false => format!("replicas = {replicas}, "),
        };
        let widths: Vec<usize> = stages.iter().map(|stage| stage.devices.len()).collect();
        let parts: Vec<Part> = stages.iter().map(|stage| part_of(pieces, &stage.pieces)).collect();
        let widths = match widths.iter().all(|width| *width == 1) {
            true => String::new(),
            false => format!(", tensor_parallel = {widths:?}"),
        };
        format!("{replicas}devices = {devices:?}{widths} and stages = {}", ranges(&parts))
    }
}

/// Planned stages as they run.
fn planned(pieces: &[PieceShape], stages: &[PlannedStage]) -> Vec<StageLayout> {
    let stage = |stage: &PlannedStage| StageLayout {
        part: part_of(pieces, &stage.pieces),
        devices: stage.devices.clone(),
        sharing: Sharing::default(),
    };
    stages.iter().map(stage).collect()
}

/// Stages, and their widths where they are not all 1, as a job file has them.
fn described(stages: &[StageLayout]) -> String {
    let widths: Vec<usize> = stages.iter().map(|stage| stage.devices.len()).collect();
    match widths.iter().all(|width| *width == 1) {
        true => ranges(&parts(stages)),
        false => format!("{} with tensor_parallel = {widths:?}", ranges(&parts(stages))),
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
