//! How many tokens a second does a bulk job generate, on one stage and on two over the same cores?
//!
//! The job: 256 chat prompts of 34 to about 400 tokens, 128 new tokens each, greedy, SmolLM2-135M in bf16,
//! all rows in flight. Both layouts must write the same bytes before their times count.
//!
//! `cargo bench --bench bulk_job [-- RUNS]`, with nothing else running.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "a bench prints")]

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

const ROWS: usize = 256;
const NEW_TOKENS: usize = 128;
const WORDS: &str = "the number system of water people answer short story long find day explain how a river shapes its \
                     valley and why bread rises when it is baked summarize this text about trains and old bridges";

/// One way to lay the stages over the machine.
struct Layout {
    name: &'static str,
    devices: &'static str,
}

const LAYOUTS: [Layout; 2] = [
    Layout { name: "one stage", devices: r#"["cpu:0"]"# },
    Layout { name: "two stages", devices: r#"["cpu:0", "cpu:1"]"# },
];

fn main() {
    let runs = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(3);
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/smollm2-135m");
    assert!(model.join("config.json").is_file(), "run `cargo smollm2` first");
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(folder.path().join("input.jsonl"), input()).expect("write the input");

    let first = LAYOUTS.each_ref().map(|layout| run(&model, folder.path(), layout).1);
    assert_eq!(first[0], first[1], "the layouts answer differently");

    let mut rates = [Vec::new(), Vec::new()];
    for _ in 0..runs {
        for (layout, rates) in LAYOUTS.iter().zip(&mut rates) {
            rates.push(run(&model, folder.path(), layout).0);
        }
    }
    for (layout, rates) in LAYOUTS.iter().zip(&rates) {
        let shown: Vec<String> = rates.iter().map(|rate| format!("{rate:.0}")).collect();
        println!("{:<10} {} generated tokens/s, median {:.0}", layout.name, shown.join(" "), median(rates));
    }
    let ratios: Vec<f64> = rates[1].iter().zip(&rates[0]).map(|(two, one)| two / one).collect();
    println!("two stages / one stage, pair by pair: median {:.3}", median(&ratios));
}

/// Runs the job; returns generated tokens per second and the lines without `created`.
fn run(model: &Path, folder: &Path, layout: &Layout) -> (f64, Vec<Value>) {
    let output = folder.join("out");
    let _ = std::fs::remove_dir_all(&output);
    let job = format!(
        "[model]\npath = {model:?}\n[pipeline]\ndevices = {}\nmax_sequences = {ROWS}\n\
         [job]\ninput = \"input.jsonl\"\noutput = \"out\"\n",
        layout.devices
    );
    let file: PathBuf = folder.join("job.toml");
    std::fs::write(&file, job).expect("write the job file");
    let program = env!("CARGO_BIN_EXE_spanwise");
    let done = Command::new(program).arg("run").arg(&file).args(["--progress", "none"]).output();
    let done = done.expect("start spanwise");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let read = |name: &str| std::fs::read_to_string(output.join(name)).expect("an output file");
    let manifest: Value = serde_json::from_str(&read("manifest.json")).expect("JSON");
    let number = |section: &str, key: &str| manifest[section][key].as_f64().expect("a number");
    let mut lines: Vec<Value> =
        read("output.jsonl").lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(lines.len(), ROWS);
    for line in &mut lines {
        line["response"]["body"]["created"] = Value::Null;
    }
    (number("tokens", "generated") / number("timings", "run_seconds"), lines)
}

fn input() -> String {
    let words: Vec<&str> = WORDS.split_whitespace().collect();
    let mut state = 1u64;
    let mut next = |bound: usize| {
        // Knuth's linear congruential generator: the same job on every machine.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % bound
    };
    (0..ROWS)
        .map(|row| {
            // Mostly short, some long: half below 60 words, one in eight up to 360.
            let most = [10, 30, 60, 60, 100, 100, 200, 360][next(8)];
            let text: Vec<&str> = (0..4 + next(most)).map(|_| words[next(words.len())]).collect();
            let body = json!({"messages": [{"role": "user", "content": text.join(" ")}],
                              "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": true});
            let line = json!({"custom_id": format!("row-{row}"), "method": "POST",
                              "url": "/v1/chat/completions", "body": body});
            format!("{line}\n")
        })
        .collect()
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (low, high) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
    (low + high) / 2.0
}
