//! The pipeline actor: owns the scheduler, and supervises the stages.
//!
//! It turns prompts into micro-batches for the first stage and the last stage's tokens into completions.
//! All deciding is the scheduler's; this actor only carries events to it and decisions away from it.
//!
//! A stage that ends is started again while the others keep their weights. What was in flight is lost, and
//! the scheduler has it computed again; it also finds the sequence that ends a stage whenever it is
//! computed. Its verdict is passed on once the stages have proved that they can do without that sequence,
//! or nothing else is left to do: a device that is broken must not make error lines of all rows. Where no
//! other sequence proves it for long, a probe of our own must.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jobs::{MAX_CHOICES, StopMatcher};
use kameo::Actor;
use kameo::actor::{ActorId, ActorRef, Recipient, WeakActorRef};
use kameo::error::{ActorStopReason, Infallible};
use kameo::message::{Context, Message};
use scheduler::{
    Completion, Generated, LONE_DEATHS, MicroBatch, Request, RequestKey, Sampling, Scheduler, SequenceId,
    Slice, TokenId,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::clock::{Flow, Hung, PipelineClock};
use crate::device_thread::Tokens;
use crate::error::{Error, Result, link_death};
use crate::guidance::{Guided, Guiding, MaskMakers};
use crate::link::{InProcess, Link, is_delivered};
use crate::stage::StageEnd;
use crate::stage_set::{StageSet, Watchdog};

/// Messages that can be under way to the pipeline at once.
pub(crate) const fn mailbox_size(num_stages: usize, window: usize) -> usize {
    let mut sum = 0;
    sum += window * MAX_CHOICES as usize; // Rows offered and not yet completed, with a prompt a choice.
    sum += num_stages + 1; // Micro-batches that come back.
    sum
}

/// How often stages may end with no micro-batch completed in between.
const fn max_ends(max_sequences: usize) -> u32 {
    let mut sum = 0;
    sum += 2; // The first micro-batch and the next with the same suspects.
    sum += max_sequences.next_power_of_two().ilog2(); // Halving, down to one alone,
    sum += LONE_DEATHS - 1; // and alone again.
    sum += 2; // One more that ends stages, and is next to it.
    sum
}

/// Threads that may hang; a process is ended, and those that were let out have woken. Each keeps its weights and its caches until it
/// wakes, if it ever does.
const MAX_HANGS: u32 = 4;

/// Owns the scheduler of one pipeline, and its stages.
pub(crate) struct PipelineActor {
    scheduler: Scheduler,
    stages: StageSet,
    first: InProcess,
    step_timeout: Duration,
    _watchdog: Watchdog,
    /// Whether all stages are there and joined; false from a stage's end until they are again.
    is_whole: bool,
    /// Ends of stages since a micro-batch was completed.
    ends_in_a_row: u32,
    num_hangs: u32,
    /// A sequence of our own, by which the stages prove that they work.
    probe: Option<SequenceId>,
    /// Sequences that are held to end stages, and that have not been told.
    convicted: Vec<Completion>,
    clients: HashMap<SequenceId, Client>,
    /// Started by the first sequence that follows a guide.
    mask_makers: Option<MaskMakers>,
    clock: Arc<PipelineClock>,
}

/// What a pipeline is made from.
pub(crate) struct PipelineArgs {
    pub(crate) options: scheduler::Options,
    pub(crate) stages: StageSet,
    pub(crate) step_timeout: Duration,
    pub(crate) clock: Arc<PipelineClock>,
}

/// Who waits for a sequence, and what ends it early.
struct Client {
    tag: u64,
    completed: Recipient<Completed>,
    sampled: Option<Recipient<Sampled>>,
    stop: Option<StopMatcher>,
    guided: Option<Guided>,
    checkpoints: Option<Checkpoints>,
    /// Tokens of the sequence that are on their way to the journal, or there.
    num_checkpointed: usize,
}

/// Where the tokens of unfinished sequences are kept.
#[derive(Clone)]
pub(crate) struct Checkpoints {
    pub(crate) keeper: Recipient<Checkpoint>,
    /// Checkpoints that may be under way at once. One that finds no leave goes with the next.
    pub(crate) leave: Arc<Semaphore>,
    /// Tokens from one checkpoint of a sequence to the next.
    pub(crate) every: usize,
}

/// A sequence has so many more tokens that they are worth keeping.
pub(crate) struct Checkpoint {
    /// The sender's name for the prompt.
    pub(crate) tag: u64,
    /// How many tokens came before.
    pub(crate) first: usize,
    /// What came since.
    pub(crate) piece: Generated,
    /// Given back when it has been dealt with.
    pub(crate) _leave: OwnedSemaphorePermit,
}

/// A request for the pipeline. It was checked to fit; see [`scheduler::Options::check`].
pub(crate) struct Prompt {
    /// The sender's own name for it.
    pub(crate) tag: u64,
    /// What is asked.
    pub(crate) request: Arc<Request>,
    /// What there is of its answer already.
    pub(crate) so_far: Generated,
    /// Watches the text, where the request has stop strings.
    pub(crate) stop: Option<StopMatcher>,
    /// What its answer follows, where it follows a guide.
    pub(crate) guiding: Option<Guiding>,
    /// Who hears of its end.
    pub(crate) completed: Recipient<Completed>,
    /// Who hears of every token, if anybody.
    pub(crate) sampled: Option<Recipient<Sampled>>,
    /// Who keeps its tokens until then, if anybody.
    pub(crate) checkpoints: Option<Checkpoints>,
}

/// A sequence has ended.
pub(crate) struct Completed {
    /// The sender's name for the prompt.
    pub(crate) tag: u64,
    /// All that was generated, and how it ended.
    pub(crate) completion: Completion,
}

/// A sequence has grown by a token.
pub(crate) struct Sampled(pub(crate) TokenId);

/// Asks what the scheduler has done so far.
pub(crate) struct SchedulerStats;

impl Actor for PipelineActor {
    type Args = PipelineArgs;
    type Error = Error;

    async fn on_start(args: PipelineArgs, _: ActorRef<Self>) -> Result<Self> {
        let PipelineArgs { options, stages, step_timeout, clock } = args;
        let watchdog = stages.watch(step_timeout);
        // Not before each stage is joined to the next. Where one has ended meanwhile, word of that is on its way.
        let is_whole = stages.flush().await;
        Ok(PipelineActor {
            scheduler: Scheduler::new(options),
            first: stages.first(),
            step_timeout,
            _watchdog: watchdog,
            stages,
            is_whole,
            ends_in_a_row: 0,
            num_hangs: 0,
            probe: None,
            convicted: Vec::new(),
            clients: HashMap::new(),
            mask_makers: None,
            clock,
        })
    }

    async fn on_link_died(
        &mut self,
        pipeline: WeakActorRef<Self>,
        id: ActorId,
        reason: ActorStopReason,
    ) -> Result<ControlFlow<ActorStopReason>> {
        let (Some(stage), Some(pipeline)) = (self.stages.index_of(id), pipeline.upgrade()) else {
            return Ok(link_death(id, reason)); // Of a job, or of a stage that was given up.
        };
        let end = self.stage_end(stage, &reason);
        self.restart(stage, end, &pipeline).await?;
        Ok(ControlFlow::Continue(()))
    }
}

impl PipelineActor {
    fn stage_end(&self, stage: usize, reason: &ActorStopReason) -> StageEnd {
        match (reason, self.stages.hung(stage)) {
            (ActorStopReason::Panicked(panic), _) => {
                panic.downcast().unwrap_or_else(|| Error::Ended("a stage").into())
            }
            (_, Some(Hung { micro_batch })) => {
                let (stage, seconds) = (self.stages.number(stage), self.step_timeout.as_secs());
                StageEnd { error: Error::Hang { stage, seconds }, micro_batch }
            }
            (_, None) => Error::Ended("a stage").into(),
        }
    }

    async fn restart(&mut self, stage: usize, end: StageEnd, pipeline: &ActorRef<Self>) -> Result<()> {
        let StageEnd { error, micro_batch } = end;
        self.is_whole = false;
        self.ends_in_a_row += 1;
        let leaves_thread = matches!(error, Error::Hang { .. }) && !self.stages.are_processes();
        self.num_hangs += u32::from(leaves_thread);
        let times = self.ends_in_a_row;
        let is_too_often = times > max_ends(self.scheduler.options().max_sequences);
        if self.probe.is_some() || self.num_hangs > MAX_HANGS || (is_too_often && self.convicted.is_empty()) {
            return Err(Error::GivenUp { end: Box::new(error), times });
        }
        tracing::warn!("{error}; it is started again");
        let convicted = self.scheduler.stage_ended(micro_batch);
        self.convicted.extend(convicted);
        if is_too_often {
            // So many rows side by side may end a stage, or it may be broken.
            self.probe = self.scheduler.probe(probe()).ok();
        }
        self.stages.lose_all_before(self.scheduler.next_micro_batch_id()).await;
        self.clock.flow().set(Flow::Idle);
        let has_woken = self.stages.let_out(stage, self.step_timeout).await;
        self.num_hangs -= u32::from(leaves_thread && has_woken);
        self.stages.restart(stage, pipeline).await?;
        // Where another stage has ended meanwhile, word of that is on its way.
        self.is_whole = self.stages.flush().await;
        self.dispatch();
        Ok(())
    }

    /// Issues what the scheduler wants issued now.
    fn dispatch(&mut self) {
        if !self.is_whole {
            return;
        }
        while let Some(mut batch) = self.scheduler.next_micro_batch() {
            self.add_masks(&mut batch);
            // Where the stage is gone, word of that is on its way.
            self.first.push(Arc::new(batch), None);
        }
        if self.scheduler.num_in_flight() == 0 {
            self.tell_convicted();
        }
        self.clock.flow().set(self.flow());
    }

    /// Gives slices that draw by a guide their masks, made or not.
    fn add_masks(&self, batch: &mut MicroBatch) {
        let is_guided = |slice: &&mut Slice| slice.sample && slice.request.sampling.guide.is_some();
        for slice in batch.slices.iter_mut().filter(is_guided) {
            let guided = self.clients.get(&slice.sequence).and_then(|client| client.guided.as_ref());
            slice.mask = guided.map(Guided::mask);
        }
    }

    /// Goes on with the guide of a sequence that has not ended, where it follows one.
    fn guide_on(&mut self, sequence: SequenceId, token: TokenId) {
        let guided = self.clients.get_mut(&sequence).and_then(|client| client.guided.as_mut());
        if let (Some(makers), Some(guided)) = (&self.mask_makers, guided) {
            makers.take(guided, token);
        }
    }

    /// What a stage waits for that waits now, all being issued that can be.
    fn flow(&self) -> Flow {
        match self.scheduler.num_in_flight() {
            0 => Flow::Idle,
            _ => Flow::of(self.scheduler.flow(), self.clock.is_input_read()),
        }
    }

    fn tell_convicted(&mut self) {
        let convicted = std::mem::take(&mut self.convicted);
        self.deliver(convicted);
    }

    /// Sends the tokens of a sequence on to be kept, once there are enough that were not.
    fn checkpoint(&mut self, sequence: SequenceId) {
        let Some(client) = self.clients.get_mut(&sequence) else { return };
        let Some(Checkpoints { keeper, leave, every }) = &client.checkpoints else { return };
        let Some(generated) = self.scheduler.generated(sequence) else { return };
        let first = client.num_checkpointed;
        if generated.tokens.len() < first + every {
            return;
        }
        if let Ok(permit) = Arc::clone(leave).try_acquire_owned() {
            let piece = generated.since(first);
            client.num_checkpointed += piece.tokens.len();
            let checkpoint = Checkpoint { tag: client.tag, first, piece, _leave: permit };
            is_delivered(keeper.tell(checkpoint).try_send());
        }
    }

    fn deliver(&mut self, completions: Vec<Completion>) {
        for completion in completions {
            if self.probe == Some(completion.sequence) {
                self.probe = None;
                continue;
            }
            let client = self.clients.remove(&completion.sequence).expect("every sequence has a client");
            // A client that has gone away wants no answer.
            is_delivered(client.completed.tell(Completed { tag: client.tag, completion }).try_send());
        }
    }
}

/// The least that a stage can be asked: what follows the first token of the vocabulary.
fn probe() -> Arc<Request> {
    let sampling = Sampling::greedy(1);
    Arc::new(Request { key: RequestKey(0), prompt: vec![0], sampling: Arc::new(sampling), sample: 0 })
}

impl Message<Prompt> for PipelineActor {
    type Reply = ();

    async fn handle(&mut self, prompt: Prompt, _: &mut Context<Self, ()>) {
        let began = Instant::now();
        let Prompt { tag, request, so_far, stop, guiding, completed, sampled, checkpoints } = prompt;
        let num_checkpointed = so_far.tokens.len();
        let makers = &mut self.mask_makers;
        let guided = guiding
            .map(|guiding| makers.get_or_insert_with(MaskMakers::start).guide(guiding, &so_far.tokens));
        let sequence = self.scheduler.submit(request, so_far).expect("the request was checked to fit");
        let client = Client { tag, completed, sampled, stop, guided, checkpoints, num_checkpointed };
        self.clients.insert(sequence, client);
        let completions = self.scheduler.drain_finished();
        self.deliver(completions);
        self.dispatch();
        self.clock.add_handling(began.elapsed());
    }
}

impl Message<Tokens> for PipelineActor {
    type Reply = ();

    async fn handle(&mut self, Tokens(output): Tokens, _: &mut Context<Self, ()>) {
        if self.stages.lost().contains(output.id) {
            return;
        }
        let began = Instant::now();
        self.ends_in_a_row = 0;
        self.tell_convicted();
        let mut num_sampled = 0;
        for slice in &output.slices {
            // What was computed in vain, ahead of a sequence's end, has nobody who waits for it.
            if let (Some(token), Some(client)) = (slice.token, self.clients.get(&slice.sequence)) {
                num_sampled += 1;
                if let Some(sampled) = &client.sampled {
                    is_delivered(sampled.tell(Sampled(token)).try_send());
                }
            }
        }
        self.clock.add_sampled(num_sampled);
        let grown: Vec<(SequenceId, TokenId)> =
            (output.slices.iter()).filter_map(|slice| Some((slice.sequence, slice.token?))).collect();
        let clients = &mut self.clients;
        let completions = self.scheduler.complete(output, |sequence, token| {
            let stop = clients.get_mut(&sequence).and_then(|client| client.stop.as_mut());
            stop.is_some_and(|stop| stop.push(token))
        });
        self.deliver(completions);
        grown.iter().for_each(|&(sequence, token)| self.guide_on(sequence, token));
        self.dispatch();
        grown.into_iter().for_each(|(sequence, _)| self.checkpoint(sequence));
        self.clock.add_handling(began.elapsed());
    }
}

impl Message<SchedulerStats> for PipelineActor {
    type Reply = std::result::Result<scheduler::Stats, Infallible>;

    async fn handle(&mut self, _: SchedulerStats, _: &mut Context<Self, Self::Reply>) -> Self::Reply {
        Ok(self.scheduler.stats())
    }
}
