//! Rows and lines that no run may lose, whatever their input is or becomes.

use std::io::Write;
use std::process::{Output, Stdio};

use crate::disturbed::{SMALL, assert_as_run_of, assert_done, assert_refused, row};
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
    let audit = spanwise().arg("audit").arg(job.out()).arg("--input").arg(input).output();
    assert_done(&audit.expect("start spanwise"));
}
