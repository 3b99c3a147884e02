//! The stage actor: owns a span of blocks on a device.
//!
//! Its role is the span's life: it starts the device thread, or a process that has it, waits until the weights are there, hands on
//! micro-batches in the order of arrival, and ends when the device does. Its mailbox is bounded by
//! [`mailbox_size`]; its supervisor, the pipeline actor, decides what its end means.

use std::net::SocketAddr;
use std::sync::Arc;

use crossbeam::channel::{Sender, TrySendError, bounded};
use kameo::Actor;
use kameo::actor::ActorRef;
use kameo::message::{Context, Message};
use scheduler::{MicroBatch, MicroBatchId};
use stages::Activations;
use tokio::sync::oneshot;

use crate::clock::{AtWork, Meter};
use crate::device_thread::{DeviceThread, Here, LoadStage, Next};
use crate::error::Error;
use crate::processes::{Keeper, ProcessArgs, ProcessEnds};
use crate::stage_set::Lost;
use crate::tcp_link::Credit;

/// Messages that can be under way to a stage at once.
pub(crate) const fn mailbox_size(num_stages: usize) -> usize {
    let mut sum = 0;
    sum += num_stages + 1; // Micro-batches in flight in the whole pipeline.
    sum += 1; // Word from the device thread that it failed.
    sum += 1; // A flush.
    sum += 2; // Where the next stage is, at the start and after a stage was started again.
    sum += 1; // Word of what is lost.
    sum
}

/// A span of blocks on a device.
pub(crate) struct StageActor {
    work: Sender<Work>,
}

/// What a stage is made from.
pub(crate) struct StageArgs {
    pub(crate) index: usize,
    pub(crate) num_stages: usize,
    pub(crate) source: StageSource,
    pub(crate) meter: Meter,
    pub(crate) at_work: Arc<AtWork>,
    pub(crate) lost: Lost,
}

/// Where a stage runs, and what it needs there.
pub(crate) enum StageSource {
    /// On a thread of this process.
    Thread { load: LoadStage, next: Next },
    /// In a process of its own.
    Process { args: Arc<ProcessArgs>, ends: ProcessEnds },
}

/// A micro-batch on its way, with the activations of the stage before.
pub(crate) struct Step {
    pub(crate) batch: Arc<MicroBatch>,
    pub(crate) input: Option<Activations>,
    /// Given back when it is taken up, where it came over a connection.
    pub(crate) credit: Option<Credit>,
}

/// Asks for word when all that came before has been dealt with.
pub(crate) struct Flush(Box<dyn FnOnce() + Send>);

impl Flush {
    pub(crate) fn new() -> (Self, oneshot::Receiver<()>) {
        let (flush, flushed) = oneshot::channel();
        // Who does not wait any more need not hear.
        let answer = move || {
            let _ = flush.send(());
        };
        (Flush::answered_by(answer), flushed)
    }

    pub(crate) fn answered_by(answer: impl FnOnce() + Send + 'static) -> Self {
        Flush(Box::new(answer))
    }

    pub(crate) fn answer(self) {
        (self.0)();
    }
}

/// Where the next stage's process takes micro-batches.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Join(pub(crate) SocketAddr);

/// More is lost than a stage's process knows of.
pub(crate) struct MoreIsLost;

/// What the device thread is given, in the order of arrival.
pub(crate) enum Work {
    Step(Step),
    Flush(Flush),
    Join(Join),
    Lost,
}

/// The device thread has ended.
pub(crate) struct DeviceFailed(pub(crate) StageEnd);

/// Why a stage has ended.
#[derive(Debug, Clone)]
pub(crate) struct StageEnd {
    pub(crate) error: Error,
    /// The micro-batch that it was computing, if it was.
    pub(crate) micro_batch: Option<MicroBatchId>,
}

impl From<Error> for StageEnd {
    fn from(error: Error) -> Self {
        StageEnd { error, micro_batch: None }
    }
}

impl Actor for StageActor {
    type Args = StageArgs;
    type Error = StageEnd;

    async fn on_start(args: StageArgs, owner: ActorRef<Self>) -> Result<Self, StageEnd> {
        let StageArgs { index, num_stages, source, meter, at_work, lost } = args;
        let (sender, work) = bounded(mailbox_size(num_stages));
        let (ready, loaded) = oneshot::channel();
        let owner = owner.downgrade();
        let witness = Here { index, meter, at_work, owner };
        match source {
            StageSource::Thread { load, next } => {
                DeviceThread { index, work, next, witness, lost }.spawn(load, ready);
            }
            StageSource::Process { args, ends } => Keeper { args, ends, work, witness, lost }.spawn(ready),
        }
        loaded.await.map_err(|_| Error::Ended("the device thread"))??;
        Ok(StageActor { work: sender })
    }
}

impl StageActor {
    fn give(&self, work: Work) {
        // Disconnected means that the device's own word is on its way.
        let sent = self.work.try_send(work);
        assert!(!matches!(sent, Err(TrySendError::Full(_))), "more steps than micro-batches in flight");
    }
}

impl Message<Step> for StageActor {
    type Reply = ();

    async fn handle(&mut self, step: Step, _: &mut Context<Self, ()>) {
        self.give(Work::Step(step));
    }
}

impl Message<Flush> for StageActor {
    type Reply = ();

    async fn handle(&mut self, flush: Flush, _: &mut Context<Self, ()>) {
        self.give(Work::Flush(flush));
    }
}

impl Message<Join> for StageActor {
    type Reply = ();

    async fn handle(&mut self, join: Join, _: &mut Context<Self, ()>) {
        self.give(Work::Join(join));
    }
}

impl Message<MoreIsLost> for StageActor {
    type Reply = ();

    async fn handle(&mut self, _: MoreIsLost, _: &mut Context<Self, ()>) {
        self.give(Work::Lost);
    }
}

impl Message<DeviceFailed> for StageActor {
    type Reply = Result<(), StageEnd>;

    async fn handle(&mut self, failed: DeviceFailed, _: &mut Context<Self, Self::Reply>) -> Self::Reply {
        Err(failed.0) // Ends the actor; whoever is linked to it hears why.
    }
}
