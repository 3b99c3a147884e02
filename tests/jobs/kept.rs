//! Rows and lines that no run may lose, whatever their input is or becomes.

use std::fs::File;
use std::io::Write;
use std::process::{Output, Stdio};
use std::time::Duration;

use crate::disturbed::{
    SMALL, assert_as_run_of, assert_done, assert_refused, count, lines, row, stderr, stdout, stop_after,
};
use crate::harness::{Job, devices, spanwise};

/// Runs a command on the output folder of a job.
fn ask(job: &Job, command: &str) -> Output {
    spanwise().arg(command).arg(job.out()).output().expect("start spanwise")
}

#[test]
fn rows_that_come_by_a_pipe_are_not_read_to_cut_stages_by_them() {
    let rows: Vec<String> = (10..30).map(row).collect();
    let job = Job::on(SMALL).set(devices(2)).set("job.input=/dev/stdin");
    let mut child = job.command().stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all((rows.join("\n") + "\n").as_bytes()).unwrap();
    assert_done(&child.wait_with_output().unwrap());
    let copy = Job::on(SMALL).set(devices(2)).lines(rows);
    assert_as_run_of(&job.out(), &copy);

    assert_refused(&ask(&job, "audit"), &["/dev/stdin is no file that could be read again", "--input FILE"]);
    let input = copy.out().with_file_name("input.jsonl");
    let audit = spanwise().arg("audit").arg(job.out()).arg("--input").arg(&input).output();
    assert_done(&audit.expect("start spanwise"));

    // A retry has the rows piped in again, and does not wait for somebody to type them.
    let retry =
        |stdin: File| spanwise().arg("retry").arg(job.out()).stdin(stdin).output().expect("start spanwise");
    let words = ["[job] input is /dev/stdin, a terminal, expected the rows of the job again", "< FILE"];
    // A machine without any terminal has nobody to type them.
    if let Ok(terminal) = File::open("/dev/ptmx") {
        assert_refused(&retry(terminal), &words);
    }
    assert_done(&retry(File::open(&input).unwrap()));
    assert_as_run_of(&job.out(), &copy);
}

#[test]
fn a_limit_takes_no_error_line_of_a_row_behind_it_away() {
    let job = Job::on(SMALL).lines((0..70).map(row));
    assert_done(&job.run_once(&[]));
    let before = ["output.jsonl", "errors.jsonl"].map(|file| lines(&job.out(), file));
    assert_eq!(before[1].len(), 3);
    let assert_kept = || {
        assert_eq!(["output.jsonl", "errors.jsonl"].map(|file| lines(&job.out(), file)), before);
        assert_eq!((count(&job.out(), "completed"), count(&job.out(), "failed")), (67, 3));
    };
    // Row 5 is looked at again, 34 and 63 are not.
    assert_done(&job.run_once(&["--limit", "10"]));
    assert_kept();
    assert_done(&ask(&job, "audit"));
    assert_done(&ask(&job, "retry"));
    assert_kept();
    assert_done(&job.run_once(&[]));
    assert_kept();
    assert_done(&ask(&job, "audit"));
}

#[test]
fn an_audit_asks_for_no_order_behind_a_limit() {
    let job = Job::on(SMALL).lines((0..3000).map(row)).set("pipeline.max_sequences=16");
    let stopped = stop_after(&job, "-INT", Duration::ZERO);
    assert_eq!(stopped.status.code(), Some(130), "{}", stderr(&stopped));
    assert_done(&job.run_once(&["--limit", "3"]));
    assert!(lines(&job.out(), "output.jsonl").len() > 20, "too few to be out of order");
    assert_done(&ask(&job, "audit"));
}

#[test]
fn an_input_that_is_empty_for_a_moment_costs_no_answer() {
    let rows: Vec<String> = (0..40).map(row).collect();
    let job = Job::on(SMALL).lines(rows.clone());
    assert_done(&job.run_once(&[]));
    let before = ["output.jsonl", "errors.jsonl"].map(|file| lines(&job.out(), file));
    let job = job.over([]);
    let stopped = job.run_once(&[]);
    let message = stderr(&stopped);
    assert_eq!(stopped.status.code(), Some(1), "{message}");
    let words = "input.jsonl has no rows, and the output folder has 40 lines of earlier runs; \
        restore the input, or pass --fresh to throw them away";
    assert!(message.contains(words), "{message}");
    assert_eq!(["output.jsonl", "errors.jsonl"].map(|file| lines(&job.out(), file)), before);
    let job = job.over(rows);
    let again = job.run_once(&[]);
    assert_done(&again);
    assert!(stdout(&again).contains(" 0 generated"), "{}", stdout(&again));
    assert_eq!(["output.jsonl", "errors.jsonl"].map(|file| lines(&job.out(), file)), before);
    let job = job.over([]);
    assert_done(&job.run_once(&["--fresh"]));
    assert_eq!(lines(&job.out(), "output.jsonl"), [""; 0]);
}

#[test]
fn stale_lines_that_were_thrown_away_are_not_missed() {
    let rows: Vec<String> = (10..20).map(row).collect();
    let stale = |job: &Job| lines(&job.out(), "stale.jsonl");
    let job = Job::on(SMALL).lines(rows.clone());
    assert_done(&job.run_once(&[]));
    let job = job.over(rows[..6].to_vec());
    assert_done(&job.run_once(&[]));
    assert_eq!(stale(&job).len(), 4);

    let path = job.out().join("stale.jsonl");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.split_inclusive('\n').take(1).collect::<String>()).unwrap();
    let job = job.over(rows[..5].to_vec());
    assert_done(&job.run_once(&[]));
    assert_eq!(stale(&job).len(), 2);

    std::fs::remove_file(&path).unwrap();
    assert_done(&job.run_once(&[]));
    assert_eq!(stale(&job), [""; 0]);
    let job = job.over(rows[..3].to_vec());
    assert_done(&job.run_once(&[]));
    assert_eq!(stale(&job).len(), 2);
    assert_done(&ask(&job, "audit"));
}

#[test]
fn a_job_whose_manifest_cannot_be_written_has_failed_and_can_be_run_again() {
    let job = Job::on(SMALL).lines((10..20).map(row));
    let in_the_way = job.out().join(".manifest.json.new");
    std::fs::create_dir_all(&in_the_way).unwrap();
    let stopped = job.run_once(&[]);
    let message = stderr(&stopped);
    assert_eq!(stopped.status.code(), Some(1), "{message}");
    assert!(
        message.contains("error: the job stopped: write ") && message.contains("manifest.json"),
        "{message}"
    );
    assert!(message.contains("hint: what is done is kept"), "{message}");
    std::fs::remove_dir(&in_the_way).unwrap();
    let again = job.run_once(&[]);
    assert_done(&again);
    assert!(stdout(&again).contains(" 0 generated"), "{}", stdout(&again));
}
