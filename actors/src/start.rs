//! Starting a pipeline: its stages, loaded in parallel, and the actor that feeds them.

use std::sync::Arc;

use kameo::actor::{ActorRef, PreparedActor, Spawn};
use kameo::mailbox;
use scheduler::Span;
use stages::{Device, Dtypes, Model, SpanOptions};

use crate::clock::{PipelineClock, StageClock};
use crate::device_thread::{LoadStage, Next};
use crate::error::{Error, Result};
use crate::link::InProcess;
use crate::pipeline::{self, PipelineActor, PipelineArgs, SchedulerStats};
use crate::stage::{self, StageActor, StageArgs};

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
    /// Most prompts that are offered and not yet completed.
    pub window: usize,
}

/// A running pipeline.
pub struct Pipeline {
    /// Takes prompts.
    pub(crate) actor: ActorRef<PipelineActor>,
    /// One clock per stage.
    pub stage_clocks: Vec<Arc<StageClock>>,
    /// How long there was work in flight.
    pub clock: Arc<PipelineClock>,
    /// The blocks of each stage.
    pub spans: Vec<Span>,
    /// Most prompts that may be offered and not yet completed.
    pub(crate) window: usize,
}

impl Pipeline {
    /// What its scheduler has done so far; nothing where the pipeline has failed.
    pub async fn scheduler_stats(&self) -> Option<scheduler::Stats> {
        self.actor.ask(SchedulerStats).await.ok()
    }
}

/// Loads every stage on its device, in parallel, and starts the pipeline.
///
/// # Errors
/// The first stage that could not be loaded.
pub async fn start(model: &Model, options: PipelineOptions) -> Result<Pipeline> {
    let PipelineOptions { stages, dtypes, scheduler, window } = options;
    let spans = stages.iter().map(|stage| stage.span).collect();
    let load = |StagePlacement { device, span }| -> LoadStage {
        let num_pages = scheduler.num_pages;
        let options = SpanOptions { span, num_pages, context_tokens: scheduler.context_tokens };
        let model = model.clone();
        Box::new(move || stages::load(&model, &device, dtypes, options))
    };
    let loads = stages.into_iter().map(load).collect();
    start_stages(loads, spans, scheduler, window).await
}

/// Starts a pipeline of whatever stages the loads make.
pub(crate) async fn start_stages(
    loads: Vec<LoadStage>,
    spans: Vec<Span>,
    scheduler: scheduler::Options,
    window: usize,
) -> Result<Pipeline> {
    let num_stages = loads.len();
    let clock = Arc::new(PipelineClock::default());
    let mailbox_size = pipeline::mailbox_size(num_stages, window);
    let prepared = PreparedActor::<PipelineActor>::new(mailbox::bounded(mailbox_size));
    let pipeline = prepared.actor_ref().clone();

    // From the last stage to the first: each is given the way to the next.
    let mut stage_clocks = Vec::with_capacity(num_stages);
    let mut actors: Vec<ActorRef<StageActor>> = Vec::with_capacity(num_stages);
    for (index, load) in loads.into_iter().enumerate().rev() {
        let next = match actors.last() {
            Some(next) => Next::Stage(Box::new(InProcess(next.clone()))),
            None => Next::Pipeline(pipeline.clone().recipient().downgrade()),
        };
        let clock = Arc::new(StageClock::default());
        stage_clocks.push(Arc::clone(&clock));
        let args = StageArgs { index, num_stages, load, next, clock };
        let size = stage::mailbox_size(num_stages);
        actors.push(StageActor::spawn_link_with_mailbox(&pipeline, args, mailbox::bounded(size)).await);
    }
    actors.reverse();
    stage_clocks.reverse();

    for actor in &actors {
        actor.wait_for_startup_with_result(|result| result.map_err(startup_error)).await?;
    }
    let first = Box::new(InProcess(actors[0].clone()));
    prepared.spawn(PipelineArgs { options: scheduler, first, clock: Arc::clone(&clock) });
    Ok(Pipeline { actor: pipeline, stage_clocks, clock, spans, window })
}

fn startup_error(error: kameo::error::HookError<&Error>) -> Error {
    match error {
        kameo::error::HookError::Error(error) => error.clone(),
        kameo::error::HookError::Panicked(_) => Error::Ended("a stage"),
    }
}
