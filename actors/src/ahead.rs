//! A device thread that is a step ahead of its device.
//!
//! A device that works beside its host is given the next micro-batch while it computes one: so it never waits for the host, and what comes
//! from another device arrives meanwhile. This thread queues whatever comes, and collects what is there; a thread beside it does the
//! waiting. A micro-batch is at work from the moment when the one before it was collected.

use std::collections::VecDeque;

use crossbeam::channel::{Receiver, Sender, TryRecvError, bounded, select};
use scheduler::{MicroBatch, MicroBatchId};
use stages::{Arrival, Collected, Queued, Stage};

use crate::clock::StepWork;
use crate::device_thread::{self, DeviceThread, Witness};
use crate::error::Error;
use crate::link::hop_bytes;
use crate::stage::{StageEnd, Step, Work};
use crate::thread::spawn;

/// Micro-batches that a stage has begun with: one that is computed, and one behind it.
const QUEUED: usize = 2;

/// A stage, and what it has been given.
pub(crate) struct Ahead<'a, W> {
    thread: &'a DeviceThread<W>,
    stage: &'a mut dyn Stage,
    /// The oldest first.
    queued: VecDeque<StepWork>,
    waits: Sender<Arrival>,
    arrivals: Receiver<()>,
}

/// What the thread turns to.
enum Next {
    Work(Work),
    /// The device is done with the oldest micro-batch.
    Arrival,
    /// The actor is gone.
    End,
}

impl<'a, W: Witness + 'static> Ahead<'a, W> {
    pub(crate) fn new(thread: &'a DeviceThread<W>, stage: &'a mut dyn Stage) -> Self {
        let (waits, awaited) = bounded::<Arrival>(QUEUED);
        let (say, arrivals) = bounded(QUEUED);
        let name = format!("stage-{}-answers", thread.index);
        // Ends with this. What the device refuses is said to whoever collects.
        let wait = move || {
            for arrival in awaited {
                let _ = arrival.wait();
                if say.send(()).is_err() {
                    return;
                }
            }
        };
        spawn(name, wait);
        Ahead { thread, stage, queued: VecDeque::new(), waits, arrivals }
    }

    /// Goes on until the actor is gone, or the stage has ended.
    pub(crate) fn run(&mut self) -> Result<(), StageEnd> {
        loop {
            match self.next() {
                Next::Work(Work::Step(step)) => self.begin(step)?,
                Next::Work(Work::Flush(flush)) => {
                    self.catch_up()?;
                    flush.answer();
                }
                Next::Work(Work::Join(_)) => unreachable!("a stage's link is told where the next one is"),
                Next::Work(Work::Lost) => unreachable!("a stage's thread sees what is lost"),
                Next::Arrival => self.collect()?,
                Next::End => return Ok(()),
            }
        }
    }

    /// What is to be queued goes first: the device is to have it before it is done with what it has.
    fn next(&self) -> Next {
        let work = &self.thread.work;
        if self.queued.len() == QUEUED {
            let _ = self.arrivals.recv(); // Where nobody waits any more, collecting does.
            return Next::Arrival;
        }
        match work.try_recv() {
            Ok(work) => return Next::Work(work),
            Err(TryRecvError::Disconnected) => return Next::End,
            Err(TryRecvError::Empty) => {}
        }
        select! {
            recv(work) -> work => work.map_or(Next::End, Next::Work),
            recv(self.arrivals) -> _ => Next::Arrival,
        }
    }

    /// Has the device begin with a micro-batch, and hands on what the next stage's goes on with.
    fn begin(&mut self, step: Step) -> Result<(), StageEnd> {
        let Step { batch, input, credit } = step;
        drop(credit); // There is room for another.
        let thread = self.thread;
        if thread.lost.contains(batch.id) {
            return Ok(());
        }
        if self.queued.is_empty() {
            thread.witness.begins(batch.id);
        }
        let queued = self.queue(&batch, |stage| {
            jobs::faults::step(thread.index);
            stage.queue(&batch, input.as_ref())
        })?;
        let queued = match queued {
            Some(queued) => queued,
            None => {
                // It goes in parts, in its own time.
                self.catch_up()?;
                thread.witness.begins(batch.id);
                let queued = self.queue(&batch, |stage| stage.queue(&batch, input.as_ref()))?;
                queued.expect("a stage without others in it makes room")
            }
        };
        let Queued { activations, arrival } = queued;
        tracing::debug!(stage = thread.index, micro_batch = batch.id.0, behind = self.queued.len(), "queued");
        let handed_on = activations.as_ref().map_or(0, |activations| hop_bytes(&batch, activations));
        self.queued.push_back(StepWork::of(&batch, handed_on));
        let is_sent = self.waits.try_send(arrival).is_ok();
        assert!(is_sent, "more micro-batches than a stage has begun with");
        match (activations, &thread.next) {
            (Some(activations), device_thread::Next::Stage(link)) => link.push(batch, Some(activations)),
            (None, device_thread::Next::Pipeline(_)) => {}
            _ => panic!("stage {} hands on what only the last one does not", thread.index),
        }
        Ok(())
    }

    fn queue(
        &mut self,
        batch: &MicroBatch,
        queue: impl FnOnce(&mut dyn Stage) -> stages::Result<Option<Queued>>,
    ) -> Result<Option<Queued>, StageEnd> {
        let (thread, stage) = (self.thread, &mut *self.stage);
        let error = match thread.guarded(|| queue(stage)) {
            Ok(queued) => return Ok(queued),
            Err(error) => error,
        };
        // What was queued before may be the reason.
        while !self.queued.is_empty() {
            self.collect()?;
        }
        // It is at work until the stage is freed, which the watchdog looks after.
        thread.witness.begins(batch.id);
        Err(ended(error, batch.id))
    }

    /// Collects all that the device has.
    fn catch_up(&mut self) -> Result<(), StageEnd> {
        while !self.queued.is_empty() {
            self.arrivals.recv().map_err(|_| Error::Ended("a thread that waits for a device"))?;
            self.collect()?;
        }
        Ok(())
    }

    /// Takes leave of the oldest micro-batch; the last stage brings its answer back.
    fn collect(&mut self) -> Result<(), StageEnd> {
        let work = self.queued.pop_front().expect("a micro-batch was queued");
        let (thread, stage) = (self.thread, &mut *self.stage);
        let collected = thread.guarded(|| stage.collect()).map_err(|error| ended(error, work.micro_batch))?;
        let Collected { output, device_time } = collected;
        if thread.lost.contains(work.micro_batch) {
            thread.witness.computes_in_vain();
        } else {
            thread.witness.hands_on(&work, device_time);
            match (output, &thread.next) {
                (Some(output), device_thread::Next::Pipeline(pipeline)) => pipeline.bring(output),
                (None, device_thread::Next::Stage(_)) => {}
                _ => panic!("stage {} gives what only the last one gives", thread.index),
            }
        }
        match self.queued.front() {
            Some(next) => thread.witness.begins(next.micro_batch),
            None => thread.witness.rests(),
        }
        Ok(())
    }
}

fn ended(error: Error, micro_batch: MicroBatchId) -> StageEnd {
    StageEnd { error, micro_batch: Some(micro_batch) }
}
