//! What is kept of a job between its runs, case by case.

use std::path::Path;

use jobs::{JournalView, Line, LineFile, Order, OutputFolder, Row, Settings, Unread, Writer};
use scheduler::Generated;
use serde_json::json;
use tempfile::TempDir;

use super::{line, open, read, unsettled};
use crate::model::{World, completion_line};

#[test]
fn a_death_before_a_rewritten_file_is_committed_leaves_the_old_one() {
    let folder = TempDir::new().unwrap();
    unsettled(folder.path()).pause().unwrap();
    let before = read(folder.path(), "output.jsonl");
    std::fs::write(folder.path().join("output.jsonl.sorting"), "{\"half\":").unwrap();
    std::fs::write(folder.path().join("stale.jsonl"), "{\"half\":").unwrap();
    let (_writer, earlier) = open(folder.path(), Order::Input);
    assert_eq!((earlier.finished.len(), read(folder.path(), "output.jsonl")), (7, before));
    assert!(!folder.path().join("output.jsonl.sorting").exists());
    assert!(!folder.path().join("stale.jsonl").exists());
}

#[test]
fn a_death_after_a_rewritten_file_is_committed_lets_it_take_its_place() {
    let folder = TempDir::new().unwrap();
    let writer = unsettled(folder.path());
    let old = read(folder.path(), "output.jsonl");
    writer.finish(Unread::HasLeft).unwrap();
    let new = read(folder.path(), "output.jsonl");
    assert_ne!(old, new);
    for is_renamed in [false, true] {
        // As it was between the commit and its end: the rename of errors.jsonl is done, this one perhaps.
        let journal = rusqlite::Connection::open(folder.path().join("journal.sqlite")).unwrap();
        journal.execute("UPDATE files SET is_replaced = 1 WHERE file < 2", []).unwrap();
        drop(journal);
        if !is_renamed {
            std::fs::write(folder.path().join("output.jsonl.sorting"), &new).unwrap();
            std::fs::write(folder.path().join("output.jsonl"), &old).unwrap();
        }
        let (writer, _) = open(folder.path(), Order::Input);
        assert_eq!(read(folder.path(), "output.jsonl"), new);
        assert!(!folder.path().join("output.jsonl.sorting").exists());
        writer.pause().unwrap();
    }
}

#[test]
fn a_second_run_on_a_folder_is_refused_and_told_of_the_first() {
    let folder = TempDir::new().unwrap();
    let first = open(folder.path(), Order::Input);
    for fresh in [false, true] {
        let error = OutputFolder::open(folder.path(), fresh).err().unwrap().to_string();
        let holder = format!("is in use by process {}, which began at 20", std::process::id());
        assert!(error.contains(&holder), "{error}");
    }
    drop(first);
    open(folder.path(), Order::Input);
}

#[test]
fn a_journal_that_is_none_any_more_is_named_with_its_cure() {
    for damage in [&b"this is no database, and was none before"[..], &[0x55; 5000]] {
        let folder = TempDir::new().unwrap();
        let (mut writer, _) = open(folder.path(), Order::Input);
        writer.write(&line(1, 0)).unwrap();
        writer.pause().unwrap();
        let path = folder.path().join("journal.sqlite");
        std::fs::write(&path, damage).unwrap();
        let error = OutputFolder::open(folder.path(), false).err().unwrap().to_string();
        let words = format!("the journal {} is damaged", path.display());
        assert!(error.contains(&words) && error.contains("--fresh"), "{error}");
        OutputFolder::open(folder.path(), true)
            .and_then(|folder| folder.begin(Order::Input, &Settings::default(), 0, false))
            .unwrap();
    }
}

#[test]
fn a_journal_of_another_version_is_refused_with_its_cure() {
    let folder = TempDir::new().unwrap();
    drop(open(folder.path(), Order::Input));
    let journal = rusqlite::Connection::open(folder.path().join("journal.sqlite")).unwrap();
    journal.pragma_update(None, "user_version", 1).unwrap();
    drop(journal);
    let words = "a journal of version 1, this program writes version 3; \
        go on with the program that wrote it, or pass --fresh to start over";
    let error = OutputFolder::open(folder.path(), false).err().unwrap().to_string();
    assert!(error.ends_with(words), "{error}");
    let error = JournalView::open(folder.path()).err().unwrap().to_string();
    assert!(error.ends_with(words), "{error}");
}

#[test]
fn a_line_that_somebody_has_altered_is_not_put_in_order() {
    let folder = TempDir::new().unwrap();
    let writer = unsettled(folder.path());
    let path = folder.path().join("output.jsonl");
    std::fs::write(&path, read(folder.path(), "output.jsonl").replace("xxx\"}", "xyx\"}")).unwrap();
    let error = writer.finish(Unread::HasLeft).unwrap_err().to_string();
    assert!(error.contains("are not the line that was written there"), "{error}");
}

#[test]
fn what_is_not_committed_is_in_no_total() {
    let folder = TempDir::new().unwrap();
    let mut writer = unsettled(folder.path());
    let committed = writer.committed();
    assert_eq!((committed.output_lines, committed.error_lines, committed.generated_tokens), (6, 2, 16));
    writer.write(&line(8, 8)).unwrap();
    assert_eq!(writer.committed(), committed);
    assert_eq!(writer.pause().unwrap().output_lines, 7);
}

#[test]
fn the_reader_tells_how_far_it_is() {
    let world = World::new();
    let input = format!("{}\n{}\n", completion_line("a", json!({})), completion_line("b", json!({})));
    let folder = TempDir::new().unwrap();
    let (mut writer, earlier) = open(folder.path(), Order::Input);
    let progress = |writer: &mut Writer, row| {
        writer.write(&line(row, row.into())).unwrap();
        writer.commit().unwrap();
        let progress = JournalView::open(folder.path()).unwrap().unwrap().progress().unwrap();
        (progress.rows_read, progress.bytes_read, progress.input_bytes, progress.is_read_to_end)
    };
    let mut reader = world.reader_after(&input, earlier);
    let (half, whole) = (input.len() as u64 / 2, input.len() as u64);
    assert_eq!(progress(&mut writer, 0), (0, 0, whole, false));
    reader.next().unwrap().unwrap();
    assert_eq!(progress(&mut writer, 1), (1, half, whole, false));
    assert_eq!(reader.by_ref().count(), 1);
    assert_eq!(progress(&mut writer, 2), (2, whole, whole, true));
}

/// Runs over the first three rows of an input, each refused if it is none; the lines of `errors.jsonl`.
fn errors_of_the_first_three(world: &World, folder: &Path, input: &str) -> usize {
    let (mut writer, earlier) = open(folder, Order::Input);
    for row in world.reader_after(input, earlier) {
        match row.unwrap() {
            Row::Rejected(row) => writer.write(&Line::rejected(&row)).unwrap(),
            Row::Finished(row) => writer.keep(row).unwrap(),
            Row::Request(row) => writer.write(&Line { key: row.request.key, ..line(1, row.index) }).unwrap(),
        }
    }
    let written = writer.finish(Unread::Stays).unwrap();
    let lines = read(folder, "errors.jsonl").lines().count();
    assert_eq!(written.error_lines, lines as u64);
    lines
}

#[test]
fn a_limit_keeps_refusals_behind_it_and_drops_those_of_rows_that_were_mended() {
    let mut world = World::new();
    let folder = TempDir::new().unwrap();
    let good = |id| completion_line(id, json!({}));
    let input = format!("{}\nbroken\nbroken too\n{}\nbroken behind\n", good("a"), good("b"));
    assert_eq!(errors_of_the_first_three(&world, folder.path(), &input), 3);
    world.limit = Some(3);
    assert_eq!(errors_of_the_first_three(&world, folder.path(), &input), 3);
    let mended = input.replace("broken\n", &format!("{}\n", good("c")));
    assert_eq!(errors_of_the_first_three(&world, folder.path(), &mended), 2);
    // A row that is moved behind the limit has no line until a run comes to it.
    let moved = format!("{}\n{}\n{mended}", good("d"), good("e"));
    assert_eq!(errors_of_the_first_three(&world, folder.path(), &moved), 1);
    world.limit = None;
    assert_eq!(errors_of_the_first_three(&world, folder.path(), &moved), 2);
}

#[test]
fn a_row_is_handed_over_with_what_is_there_of_its_answer() {
    let world = World::new();
    let input = format!("{}\n", completion_line("a", json!({})));
    let folder = TempDir::new().unwrap();
    let hand_over = |earlier| match world.reader_after(&input, earlier).next().unwrap().unwrap() {
        Row::Request(row) => row,
        row => panic!("{row:?}"),
    };
    let (mut writer, earlier) = open(folder.path(), Order::Input);
    let row = hand_over(earlier);
    assert_eq!(row.so_far, Generated::default());
    let more = |tokens| Generated { tokens, ..Generated::default() };
    writer.checkpoint(row.request.key, 0, &more(vec![5, 6])).unwrap();
    writer.checkpoint(row.request.key, 1, &more(vec![7, 8])).unwrap();
    writer.pause().unwrap();
    let (mut writer, earlier) = open(folder.path(), Order::Input);
    assert_eq!(hand_over(earlier).so_far, more(vec![5, 7, 8]));
    // More than it may have is not taken over.
    writer.checkpoint(row.request.key, 3, &more(vec![1; 100])).unwrap();
    writer.pause().unwrap();
    let (_writer, earlier) = open(folder.path(), Order::Input);
    assert_eq!(hand_over(earlier).so_far, Generated::default());
}

#[test]
fn a_journal_that_was_never_made_whole_is_made_again() {
    let folder = TempDir::new().unwrap();
    std::fs::write(folder.path().join("journal.sqlite"), "").unwrap();
    let (mut writer, earlier) = open(folder.path(), Order::Input);
    assert!(earlier.finished.is_empty());
    writer.write(&line(1, 0)).unwrap();
    assert_eq!(writer.finish(Unread::HasLeft).unwrap().output_lines, 1);
}

#[test]
fn the_first_runs_moment_is_remembered() {
    let folder = TempDir::new().unwrap();
    assert_eq!(OutputFolder::open(folder.path(), false).unwrap().unix_seconds().unwrap(), None);
    drop(open(folder.path(), Order::Input));
    assert_eq!(OutputFolder::open(folder.path(), false).unwrap().unix_seconds().unwrap(), Some(1));
}

#[test]
fn the_reader_tells_finished_rows_by_their_places() {
    let world = World::new();
    let [a, b] = ["a", "b"].map(|id| completion_line(id, json!({})));
    let folder = TempDir::new().unwrap();
    let (mut writer, earlier) = open(folder.path(), Order::Input);
    for row in world.reader_after(format!("{a}\n{b}\nbroken\n"), earlier) {
        match row.unwrap() {
            Row::Request(row) => {
                let key = row.request.key;
                writer.write(&Line { key, ..line(1, row.index) }).unwrap();
            }
            Row::Rejected(row) => writer.write(&Line::rejected(&row)).unwrap(),
            Row::Finished(row) => panic!("{row:?}"),
        }
    }
    writer.pause().unwrap();
    let (_writer, earlier) = open(folder.path(), Order::Input);
    assert_eq!(earlier.finished.len(), 2, "a row that was refused is looked at again");
    // The envelope of `b` is broken now: its body alone does not make it the finished row.
    let input = format!("broken\n{}\n{a}\n", b.replace("POST", "GET"));
    let rows: Vec<Row> = world.reader_after(input, earlier).map(Result::unwrap).collect();
    let [Row::Rejected(_), Row::Rejected(_), Row::Finished(row)] = rows.as_slice() else {
        panic!("{rows:?}")
    };
    assert_eq!((row.row, row.file), (2, LineFile::Output));
}
