//! What is asked of the planner about a job's own devices, and what is said of its answers.
//!
//! Answers are layouts that run as they are: each device that the job names has a stage, or shares one. Each GPU has room for its
//! own stages; where that leaves less for keys and values than the job's sequences would keep, the answer is the layout that
//! is fastest with as many as there is room for.

use std::sync::Arc;

use anyhow::{Context, Result};
use configs::{ColumnCuts, DeviceCatalog, JobFile, KvCacheDtype, KvCacheTokens, TensorParallel};
use jobs::StageShape;
use scheduler::{PlannedStage, Span, in_flight, least_bottleneck, least_bottleneck_within};
use stages::cost::{Balance, Load, Measured, NumberType, NumberTypes, PieceShape, pieces};
use stages::profile::{MeasureOptions, Profile};
use stages::{Model, PAGE_TOKENS, Part, Sharing};

use super::{Kept, Source, neighbours};
use crate::cli::LengthsArg;
use crate::first_run::share_blocks;
use crate::kv_pages::{KvPages, KvRoom};
use crate::layout::{self, StageLayout, part_of, ranges};
use crate::plan::answer::{self, ends_block};
use crate::plan::own::OwnDevices;
use crate::plan::setting::{Setting, roofline};
use crate::plan::{Lengths, Work, first_rows};
use crate::{gpu_memory, lower, machine, runs};

/// Rows of the input whose lengths stand for all: some thousand tokens are enough to tell short prompts from long ones.
const SAMPLED_ROWS: u64 = 256;

/// Tokens of answers where nobody says how long they are, and of prompts where the input cannot be read: a few hundred,
/// so that a row has 512 positions in the middle of its answer.
const TYPICAL_TOKENS: usize = 341;

/// Another layout is taken, or worth a line, when it is faster by this share.
const BETTER_LAYOUT: f64 = 1.02;

/// A given cut is worth a line when the planned one is faster by this share.
const BETTER_CUT: f64 = 1.03;

/// Memory of each device as a cut has it: CPU devices share the machine's, which is checked as a whole elsewhere, and of GPUs more
/// is known than a catalog says.
const MEMORY_MIB: f64 = (1_u64 << 40) as f64;

/// Layouts are sought with room for so many percent of the tokens that the one before had room for.
const NEXT_PERCENT: u64 = 70;

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
    /// Most tokens of one, for which there is always room.
    context_tokens: u64,
    /// As many tokens as a replica is to have room for, where the job says.
    kv_tokens: Option<u64>,
    pub(super) pages: KvPages,
}

/// What a layout is sought for.
#[derive(Clone, Copy)]
struct Wish<'a> {
    /// In flight in a replica.
    sequences: u64,
    /// Tokens that each stage must have room for.
    kv_tokens: u64,
    /// What weights, keys and values may have of each device; where nothing is said, all that they want.
    rooms: Option<&'a [u64]>,
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
        pages: KvPages,
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
            rooms: None,
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
            split_blocks: pipeline.split_blocks,
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
        let context_tokens = options.context_tokens as u64;
        let kv_tokens = match pipeline.kv_cache_tokens {
            KvCacheTokens::Tokens(tokens) => Some(tokens as u64),
            KvCacheTokens::Auto => None,
        };
        Ok(Question {
            setting,
            first,
            own,
            replicas,
            pieces,
            max_sequences,
            context_tokens,
            kv_tokens,
            pages,
        })
    }

    /// Rows of a micro-batch in the middle of the job, of so many sequences on so many stages.
    fn rows(&self, sequences: u64, num_stages: usize) -> u64 {
        (sequences / in_flight(num_stages as u64)).min(self.setting.max_rows()).max(1)
    }

    /// Sequences in flight in a replica: as many as the job allows, and as its GPUs have room for.
    fn sequences(&self, stages: &[StageLayout]) -> u64 {
        let pages = self.pages.gpus().and_then(|gpus| gpus.num_pages(stages).ok());
        let room = pages.map_or(u64::MAX, |pages| self.sequences_of((pages * PAGE_TOKENS) as u64));
        self.max_sequences.min(room)
    }

    /// Sequences that keep so many tokens.
    fn sequences_of(&self, kv_tokens: u64) -> u64 {
        (kv_tokens / self.setting.mix.kv_tokens_per_row.max(1)).max(1)
    }

    /// A micro-batch in the middle of the job.
    pub(super) fn load(&self, stages: &[StageLayout]) -> Load {
        self.setting.load(self.rows(self.sequences(stages), stages.len()))
    }

    pub(super) fn source(&self, stages: &[StageLayout]) -> Source {
        Source::of(&self.setting, stages, &[self.load(stages)])
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
        let (stages, source) = (described(planned), self.source(&self.with_sharing(planned)));
        let measure = match source {
            Source::Measured(_) => String::new(),
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
        let endless = Wish { sequences: self.max_sequences, kv_tokens: 0, rooms: None };
        let endless = self.plan_for(widths, kept, endless)?.with_context(|| {
            format!("[pipeline] tensor_parallel: found {widths:?}, which no cut of the model fits")
        })?;
        match self.pages.gpus() {
            // Where nothing fits, its numbers are told when it is refused.
            Some(gpus) => Ok(self.within_memory(gpus, widths, kept, &endless).unwrap_or(endless)),
            None => Ok(endless),
        }
    }

    /// The fastest of the layouts that leave room for all tokens that are wanted, for fewer and fewer, and of the one that minds
    /// no memory; none where none of them fits.
    fn within_memory(
        &self,
        gpus: &gpu_memory::Question,
        widths: Option<&[usize]>,
        kept: &Kept,
        endless: &[StageLayout],
    ) -> Option<Vec<StageLayout>> {
        let fits = |stages: &Vec<StageLayout>| self.pages.fit(stages);
        let mut best = Some(endless.to_vec()).filter(fits);
        if best.as_ref().is_some_and(|stages| self.sequences(stages) == self.max_sequences) {
            return best;
        }
        // What a step works in depends on the stage: it may have none of it.
        let rooms = [gpus.rooms(), gpus.usable()];
        for kv_tokens in self.wanted_tokens() {
            let sequences = self.sequences_of(kv_tokens).min(self.max_sequences);
            for rooms in &rooms {
                let wish = Wish { sequences, kv_tokens, rooms: Some(rooms) };
                let stages = self.plan_for(widths, kept, wish).ok().flatten().filter(fits);
                let is_faster = |stages: &Vec<StageLayout>| {
                    best.as_ref().is_none_or(|best| self.speed(stages) > self.speed(best))
                };
                best = stages.filter(is_faster).or(best);
            }
        }
        best
    }

    /// From what all sequences keep down to what the longest one takes, or what the job says.
    fn wanted_tokens(&self) -> Vec<u64> {
        if let Some(tokens) = self.kv_tokens {
            return vec![tokens];
        }
        let least = self.context_tokens.next_multiple_of(PAGE_TOKENS as u64);
        let all = self.max_sequences.saturating_mul(self.setting.mix.kv_tokens_per_row);
        let next = |tokens: &u64| (*tokens > least).then(|| least.max(tokens / 100 * NEXT_PERCENT));
        std::iter::successors(Some(all.max(least)), next).collect()
    }

    /// The best layout for what is wished, where one fits.
    fn plan_for(
        &self,
        widths: Option<&[usize]>,
        kept: &Kept,
        wish: Wish<'_>,
    ) -> Result<Option<Vec<StageLayout>>> {
        if let Some(widths) = widths {
            let mut kinds = widths.to_vec();
            kinds.sort_unstable();
            kinds.dedup();
            return Ok(self.least_bottleneck(&kinds, Some(widths), self.may_cut(), widths.len(), wish));
        }
        let Some(one_each) = self.one_each(wish)? else { return Ok(None) };
        let may_share = *kept == Kept::Nothing && self.setting.tensor_parallel == TensorParallel::Auto;
        let shared = if may_share { self.shared() } else { None };
        let is_faster =
            |shared: &Vec<StageLayout>| self.speed(shared) > BETTER_LAYOUT * self.speed(&one_each);
        Ok(Some(shared.filter(is_faster).unwrap_or(one_each)))
    }

    /// A setting with as much room on each device as is wished: of the devices of the first replica, what is left on the fullest
    /// of those that are in their place in any.
    fn with_rooms(&self, setting: &Setting, wish: Wish<'_>) -> Setting {
        let least = |rooms: &[u64]| {
            let mut least = rooms.to_vec();
            for replica in 0..self.replicas {
                for (seat, other) in self.seats_of(0).iter().zip(self.seats_of(replica)) {
                    least[*seat] = least[*seat].min(rooms[*other]);
                }
            }
            least
        };
        Setting { rooms: wish.rooms.map(least), ..setting.clone() }
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
    fn one_each(&self, wish: Wish<'_>) -> Result<Option<Vec<StageLayout>>> {
        let seats = self.seats_of(0);
        let num_stages = seats.len();
        let rows = self.rows(wish.sequences, num_stages);
        let mut case = self.with_rooms(&self.setting, wish).case(&self.pieces, &[1], Balance::Roofline, rows);
        if let (Some(gpus), Some(_)) = (self.pages.gpus(), wish.rooms) {
            let bytes = gpus.block_bytes();
            for (_, costs) in case.costs.iter_mut().flatten() {
                *costs = costs.clone().with_bytes(&bytes);
            }
        }
        let ends = ends_block(&self.pieces);
        let stages = least_bottleneck_within(&case.problem(&ends), seats, wish.kv_tokens)?;
        let whole = stages.map(|stages| self.whole(&stages));
        let may_cut = self.may_cut() && self.is_once() && num_stages > 1;
        let cut = if may_cut { self.least_bottleneck(&[1], None, true, num_stages, wish) } else { None };
        // The plan's own bytes are short of what caches are rounded up to.
        let cut = cut.filter(|cut| wish.rooms.is_none() || self.pages.fit(cut));
        let is_faster = |cut: &Vec<StageLayout>| {
            whole.as_ref().is_none_or(|whole| self.slowest(whole) > BETTER_LAYOUT * self.slowest(cut))
        };
        Ok(cut.filter(is_faster).or(whole))
    }

    /// Stages of whole blocks as they run.
    fn whole(&self, stages: &[PlannedStage]) -> Vec<StageLayout> {
        let parts = stages.iter().map(|stage| part_of(&self.pieces, &stage.pieces)).collect();
        layout::stages(parts, None)
    }

    /// The fastest layout of a replica on devices that are named once, where that has stages which several share and gives
    /// every device something to do. GPUs share stages only where the job says so.
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
        wish: Wish<'_>,
    ) -> Option<Vec<StageLayout>> {
        let pieces = pieces(&self.setting.config, self.setting.column_cut().filter(|_| may_cut));
        let rows = self.rows(wish.sequences, num_stages);
        let case = self.with_rooms(&self.first, wish).case(&pieces, kinds, Balance::Roofline, rows);
        let ends = ends_block(&pieces);
        let problem = case.problem(&ends).with_widths(widths);
        Some(planned(&pieces, &least_bottleneck(&problem, wish.kv_tokens, problem.devices.len())?))
    }

    /// What each stage takes, with blocks shared as it says.
    pub(super) fn seconds(&self, stages: &[StageLayout]) -> Vec<f64> {
        let (kinds, each) = (self.setting.kinds(), self.setting.kind_of_each());
        let (pieces, spans) = layout::pieces_of(&self.setting.config, &parts(stages));
        let load = self.load(stages);
        let stage = |(stage, span): (&StageLayout, &Span)| {
            let costs = self.setting.cost_model(kinds[each[self.own.seats[stage.devices.start]]]);
            costs.step_seconds(&pieces, span.range(), stage.devices.len(), &stage.sharing, load)
        };
        stages.iter().zip(&spans).map(stage).collect()
    }

    /// Decides how ranks share blocks: as in the `first` run, in stages that were there just so; others as is fastest, or by heads
    /// and by columns where that would leave room for shorter rows: the lanes of all stages together may be too short where those
    /// of each alone are not.
    pub(super) fn share_blocks(&self, stages: &mut [StageLayout], first: &[StageShape]) {
        let load = self.load(stages);
        let mut by_heads = stages.to_vec();
        share_blocks(&mut by_heads, first, |_| Sharing::default());
        share_blocks(stages, first, |stage| self.sharing(stage, load));
        let longest = |stages: &[StageLayout]| self.room(stages).map(|(longest, _)| longest);
        if longest(stages) < longest(&by_heads) {
            stages.clone_from_slice(&by_heads);
        }
    }

    /// Tokens of the longest row that stages leave room for, and sequences; none where they do not fit.
    fn room(&self, stages: &[StageLayout]) -> Option<(u64, u64)> {
        let KvRoom { tokens, row_tokens } = self.pages.room(stages)?;
        let sequences = self.sequences_of(tokens as u64).min(self.max_sequences);
        Some(((row_tokens as u64).min(self.context_tokens), sequences))
    }

    /// How the ranks of a stage share blocks for such a micro-batch: all that they can by heads and by columns, where what is faster
    /// would leave room for shorter rows, or for fewer.
    fn sharing(&self, stage: &StageLayout, load: Load) -> Sharing {
        let (kinds, each) = (self.setting.kinds(), self.setting.kind_of_each());
        let (pieces, _) = layout::pieces_of(&self.setting.config, &[stage.part]);
        let costs = self.setting.cost_model(kinds[each[self.own.seats[stage.devices.start]]]);
        let sharing = self.setting.sharing(&*costs, &pieces, stage.devices.len(), load);
        if sharing == Sharing::default() {
            return sharing;
        }
        let room =
            |sharing: &Sharing| self.room(&[StageLayout { sharing: sharing.clone(), ..stage.clone() }]);
        if room(&sharing) < room(&Sharing::default()) { Sharing::default() } else { sharing }
    }

    /// Stages whose ranks share blocks as is fastest.
    fn with_sharing(&self, stages: &[StageLayout]) -> Vec<StageLayout> {
        let mut stages = stages.to_vec();
        self.share_blocks(&mut stages, &[]);
        stages
    }

    /// What the slowest device takes for all of its stages, those of all replicas, with blocks shared as is fastest.
    fn slowest(&self, stages: &[StageLayout]) -> f64 {
        let mut devices = vec![0.0; self.own.names.len()];
        let seconds = self.seconds(&self.with_sharing(stages));
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
        let rows = self.rows(self.sequences(stages), stages.len());
        self.replicas as f64 * self.setting.decode_rows(rows) / self.slowest(stages)
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
        let setting = self.with_room_beside(planned);
        let pieces = setting.pieces();
        let (replicas, layout) = answer::plan(&setting, &pieces)?;
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

    /// The setting of all devices; on GPUs with their memory, and as many rows in flight as planned stages have room for.
    fn with_room_beside(&self, planned: &[StageLayout]) -> Setting {
        let Some(gpus) = self.pages.gpus() else { return self.setting.clone() };
        let sequences = self.replicas as u64 * self.sequences(planned);
        Setting {
            rooms: Some(gpus.rooms()),
            tokens_in_flight: Some(sequences.saturating_mul(self.setting.mix.kv_tokens_per_row)),
            ..self.setting.clone()
        }
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
