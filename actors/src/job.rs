//! The job actor: feeds rows to a pipeline, or to several that are replicas of each other, and hands what comes back to the
//! writer.
//!
//! It carries events to [`JobState`], which decides, and decisions away from it. Files block, so a reader
//! and a writer thread stand beside it. Memory is bounded by credits: the reader takes one for each row it
//! hands over, and gets it back when the row's line goes to the writer. Rows that earlier runs have
//! finished pass by in bunches. A replica that fails for good leaves its rows to the others; the job fails with the
//! last of them.

mod rooms;
mod state;
pub(crate) mod threads;

use std::future::Future;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crossbeam::channel::{Sender, bounded};
use jobs::{
    FinishedRow, Guides, InputRecord, MAX_CHOICES, Reader, Row, StopMatcher, Tokenizer, Unread, Writer,
    Written,
};
use kameo::Actor;
use kameo::actor::{ActorId, ActorRef, PreparedActor, Recipient, WeakActorRef};
use kameo::error::{ActorStopReason, Infallible};
use kameo::mailbox;
use kameo::message::{Context, Message};
use tokio::sync::Semaphore;

pub(crate) use self::rooms::Rooms;
pub(crate) use self::state::{Fate, JobState, Submission, Unwritten};
pub(crate) use self::threads::LineMaker;
use crate::clock::PipelineClock;
use crate::error::{Error, Result, death_error};
use crate::guidance::Guiding;
use crate::link::is_delivered;
use crate::pipeline::{Checkpoint, Checkpoints, Completed, PipelineActor, Prompt};
use crate::start::Pipeline;

/// Checkpoints that may be under way at once, of a few thousand bytes each. One that finds no leave goes
/// with the next of its sequence.
const MAX_CHECKPOINTS: usize = 64;

/// Messages that can be under way to a job at once.
const fn mailbox_size(window: usize, replicas: usize) -> usize {
    let mut sum = 0;
    sum += replicas; // Word of their ends.
    sum += window * MAX_CHOICES as usize; // A row in flight on its way in, its completions, or a bunch.
    sum += MAX_CHECKPOINTS;
    sum += 1; // The end of the input.
    sum += 1; // The writer's last word.
    sum += 1; // An interrupt.
    sum
}

/// What a job works on.
pub struct JobOptions {
    /// Its rows.
    pub reader: Reader,
    /// Its lines.
    pub writer: Writer,
    /// Turns tokens into text, where the model has one.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// Follows the guides of rows, where the model has a tokenizer.
    pub guides: Option<Arc<Guides>>,
    /// When the job's first run began, in Unix seconds: its answers were created then.
    pub created: u64,
    /// What a pipeline takes; a row beyond it becomes an error line.
    pub limits: scheduler::Options,
    /// The job stops once error lines are more than this share of the rows finished or in flight.
    pub max_error_rate: f64,
    /// Every so many tokens of a row are kept, so that another run goes on from them.
    pub checkpoint_tokens: usize,
    /// Is told how far the job is.
    pub progress: Arc<JobProgress>,
}

/// How far a job is; the job writes, anybody reads.
#[derive(Debug, Default)]
pub struct JobProgress {
    /// Rows with an answer.
    pub completed: AtomicU64,
    /// Rows with an error line.
    pub failed: AtomicU64,
    /// Rows of these that earlier runs have finished.
    pub resumed: AtomicU64,
    /// Prompt tokens of the rows that this run has answered.
    pub prompt_tokens: AtomicU64,
    /// Tokens that this run has generated for them.
    pub generated_tokens: AtomicU64,
    /// CPU time of the thread that reads, renders and tokenizes rows, in nanoseconds.
    pub reader_cpu_ns: AtomicU64,
    /// CPU time of the thread that detokenizes answers and writes lines, in nanoseconds.
    pub writer_cpu_ns: AtomicU64,
}

/// How a job ended.
#[derive(Debug)]
pub struct JobOutcome {
    /// What was read; nothing where the reader had not come to an end.
    pub input: Option<InputRecord>,
    /// What was written.
    pub written: Written,
    /// Somebody asked it to stop before its end.
    pub was_interrupted: bool,
    /// What stopped it, if it failed.
    pub failure: Option<Error>,
    /// The replicas that have failed while others went on, and why.
    pub failed_replicas: Vec<(usize, Error)>,
}

/// Runs a job to its end on replicas of a pipeline, or until `interrupt` resolves: then no further row is started, rows in
/// flight are given up, and the lines that are there are made whole.
///
/// # Errors
/// Only where the job could not even end in order; a job that failed says so in its outcome.
pub async fn run_job(
    pipelines: &[Pipeline],
    options: JobOptions,
    interrupt: impl Future<Output = ()>,
) -> Result<JobOutcome> {
    pipelines.iter().flat_map(|pipeline| &pipeline.stage_clocks).for_each(|clock| clock.begin());
    let window = pipelines.iter().map(|pipeline| pipeline.window).sum();
    options.guides.iter().for_each(|guides| guides.keep(window));
    let prepared = PreparedActor::<JobActor>::new(mailbox::bounded(mailbox_size(window, pipelines.len())));
    let job = prepared.actor_ref().clone();
    let (mut replicas, mut gone) = (Vec::new(), Vec::new());
    for (replica, Pipeline { actor, clock, .. }) in pipelines.iter().enumerate() {
        job.link(actor).await;
        // A link tells of no end that came before it. A mailbox closes under the lock that links are made under: word of the
        // end will come, or it is closed by now, or both.
        if !actor.is_alive() {
            gone.push((replica, end_of(actor).await));
        }
        replicas.push(Replica { pipeline: actor.clone(), clock: Arc::clone(clock) });
    }
    let rooms = Rooms::new(pipelines.iter().map(|pipeline| pipeline.window));
    let args = JobArgs { options, replicas, gone, rooms, window };
    let mut running = prepared.spawn(args);
    let ended = tokio::select! {
        ended = &mut running => ended,
        () = interrupt => {
            // A job that has just ended does not hear this, and need not.
            let _ = job.tell(Interrupt).send().await;
            running.await
        }
    };
    match ended {
        Ok(Ok((job, _))) => Ok(job.into_outcome()),
        Ok(Err(_)) | Err(_) => Err(Error::Ended("the job")),
    }
}

/// What has ended a pipeline.
async fn end_of(pipeline: &ActorRef<PipelineActor>) -> Error {
    match pipeline.wait_for_shutdown_result().await {
        Ok(reason) => death_error(&reason),
        Err(_) => Error::Ended("the pipeline"),
    }
}

struct JobArgs {
    options: JobOptions,
    replicas: Vec<Replica>,
    /// Replicas that have ended before the job began, and why.
    gone: Vec<(usize, Error)>,
    rooms: Rooms,
    /// Of all replicas together.
    window: usize,
}

struct Replica {
    pipeline: ActorRef<PipelineActor>,
    clock: Arc<PipelineClock>,
}

struct JobActor {
    state: JobState,
    replicas: Vec<Replica>,
    tokenizer: Option<Arc<Tokenizer>>,
    guides: Option<Arc<Guides>>,
    checkpoints: Checkpoints,
    /// Gives the reader leave for another row; gone once no further row is wanted.
    credits: Option<Sender<()>>,
    /// To the writer; gone once the last line is on its way.
    lines: Option<Sender<Unwritten>>,
    written: Written,
    was_interrupted: bool,
    failure: Option<Error>,
    failed_replicas: Vec<(usize, Error)>,
}

/// The reader hands over a row.
struct RowRead(Row);

/// The reader has come by rows that have their lines already.
struct RowsFinished(Vec<FinishedRow>);

/// The reader is done; what has become of finished rows that it did not come by.
struct InputEnded(Result<(InputRecord, Unread)>);

/// The writer is done.
struct LinesEnded {
    written: Written,
    failure: Option<Error>,
}

/// The user wants to stop.
struct Interrupt;

impl Actor for JobActor {
    type Args = JobArgs;
    type Error = Infallible;

    async fn on_start(args: JobArgs, job: ActorRef<Self>) -> std::result::Result<Self, Infallible> {
        let JobArgs { options, replicas, gone, rooms, window } = args;
        let JobOptions { reader, writer, tokenizer, guides, created, limits, .. } = options;
        let (credits, leave) = bounded(window);
        for () in std::iter::repeat_n((), window) {
            credits.try_send(()).expect("a new channel of that size has room");
        }
        let (lines, unwritten) = bounded(window);
        threads::spawn_reader(reader, leave, job.clone(), Arc::clone(&options.progress));
        let make = LineMaker { tokenizer: tokenizer.clone(), created };
        threads::spawn_writer(writer, unwritten, make, job.clone(), Arc::clone(&options.progress));
        let keeper: Recipient<Checkpoint> = job.clone().recipient();
        let leave = Arc::new(Semaphore::new(MAX_CHECKPOINTS));
        let mut actor = JobActor {
            state: JobState::new(limits, rooms, options.max_error_rate, options.progress),
            replicas,
            tokenizer,
            guides,
            checkpoints: Checkpoints { keeper, leave, every: options.checkpoint_tokens },
            credits: Some(credits),
            lines: Some(lines),
            written: Written::default(),
            was_interrupted: false,
            failure: None,
            failed_replicas: Vec::new(),
        };
        gone.into_iter().for_each(|(replica, error)| actor.give_up(replica, error, &job));
        Ok(actor)
    }

    async fn on_link_died(
        &mut self,
        job: WeakActorRef<Self>,
        id: ActorId,
        reason: ActorStopReason,
    ) -> std::result::Result<ControlFlow<ActorStopReason>, Infallible> {
        let error = death_error(&reason);
        let replica = self.replicas.iter().position(|replica| replica.pipeline.id() == id);
        match (replica, job.upgrade()) {
            // All that it had sent has come before: a mailbox keeps the order of each sender.
            (Some(replica), Some(job)) => self.give_up(replica, error, &job),
            _ => self.fail(error),
        }
        Ok(ControlFlow::Continue(())) // Until the writer has made its lines whole.
    }
}

impl JobActor {
    fn into_outcome(self) -> JobOutcome {
        let JobActor { state, written, was_interrupted, failure, failed_replicas, .. } = self;
        JobOutcome { input: state.into_input(), written, was_interrupted, failure, failed_replicas }
    }

    /// Leaves the rows of a replica that has ended to the others, where there are any. What it has sent was heard before: a row that it
    /// has answered may not be handed out again.
    fn give_up(&mut self, replica: usize, error: Error, job: &ActorRef<Self>) {
        if self.failed_replicas.iter().any(|(failed, _)| *failed == replica) {
            return; // Both words of its end have come.
        }
        if !self.state.replica_failed(replica) {
            return self.fail(error);
        }
        tracing::warn!("replica {replica} is given up, others take its rows: {error}");
        self.failed_replicas.push((replica, error));
        self.hand_out(job);
    }

    /// Submits rows that wait for room, where there is some; not when no answer is wanted any more.
    fn hand_out(&mut self, job: &ActorRef<Self>) {
        if self.lines.is_some() {
            self.state.hand_out().into_iter().for_each(|submission| self.submit(submission, job));
        }
    }

    fn submit(&self, submission: Submission, job: &ActorRef<Self>) {
        let Submission { replica, tag, request, so_far, is_kept } = submission;
        let stop = (self.tokenizer.as_ref())
            .filter(|_| !request.sampling.stop.is_empty())
            .map(|tokenizer| StopMatcher::after(Arc::clone(tokenizer), &request.sampling, &so_far.tokens));
        let guiding = (self.guides.as_ref())
            .zip(request.sampling.guide.as_ref())
            .map(|(guides, guide)| Guiding { guides: Arc::clone(guides), guide: guide.clone() });
        let completed = job.clone().recipient();
        let checkpoints = is_kept.then(|| self.checkpoints.clone());
        let prompt = Prompt { tag, request, so_far, stop, guiding, completed, sampled: None, checkpoints };
        // Of a pipeline that is gone word is on its way, behind all that it has sent: see `run_job`.
        is_delivered(self.replicas[replica].pipeline.tell(prompt).try_send());
    }

    /// Sends what a row has become to the writer, and lets the reader read on.
    fn write(&mut self, unwritten: Unwritten) {
        self.send(unwritten);
        if let Some(credits) = &self.credits {
            let _ = credits.try_send(());
        }
        if let Some(error) = self.state.too_many_failed() {
            self.fail(error);
        }
        self.finish_when_done();
    }

    fn send(&self, unwritten: Unwritten) {
        if let Some(lines) = &self.lines {
            // Full where the disk is slower than the pipeline: then the pipeline has to wait.
            let _ = tokio::task::block_in_place(|| lines.send(unwritten));
        }
    }

    fn finish_when_done(&mut self) {
        if self.lines.is_some()
            && let Some(end) = self.state.end()
        {
            self.send(end);
            self.finish();
        }
    }

    /// Wants no more rows and no more lines; the writer's last word ends the actor.
    fn finish(&mut self) {
        self.credits = None;
        self.lines = None;
    }

    fn fail(&mut self, error: Error) {
        self.failure.get_or_insert(error);
        self.finish();
    }
}

impl Message<RowRead> for JobActor {
    type Reply = ();

    async fn handle(&mut self, RowRead(row): RowRead, ctx: &mut Context<Self, ()>) {
        match self.state.row(row) {
            Fate::Submit(submissions) => {
                submissions.into_iter().for_each(|submission| self.submit(submission, ctx.actor_ref()));
            }
            Fate::Write(unwritten) => self.write(unwritten),
        }
    }
}

impl Message<RowsFinished> for JobActor {
    type Reply = ();

    async fn handle(&mut self, RowsFinished(rows): RowsFinished, _: &mut Context<Self, ()>) {
        let unwritten = self.state.finished(rows);
        self.write(unwritten);
    }
}

impl Message<Completed> for JobActor {
    type Reply = ();

    async fn handle(&mut self, Completed { tag, completion }: Completed, ctx: &mut Context<Self, ()>) {
        if let Some(unwritten) = self.state.completed(tag, completion) {
            self.write(unwritten);
            self.hand_out(ctx.actor_ref());
        }
    }
}

impl Message<Checkpoint> for JobActor {
    type Reply = ();

    async fn handle(&mut self, checkpoint: Checkpoint, _: &mut Context<Self, ()>) {
        let Checkpoint { tag, first, piece, _leave } = checkpoint;
        let unwritten = self.state.checkpoint(tag, first, piece);
        self.send(unwritten);
    }
}

impl Message<InputEnded> for JobActor {
    type Reply = ();

    async fn handle(&mut self, InputEnded(input): InputEnded, _: &mut Context<Self, ()>) {
        self.replicas.iter().for_each(|replica| replica.clock.set_input_read());
        match input {
            Ok((record, unread)) => {
                self.state.input_ended(record, unread);
                self.finish_when_done();
            }
            Err(error) => self.fail(error),
        }
    }
}

impl Message<LinesEnded> for JobActor {
    type Reply = ();

    async fn handle(&mut self, ended: LinesEnded, ctx: &mut Context<Self, ()>) {
        self.written = ended.written;
        if let Some(error) = ended.failure {
            self.fail(error);
        }
        ctx.stop();
    }
}

impl Message<Interrupt> for JobActor {
    type Reply = ();

    async fn handle(&mut self, _: Interrupt, _: &mut Context<Self, ()>) {
        self.was_interrupted = self.lines.is_some();
        self.finish();
    }
}
