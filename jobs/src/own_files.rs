//! Which files of an output folder are the job's own, so that none of them is taken for its input.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::journal;
use crate::line::LineFile;
use crate::manifest::Manifest;

/// Checks that a job's input and output are two things, before anything is read or written.
///
/// # Errors
/// An output that is there and is no folder; an input that is one of the files a job writes, by whatever
/// path: a run would read what it writes, and `--fresh` would throw its input away.
pub fn check_paths(input: &Path, output: &Path) -> Result<()> {
    // A link that leads nowhere is there, and no folder can be made in its place.
    if output.symlink_metadata().is_ok() && !output.is_dir() {
        return Err(Error::malformed(output, "is no folder, and [job] output has to be one"));
    }
    let place = |path: &Path| path.canonicalize().ok();
    let (Some(resolved), Some(folder)) = (place(input), place(output)) else { return Ok(()) };
    match resolved.parent() == Some(&folder) && is_own(&resolved) {
        true => Err(Error::InputIsOwn { path: PathBuf::from(input), own: resolved }),
        false => Ok(()),
    }
}

/// Whether a file of an output folder is one that a job writes: lines, also while they are put in order,
/// the journal with its companions, the manifest, the lock.
fn is_own(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let begins =
        LineFile::ALL.map(LineFile::name).into_iter().chain([journal::FILE_NAME, Manifest::FILE_NAME]);
    begins.chain(["job.lock"]).any(|begin| name.starts_with(begin))
}
