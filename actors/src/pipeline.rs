//! The pipeline actor: owns the scheduler.
//!
//! It turns prompts into micro-batches for the first stage and the last stage's tokens into completions.
//! All deciding is the scheduler's; this actor only carries events to it and decisions away from it.

use std::collections::HashMap;
use std::sync::Arc;

use jobs::StopMatcher;
use kameo::Actor;
use kameo::actor::{ActorRef, Recipient};
use kameo::error::Infallible;
use kameo::message::{Context, Message};
use scheduler::{Completion, Generated, Request, Scheduler, SequenceId, TokenId};

use crate::clock::{ActiveSpan, PipelineClock};
use crate::device_thread::Tokens;
use crate::link::{Link, is_delivered};

/// Messages that can be under way to the pipeline at once.
pub(crate) const fn mailbox_size(num_stages: usize, window: usize) -> usize {
    let mut sum = 0;
    sum += window; // Prompts offered and not yet completed.
    sum += num_stages + 1; // Micro-batches that come back.
    sum
}

/// Owns the scheduler of one pipeline.
pub(crate) struct PipelineActor {
    scheduler: Scheduler,
    first: Box<dyn Link>,
    clients: HashMap<SequenceId, Client>,
    clock: Arc<PipelineClock>,
    active: ActiveSpan,
}

/// What a pipeline is made from.
pub(crate) struct PipelineArgs {
    pub(crate) options: scheduler::Options,
    pub(crate) first: Box<dyn Link>,
    pub(crate) clock: Arc<PipelineClock>,
}

/// Who waits for a sequence, and what ends it early.
struct Client {
    tag: u64,
    completed: Recipient<Completed>,
    sampled: Option<Recipient<Sampled>>,
    stop: Option<StopMatcher>,
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
    /// Who hears of its end.
    pub(crate) completed: Recipient<Completed>,
    /// Who hears of every token, if anybody.
    pub(crate) sampled: Option<Recipient<Sampled>>,
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
    type Error = Infallible;

    async fn on_start(args: PipelineArgs, _: ActorRef<Self>) -> Result<Self, Infallible> {
        Ok(PipelineActor {
            scheduler: Scheduler::new(args.options),
            first: args.first,
            clients: HashMap::new(),
            active: ActiveSpan::new(Arc::clone(&args.clock)),
            clock: args.clock,
        })
    }
}

impl PipelineActor {
    /// Issues what the scheduler wants issued now.
    fn dispatch(&mut self) {
        while let Some(batch) = self.scheduler.next_micro_batch() {
            // A stage that is gone takes this actor down through its link.
            self.first.push(Arc::new(batch), None);
        }
        self.active.update(self.scheduler.num_in_flight() > 0);
    }

    fn deliver(&mut self, completions: Vec<Completion>) {
        for completion in completions {
            let client = self.clients.remove(&completion.sequence).expect("every sequence has a client");
            // A client that has gone away wants no answer.
            is_delivered(client.completed.tell(Completed { tag: client.tag, completion }).try_send());
        }
    }
}

impl Message<Prompt> for PipelineActor {
    type Reply = ();

    async fn handle(&mut self, prompt: Prompt, _: &mut Context<Self, ()>) {
        let Prompt { tag, request, so_far, stop, completed, sampled } = prompt;
        let sequence = self.scheduler.submit(request, so_far).expect("the request was checked to fit");
        self.clients.insert(sequence, Client { tag, completed, sampled, stop });
        let completions = self.scheduler.drain_finished();
        self.deliver(completions);
        self.dispatch();
    }
}

impl Message<Tokens> for PipelineActor {
    type Reply = ();

    async fn handle(&mut self, Tokens(output): Tokens, _: &mut Context<Self, ()>) {
        self.clock.add_sampled(output.slices.iter().filter(|slice| slice.token.is_some()).count());
        for slice in &output.slices {
            if let Some(token) = slice.token
                && let Some(Client { sampled: Some(sampled), .. }) = self.clients.get(&slice.sequence)
            {
                is_delivered(sampled.tell(Sampled(token)).try_send());
            }
        }
        let clients = &mut self.clients;
        let completions = self.scheduler.complete(output, |sequence, token| {
            let stop = clients.get_mut(&sequence).and_then(|client| client.stop.as_mut());
            stop.is_some_and(|stop| stop.push(token))
        });
        self.deliver(completions);
        self.dispatch();
    }
}

impl Message<SchedulerStats> for PipelineActor {
    type Reply = Result<scheduler::Stats, Infallible>;

    async fn handle(&mut self, _: SchedulerStats, _: &mut Context<Self, Self::Reply>) -> Self::Reply {
        Ok(self.scheduler.stats())
    }
}
