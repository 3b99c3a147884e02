//! `cargo ci`: everything that must pass, the quick checks first, ending at the first failure.

use std::time::Instant;

use anyhow::{Context, Result};

use crate::{cubins, emulator, fixtures, quickstart, shell, smollm2, tools};

struct Step {
    name: &'static str,
    what: &'static str,
    run: fn() -> Result<()>,
}

/// The tests come after everything else that prints a count of tests, so the last two are theirs: the kernels', and all others'.
const STEPS: &[Step] = &[
    Step { name: "fmt", what: "the code is formatted", run: fmt },
    Step { name: "clippy", what: "no warning from the compiler or clippy", run: clippy },
    Step { name: "doc", what: "the documentation builds without warnings", run: doc },
    Step { name: "deny", what: "bans, licences and sources of the dependencies", run: deny },
    Step { name: "cubins", what: "the CUDA kernels compile, for each architecture", run: cubins::check },
    Step { name: "smollm2", what: "models/smollm2-135m is there", run: smollm2::make },
    Step { name: "fixtures", what: "target/fixtures is there and current", run: fixtures::make },
    Step { name: "emulator", what: "target/cuda-emulator is there and current", run: emulator::make },
    Step { name: "doctest", what: "the examples in the documentation work", run: doctest },
    Step { name: "kernels", what: "the kernels' tests, with each pointer checked", run: kernels },
    Step { name: "test", what: "all other tests", run: test },
    Step { name: "quickstart", what: "the README's first command works", run: quickstart::abacus },
    Step { name: "language", what: "the README's second one does too", run: quickstart::language_model },
];

/// Runs the named steps, or all, in their order.
pub(crate) fn run(names: &[String]) -> Result<()> {
    if let Some(unknown) = names.iter().find(|name| !STEPS.iter().any(|step| step.name == name.as_str())) {
        anyhow::bail!("no step {unknown} in ci\nhint: `cargo xtask` prints the steps");
    }
    let start = Instant::now();
    let wanted = |step: &&Step| names.is_empty() || names.iter().any(|name| name == step.name);
    for step in STEPS.iter().filter(wanted) {
        println!("\n== {}: {}", step.name, step.what);
        let begun = Instant::now();
        (step.run)().with_context(|| format!("ci step {} after {:.1} s", step.name, seconds(begun)))?;
        println!("== {}: passed in {:.1} s", step.name, seconds(begun));
    }
    println!("\n== ci: passed in {:.1} s", seconds(start));
    Ok(())
}

/// The steps and what each asks, one a line.
pub(crate) fn list() -> String {
    STEPS.iter().map(|step| format!("  {:<11} {}\n", step.name, step.what)).collect()
}

fn seconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64()
}

fn fmt() -> Result<()> {
    shell::run(&mut shell::cargo(["fmt", "--all", "--check"]))
}

fn clippy() -> Result<()> {
    let arguments = ["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"];
    shell::run(&mut shell::cargo(arguments))
}

fn doc() -> Result<()> {
    let mut cargo = shell::cargo(["doc", "--workspace", "--no-deps", "--locked"]);
    shell::run(cargo.env("RUSTDOCFLAGS", "-D warnings"))
}

fn deny() -> Result<()> {
    tools::ready()?;
    let arguments = ["deny", "--workspace", "check", "--hide-inclusion-graph", "bans", "licenses", "sources"];
    shell::run(shell::cargo(arguments).env("PATH", tools::search_path()))
}

fn doctest() -> Result<()> {
    shell::run(&mut shell::cargo(["test", "--workspace", "--doc", "--locked"]))
}

fn kernels() -> Result<()> {
    nextest(&["--package", "spanwise-kernels", "--cargo-profile", "checked"])?;
    let of_kernels = ["--locked", "--package", "spanwise-kernels", "--profile", "checked"];
    shell::run(&mut shell::cargo([&["run"], &of_kernels[..], &["--example", "untested_levels"]].concat()))
}

fn test() -> Result<()> {
    nextest(&["--workspace", "--exclude", "spanwise-kernels"])
}

fn nextest(which: &[&str]) -> Result<()> {
    tools::ready()?;
    let arguments = [&["nextest", "run", "--locked"], which].concat();
    shell::run(shell::cargo(arguments).env("PATH", tools::search_path()))
}
