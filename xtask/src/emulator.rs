//! `cargo xtask emulator`: what stands in for a GPU where there is none, so that the tests run device code.

use std::fs;

use anyhow::{Context, Result, ensure};

use crate::{repo, shell};

const EMULATOR: &str = "target/cuda-emulator";
/// Folders of which a change in any file makes the emulator anew.
const MADE_FROM: [&str; 2] = ["kernels/cu", "kernels/emulator"];

/// Builds the emulator, unless it is there and current.
pub(crate) fn make() -> Result<()> {
    let _lock = repo::lock()?;
    let folder = repo::path(EMULATOR);
    let mut files = Vec::new();
    for source in MADE_FROM {
        for entry in fs::read_dir(repo::path(source)).with_context(|| format!("list {source}"))? {
            files.push(format!("{source}/{}", entry?.file_name().to_string_lossy()));
        }
    }
    files.sort();
    let names: Vec<&str> = files.iter().map(String::as_str).collect();
    let wanted = repo::contents(&names)?;
    if fs::read(folder.join("made-from.txt")).is_ok_and(|had| had == wanted) {
        println!("{EMULATOR} is there and current");
        return Ok(());
    }
    ensure!(
        shell::succeeds(&mut shell::command("c++", ["--version"])),
        "c++ not found\nhint: on Debian and Ubuntu, install g++"
    );
    repo::replace_folder(&folder, |unfinished| {
        shell::run(shell::command("bash", ["kernels/emulator/build.sh"]).arg(unfinished))?;
        fs::write(unfinished.join("made-from.txt"), &wanted).context("write made-from.txt")
    })
    .context("build the emulator")
}
