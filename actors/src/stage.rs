//! The stage actor: owns a span of blocks on a device.
//!
//! Its role is the span's life: it starts the device thread, waits until the weights are there, hands on
//! micro-batches in the order of arrival, and ends when the device does. Its mailbox is bounded by
//! [`mailbox_size`]; its supervisor decides what its end means.

use std::sync::Arc;

use crossbeam::channel::{Sender, TrySendError, bounded};
use kameo::Actor;
use kameo::actor::ActorRef;
use kameo::message::{Context, Message};
use scheduler::MicroBatch;
use stages::Activations;
use tokio::sync::oneshot;

use crate::clock::StageClock;
use crate::device_thread::{DeviceThread, LoadStage, Next};
use crate::error::{Error, Result};

/// Messages that can be under way to a stage at once.
pub(crate) const fn mailbox_size(num_stages: usize) -> usize {
    let mut sum = 0;
    sum += num_stages + 1; // Micro-batches in flight in the whole pipeline.
    sum += 1; // Word from the device thread that it failed.
    sum
}

/// A span of blocks on a device.
pub(crate) struct StageActor {
    steps: Sender<Step>,
}

/// What a stage is made from.
pub(crate) struct StageArgs {
    pub(crate) index: usize,
    pub(crate) num_stages: usize,
    pub(crate) load: LoadStage,
    pub(crate) next: Next,
    pub(crate) clock: Arc<StageClock>,
}

/// A micro-batch on its way, with the activations of the stage before.
pub(crate) struct Step {
    pub(crate) batch: Arc<MicroBatch>,
    pub(crate) input: Option<Activations>,
}

/// The device thread has ended.
pub(crate) struct DeviceFailed(pub(crate) Error);

impl Actor for StageActor {
    type Args = StageArgs;
    type Error = Error;

    async fn on_start(args: StageArgs, owner: ActorRef<Self>) -> Result<Self> {
        let StageArgs { index, num_stages, load, next, clock } = args;
        let (sender, steps) = bounded(mailbox_size(num_stages));
        let (ready, loaded) = oneshot::channel();
        let owner = owner.downgrade();
        DeviceThread { index, steps, next, clock, owner }.spawn(load, ready);
        loaded.await.map_err(|_| Error::Ended("the device thread"))??;
        Ok(StageActor { steps: sender })
    }
}

impl Message<Step> for StageActor {
    type Reply = ();

    async fn handle(&mut self, step: Step, _: &mut Context<Self, ()>) {
        // Disconnected means that the device's own word is on its way.
        let sent = self.steps.try_send(step);
        assert!(!matches!(sent, Err(TrySendError::Full(_))), "more steps than micro-batches in flight");
    }
}

impl Message<DeviceFailed> for StageActor {
    type Reply = Result<()>;

    async fn handle(
        &mut self,
        DeviceFailed(error): DeviceFailed,
        _: &mut Context<Self, Result<()>>,
    ) -> Result<()> {
        Err(error) // Ends the actor; whoever is linked to it hears why.
    }
}
