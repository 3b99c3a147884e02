//! All that changes a job's files goes through here: a few ways to write, so that what can go wrong with
//! each can be said, counted and tried out in one place.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::Path;

use rusqlite::Transaction;

use crate::error::{Error, Result};
use crate::faults::{self, Planted};

/// Writes bytes where the file stands.
pub(crate) fn append(path: &Path, file: &mut File, bytes: &[u8]) -> Result<()> {
    Planted(file).write_all(bytes).map_err(|source| Error::write(path, source))
}

/// Puts on disk what was written.
pub(crate) fn sync(path: &Path, file: &File) -> Result<()> {
    faults::change().and_then(|()| file.sync_data()).map_err(|source| Error::write(path, source))
}

/// Cuts off what lies behind so many bytes.
pub(crate) fn cut(path: &Path, file: &File, length: u64) -> Result<()> {
    faults::change().and_then(|()| file.set_len(length)).map_err(|source| Error::write(path, source))
}

/// Lets a file take another one's place.
pub(crate) fn rename(from: &Path, to: &Path) -> Result<()> {
    faults::change().and_then(|()| std::fs::rename(from, to)).map_err(|source| Error::write(to, source))
}

/// Removes a file, where it is there.
pub(crate) fn remove(path: &Path) -> Result<()> {
    match faults::change().and_then(|()| std::fs::remove_file(path)) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::write(path, error)),
        _ => Ok(()),
    }
}

/// Makes what was created, renamed or removed in a folder last.
pub(crate) fn sync_folder(folder: &Path) -> Result<()> {
    let sync = || File::open(folder)?.sync_all();
    faults::change().and_then(|()| sync()).map_err(|source| Error::write(folder, source))
}

/// Commits a change of the journal.
pub(crate) fn commit(path: &Path, transaction: Transaction<'_>) -> Result<()> {
    faults::change().map_err(|source| Error::write(path, source))?;
    transaction.commit().map_err(|source| Error::journal(path, source))
}
