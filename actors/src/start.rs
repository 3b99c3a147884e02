//! Starting a pipeline: its stages, loaded in parallel, and the actor that feeds them.

use std::sync::Arc;
use std::time::Duration;

use kameo::actor::{ActorRef, PreparedActor};
use kameo::mailbox;
use scheduler::Span;
use stages::{CollectiveClock, CpuWeights, Device, Dtypes, Model, Part, Sharing, SpanOptions, StepSize};

use crate::clock::{PipelineClock, StageClock, StepLog};
use crate::error::{Error, Result};
use crate::pipeline::{self, PipelineActor, PipelineArgs, SchedulerStats};
use crate::processes::ProcessArgs;
use crate::ranks::Watch;
use crate::ranks::{RankHome, RanksArgs};
use crate::stage_set::{StageLoad, StageSet};

/// How long a report waits for a pipeline's figures.
const STATS_PATIENCE: Duration = Duration::from_secs(1);

/// Ranks wait for each other so much longer than a stage may take for a step: a quarter, and the watchdog looks every
/// eighth. So a rank that hangs is the watchdog's find, and counted as a thread that hangs.
const PATIENCE_SHARE: u32 = 4;

/// Where one stage runs.
#[derive(Debug, Clone)]
pub struct StagePlacement {
    /// Its devices, one for each rank.
    pub devices: Vec<Device>,
    /// Its blocks.
    pub part: Part,
    /// How its ranks share blocks.
    pub sharing: Sharing,
}

impl StagePlacement {
    /// Whole blocks on one device.
    pub fn alone(device: Device, blocks: Span) -> Self {
        StagePlacement { devices: vec![device], part: blocks.into(), sharing: Sharing::default() }
    }
}

/// Where the stages of a pipeline run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StageHome {
    /// On threads of this process.
    #[default]
    Threads,
    /// In a process each, of this program, that talk by TCP.
    Processes,
}

/// All that decides how a pipeline runs.
#[derive(Debug, Clone)]
pub struct PipelineOptions {
    /// The number of its first stage: a job counts its stages through all of its pipelines.
    pub first_stage: usize,
    /// The stages in order; their spans cover the model.
    pub stages: Vec<StagePlacement>,
    /// Where the stages run.
    pub run_in: StageHome,
    /// Where ranks beside the first run.
    pub ranks: RankHome,
    /// Number types.
    pub dtypes: Dtypes,
    /// Sizes of micro-batches and of the KV pool.
    pub scheduler: scheduler::Options,
    /// What it lets happen at once, and for how long.
    pub limits: Limits,
    /// Who hears of every step, if anybody.
    pub step_log: Option<StepLog>,
}

/// What a pipeline lets happen at once, and for how long.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Most rows that are offered and not yet completed.
    pub window: usize,
    /// A stage that takes longer than this for a micro-batch is held to hang.
    pub step_timeout: Duration,
}

/// A running pipeline.
pub struct Pipeline {
    /// Takes prompts.
    pub(crate) actor: ActorRef<PipelineActor>,
    /// One clock per stage.
    pub stage_clocks: Vec<Arc<StageClock>>,
    /// What the pipeline as a whole has done.
    pub clock: Arc<PipelineClock>,
    /// What each rank of each stage spends on collectives.
    pub collective_clocks: Vec<Vec<Arc<CollectiveClock>>>,
    /// The blocks of each stage.
    pub parts: Vec<Part>,
    /// Most rows that may be offered and not yet completed.
    pub(crate) window: usize,
}

impl Pipeline {
    /// What its scheduler has done so far; nothing where the pipeline has failed, or is busy with a stage
    /// that is started again.
    pub async fn scheduler_stats(&self) -> Option<scheduler::Stats> {
        let asked = tokio::time::timeout(STATS_PATIENCE, self.actor.ask(SchedulerStats).send()).await;
        asked.ok()?.ok()
    }
}

/// Loads every stage of every replica on its device, in parallel, and starts the pipelines.
///
/// # Errors
/// The first stage that could not be loaded.
pub async fn start_replicas(model: &Model, replicas: Vec<PipelineOptions>) -> Result<Vec<Pipeline>> {
    let weights = Arc::new(CpuWeights::default());
    let start = |options| {
        let (model, weights) = (model.clone(), Arc::clone(&weights));
        tokio::spawn(async move { start_beside(&model, options, weights).await })
    };
    let starting: Vec<_> = replicas.into_iter().map(start).collect();
    let mut pipelines = Vec::new();
    for starting in starting {
        pipelines.push(starting.await.map_err(|_| Error::Ended("the start of a pipeline"))??);
    }
    Ok(pipelines)
}

/// Loads every stage on its device, in parallel, and starts the pipeline.
///
/// # Errors
/// The first stage that could not be loaded.
pub async fn start(model: &Model, options: PipelineOptions) -> Result<Pipeline> {
    start_beside(model, options, Arc::default()).await
}

/// The same with the weights that other pipelines of this process may hold.
async fn start_beside(model: &Model, options: PipelineOptions, weights: Arc<CpuWeights>) -> Result<Pipeline> {
    let PipelineOptions { first_stage, stages, run_in, ranks, dtypes, scheduler, limits, step_log } = options;
    let parts = stages.iter().map(|stage| stage.part).collect();
    let watch = |(index, stage): (usize, &StagePlacement)| {
        Watch::new(first_stage + index, stage.devices.len(), step_log.clone())
    };
    let watches: Vec<Watch> = stages.iter().enumerate().map(watch).collect();
    let num_stages = stages.len();
    let gpus: Vec<Option<usize>> = stages.iter().map(|stage| stage.devices[0].gpu()).collect();
    let arrivals = |index: usize| match run_in {
        StageHome::Processes => scheduler.max_in_flight(),
        StageHome::Threads => usize::from(index > 0 && gpus[index - 1] != gpus[index]),
    };
    let largest_step = |index: usize| StepSize {
        rows: scheduler.micro_batch_tokens,
        sequences: scheduler.max_sequences,
        context_tokens: scheduler.context_tokens,
        micro_batches: scheduler.max_in_flight(),
        arrivals: arrivals(index),
    };
    let load = |(index, placement): (usize, StagePlacement)| -> StageLoad {
        let StagePlacement { devices, part, sharing } = placement;
        let (num_pages, context_tokens) = (scheduler.num_pages, scheduler.context_tokens);
        let options =
            SpanOptions { part, num_pages, context_tokens, largest_step: Some(largest_step(index)) };
        let (model, watch) = (model.clone(), watches[index].clone());
        let stage = first_stage + index;
        let patience = limits.step_timeout + limits.step_timeout / PATIENCE_SHARE;
        let weights = Arc::clone(&weights);
        let args = RanksArgs {
            stage,
            model,
            devices,
            dtypes,
            options,
            sharing,
            home: ranks,
            patience,
            watch,
            weights,
        };
        match run_in {
            StageHome::Threads => StageLoad::Thread(Arc::new(move || args.load())),
            StageHome::Processes => StageLoad::Process(Arc::new(ProcessArgs { num_stages, ranks: args })),
        }
    };
    let loads = stages.into_iter().enumerate().map(load).collect();
    let pipeline =
        start_stages(StageLoads { first_stage, loads, parts }, scheduler, limits, step_log).await?;
    let collective_clocks = watches.iter().map(|watch| watch.clocks().to_vec()).collect();
    Ok(Pipeline { collective_clocks, ..pipeline })
}

/// What loads the stages of a pipeline.
pub(crate) struct StageLoads {
    /// The number of the first of them.
    pub(crate) first_stage: usize,
    pub(crate) loads: Vec<StageLoad>,
    pub(crate) parts: Vec<Part>,
}

/// Starts a pipeline of whatever stages the loads make.
pub(crate) async fn start_stages(
    stages: StageLoads,
    scheduler: scheduler::Options,
    limits: Limits,
    step_log: Option<StepLog>,
) -> Result<Pipeline> {
    let StageLoads { first_stage, loads, parts } = stages;
    let Limits { window, step_timeout } = limits;
    let clock = Arc::new(PipelineClock::new(step_log));
    let mailbox_size = pipeline::mailbox_size(loads.len(), window);
    let prepared = PreparedActor::<PipelineActor>::new(mailbox::bounded(mailbox_size));
    let pipeline = prepared.actor_ref().clone();
    let stages = StageSet::start(first_stage, loads, &pipeline, &clock).await?;
    let stage_clocks = stages.clocks();
    prepared.spawn(PipelineArgs { options: scheduler, stages, step_timeout, clock: Arc::clone(&clock) });
    Ok(Pipeline { actor: pipeline, stage_clocks, collective_clocks: Vec::new(), clock, parts, window })
}
