//! Pipelines of stages that compute next to nothing, and jobs for them.

use std::collections::VecDeque;
use std::slice::from_ref;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use jobs::{ModelText, ModelTextOptions, Order, OutputFolder, Preparer, Reader, RowOptions, SamplingOptions};
use scheduler::{Failure, MicroBatch, MicroBatchId, MicroBatchOutput, Slice, SliceOutput, Span};
use stages::{Activations, Arrival, Collected, GroupExit, Queued, Stage, StageOutput};

use crate::job::{JobOptions, JobOutcome, JobProgress, run_job};
use crate::stage_set::StageLoad;
use crate::start::{Limits, Pipeline, StageLoads, start_stages};

/// What may go wrong before a step, told the stage, its step and the micro-batch.
pub(super) type Trouble = Arc<dyn Fn(usize, usize, &MicroBatch) + Send + Sync>;

/// What a stage does from when it is loaded until it takes micro-batches, told its index.
pub(super) type Settling = Arc<dyn Fn(usize) + Send + Sync>;

/// A stage that passes a number on instead of activations, or makes a token of it.
struct Probe {
    index: usize,
    is_first: bool,
    is_last: bool,
    /// Of all lives of the stage.
    steps: Arc<AtomicUsize>,
    trouble: Trouble,
    step_time: Duration,
    settling: Settling,
    is_ahead: bool,
    /// Micro-batches that were queued, and the last stage's answers, up to the last one that was collected.
    queued: VecDeque<(MicroBatchId, Option<MicroBatchOutput>)>,
    num_collected: usize,
    /// When the last one will have been computed.
    done: Instant,
    calls: Calls,
    /// Out of what it waits in; what it computes when it has been let out is wrong.
    exit: Option<GroupExit>,
    _memory: Option<Held>,
}

/// A device's memory, which has room for one stage.
#[derive(Clone, Default)]
struct Memory(Arc<AtomicBool>);

/// What a stage has of it.
struct Held(Memory);

impl Memory {
    fn hold(&self) -> Held {
        assert!(!self.0.swap(true, Ordering::SeqCst), "a device holds the stage before still");
        Held(self.clone())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // A moment in which another may come too early.
        std::thread::sleep(Duration::from_millis(50));
        self.0.0.store(false, Ordering::SeqCst);
    }
}

/// What probes were asked for, each by its index: `true` for a micro-batch that was queued, `false` for one that was collected.
pub(super) type Calls = Arc<Mutex<Vec<(usize, bool, MicroBatchId)>>>;

impl Stage for Probe {
    // Asked for when it is loaded, before it is given anything to do.
    fn exits(&self) -> Vec<GroupExit> {
        (self.settling)(self.index);
        self.exit.iter().cloned().collect()
    }

    fn is_ahead(&self) -> bool {
        self.is_ahead
    }

    fn queue(
        &mut self,
        batch: &Arc<MicroBatch>,
        input: Option<&Activations>,
    ) -> stages::Result<Option<Queued>> {
        let mut known = MicroBatch::clone(batch);
        for slice in &mut known.slices {
            if let Some(fed_back) = slice.fed_back {
                let (id, output) = self.queued.back().expect("another was queued before");
                assert_eq!(*id, fed_back.micro_batch, "tokens are those of the micro-batch before");
                let output = output.as_ref().expect("a stage that is the whole model draws");
                slice.tokens[0] = output.slices[fed_back.slice].token.unwrap_or_default();
            }
        }
        // As a device: it is at it from now on, or from when it is done with the one before.
        let step_time = std::mem::take(&mut self.step_time);
        let (activations, output) = match self.step(&known, input.cloned())? {
            StageOutput::Activations(activations) => (Some(activations), None),
            StageOutput::Tokens(output) => (None, Some(output)),
        };
        self.step_time = step_time;
        let done = self.done.max(Instant::now()) + step_time;
        self.done = done;
        self.calls.lock().unwrap().push((self.index, true, batch.id));
        self.queued.push_back((batch.id, output));
        let arrival = Arrival::when(move || {
            std::thread::sleep(done.saturating_duration_since(Instant::now()));
            Ok(())
        });
        Ok(Some(Queued { activations, arrival }))
    }

    fn collect(&mut self) -> stages::Result<Collected> {
        // The last one is kept: the next may begin with its tokens.
        if self.num_collected > 0 {
            self.queued.pop_front();
        }
        self.num_collected = 1;
        let (id, output) = self.queued.front().expect("a micro-batch was queued").clone();
        self.calls.lock().unwrap().push((self.index, false, id));
        Ok(Collected { output, device_time: None })
    }

    fn step(&mut self, batch: &MicroBatch, input: Option<Activations>) -> stages::Result<StageOutput> {
        assert_eq!(input.is_none(), self.is_first, "only the first stage is given no activations");
        let step = self.steps.fetch_add(1, Ordering::SeqCst);
        let has_left = || self.exit.as_ref().is_some_and(GroupExit::has_left);
        let was_inside = !has_left();
        (self.trouble)(self.index, step, batch);
        let is_wrong = was_inside && has_left();
        std::thread::sleep(self.step_time);
        if !self.is_last {
            return Ok(StageOutput::Activations(Activations {
                values: vec![0.0; batch.num_tokens()].into(),
                sums: None,
                hidden: 1,
            }));
        }
        let answer = |slice: &Slice| SliceOutput {
            sequence: slice.sequence,
            // Any function of the last token and its position will do: a chunk has the same as a step.
            token: slice.sample.then(|| {
                let last = slice.tokens.last().expect("a slice has tokens") + u32::from(is_wrong);
                (last * 31 + slice.first_position + slice.tokens.len() as u32) % 90 + 5
            }),
            logprobs: None,
            prompt_logprobs: Vec::new(),
            failure: (slice.request.prompt[0] == NOT_FINITE)
                .then_some(Failure::NonFiniteLogits { position: slice.first_position }),
        };
        Ok(StageOutput::Tokens(MicroBatchOutput {
            id: batch.id,
            slices: batch.slices.iter().map(answer).collect(),
        }))
    }
}

/// A prompt that begins with it has logits that are not finite.
pub(super) const NOT_FINITE: u32 = 95;

/// A prompt that begins with it ends its stage, where a test wants that.
pub(super) const DEADLY: u32 = 96;

/// A pipeline of probes under construction.
pub(super) struct World {
    pub(super) num_stages: usize,
    /// What may go wrong in each step of a stage.
    pub(super) trouble: Trouble,
    pub(super) loads: Arc<AtomicUsize>,
    pub(super) most_loads: usize,
    pub(super) step_time: Duration,
    pub(super) settling: Settling,
    pub(super) step_timeout: Duration,
    pub(super) feeds_back: bool,
    /// Whether stages begin with a micro-batch before they are done with the one before.
    pub(super) is_ahead: bool,
    pub(super) calls: Calls,
    /// Out of what each stage may wait in. Its device then has room for one stage.
    pub(super) exit: Option<GroupExit>,
}

impl World {
    pub(super) fn new(num_stages: usize) -> Self {
        World {
            num_stages,
            trouble: Arc::new(|_, _, _| {}),
            loads: Arc::default(),
            most_loads: usize::MAX,
            step_time: Duration::ZERO,
            settling: Arc::new(|_| {}),
            step_timeout: Duration::from_secs(60),
            feeds_back: false,
            is_ahead: false,
            calls: Calls::default(),
            exit: None,
        }
    }

    /// A lone stage whose tokens are fed back.
    pub(super) fn feeding_back() -> Self {
        World { feeds_back: true, ..World::ahead(1) }
    }

    /// Stages whose devices work beside their hosts.
    pub(super) fn ahead(num_stages: usize) -> Self {
        World { is_ahead: true, ..World::new(num_stages) }
    }

    /// `trouble` is told stage, step and micro-batch before each step.
    pub(super) fn with(self, trouble: impl Fn(usize, usize, &MicroBatch) + Send + Sync + 'static) -> Self {
        World { trouble: Arc::new(trouble), ..self }
    }

    pub(super) async fn start(&self) -> Pipeline {
        let World { feeds_back, is_ahead, .. } = *self;
        self.start_with(scheduler::Options { feeds_back, is_ahead, ..options(self.num_stages) }).await
    }

    pub(super) async fn start_with(&self, options: scheduler::Options) -> Pipeline {
        let load = |index: usize| -> StageLoad {
            let (is_first, is_last) = (index == 0, index + 1 == self.num_stages);
            let (steps, step_time) = (Arc::<AtomicUsize>::default(), self.step_time);
            let (loads, most_loads, is_ahead) = (Arc::clone(&self.loads), self.most_loads, self.is_ahead);
            let (trouble, calls) = (Arc::clone(&self.trouble), Arc::clone(&self.calls));
            let settling = Arc::clone(&self.settling);
            let (exit, memory) = (self.exit.clone(), Memory::default());
            StageLoad::Thread(Arc::new(move || {
                assert!(loads.fetch_add(1, Ordering::SeqCst) < most_loads, "a planted panic while loading");
                let (steps, trouble, calls) = (Arc::clone(&steps), Arc::clone(&trouble), Arc::clone(&calls));
                let (queued, num_collected) = (VecDeque::new(), 0);
                Ok(Box::new(Probe {
                    index,
                    is_first,
                    is_last,
                    steps,
                    trouble,
                    step_time,
                    settling: Arc::clone(&settling),
                    is_ahead,
                    queued,
                    num_collected,
                    done: Instant::now(),
                    calls,
                    _memory: exit.is_some().then(|| memory.hold()),
                    exit: exit.clone(),
                }) as Box<dyn Stage>)
            }))
        };
        let parts = (0..self.num_stages).map(|i| Span { start: i, end: i + 1 }.into()).collect();
        let loads = (0..self.num_stages).map(load).collect();
        let limits = Limits { window: WINDOW, step_timeout: self.step_timeout };
        start_stages(StageLoads { first_stage: 0, loads, parts }, options, limits, None)
            .await
            .expect("probes load")
    }
}

pub(super) const WINDOW: usize = 8;

pub(super) fn options(num_stages: usize) -> scheduler::Options {
    scheduler::Options {
        num_stages,
        micro_batch_tokens: 16,
        max_sequences: 4,
        num_pages: 16,
        num_lanes: 1,
        page_tokens: 8,
        context_tokens: 64,
        efficient_tokens: 1,
        num_memories: 1,
        feeds_back: false,
        is_ahead: false,
    }
}

/// A job of so many rows of token ids, in a folder of its own.
pub(super) struct Files {
    pub(super) folder: tempfile::TempDir,
}

impl Files {
    pub(super) fn with_rows(rows: usize) -> Self {
        Self::with_prompts((0..rows as u32).map(|i| vec![1 + i % 80, 7]))
    }

    pub(super) fn with_prompts(prompts: impl Iterator<Item = Vec<u32>>) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let line = |(i, prompt): (usize, Vec<u32>)| {
            let body = format!(r#"{{"prompt": {prompt:?}, "max_tokens": 9}}"#);
            format!(r#"{{"custom_id": "{i}", "method": "POST", "url": "/v1/completions", "body": {body}}}"#)
        };
        let lines: Vec<String> = prompts.enumerate().map(line).collect();
        std::fs::write(folder.path().join("input.jsonl"), lines.join("\n")).expect("write the input");
        Files { folder }
    }

    pub(super) fn options(&self, num_stages: usize) -> JobOptions {
        let empty = self.folder.path().join("model");
        std::fs::create_dir_all(&empty).expect("make a folder");
        let text = ModelTextOptions { vocab_size: 100, eos_token_ids: vec![], unix_seconds: 0 };
        let text = ModelText::open(&empty, &text).expect("a model without text files");
        let rows = RowOptions {
            model_identity: "probe".into(),
            prompt: None,
            grader: None,
            sampling: SamplingOptions::default(),
            seed: 0,
            max_context_tokens: 64,
        };
        let preparer = Preparer::new(Arc::new(text), rows).expect("plain options");
        let output = OutputFolder::open(&self.folder.path().join("out"), false).expect("an output folder");
        let begun = output.begin(Order::Input, &preparer.settings(), 0, false);
        let (writer, finished) = begun.expect("a folder of the same job");
        let input = self.folder.path().join("input.jsonl");
        JobOptions {
            guides: None,
            reader: Reader::open(&input, preparer, None).expect("the input").after(finished),
            writer,
            tokenizer: None,
            created: 0,
            limits: options(num_stages),
            max_error_rate: 1.0,
            checkpoint_tokens: 4,
            progress: Arc::new(JobProgress::default()),
        }
    }

    pub(super) fn output_lines(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.folder.path().join("out/output.jsonl")).expect("output");
        text.lines().map(str::to_owned).collect()
    }
}

/// Runs a job on a pipeline of each world.
pub(super) async fn run_on_replicas(worlds: &[World], files: &Files) -> JobOutcome {
    let mut pipelines = Vec::new();
    for world in worlds {
        pipelines.push(world.start().await);
    }
    let options = files.options(worlds[0].num_stages);
    run_job(&pipelines, options, std::future::pending()).await.expect("the job ends in order")
}

pub(super) async fn run(world: &World, files: &Files) -> JobOutcome {
    let pipeline = world.start().await;
    run_job(from_ref(&pipeline), files.options(world.num_stages), std::future::pending())
        .await
        .expect("the job ends in order")
}
