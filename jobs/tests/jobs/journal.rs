//! The journal against a plain model of it: runs that end in every way, over inputs that change.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use jobs::{EarlierRuns, JournalView, Line, LineFile, Order, OutputFolder, Row, Settings, Unread, Writer};
use proptest::collection::vec;
use proptest::prelude::*;
use scheduler::{Generated, Request, RequestKey, Sampling, TokenLogprobs};
use serde_json::json;
use tempfile::TempDir;

use crate::model::{World, completion_line};

/// What the lines of a row are like is decided by its key: every fifth fails, every seventh is refused.
pub(crate) fn line(key: u8, row: u64) -> Line {
    let is_refusal = key % 7 == 6;
    let file = if key % 5 == 4 || is_refusal { LineFile::Errors } else { LineFile::Output };
    let json = match is_refusal {
        true => format!("{{\"key\":{key},\"line\":{row}}}"),
        false => format!("{{\"key\":{key},\"text\":\"{}\"}}", "x".repeat(usize::from(key) * 3)),
    };
    let key = RequestKey(key.into());
    Line { row, key, file, is_refusal, prompt_tokens: 1, generated_tokens: 2, json }
}

/// One run of a job.
#[derive(Debug, Clone)]
struct Run {
    /// Rows that failed are looked at again.
    is_retry: bool,
    /// Keys of the rows, none twice.
    input: Vec<u8>,
    /// Rows are completed in the order of their key times this.
    stir: u8,
    commit_every: usize,
    order: Order,
    /// Before the row of the same place is done, a piece of a later one: of which, from which token on,
    /// and of how many.
    pieces: Vec<(usize, u64, u32)>,
    end: End,
}

#[derive(Debug, Clone)]
enum End {
    /// All rows were seen.
    Finish,
    /// All rows were seen, and a limit may have hidden more.
    Limited,
    /// The user stopped it after so many rows.
    Pause(usize),
    /// It died after so many rows, and left this behind the lines, and the journal's log so much shorter.
    Crash { rows: usize, tail: Vec<u8>, torn: usize },
}

fn end() -> impl Strategy<Value = End> {
    prop_oneof![
        2 => Just(End::Finish),
        1 => Just(End::Limited),
        1 => (0..24usize).prop_map(End::Pause),
        5 => (0..24usize, vec(any::<u8>(), 0..40), 0..9000usize)
            .prop_map(|(rows, tail, torn)| End::Crash { rows, tail, torn }),
    ]
}

fn run() -> impl Strategy<Value = Run> {
    let keys = Just((0..24u8).collect::<Vec<u8>>()).prop_shuffle();
    let order = prop_oneof![3 => Just(Order::Input), 1 => Just(Order::Completion)];
    let pieces = vec((0..4usize, 0..8u64, 0..5u32), 24);
    let is_retry = prop_oneof![3 => Just(false), 1 => Just(true)];
    (is_retry, keys, 0..24usize, any::<u8>(), 1..6usize, order, pieces, end()).prop_map(
        |(is_retry, mut input, len, stir, commit_every, order, pieces, end)| {
            input.truncate(len);
            Run { is_retry, input, stir: stir | 1, commit_every, order, pieces, end }
        },
    )
}

/// Lines of `output.jsonl`, `errors.jsonl` and `stale.jsonl`, each with its row's key.
#[derive(Debug, Clone, Default, PartialEq)]
struct Lines([Vec<(u8, String)>; 3]);

impl Lines {
    fn add(&mut self, line: &Line) {
        self.0[line.file as usize].push((line.key.0 as u8, line.json.clone()));
    }

    fn has(&self, key: u8) -> bool {
        self.0[..2].iter().flatten().any(|(other, _)| *other == key)
    }

    fn text(&self, file: LineFile) -> String {
        self.0[file as usize].iter().map(|(_, json)| format!("{json}\n")).collect()
    }

    /// Whether the folder has exactly these; those that are stale in any order.
    fn are_in(&self, folder: &Path) -> bool {
        let read = |file: LineFile| std::fs::read(folder.join(file.name())).unwrap_or_default();
        let sorted = |bytes: &[u8]| {
            let mut lines: Vec<Vec<u8>> =
                bytes.split_inclusive(|b| *b == b'\n').map(<[u8]>::to_vec).collect();
            lines.sort();
            lines
        };
        [LineFile::Output, LineFile::Errors].into_iter().all(|file| read(file) == self.text(file).as_bytes())
            && sorted(&read(LineFile::Stale)) == sorted(self.text(LineFile::Stale).as_bytes())
    }
}

/// What is committed in a folder.
#[derive(Debug, Clone, Default, PartialEq)]
struct State {
    lines: Lines,
    tokens: Tokens,
    /// Rows with a line that a retry was to look at again, and has not.
    failed: BTreeSet<u8>,
}

impl State {
    /// Whether the next run looks at a row again whatever line it has.
    fn is_open(&self, key: u8) -> bool {
        is_refusal(key) || self.failed.contains(&key)
    }
}

fn open(folder: &Path, order: Order) -> (Writer, EarlierRuns) {
    begin(OutputFolder::open(folder, false).unwrap(), order)
}

fn begin(folder: OutputFolder, order: Order) -> (Writer, EarlierRuns) {
    folder.begin(order, &Settings::default(), 1, false).unwrap()
}

fn is_refusal(key: u8) -> bool {
    line(key, 0).is_refusal
}

/// The folder as a process that dies now leaves it.
fn crash(folder: &Path, tail: &[u8], torn: usize, log_at_begin: u64) -> TempDir {
    let copy = TempDir::new().unwrap();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
    }
    for file in LineFile::ALL {
        let path = copy.path().join(file.name());
        if let Ok(mut bytes) = std::fs::read(&path) {
            bytes.extend(tail);
            std::fs::write(path, bytes).unwrap();
        }
    }
    // Whatever was synced when the run began cannot be torn.
    let log = copy.path().join("journal.sqlite-wal");
    let length = std::fs::metadata(&log).unwrap().len();
    let torn = std::fs::OpenOptions::new().write(true).open(&log).map(|log| {
        log.set_len(length.saturating_sub(torn as u64).max(log_at_begin)).unwrap();
    });
    torn.unwrap();
    copy
}

/// Tokens of rows that have no line, by their keys; no row has none.
type Tokens = BTreeMap<u8, Vec<u32>>;

/// The piece of a row from one of its tokens on, with scores that follow from the tokens.
pub(crate) fn piece(first: u64, tokens: Vec<u32>) -> Generated {
    let score = |&token: &u32| TokenLogprobs { token, logprob: -(token as f32), top: vec![(token, 0.5)] };
    let logprobs = tokens.iter().map(score).collect();
    // The prompt has two tokens, and its first has no score.
    let prompt_logprobs = if first == 0 { vec![score(&1)] } else { vec![] };
    Generated { tokens, logprobs, prompt_logprobs }
}

/// What the model has of a row once a piece is added to it.
fn add_piece(tokens: &mut Tokens, key: u8, first: u64, more: &[u32]) {
    let mut row = tokens.remove(&key).unwrap_or_default();
    if first as usize <= row.len() {
        row.truncate(first as usize);
        row.extend(more);
    }
    if !row.is_empty() {
        tokens.insert(key, row);
    }
}

/// What a reader would hand over of each row.
fn tokens_of(earlier: &mut EarlierRuns) -> Tokens {
    let sampling =
        Sampling { temperature: 1.0, logprobs: Some(1), prompt_logprobs: true, ..Sampling::greedy(1000) };
    let sampling = Arc::new(sampling);
    let of_row = |key: u8| {
        let key_of_row = RequestKey(key.into());
        let request =
            Request { key: key_of_row, prompt: vec![1, 2], sampling: Arc::clone(&sampling), sample: 0 };
        let so_far = earlier.take_so_far(&request);
        assert!(so_far == Generated::default() || so_far == piece(0, so_far.tokens.clone()), "{so_far:?}");
        (key, so_far.tokens)
    };
    (0..24).map(of_row).filter(|(_, tokens)| !tokens.is_empty()).collect()
}

/// Whether the journal, as others see it, vouches for lines of these that are there with every byte.
fn check_view(folder: &Path, lines: &Lines) {
    let view = JournalView::open(folder).unwrap().unwrap();
    let mut met = Vec::new();
    let mut ends = [0; 3];
    let files = LineFile::ALL.map(|file| std::fs::read(folder.join(file.name())).unwrap_or_default());
    let visit = |entry: &jobs::Entry| {
        let at = entry.file as usize;
        assert!(entry.offset >= ends[at], "lines stand in the order of the walk");
        ends[at] = entry.offset + entry.length;
        let bytes = &files[at][entry.offset as usize..ends[at] as usize];
        assert_eq!(entry.hash, blake3::hash(bytes).as_bytes()[..16]);
        let key = entry.key.0 as u8;
        let text = std::str::from_utf8(bytes).unwrap().trim_end();
        assert!(lines.0[at].iter().any(|(other, line)| *other == key && line == text), "{key}: {text}");
        met.push(key);
        Ok(())
    };
    view.for_each_entry(visit).unwrap();
    let progress = view.progress().unwrap();
    assert_eq!(progress.output_lines + progress.error_lines, met.len() as u64);
    assert_eq!(progress.generated_tokens, 2 * met.len() as u64);
    met.sort_unstable();
    let mut wanted: Vec<u8> = lines.0[..2].iter().flatten().map(|(key, _)| *key).collect();
    wanted.sort_unstable();
    // Of a row that was looked at again the older line was forgotten.
    wanted.dedup();
    assert_eq!(met, wanted);
}

/// Runs once and compares with the model; the folder as it is then, and what is committed in it.
fn check(folder: TempDir, mut state: State, run: &Run) -> (TempDir, State) {
    let output = OutputFolder::open(folder.path(), false).unwrap();
    let (mut writer, mut earlier) = match run.is_retry {
        true => begin(output.for_retry(), run.order),
        false => begin(output, run.order),
    };
    if run.is_retry {
        state.failed = state.lines.0[1].iter().map(|(key, _)| *key).collect();
    }
    let before = state.clone();
    assert_eq!(tokens_of(&mut earlier), before.tokens);
    let finished = &mut earlier.finished;
    let log_at_begin = std::fs::metadata(folder.path().join("journal.sqlite-wal")).map_or(0, |log| log.len());
    assert!(before.lines.are_in(folder.path()), "{before:?}");
    for key in 0..24 {
        let is_there = finished.find(RequestKey(key.into()), 0).unwrap().is_some();
        assert_eq!(is_there, before.lines.has(key) && !before.is_open(key), "key {key}");
    }

    let rows = match run.end {
        End::Pause(rows) | End::Crash { rows, .. } => rows,
        End::Finish | End::Limited => usize::MAX,
    };
    let mut completed: Vec<(u64, u8)> = (0..).zip(run.input.iter().copied()).collect();
    completed.sort_by_key(|(_, key)| key.wrapping_mul(run.stir));
    let mut history = vec![before.clone()];
    for (done, (row, key)) in completed.iter().copied().take(rows).enumerate() {
        let (ahead, first, len) = run.pieces[done];
        if let Some((_, later)) = completed.get(done + ahead)
            && !before.lines.has(*later)
        {
            let more: Vec<u32> = (0..len).map(|at| 100 * done as u32 + at).collect();
            writer.checkpoint(RequestKey((*later).into()), first, &piece(first, more.clone())).unwrap();
            add_piece(&mut state.tokens, *later, first, &more);
        }
        match finished.find(RequestKey(key.into()), row).unwrap() {
            Some(finished) => writer.keep(finished).unwrap(),
            None => {
                writer.write(&line(key, row)).unwrap();
                state.lines.add(&line(key, row));
                state.tokens.remove(&key);
                state.failed.remove(&key);
            }
        }
        if done % run.commit_every == 0 {
            writer.commit().unwrap();
            history.push(state.clone());
        }
    }
    match &run.end {
        End::Crash { tail, torn, .. } => {
            let left = crash(folder.path(), tail, *torn, log_at_begin);
            drop((writer, folder));
            // What was never committed is cut off now.
            let left_tokens = tokens_of(&mut open(left.path(), run.order).1);
            let is_left = |state: &&State| state.tokens == left_tokens && state.lines.are_in(left.path());
            let survivor = history.iter().rev().find(is_left);
            let survivor = survivor.expect("a crash leaves what was committed at one time").clone();
            assert!(*torn > 0 || Some(&survivor) == history.last(), "nothing that was committed is lost");
            (left, survivor)
        }
        End::Pause(_) => {
            writer.pause().unwrap();
            check_view(folder.path(), &state.lines);
            (folder, state)
        }
        End::Finish | End::Limited => {
            let is_limited = matches!(run.end, End::Limited);
            writer.finish(if is_limited { Unread::Stays } else { Unread::HasLeft }).unwrap();
            state.lines = settled(&state, run, is_limited);
            check_view(folder.path(), &state.lines);
            if !is_limited {
                state.tokens.clear();
                state.failed.clear();
            }
            (folder, state)
        }
    }
}

/// What a finished run makes of its lines.
fn settled(state: &State, run: &Run, is_limited: bool) -> Lines {
    let lines = &state.lines;
    let mut settled = Lines::default();
    settled.0[2] = lines.0[2].clone();
    for file in 0..2 {
        // Of a row that was looked at again the last line counts; the one before was forgotten.
        let is_last = |at: usize, key: u8| !lines.0[file][at + 1..].iter().any(|(other, _)| *other == key);
        let stays = |key: u8| is_limited || run.input.contains(&key) || !state.is_open(key);
        let alive = (lines.0[file].iter().enumerate())
            .filter(|(at, (key, _))| is_last(*at, *key) && stays(*key))
            .map(|(_, line)| line.clone());
        if run.order == Order::Completion && is_limited {
            settled.0[file] = alive.collect();
            continue;
        }
        let (mut present, absent): (Vec<_>, Vec<_>) = alive.partition(|(key, _)| run.input.contains(key));
        if run.order == Order::Input {
            present.sort_by_key(|(key, _)| run.input.iter().position(|other| other == key));
        }
        settled.0[file] = present;
        settled.0[if is_limited { file } else { 2 }].extend(absent);
    }
    settled
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn a_folder_is_what_the_model_says_after_any_runs(runs in vec(run(), 1..6)) {
        let mut state = (TempDir::new().unwrap(), State::default());
        for run in &runs {
            state = check(state.0, state.1, run);
            if let End::Finish = run.end {
                let mut keys: Vec<u8> = state.1.lines.0[..2].iter().flatten().map(|(key, _)| *key).collect();
                let mut input = run.input.clone();
                keys.sort_unstable();
                input.sort_unstable();
                prop_assert_eq!(keys, input, "each row of the input has one line");
            }
        }
    }
}

/// Rows 0 to 7, the last first, as they are before the job's end.
pub(crate) fn unsettled(folder: &Path) -> Writer {
    let (mut writer, _) = open(folder, Order::Input);
    for row in (0..8u8).rev() {
        writer.write(&line(row, row.into())).unwrap();
    }
    writer.commit().unwrap();
    writer
}

fn read(folder: &Path, name: &str) -> String {
    std::fs::read_to_string(folder.join(name)).unwrap()
}

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
