//! `cargo xtask cubins`: compiles the CUDA kernels for every architecture we support, on a machine without a GPU.
//!
//! NVRTC comes from PyPI, into a virtual environment in `target/cuda`. What each kernel takes of a multiprocessor stands in
//! `kernels/cu/registers.txt`, so that a change which makes a kernel dearer is seen.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};

use crate::python::Environment;
use crate::{repo, shell};

const ENVIRONMENT: Environment =
    Environment { folder: "target/cuda", requirements: "tools/cuda-requirements.txt" };
const SCRIPT: &str = "tools/compile_cubins.py";
const KERNELS: &str = "kernels/cu";
const GOLDEN: &str = "kernels/cu/registers.txt";

/// Compiles, and compares with the file of registers.
pub(crate) fn check() -> Result<()> {
    let found = compile()?;
    let kept = fs::read_to_string(repo::path(GOLDEN)).with_context(|| format!("read {GOLDEN}"))?;
    let differences = differences(&kept, &found);
    ensure!(
        differences.is_empty(),
        "kernels take other registers than {GOLDEN} says:\n{}\nhint: if that is meant, `cargo xtask cubins --renew` \
         writes the file anew",
        differences.join("\n")
    );
    println!("{} kernels and architectures compile without spills", found.lines().count());
    Ok(())
}

/// Compiles, and writes the file of registers.
pub(crate) fn renew() -> Result<()> {
    let found = compile()?;
    fs::write(repo::path(GOLDEN), found).with_context(|| format!("write {GOLDEN}"))
}

/// What `cargo xtask cubins` is followed by.
pub(crate) fn run(arguments: &[String]) -> Result<()> {
    match arguments {
        [] => check(),
        [renew] if renew == "--renew" => self::renew(),
        other => bail!("cubins takes --renew or nothing, got {}", other.join(" ")),
    }
}

fn compile() -> Result<String> {
    let python = python()?;
    let mut command = shell::command(&python, [SCRIPT, KERNELS]);
    println!("$ {}", shell::shown(&command));
    let output = command.output().context("start Python")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim_end());
    String::from_utf8(output.stdout).context("read what Python printed")
}

/// The folder of NVRTC's libraries. Call it with the lock held.
pub(crate) fn compiler_folder() -> Result<PathBuf> {
    let python = ENVIRONMENT.ready()?;
    let program = "import nvidia, pathlib; print(*[p for p in nvidia.__path__ if (pathlib.Path(p) / 'cu13/lib').is_dir()][:1])";
    let output = shell::command(&python, ["-c", program]).output().context("start Python")?;
    let folder = String::from_utf8(output.stdout).context("read what Python printed")?;
    ensure!(
        output.status.success() && !folder.trim().is_empty(),
        "no nvidia/cu13/lib in {}",
        ENVIRONMENT.folder
    );
    Ok(PathBuf::from(folder.trim()).join("cu13/lib"))
}

fn python() -> Result<PathBuf> {
    let _lock = repo::lock()?;
    ENVIRONMENT.ready()
}

/// Lines that one of the two lacks, those of the first with a minus.
fn differences(kept: &str, found: &str) -> Vec<String> {
    let lacks = |text: &str, line: &str| !text.lines().any(|other| other == line);
    let gone = kept.lines().filter(|line| lacks(found, line)).map(|line| format!("- {line}"));
    let new = found.lines().filter(|line| lacks(kept, line)).map(|line| format!("+ {line}"));
    gone.chain(new).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_lines_that_one_side_lacks() {
        assert!(differences("a\nb\n", "b\na\n").is_empty());
        assert_eq!(differences("a: 1\nb: 2\n", "a: 1\nb: 3\nc: 4\n"), ["- b: 2", "+ b: 3", "+ c: 4"]);
    }
}
