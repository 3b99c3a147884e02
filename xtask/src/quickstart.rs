//! `cargo quickstart`: from a fresh clone to completions of a real model, in one command.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::{repo, shell, smollm2};

/// Makes the model and then turns into the job, so that its signals and exit code are the job's own.
pub(crate) fn become_it(arguments: &[String]) -> Result<()> {
    smollm2::make()?;
    let mut job = job(arguments);
    println!("$ {}", shell::shown(&job));
    Err(job.exec()).context("start the job")
}

/// Runs the job into a folder of its own, and expects every row to be answered.
pub(crate) fn check() -> Result<()> {
    const OUTPUT: &str = "target/ci-quickstart";
    smollm2::make()?;
    let output = repo::path(OUTPUT);
    repo::remove_folder(&output)?;
    shell::run(&mut job(&["--progress", "plain", "--set", &format!("job.output={OUTPUT}")]))?;
    let lines = |file: &str| fs::read_to_string(output.join(file)).map(|text| text.lines().count());
    let answered = lines("output.jsonl").context("read output.jsonl")?;
    let failed = lines("errors.jsonl").unwrap_or(0);
    ensure!(answered > 0 && failed == 0, "{answered} rows answered, {failed} failed; see {OUTPUT}");
    println!("{answered} rows answered, none failed");
    Ok(())
}

fn job<S: AsRef<std::ffi::OsStr>>(arguments: &[S]) -> Command {
    let mut command =
        shell::cargo(["run", "--release", "--package", "spanwise", "--", "run", "configs/smollm2.toml"]);
    command.args(arguments);
    command
}
