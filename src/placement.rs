//! Which blocks each stage of a job gets, and how large its micro-batches are: by what was measured on the device, or by an estimate.
//!
//! One stage for each device that the job names, where a device that is named several times has the time for all of its stages;
//! or stages that several devices share, or two for each device, where a plan has them faster ([`question`]). Replicas have the same
//! stages, placed for the devices of the first. A job that goes on keeps the shared stages
//! that it began with ([`first_run`]). Where another layout would be faster, or a job's own cut is slower than need be, a line says so. A profile that
//! is stale or lacks blocks is measured again, where it decides something; one that is not there is never measured unasked.

mod question;

use std::sync::Arc;
use std::time::Instant;

use actors::StageTimes;
use anyhow::Result;
use configs::{AutoCount, JobFile, SplitBlocks};
use jobs::{ModelText, StageShape};
use scheduler::Span;
use stages::cost::{Basis, Load};
use stages::profile::{Effort, MeasureOptions, Missing, Neighbours, Profile, Stored};
use stages::{Model, Part};

use crate::first_run::{self, Kept};
use crate::hindsight::{Hindsight, StageWork};
use crate::kv_pages::KvPages;
use crate::layout::{self, StageLayout};
use crate::plan::setting::Setting;
use crate::{gpus, lower, profile, say};
use question::Question;

/// A job's stages.
#[derive(Debug, Clone)]
pub(crate) struct Placement {
    /// Those of each replica.
    pub(crate) stages: Vec<StageLayout>,
    pub(crate) replicas: usize,
    pub(crate) source: Source,
    /// Most tokens of a micro-batch.
    pub(crate) micro_batch_tokens: usize,
    /// The micro-batch that it was planned for.
    pub(crate) load: Load,
    /// What each stage takes for it.
    pub(crate) seconds: Vec<f64>,
    /// What the user should know.
    pub(crate) lines: Vec<String>,
    /// What it was planned for.
    setting: Setting,
    /// For each stage of each replica, the place of its (first) device among the setting's.
    seats: Vec<Vec<usize>>,
    pages: KvPages,
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

    /// Where the costs of stages come from for such micro-batches, the least sure of them.
    fn of(setting: &Setting, stages: &[StageLayout], loads: &[Load]) -> Self {
        let Some(measured) = &setting.measured else { return Self::Estimate };
        let parts: Vec<Part> = stages.iter().map(|stage| stage.part).collect();
        let (pieces, spans) = layout::pieces_of(&setting.config, &parts);
        let of_stage = |(stage, span): (&StageLayout, &Span)| {
            let (pieces, ranks) = (&pieces[span.range()], stage.devices.len());
            loads.iter().map(|load| measured.basis(pieces, ranks, &stage.sharing, *load)).max()
        };
        let basis = stages.iter().zip(&spans).filter_map(of_stage).max();
        Self::Measured(basis.unwrap_or(Basis::Measured))
    }
}

/// What a run is about to do, as far as placing depends on it.
#[derive(Clone)]
pub(crate) struct Occasion {
    /// What makes prompts of rows.
    pub(crate) text: Arc<ModelText>,
    /// Whether there is a row to run: else nothing is worth measuring.
    pub(crate) has_rows: bool,
    /// The command that measures the job's devices.
    pub(crate) profile_command: String,
    /// The stages of the job's first run, where this is not it.
    pub(crate) first_run: Option<Vec<StageShape>>,
    /// Whether rows may be computed otherwise than the first run's.
    pub(crate) accept_numerics: bool,
}

/// Refuses stages that are not the model's, without placing any.
///
/// # Errors
/// Stages or devices that are wrong.
pub(crate) fn check(job: &JobFile, model: &Model) -> Result<()> {
    lower::check(&job.pipeline)?;
    let weights = lower::weights(job.model.dtype);
    layout::check_shared(&job.pipeline, weights)?;
    layout::given(&job.pipeline, weights, &model.config).map(drop)
}

/// Places a job's stages; `pages` is what is known of its devices' memory.
///
/// # Errors
/// Stages or devices that are wrong, more stages than blocks.
pub(crate) fn place(job: &JobFile, model: &Model, occasion: &Occasion, pages: KvPages) -> Result<Placement> {
    let pipeline = &job.pipeline;
    let weights = lower::weights(job.model.dtype);
    let given = layout::given(pipeline, weights, &model.config)?;
    let kept =
        first_run::kept(pipeline, &model.config, occasion.first_run.as_deref(), occasion.accept_numerics)?;
    let options = profile::options(&job.model, pipeline, model, Effort::default())?;
    let is_decided =
        given.is_some() || matches!(kept, Kept::Stages(_)) || pipeline.devices_per_replica() == 1;
    let profile = stored(job, model, &options, !is_decided && occasion.has_rows);
    let question = Question::new(job, model, &options, profile.as_ref(), occasion, pages)?;
    let widths = layout::widths(pipeline);
    let mut lines = vec![];
    let mut stages = match (given, kept) {
        (Some(given), _) => {
            let given = layout::stages(given, widths);
            lines.extend(question.compare(&given, &question.plan(widths, &Kept::OneEach)?));
            given
        }
        (None, Kept::Stages(stages)) => {
            lines.push(question.going_on(&stages));
            stages
        }
        (None, kept) => {
            let planned = question.plan(widths, &kept)?;
            question.check_widths(widths, &planned)?;
            let planned = question.passed_twice(&planned).unwrap_or(planned);
            if pipeline.devices_per_replica() > 1 {
                lines.push(question.announcement(&planned, &occasion.profile_command));
            }
            if pipeline.devices.len() > 1 {
                lines.extend(question.better_layout(&planned, &kept));
            }
            planned
        }
    };
    let first = match pipeline.split_blocks {
        SplitBlocks::Auto => occasion.first_run.as_deref().unwrap_or_default(),
        // What the job's file says comes first: whether it is what the first run had is checked with all that decides answers.
        SplitBlocks::All => &[],
    };
    question.share_blocks(&mut stages, first);
    question.pages.check_rows(&stages)?;
    let (load, seconds, source) =
        (question.load(&stages), question.seconds(&stages), question.source(&stages));
    let most_tokens = pipeline.most_micro_batch_tokens();
    let micro_batch_tokens = match pipeline.micro_batch_tokens {
        AutoCount::Given(tokens) => tokens,
        AutoCount::Auto => question.micro_batch_tokens(&stages, most_tokens),
    };
    lines.extend(question.small_micro_batches(micro_batch_tokens, most_tokens));
    let replicas = pipeline.replicas;
    let seats = (0..replicas).map(|replica| question.seats(&stages, replica)).collect();
    let (setting, pages) = (question.setting, question.pages);
    Ok(Placement {
        micro_batch_tokens,
        load,
        stages,
        replicas,
        source,
        seconds,
        lines,
        setting,
        seats,
        pages,
    })
}

impl Placement {
    /// The stages of all replicas as they are numbered, each with its replica.
    pub(crate) fn numbered(&self) -> impl Iterator<Item = (usize, &StageLayout)> {
        (0..self.replicas).flat_map(|replica| self.stages.iter().map(move |stage| (replica, stage)))
    }

    /// Holds what the stages of all replicas have taken, one replica after the other, against the costs that they were cut by.
    pub(crate) fn judge(&self, times: &[StageTimes]) -> (Hindsight, Source) {
        let parts: Vec<Part> = self.stages.iter().map(|stage| stage.part).collect();
        let (pieces, spans) = layout::pieces_of(&self.setting.config, &parts);
        let work = |((times, pieces), stage): ((&StageTimes, &Span), &StageLayout)| StageWork {
            pieces: *pieces,
            ranks: stage.devices.len(),
            sharing: stage.sharing.clone(),
            seconds: times.in_steps.as_secs_f64(),
            loads: times.loads.clone(),
        };
        let replica = |times: &[StageTimes]| -> Vec<StageWork> {
            times.iter().zip(&spans).zip(&self.stages).map(work).collect()
        };
        let replicas: Vec<Vec<StageWork>> = times.chunks(self.stages.len()).map(replica).collect();
        let models: Vec<_> = self.setting.kinds().iter().map(|spec| self.setting.cost_model(spec)).collect();
        let model = |(seat, stage): (&usize, &StageLayout)| {
            &*models[self.setting.slowest_kind(*seat..seat + stage.devices.len(), self.load)]
        };
        let costs = |seats: &[usize]| -> Vec<_> { seats.iter().zip(&self.stages).map(model).collect() };
        let loads = replicas.iter().flatten().flat_map(|stage| &stage.loads);
        let loads: Vec<Load> = loads.map(|loads| loads.load).collect();
        let source = Source::of(&self.setting, &self.stages, &loads);
        let costs: Vec<Vec<_>> = self.seats.iter().map(|seats| costs(seats)).collect();
        let mut hindsight = Hindsight::of_replicas(&costs, &pieces, &replicas, &self.seats);
        hindsight.better = hindsight.better.filter(|better| self.fits(&better.spans));
        (hindsight, source)
    }

    /// Whether the job's file may have stages of these blocks in the place of its own: each of those has a device that is named for
    /// it, and GPUs have room.
    fn fits(&self, spans: &[Span]) -> bool {
        let stages = layout::stages(spans.iter().map(|span| (*span).into()).collect(), None);
        layout::is_one_each(&self.stages) && self.pages.fit(&stages)
    }
}

/// The profile of the job's devices, measured again where it must be and decides something.
fn stored(job: &JobFile, model: &Model, options: &MeasureOptions, decides: bool) -> Option<Profile> {
    if job.pipeline.profile == configs::Profile::Off || gpus::check_one_kind(&job.pipeline).is_err() {
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
        Stored::Usable(profile) => match profile.missing(&model.config, &options.widths) {
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
        0 if missing.kv_heads.is_empty() => "lacks stages that several devices share".to_owned(),
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
