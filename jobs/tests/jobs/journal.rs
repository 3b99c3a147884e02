//! The journal against a plain model of it: runs that end in every way, over inputs that change. `cases` tests it case by case.

mod cases;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use jobs::{EarlierRuns, JournalView, Line, LineFile, Order, OutputFolder, Settings, Unread, Writer};
use proptest::collection::vec;
use proptest::prelude::*;
use scheduler::{Generated, Request, RequestKey, Sampling, TokenLogprobs};
use tempfile::TempDir;

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
