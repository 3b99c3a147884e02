//! Several pipelines over one job: one output, the same bytes, and figures of each.

use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::disturbed::{
    MODEL, SMALL, assert_as_run_of, assert_as_undisturbed, assert_done, assert_refused, row, stderr, stdout,
};
use crate::harness::{Job, fixture, read_json, spanwise};

fn rows(count: usize) -> Vec<String> {
    (0..count).map(row).collect()
}

/// So many replicas of so many stages, each on a device of its own name.
fn replicas(job: Job, replicas: usize, stages: usize) -> Job {
    let devices: Vec<String> = (0..replicas * stages).map(|device| format!("cpu:{device}")).collect();
    job.set(format!("pipeline.replicas={replicas}")).set(format!("pipeline.devices={devices:?}"))
}

fn with_faults(job: &Job, faults: &str) -> Output {
    let plain = job.command();
    let mut command = Command::new(plain.get_program());
    command.args(["--faults", faults]).args(plain.get_args());
    for (name, _) in plain.get_envs() {
        command.env_remove(name);
    }
    command.output().expect("start spanwise")
}

fn manifest(job: &Job) -> Value {
    read_json(&job.out().join("manifest.json"))
}

#[test]
fn a_fault_in_one_replica_changes_no_byte() {
    let rows = rows(300);
    let undisturbed = Job::on(SMALL).lines(rows.clone());
    for (fault, restarted) in [
        ("stage1@20:panic", Some(1)),
        ("stage2@20:panic", Some(2)),
        ("seed=3,stage3@1/40:panic", Some(3)),
        ("stage2@15:hang", Some(2)),
    ] {
        let job = replicas(Job::on(SMALL).lines(rows.clone()), 2, 2).set("pipeline.step_timeout_seconds=1");
        let output = with_faults(&job, fault);
        assert_done(&output);
        assert_as_run_of(&job.out(), &undisturbed);
        let stages = manifest(&job)["stages"].as_array().unwrap().clone();
        let restarts = |stage: usize| stages[stage]["restarts"].as_u64().unwrap();
        let others = (0..4).filter(|stage| Some(*stage) != restarted).map(restarts).sum::<u64>();
        assert!(restarts(restarted.unwrap()) > 0 && others == 0, "{fault}: {stages:?}");
    }
}

#[test]
fn a_job_that_is_killed_goes_on_with_another_number_of_replicas() {
    let rows = rows(200);
    let job = replicas(Job::on(MODEL).lines(rows.clone()), 2, 1).set("pipeline.max_sequences=6");
    for kill in [30, 60] {
        // Slow, so that some rows are committed before.
        let output = with_faults(&job, &format!("stage1@{kill}:kill,stage0@1/2:slow,stage1@1/2:slow"));
        assert!(!output.status.success(), "it was not killed: {}", stdout(&output));
    }
    let one = ["--set", "pipeline.replicas=1"];
    let output = job.run_once(&["--limit", "150"]);
    assert_done(&output);
    assert!(stdout(&output).contains("by earlier runs"), "no run got anywhere:\n{}", stdout(&output));
    assert_done(&job.run_once(&one));
    assert_as_undisturbed(&job.out(), &rows);
}

#[test]
fn each_replica_is_in_the_report_the_manifest_and_the_trace() {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace.json");
    let job = replicas(Job::on(MODEL).lines(rows(120)), 2, 2).set("pipeline.max_sequences=16");
    let output = job.run_once(&["--trace", trace.to_str().unwrap()]);
    assert_done(&output);
    let report = stdout(&output);
    for line in ["stage 0   replica 0 cpu:0 blocks [0, ", "stage 3   replica 1 cpu:3 blocks ["] {
        assert!(report.contains(line), "{line:?} is not in\n{report}");
    }
    let manifest = manifest(&job);
    let (stages, planned) = (&manifest["stages"], &manifest["plan"]["stages"]);
    assert_eq!((manifest["plan"]["replicas"].as_u64(), stages.as_array().unwrap().len()), (Some(2), 4));
    let names = |stages: &Value| -> Vec<(u64, String)> {
        let name = |stage: &Value| {
            (stage["replica"].as_u64().unwrap(), stage["device"].as_str().unwrap().to_owned())
        };
        stages.as_array().unwrap().iter().map(name).collect()
    };
    let expected = [(0, "cpu:0"), (0, "cpu:1"), (1, "cpu:2"), (1, "cpu:3")].map(|(r, d)| (r, d.to_owned()));
    assert_eq!((names(stages), names(planned)), (expected.to_vec(), expected.to_vec()));
    assert_eq!((&stages[0]["blocks"], &stages[1]["blocks"]), (&stages[2]["blocks"], &stages[3]["blocks"]));
    // The rows are shared out.
    let tokens = |stage: usize| stages[stage]["tokens"].as_u64().unwrap();
    assert!(tokens(0) == tokens(1) && tokens(2) == tokens(3), "{stages}");
    assert!(tokens(0).max(tokens(2)) < 2 * tokens(0).min(tokens(2)), "{stages}");
    assert!(stages.as_array().unwrap().iter().all(|stage| stage["predicted_seconds"].as_f64() > Some(0.0)));
    let events: Value = read_json(&trace);
    let events = events.as_array().unwrap();
    let steps =
        |stage: usize| events.iter().filter(|event| event["ph"] == "X" && event["tid"] == stage).count();
    for (stage, record) in stages.as_array().unwrap().iter().enumerate() {
        assert_eq!(record["micro_batches"].as_u64(), Some(steps(stage) as u64));
    }
    let is_named = |event: &Value| {
        event["args"]["name"].as_str().is_some_and(|name| name.starts_with("replica 1 stage 2 cpu:2"))
    };
    assert!(events.iter().any(is_named), "{events:?}");
}

/// A stage of two ranks sums in the same order in every replica. How its ranks share attention is planned for the rows that a
/// replica has in flight, and decides last bits: as many in both.
#[test]
fn replicas_of_stages_of_several_devices_write_the_same_bytes() {
    let job = |count: usize| {
        let job = replicas(Job::on(MODEL).lines(rows(60)), count, 2).set("pipeline.tensor_parallel=[2]");
        job.set(format!("pipeline.max_sequences={}", 16 * count)).run().ok().sorted_lines()
    };
    assert!(job(1) == job(2), "one replica and two");
}

#[test]
fn more_rows_fail_in_no_replica_s_pool() {
    // What a pool of two pages can hold is the same for each replica.
    let body = json!({"prompt": "long", "max_tokens": 150, "ignore_eos": true});
    let long = crate::harness::batch_line("long", "/v1/completions", &body);
    let lines = |count: usize| {
        let job = replicas(Job::on(MODEL).lines(rows(20)).line(long.clone()), count, 1);
        job.set("pipeline.kv_cache_tokens=128").run().ok().sorted_lines()
    };
    let expected = lines(1);
    assert!(expected.iter().any(|line| line.contains("context_length_exceeded")), "{expected:?}");
    assert!(expected == lines(2), "one replica and two");
}

#[test]
fn replicas_that_cannot_be_run_are_refused() {
    let job = || Job::on(MODEL).lines(rows(1));
    for (job, words) in [
        (job().set("pipeline.replicas=0"), "expected an integer of at least 1"),
        (
            job().set("pipeline.replicas=2"),
            "1 device in pipeline.devices for 2 replicas, expected as many devices for each replica",
        ),
        (
            replicas(job(), 2, 2).set("pipeline.stages=[[0, 2], [2, 4], [4, 6], [6, 8]]"),
            "4 block ranges in pipeline.stages for 2 devices in pipeline.devices for each replica",
        ),
        (
            replicas(job(), 2, 2).set("pipeline.tensor_parallel=[2, 2]"),
            "takes 4 devices for 2 devices in pipeline.devices for each replica, expected as many",
        ),
    ] {
        assert_refused(&job.run_once(&[]), &[words]);
    }
}

/// A model and a machine on which two pipelines are faster than one of two stages: by an estimate, hops cost time.
#[test]
fn a_faster_layout_of_replicas_is_told_to_be_pasted() {
    let job = Job::on(MODEL).lines(rows(40)).set("pipeline.devices=[\"cpu:0\", \"cpu:1\"]");
    let output = job.run_once(&[]);
    assert_done(&output);
    let text = stderr(&output);
    let hint = text.lines().find_map(|line| line.strip_prefix("stages: replicas = 2, "));
    let hint = hint.unwrap_or_else(|| panic!("no replicas in\n{text}"));
    let (layout, _) = hint.split_once(" would be ").expect("it says how much faster");
    let (devices, stages) = layout.split_once(" and ").expect("devices and stages");
    let toml = format!("[pipeline]\nreplicas = 2\n{devices}\n{stages}\n");
    let pasted = Job::on(MODEL).lines(rows(40)).toml(&toml);
    let output = pasted.run_once(&[]);
    assert_done(&output);
    assert!(!stderr(&output).contains("would be"), "{}", stderr(&output));
    assert_as_undisturbed(&pasted.out(), &rows(40));
}

/// The speed of a job's own stages, by a plan.
fn given_speed(devices: &[&str], replicas: usize) -> f64 {
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().join("job.toml");
    let toml = format!(
        "[model]\npath = {:?}\n[pipeline]\nsimd = \"portable\"\nreplicas = {replicas}\ndevices = {devices:?}\n\
         stages = [[0, 5], [5, 11]]\n[plan]\nprompt_tokens = 64\noutput_tokens = 64\n",
        fixture(MODEL)
    );
    std::fs::write(&path, toml).unwrap();
    let output = spanwise().arg("plan").arg(&path).args(["--format", "json"]).output().unwrap();
    assert_done(&output);
    let plan: Value = serde_json::from_slice(&output.stdout).unwrap();
    plan["given_stages"]["tokens_per_second"].as_f64().unwrap_or_else(|| panic!("{plan}"))
}

#[test]
fn a_plan_counts_all_replicas_of_the_job_s_own_stages() {
    let one = given_speed(&["cpu:0", "cpu:1"], 1);
    let two = given_speed(&["cpu:0", "cpu:1", "cpu:2", "cpu:3"], 2);
    assert!((two / one - 2.0).abs() < 1e-9, "{one} and {two} tokens/s");
}
