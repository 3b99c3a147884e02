//! Goes through all items within a time, each in a process of its own but for those that share one, and writes down what they say.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::bars::Bars;
use crate::items::{self, Item, SECTIONS, Setting};
use crate::told::{self, End};

/// How often a process is looked after.
const GLANCE: Duration = Duration::from_millis(20);
/// Lines of what a process that failed has said last.
const LAST_LINES: usize = 12;

/// All items.
pub(crate) struct Suite {
    /// Where results.md goes.
    pub(crate) out: PathBuf,
    /// For all items.
    pub(crate) seconds: u64,
    /// Only items whose name or section has this in it.
    pub(crate) only: String,
}

/// What became of an item.
pub(crate) enum Outcome {
    Lines(Vec<String>),
    Failed(String),
    NotRun(String),
}

/// What became of some items with how long each took, and how a process ended at the one behind them, if it did.
type Answers = (Vec<(Outcome, Duration)>, Option<String>);

impl Outcome {
    /// The same of an item at which a process has ended before, behind others: whatever it is alone, something is wrong.
    fn behind_others(self, died: Option<String>) -> Outcome {
        match (self, died) {
            (Outcome::Lines(_) | Outcome::NotRun(_), Some(why)) => {
                Outcome::Failed(format!("not when it was asked alone, but behind others: {why}"))
            }
            (outcome, _) => outcome,
        }
    }
}

/// Whether a line of the results is of an item that was not done.
pub(crate) fn is_not_done(line: &str) -> bool {
    line.contains(": **failed**") || line.contains(": not run, ")
}

impl Suite {
    /// Whether every item that was begun came to its end.
    pub(crate) fn run(&self, setting: &Setting) -> Result<bool> {
        fs::create_dir_all(&self.out).with_context(|| format!("make {}", self.out.display()))?;
        fs::create_dir_all(&setting.cache).context("make the cache")?;
        let begun = Instant::now();
        let (mut results, mut is_right) = (Results::default(), true);
        let items = items::all(setting);
        let wanted = |item: &&Item| item.name.contains(&self.only) || item.section.contains(&self.only);
        let wanted: Vec<&Item> = items.iter().filter(wanted).collect();
        let (mut rest, mut died) = (&wanted[..], None);
        while !rest.is_empty() {
            let mut at = begun.elapsed();
            let (answers, died_behind) = self.ask_first(rest, setting, at)?;
            let (answered, others) = rest.split_at(answers.len());
            for (item, (outcome, took)) in answered.iter().zip(answers) {
                let outcome = outcome.behind_others(died.take());
                is_right &= !matches!(outcome, Outcome::Failed(_));
                print!("{}", results.add(item, &outcome, [at, took]));
                at += took;
            }
            fs::write(self.out.join("results.md"), results.text()).context("write results.md")?;
            (rest, died) = (others, died_behind);
        }
        let _ = fs::remove_dir_all(&setting.cache);
        Ok(is_right)
    }

    /// Has the first items answered, one or those that share its process, unless too little time is left.
    fn ask_first(&self, items: &[&Item], setting: &Setting, since: Duration) -> Result<Answers> {
        let (first, left) = (items[0], self.seconds.saturating_sub(since.as_secs()));
        if left < first.least_seconds && !setting.is_small {
            let why = format!("{left} s were left of {}", self.seconds);
            return Ok((vec![(Outcome::NotRun(why), Duration::ZERO)], None));
        }
        let shared = items.iter().take_while(|item| item.shares_process_with(first)).count();
        self.ask(&items[..shared.max(1)], setting, Duration::from_secs(left.max(1)))
    }

    /// Has a process answer items: what is known of the first ones, of one at least, and what [`told::settle`] tells of the next.
    fn ask(&self, items: &[&Item], setting: &Setting, left: Duration) -> Result<Answers> {
        let heard = ["stdout", "stderr"].map(|name| setting.cache.join(name));
        let mut command = Command::new(std::env::current_exe().context("find this program")?);
        for item in items {
            command.args(["--item", &item.name]);
        }
        command.arg("--cache").arg(&setting.cache).stdin(Stdio::null());
        // NCCL's own setting that lets two ranks be on one GPU, from version 2.30 on: for tests alone.
        command.env("NCCL_MULTI_RANK_GPU_ENABLE", "1");
        if setting.is_small {
            command.arg("--small");
        }
        if let Some(folder) = &setting.libraries {
            command.arg("--libraries").arg(folder);
        }
        command.stdout(File::create(&heard[0])?).stderr(File::create(&heard[1])?);
        let mut child = command.spawn().context("start an item")?;
        let (status, took) = listen(&mut child, &heard[0], items, left)?;
        let [said, complained] = heard.map(|path| read(&path));
        let answers = told::answers(&said);
        let end = match status {
            Some(status) if status.success() && answers.len() == items.len() => End::Well,
            Some(status) => End::Died(format!("{status}\n{}", last_lines(&complained))),
            None => End::NotDone(format!(
                "not done after {} s\n{}",
                took.last().map_or(0, Duration::as_secs),
                last_lines(&format!("{said}{complained}"))
            )),
        };
        let (outcomes, died) = told::settle(answers, items.len(), end);
        Ok((outcomes.into_iter().zip(took).collect(), died))
    }
}

/// Until a process that answers items ends, or is ended because one of them, or all, have taken too long. With what each took that it
/// came to.
fn listen(
    child: &mut Child,
    said: &Path,
    items: &[&Item],
    left: Duration,
) -> Result<(Option<ExitStatus>, Vec<Duration>)> {
    let begun = Instant::now();
    let (mut took, mut before) = (Vec::new(), Duration::ZERO);
    loop {
        // Before it is heard: one that has ended says no more.
        let status = child.try_wait()?;
        let since = begun.elapsed();
        for _ in took.len()..told::answers(&read(said)).len() {
            took.push(since - before);
            before = since;
        }
        let item = items[took.len().min(items.len() - 1)];
        let is_over = since > left || since - before > Duration::from_secs(item.most_seconds);
        if status.is_none() && is_over {
            child.kill()?;
            child.wait()?;
        }
        if status.is_some() || is_over {
            took.push(since - before); // Of the one that it was about.
            return Ok((status, took));
        }
        std::thread::sleep(GLANCE);
    }
}

fn read(path: &Path) -> String {
    let mut bytes = Vec::new();
    let _ = File::open(path).and_then(|mut file| file.read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LAST_LINES)..].join("\n")
}

/// Items as Markdown, by sections, and the bars before all.
#[derive(Default)]
struct Results {
    items: Vec<(&'static str, String)>,
    bars: Bars,
}

impl Results {
    /// An item with when it began and how long it took.
    fn add(&mut self, item: &Item, outcome: &Outcome, times: [Duration; 2]) -> String {
        let [at, took] = times.map(|time| time.as_secs_f64());
        let bar = if item.bar == "none" { String::new() } else { format!("; bar: {}", item.bar) };
        let text = match outcome {
            Outcome::Lines(lines) if lines.len() == 1 => {
                format!("* {}: {} ({took:.1} s at {at:.1} s{bar})\n", item.name, lines[0])
            }
            Outcome::Lines(lines) => {
                let lines: String = lines.iter().map(|line| format!("  * {line}\n")).collect();
                format!("* {} ({took:.1} s at {at:.1} s{bar})\n{lines}", item.name)
            }
            Outcome::NotRun(why) => format!("* {}: not run, {why}\n", item.name),
            Outcome::Failed(why) => {
                let why: String = why.lines().map(|line| format!("      {line}\n")).collect();
                format!("* {}: **failed** ({took:.1} s at {at:.1} s)\n\n{why}\n", item.name)
            }
        };
        self.bars.add(item, outcome);
        self.items.push((item.section, text.clone()));
        text
    }

    fn text(&self) -> String {
        let mut text = "# The CUDA backend on this GPU\n".to_owned() + &self.bars.text();
        for section in SECTIONS {
            let mut items = self.items.iter().filter(|(of, _)| *of == section).peekable();
            if items.peek().is_some() {
                text += &format!("\n## {section}\n\n");
                items.for_each(|(_, item)| text += item);
            }
        }
        text
    }
}
