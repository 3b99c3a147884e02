//! A device thread that is a step ahead of its answers.
//!
//! A lone stage that feeds tokens back is given a micro-batch before the answer to the one before it is known. So that its device never
//! waits for the host, this thread queues whatever comes, and collects what is there; a thread beside it does the waiting. A micro-batch is at work
//! from the moment when the one before it was collected.

use std::collections::VecDeque;
use std::sync::Arc;

use crossbeam::channel::{Receiver, Sender, TryRecvError, bounded, select};
use scheduler::{MicroBatch, MicroBatchId};
use stages::{Arrival, Stage};

use crate::clock::StepWork;
use crate::device_thread::{DeviceThread, WayBack, Witness};
use crate::error::Error;
use crate::stage::{StageEnd, Step, Work};

/// Micro-batches that a lone stage has at once: one that is computed, and one behind it.
const QUEUED: usize = 2;

/// A stage, and what it has been given.
pub(crate) struct Ahead<'a, W> {
    thread: &'a DeviceThread<W>,
    pipeline: &'a dyn WayBack,
    stage: &'a mut dyn Stage,
    /// The oldest first.
    queued: VecDeque<Arc<MicroBatch>>,
    waits: Sender<Arrival>,
    arrivals: Receiver<()>,
}

/// What the thread turns to.
enum Next {
    Work(Work),
    /// The answer to the oldest micro-batch is there.
    Arrival,
    /// The actor is gone.
    End,
}

impl<'a, W: Witness + 'static> Ahead<'a, W> {
    pub(crate) fn new(
        thread: &'a DeviceThread<W>,
        pipeline: &'a dyn WayBack,
        stage: &'a mut dyn Stage,
    ) -> Self {
        let (waits, awaited) = bounded::<Arrival>(QUEUED);
        let (say, arrivals) = bounded(QUEUED);
        let name = format!("stage-{}-answers", thread.index);
        // Ends with this. What the device refuses is said to whoever collects the answer.
        let wait = move || {
            for arrival in awaited {
                let _ = arrival.wait();
                if say.send(()).is_err() {
                    return;
                }
            }
        };
        std::thread::Builder::new().name(name).spawn(wait).expect("the system starts a thread");
        Ahead { thread, pipeline, stage, queued: VecDeque::new(), waits, arrivals }
    }

    /// Goes on until the actor is gone, or the stage has ended.
    pub(crate) fn run(&mut self) -> Result<(), StageEnd> {
        loop {
            match self.next() {
                Next::Work(Work::Step(step)) => self.queue(step)?,
                Next::Work(Work::Flush(flush)) => {
                    while !self.queued.is_empty() {
                        self.arrivals.recv().map_err(|_| Error::Ended("a thread that waits for a device"))?;
                        self.collect()?;
                    }
                    flush.answer();
                }
                Next::Work(Work::Join(_)) => unreachable!("a lone stage has none after it"),
                Next::Work(Work::Lost) => unreachable!("a stage in this process knows what is lost"),
                Next::Arrival => self.collect()?,
                Next::End => return Ok(()),
            }
        }
    }

    /// What is to be queued goes first: the device is to have it before it is done with what it has.
    fn next(&self) -> Next {
        let work = &self.thread.work;
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

    fn queue(&mut self, step: Step) -> Result<(), StageEnd> {
        let Step { batch, input, credit: _ } = step;
        assert!(input.is_none(), "a lone stage is given tokens alone");
        let (thread, stage) = (self.thread, &mut *self.stage);
        if thread.lost.contains(batch.id) {
            return Ok(());
        }
        if self.queued.is_empty() {
            thread.witness.begins(batch.id);
        }
        let queued = thread.guarded(|| {
            jobs::faults::step(thread.index);
            stage.queue(&batch)
        });
        match queued {
            Ok(arrival) => {
                let (micro_batch, behind) = (batch.id.0, self.queued.len());
                tracing::debug!(stage = thread.index, micro_batch, behind, "queued");
                self.queued.push_back(batch);
                let is_sent = self.waits.try_send(arrival).is_ok();
                assert!(is_sent, "more micro-batches than a lone stage has at once");
                Ok(())
            }
            Err(error) => {
                // What was queued before may be the reason.
                while !self.queued.is_empty() {
                    self.collect()?;
                }
                // It is at work until the stage is freed, which the watchdog looks after.
                thread.witness.begins(batch.id);
                Err(ended(error, batch.id))
            }
        }
    }

    /// Brings the answer to the oldest micro-batch back.
    fn collect(&mut self) -> Result<(), StageEnd> {
        let batch = self.queued.pop_front().expect("a micro-batch was queued");
        let (thread, stage) = (self.thread, &mut *self.stage);
        let output = thread.guarded(|| stage.collect()).map_err(|error| ended(error, batch.id))?;
        if thread.lost.contains(batch.id) {
            thread.witness.computes_in_vain();
        } else {
            thread.witness.hands_on(&StepWork::of(&batch, 0), None);
            self.pipeline.bring(output);
        }
        match self.queued.front() {
            Some(next) => thread.witness.begins(next.id),
            None => thread.witness.rests(),
        }
        Ok(())
    }
}

fn ended(error: Error, micro_batch: MicroBatchId) -> StageEnd {
    StageEnd { error, micro_batch: Some(micro_batch) }
}
