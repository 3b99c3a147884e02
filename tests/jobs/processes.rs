//! Stages in processes of their own: the same bytes as on threads, whichever of them dies or hangs, and nobody left behind.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use ::stages::{Ffn, ModelConfig};
use serde_json::Value;

use crate::disturbed::{
    MODEL, SMALL, assert_as_run_of, assert_as_undisturbed, assert_done, row, stderr, stdout,
};
use crate::harness::{Job, devices, read_json};

fn rows(count: usize) -> Vec<String> {
    (0..count).map(row).collect()
}

/// So many stages in processes, each on a device of its own name.
fn processes(job: Job, stages: usize) -> Job {
    let devices: Vec<String> = (0..stages).map(|device| format!("cpu:{device}")).collect();
    job.set("pipeline.stages_run_in=processes").set(format!("pipeline.devices={devices:?}"))
}

fn stages(job: &Job) -> Vec<Value> {
    read_json(&job.out().join("manifest.json"))["stages"].as_array().expect("stages").clone()
}

#[test]
fn stages_in_processes_write_the_same_bytes_and_their_hops_are_told() {
    let rows = rows(120);
    let undisturbed = Job::on(MODEL).lines(rows.clone());
    for num_stages in [1, 2, 3] {
        let job = processes(Job::on(MODEL).lines(rows.clone()), num_stages);
        let output = job.run_once(&[]);
        assert_done(&output);
        assert_as_run_of(&job.out(), &undisturbed);
        let threads = Job::on(MODEL).lines(rows.clone()).set(devices(num_stages.min(2)));
        assert_done(&threads.run_once(&[]));
        for (index, stage) in stages(&job).iter().enumerate() {
            let number = |key: &str| stage[key].as_f64().unwrap();
            let (bytes, seconds) = (number("hop_bytes"), number("hop_seconds"));
            let is_last = index + 1 == num_stages;
            assert_eq!((bytes > 0.0, seconds > 0.0), (!is_last, !is_last), "{stage}");
            assert!(number("busy_seconds") > 0.0 && number("tokens") > 0.0, "{stage}");
            if !is_last {
                // The residual stream of 4 bytes a number, and what comes along.
                let of_threads = stages(&threads)[0]["hop_bytes"].as_f64().unwrap()
                    / stages(&threads)[0]["tokens"].as_f64().unwrap();
                assert!(bytes > of_threads * number("tokens") || num_stages > 2, "{stage}");
            }
        }
        assert_eq!(stdout(&output).matches("MB handed on in").count(), num_stages - 1, "{}", stdout(&output));
    }
}

#[test]
fn a_process_that_dies_panics_or_hangs_is_started_again_and_changes_no_byte() {
    let rows = rows(150);
    let undisturbed = Job::on(SMALL).lines(rows.clone());
    for (stage, fault) in [
        (0, "stage0@20:kill"),
        (1, "stage1@20:kill"),
        (2, "stage2@25:kill"),
        (1, "stage1@20:panic"),
        (1, "stage1@30:hang"),
    ] {
        let job = processes(Job::on(SMALL).lines(rows.clone()), 3).set("pipeline.step_timeout_seconds=2");
        let output = job.command_with_faults(fault).output().expect("start spanwise");
        assert_done(&output);
        let restarts: Vec<u64> =
            stages(&job).iter().map(|stage| stage["restarts"].as_u64().unwrap()).collect();
        let others: u64 = (0..3).filter(|other| *other != stage).map(|other| restarts[other]).sum();
        assert!(restarts[stage] > 0 && others == 0, "{fault}: {restarts:?}\n{}", stderr(&output));
        assert_as_run_of(&job.out(), &undisturbed);
    }
}

/// The processes that a process has started.
fn children(parent: u32) -> Vec<u32> {
    let listed =
        std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap_or_default();
    let all_tasks = || {
        let tasks = std::fs::read_dir(format!("/proc/{parent}/task")).into_iter().flatten().flatten();
        tasks
            .filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok())
            .collect::<Vec<_>>()
            .join(" ")
    };
    let listed = if listed.trim().is_empty() { all_tasks() } else { listed + " " + &all_tasks() };
    let mut found: Vec<u32> = listed.split_whitespace().filter_map(|pid| pid.parse().ok()).collect();
    found.sort_unstable();
    found.dedup();
    found
}

/// Whether a process is there and no zombie.
fn is_alive(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    status.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}

fn signal(name: &str, pid: u32) {
    assert!(Command::new("kill").args([name, &pid.to_string()]).status().unwrap().success());
}

/// Starts a job that takes a while, and waits until it has written lines.
fn begun(job: &Job) -> Child {
    let mut command = job.command_with_faults("stage0@1/6:slow");
    let output = job.out().join("output.jsonl");
    let length = || std::fs::metadata(&output).map_or(0, |file| file.len());
    let before = length();
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("start spanwise");
    wait_until("a line was written", || length() > before);
    child
}

#[track_caller]
fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(60), "not within a minute: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_process_that_is_stopped_or_killed_from_outside_is_noticed() {
    let rows = rows(150);
    let undisturbed = Job::on(MODEL).lines(rows.clone());
    for name in ["-KILL", "-STOP"] {
        let job = processes(Job::on(MODEL).lines(rows.clone()), 2)
            .set("pipeline.max_sequences=8")
            .set("pipeline.step_timeout_seconds=1");
        let child = begun(&job);
        let stages_there = children(child.id());
        assert_eq!(stages_there.len(), 2, "{stages_there:?}");
        signal(name, stages_there[0]);
        let output: Output = child.wait_with_output().expect("it ends");
        assert_done(&output);
        let restarts: u64 = stages(&job).iter().map(|stage| stage["restarts"].as_u64().unwrap()).sum();
        assert!(restarts > 0, "{name}: {}", stderr(&output));
        assert_as_run_of(&job.out(), &undisturbed);
        assert!(!stages_there.into_iter().any(is_alive), "{name}: a stage was left behind");
    }
}

#[test]
fn no_process_outlives_the_run_that_started_it() {
    let job = processes(Job::on(MODEL).lines(rows(150)), 2)
        .set("pipeline.tensor_parallel=[2, 1]")
        .set("pipeline.devices=[\"cpu:0\", \"cpu:1\", \"cpu:2\"]")
        .set("pipeline.ranks=processes")
        .set("pipeline.max_sequences=8");
    for name in ["-KILL", "-INT"] {
        let child = begun(&job);
        let stages_there = children(child.id());
        let ranks: Vec<u32> = stages_there.iter().flat_map(|stage| children(*stage)).collect();
        assert_eq!((stages_there.len(), ranks.len()), (2, 1), "{stages_there:?} {ranks:?}");
        signal(name, child.id());
        let output = child.wait_with_output().expect("it ends");
        assert!(!output.status.success());
        wait_until("all stages and ranks are gone", || {
            !stages_there.iter().chain(&ranks).any(|pid| is_alive(*pid))
        });
        let lines = std::fs::metadata(job.out().join("output.jsonl")).unwrap().len();
        assert!(lines > 0);
    }
    assert_done(&job.run_once(&[]));
    assert_as_run_of(&job.out(), &job.anew());
}

/// Whether a process has a thread of this name.
fn has_thread(pid: u32, name: &str) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let named =
        |path: &Path| std::fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.trim() == name);
    threads.into_iter().any(|thread| named(&thread.path()))
}

#[test]
fn a_rank_that_hangs_while_it_loads_does_not_outlive_the_run_either() {
    let job = processes(Job::on(MODEL).lines(rows(1)), 2)
        .set("pipeline.tensor_parallel=[2]")
        .set("pipeline.ranks=processes");
    let mut child = job.command_with_faults("load0.1@1:hang").spawn().expect("start spanwise");
    let stages_there = || children(child.id());
    let ranks = || -> Vec<u32> { stages_there().into_iter().flat_map(children).collect() };
    wait_until("a rank loads", || ranks().into_iter().any(|rank| has_thread(rank, "beats")));
    let (stages_there, ranks) = (stages_there(), ranks());
    signal("-KILL", child.id());
    child.wait().expect("it ends");
    wait_until("the stage and its rank are gone", || {
        !stages_there.iter().chain(&ranks).any(|pid| is_alive(*pid))
    });
}

#[test]
fn replicas_and_cut_ffns_run_in_processes_too() {
    let rows = rows(60);
    let (block, width) = widest(&crate::harness::fixture(MODEL));
    let num_blocks = ModelConfig::read(&crate::harness::fixture(MODEL)).unwrap().blocks.len();
    let place = format!("{block}:{}", width / 128 * 64);
    let job = processes(Job::on(MODEL).lines(rows.clone()), 4)
        .set("pipeline.replicas=2")
        .set(format!("pipeline.stages=[[0, \"{place}\"], [\"{place}\", {num_blocks}]]"));
    assert_done(&job.run_once(&[]));
    assert_as_undisturbed(&job.out(), &rows);
    assert_eq!(stages(&job).len(), 4);
}

/// The block of a model whose FFN is widest, and its width.
fn widest(model: &Path) -> (usize, usize) {
    let config = ModelConfig::read(model).unwrap();
    let width = |(index, block): (usize, &::stages::Block)| match block.ffn {
        Ffn::SwiGlu { width } => Some((width, index)),
        Ffn::Linear | Ffn::None => None,
    };
    let (width, index) = config.blocks.iter().enumerate().filter_map(width).max().expect("an FFN");
    (index, width)
}
