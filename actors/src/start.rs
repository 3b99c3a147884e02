//! Starting a pipeline: its stages, loaded in parallel, and the actor that feeds them.

use std::sync::Arc;
use std::time::Duration;

use kameo::actor::{ActorRef, PreparedActor};
use kameo::mailbox;
use scheduler::Span;
use stages::{Device, Dtypes, Model, SpanOptions};

use crate::clock::{PipelineClock, StageClock, StepLog};
use crate::device_thread::LoadStage;
use crate::error::Result;
use crate::pipeline::{self, PipelineActor, PipelineArgs, SchedulerStats};
use crate::stage_set::StageSet;

/// How long a report waits for a pipeline's figures.
const STATS_PATIENCE: Duration = Duration::from_secs(1);

/// Where one stage runs.
#[derive(Debug, Clone)]
pub struct StagePlacement {
    /// Its device.
    pub device: Device,
    /// Its blocks.
    pub span: Span,
}

/// All that decides how a pipeline runs.
#[derive(Debug, Clone)]
pub struct PipelineOptions {
    /// The stages in order; their spans cover the model.
    pub stages: Vec<StagePlacement>,
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
    /// The blocks of each stage.
    pub spans: Vec<Span>,
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

/// Loads every stage on its device, in parallel, and starts the pipeline.
///
/// # Errors
/// The first stage that could not be loaded.
pub async fn start(model: &Model, options: PipelineOptions) -> Result<Pipeline> {
    let PipelineOptions { stages, dtypes, scheduler, limits, step_log } = options;
    let spans = stages.iter().map(|stage| stage.span).collect();
    let load = |StagePlacement { device, span }| -> LoadStage {
        let num_pages = scheduler.num_pages;
        let options = SpanOptions { part: span.into(), num_pages, context_tokens: scheduler.context_tokens };
        let model = model.clone();
        Arc::new(move || stages::load(&model, &device, dtypes, options))
    };
    let loads = stages.into_iter().map(load).collect();
    start_stages(loads, spans, scheduler, limits, step_log).await
}

/// Starts a pipeline of whatever stages the loads make.
pub(crate) async fn start_stages(
    loads: Vec<LoadStage>,
    spans: Vec<Span>,
    scheduler: scheduler::Options,
    limits: Limits,
    step_log: Option<StepLog>,
) -> Result<Pipeline> {
    let Limits { window, step_timeout } = limits;
    let clock = Arc::new(PipelineClock::new(step_log));
    let mailbox_size = pipeline::mailbox_size(loads.len(), window);
    let prepared = PreparedActor::<PipelineActor>::new(mailbox::bounded(mailbox_size));
    let pipeline = prepared.actor_ref().clone();
    let stages = StageSet::start(loads, &pipeline, &clock).await?;
    let stage_clocks = stages.clocks();
    prepared.spawn(PipelineArgs { options: scheduler, stages, step_timeout, clock: Arc::clone(&clock) });
    Ok(Pipeline { actor: pipeline, stage_clocks, clock, spans, window })
}
