//! `cargo fixtures`: the tiny models that the tests read, and what the reference says about each.

use std::fs;

use anyhow::{Context, Result};

use crate::{python, repo, shell};

const FIXTURES: &str = "target/fixtures";
/// A change in any of these makes the fixtures anew.
const MADE_FROM: &[&str] = &[
    "tests/fixtures/make_fixtures.py",
    "tests/reference/make_tiny_decilm.py",
    "tests/reference/decilm_reference.py",
    "configs/models/Llama-3_1-Nemotron-Ultra-253B-v1/config.json",
    "tools/requirements.txt",
];

/// Makes the fixtures, unless they are there and current.
pub(crate) fn make() -> Result<()> {
    let _lock = repo::lock()?;
    let folder = repo::path(FIXTURES);
    let wanted = repo::contents(MADE_FROM)?;
    if fs::read(folder.join("made-from.txt")).is_ok_and(|had| had == wanted) {
        println!("{FIXTURES} is there and current");
        return Ok(());
    }
    let python = python::SCRIPTS.ready()?;
    repo::replace_folder(&folder, |unfinished| {
        let script = ["-B", "tests/fixtures/make_fixtures.py", "--out"];
        shell::run(shell::command(&python, script).arg(unfinished))?;
        fs::write(unfinished.join("made-from.txt"), &wanted).context("write made-from.txt")
    })
    .context("make target/fixtures")
}
