//! The journal as others see it, beside a run and after it.

use jobs::{JournalView, LineFile, Unread};
use scheduler::RequestKey;
use tempfile::TempDir;

use crate::journal::{line, piece, unsettled};

#[test]
fn others_see_one_moment_of_a_running_job_and_leave_nothing_behind() {
    let folder = TempDir::new().unwrap();
    assert!(JournalView::open(folder.path()).unwrap().is_none());
    let mut writer = unsettled(folder.path());
    let view = JournalView::open(folder.path()).unwrap().unwrap();
    writer.write(&line(8, 8)).unwrap();
    writer.checkpoint(RequestKey(9), 0, &piece(0, vec![1, 2, 3])).unwrap();
    writer.commit().unwrap();
    let before = view.progress().unwrap();
    assert_eq!((before.output_lines, before.unfinished_tokens), (6, 0));
    drop(view);
    let now = JournalView::open(folder.path()).unwrap().unwrap().progress().unwrap();
    assert_eq!((now.output_lines, now.error_lines, now.unfinished_tokens), (7, 2, 3));
    assert!(now.began > 0 && now.committed >= now.began && now.earlier_lines == 0, "{now:?}");

    writer.finish(Unread::HasLeft).unwrap();
    let names = || std::fs::read_dir(folder.path()).unwrap().count();
    let count = names();
    let view = JournalView::open(folder.path()).unwrap().unwrap();
    assert_eq!(view.progress().unwrap().unfinished_tokens, 0);
    let mut keys = Vec::new();
    let visit = |entry: &jobs::Entry| {
        keys.push(entry.key.0);
        Ok(())
    };
    view.for_each_entry(visit).unwrap();
    assert_eq!(keys, (0..9).collect::<Vec<_>>());
    let mut finished = view.finished().unwrap();
    assert_eq!(finished.len(), 9);
    assert_eq!(finished.find(RequestKey(4), 1).unwrap().unwrap().file, LineFile::Errors);
    drop(view);
    assert_eq!(names(), count);
}

/// Root may write everywhere: run by root, this test shows less than it says.
#[test]
fn a_folder_that_may_only_be_read_can_be_looked_at() {
    use std::os::unix::fs::PermissionsExt;

    let folder = TempDir::with_prefix("of a job? #1%").unwrap();
    unsettled(folder.path()).finish(Unread::HasLeft).unwrap();
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o555)).unwrap();
    let view = JournalView::open(folder.path()).unwrap().unwrap();
    assert_eq!(view.progress().unwrap().output_lines, 6);
    drop(view);
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
}
