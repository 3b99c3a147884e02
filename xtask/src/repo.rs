//! Where things lie in the repository, and how a folder is made whole or not at all.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The root of the repository that this program was built from.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the root")
}

/// A path under the root.
pub(crate) fn path(relative: &str) -> PathBuf {
    root().join(relative)
}

/// Held while something is made, so that two of these programs do not make it twice. The system
/// lets go of it when the file is dropped or the program dies.
pub(crate) fn lock() -> Result<File> {
    fs::create_dir_all(path("target")).context("make target")?;
    let file = File::create(path("target/xtask.lock")).context("open target/xtask.lock")?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            println!("waiting for another cargo xtask");
            file.lock().context("lock target/xtask.lock")?;
        }
        Err(TryLockError::Error(error)) => return Err(error).context("lock target/xtask.lock"),
    }
    Ok(file)
}

/// Runs `make` on an empty folder beside `folder`, and only then puts it in place of what was there.
/// Call it with the lock held.
pub(crate) fn replace_folder(folder: &Path, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let name = folder.file_name().expect("a folder has a name").to_string_lossy();
    let unfinished = folder.with_file_name(format!(".{name}.unfinished"));
    remove_folder(&unfinished)?;
    fs::create_dir_all(&unfinished).with_context(|| format!("make {}", unfinished.display()))?;
    make(&unfinished)?;
    remove_folder(folder)?;
    fs::rename(&unfinished, folder).with_context(|| format!("put {} in place", folder.display()))
}

/// Removes a folder and what is in it, if it is there.
pub(crate) fn remove_folder(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("remove {}", folder.display()))?;
    }
    Ok(())
}

/// The content of files of the repository, one after the other: what something was made from.
pub(crate) fn contents(files: &[&str]) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    for file in files {
        all.extend(fs::read(path(file)).with_context(|| format!("read {file}"))?);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder of the system's for temporary files, of this test alone and empty at first.
    fn scratch(test: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("xtask-{test}-{}", std::process::id()));
        remove_folder(&folder).unwrap();
        fs::create_dir(&folder).unwrap();
        folder
    }

    fn write(text: &str) -> impl FnOnce(&Path) -> Result<()> {
        move |folder| Ok(fs::write(folder.join("text"), text)?)
    }

    #[test]
    fn a_folder_that_fails_half_way_leaves_the_old_one_in_place() {
        let root = scratch("half-way");
        let folder = root.join("made");
        replace_folder(&folder, write("old")).unwrap();
        replace_folder(&folder, |unfinished| {
            write("new")(unfinished)?;
            anyhow::bail!("no more space")
        })
        .unwrap_err();
        assert_eq!(fs::read_to_string(folder.join("text")).unwrap(), "old");
        remove_folder(&root).unwrap();
    }

    #[test]
    fn what_an_interrupted_run_left_does_not_reach_the_next_folder() {
        let root = scratch("interrupted");
        let folder = root.join("made");
        fs::create_dir(root.join(".made.unfinished")).unwrap();
        fs::write(root.join(".made.unfinished/half"), "").unwrap();
        replace_folder(&folder, write("whole")).unwrap();
        assert!(!folder.join("half").exists());
        assert_eq!(fs::read_to_string(folder.join("text")).unwrap(), "whole");
        remove_folder(&root).unwrap();
    }
}
