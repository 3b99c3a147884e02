//! Whole pipelines of probe stages: what the actors do when a stage works, fails, or is in the way.

pub(crate) mod emulated;
mod probes;
mod replicas;

use std::collections::HashMap;
use std::slice::from_ref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use scheduler::{MicroBatchId, Slice, Span};
use stages::GroupExit;

use crate::clock::StageParts;
use crate::error::Error;
use crate::job::threads::catch;
use crate::job::{JobOptions, run_job};
use crate::stage_set::StageLoad;
use crate::start::{Limits, Pipeline, StageLoads, start_stages};
use probes::*;

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
async fn a_lone_stage_that_feeds_back_is_given_the_next_micro_batch_before_its_answer_is_known() {
    let expected = undisturbed(100).await;
    let files = Files::with_rows(100);
    let world = World { step_time: Duration::from_millis(10), ..World::feeding_back() };
    let outcome = run(&world, &files).await;
    assert!(outcome.failure.is_none(), "{:?}", outcome.failure);
    assert_same(&files.output_lines(), &expected);
    // Where rows come late, a micro-batch may find none behind it.
    assert!(share_ahead(&world, 0) > 0.75, "{}", share_ahead(&world, 0));
}

/// Of a stage's micro-batches those behind which the next one was queued before they were collected.
fn share_ahead(world: &World, stage: usize) -> f64 {
    let calls = world.calls.lock().unwrap();
    let order: Vec<_> = calls.iter().filter(|call| call.0 == stage).map(|call| (call.1, call.2)).collect();
    let next = |id: MicroBatchId| MicroBatchId(id.0 + 1);
    let is_before = |first, second| {
        let at = |what| order.iter().position(|event| *event == what);
        at(first).zip(at(second)).is_some_and(|(first, second)| first < second)
    };
    let collected: Vec<MicroBatchId> =
        order.iter().filter(|(is_queued, _)| !is_queued).map(|(_, id)| *id).collect();
    assert!(collected.is_sorted(), "micro-batches come to an end in the order of issue");
    let ahead = collected.iter().filter(|id| is_before((true, next(**id)), (false, **id))).count();
    ahead as f64 / collected.len() as f64
}

/// The second stage takes twice as long as the first one, and so has the next micro-batch when it begins with one.
#[tokio::test(flavor = "multi_thread")]
async fn stages_whose_devices_work_beside_their_hosts_are_given_the_next_micro_batch_meanwhile() {
    let expected = undisturbed(100).await;
    let files = Files::with_rows(100);
    let world = World { step_time: Duration::from_millis(5), ..World::ahead(2) };
    let world = world.with(|stage, _, _| std::thread::sleep(Duration::from_millis(5 * stage as u64)));
    let outcome = run(&world, &files).await;
    assert!(outcome.failure.is_none(), "{:?}", outcome.failure);
    assert_same(&files.output_lines(), &expected);
    assert!(share_ahead(&world, 1) > 0.5, "{}", share_ahead(&world, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lone_stage_that_feeds_back_and_panics_now_and_then_costs_no_row_and_no_byte() {
    let expected = undisturbed(200).await;
    let files = Files::with_rows(200);
    let world = World::feeding_back().with(move |_, step, _| {
        let (window, place) = (step / 20, step % 20);
        assert!(window >= 20 || place != 7 * window % 20, "a planted panic");
    });
    let outcome = run(&world, &files).await;
    assert!(outcome.failure.is_none(), "{:?}", outcome.failure);
    assert_same(&files.output_lines(), &expected);
    assert!(world.loads.load(Ordering::SeqCst) > 10, "it was started again");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_row_that_ends_a_stage_which_is_ahead_is_set_apart() {
    for world in [World::feeding_back(), World::ahead(3)] {
        let prompts = (0..60).map(|i| vec![if i == 23 { DEADLY } else { 1 + i % 80 }, 7]);
        let files = Files::with_prompts(prompts);
        let last = world.num_stages - 1;
        let world = world.with(move |stage, _, batch| {
            let end = |slice: &Slice| slice.first_position as usize + slice.tokens.len();
            let is_deadly = |slice: &Slice| slice.request.prompt[0] == DEADLY && end(slice) > 4;
            assert!(stage < last || !batch.slices.iter().any(is_deadly), "a planted panic");
        });
        let outcome = run(&world, &files).await;
        assert!(outcome.failure.is_none(), "{:?}", outcome.failure);
        assert_eq!((outcome.written.output_lines, outcome.written.error_lines), (59, 1));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_that_cannot_be_started_again_fails_the_job_and_leaves_whole_lines() {
    for stage in 0..3 {
        let files = Files::with_rows(200);
        let world = World { most_loads: 3, ..World::new(3) }
            .with(move |at, step, _| assert_ne!((at, step), (stage, 40), "a planted panic"));
        let outcome = run(&world, &files).await;
        match outcome.failure {
            Some(Error::Panic { stage: found, message }) => {
                assert_eq!(found, stage);
                assert!(message.contains("a planted panic while loading"), "{message}");
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
    let outcome =
        run_job(from_ref(&pipeline), options, std::future::pending()).await.expect("the job ends in order");
    assert!(outcome.failure.is_none(), "{:?}", outcome.failure);
    assert_eq!(progress.resumed.load(Ordering::Relaxed), 3000);
    assert_eq!((files.output_lines(), outcome.written.output_lines), (before, 3000));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_that_cannot_load_is_named() {
    let panics = || StageLoad::Thread(Arc::new(|| panic!("a planted panic while loading")));
    let parts = vec![Span { start: 0, end: 1 }.into()];
    let limits = Limits { window: WINDOW, step_timeout: Duration::from_secs(60) };
    let stages = StageLoads { first_stage: 0, loads: vec![panics()], parts };
    match start_stages(stages, options(1), limits, None).await {
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
    let outcome =
        run_job(from_ref(&pipeline), files.options(2), interrupt).await.expect("the job ends in order");
    assert!(outcome.was_interrupted && outcome.failure.is_none());
    assert!((1..10_000).contains(&outcome.written.output_lines), "{:?}", outcome.written);
    assert_eq!(files.output_lines().len() as u64, outcome.written.output_lines);
}

#[test]
fn a_panic_beside_the_job_becomes_its_failure() {
    let caught = catch(|| panic!("a planted panic"));
    assert!(matches!(caught, Err::<(), _>(Error::Files(message)) if message.contains("a planted panic")));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_micro_batch_is_issued_before_every_stage_takes_them() {
    let [has_settled, is_early] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
    let (settled, early) = (Arc::clone(&has_settled), Arc::clone(&is_early));
    let settling: Settling = Arc::new(move |stage| {
        if stage == 2 {
            std::thread::sleep(Duration::from_millis(300));
            settled.store(true, Ordering::SeqCst);
        }
    });
    let world = World { settling, ..World::new(3) }.with(move |_, _, _| {
        early.fetch_or(!has_settled.load(Ordering::SeqCst), Ordering::SeqCst);
    });
    let files = Files::with_rows(5);
    let outcome = run(&world, &files).await;
    assert!(outcome.failure.is_none(), "{:?}", outcome.failure);
    assert_eq!(files.output_lines().len(), 5);
    assert!(!is_early.load(Ordering::SeqCst), "a step before the last stage took any");
}

/// The lines of an undisturbed run.
async fn undisturbed(rows: usize) -> Vec<String> {
    let files = Files::with_rows(rows);
    run(&World::new(1), &files).await;
    files.output_lines()
}

#[track_caller]
fn assert_same(found: &[String], expected: &[String]) {
    for (found, expected) in found.iter().zip(expected) {
        assert_eq!(found, expected, "another line than that of a calm run");
    }
    assert_eq!(found.len(), expected.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_that_panics_now_and_then_costs_no_row_and_no_byte() {
    let expected = undisturbed(200).await;
    for stage in 0..3 {
        let files = Files::with_rows(200);
        // One panic in every 20 steps, 20 times, each time at another place.
        let is_ahead = stage == 1;
        let world = World { is_ahead, ..World::new(3) }.with(move |at, step, _| {
            let (window, place) = (step / 20, step % 20);
            assert!(at != stage || window >= 20 || place != 7 * window % 20, "a planted panic");
        });
        let outcome = run(&world, &files).await;
        assert!(outcome.failure.is_none(), "{:?}", outcome.failure);
        assert_same(&files.output_lines(), &expected);
        let restarts = world.loads.load(Ordering::SeqCst) - 3;
        assert!(restarts >= 20, "{restarts} restarts of stage {stage} alone");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn poison_rows_are_error_lines_and_no_others_are() {
    let expected = undisturbed(300).await;
    let poison =
        [(20, DEADLY, "ends_stage"), (21, DEADLY, "ends_stage"), (22, NOT_FINITE, "non_finite_logits")];
    let again = [(180, NOT_FINITE, "non_finite_logits"), (299, DEADLY, "ends_stage")];
    let poison: HashMap<u32, (u32, &str)> =
        poison.into_iter().chain(again).map(|(row, token, code)| (row, (token, code))).collect();
    let too_long = 100;
    let prompt = |row: u32| match poison.get(&row) {
        Some(&(token, _)) => vec![token, 7],
        None if row == too_long => vec![1; 70],
        None => vec![1 + row % 80, 7],
    };
    let files = Files::with_prompts((0..300).map(prompt));
    let world = World::new(2).with(|stage, _, batch| {
        let mut begun = batch.slices.iter().filter(|slice| slice.first_position == 0);
        assert!(stage != 1 || !begun.any(|slice| slice.tokens[0] == DEADLY), "a planted panic");
    });
    let outcome = run(&world, &files).await;
    assert!(outcome.failure.is_none(), "{:?}", outcome.failure);
    let errors = std::fs::read_to_string(files.folder.path().join("out/errors.jsonl")).expect("errors");
    assert_eq!(errors.lines().count(), 6, "{errors}");
    let code = |row: &u32| poison.get(row).map_or("context_length_exceeded", |&(_, code)| code);
    for row in poison.keys().chain([&too_long]) {
        let id = format!(r#""custom_id":"{row}""#);
        let line =
            errors.lines().find(|line| line.contains(&id)).unwrap_or_else(|| panic!("{row}: {errors}"));
        assert!(line.contains(&format!(r#""code":"{}""#, code(row))), "{line}");
    }
    let is_good = |row: u32| !poison.contains_key(&row) && row != too_long;
    let good = (0..).zip(expected).filter(|&(row, _)| is_good(row)).map(|(_, line)| line);
    assert_same(&files.output_lines(), &good.collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn many_poison_rows_side_by_side_do_not_stop_a_job() {
    let files = Files::with_prompts((0..80).map(|row| match row {
        10..40 => vec![DEADLY, 7],
        _ => vec![1 + row, 7],
    }));
    let world = World::new(2).with(|stage, _, batch| {
        let mut begun = batch.slices.iter().filter(|slice| slice.first_position == 0);
        assert!(stage != 0 || !begun.any(|slice| slice.tokens[0] == DEADLY), "a planted panic");
    });
    let outcome = run(&world, &files).await;
    assert!(outcome.failure.is_none(), "{:?}", outcome.failure);
    assert_eq!((outcome.written.output_lines, outcome.written.error_lines), (50, 30));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_fails_for_good_makes_no_error_lines() {
    let files = Files::with_rows(100);
    let world = World::new(2).with(|stage, step, _| assert!(stage == 0 || step < 30, "a planted panic"));
    let outcome = run(&world, &files).await;
    assert!(matches!(outcome.failure, Some(Error::GivenUp { .. })), "{:?}", outcome.failure);
    assert_eq!(outcome.written.error_lines, 0);
    let outcome = run(&World::new(2), &files).await;
    assert!(outcome.failure.is_none(), "{:?}", outcome.failure);
    assert_eq!((outcome.written.output_lines, outcome.written.error_lines), (100, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_that_hangs_is_started_again() {
    let expected = undisturbed(60).await;
    for stage in 0..2 {
        let files = Files::with_rows(60);
        let timeout = Duration::from_millis(200);
        let world = World { step_timeout: timeout, ..World::new(2) }.with(move |at, step, _| {
            if (at, step) == (stage, 20) {
                std::thread::sleep(10 * timeout);
            }
        });
        let outcome = run(&world, &files).await;
        assert!(outcome.failure.is_none(), "{:?}", outcome.failure);
        assert_eq!(world.loads.load(Ordering::SeqCst), 3, "one restart");
        assert_same(&files.output_lines(), &expected);
    }
}

/// As a stage does whose GPUs wait for each other: let out, it goes on at once, with numbers that are none, and frees its memory.
#[tokio::test(flavor = "multi_thread")]
async fn a_stage_that_waits_in_a_group_is_let_out_when_what_it_is_at_is_lost_and_before_the_next_one_comes() {
    let expected = undisturbed(60).await;
    for stage in 0..2 {
        let files = Files::with_rows(60);
        let exit = GroupExit::default();
        let world =
            World { step_timeout: Duration::from_millis(200), exit: Some(exit.clone()), ..World::new(2) };
        let world = world.with(move |at, step, _| {
            let begun = Instant::now();
            while (at, step) == (stage, 20) && !exit.has_left() {
                assert!(begun.elapsed() < Duration::from_secs(30), "nobody lets it out");
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let outcome = run(&world, &files).await;
        assert!(outcome.failure.is_none(), "{:?}", outcome.failure);
        assert_eq!(world.loads.load(Ordering::SeqCst), 3, "one restart");
        assert_same(&files.output_lines(), &expected);
    }
}

/// What a busy machine may put between two lines of a test.
const SLACK: Duration = Duration::from_millis(50);

/// The shares of each stage's wall time, after insisting that the parts are all of it.
fn parts_of(pipeline: &Pipeline, began: Instant) -> Vec<StageParts> {
    let longest = began.elapsed();
    let parts: Vec<StageParts> = pipeline.stage_clocks.iter().map(|clock| clock.read().parts).collect();
    let most = began.elapsed();
    for parts in &parts {
        let is_all = parts.wall() <= most && parts.wall() + SLACK >= longest;
        assert!(is_all, "{parts:?} of {longest:?}");
    }
    parts
}

async fn timed(world: &World, files: &Files, limits: scheduler::Options) -> Vec<StageParts> {
    let pipeline = world.start_with(limits.clone()).await;
    let options = JobOptions { limits, ..files.options(world.num_stages) };
    let began = Instant::now();
    let outcome =
        run_job(from_ref(&pipeline), options, std::future::pending()).await.expect("the job ends in order");
    assert!(outcome.failure.is_none(), "{:?}", outcome.failure);
    parts_of(&pipeline, began)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_stage_starves_the_other() {
    let slow = Duration::from_millis(8);
    let world = World::new(2).with(move |stage, _, _| {
        if stage == 1 {
            std::thread::sleep(slow);
        }
    });
    let parts = timed(&world, &Files::with_rows(40), options(2)).await;
    let wall = parts[0].wall();
    assert!(parts[0].starved > wall.mul_f64(0.5), "{:?}", parts[0]);
    assert!(parts[1].busy > wall.mul_f64(0.5) && parts[1].starved < wall.mul_f64(0.3), "{:?}", parts[1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn too_few_pages_limit_a_pipeline_to_half_of_its_stages() {
    // Two tokens and nine more are two pages of eight: one row at a time, and one stage of the two.
    let world = World { step_time: Duration::from_millis(4), ..World::new(2) };
    let parts = timed(&world, &Files::with_rows(20), scheduler::Options { num_pages: 2, ..options(2) }).await;
    for parts in parts {
        assert!(parts.kv_limited > parts.wall().mul_f64(0.3), "{parts:?}");
        assert!(parts.tail < parts.wall().mul_f64(0.2), "{parts:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lone_row_is_all_tail() {
    let world = World { step_time: Duration::from_millis(10), ..World::new(2) };
    let parts = timed(&world, &Files::with_rows(1), options(2)).await;
    for parts in parts {
        assert!(parts.tail > parts.busy.mul_f64(0.5), "{parts:?}");
        assert_eq!(parts.kv_limited, Duration::ZERO, "{parts:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_that_is_started_again_keeps_its_counts_and_was_idle_meanwhile() {
    let lost = Duration::from_millis(100);
    let world = World::new(2).with(move |stage, step, _| {
        if (stage, step) == (1, 10) {
            std::thread::sleep(lost);
            panic!("a planted panic");
        }
    });
    let files = Files::with_rows(40);
    let (pipeline, options) = (world.start().await, files.options(2));
    let began = Instant::now();
    run_job(from_ref(&pipeline), options, std::future::pending()).await.expect("the job ends in order");
    let parts = parts_of(&pipeline, began);
    let times = pipeline.stage_clocks[1].read();
    assert!(times.steps > 10 && times.restarts == 1, "{times:?}");
    assert_eq!(times.loads.iter().map(|step| step.steps).sum::<u64>(), times.steps);
    assert!(parts[1].idle >= lost && times.in_steps == parts[1].busy, "{times:?}");
}
