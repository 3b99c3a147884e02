//! Goes through all items within a time, each in a process of its own, and writes down what they say.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::bars::Bars;
use crate::items::{self, Item, SECTIONS, Setting};

/// How often a process is looked after.
const GLANCE: Duration = Duration::from_millis(20);
/// Lines of what a process that failed has said last.
const LAST_LINES: usize = 12;

/// Status of an item that has asked nothing and has said why.
pub(crate) const NOTHING_ASKED: i32 = 3;

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
        let items = items::all(setting).0;
        let wanted = |item: &&Item| item.name.contains(&self.only) || item.section.contains(&self.only);
        for item in items.iter().filter(wanted) {
            let since = begun.elapsed();
            let left = self.seconds.saturating_sub(since.as_secs());
            let outcome = match left < item.least_seconds && !setting.is_small {
                true => Outcome::NotRun(format!("{left} s were left of {}", self.seconds)),
                false => self.ask(item, setting, Duration::from_secs(left.min(item.most_seconds).max(1)))?,
            };
            is_right &= !matches!(outcome, Outcome::Failed(_));
            let text = results.add(item, &outcome, [since, begun.elapsed() - since]);
            print!("{text}");
            fs::write(self.out.join("results.md"), results.text()).context("write results.md")?;
        }
        let _ = fs::remove_dir_all(&setting.cache);
        Ok(is_right)
    }

    /// Has a process answer an item.
    fn ask(&self, item: &Item, setting: &Setting, patience: Duration) -> Result<Outcome> {
        let heard = ["stdout", "stderr"].map(|name| setting.cache.join(name));
        let mut command = Command::new(std::env::current_exe().context("find this program")?);
        command.args(["--item", &item.name, "--cache"]).arg(&setting.cache).stdin(Stdio::null());
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
        let status = wait(&mut child, patience)?;
        let [said, complained] = heard.map(|path| read(&path));
        Ok(match status {
            Some(status) if status.success() => Outcome::Lines(said.lines().map(str::to_owned).collect()),
            Some(status) if status.code() == Some(NOTHING_ASKED) => {
                Outcome::NotRun(said.trim_end().to_owned())
            }
            Some(status) => Outcome::Failed(format!("{status}\n{}", last_lines(&complained))),
            None => Outcome::Failed(format!(
                "not done after {} s\n{}",
                patience.as_secs(),
                last_lines(&format!("{said}{complained}"))
            )),
        })
    }
}

/// Until it ends; ends it when the time is over.
fn wait(child: &mut Child, patience: Duration) -> Result<Option<ExitStatus>> {
    let begun = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if begun.elapsed() > patience {
            child.kill()?;
            child.wait()?;
            return Ok(None);
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
