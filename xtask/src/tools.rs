//! The two cargo commands that CI needs and a Rust installation lacks.

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::{repo, shell};

/// A cargo command by the name of its program and its package.
pub(crate) struct Tool {
    name: &'static str,
    version: &'static str,
    features: &'static [&'static str],
}

/// Checks licences, sources and banned crates.
pub(crate) const DENY: Tool = Tool { name: "cargo-deny", version: "0.20.2", features: &[] };

/// Runs the tests. Its own updater would only be compiled for nothing.
pub(crate) const NEXTEST: Tool = Tool {
    name: "cargo-nextest",
    version: "0.9.151",
    features: &["--no-default-features", "--features", "default-no-update"],
};

impl Tool {
    /// Installs the tool into `target/tools` when no folder of [`search_path`] has it.
    pub(crate) fn ready(&self) -> Result<()> {
        let _lock = repo::lock()?;
        if env::split_paths(&search_path()).any(|folder| folder.join(self.name).is_file()) {
            return Ok(());
        }
        println!("installing {} {} into target/tools, which takes some minutes", self.name, self.version);
        let mut install = shell::cargo(["install", "--quiet", "--locked", "--root", "target/tools"]);
        // An unoptimised build takes half the time, and it is used once.
        install.args(["--debug", "--target-dir", "target/tools/build"]).env("CARGO_PROFILE_DEV_DEBUG", "0");
        install.args(self.features).arg(format!("{}@{}", self.name, self.version));
        shell::run(&mut install).with_context(|| format!("install {}", self.name))?;
        repo::remove_folder(&repo::path("target/tools/build"))
    }
}

/// `PATH` with the tools installed here behind those of the machine.
pub(crate) fn search_path() -> OsString {
    let machine = env::var_os("PATH").unwrap_or_default();
    let folders: Vec<PathBuf> = env::split_paths(&machine).chain([repo::path("target/tools/bin")]).collect();
    env::join_paths(folders).expect("PATH came apart at its separators, and the root has none")
}
