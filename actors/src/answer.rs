//! One request to a pipeline, whose tokens somebody wants to see as they come.

use std::ops::ControlFlow;
use std::sync::Arc;

use jobs::StopMatcher;
use kameo::Actor;
use kameo::actor::{ActorId, ActorRef, PreparedActor, WeakActorRef};
use kameo::error::{ActorStopReason, Infallible};
use kameo::mailbox;
use kameo::message::{Context, Message};
use scheduler::{Completion, Generated, Request, TokenId};
use tokio::sync::mpsc::UnboundedSender;

use crate::error::{Error, Result, death_error};
use crate::pipeline::{Completed, Prompt, Sampled};
use crate::start::Pipeline;

/// Answers one request; `tokens` hears of each token as it is drawn. The request was checked to fit.
///
/// # Errors
/// A pipeline that failed.
pub async fn answer(
    pipeline: &Pipeline,
    request: Arc<Request>,
    stop: Option<StopMatcher>,
    tokens: UnboundedSender<TokenId>,
) -> Result<Completion> {
    // Each token is one message, and the end is one more: none is ever refused for want of room.
    let mailbox_size = request.sampling.max_tokens as usize + 2;
    let prepared = PreparedActor::<Listener>::new(mailbox::bounded(mailbox_size));
    let listener = prepared.actor_ref().clone();
    listener.link(&pipeline.actor).await;
    let running = prepared.spawn(Listener { tokens, answer: None });
    let prompt = Prompt {
        tag: 0,
        request,
        so_far: Generated::default(),
        stop,
        guiding: None,
        completed: listener.clone().recipient(),
        sampled: Some(listener.recipient()),
        checkpoints: None,
    };
    pipeline.actor.tell(prompt).await.map_err(|_| Error::Ended("the pipeline"))?;
    match running.await {
        Ok(Ok((Listener { answer: Some(answer), .. }, _))) => answer,
        _ => Err(Error::Ended("the answer")),
    }
}

/// Hears of one sequence, and ends with it.
struct Listener {
    tokens: UnboundedSender<TokenId>,
    answer: Option<Result<Completion>>,
}

impl Actor for Listener {
    type Args = Self;
    type Error = Infallible;

    async fn on_start(listener: Self, _: ActorRef<Self>) -> std::result::Result<Self, Infallible> {
        Ok(listener)
    }

    async fn on_link_died(
        &mut self,
        _: WeakActorRef<Self>,
        _: ActorId,
        reason: ActorStopReason,
    ) -> std::result::Result<ControlFlow<ActorStopReason>, Infallible> {
        self.answer = Some(Err(death_error(&reason)));
        Ok(ControlFlow::Break(ActorStopReason::Normal))
    }
}

impl Message<Sampled> for Listener {
    type Reply = ();

    async fn handle(&mut self, Sampled(token): Sampled, _: &mut Context<Self, ()>) {
        // Nobody may be listening any more; the answer is computed all the same.
        let _ = self.tokens.send(token);
    }
}

impl Message<Completed> for Listener {
    type Reply = ();

    async fn handle(&mut self, Completed { completion, .. }: Completed, ctx: &mut Context<Self, ()>) {
        self.answer = Some(Ok(completion));
        ctx.stop();
    }
}
