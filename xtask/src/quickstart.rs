//! The commands that the README begins with, run as a newcomer would, but by the program that the tests run: to build it with
//! `--release` as well takes minutes, and only the optimiser differs.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use crate::{repo, shell, smollm2};

/// What Abacus gets right at least, of all questions.
const LEAST_PASS_AT_1: f64 = 0.95;

/// The model that ships with the program answers its questions, and nearly all of them right.
pub(crate) fn abacus() -> Result<()> {
    let output = run("configs/quickstart.toml", "target/ci-quickstart")?;
    let manifest = fs::read_to_string(output.join("manifest.json")).context("read manifest.json")?;
    let score = manifest.split("\"pass_at_1\":").nth(1).context("find a score in manifest.json")?;
    let score = score.split([',', '}']).next().unwrap_or_default().trim();
    let score: f64 = score.parse().with_context(|| format!("read {score} as a score"))?;
    ensure!(score >= LEAST_PASS_AT_1, "pass@1 is {score}, expected {LEAST_PASS_AT_1} and more");
    Ok(())
}

/// A language model answers its prompts.
pub(crate) fn language_model() -> Result<()> {
    smollm2::make()?;
    run("configs/smollm2.toml", "target/ci-smollm2").map(drop)
}

/// Runs a job that we ship into a folder of its own, and expects every row to be answered.
fn run(job: &str, output: &str) -> Result<PathBuf> {
    let folder = repo::path(output);
    repo::remove_folder(&folder)?;
    shell::run(&mut shell::cargo(["build", "--workspace", "--tests", "--bins", "--locked"]))?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| repo::path("target"), PathBuf::from);
    let mut command = shell::command(target.join("debug/spanwise"), ["run", job]);
    command.args(["--progress", "plain", "--set", &format!("job.output={output}")]);
    shell::run(&mut command)?;
    let lines = |file: &str| fs::read_to_string(folder.join(file)).map(|text| text.lines().count());
    let answered = lines("output.jsonl").context("read output.jsonl")?;
    let failed = lines("errors.jsonl").unwrap_or(0);
    ensure!(answered > 0 && failed == 0, "{answered} rows answered, {failed} failed; see {output}");
    Ok(folder)
}
