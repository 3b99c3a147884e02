//! The thread that a stage's device work runs on.
//!
//! Device work blocks, and a device's handles may be bound to one thread; so each stage has a thread of its
//! own, which loads the span, computes micro-batches in the order of arrival, and pushes results on
//! without a detour through its actor. It may be in another process than its actor: then its witness is far.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::channel::Receiver;
use kameo::actor::{WeakActorRef, WeakRecipient};
use scheduler::{MicroBatch, MicroBatchId, MicroBatchOutput};
use stages::{GroupExit, Stage, StageOutput};
use tokio::sync::oneshot;

use crate::ahead::Ahead;
use crate::clock::{AtWork, Meter, StepWork};
use crate::error::{Error, Result, panic_message, with_causes};
use crate::link::{Link, hop_bytes, is_delivered};
use crate::stage::{DeviceFailed, StageActor, StageEnd, Step, Work};
use crate::stage_set::Lost;
use crate::thread::spawn;

/// Loads a stage on its device thread, each time that it is started.
pub(crate) type LoadStage = Arc<dyn Fn() -> stages::Result<Box<dyn Stage>> + Send + Sync>;

/// Where a stage's results go.
pub(crate) enum Next {
    /// To the stage after it.
    Stage(Box<dyn Link>),
    /// From the last stage back to the pipeline.
    Pipeline(Box<dyn WayBack>),
}

/// The way from the last stage to the pipeline.
pub(crate) trait WayBack: Send {
    /// Brings a finished micro-batch back; where the pipeline is gone, nobody wants it.
    fn bring(&self, output: MicroBatchOutput);
}

/// Token ids and log-probabilities of a finished micro-batch.
pub(crate) struct Tokens(pub(crate) MicroBatchOutput);

// Weak, so that a ring of actors can end.
impl WayBack for WeakRecipient<Tokens> {
    fn bring(&self, output: MicroBatchOutput) {
        if let Some(pipeline) = self.upgrade() {
            is_delivered(pipeline.tell(Tokens(output)).try_send());
        }
    }
}

/// Who hears what a device thread is at.
pub(crate) trait Witness: Send {
    /// Its stage is loaded, and has these ways out of groups in which it may wait. Nobody needs them who ends its whole process.
    fn has_loaded(&self, _exits: Vec<GroupExit>) {}

    /// It begins with a micro-batch.
    fn begins(&self, micro_batch: MicroBatchId);

    /// It has computed it and hands it on. Where its device waited for the activations first, `device_time` is what it took then.
    fn hands_on(&self, work: &StepWork, device_time: Option<Duration>);

    /// What it computes, or has just computed, comes to nothing.
    fn computes_in_vain(&self);

    /// It has nothing to compute.
    fn rests(&self);

    /// It has freed its stage.
    fn has_freed(&self) {}

    /// It ends.
    fn ends(&self, end: StageEnd);
}

/// The clocks, the watchdog and the actor of a stage.
pub(crate) struct Here {
    pub(crate) index: usize,
    pub(crate) meter: Meter,
    pub(crate) at_work: Arc<AtWork>,
    /// Weak, so that the actor can end, and its thread after it.
    pub(crate) owner: WeakActorRef<StageActor>,
}

impl Witness for Here {
    fn has_loaded(&self, exits: Vec<GroupExit>) {
        self.at_work.set_exits(exits);
    }

    fn begins(&self, micro_batch: MicroBatchId) {
        self.at_work.set(Some(micro_batch));
        self.meter.compute();
    }

    fn hands_on(&self, work: &StepWork, device_time: Option<Duration>) {
        let busy = self.meter.hand_on(work, device_time);
        tracing::debug!(
            stage = self.index,
            micro_batch = work.micro_batch.0,
            tokens = work.tokens,
            seconds = busy.as_secs_f64(),
            "step"
        );
    }

    fn computes_in_vain(&self) {
        self.meter.compute_in_vain();
    }

    fn rests(&self) {
        self.meter.wait();
        self.at_work.set(None);
    }

    fn has_freed(&self) {
        self.at_work.free();
    }

    fn ends(&self, end: StageEnd) {
        if let Some(owner) = self.owner.upgrade() {
            let _ = owner.tell(DeviceFailed(end)).blocking_send(); // It may be about to end anyway.
        }
    }
}

/// All that the thread works with.
pub(crate) struct DeviceThread<W> {
    pub(crate) index: usize,
    pub(crate) work: Receiver<Work>,
    pub(crate) next: Next,
    pub(crate) witness: W,
    pub(crate) lost: Lost,
}

impl<W: Witness + 'static> DeviceThread<W> {
    /// Starts the thread; `ready` hears when its span is loaded, or why it could not be.
    pub(crate) fn spawn(self, load: LoadStage, ready: oneshot::Sender<Result<()>>) {
        let name = format!("stage-{}", self.index);
        // Nobody waits for the answer any more when the start was given up.
        let ready = move |loaded| ready.send(loaded).is_ok();
        spawn(name, move || self.run(&load, ready));
    }

    /// Is the thread; `ready` says whether anybody wants the stage that was loaded.
    pub(crate) fn run(self, load: &LoadStage, ready: impl FnOnce(Result<()>) -> bool) {
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
                ready(Err(error));
                return;
            }
        };
        tracing::info!(stage = self.index, seconds = begun.elapsed().as_secs_f64(), "loaded");
        if !ready(Ok(())) {
            return;
        }
        self.witness.has_loaded(stage.exits());
        self.witness.rests();
        let work = || match stage.is_ahead() {
            true => Ahead::new(&self, &mut *stage).run(),
            false => self.steps(&mut *stage),
        };
        // A device's panics are told with their micro-batch, see `guarded`; any other is a bug that must not go unheard either.
        let ended = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
            Err(Error::Panic { stage: self.index, message: panic_message(&*panic) }.into())
        });
        if ended.is_err() {
            self.witness.computes_in_vain();
        }
        // Freed before another takes its place: a device may not hold two. Whatever comes of that,
        // the stage has ended; and as long as it takes, the watchdog holds the thread to be at work.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(stage)));
        self.witness.has_freed();
        if let Err(end) = ended {
            self.witness.ends(end);
        }
    }

    /// Computes one micro-batch after the other until the actor is gone, or the stage has ended.
    fn steps(&self, stage: &mut dyn Stage) -> std::result::Result<(), StageEnd> {
        // Ends when the actor is gone, and with it the sender of work.
        for work in &self.work {
            let step = match work {
                Work::Step(step) => step,
                Work::Flush(flush) => {
                    flush.answer();
                    continue;
                }
                Work::Join(_) => unreachable!("a stage in this process finds the next one by its seat"),
                Work::Lost => unreachable!("a stage in this process knows what is lost"),
            };
            let micro_batch = step.batch.id;
            if self.lost.contains(micro_batch) {
                continue;
            }
            self.witness.begins(micro_batch);
            self.step(stage, step).map_err(|error| StageEnd { error, micro_batch: Some(micro_batch) })?;
            self.witness.rests();
        }
        Ok(())
    }

    /// Computes one micro-batch, and passes it on unless it was lost meanwhile.
    fn step(&self, stage: &mut dyn Stage, step: Step) -> Result<()> {
        let Step { batch, input, credit } = step;
        drop(credit); // There is room for another.
        let index = self.index;
        let output = self.guarded(|| {
            jobs::faults::step(index);
            stage.step(&batch, input)
        })?;
        if self.lost.contains(batch.id) {
            self.witness.computes_in_vain();
            return Ok(());
        }
        let handed_on = match &output {
            StageOutput::Activations(activations) => hop_bytes(&batch, activations),
            StageOutput::Tokens(_) => 0,
        };
        let work = StepWork::of(&batch, handed_on);
        match (output, &self.next) {
            // The next stage's device waits for them, while its host goes ahead.
            (StageOutput::Activations(activations), Next::Stage(link)) if activations.are_on_a_device() => {
                link.push(batch, Some(activations));
                let device_time = self.guarded(|| stage.finish())?;
                // What it waited for may have come to nothing.
                match self.lost.contains(work.micro_batch) {
                    true => self.witness.computes_in_vain(),
                    false => self.witness.hands_on(&work, device_time),
                }
            }
            (output, next) => {
                let device_time = self.guarded(|| stage.finish())?;
                self.witness.hands_on(&work, device_time);
                self.hand_on(batch, output, next);
            }
        }
        Ok(())
    }

    fn hand_on(&self, batch: Arc<MicroBatch>, output: StageOutput, next: &Next) {
        match (output, next) {
            (StageOutput::Activations(activations), Next::Stage(link)) => link.push(batch, Some(activations)),
            (StageOutput::Tokens(output), Next::Pipeline(pipeline)) => pipeline.bring(output),
            (StageOutput::Activations(_), Next::Pipeline(_)) => panic!("the last stage made activations"),
            (StageOutput::Tokens(_), Next::Stage(_)) => {
                panic!("stage {} drew tokens and is not the last", self.index)
            }
        }
    }

    /// What a device does, whose refusal or panic ends the stage.
    pub(crate) fn guarded<T>(&self, work: impl FnOnce() -> stages::Result<T>) -> Result<T> {
        let stage = self.index;
        match catch_unwind(AssertUnwindSafe(work)) {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(error)) => Err(Error::Step { stage, message: with_causes(&error) }),
            Err(panic) => Err(Error::Panic { stage, message: panic_message(&*panic) }),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use crossbeam::channel::unbounded;
    use stages::{Activations, Collected, Queued};

    use super::*;

    /// Keeps why a stage has ended.
    struct Ends(Arc<Mutex<Vec<String>>>);

    impl Witness for Ends {
        fn begins(&self, _: MicroBatchId) {}
        fn hands_on(&self, _: &StepWork, _: Option<Duration>) {}
        fn computes_in_vain(&self) {}
        fn rests(&self) {}
        fn ends(&self, end: StageEnd) {
            self.0.lock().unwrap().push(end.error.to_string());
        }
    }

    /// A pipeline that cannot be told anything.
    struct Broken;

    impl WayBack for Broken {
        fn bring(&self, output: MicroBatchOutput) {
            panic!("{:?} came back", output.id);
        }
    }

    struct Idle {
        is_ahead: bool,
    }

    impl Stage for Idle {
        fn step(&mut self, batch: &MicroBatch, _: Option<Activations>) -> stages::Result<StageOutput> {
            Ok(StageOutput::Tokens(MicroBatchOutput { id: batch.id, slices: Vec::new() }))
        }

        fn is_ahead(&self) -> bool {
            self.is_ahead
        }

        fn queue(&mut self, _: &Arc<MicroBatch>, _: Option<&Activations>) -> stages::Result<Option<Queued>> {
            Ok(Some(Queued::default()))
        }

        fn collect(&mut self) -> stages::Result<Collected> {
            let output = MicroBatchOutput { id: MicroBatchId(7), slices: Vec::new() };
            Ok(Collected { output: Some(output), device_time: None })
        }
    }

    #[test]
    fn a_panic_beside_the_device_s_work_ends_the_stage_and_is_told() {
        for is_ahead in [false, true] {
            let (sender, work) = unbounded();
            let batch = Arc::new(MicroBatch { id: MicroBatchId(7), slices: Vec::new() });
            sender.send(Work::Step(Step { batch, input: None, credit: None })).ok().unwrap();
            let ends = Arc::default();
            let thread = DeviceThread {
                index: 3,
                work,
                next: Next::Pipeline(Box::new(Broken)),
                witness: Ends(Arc::clone(&ends)),
                lost: Lost::default(),
            };
            let load: LoadStage = Arc::new(move || Ok(Box::new(Idle { is_ahead })));
            thread.run(&load, |loaded| loaded.is_ok());
            assert_eq!(*ends.lock().unwrap(), ["stage 3 panicked: MicroBatchId(7) came back"]);
        }
    }
}
