//! The other commands, and how a run is ended from outside.

use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::{Job, fixture, read_json, spanwise};

fn stdout(args: &[&str]) -> String {
    let output = spanwise().args(args).output().expect("start spanwise");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

#[test]
fn help_names_every_command() {
    let help = stdout(&["--help"]);
    for command in ["run", "status", "audit", "retry", "generate", "inspect", "plan", "profile", "bench"] {
        assert!(help.contains(command), "{help}");
        assert!(stdout(&[command, "--help"]).contains("Usage"), "{command}");
    }
}

#[test]
fn inspect_shows_every_block_of_a_hetero_model() {
    let model = fixture("hetero-0-bf16");
    let text = stdout(&["inspect", model.to_str().unwrap()]);
    for word in ["linear", "none", "gqa", "swiglu", "11 blocks in 12 slots"] {
        assert!(text.contains(word), "{word} is not in\n{text}");
    }
    let config = model.join("config.json");
    let json = stdout(&["inspect", config.to_str().unwrap(), "--format", "json"]);
    let inspection: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(inspection["slots"], 12);
    assert_eq!(inspection["blocks"].as_array().unwrap().len(), 11);
    let sum: u64 =
        inspection["blocks"].as_array().unwrap().iter().map(|b| b["params"].as_u64().unwrap()).sum();
    assert_eq!(inspection["total"]["block_params"], sum);
}

#[test]
fn generate_prints_what_a_job_would_answer() {
    let model = fixture("hetero-0-bf16");
    let args =
        ["generate", model.to_str().unwrap(), "hello world", "--max-tokens", "20", "--temperature", "0"];
    let printed = stdout(&args);
    let body =
        json!({"messages": [{"role": "user", "content": "hello world"}], "max_tokens": 20, "temperature": 0});
    let done = Job::on("hetero-0-bf16").chat("row", body).run().ok();
    assert_eq!(printed.trim_end(), done.choice("row")["message"]["content"].as_str().unwrap().trim_end());
}

#[test]
fn limit_runs_the_first_rows_only() {
    let row = |i: usize| json!({"prompt": format!("hello {i}"), "max_tokens": 1, "ignore_eos": true});
    let mut job = Job::on("hetero-0-bf16").arg("--limit").arg("3");
    for i in 0..10 {
        job = job.completion(&format!("row-{i}"), row(i));
    }
    let done = job.run().ok();
    let ids: Vec<Value> = done.lines("output.jsonl").iter().map(|line| line["custom_id"].clone()).collect();
    assert_eq!(ids, ["row-0", "row-1", "row-2"]);
}

#[test]
fn overrides_reach_the_job_and_stand_in_the_report() {
    let job = Job::on("hetero-0-bf16")
        .completion("row", json!({"prompt": "hello", "max_tokens": 1, "ignore_eos": true}))
        .set("pipeline.max_sequences=3");
    let output = job.command().env("SPANWISE__PIPELINE__THREADS", "1").output().unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(stdout.contains("pipeline.max_sequences") && stdout.contains("pipeline.threads"), "{stdout}");
    let wrong = job.command().env("SPANWISE__PIPELINE__THREAD", "1").arg("--fresh").output().unwrap();
    assert_eq!(wrong.status.code(), Some(2));
}

/// Starts a job that would take minutes, waits until it writes, and interrupts it.
#[test]
fn an_interrupt_ends_a_job_cleanly_within_five_seconds() {
    let mut job = Job::on("hetero-0-bf16").set("pipeline.max_sequences=4").set("job.order=completion");
    for i in 0..3000 {
        let body = json!({"prompt": format!("hello {i}"), "max_tokens": 200, "ignore_eos": true});
        job = job.completion(&format!("row-{i}"), body);
    }
    let mut command = job.command();
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let out = job.out();
    let started = Instant::now();
    while std::fs::metadata(out.join("output.jsonl")).map_or(0, |file| file.len()) == 0 {
        assert!(started.elapsed() < Duration::from_secs(60), "no line in a minute");
        assert!(child.try_wait().unwrap().is_none(), "the job ended early");
        std::thread::sleep(Duration::from_millis(50));
    }
    let interrupted = Instant::now();
    let kill = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    let status = child.wait().unwrap();
    assert!(interrupted.elapsed() < Duration::from_secs(5), "{:?}", interrupted.elapsed());
    assert_eq!(status.code(), Some(130));
    let text = std::fs::read_to_string(out.join("output.jsonl")).unwrap();
    assert!(text.ends_with('\n') && text.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()));
    let manifest = read_json(&out.join("manifest.json"));
    assert_eq!(manifest["status"], "interrupted");
    assert_eq!(manifest["counts"]["completed"].as_u64().unwrap() as usize, text.lines().count());
}
