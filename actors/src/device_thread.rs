//! The thread that a stage's device work runs on.
//!
//! Device work blocks, and a device's handles may be bound to one thread; so each stage has a thread of its
//! own, which loads the span, computes micro-batches in the order of arrival, and pushes results on
//! without a detour through its actor.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use crossbeam::channel::Receiver;
use kameo::actor::{WeakActorRef, WeakRecipient};
use scheduler::MicroBatchOutput;
use stages::{Stage, StageOutput};
use tokio::sync::oneshot;

use crate::clock::{AtWork, Meter};
use crate::error::{Error, Result, panic_message, with_causes};
use crate::link::{Link, is_delivered};
use crate::stage::{DeviceFailed, StageActor, StageEnd, Step, Work};
use crate::stage_set::Lost;

/// Loads a stage on its device thread, each time that it is started.
pub(crate) type LoadStage = Arc<dyn Fn() -> stages::Result<Box<dyn Stage>> + Send + Sync>;

/// Where a stage's results go.
pub(crate) enum Next {
    /// To the stage after it.
    Stage(Box<dyn Link>),
    /// From the last stage back to the pipeline; weak, so that a ring of actors can end.
    Pipeline(WeakRecipient<Tokens>),
}

/// Token ids and log-probabilities of a finished micro-batch.
pub(crate) struct Tokens(pub(crate) MicroBatchOutput);

/// All that the thread works with.
pub(crate) struct DeviceThread {
    pub(crate) index: usize,
    pub(crate) work: Receiver<Work>,
    pub(crate) next: Next,
    pub(crate) meter: Meter,
    pub(crate) at_work: Arc<AtWork>,
    pub(crate) lost: Lost,
    /// Weak, so that the actor can end, and its thread after it.
    pub(crate) owner: WeakActorRef<StageActor>,
}

impl DeviceThread {
    /// Starts the thread; `ready` hears when its span is loaded, or why it could not be.
    pub(crate) fn spawn(self, load: LoadStage, ready: oneshot::Sender<Result<()>>) {
        let name = format!("stage-{}", self.index);
        let thread = std::thread::Builder::new().name(name).spawn(move || self.run(load, ready));
        thread.expect("the system starts a thread");
    }

    fn run(self, load: LoadStage, ready: oneshot::Sender<Result<()>>) {
        let stage = self.index;
        let begun = Instant::now();
        let loaded = match catch_unwind(AssertUnwindSafe(|| load())) {
            Ok(Ok(loaded)) => Ok(loaded),
            Ok(Err(error)) => Err(Error::Load { stage, message: with_causes(&error) }),
            Err(panic) => Err(Error::Panic { stage, message: panic_message(&*panic) }),
        };
        let mut stage = match loaded {
            Ok(stage) => stage,
            Err(error) => {
                // Nobody waits for the answer any more when the start was given up.
                let _ = ready.send(Err(error));
                return;
            }
        };
        tracing::info!(stage = self.index, seconds = begun.elapsed().as_secs_f64(), "loaded");
        if ready.send(Ok(())).is_err() {
            return;
        }
        self.meter.wait();
        // Ends when the actor is gone, and with it the sender of work.
        for work in &self.work {
            let step = match work {
                Work::Step(step) => step,
                Work::Flush(flush) => {
                    flush.answer();
                    continue;
                }
            };
            let micro_batch = Some(step.batch.id);
            self.at_work.set(micro_batch);
            if let Err(error) = self.step(&mut *stage, step) {
                self.meter.compute_in_vain();
                // Freed before another takes its place: a device may not hold two. Whatever comes of that,
                // the stage has ended; and as long as it takes, the watchdog holds the thread to be at work.
                let _ = catch_unwind(AssertUnwindSafe(|| drop(stage)));
                if let Some(owner) = self.owner.upgrade() {
                    let _ = owner.tell(DeviceFailed(StageEnd { error, micro_batch })).blocking_send();
                }
                return;
            }
            self.at_work.set(None);
        }
    }

    /// Computes one micro-batch, unless it is lost, and passes it on.
    fn step(&self, stage: &mut dyn Stage, step: Step) -> Result<()> {
        let Step { batch, input } = step;
        if self.lost.contains(batch.id) {
            return Ok(());
        }
        let index = self.index;
        self.meter.compute();
        let compute = || {
            jobs::faults::step(index);
            stage.step(&batch, input)
        };
        let output = match catch_unwind(AssertUnwindSafe(compute)) {
            Ok(Ok(output)) => output,
            Ok(Err(error)) => return Err(Error::Step { stage: index, message: with_causes(&error) }),
            Err(panic) => return Err(Error::Panic { stage: index, message: panic_message(&*panic) }),
        };
        if self.lost.contains(batch.id) {
            self.meter.compute_in_vain(); // It was lost while it was computed.
            self.meter.wait();
            return Ok(());
        }
        let busy = self.meter.hand_on(&batch);
        tracing::debug!(
            stage = index,
            micro_batch = batch.id.0,
            tokens = batch.num_tokens(),
            seconds = busy.as_secs_f64(),
            "step"
        );
        match (output, &self.next) {
            (StageOutput::Activations(activations), Next::Stage(link)) => link.push(batch, Some(activations)),
            (StageOutput::Tokens(output), Next::Pipeline(pipeline)) => {
                if let Some(pipeline) = pipeline.upgrade() {
                    is_delivered(pipeline.tell(Tokens(output)).try_send());
                }
            }
            (StageOutput::Activations(_), Next::Pipeline(_)) => panic!("the last stage made activations"),
            (StageOutput::Tokens(_), Next::Stage(_)) => {
                panic!("stage {index} drew tokens and is not the last")
            }
        }
        self.meter.wait();
        Ok(())
    }
}
