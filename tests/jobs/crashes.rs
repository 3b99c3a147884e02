//! Deaths at planned places: at every change of a file, in the middle of a write, in a stage, on a full disk.
//!
//! Faults are planted by `--faults`; jobs/src/faults.rs says how.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::json;

use crate::disturbed::{Random, SMALL, assert_as_run_of, assert_done, count, row, stderr, stdout};
use crate::harness::{Job, batch_line, devices};

/// More changes of files than any job here makes.
const MANY: usize = 200;

/// Runs a job with a plan of faults.
fn run_with(job: &Job, faults: &str) -> Output {
    job.command_with_faults(faults).output().expect("start spanwise")
}

/// Lets a job that has been done over one input, and is done again over another, fail at each change of a
/// file in turn. The run after that must make up for it. Returns at how many places it failed.
fn fail_at_every_change(action: &str, has_failed: impl Fn(&Output) -> bool) -> usize {
    let before: Vec<String> = (0..30).map(row).collect();
    let mut after = before[4..].to_vec();
    Random(0xfeed).shuffle(&mut after);
    after.extend((100..106).map(row));
    let expected = Job::on(SMALL).lines(after.clone());
    for place in 1..MANY {
        let job = Job::on(SMALL).lines(before.clone());
        assert_done(&job.run_once(&[]));
        let job = job.over(after.clone());
        let failed = run_with(&job, &format!("write@{place}:{action}"));
        if failed.status.success() {
            assert_as_run_of(&job.out(), &expected);
            return place - 1;
        }
        assert!(has_failed(&failed), "{action} at change {place}: {}", stderr(&failed));
        assert_done(&job.run_once(&[]));
        assert_as_run_of(&job.out(), &expected);
        assert_eq!(count(&job.out(), "total"), 32);
    }
    panic!("more than {MANY} changes of files");
}

fn was_killed(output: &Output) -> bool {
    output.status.signal() == Some(9)
}

#[test]
fn a_kill_at_any_change_of_a_file_loses_nothing() {
    let places = fail_at_every_change("kill", was_killed);
    assert!(places > 15, "{places} places");
}

#[test]
fn a_torn_write_at_any_place_loses_nothing() {
    let places = fail_at_every_change("tear", was_killed);
    assert!(places > 15, "{places} places");
}

#[test]
fn a_disk_that_fills_at_any_change_of_a_file_is_named_and_loses_nothing() {
    let is_named = |output: &Output| {
        let text = stderr(output);
        matches!(output.status.code(), Some(1 | 2))
            && text.contains("full disk")
            && !text.contains("panicked")
    };
    let places = fail_at_every_change("error", is_named);
    assert!(places > 15, "{places} places");
}

/// Makes a step of a tiny model take so much longer on average that a job lasts over many deaths.
const SLOW: &str = "stage0@1/12:slow";

/// Kills a job that has worked for so long since its process began, and insists that it was at work.
fn kill_at(job: &Job, after: Duration) {
    let mut child =
        job.command_with_faults(SLOW).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(after);
    child.kill().expect("send the signal");
    let status = child.wait().expect("wait for spanwise");
    assert_eq!(status.signal(), Some(9), "the job had ended before it could be killed");
}

#[test]
fn a_torn_journal_loses_no_more_than_its_last_commits() {
    let rows: Vec<String> = (0..150).map(row).collect();
    let job = Job::on(SMALL).lines(rows.clone()).set("pipeline.max_sequences=3");
    let log = job.out().join("journal.sqlite-wal");
    // Nothing of it is left, its beginning is torn, its middle, its end.
    for share in [0.0, 0.01, 0.1, 0.5, 0.97] {
        kill_at(&job, Duration::from_millis(1300));
        let mut bytes = fs::read(&log).expect("a journal in use has a log");
        assert!(bytes.len() > 1000, "{} bytes of log", bytes.len());
        bytes.truncate((bytes.len() as f64 * share) as usize);
        if let Some(last) = bytes.last_mut() {
            *last ^= 0xff;
        }
        fs::write(&log, bytes).unwrap();
    }
    assert_done(&job.run_once(&[]));
    assert_as_run_of(&job.out(), &Job::on(SMALL).lines(rows));
}

/// A file system of its own that is too small, and then large enough. The shell is alone in its mounts.
const FULL_DISK: &str = r#"
    mount -t tmpfs -o size=256k none "$1" || exit 90
    shift
    "$@"; echo "first: $?"
    mount -o remount,size=64m "$OUT" || exit 91
    "$@"; echo "second: $?"
    cp "$OUT"/*.jsonl "$OUT"/manifest.json "$KEEP"
"#;

#[test]
fn a_job_on_a_full_disk_stops_with_one_message_and_goes_on_when_there_is_room() {
    let rows: Vec<String> = (0..600).map(row).collect();
    let job = Job::on(SMALL).lines(rows.clone());
    let keep = tempfile::tempdir().unwrap();
    fs::create_dir(job.out()).unwrap();
    let run = job.command();
    let mut shell = Command::new("unshare");
    shell.args(["--map-root-user", "--mount", "sh", "-c", FULL_DISK, "sh"]).arg(job.out());
    shell.arg(run.get_program()).args(run.get_args()).env("OUT", job.out()).env("KEEP", keep.path());
    let output = shell.output().expect("start unshare");
    let (out, err) = (stdout(&output), stderr(&output));
    assert!(out.contains("first: 1") && out.contains("second: 0"), "{out}\n{err}");
    assert!(err.contains("No space left on device") || err.contains("disk is full"), "{err}");
    assert!(!err.contains("panicked") && !err.contains("internal error"), "{err}");
    assert_as_run_of(keep.path(), &Job::on(SMALL).lines(rows));
}

#[test]
fn stages_that_panic_again_and_again_change_no_byte() {
    // Rare enough that chance alone hardly ever ends a stage over one row by itself twice, which would convict it.
    let rows: Vec<String> = (0..900).map(row).collect();
    let job = Job::on(SMALL).lines(rows.clone()).set(devices(2)).set("pipeline.max_sequences=24");
    let undisturbed = Job::on(SMALL).lines(rows);
    for stage in 0..2 {
        let output = run_with(&job, &format!("seed=5,stage{stage}@1/60:panic"));
        assert_done(&output);
        let report = stdout(&output);
        let restarts = report.lines().find_map(|line| line.split_once("started again ")?.1.split(' ').next());
        let restarts: u32 = restarts.expect("the report tells").parse().unwrap();
        assert!(restarts >= 20, "{restarts} restarts:\n{report}");
        assert_as_run_of(&job.out(), &undisturbed);
        fs::remove_dir_all(job.out()).unwrap();
    }
}

#[test]
fn a_stage_that_hangs_is_ended_and_changes_no_byte() {
    let rows: Vec<String> = (0..60).map(row).collect();
    let job = Job::on(SMALL).lines(rows.clone()).set(devices(2)).set("pipeline.step_timeout_seconds=1");
    let output = run_with(&job, "stage1@12:hang");
    assert_done(&output);
    assert!(stderr(&output).contains("a step did not end within 1 s"), "{}", stderr(&output));
    assert_as_run_of(&job.out(), &Job::on(SMALL).lines(rows));
}

#[test]
fn a_long_row_goes_on_from_its_last_checkpoint() {
    let body = json!({"prompt": "hello", "max_tokens": 120, "ignore_eos": true, "logprobs": 2, "echo": true});
    let long = batch_line("long", "/v1/completions", &body);
    let stops = json!({"prompt": "hi", "max_tokens": 100, "ignore_eos": true, "stop": ["never said"]});
    let other = batch_line("stops", "/v1/completions", &stops);
    let job = Job::on(SMALL).lines([long, other]).set("job.checkpoint_tokens=8");
    // 60 steps of 50 ms and more: five commits at least, and the last at most 0.5 s before the end.
    let killed = run_with(&job, "stage0@60:kill,stage0@1/1:slow");
    assert!(was_killed(&killed), "{}", stderr(&killed));
    let output = job.run_once(&[]);
    assert_done(&output);
    let report = stdout(&output);
    let generated = report.lines().find(|line| line.starts_with("tokens")).expect("a line of tokens");
    let generated = generated.split(", ").nth(1).and_then(|text| text.split(' ').next());
    let generated: u32 = generated.expect("a number of tokens").parse().unwrap();
    assert!((60..220 - 2 * 30).contains(&generated), "{generated} tokens were decoded again:\n{report}");
    assert_as_run_of(&job.out(), &job.anew());
}

#[test]
fn a_job_killed_thirty_times_while_its_input_changes_ends_as_its_last_input() {
    let mut random = Random(0xbeef);
    let mut numbers: Vec<usize> = (0..450).collect();
    let mut job = Job::on(SMALL).set("pipeline.max_sequences=3");
    for kill in 0..30 {
        if kill == 15 {
            numbers.drain(..50); // 50 leave,
            for number in &mut numbers[..20] {
                *number += 1000; // 20 change,
            }
            numbers.extend(2000..2100); // 100 come,
            random.shuffle(&mut numbers); // and all are shuffled.
        }
        job = job.over(numbers.iter().copied().map(row));
        // Before the first commit and after it.
        kill_at(&job, Duration::from_millis(20 + random.below(900) as u64));
    }
    let last = job.run_once(&[]);
    assert_done(&last);
    assert!(stdout(&last).contains("by earlier runs"), "no run got anywhere:\n{}", stdout(&last));
    assert_eq!(count(&job.out(), "total"), 500);
    assert_as_run_of(&job.out(), &job.anew());
}
