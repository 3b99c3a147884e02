//! `cargo xtask gpu`: one executable that puts the CUDA backend through its battery on a machine with a GPU.
//!
//! It is the test program of `kernels`, stripped: beside it such a machine needs the driver and libnvrtc, and nothing is
//! built or downloaded there.

use std::fs;

use anyhow::{Context, Result};

use crate::{repo, shell};

const FOLDER: &str = "target/gpu";

/// Builds the executable and says how to run it.
pub(crate) fn make() -> Result<()> {
    let _lock = repo::lock()?;
    let mut cargo =
        shell::cargo(["build", "--release", "--package", "spanwise-kernels", "--tests", "--locked"]);
    cargo.args(["--message-format", "json-render-diagnostics"]);
    cargo.env("CARGO_PROFILE_RELEASE_STRIP", "symbols");
    let output = cargo.stderr(std::process::Stdio::inherit()).output().context("start cargo")?;
    anyhow::ensure!(output.status.success(), "cargo did not build the tests");
    let messages = String::from_utf8(output.stdout).context("read what cargo printed")?;
    let built = executable(&messages, "battery").context("find the battery's executable")?;
    fs::create_dir_all(repo::path(FOLDER)).context("make target/gpu")?;
    let suite = repo::path(FOLDER).join("gpu-suite");
    fs::copy(built, &suite).context("copy the executable")?;
    println!("{} is there. On a machine with a GPU:\n", suite.display());
    println!("  gpu-suite on_a_gpu --ignored --test-threads 1 --nocapture");
    Ok(())
}

/// The path of the test program of this name in cargo's messages, one a line.
fn executable(messages: &str, name: &str) -> Option<String> {
    let start = format!("/{name}-");
    let paths = messages.lines().filter_map(|line| line.split("\"executable\":\"").nth(1)?.split('"').next());
    paths
        .filter(|path| path.rsplit_once('/').is_some_and(|(_, file)| format!("/{file}").starts_with(&start)))
        .map(str::to_owned)
        .next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_executable_is_found_among_cargo_s_messages() {
        let messages = "{\"reason\":\"compiler-artifact\",\"executable\":null}\n\
                        {\"reason\":\"compiler-artifact\",\"executable\":\"/t/release/deps/collective-1a\"}\n\
                        {\"reason\":\"compiler-artifact\",\"executable\":\"/t/release/deps/battery-2b\"}\n";
        assert_eq!(executable(messages, "battery").as_deref(), Some("/t/release/deps/battery-2b"));
        assert_eq!(executable(messages, "nobody"), None);
    }
}
