//! `spanwise retry`: the rows of a job that failed, once more.

use std::fs::File;
use std::io::IsTerminal;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use configs::{JobFile, Loaded, Override};
use jobs::Manifest;

use crate::cli::RetryArgs;
use crate::run::{How, Start, run_job};

/// Runs the job that the manifest of an output folder records, with the rows that have an error line.
///
/// # Errors
/// A folder without a manifest; an input that is a terminal; whatever keeps a job from starting.
pub(crate) async fn retry(args: RetryArgs) -> Result<ExitCode> {
    let Some(manifest) = Manifest::find(&args.output)? else {
        bail!(
            "{} holds no {}: a job writes it when it ends\nhint: a job that was killed goes on by its own command",
            args.output.display(),
            Manifest::FILE_NAME
        );
    };
    let mut loaded = recorded(manifest.config)
        .with_context(|| format!("read config in {}", args.output.join(Manifest::FILE_NAME).display()))?;
    let input = &loaded.job.job.input;
    if is_terminal(input) {
        bail!(
            "[job] input is {}, a terminal, expected the rows of the job again\n\
             hint: `spanwise retry {} < FILE` reads them from a file with the same rows",
            input.display(),
            args.output.display()
        );
    }
    // The folder may have been moved.
    loaded.job.job.output = args.output.canonicalize().context("find the output folder")?;
    let (accept_numerics, progress) = (args.accept_numerics, args.progress);
    let (limit, start) = (manifest.limit, Start::Retry);
    let how = How { job_file: None, limit, start, accept_numerics, progress, trace: None };
    run_job(loaded, how).await
}

/// Whether reading a path waits for somebody to type. Other inputs that cannot be read twice, such as pipes, may have all rows again.
fn is_terminal(path: &Path) -> bool {
    let is_device = path.metadata().is_ok_and(|path| path.file_type().is_char_device());
    is_device && File::open(path).is_ok_and(|file| file.is_terminal())
}

/// The job as the manifest has it.
fn recorded(mut config: serde_json::Value) -> Result<Loaded> {
    let overrides = config.as_object_mut().and_then(|config| config.remove("overrides"));
    let job: JobFile = serde_json::from_value(config)?;
    let overrides: Vec<Override> = overrides.map(serde_json::from_value).transpose()?.unwrap_or_default();
    Ok(Loaded { job, overrides })
}
