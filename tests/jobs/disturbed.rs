//! What tests of disturbed jobs share: rows, ways to disturb, and what must come of it.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::harness::{Job, batch_line, read_json, without_created};

/// A tiny model with blocks of every kind.
pub(crate) const MODEL: &str = "hetero-0-bf16";

/// A smaller one, a ninth of it, for tests of many jobs.
pub(crate) const SMALL: &str = "small";

/// A row whose content is decided by its number. One in 29 is refused.
pub(crate) fn row(i: usize) -> String {
    let mut body = json!({"prompt": format!("hello {i}"), "max_tokens": 10 + i * 7 % 40, "ignore_eos": true});
    body["seed"] = json!(i);
    if i % 3 == 1 {
        body["repetition_penalty"] = json!(1.2);
        body["frequency_penalty"] = json!(0.2);
    }
    if i % 29 == 5 {
        body["top_p"] = json!(7);
    }
    batch_line(&format!("row-{i}"), "/v1/completions", &body)
}

/// Numbers without a pattern, the same in each run of the tests: xorshift64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound as u64) as usize
    }

    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        (1..items.len()).rev().for_each(|i| items.swap(i, self.below(i + 1)));
    }
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
pub(crate) fn assert_done(output: &Output) {
    assert!(output.status.success(), "stdout:\n{}\nstderr:\n{}", stdout(output), stderr(output));
}

#[track_caller]
pub(crate) fn assert_refused(output: &Output, words: &[&str]) {
    let stderr = stderr(output);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    for word in words {
        assert!(stderr.contains(word), "{word:?} is not in:\n{stderr}");
    }
}

/// The lines of a file in their order, without `created`.
pub(crate) fn lines(out: &Path, file: &str) -> Vec<String> {
    let text = std::fs::read_to_string(out.join(file)).unwrap_or_default();
    assert!(text.is_empty() || text.ends_with('\n'), "the last line of {file} is torn");
    text.lines().map(without_created).collect()
}

/// Insists that a folder holds what an undisturbed run of the same rows writes, line for line.
#[track_caller]
pub(crate) fn assert_as_undisturbed(out: &Path, rows: &[String]) {
    assert_as_run_of(out, &Job::on(MODEL).lines(rows.to_vec()));
}

/// Insists that a folder holds what this job writes when nothing disturbs it, line for line. Runs that job first, unless it has run.
#[track_caller]
pub(crate) fn assert_as_run_of(out: &Path, undisturbed: &Job) {
    assert_done(&undisturbed.run_once(&[]));
    for file in ["output.jsonl", "errors.jsonl"] {
        let (found, expected) = (lines(out, file), lines(&undisturbed.out(), file));
        assert_eq!(found.len(), expected.len(), "{file}");
        assert!(found == expected, "{file} differs");
    }
}

pub(crate) fn count(out: &Path, name: &str) -> u64 {
    read_json(&out.join("manifest.json"))["counts"][name].as_u64().expect("a count")
}

/// Starts a job, and sends it a signal once it has written lines for so long.
pub(crate) fn stop_after(job: &Job, signal: &str, lines_for: Duration) -> Output {
    let mut command = job.command();
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("start spanwise");
    let output = job.out().join("output.jsonl");
    let (began, mut least) = (Instant::now(), u64::MAX);
    // What was torn is cut off first; then the file grows.
    loop {
        let length = std::fs::metadata(&output).map_or(0, |file| file.len());
        least = least.min(length);
        if length > least || child.try_wait().unwrap().is_some() {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "no line in a minute");
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(lines_for);
    // One that has ended in the meantime is not signalled, and was not waited for either.
    let _ = Command::new("kill").args([signal, &child.id().to_string()]).stderr(Stdio::null()).status();
    child.wait_with_output().expect("wait for spanwise")
}
