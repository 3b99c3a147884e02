//! Files that a command writes where the user says: only what it wrote itself is ever replaced.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// How traces begin.
pub(crate) const TRACE: Kind = Kind { name: "trace", begins: "[\n{" };
/// How pictures begin.
pub(crate) const PICTURE: Kind = Kind { name: "picture", begins: "<svg" };

/// What is written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kind {
    pub(crate) name: &'static str,
    begins: &'static str,
}

/// Refuses a path at which something stands that is no earlier file of its kind, and no empty one: a job's input, say.
///
/// # Errors
/// Such a file, or one that cannot be read.
pub(crate) fn check(path: &Path, kind: Kind) -> Result<()> {
    let Kind { name, begins } = kind;
    if !path.is_file() {
        return Ok(());
    }
    let mut found = Vec::new();
    let read = File::open(path).and_then(|file| file.take(begins.len() as u64).read_to_end(&mut found));
    read.with_context(|| format!("write {name} {}", path.display()))?;
    if !found.is_empty() && found != begins.as_bytes() {
        bail!(
            "write {name} {}: found a file that is no {name}\nhint: only an earlier {name} is replaced, choose another path",
            path.display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_of_the_kind_are_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        assert!(check(&path, TRACE).is_ok());
        for (text, is_replaced) in [
            ("", true),
            ("[\n{\"ph\"", true),
            ("[1, 2]", false),
            ("{\"prompt\": \"\"}\n", false),
            ("<svg>", false),
        ] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(check(&path, TRACE).is_ok(), is_replaced, "{text:?}");
        }
        assert!(check(&path, PICTURE).is_ok());
    }
}
