//! One run of the job through the program.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::workload::NEW_TOKENS;

/// The program.
pub(crate) const SPANWISE: &str = env!("CARGO_BIN_EXE_spanwise");

/// Ticks of a second in /proc, on every Linux there is.
const TICKS: f64 = 100.0;

/// A job's folder, with its input.
pub(crate) struct Job {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) model: PathBuf,
    pub(crate) rows: usize,
    pub(crate) prompt_tokens: usize,
}

/// What a run says.
pub(crate) struct Run {
    /// Generated tokens a second, without loading.
    pub(crate) rate: f64,
    /// CPU time of the whole process.
    pub(crate) cpu_seconds: f64,
    /// The most memory that it held, as it says it.
    pub(crate) memory: String,
    /// CPU time of the thread that reads text and of the one that writes it, over the time of the job without loading.
    pub(crate) text: [f64; 2],
    /// Percent of the time that each of its stages computed, in their order.
    pub(crate) busy: String,
    /// The lines, without the moment of the job.
    pub(crate) lines: Vec<Value>,
}

impl Job {
    /// A job over the lines of `input`.
    pub(crate) fn new(model: &Path, input: &str, prompt_tokens: usize) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(folder.path().join("input.jsonl"), input).expect("write the input");
        let (model, rows) = (model.to_owned(), input.lines().count());
        Job { folder, model, rows, prompt_tokens }
    }

    /// Runs it, with more keys set.
    pub(crate) fn run(&self, sets: &[String]) -> Run {
        let Job { model, rows, .. } = self;
        let output = self.folder.path().join("out");
        let _ = std::fs::remove_dir_all(&output);
        let file = self.folder.path().join("job.toml");
        let job = format!(
            "[model]\npath = {model:?}\n[pipeline]\nmax_sequences = {rows}\n\
             [job]\ninput = \"input.jsonl\"\noutput = \"out\"\n"
        );
        std::fs::write(&file, job).expect("write the job file");
        let before = children_cpu_seconds();
        let mut command = Command::new(SPANWISE);
        command.arg("run").arg(&file).args(["--progress", "none"]);
        for set in sets {
            command.args(["--set", set]);
        }
        let done = command.output().expect("start spanwise");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let cpu_seconds = children_cpu_seconds() - before;

        let read = |name: &str| std::fs::read_to_string(output.join(name)).expect("an output file");
        let manifest: Value = serde_json::from_str(&read("manifest.json")).expect("JSON");
        let number = |section: &str, key: &str| manifest[section][key].as_f64().expect("a number");
        assert_eq!(number("tokens", "prompt") as usize, self.prompt_tokens, "tokens of prompts");
        assert_eq!(number("tokens", "generated") as usize, rows * NEW_TOKENS, "generated tokens");
        let mut lines: Vec<Value> =
            read("output.jsonl").lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        assert_eq!(lines.len(), *rows);
        lines.iter_mut().for_each(|line| line["response"]["body"]["created"] = Value::Null);
        let report =
            String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
        let percents = manifest["stages"].as_array().expect("a list").iter().map(|stage| {
            let busy = stage["busy_seconds"].as_f64().expect("a number");
            format!("{:.0}", 100.0 * busy / number("timings", "run_seconds"))
        });
        let busy = percents.collect::<Vec<_>>().join("+");
        let memory = report.lines().find_map(|line| line.strip_prefix("memory")).unwrap_or("not told");
        Run {
            rate: number("tokens", "generated") / number("timings", "run_seconds"),
            cpu_seconds,
            memory: memory.trim().to_owned(),
            text: ["reader_cpu_seconds", "writer_cpu_seconds"]
                .map(|key| number("timings", key) / number("timings", "run_seconds")),
            busy,
            lines,
        }
    }
}

/// CPU seconds of all processes that this one has started and that have ended; none where the system does not say.
fn children_cpu_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The name, in brackets, may hold anything. Times of children are the 14th and 15th field behind it.
    let fields = text.rsplit(')').next().unwrap_or_default().split_whitespace();
    fields.skip(13).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / TICKS
}
