//! The Python of our scripts: virtual environments under `target/` that hold exactly what a file of `tools/` lists, and
//! are made again when that file changes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{repo, shell};

/// A virtual environment.
pub(crate) struct Environment {
    /// Where it lies in the repository.
    pub(crate) folder: &'static str,
    /// The file that lists its packages.
    pub(crate) requirements: &'static str,
}

/// That of the conversion and fixture scripts.
pub(crate) const SCRIPTS: Environment =
    Environment { folder: "target/python", requirements: "tools/requirements.txt" };

impl Environment {
    /// The environment's `python`. Call it with the lock held.
    pub(crate) fn ready(&self) -> Result<PathBuf> {
        let folder = repo::path(self.folder);
        let python = folder.join("bin/python");
        let wanted = repo::contents(&[self.requirements])?;
        // Copied in last, so a half-made environment has none.
        let made_from = folder.join("made-from.txt");
        let is_current = fs::read(&made_from).is_ok_and(|had| had == wanted);
        if is_current && shell::succeeds(&mut shell::command(&python, ["--version"])) {
            return Ok(python);
        }
        println!("making {} from {}", self.folder, self.requirements);
        // An environment knows its own path, so it is made in place and not beside it.
        repo::remove_folder(&folder)?;
        make_environment(self.folder)?;
        shell::run(&mut pip(&python, &["install", "--no-deps", "--requirement", self.requirements]))
            .context("install Python packages")?;
        fs::write(&made_from, wanted).with_context(|| format!("write {}", made_from.display()))?;
        Ok(python)
    }
}

/// pip of the environment, quiet but for errors.
pub(crate) fn pip(python: &Path, arguments: &[&str]) -> Command {
    let mut command = shell::command(python, ["-m", "pip", "--quiet", "--disable-pip-version-check"]);
    command.args(arguments);
    command
}

fn make_environment(folder: &str) -> Result<()> {
    if !shell::succeeds(&mut shell::command("python3", ["--version"])) {
        bail!(
            "python3 not found\nhint: install Python 3.10 or newer, on Debian and Ubuntu python3 and python3-venv"
        );
    }
    // Debian ships venv without ensurepip, and venv's own message then comes after a half-made folder.
    if !shell::succeeds(&mut shell::command("python3", ["-c", "import venv, ensurepip"])) {
        bail!("python3 has no venv module\nhint: on Debian and Ubuntu, install python3-venv");
    }
    shell::run(&mut shell::command("python3", ["-m", "venv", folder]))
        .with_context(|| format!("make {folder}"))
}
