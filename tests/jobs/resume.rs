//! Jobs that lose nothing: killed, stopped, over changed input, in each other's way, and run again.

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::disturbed::{
    MODEL, Random, assert_as_undisturbed, assert_done, assert_refused, count, lines, row, stderr, stdout,
    stop_after,
};
use crate::harness::{Job, batch_line, devices, fixture, read_json, spanwise};

#[test]
fn a_job_killed_again_and_again_ends_as_if_undisturbed() {
    let rows: Vec<String> = (0..400).map(row).collect();
    let job = Job::on(MODEL).lines(rows.clone()).set("pipeline.max_sequences=3");
    let mut random = Random(0x5eed);
    for kill in 0..10 {
        // Some die before their first commit, and one may find nothing left to do.
        if kill % 3 == 0 {
            let mut child = job.command().stdout(Stdio::null()).spawn().unwrap();
            std::thread::sleep(Duration::from_millis(random.below(400) as u64));
            child.kill().unwrap();
            child.wait().unwrap();
        } else {
            stop_after(&job, "-KILL", Duration::from_millis(random.below(200) as u64));
        }
        // What a write that was under way may leave.
        if let Ok(mut file) = std::fs::OpenOptions::new().append(true).open(job.out().join("output.jsonl")) {
            file.write_all(&br#"{"id":"batch_req_0","custom_id":"row-1","resp"#[..random.below(40)]).unwrap();
        }
    }
    let last = job.run_once(&[]);
    assert_done(&last);
    assert!(stdout(&last).contains("by earlier runs"), "{}", stdout(&last));
    assert_as_undisturbed(&job.out(), &rows);
    assert_eq!(count(&job.out(), "total"), 400);
    assert_eq!(lines(&job.out(), "stale.jsonl"), [""; 0]);
}

#[test]
fn input_that_changes_between_kills_ends_as_its_last_state() {
    let mut random = Random(0xc0ffee);
    let mut numbers: Vec<usize> = (0..300).collect();
    let mut job = Job::on(MODEL).set("pipeline.max_sequences=3");
    for round in 0..5 {
        job = job.over(numbers.iter().copied().map(row));
        stop_after(&job, "-KILL", Duration::from_millis(random.below(150) as u64));
        random.shuffle(&mut numbers);
        numbers.truncate(numbers.len() - 10); // Some leave,
        for number in &mut numbers[..5] {
            *number += 1000; // some change,
        }
        numbers.extend((0..20).map(|new| 2000 + round * 100 + new)); // and some come.
        random.shuffle(&mut numbers);
    }
    let rows: Vec<String> = numbers.iter().copied().map(row).collect();
    let job = job.over(rows.clone());
    assert_done(&job.run_once(&[]));
    assert_as_undisturbed(&job.out(), &rows);
    let stale = lines(&job.out(), "stale.jsonl");
    assert!(!stale.is_empty() && count(&job.out(), "stale") <= stale.len() as u64);

    // Rows that left and come back are computed again; nothing else is.
    let rest: Vec<String> = rows[20..].to_vec();
    let job = job.over(rest.clone());
    let shrunk = job.run_once(&[]);
    assert_done(&shrunk);
    assert!(stdout(&shrunk).contains("rows that have left the input"), "{}", stdout(&shrunk));
    assert!(stdout(&shrunk).contains(" 0 generated"), "{}", stdout(&shrunk));
    assert_as_undisturbed(&job.out(), &rest);
    assert!(lines(&job.out(), "stale.jsonl").len() > stale.len());
    let job = job.over(rows.clone());
    assert_done(&job.run_once(&[]));
    assert_as_undisturbed(&job.out(), &rows);
}

#[test]
fn the_same_command_again_computes_nothing_and_keeps_every_byte() {
    let job = Job::on(MODEL).lines((0..40).map(row)).line("not json");
    let read = |file: &str| std::fs::read(job.out().join(file)).unwrap();
    assert_done(&job.run_once(&[]));
    let before = ["output.jsonl", "errors.jsonl"].map(read);
    let again = job.run_once(&[]);
    assert_done(&again);
    assert!(stdout(&again).contains(" 0 generated"), "{}", stdout(&again));
    assert_eq!(["output.jsonl", "errors.jsonl"].map(read), before);
    assert_eq!(count(&job.out(), "resumed"), 38);
    assert_done(&job.run_once(&["--fresh"]));
    assert_eq!(count(&job.out(), "resumed"), 0);
}

#[test]
fn a_tenth_of_bad_rows_stops_no_job_that_allows_half() {
    let rows = (0..400).map(|i| match i % 10 {
        3 => batch_line(&format!("bad-{i}"), "/v1/completions", &json!({"prompt": "a", "top_p": 7})),
        _ => row(29 * i), // None of which is refused.
    });
    // All rows that are refused are finished before the first answer is.
    let job = Job::on(MODEL).lines(rows).set("pipeline.max_sequences=256").set("job.max_error_rate=0.5");
    assert_done(&job.run_once(&[]));
    assert_eq!((count(&job.out(), "completed"), count(&job.out(), "failed")), (360, 40));
}

#[test]
fn a_limit_holds_for_those_who_look_at_the_result_and_run_it_once_more() {
    let job = Job::on(MODEL).lines((0..30).map(row));
    assert_done(&job.run_once(&["--limit", "10"]));
    let on_result = |command: &str| spanwise().arg(command).arg(job.out()).output().expect("start spanwise");
    assert_done(&on_result("audit"));
    assert_done(&on_result("retry"));
    assert_eq!(count(&job.out(), "total"), 10, "the rows behind the limit are not run");
    assert_done(&job.run_once(&[]));
    assert_done(&on_result("audit"));
    assert_eq!(count(&job.out(), "total"), 30);
}

#[test]
fn identical_rows_have_a_line_each_after_a_kill() {
    let rows: Vec<String> = (0..120).map(|i| json!({"q": i % 3}).to_string()).collect();
    let job = Job::on(MODEL)
        .toml("[prompt]\nuser = \"hello {{ q }}\"\n[sampling]\nmax_tokens = 30\nignore_eos = true\n")
        .lines(rows)
        .set("pipeline.max_sequences=8");
    stop_after(&job, "-KILL", Duration::from_millis(10));
    assert_done(&job.run_once(&[]));
    let lines = lines(&job.out(), "output.jsonl");
    let mut ids: Vec<String> = lines
        .iter()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["custom_id"].to_string())
        .collect();
    ids.sort();
    ids.dedup();
    assert_eq!((lines.len(), ids.len()), (120, 120));
}

#[test]
fn an_interrupted_job_goes_on() {
    let rows: Vec<String> = (0..300).map(row).collect();
    let job = Job::on(MODEL).lines(rows.clone()).set("pipeline.max_sequences=8");
    let interrupted = stop_after(&job, "-INT", Duration::ZERO);
    assert_eq!(interrupted.status.code(), Some(130), "{}", stderr(&interrupted));
    let done = count(&job.out(), "completed");
    assert_eq!(done, lines(&job.out(), "output.jsonl").len() as u64);
    assert_done(&job.run_once(&[]));
    assert!(count(&job.out(), "resumed") >= done);
    assert_as_undisturbed(&job.out(), &rows);
}

#[test]
fn a_second_run_is_refused_while_the_first_works() {
    let job = Job::on(MODEL).lines((0..3000).map(row)).set("pipeline.max_sequences=4");
    let mut first = job.command().stdout(Stdio::null()).spawn().unwrap();
    let lock = job.out().join("job.lock");
    while !std::fs::read_to_string(&lock).is_ok_and(|text| text.ends_with('\n')) {
        std::thread::sleep(Duration::from_millis(10));
    }
    let process = format!("in use by process {}", first.id());
    assert_refused(&job.run_once(&[]), &[&process, "began at 20"]);
    assert_refused(&job.run_once(&["--fresh"]), &[&process]);
    first.kill().unwrap();
    first.wait().unwrap();
    assert_done(&job.run_once(&["--limit", "3"]));
}

#[test]
fn what_decides_answers_may_not_change_and_what_decides_speed_may() {
    let job = Job::on(MODEL).lines((0..30).map(row)).toml("[sampling]\ntemperature = 0.5\n");
    assert_done(&job.run_once(&["--limit", "10"]));
    let set = |assignment: &str| job.run_once(&["--set", assignment]);
    assert_refused(&set("job.seed=4"), &["job.seed: was 0, is 4", "--fresh", "[job] output"]);
    assert_refused(&set("sampling.temperature=1"), &["sampling.temperature: was 0.5, is 1"]);
    assert_refused(&set("sampling.top_k=5"), &["sampling.top_k: was not set, is 5"]);
    assert_refused(&set("model.dtype=f32"), &["model.dtype: was \"bf16\", is \"f32\""]);
    assert_refused(&set("model.dtype=int8"), &["model.dtype: was \"bf16\", is \"int8\""]);
    assert_refused(&set("pipeline.kv_cache_dtype=f32"), &["pipeline.kv_cache_dtype: was \"bf16\""]);
    assert_refused(&set("model.max_context_tokens=100"), &["model.max_context_tokens", "is 100"]);
    let other_model = format!("model.path={:?}", fixture("tied"));
    assert_refused(&set(&other_model), &["\n  model: was \""]);

    let faster = devices(2);
    let args = ["--limit", "20", "--set", &faster, "--set", "pipeline.threads=1"];
    assert_done(&job.run_once(&[&args[..], &["--set", "pipeline.micro_batch_tokens=16"]].concat()));
    assert_eq!(count(&job.out(), "resumed"), 9);

    let simd = ["--set", "pipeline.simd=reference"];
    assert_refused(&job.run_once(&simd), &["pipeline.simd: was", "is \"none\"", "--accept-numerics"]);
    assert_done(&job.run_once(&[&simd[..], &["--accept-numerics"]].concat()));
    assert_eq!(lines(&job.out(), "output.jsonl").len(), 29);
}

#[test]
fn a_limit_takes_no_line_away() {
    let job = Job::on(MODEL).lines((10..30).map(row));
    assert_done(&job.run_once(&[]));
    let before = lines(&job.out(), "output.jsonl");
    assert_done(&job.run_once(&["--limit", "5"]));
    assert_eq!(lines(&job.out(), "output.jsonl"), before);
    assert_eq!(count(&job.out(), "resumed"), 5);
}

#[test]
fn too_many_errors_stop_a_job_until_they_are_allowed() {
    let bad =
        |i: usize| batch_line(&format!("bad-{i}"), "/v1/completions", &json!({"prompt": "a", "best_of": 2}));
    let rows: Vec<String> = (40..70).map(row).chain((0..300).map(bad)).chain((70..90).map(row)).collect();
    let job = Job::on(MODEL).lines(rows.clone()).toml("[pipeline]\nmax_sequences = 4\n");
    let stopped = job.run_once(&["--set", "job.max_error_rate=0.25"]);
    assert_eq!(stopped.status.code(), Some(3), "{}", stderr(&stopped));
    let message = stderr(&stopped);
    assert!(
        message.contains("finished or in flight; more than the 0.25 of [job] max_error_rate"),
        "{message}"
    );
    assert!(message.contains("hint: what is done is kept"), "{message}");
    assert_eq!(read_json(&job.out().join("manifest.json"))["status"], "failed");
    assert!(lines(&job.out(), "errors.jsonl").len() < 300);
    assert_done(&job.run_once(&[]));
    assert_as_undisturbed(&job.out(), &rows);
}

/// A file that may not grow any further stands for a disk that is full.
#[test]
fn a_job_whose_disk_is_full_stops_with_one_message_and_goes_on_later() {
    let long = |i: usize| {
        let body =
            json!({"prompt": format!("hello {i}"), "max_tokens": 40, "ignore_eos": true, "logprobs": 5});
        batch_line(&format!("row-{i}"), "/v1/completions", &body)
    };
    let rows: Vec<String> = (0..240).map(long).collect();
    let job = Job::on(MODEL).lines(rows.clone()).set("pipeline.max_sequences=3");
    let whole = job.command();
    let mut command = Command::new("bash");
    command.args(["-c", "trap '' XFSZ; ulimit -f 1024; exec \"$@\"", "bash"]);
    // Slow enough for some commits before the limit is met.
    command.arg(whole.get_program()).args(["--faults", "stage0@1/40:slow"]).args(whole.get_args());
    let stopped = command.output().expect("start bash");
    let message = stderr(&stopped);
    assert_eq!(stopped.status.code(), Some(1), "{message}");
    let errors: Vec<&str> = message.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{message}");
    assert!(errors[0].starts_with("error: the job stopped: write "), "{message}");
    assert!(errors[0].contains("output.jsonl") && errors[0].contains("File too large"), "{message}");
    assert_done(&job.run_once(&[]));
    assert!(count(&job.out(), "resumed") > 0, "nothing was kept");
    assert_as_undisturbed(&job.out(), &rows);
}

#[test]
fn a_damaged_journal_is_named_and_nothing_is_lost() {
    let job = Job::on(MODEL).lines((10..20).map(row));
    assert_done(&job.run_once(&[]));
    let journal = job.out().join("journal.sqlite");
    let whole = std::fs::read(&journal).unwrap();
    let before = lines(&job.out(), "output.jsonl");
    std::fs::write(&journal, [0x5a; 3000]).unwrap();
    assert_refused(&job.run_once(&[]), &["journal.sqlite is damaged", "--fresh"]);
    assert_eq!(lines(&job.out(), "output.jsonl"), before);
    std::fs::write(&journal, whole).unwrap();
    assert_done(&job.run_once(&[]));
    assert_eq!(lines(&job.out(), "output.jsonl"), before);
}

#[test]
fn help_says_how_a_job_goes_on() {
    let help = spanwise().args(["run", "--help"]).output().unwrap();
    let help = stdout(&help);
    assert!(
        help.contains("the same command resumes the job") && help.contains("--accept-numerics"),
        "{help}"
    );
}
