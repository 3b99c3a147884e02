//! `cargo xtask gpu`: one executable that puts the CUDA backend through its battery and its benches on a machine with a GPU.
//!
//! It is the test program `gpu_suite`, stripped, with all device code behind its own: beside it such a machine needs the driver
//! alone, and nothing is built or downloaded there. Where it has cuBLASLt, that is measured too.

use std::fs;

use anyhow::{Context, Result, ensure};

use crate::{cubins, repo, shell};

const FOLDER: &str = "target/gpu";
/// It is to be copied anywhere in a moment.
const MOST_BYTES: u64 = 64 << 20;

/// Builds the executable and says how to run it.
pub(crate) fn make() -> Result<()> {
    let _lock = repo::lock()?;
    let mut cargo = shell::cargo(["build", "--release", "--test", "gpu_suite", "--locked"]);
    cargo.args(["--message-format", "json-render-diagnostics"]);
    cargo.env("CARGO_PROFILE_RELEASE_STRIP", "symbols");
    if let Some(commit) = commit() {
        cargo.env("SPANWISE_COMMIT", commit);
    }
    let output = cargo.stderr(std::process::Stdio::inherit()).output().context("start cargo")?;
    ensure!(output.status.success(), "cargo did not build the suite");
    let messages = String::from_utf8(output.stdout).context("read what cargo printed")?;
    let built = executable(&messages, "gpu_suite").context("find the suite's executable")?;
    fs::create_dir_all(repo::path(FOLDER)).context("make target/gpu")?;
    let [suite, packed] = ["gpu-suite", "cubins"].map(|name| repo::path(FOLDER).join(name));
    let mut pack = shell::command(&built, ["--pack"]);
    shell::run(pack.arg(&packed).arg("--libraries").arg(cubins::compiler_folder()?))?;
    fs::copy(&built, &suite).context("copy the executable")?;
    let mut whole = fs::OpenOptions::new().append(true).open(&suite).context("open the executable")?;
    std::io::copy(&mut fs::File::open(&packed).context("open the cubins")?, &mut whole)
        .context("put the cubins behind the executable")?;
    fs::remove_file(&packed).context("remove the cubins")?;
    let bytes = fs::metadata(&suite).context("measure the executable")?.len();
    ensure!(bytes <= MOST_BYTES, "{} has {bytes} bytes, expected {MOST_BYTES} at most", suite.display());
    println!("{} is there, {} MB. On a machine with a GPU:\n", suite.display(), bytes / 1_000_000);
    println!("  gpu-suite --out FOLDER --seconds 540");
    Ok(())
}

/// What is checked out, as results name it, if git knows.
fn commit() -> Option<String> {
    let output = shell::command("git", ["describe", "--always", "--dirty"]).output().ok()?;
    let commit = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| commit.trim().to_owned())
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
