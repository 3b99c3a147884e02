//! Programs of others, run in the repository's root: printed before they run, named when they fail.

use std::ffi::OsStr;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::repo;

/// `program` with `arguments`, not yet running.
pub(crate) fn command<S: AsRef<OsStr>>(
    program: impl AsRef<OsStr>,
    arguments: impl IntoIterator<Item = S>,
) -> Command {
    let mut command = Command::new(program);
    command.args(arguments).current_dir(repo::root());
    command
}

/// The cargo that runs this program.
pub(crate) fn cargo<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Command {
    command(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()), arguments)
}

/// Runs to the end; what it prints goes to the terminal.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    println!("$ {}", shown(command));
    let status = command.status().with_context(|| format!("start {}", shown(command)))?;
    ensure!(status.success(), "`{}` failed: {status}", shown(command));
    Ok(())
}

/// True when the program starts and succeeds; what it prints is dropped.
pub(crate) fn succeeds(command: &mut Command) -> bool {
    command.output().is_ok_and(|output| output.status.success())
}

/// As one would type it in the root; cargo goes by its name, whatever its path.
pub(crate) fn shown(command: &Command) -> String {
    let root = format!("{}/", repo::root().display());
    let words = [command.get_program()].into_iter().chain(command.get_args());
    let line = words.map(|word| word.to_string_lossy().replace(&root, "")).collect::<Vec<_>>().join(" ");
    match std::env::var("CARGO") {
        Ok(cargo) => line.replacen(&cargo, "cargo", 1),
        Err(_) => line,
    }
}
