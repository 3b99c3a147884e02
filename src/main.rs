//! The command line: reads a job, lowers it to each crate's options, starts it, shows it, reports on it.
#![forbid(unsafe_code)]

mod abilities;
mod audit;
mod bench;
mod cli;
mod cores;
mod devices;
mod efficient;
mod ended;
mod failures;
mod first_run;
mod generate;
mod gpu_memory;
mod gpus;
mod hindsight;
mod inspect;
mod interrupt;
mod kv_pages;
mod lanes;
mod layout;
mod live_trace;
mod lower;
mod machine;
mod picture;
mod placement;
mod plan;
mod profile;
mod progress;
mod replace;
mod report;
mod retry;
mod run;
mod simulate;
mod status;
mod target;
mod text;
mod trace;

use std::io::Write;
use std::panic::PanicHookInfo;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use crate::cli::{Cli, Command};

/// Bad job file, bad model, bad folder: nothing was started.
const EXIT_BAD_INPUT: u8 = 2;

/// Threads of the runtime that moves messages; the work is done by threads of the devices.
const RUNTIME_THREADS: usize = 2;

fn main() -> ExitCode {
    std::panic::set_hook(Box::new(say_panic));
    let cli = Cli::parse();
    if let Some(faults) = cli.faults {
        faults.install();
    }
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
            Command::Status(args) => status::status(&args).map(|()| ExitCode::SUCCESS),
            Command::Audit(args) => audit::audit(&args),
            Command::Retry(args) => retry::retry(args).await,
            Command::Generate(args) => generate::generate(args).await,
            Command::Plan(args) => plan::plan(&args),
            Command::Simulate(args) => simulate::simulate(&args),
            Command::Devices(args) => devices::devices(args.format).map(|()| ExitCode::SUCCESS),
            Command::Profile(args) => profile::profile(&args).map(|()| ExitCode::SUCCESS),
            Command::Bench(args) => bench::bench(&args).map(|()| ExitCode::SUCCESS),
            Command::Inspect(args) => inspect::inspect(&args).map(|()| ExitCode::SUCCESS),
            Command::Rank => served(actors::serve_rank(std::io::stdin(), std::io::stdout())),
            Command::Stage => served(actors::serve_stage(std::io::stdin(), std::io::stdout())),
        }
    });
    // Device threads may be in the middle of a step that nobody waits for.
    runtime.shutdown_background();
    result.unwrap_or_else(|error| {
        say(&format!("error: {error:#}"));
        ExitCode::from(EXIT_BAD_INPUT)
    })
}

/// A part of another process's pipeline, which says itself why it ends.
fn served(outcome: std::result::Result<(), String>) -> anyhow::Result<ExitCode> {
    Ok(if outcome.is_ok() { ExitCode::SUCCESS } else { ExitCode::from(EXIT_BAD_INPUT) })
}

/// A line to the user, beside the command's own output. Who has closed stderr does without it.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// A line of the command's own output. Who has closed the pipe, as `head` does, wants no more.
fn print(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// Our own bugs, in one line: whoever caught the panic says what it means for the job.
fn say_panic(info: &PanicHookInfo<'_>) {
    let message = info.payload_as_str().unwrap_or("no message");
    let place = info.location().map(|place| format!(" at {place}")).unwrap_or_default();
    say(&format!("internal error{place}: {message}"));
}
