//! The stages of a pipeline: how they are started, and how one is started again when it has ended.
//!
//! Each stage has a seat, which its neighbours and the watchdog know. An actor that ends leaves its seat to
//! the next one; what was under way is lost, and [`Lost`] keeps it from being computed by anybody.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use kameo::actor::{ActorId, ActorRef, Recipient, Spawn};
use kameo::mailbox;
use scheduler::MicroBatchId;
use stages::GroupExit;

use crate::clock::{AtWork, Hung, PipelineClock, StageClock};
use crate::device_thread::{LoadStage, Next, Tokens};
use crate::error::{Error, Result};
use crate::link::InProcess;
use crate::pipeline::PipelineActor;
use crate::processes::{ProcessArgs, ProcessEnds};
use crate::stage::{self, Flush, Join, MoreIsLost, StageActor, StageArgs, StageSource};

/// All stages of one pipeline.
pub(crate) struct StageSet {
    /// The number by which the job knows the first of them.
    first_stage: usize,
    loads: Vec<StageLoad>,
    clocks: Vec<Arc<StageClock>>,
    seats: Vec<Seat>,
    lost: Lost,
}

/// Where a stage runs, and how it is loaded there each time that it is started.
pub(crate) enum StageLoad {
    /// On a thread of this process.
    Thread(LoadStage),
    /// In a process of its own. Of one pipeline all stages are, or none.
    Process(Arc<ProcessArgs>),
}

/// Where a stage's present actor is found.
#[derive(Clone)]
pub(crate) struct Seat(Arc<RwLock<Incumbent>>);

/// A stage's actor, and what its device thread is at.
#[derive(Clone)]
pub(crate) struct Incumbent {
    pub(crate) actor: ActorRef<StageActor>,
    pub(crate) at_work: Arc<AtWork>,
    /// Where its process takes micro-batches, once it is there and if it has one.
    pub(crate) address: Arc<OnceLock<SocketAddr>>,
}

/// Up to which micro-batch all that was not completed is lost.
#[derive(Debug, Clone, Default)]
pub(crate) struct Lost(Arc<AtomicU64>);

impl Lost {
    /// Every micro-batch before this one that has not come back never will.
    pub(crate) fn all_before(&self, next: MicroBatchId) {
        self.0.store(next.0, Ordering::Release);
    }

    /// The first micro-batch that is not lost.
    pub(crate) fn next(&self) -> MicroBatchId {
        MicroBatchId(self.0.load(Ordering::Acquire))
    }

    pub(crate) fn contains(&self, micro_batch: MicroBatchId) -> bool {
        micro_batch.0 < self.0.load(Ordering::Acquire)
    }
}

impl Seat {
    /// Who sits there now.
    pub(crate) fn incumbent(&self) -> Incumbent {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn pass_on(&self, incumbent: Incumbent) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = incumbent;
    }
}

impl StageSet {
    /// Loads every stage on its device, in parallel, and has each be joined to the next: a flush says when they are.
    ///
    /// # Errors
    /// The first stage that could not be loaded.
    pub(crate) async fn start(
        first_stage: usize,
        loads: Vec<StageLoad>,
        pipeline: &ActorRef<PipelineActor>,
        clock: &Arc<PipelineClock>,
    ) -> Result<Self> {
        let new_clock = |index| Arc::new(StageClock::new(first_stage + index, Arc::clone(clock)));
        let clocks = (0..loads.len()).map(new_clock).collect();
        let (seats, lost) = (Vec::new(), Lost::default());
        let mut stages = StageSet { first_stage, loads, clocks, seats, lost };
        // From the last stage to the first: each is given the way to the next.
        let mut next = None;
        for index in (0..stages.len()).rev() {
            let seat = Seat(Arc::new(RwLock::new(stages.spawn(index, next, pipeline).await)));
            next = Some(seat.clone());
            stages.seats.insert(0, seat);
        }
        for seat in &stages.seats {
            started(&seat.incumbent().actor).await?;
        }
        for index in 1..stages.len() {
            stages.join(index).await;
        }
        Ok(stages)
    }

    /// Starts a stage again that has ended, and has it be joined to its neighbours: a flush says when it is.
    ///
    /// # Errors
    /// It could not be loaded.
    pub(crate) async fn restart(&self, index: usize, pipeline: &ActorRef<PipelineActor>) -> Result<()> {
        let incumbent = self.spawn(index, self.seats.get(index + 1).cloned(), pipeline).await;
        started(&incumbent.actor).await?;
        self.clocks[index].add_restart();
        self.seats[index].pass_on(incumbent);
        self.join(index).await;
        self.join(index + 1).await;
        Ok(())
    }

    /// Has a stage that was given up go on where its devices wait for each other, and waits up to `patience` for it to free what it
    /// holds, beside which the next one may find no room. Whether it has. It then goes on with numbers that are none.
    ///
    /// # Panics
    /// Where what it is at is not known to be lost.
    pub(crate) async fn let_out(&self, index: usize, patience: Duration) -> bool {
        let at_work = self.seats[index].incumbent().at_work;
        let Some(Hung { micro_batch }) = at_work.hung() else { return false };
        let exits = at_work.take_exits();
        if exits.is_empty() {
            return false;
        }
        assert!(micro_batch.is_none_or(|id| self.lost.contains(id)), "{micro_batch:?} may yet count");
        exits.iter().for_each(GroupExit::leave);
        let has_freed = tokio::time::timeout(patience, at_work.freed()).await.is_ok()
            && exits.iter().all(|exit| exit.has_freed_within(Duration::ZERO));
        if !has_freed {
            tracing::warn!("stage {} was let out, and still holds what it had", self.number(index));
        }
        has_freed
    }

    /// Tells the stage before this one where its process is; those of one process find each other by their seats.
    async fn join(&self, index: usize) {
        if let (Some(seat), Some(before)) = (self.seats.get(index), index.checked_sub(1))
            && let Some(address) = seat.incumbent().address.get()
        {
            // Where it is gone, it will be told once it is there again.
            let _ = self.seats[before].incumbent().actor.tell(Join(*address)).await;
        }
    }

    async fn spawn(&self, index: usize, next: Option<Seat>, pipeline: &ActorRef<PipelineActor>) -> Incumbent {
        let (at_work, address) = (Arc::new(AtWork::default()), Arc::new(OnceLock::new()));
        let hops = self.clocks[index].hops();
        let tokens: Recipient<Tokens> = pipeline.clone().recipient();
        let tokens = tokens.downgrade(); // Weak, so that a ring of actors can end.
        let source = match &self.loads[index] {
            StageLoad::Thread(load) => StageSource::Thread {
                load: Arc::clone(load),
                next: match next {
                    Some(seat) => Next::Stage(Box::new(InProcess { seat, hops: Some(hops) })),
                    None => Next::Pipeline(Box::new(tokens)),
                },
            },
            StageLoad::Process(args) => StageSource::Process {
                args: Arc::clone(args),
                ends: ProcessEnds { hops, tokens, address: Arc::clone(&address), is_first: index == 0 },
            },
        };
        let args = StageArgs {
            index: self.number(index),
            num_stages: self.len(),
            source,
            meter: self.clocks[index].new_life(),
            at_work: Arc::clone(&at_work),
            lost: self.lost.clone(),
        };
        let mailbox = mailbox::bounded(stage::mailbox_size(self.len()));
        let actor = StageActor::spawn_link_with_mailbox(pipeline, args, mailbox).await;
        Incumbent { actor, at_work, address }
    }

    /// The number by which the job knows a stage.
    pub(crate) fn number(&self, index: usize) -> usize {
        self.first_stage + index
    }

    pub(crate) fn len(&self) -> usize {
        self.loads.len()
    }

    /// The way to the first stage.
    pub(crate) fn first(&self) -> InProcess {
        InProcess { seat: self.seats[0].clone(), hops: None }
    }

    /// Which stage this actor is, if it is one that still sits in its seat.
    pub(crate) fn index_of(&self, actor: ActorId) -> Option<usize> {
        self.seats.iter().position(|seat| seat.incumbent().actor.id() == actor)
    }

    /// Over what this stage's device thread was given up, if it was.
    pub(crate) fn hung(&self, index: usize) -> Option<Hung> {
        self.seats[index].incumbent().at_work.hung()
    }

    /// Whether its stages are processes of their own.
    pub(crate) fn are_processes(&self) -> bool {
        self.loads.iter().any(|load| matches!(load, StageLoad::Process(_)))
    }

    pub(crate) fn lost(&self) -> &Lost {
        &self.lost
    }

    /// Says at once that micro-batches before this one are lost, also to stages in processes: a GPU may wait for what a stage that
    /// is gone has not sent, and may not go on before that is known.
    pub(crate) async fn lose_all_before(&self, next: MicroBatchId) {
        self.lost.all_before(next);
        if self.are_processes() {
            for seat in &self.seats {
                let _ = seat.incumbent().actor.tell(MoreIsLost).await; // It may be the one that has ended.
            }
        }
    }

    pub(crate) fn clocks(&self) -> Vec<Arc<StageClock>> {
        self.clocks.clone()
    }

    /// Waits until each stage is joined to the next, and has nothing left of what was lost; false when one has ended meanwhile.
    ///
    /// Only then may micro-batches be issued: a stage has no way for them before, and mailboxes have room for one pipeline full of
    /// them.
    pub(crate) async fn flush(&self) -> bool {
        for seat in &self.seats {
            let actor = seat.incumbent().actor;
            let (flush, flushed) = Flush::new();
            let is_flushed = actor.tell(flush).await.is_ok()
                && tokio::select! {
                    flushed = flushed => flushed.is_ok(),
                    () = actor.wait_for_shutdown() => false,
                };
            if !is_flushed {
                return false;
            }
        }
        true
    }

    /// Ends every stage that takes longer than this for one step, until it is dropped itself. The pipeline
    /// hears of it as of any other end.
    pub(crate) fn watch(&self, step_timeout: Duration) -> Watchdog {
        let seats = self.seats.clone();
        Watchdog(tokio::spawn(async move {
            let mut ticks = tokio::time::interval(step_timeout / 8);
            loop {
                ticks.tick().await;
                for Incumbent { actor, at_work, .. } in seats.iter().map(Seat::incumbent) {
                    if at_work.give_up_after(step_timeout) {
                        actor.kill();
                    }
                }
            }
        }))
    }
}

/// Looks for stages that hang; see [`StageSet::watch`].
pub(crate) struct Watchdog(tokio::task::JoinHandle<()>);

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn started(actor: &ActorRef<StageActor>) -> Result<()> {
    actor.wait_for_startup_with_result(|result| result.map_err(startup_error)).await
}

fn startup_error(error: kameo::error::HookError<&crate::stage::StageEnd>) -> Error {
    match error {
        kameo::error::HookError::Error(end) => end.error.clone(),
        kameo::error::HookError::Panicked(_) => Error::Ended("a stage"),
    }
}
