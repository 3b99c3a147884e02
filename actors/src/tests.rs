//! Whole pipelines of probe stages: what the actors do when a stage works, fails, or is in the way.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use jobs::{ModelText, ModelTextOptions, Order, OutputFolder, Preparer, Reader, RowOptions, SamplingOptions};
use scheduler::{MicroBatch, MicroBatchOutput, Slice, SliceOutput, Span};
use stages::{Activations, Stage, StageOutput};

use crate::device_thread::LoadStage;
use crate::error::Error;
use crate::job::{JobOptions, JobOutcome, JobProgress, catch, run_job};
use crate::start::{Pipeline, start_stages};

/// A stage that passes a number on instead of activations, or makes a token of it.
struct Probe {
    is_first: bool,
    is_last: bool,
    steps: Arc<AtomicUsize>,
    fails_at: Option<usize>,
    step_time: Duration,
}

impl Stage for Probe {
    fn step(&mut self, batch: &MicroBatch, input: Option<Activations>) -> stages::Result<StageOutput> {
        assert_eq!(input.is_none(), self.is_first, "only the first stage is given no activations");
        let step = self.steps.fetch_add(1, Ordering::SeqCst);
        assert_ne!(Some(step), self.fails_at, "a planted panic");
        std::thread::sleep(self.step_time);
        if !self.is_last {
            return Ok(StageOutput::Activations(Activations {
                values: vec![0.0; batch.num_tokens()],
                hidden: 1,
            }));
        }
        let answer = |slice: &Slice| SliceOutput {
            sequence: slice.sequence,
            // Any function of what the slice computes will do.
            token: slice.sample.then(|| (slice.tokens.iter().sum::<u32>() + slice.first_position) % 90 + 5),
            logprobs: None,
            prompt_logprobs: Vec::new(),
            failure: None,
        };
        Ok(StageOutput::Tokens(MicroBatchOutput {
            id: batch.id,
            slices: batch.slices.iter().map(answer).collect(),
        }))
    }
}

/// A pipeline of probes under construction.
struct World {
    num_stages: usize,
    fails_at: Option<(usize, usize)>,
    step_time: Duration,
}

impl World {
    fn new(num_stages: usize) -> Self {
        World { num_stages, fails_at: None, step_time: Duration::ZERO }
    }

    async fn start(&self) -> Pipeline {
        let load = |index: usize| -> LoadStage {
            let probe = Probe {
                is_first: index == 0,
                is_last: index + 1 == self.num_stages,
                steps: Arc::default(),
                fails_at: self.fails_at.filter(|&(stage, _)| stage == index).map(|(_, step)| step),
                step_time: self.step_time,
            };
            Box::new(move || Ok(Box::new(probe) as Box<dyn Stage>))
        };
        let spans = (0..self.num_stages).map(|i| Span { start: i, end: i + 1 }).collect();
        let loads = (0..self.num_stages).map(load).collect();
        start_stages(loads, spans, limits(self.num_stages), 8).await.expect("probes load")
    }
}

fn limits(num_stages: usize) -> scheduler::Options {
    scheduler::Options {
        num_stages,
        micro_batch_tokens: 16,
        max_sequences: 4,
        num_pages: 16,
        page_tokens: 8,
        context_tokens: 64,
        efficient_tokens: 1,
    }
}

/// A job of so many rows of token ids, in a folder of its own.
struct Files {
    folder: tempfile::TempDir,
}

impl Files {
    fn with_rows(rows: usize) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let line = |i: usize| {
            format!(
                r#"{{"custom_id": "{i}", "method": "POST", "url": "/v1/completions", "body": {{"prompt": [{}, 7], "max_tokens": 9}}}}"#,
                1 + i % 80
            )
        };
        let lines: Vec<String> = (0..rows).map(line).collect();
        std::fs::write(folder.path().join("input.jsonl"), lines.join("\n")).expect("write the input");
        Files { folder }
    }

    fn options(&self, num_stages: usize) -> JobOptions {
        let empty = self.folder.path().join("model");
        std::fs::create_dir_all(&empty).expect("make a folder");
        let text = ModelTextOptions { vocab_size: 100, eos_token_ids: vec![], unix_seconds: 0 };
        let text = ModelText::open(&empty, &text).expect("a model without text files");
        let rows = RowOptions {
            model_identity: "probe".into(),
            prompt: None,
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
            reader: Reader::open(&input, preparer, None).expect("the input").after(finished),
            writer,
            tokenizer: None,
            limits: limits(num_stages),
            max_error_rate: 1.0,
            progress: Arc::new(JobProgress::default()),
        }
    }

    fn output_lines(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.folder.path().join("out/output.jsonl")).expect("output");
        text.lines().map(str::to_owned).collect()
    }
}

async fn run(world: &World, files: &Files) -> JobOutcome {
    let pipeline = world.start().await;
    run_job(&pipeline, files.options(world.num_stages), std::future::pending())
        .await
        .expect("the job ends in order")
}

#[tokio::test(flavor = "multi_thread")]
async fn every_row_comes_back_once_over_any_number_of_stages() {
    for num_stages in [1, 2, 4] {
        let files = Files::with_rows(100);
        let outcome = run(&World::new(num_stages), &files).await;
        assert!(outcome.failure.is_none(), "{:?}", outcome.failure);
        assert_eq!((outcome.written.output_lines, outcome.written.error_lines), (100, 0));
        assert_eq!(outcome.input.expect("read to the end").rows, 100);
        let lines = files.output_lines();
        for (i, line) in lines.iter().enumerate() {
            assert!(line.contains(&format!(r#""custom_id":"{i}""#)), "line {i} is {line}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_that_panics_fails_the_job_and_leaves_whole_lines() {
    for stage in 0..3 {
        let files = Files::with_rows(200);
        let world = World { fails_at: Some((stage, 40)), ..World::new(3) };
        let outcome = run(&world, &files).await;
        match outcome.failure {
            Some(Error::Panic { stage: found, message }) => {
                assert_eq!(found, stage);
                assert!(message.contains("a planted panic"), "{message}");
            }
            other => panic!("expected the panic of stage {stage}, found {other:?}"),
        }
        let lines = files.output_lines();
        assert_eq!(lines.len() as u64, outcome.written.output_lines);
        assert!(lines.iter().all(|line| line.ends_with('}')), "a torn line");

        let outcome = run(&World::new(3), &files).await;
        assert!(outcome.failure.is_none(), "{:?}", outcome.failure);
        let after = files.output_lines();
        assert_eq!(after.len(), 200, "the next run does the rest");
        assert!(lines.iter().all(|line| after.contains(line)), "what was done is kept");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_bunch_of_finished_rows_passes_by_in_order() {
    let files = Files::with_rows(3000);
    run(&World::new(1), &files).await;
    let before = files.output_lines();
    let options = files.options(1);
    let progress = Arc::clone(&options.progress);
    let pipeline = World::new(1).start().await;
    let outcome = run_job(&pipeline, options, std::future::pending()).await.expect("the job ends in order");
    assert!(outcome.failure.is_none(), "{:?}", outcome.failure);
    assert_eq!(progress.resumed.load(Ordering::Relaxed), 3000);
    assert_eq!((files.output_lines(), outcome.written.output_lines), (before, 3000));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_that_cannot_load_is_named() {
    let panics = || -> LoadStage { Box::new(|| panic!("a planted panic while loading")) };
    let spans = vec![Span { start: 0, end: 1 }];
    match start_stages(vec![panics()], spans, limits(1), 8).await {
        Err(Error::Panic { stage: 0, message }) => assert!(message.contains("while loading"), "{message}"),
        Err(other) => panic!("found {other:?}"),
        Ok(_) => panic!("a stage that panics while loading was started"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupt_ends_a_job_between_rows() {
    let files = Files::with_rows(10_000);
    let world = World { step_time: Duration::from_millis(2), ..World::new(2) };
    let pipeline = world.start().await;
    let interrupt = tokio::time::sleep(Duration::from_millis(300));
    let outcome = run_job(&pipeline, files.options(2), interrupt).await.expect("the job ends in order");
    assert!(outcome.was_interrupted && outcome.failure.is_none());
    assert!((1..10_000).contains(&outcome.written.output_lines), "{:?}", outcome.written);
    assert_eq!(files.output_lines().len() as u64, outcome.written.output_lines);
}

#[test]
fn a_panic_beside_the_job_becomes_its_failure() {
    let caught = catch(|| panic!("a planted panic"));
    assert!(matches!(caught, Err::<(), _>(Error::Files(message)) if message.contains("a planted panic")));
}
