//! What a run says of its stages when it is over: where their time went, each step, and what would have been better.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::disturbed::{MODEL, row};
use crate::harness::{Job, read_json};

const TWO_STAGES: &str =
    "[pipeline]\ndevices = [\"cpu:0\", \"cpu:1\"]\nvirtual_stages = \"off\"\nmicro_batch_tokens = 16\n";

/// Steps of a trace by stage, as begin and length in nanoseconds, tokens and decode tokens.
fn steps(trace: &Path) -> BTreeMap<u64, Vec<[u64; 4]>> {
    let events: Vec<Value> = serde_json::from_slice(&std::fs::read(trace).unwrap()).unwrap();
    let mut stages: BTreeMap<u64, Vec<[u64; 4]>> = BTreeMap::new();
    for event in events.iter().filter(|event| event["ph"] == "X") {
        // Microseconds with three digits after the point are whole nanoseconds.
        let ns = |key: &str| (event[key].as_f64().unwrap() * 1e3).round() as u64;
        let arg = |key: &str| event["args"][key].as_u64().unwrap();
        let step = [ns("ts"), ns("dur"), arg("tokens"), arg("decode_tokens")];
        stages.entry(event["tid"].as_u64().unwrap()).or_default().push(step);
    }
    stages
}

#[test]
fn parts_of_a_stage_are_all_of_the_run_and_its_steps_are_in_the_trace() {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace.json");
    let job = Job::on(MODEL).lines((0..60).map(row)).toml(TWO_STAGES).arg("--trace");
    let done = job.arg(trace.to_str().unwrap()).run().ok();
    let manifest = read_json(&done.folder.path().join("out/manifest.json"));
    let run = manifest["timings"]["run_seconds"].as_f64().unwrap();
    let stages = manifest["stages"].as_array().unwrap();
    let steps = steps(&trace);
    assert_eq!((stages.len(), steps.len()), (2, 2));
    for (stage, steps) in stages.iter().zip(steps.values()) {
        let seconds = |part: &str| stage[format!("{part}_seconds")].as_f64().unwrap();
        let parts = ["busy", "starved", "blocked", "kv_limited", "tail", "idle"].map(seconds);
        let sum: f64 = parts.iter().sum();
        // Beside the parts are the moments before the first and after the last reading of a clock.
        assert!(sum <= run && sum > run - 0.1, "{parts:?} of {run}");
        assert!(parts[0] > 0.0 && seconds("predicted") > 0.0, "{stage}");

        assert_eq!(stage["micro_batches"], steps.len());
        assert_eq!(stage["tokens"], steps.iter().map(|step| step[2]).sum::<u64>());
        let busy = steps.iter().map(|step| step[1]).sum::<u64>() as f64 * 1e-9;
        assert!((busy - parts[0]).abs() < 1e-6, "{busy} s in the trace, {} s by the clock", parts[0]);
        assert!(steps.windows(2).all(|pair| pair[0][0] + pair[0][1] <= pair[1][0]), "steps overlap");
        assert!(steps.iter().all(|step| step[3] <= step[2]) && steps.iter().any(|step| step[3] > 0));
    }
    let num_steps: usize = steps.values().map(Vec::len).sum();
    for words in ["s by an estimate), ", "scheduling and stop strings took", &format!(", {num_steps} steps")]
    {
        assert!(done.stdout.contains(words), "{words:?} is not in\n{}", done.stdout);
    }
}

#[test]
fn a_cut_that_is_much_too_uneven_is_told_a_better_one_that_can_be_pasted() {
    let blocks = num_blocks();
    let given = format!("stages = [[0, {}], [{}, {blocks}]]\n", blocks - 1, blocks - 1);
    let job = Job::on(MODEL).lines((0..60).map(row)).toml(&format!("{TWO_STAGES}{given}"));
    let done = job.anew().run().ok();
    let hint = done.stdout.lines().find_map(|line| line.strip_prefix("hint:")).unwrap_or_else(|| {
        panic!("no hint in\n{}", done.stdout);
    });
    let (stages, _) = hint.split_once(" would be about ").expect("a hint says how much faster");
    let again = Job::on(MODEL).lines((0..3).map(row)).toml(&format!("{TWO_STAGES}{}\n", stages.trim()));
    let done = again.run().ok();
    let manifest = read_json(&done.folder.path().join("out/manifest.json"));
    assert!(manifest["stages"][0]["blocks"][1].as_u64().unwrap() < blocks - 1, "{stages}");
    assert_eq!(manifest["stages"][1]["blocks"][1], blocks);
    assert!(!done.stdout.contains("hint:"), "a few micro-batches say little:\n{}", done.stdout);
}

/// Blocks of the model.
fn num_blocks() -> u64 {
    let done = Job::on(MODEL).lines((0..1).map(row)).run().ok();
    let manifest = read_json(&done.folder.path().join("out/manifest.json"));
    manifest["stages"][0]["blocks"][1].as_u64().unwrap()
}

#[test]
fn a_run_that_is_interrupted_leaves_a_trace_that_can_be_read() {
    let endless = |i| {
        let body = json!({"prompt": "go on", "max_tokens": 400, "ignore_eos": true});
        crate::harness::batch_line(&format!("row-{i}"), "/v1/completions", &body)
    };
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace.json");
    let job = Job::on(MODEL).lines((0..5000).map(endless)).arg("--trace").arg(trace.to_str().unwrap());
    let mut child = job.command().stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let begun = Instant::now();
    while std::fs::metadata(&trace).map_or(0, |file| file.len()) < 10_000 {
        assert!(begun.elapsed() < Duration::from_secs(60), "no step was written");
        std::thread::sleep(Duration::from_millis(5));
    }
    let kill = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(steps(&trace)[&0].len() > 10);
}

#[test]
fn a_trace_that_cannot_be_written_is_found_before_anything_is_begun() {
    let job = Job::on(MODEL).lines((0..3).map(row)).arg("--trace").arg("no/such/folder/trace.json");
    let output = job.run_once(&[]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && stderr.contains("write trace no/such/folder"), "{stderr}");
    assert!(!job.out().join("output.jsonl").exists());
}
