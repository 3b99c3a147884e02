//! The end of a job: each file of lines gets exactly the rows of the input, in their order.
//!
//! A file that is so already is left alone. Else it is written anew beside itself, the journal commits
//! the new places together with the word that the file is to be replaced, and then the new file takes
//! the old one's place. A crash before the commit leaves everything as it was, and the next run throws
//! the new file away; after it the next run finds the word and finishes the replacing.

use std::path::{Path, PathBuf};

use crate::disk;
use crate::error::Result;
use crate::journal::{Entry, Go, Journal, Selection, Walked};
use crate::line::LineFile;
use crate::lines_file::{LinesFile, PlacedLines};
use crate::writer::{Order, Unread};

/// The files that hold rows of the present input.
const PRESENT: [LineFile; 2] = [LineFile::Output, LineFile::Errors];

/// Puts the files of a folder in order; how many lines were found to be of rows that have left the input.
pub(crate) fn settle(journal: &mut Journal, folder: &Path, order: Order, unread: Unread) -> Result<u64> {
    let stays: &[Selection] = match (order, unread) {
        (Order::Input, Unread::HasLeft) => &[Selection::PresentByRow],
        (Order::Input, Unread::Stays) => &[Selection::PresentByRow, Selection::Absent],
        (Order::Completion, Unread::HasLeft) => &[Selection::Present],
        (Order::Completion, Unread::Stays) => &[Selection::All],
    };
    let goes: &[Selection] = match unread {
        Unread::HasLeft => &[Selection::Absent],
        Unread::Stays => &[],
    };
    if unread == Unread::HasLeft {
        journal.forget_checkpoints()?;
    }
    journal.forget_refused(unread)?;
    let unsettled = unsettled(journal, stays)?;
    if unsettled.is_empty() {
        return Ok(0);
    }
    let mut lengths = journal.lengths()?;
    let mut num_stale = 0;
    journal.replace(&unsettled, |journal, keep| {
        let mut rewrites =
            unsettled.iter().map(|file| Rewrite::open(folder, *file)).collect::<Result<Vec<_>>>()?;
        let of = |rewrites: &[Rewrite], file| rewrites.iter().position(|rewrite| rewrite.file == file);
        journal.walk(stays, |Walked { row, entry }| match of(&rewrites, entry.file) {
            Some(at) => keep(Walked { row, entry: rewrites[at].copy(entry)? }),
            None => keep(Walked { row, entry }),
        })?;
        let stale = LineFile::Stale;
        let mut stale_lines = None;
        journal.walk(goes, |Walked { entry, .. }| {
            let at = of(&rewrites, entry.file).expect("a file with a line too many is not settled");
            let line = rewrites[at].old.read(&entry)?;
            num_stale += 1;
            let stale_lines = match &mut stale_lines {
                Some(open) => open,
                none => none.insert(LinesFile::open(folder.join(stale.name()), lengths[stale.index()])?),
            };
            stale_lines.append(line).map(drop)
        })?;
        if let Some(mut stale_lines) = stale_lines {
            stale_lines.sync()?;
            lengths[stale.index()] = stale_lines.length();
        }
        for mut rewrite in rewrites {
            rewrite.new.sync()?;
            lengths[rewrite.file.index()] = rewrite.new.length();
        }
        disk::sync_folder(folder)?;
        Ok(lengths)
    })?;
    finish_replacing(journal, folder)?;
    Ok(num_stale)
}

/// Lets rewritten files take their places, if a run got so far, and throws away those that no run got
/// to commit.
pub(crate) fn finish_replacing(journal: &mut Journal, folder: &Path) -> Result<()> {
    let replaced = journal.replaced()?;
    for file in PRESENT {
        let (path, new) = (folder.join(file.name()), rewritten_path(folder, file));
        if !new.exists() {
            continue;
        }
        match replaced.contains(&file) {
            true => disk::rename(&new, &path)?,
            false => disk::remove(&new)?,
        }
    }
    if !replaced.is_empty() {
        disk::sync_folder(folder)?;
        journal.forget_replaced()?;
    }
    Ok(())
}

/// Where a file is written anew.
pub(crate) fn rewritten_path(folder: &Path, file: LineFile) -> PathBuf {
    folder.join(format!("{}.sorting", file.name()))
}

/// The files in which the lines that stay, in their order, are not all bytes from the first to the last.
fn unsettled(journal: &Journal, stays: &[Selection]) -> Result<Vec<LineFile>> {
    let lengths = journal.lengths()?;
    let mut ends = [0; LineFile::ALL.len()];
    let mut is_in_order = [true; LineFile::ALL.len()];
    journal.walk_while(stays, |Walked { entry, .. }| {
        let file = entry.file.index();
        is_in_order[file] &= entry.offset == ends[file];
        ends[file] += entry.length;
        // Most jobs that are to be put in order show it in their first lines.
        let is_open = |file: LineFile| is_in_order[file.index()] && lengths[file.index()] > 0;
        Ok(if PRESENT.into_iter().any(is_open) { Go::On } else { Go::Home })
    })?;
    let is_settled = |file: &LineFile| {
        let file = file.index();
        is_in_order[file] && ends[file] == lengths[file]
    };
    Ok(PRESENT.into_iter().filter(|file| !is_settled(file)).collect())
}

/// A file of lines and the new one that is to take its place.
struct Rewrite {
    file: LineFile,
    old: PlacedLines,
    new: LinesFile,
}

impl Rewrite {
    fn open(folder: &Path, file: LineFile) -> Result<Rewrite> {
        let old = PlacedLines::open(folder.join(file.name()))?;
        Ok(Rewrite { file, old, new: LinesFile::open(rewritten_path(folder, file), 0)? })
    }

    /// Copies a line; its new place.
    fn copy(&mut self, entry: Entry) -> Result<Entry> {
        let offset = self.new.append(self.old.read(&entry)?)?;
        Ok(Entry { offset, ..entry })
    }
}
