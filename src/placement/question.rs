//! What is asked of the planner about a job's own devices, and how fast layouts are on them: which it answers ([`layouts`]), and
//! what is said of them ([`words`]).

mod layouts;
mod words;

use std::sync::Arc;

use anyhow::Result;
use configs::{DeviceCatalog, JobFile, KvCacheDtype};
use jobs::StageShape;
use scheduler::{Span, in_flight};
use stages::cost::{Balance, CostModel, Load, Measured, NumberType, NumberTypes, PieceShape, pieces};
use stages::profile::{MeasureOptions, Profile};
use stages::{Model, PAGE_TOKENS, Part, Sharing};

use super::{Kept, Occasion, Source, neighbours};
use crate::cli::LengthsArg;
use crate::first_run::share_blocks;
use crate::kv_pages::KvPages;
use crate::lanes::{self, Lanes, Worth};
use crate::layout::{self, StageLayout};
use crate::plan::own::OwnDevices;
use crate::plan::setting::{Setting, roofline};
use crate::plan::{Lengths, Work, first_rows};
use crate::{efficient, lower, machine};

/// Rows of the input whose lengths stand for all: some thousand tokens are enough to tell short prompts from long ones.
const SAMPLED_ROWS: u64 = 256;

/// Tokens of answers where nobody says how long they are, and of prompts where the input cannot be read: a few hundred,
/// so that a row has 512 positions in the middle of its answer.
const TYPICAL_TOKENS: usize = 341;

/// Another layout is taken, or worth a line, when it is faster by this share.
const BETTER_LAYOUT: f64 = 1.02;

/// Memory of each device as a cut has it: CPU devices share the machine's, which is checked as a whole elsewhere, and of GPUs more
/// is known than a catalog says.
const MEMORY_MIB: f64 = (1_u64 << 40) as f64;

fn number_types(options: &MeasureOptions) -> NumberTypes {
    let dtypes = options.dtypes;
    NumberTypes { weights: NumberType::from(dtypes.weights), kv: NumberType::from(dtypes.kv) }
}

/// How long rows are: as `[plan]` says, or else as the first of the input are.
fn lengths(job: &JobFile, context_tokens: usize, occasion: &Occasion) -> Lengths {
    let plan = job.plan.clone().unwrap_or_default();
    let typical = TYPICAL_TOKENS.min(context_tokens / 2).max(1);
    let given =
        |tokens: Option<usize>| tokens.map_or(typical, |tokens| tokens.min(context_tokens).max(1)) as u64;
    let (prompt, output) = (given(plan.prompt_tokens), given(plan.output_tokens));
    let alike = || Lengths::alike(prompt, output, output);
    match (plan.prompt_tokens, plan.output_tokens) {
        (Some(_), Some(_)) => alike(),
        // There is nothing to cut.
        _ if job.pipeline.devices.len() == 1 || !occasion.has_rows => alike(),
        // What is read of a pipe here would be gone for the job.
        _ if !job.job.input.is_file() => alike(),
        // What is wrong with an input is said when it is run.
        _ => first_rows(job, &occasion.text, context_tokens, SAMPLED_ROWS, typical as u64)
            .unwrap_or_else(|_| alike()),
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
    pub(super) pages: KvPages,
}

impl Question {
    /// # Errors
    /// Devices that the machine lacks.
    pub(super) fn new(
        job: &JobFile,
        model: &Model,
        options: &MeasureOptions,
        profile: Option<&Profile>,
        occasion: &Occasion,
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
        let lengths = lengths(job, options.context_tokens, occasion);
        let mix = lengths.mix(LengthsArg::Fixed).expect("an answer has a token");
        let pipeline = &job.pipeline;
        let setting = Setting {
            config: (*model.config).clone(),
            catalog,
            devices: own.list.clone(),
            runs_on: Some(layout::kind(pipeline)),
            rooms: None,
            shared_room: pages.shared_room(pipeline.replicas),
            context_tokens: options.context_tokens,
            kv_cache_tokens: pipeline.kv_cache_tokens,
            types,
            is_kv_type_given: pipeline.kv_cache_dtype != KvCacheDtype::Auto,
            mix,
            lengths: LengthsArg::Fixed,
            tokens_in_flight: Some((pipeline.most_sequences() as u64).saturating_mul(mix.kv_tokens_per_row)),
            max_sequences: pipeline.most_sequences() as u64,
            max_tokens: pipeline.most_micro_batch_tokens() as f64,
            rows: None,
            work: Arc::new(Work { lengths, ..Work::default() }),
            replicas: if own.list.group(pipeline.replicas).is_some() { pipeline.replicas } else { 1 },
            tensor_parallel: pipeline.tensor_parallel.clone(),
            split_blocks: pipeline.split_blocks,
            may_share_sequences: true,
            column_cuts: pipeline.column_cuts,
            virtual_stages: layout::virtual_stages(pipeline),
            balance: Balance::Roofline,
            measured: profile.and_then(costs),
            to_measure: None,
        };
        let (pieces, replicas) = (pieces(&model.config, None), pipeline.replicas);
        let max_sequences = lower::sequences_per_replica(pipeline) as u64;
        let first = Setting {
            devices: own.first_of(replicas),
            tokens_in_flight: Some(max_sequences.saturating_mul(mix.kv_tokens_per_row)),
            shared_room: pages.shared_room(1),
            ..setting.clone()
        };
        Ok(Question { setting, first, own, replicas, pieces, max_sequences, pages })
    }

    /// Rows of a micro-batch in the middle of the job, of so many sequences on so many stages.
    fn rows(&self, sequences: u64, num_stages: usize) -> u64 {
        (sequences / in_flight(num_stages as u64)).min(self.setting.max_rows()).max(1)
    }

    /// Sequences in flight in a replica: as many as the job allows, and as its GPUs have room for. What CPUs share, and with it the last
    /// bits of answers, does not depend on how large their cache is.
    fn sequences(&self, stages: &[StageLayout]) -> u64 {
        let lanes = self.pages.gpus().and_then(|gpus| gpus.lanes(stages).ok());
        let room =
            lanes.map_or(u64::MAX, |lanes| self.sequences_of((lanes.num_pages() * PAGE_TOKENS) as u64));
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

    /// Whether each device is named once, by one replica.
    fn is_once(&self) -> bool {
        self.own.seats.iter().enumerate().all(|(entry, seat)| entry == *seat)
    }

    /// Most tokens of a micro-batch of such a pipeline, `most` at most: see [`efficient::micro_batch_tokens`]. An estimate knows of
    /// nothing that makes a token of few rows dearer, beside weights that are read; and what small ones cost on GPUs, whose
    /// host has work for each, was measured on none.
    pub(super) fn micro_batch_tokens(&self, stages: &[StageLayout], most: usize) -> usize {
        match self.source(stages) {
            Source::Measured(_) if stages.len() > 1 && self.pages.gpus().is_none() => {
                let load = self.load(stages);
                let seconds = |tokens: usize| {
                    let of_tokens = load.scaled(tokens as f64 / load.tokens());
                    self.seconds_for(stages, of_tokens).iter().sum()
                };
                efficient::micro_batch_tokens(most, seconds)
            }
            _ => most,
        }
    }

    /// What each stage takes for a micro-batch in the middle of the job, with blocks shared as it says.
    pub(super) fn seconds(&self, stages: &[StageLayout]) -> Vec<f64> {
        self.seconds_for(stages, self.load(stages))
    }

    /// The same for any micro-batch.
    fn seconds_for(&self, stages: &[StageLayout], load: Load) -> Vec<f64> {
        let (pieces, spans) = layout::pieces_of(&self.setting.config, &parts(stages));
        let stage = |(stage, span): (&StageLayout, &Span)| {
            let costs = self.costs(&self.setting, stage, load);
            costs.step_seconds(&pieces, span.range(), stage.devices.len(), &stage.sharing, load)
        };
        stages.iter().zip(&spans).map(stage).collect()
    }

    /// Decides how ranks share blocks: as in the `first` run, in stages that were there just so; others in the best way that there is
    /// for all stages together: see [`lanes`].
    pub(super) fn share_blocks(&self, stages: &mut [StageLayout], first: &[StageShape]) {
        let load = self.load(stages);
        let widths: Vec<usize> = stages.iter().map(|stage| stage.devices.len()).collect();
        let shared = |way: &Setting| {
            let mut shared = stages.to_vec();
            share_blocks(&mut shared, first, |stage| self.sharing(way, stage, load));
            shared
        };
        let ways = self.setting.ways_to_share(&widths).iter().map(shared).collect();
        let worth = |stages: &Vec<StageLayout>| self.worth(stages);
        let best = lanes::choose(ways, self.setting.context_tokens, worth).expect("there is a way");
        stages.clone_from_slice(&best);
    }

    fn worth(&self, stages: &[StageLayout]) -> Worth {
        let lanes = self.pages.lanes(stages).ok();
        Worth {
            num_lanes: layout::num_lanes(stages),
            row_tokens: lanes.map(Lanes::row_tokens),
            speed: self.speed_as_shared(stages),
        }
    }

    /// How the ranks of a stage share blocks for such a micro-batch.
    fn sharing(&self, setting: &Setting, stage: &StageLayout, load: Load) -> Sharing {
        let (pieces, _) = layout::pieces_of(&setting.config, &[stage.part]);
        let costs = self.costs(setting, stage, load);
        setting.sharing(&*costs, &pieces, stage.devices.len(), load)
    }

    /// What the slowest of a stage's devices takes: those of a stage that several share are named once, and so stand side by side.
    fn costs<'a>(&self, setting: &'a Setting, stage: &StageLayout, load: Load) -> Box<dyn CostModel + 'a> {
        let first = self.own.seats[stage.devices.start];
        let slowest = setting.slowest_kind(first..first + stage.devices.len(), load);
        setting.cost_model(setting.kinds()[slowest])
    }

    /// Stages whose ranks share blocks as is fastest.
    fn with_sharing(&self, stages: &[StageLayout]) -> Vec<StageLayout> {
        let mut stages = stages.to_vec();
        self.share_blocks(&mut stages, &[]);
        stages
    }

    /// What the slowest device takes for all of its stages, those of all replicas.
    fn slowest(&self, stages: &[StageLayout]) -> f64 {
        let mut devices = vec![0.0; self.own.names.len()];
        let seconds = self.seconds(stages);
        for seats in (0..self.replicas).map(|replica| self.seats_of(replica)) {
            for (stage, seconds) in stages.iter().zip(&seconds) {
                for seat in &seats[stage.devices.clone()] {
                    devices[*seat] += seconds;
                }
            }
        }
        devices.into_iter().fold(0.0, f64::max)
    }

    /// Rows that decode in a second, in all replicas, with blocks shared as is fastest.
    fn speed(&self, stages: &[StageLayout]) -> f64 {
        self.speed_as_shared(&self.with_sharing(stages))
    }

    /// The same with blocks shared as the stages say.
    fn speed_as_shared(&self, stages: &[StageLayout]) -> f64 {
        let rows = self.rows(self.sequences(stages), stages.len());
        self.replicas as f64 * self.setting.decode_rows(rows) / self.slowest(stages)
    }

    /// A setting whose GPUs have their memory, with so many sequences in flight, which may be fewer than the job's.
    fn with_memory(&self, setting: &Setting, sequences: u64) -> Setting {
        let Some(gpus) = self.pages.gpus() else { return setting.clone() };
        Setting {
            rooms: Some(gpus.rooms()),
            tokens_in_flight: Some(sequences.saturating_mul(self.setting.mix.kv_tokens_per_row)),
            ..setting.clone()
        }
    }
}

fn parts(stages: &[StageLayout]) -> Vec<Part> {
    stages.iter().map(|stage| stage.part).collect()
}
