//! How far a job is, for whoever watches it: a bar on a terminal, plain lines elsewhere.

use std::io::{BufRead, BufReader, IsTerminal};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use actors::{JobProgress, PipelineClock};
use indicatif::{ProgressBar, ProgressStyle};

use crate::cli::ProgressKind;
use crate::text::{duration, grouped, rate};

/// Between two looks of the bar.
const BAR_INTERVAL: Duration = Duration::from_millis(200);
/// Between two plain lines: a day's log stays short enough to read.
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);
/// The rate shown is that of about this long.
const RATE_SPAN: Duration = Duration::from_secs(10);

/// What is watched.
#[derive(Clone)]
pub(crate) struct Watched {
    pub(crate) progress: Arc<JobProgress>,
    /// Of each replica.
    pub(crate) clocks: Vec<Arc<PipelineClock>>,
    /// Rows of the input, once they are counted.
    pub(crate) total_rows: Arc<AtomicU64>,
}

/// Shows progress from a thread of its own until it is dropped.
pub(crate) struct Display {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Display {
    /// Starts showing.
    pub(crate) fn start(kind: ProgressKind, watched: Watched) -> Self {
        let is_bar = match kind {
            ProgressKind::Auto => std::io::stderr().is_terminal(),
            ProgressKind::Bar => true,
            ProgressKind::Plain => false,
            ProgressKind::None => return Display { stop: Arc::default(), thread: None },
        };
        let stop = Arc::new(AtomicBool::new(false));
        let is_stopped = Arc::clone(&stop);
        let run = move || match is_bar {
            true => show_bar(&watched, &is_stopped),
            false => show_lines(&watched, &is_stopped),
        };
        let thread = std::thread::Builder::new().name("progress".into()).spawn(run).ok();
        Display { stop, thread }
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

fn show_bar(watched: &Watched, is_stopped: &AtomicBool) {
    let style =
        ProgressStyle::with_template("{bar:30} {pos}/{len} rows  {msg}").expect("the template is right");
    let bar = ProgressBar::new(0).with_style(style);
    let mut rate = Rate::new();
    while !is_stopped.load(Ordering::Relaxed) {
        let now = Reading::take(watched);
        bar.set_length(now.total_rows.max(now.rows));
        bar.set_position(now.rows);
        bar.set_message(now.describe(rate.update(&now)));
        std::thread::park_timeout(BAR_INTERVAL);
    }
    bar.finish_and_clear();
}

fn show_lines(watched: &Watched, is_stopped: &AtomicBool) {
    let mut rate = Rate::new();
    let mut next = Instant::now() + PLAIN_INTERVAL;
    while !is_stopped.load(Ordering::Relaxed) {
        std::thread::park_timeout(next.saturating_duration_since(Instant::now()));
        if Instant::now() < next {
            continue;
        }
        next += PLAIN_INTERVAL;
        let now = Reading::take(watched);
        let total = if now.total_rows == 0 { String::new() } else { format!("/{}", grouped(now.total_rows)) };
        let rows = grouped(now.rows);
        crate::say(&format!("{rows}{total} rows  {}", now.describe(rate.update(&now))));
    }
}

/// How far a job is at one moment.
struct Reading {
    at: Instant,
    rows: u64,
    /// Rows of these that this run had nothing to do for.
    resumed: u64,
    failed: u64,
    total_rows: u64,
    sampled_tokens: u64,
}

impl Reading {
    fn take(watched: &Watched) -> Self {
        let failed = watched.progress.failed.load(Ordering::Relaxed);
        Reading {
            at: Instant::now(),
            rows: watched.progress.completed.load(Ordering::Relaxed) + failed,
            resumed: watched.progress.resumed.load(Ordering::Relaxed),
            failed,
            total_rows: watched.total_rows.load(Ordering::Relaxed),
            sampled_tokens: watched.clocks.iter().map(|clock| clock.sampled_tokens()).sum(),
        }
    }

    fn describe(&self, rates: Rates) -> String {
        let failed =
            if self.failed == 0 { String::new() } else { format!("{} failed, ", grouped(self.failed)) };
        let left = self.total_rows.saturating_sub(self.rows);
        let eta = match rates.rows {
            rate if rate > 0.0 && self.total_rows > 0 => format!(", {} left", duration(left as f64 / rate)),
            _ => String::new(),
        };
        format!(
            "{failed}{} tokens generated, {} tokens/s{eta}",
            grouped(self.sampled_tokens),
            rate(rates.tokens)
        )
    }
}

/// Per second.
struct Rates {
    rows: f64,
    tokens: f64,
}

/// Rows a second since the start, for the time left; tokens a second of late, for the eye.
struct Rate {
    start: Instant,
    recent: (Instant, u64),
    previous: (Instant, u64),
}

impl Rate {
    fn new() -> Self {
        let start = Instant::now();
        Rate { start, recent: (start, 0), previous: (start, 0) }
    }

    fn update(&mut self, now: &Reading) -> Rates {
        if now.at - self.recent.0 > RATE_SPAN / 2 {
            self.previous = std::mem::replace(&mut self.recent, (now.at, now.sampled_tokens));
        }
        let (since, tokens) = self.previous;
        let per_second = |count: u64, since: Instant| count as f64 / (now.at - since).as_secs_f64().max(1e-3);
        Rates {
            rows: per_second(now.rows.saturating_sub(now.resumed), self.start),
            tokens: per_second(now.sampled_tokens - tokens, since),
        }
    }
}

/// Counts the rows of an input on a thread of its own: the lines that are not blank. A pipe can be read
/// only once, and its rows are counted as they come.
pub(crate) fn count_rows(input: &Path, limit: Option<u64>) -> Arc<AtomicU64> {
    let total = Arc::new(AtomicU64::new(0));
    if !input.is_file() {
        return total;
    }
    let (counted, input) = (Arc::clone(&total), input.to_owned());
    std::thread::spawn(move || {
        // Who cannot read the file here says so where its rows are read.
        let Some(rows) = rows_up_to(&input, u64::MAX) else { return };
        counted.store(rows.min(limit.unwrap_or(u64::MAX)), Ordering::Relaxed);
    });
    total
}

/// Whether an input has more rows than so many, of those up to `limit`. One that can be read only once seems to have.
pub(crate) fn has_more_rows(input: &Path, limit: Option<u64>, than: u64) -> bool {
    let rows = || if input.is_file() { rows_up_to(input, than.saturating_add(1)) } else { None };
    limit.is_none_or(|limit| limit > than) && rows().is_none_or(|rows| rows > than)
}

/// Counts a file's lines that are not blank, and stops where there are `most` or more.
fn rows_up_to(input: &Path, most: u64) -> Option<u64> {
    let (mut rows, mut is_blank) = (0u64, true);
    let mut reader = BufReader::with_capacity(1 << 20, std::fs::File::open(input).ok()?);
    while rows < most
        && let Ok(bytes) = reader.fill_buf()
        && !bytes.is_empty()
    {
        for &byte in bytes {
            match byte {
                b'\n' => {
                    rows += u64::from(!is_blank);
                    is_blank = true;
                }
                _ => is_blank &= byte.is_ascii_whitespace(),
            }
        }
        let length = bytes.len();
        reader.consume(length);
    }
    Some(rows + u64::from(!is_blank))
}
