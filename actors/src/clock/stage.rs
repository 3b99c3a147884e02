//! What one stage has done: its time, its micro-batches, and what they asked of it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use scheduler::{Load, MicroBatch, MicroBatchId};

use super::PipelineClock;
use super::flow::FlowTimes;
use super::hops::{HopClock, HopTimes};
use super::ledger::{Activity, Ledger, StageParts};
use super::steps::StepEvent;
use crate::thread::lock;

/// What one stage has done so far, over all its lives; its device thread writes, anybody reads.
#[derive(Debug)]
pub struct StageClock {
    index: usize,
    pipeline: Arc<PipelineClock>,
    counts: Mutex<Counts>,
    hops: Arc<HopClock>,
}

#[derive(Debug)]
struct Counts {
    /// The device thread of another life is not listened to.
    life: u64,
    ledger: Ledger,
    restarts: u64,
    loads: BTreeMap<usize, LoadSum>,
    /// When it turned to what it is at.
    since: Instant,
    in_steps: Duration,
}

/// Sums over steps of as many tokens.
#[derive(Debug, Clone, Copy, Default)]
struct LoadSum {
    steps: u64,
    decode_tokens: f64,
    decode_positions: f64,
    prefill_tokens: f64,
    prefill_positions: f64,
    logit_rows: f64,
}

/// A reading of a [`StageClock`].
#[derive(Debug, Clone, Default)]
pub struct StageTimes {
    /// Where the time since the job's begin went.
    pub parts: StageParts,
    /// Time in the micro-batches that are counted: as `parts.busy`, without one that is under way.
    pub in_steps: Duration,
    /// Micro-batches computed.
    pub steps: u64,
    /// Tokens computed, prompts' and generated ones.
    pub tokens: u64,
    /// How often the stage had to be started again.
    pub restarts: u64,
    /// What it has handed on to the next stage.
    pub hops: HopTimes,
    /// What the micro-batches asked of it.
    pub loads: Vec<StepLoads>,
}

/// What a stage has done in one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct StepWork {
    pub(crate) micro_batch: MicroBatchId,
    pub(crate) tokens: usize,
    pub(crate) load: Load,
    /// Bytes that it hands to the next stage.
    pub(crate) hop_bytes: u64,
}

impl StepWork {
    /// Of a micro-batch, of which so much is handed on.
    pub(crate) fn of(batch: &MicroBatch, hop_bytes: u64) -> Self {
        StepWork { micro_batch: batch.id, tokens: batch.num_tokens(), load: batch.load(), hop_bytes }
    }
}

/// Micro-batches of as many tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepLoads {
    /// How many.
    pub steps: u64,
    /// Their average.
    pub load: Load,
}

impl LoadSum {
    fn add(&mut self, load: &Load) {
        self.steps += 1;
        self.decode_tokens += load.decode_tokens;
        self.decode_positions += load.decode_tokens * load.decode_context;
        self.prefill_tokens += load.prefill_tokens;
        self.prefill_positions += load.prefill_tokens * load.prefill_context;
        self.logit_rows += load.logit_rows;
    }

    fn mean(&self) -> StepLoads {
        let steps = self.steps as f64;
        let load = Load {
            decode_tokens: self.decode_tokens / steps,
            decode_context: self.decode_positions / self.decode_tokens.max(1.0),
            prefill_tokens: self.prefill_tokens / steps,
            prefill_context: self.prefill_positions / self.prefill_tokens.max(1.0),
            logit_rows: self.logit_rows / steps,
        };
        StepLoads { steps: self.steps, load }
    }
}

impl StageClock {
    pub(crate) fn new(index: usize, pipeline: Arc<PipelineClock>) -> Self {
        let now = Instant::now();
        let counts = Counts {
            life: 0,
            ledger: Ledger::new(now),
            restarts: 0,
            loads: BTreeMap::new(),
            since: now,
            in_steps: Duration::ZERO,
        };
        StageClock { index, pipeline, counts: Mutex::new(counts), hops: Arc::default() }
    }

    /// Where its hops are counted.
    pub(crate) fn hops(&self) -> Arc<HopClock> {
        Arc::clone(&self.hops)
    }

    pub(crate) fn add_restart(&self) {
        self.lock().restarts += 1;
    }

    /// Time counts from now on.
    pub(crate) fn begin(&self) {
        let mut counts = self.lock();
        let (now, times) = self.pipeline.flow().read();
        counts.ledger.begin(now, &times);
    }

    /// A device thread is about to be started, in the place of any other.
    pub(crate) fn new_life(self: &Arc<Self>) -> Meter {
        let mut counts = self.lock();
        counts.life += 1;
        counts.ledger.compute_in_vain();
        let life = counts.life;
        drop(counts);
        let meter = Meter { clock: Arc::clone(self), life };
        meter.turn_to(|_| Activity::Away);
        meter
    }

    /// What the stage has done so far.
    pub fn read(&self) -> StageTimes {
        let counts = self.lock();
        let (now, times) = self.pipeline.flow().read();
        StageTimes {
            parts: counts.ledger.parts_at(now, &times),
            in_steps: counts.in_steps,
            steps: counts.loads.values().map(|sum| sum.steps).sum(),
            tokens: counts.loads.iter().map(|(tokens, sum)| *tokens as u64 * sum.steps).sum(),
            restarts: counts.restarts,
            hops: self.hops.read(),
            loads: counts.loads.values().map(LoadSum::mean).collect(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        lock(&self.counts)
    }
}

/// By which a device thread says what it turns to. Costs two locks that nobody else wants.
#[derive(Debug)]
pub(crate) struct Meter {
    clock: Arc<StageClock>,
    life: u64,
}

impl Meter {
    /// It has nothing to compute.
    pub(crate) fn wait(&self) {
        self.turn_to(Activity::Waiting);
    }

    /// It begins with a micro-batch.
    pub(crate) fn compute(&self) {
        self.turn_to(|_| Activity::Computing);
    }

    /// It has computed a micro-batch and hands it on; where the device waited for what comes in, `device_time` is what it took
    /// then. Returns how long it was at it.
    pub(crate) fn hand_on(&self, work: &StepWork, device_time: Option<Duration>) -> Duration {
        let StepWork { micro_batch, tokens, load, hop_bytes } = *work;
        let mut counts = self.clock.lock();
        if let Some(busy) = device_time.filter(|_| counts.life == self.life) {
            let waited = counts.since.elapsed().saturating_sub(busy);
            counts.ledger.began_late(waited);
            counts.since += waited;
        }
        let start = counts.since;
        let end = self.turn(&mut counts, |_| Activity::HandingOn);
        if counts.life != self.life {
            return end - start;
        }
        counts.loads.entry(tokens).or_default().add(&load);
        counts.in_steps += end - start;
        drop(counts);
        if let Some(log) = self.clock.pipeline.step_log() {
            let (stage, decode_tokens) = (self.clock.index, load.decode_tokens as usize);
            let micro_batch = micro_batch.0;
            log.tell(StepEvent {
                stage,
                rank: None,
                micro_batch,
                start,
                end,
                tokens,
                decode_tokens,
                hop_bytes,
            });
        }
        end - start
    }

    /// What it computes will come to nothing.
    pub(crate) fn compute_in_vain(&self) {
        let mut counts = self.clock.lock();
        if counts.life == self.life {
            counts.ledger.compute_in_vain();
        }
    }

    fn turn_to(&self, activity: impl FnOnce(FlowTimes) -> Activity) {
        self.turn(&mut self.clock.lock(), activity);
    }

    /// Returns now.
    fn turn(&self, counts: &mut Counts, activity: impl FnOnce(FlowTimes) -> Activity) -> Instant {
        let (now, times) = self.clock.pipeline.flow().read();
        if counts.life == self.life {
            counts.ledger.turn_to(activity(times), now, &times);
            counts.since = now;
        }
        now
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.compute_in_vain();
        self.turn_to(|_| Activity::Away);
    }
}
