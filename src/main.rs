//! The command line: reads a job, lowers it to each crate's options, starts it, shows it, reports on it.
#![forbid(unsafe_code)]

mod cli;
mod generate;
mod inspect;
mod interrupt;
mod lower;
mod machine;
mod progress;
mod report;
mod run;

use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use crate::cli::{Cli, Command};

/// Bad job file, bad model, bad folder: nothing was started.
const EXIT_BAD_INPUT: u8 = 2;

/// Threads of the runtime that moves messages; the work is done by threads of the devices.
const RUNTIME_THREADS: usize = 2;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = EnvFilter::try_from_env("SPANWISE_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false).init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(RUNTIME_THREADS)
        .enable_all()
        .build()
        .expect("the system starts threads");
    let result = runtime.block_on(async {
        match cli.command {
            Command::Run(args) => run::run(args).await,
            Command::Generate(args) => generate::generate(args).await,
            Command::Inspect(args) => inspect::inspect(&args).map(|()| ExitCode::SUCCESS),
        }
    });
    // Device threads may be in the middle of a step that nobody waits for.
    runtime.shutdown_background();
    result.unwrap_or_else(|error| {
        say(&format!("error: {error:#}"));
        ExitCode::from(EXIT_BAD_INPUT)
    })
}

/// A line to the user, beside the command's own output.
#[expect(clippy::print_stderr, reason = "the one place that speaks to the user on stderr")]
fn say(line: &str) {
    eprintln!("{line}");
}

/// A line of the command's own output.
#[expect(clippy::print_stdout, reason = "the one place that prints the command's output")]
fn print(line: &str) {
    println!("{line}");
}
