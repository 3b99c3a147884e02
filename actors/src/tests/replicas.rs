//! Several pipelines that share the rows of a job, and what becomes of the rows of one that fails.

use std::slice::from_ref;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::probes::*;
use super::{assert_same, undisturbed};
use crate::error::Error;
use crate::job::{JobOutcome, run_job};
use crate::start::Pipeline;

#[tokio::test(flavor = "multi_thread")]
async fn replicas_share_the_rows_and_change_no_byte() {
    let expected = undisturbed(300).await;
    for num_replicas in [2, 3] {
        let steps: Vec<Arc<AtomicUsize>> = (0..num_replicas).map(|_| Arc::default()).collect();
        let world = |steps: &Arc<AtomicUsize>| {
            let steps = Arc::clone(steps);
            let step_time = Duration::from_millis(1);
            World { step_time, ..World::new(2) }.with(move |_, _, _| {
                steps.fetch_add(1, Ordering::SeqCst);
            })
        };
        let worlds: Vec<World> = steps.iter().map(world).collect();
        let files = Files::with_rows(300);
        let outcome = run_on_replicas(&worlds, &files).await;
        assert!(outcome.failure.is_none(), "{:?}", outcome.failure);
        assert_same(&files.output_lines(), &expected);
        let steps: Vec<usize> = steps.iter().map(|steps| steps.load(Ordering::SeqCst)).collect();
        let total: usize = steps.iter().sum();
        assert!(steps.iter().all(|steps| 2 * num_replicas * steps > total), "not shared out: {steps:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_that_panics_in_one_replica_costs_no_row_and_no_byte() {
    let expected = undisturbed(200).await;
    let files = Files::with_rows(200);
    let worlds = [
        World::new(2),
        World::new(2).with(|at, step, _| assert!(at != 1 || step % 20 != 13, "a planted panic")),
    ];
    let outcome = run_on_replicas(&worlds, &files).await;
    assert!(outcome.failure.is_none() && outcome.failed_replicas.is_empty(), "{outcome:?}");
    assert_same(&files.output_lines(), &expected);
    assert!(worlds[1].loads.load(Ordering::SeqCst) > 2, "no stage was started again");
}

/// The job has ended in order, and one replica alone by a panic.
#[track_caller]
fn assert_panicked(expected: usize, outcome: &JobOutcome) {
    assert!(outcome.failure.is_none(), "{:?}", outcome.failure);
    match &outcome.failed_replicas[..] {
        [(replica, Error::Panic { .. })] => assert_eq!(*replica, expected),
        other => panic!("expected the panic of replica {expected}, found {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_fails_for_good_leaves_its_rows_to_the_others() {
    let expected = undisturbed(300).await;
    for broken in 0..3 {
        let files = Files::with_rows(300);
        let world = |replica: usize| match replica == broken {
            // In the middle of rows, some of whose tokens are kept already.
            true => World { most_loads: 2, ..World::new(2) }
                .with(|at, step, _| assert!(at != 1 || step < 25, "a planted panic")),
            false => World::new(2),
        };
        let outcome = run_on_replicas(&[world(0), world(1), world(2)], &files).await;
        assert_panicked(broken, &outcome);
        assert_same(&files.output_lines(), &expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_fails_with_its_last_replica_and_goes_on_in_the_next_run() {
    let expected = undisturbed(300).await;
    let files = Files::with_rows(300);
    let world = |last: usize| {
        World { most_loads: 1, ..World::new(1) }
            .with(move |_, step, _| assert!(step < last, "a planted panic"))
    };
    let outcome = run_on_replicas(&[world(20), world(50)], &files).await;
    assert!(matches!(outcome.failure, Some(Error::Panic { .. })), "{:?}", outcome.failure);
    assert_eq!(outcome.failed_replicas.len(), 1);
    let outcome = run_on_replicas(&[World::new(1), World::new(1)], &files).await;
    assert!(outcome.failure.is_none(), "{:?}", outcome.failure);
    assert_same(&files.output_lines(), &expected);
}

/// A pipeline that has ended, for good.
async fn ended() -> Pipeline {
    let world = World { most_loads: 1, ..World::new(1) }.with(|_, _, _| panic!("a planted panic"));
    let pipeline = world.start().await;
    let outcome = ended_soon(from_ref(&pipeline), &Files::with_rows(1)).await;
    assert!(matches!(outcome.failure, Some(Error::Panic { .. })), "{:?}", outcome.failure);
    pipeline.actor.wait_for_shutdown().await;
    pipeline
}

async fn ended_soon(pipelines: &[Pipeline], files: &Files) -> JobOutcome {
    let running = run_job(pipelines, files.options(1), std::future::pending());
    let ended = tokio::time::timeout(Duration::from_secs(60), running).await;
    ended.expect("nobody waits for ever").expect("the job ends in order")
}

/// As one whose stage cannot be loaded again while other replicas still load.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_has_ended_before_the_job_begins_gets_no_row() {
    let expected = undisturbed(100).await;
    for gone in 0..2 {
        let mut pipelines = vec![World::new(1).start().await];
        pipelines.insert(gone, ended().await);
        let files = Files::with_rows(100);
        let outcome = ended_soon(&pipelines, &files).await;
        assert_panicked(gone, &outcome);
        assert_same(&files.output_lines(), &expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_replicas_have_all_ended_before_it_begins_fails_at_once() {
    let files = Files::with_rows(100);
    let outcome = ended_soon(&[ended().await, ended().await], &files).await;
    assert!(matches!(outcome.failure, Some(Error::Panic { .. })), "{:?}", outcome.failure);
    assert_eq!(outcome.failed_replicas.len(), 1, "{:?}", outcome.failed_replicas);
    assert_eq!((outcome.written.output_lines, outcome.written.error_lines), (0, 0));
}
