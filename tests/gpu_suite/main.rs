//! Is the CUDA backend right on this GPU, and how near is it to what the chip can do?
//!
//! One program for a machine that has a GPU with its driver and nothing else: the battery of operations, log-probabilities,
//! then how fast real shapes are, the most important first, until its time is over. `cargo xtask gpu` builds it, stripped, with all
//! device code compiled behind its own. Every item is a process, but for the battery's, which share one and go on in another where one of
//! them crashes or hangs: it costs the others nothing.
//!
//! ```text
//! gpu-suite --out FOLDER [--seconds N] [--libraries FOLDER] [--small] [--only WORD]
//! gpu-suite --pack FILE [--libraries FOLDER]
//! ```
//!
//! Results are lines of Markdown, on the terminal and in FOLDER/results.md, which is whole after each process and begins with the
//! verdict on each bar. The status is that of what is right or wrong alone: a bar of speed that is not met is told, and is no error.
//! `--small` has small shapes, for an emulator; that is what a test of this name runs.

#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a bench prints")]

mod asked;
mod attention;
mod bars;
#[allow(
    dead_code,
    unused_imports,
    reason = "the battery's tests of processors and of emulators are not run from here"
)]
mod battery;
mod bulk;
#[path = "../../benches/common/decoding.rs"]
mod decoding;
mod items;
mod logits;
mod models;
mod nas;
mod products;
mod real_shapes;
mod steps;
mod suite;
mod told;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use asked::Asked;
use items::Setting;
use suite::Suite;

/// The test that a test runner finds in this program.
const TEST: &str = "the_suite_runs_whole_on_the_emulator";

/// Time of a suite, where nobody says: below ten minutes with its start.
const SECONDS: u64 = 540;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all is right.
fn run(arguments: &[String]) -> Result<bool> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match Asked::of(&words, TEST) {
        Some(Asked::List { ignored }) => {
            if !ignored {
                println!("{TEST}: test");
            }
            return Ok(true);
        }
        Some(Asked::Test { is_meant: true }) => return on_the_emulator(),
        Some(Asked::Test { is_meant: false }) => {
            println!(
                "\nrunning 0 tests\n\ntest result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 1 filtered out\n"
            );
            return Ok(true);
        }
        None => {}
    }
    match words[..] {
        ["--pack", file, ref rest @ ..] => pack(Path::new(file), rest),
        _ => {
            let Options { setting, suite, items } = options(&words)?;
            if items.is_empty() {
                return suite.run(&setting);
            }
            items::answer(&items, &setting)?;
            Ok(true)
        }
    }
}

/// What the options say.
struct Options {
    /// Of each item.
    setting: Setting,
    /// Of all of them.
    suite: Suite,
    /// Those that this process is to answer, for another one that goes through all.
    items: Vec<String>,
}

fn options(words: &[&str]) -> Result<Options> {
    let cache = std::env::temp_dir().join(format!("spanwise-gpu-suite-{}", std::process::id()));
    let mut setting = Setting { libraries: None, is_small: false, cache };
    let mut suite = Suite { out: PathBuf::from("."), seconds: SECONDS, only: String::new() };
    let (mut items, mut words) = (Vec::new(), words.iter());
    while let Some(key) = words.next() {
        if *key == "--small" {
            setting.is_small = true;
            continue;
        }
        let value = words.next().with_context(|| format!("{key} needs a value"))?;
        match *key {
            "--out" => suite.out = PathBuf::from(value),
            "--seconds" => suite.seconds = value.parse().with_context(|| format!("--seconds {value}"))?,
            "--only" => suite.only = (*value).to_owned(),
            "--cache" => setting.cache = PathBuf::from(value), // An item's is the suite's.
            "--item" => items.push((*value).to_owned()),
            "--libraries" => setting.libraries = Some(PathBuf::from(value)),
            _ => bail!("found {key}, expected --out, --seconds, --libraries, --small or --only"),
        }
    }
    Ok(Options { setting, suite, items })
}

/// All device code, compiled, as what is put behind this program.
fn pack(file: &Path, rest: &[&str]) -> Result<bool> {
    let Options { setting, .. } = options(rest)?;
    let cubins = kernels::pack_cubins(setting.libraries.as_deref()).context("compile the device code")?;
    std::fs::write(file, &cubins).with_context(|| format!("write {}", file.display()))?;
    println!("{}: {} bytes", file.display(), cubins.len());
    Ok(true)
}

/// The suite in its small form, carried as `cargo xtask gpu` carries it, where there is no compiler of device code.
fn on_the_emulator() -> Result<bool> {
    asked::check()?;
    bars::check()?;
    told::check()?;
    let emulator = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/cuda-emulator");
    let is_there = emulator.join("libcuda.so").is_file();
    anyhow::ensure!(
        is_there,
        "{} is missing\nhint: `cargo xtask emulator` makes it; on a machine with a GPU: gpu-suite --out FOLDER",
        emulator.display()
    );
    let folder = tempfile::tempdir().context("make a folder")?;
    let (program, packed) = (folder.path().join("gpu-suite"), folder.path().join("cubins"));
    pack(&packed, &["--libraries", &emulator.to_string_lossy()])?;
    let mut whole = std::fs::read(std::env::current_exe()?)?;
    whole.extend(std::fs::read(&packed)?);
    let permissions = std::fs::metadata(std::env::current_exe()?)?.permissions();
    std::fs::write(&program, whole)?;
    std::fs::set_permissions(&program, permissions)?;
    let libraries = folder.path().join("libraries");
    std::fs::create_dir(&libraries)?;
    for library in ["libcuda.so", "libcublasLt.so", "libnccl.so.2"] {
        std::os::unix::fs::symlink(emulator.join(library), libraries.join(library))
            .with_context(|| format!("link {library}: `cargo xtask emulator` makes it"))?;
    }
    let suite = |machine: [&str; 2], only: &str| -> Result<(bool, String)> {
        let out = folder.path().join(machine[1]);
        let mut child = std::process::Command::new(&program);
        child.env(machine[0], machine[1]).args(["--small", "--only", only]);
        child.arg("--libraries").arg(&libraries).arg("--out").arg(&out);
        let is_right = child.status().context("start the suite")?.success();
        Ok((is_right, std::fs::read_to_string(out.join("results.md")).context("read results.md")?))
    };
    // Of an NCCL that lets two ranks be on one GPU where it is asked for, and of the last one that never does.
    let (is_right, results) = suite(["EMULATED_NCCL", "23000"], "")?;
    let (is_older_right, older) = suite(["EMULATED_NCCL", "22907"], "Collectives")?;
    // Memory is gone when the battery comes to its last check, which has enough when it is asked alone.
    let (is_robbed_right, robbed) = suite(["EMULATED_LEFT", "0@150"], "Battery")?;
    let not_run: Vec<&str> = results.lines().filter(|line| suite::is_not_done(line)).collect();
    for section in items::SECTIONS {
        anyhow::ensure!(results.contains(&format!("## {section}")), "no section {section} in {results}");
    }
    anyhow::ensure!(not_run.is_empty(), "not run: {not_run:?}");
    let of_two = results.matches("right, in groups of up to 2").count();
    let refused = older.matches("no group of 2: ").count();
    let checks = battery::collective::CHECKS.len();
    anyhow::ensure!(
        (of_two, refused) == (checks, checks),
        "of two ranks {of_two}, refused {refused}: {older}"
    );
    let num_right = robbed.matches(": right (").count();
    anyhow::ensure!(
        !is_robbed_right && num_right == items::QUICK.len() - 1 && robbed.contains("but behind others: "),
        "{num_right} checks are right of a battery whose process ends: {robbed}"
    );
    Ok(is_right && is_older_right)
}
