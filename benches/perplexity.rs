//! What does a narrow number type cost in perplexity?
//!
//! The model reads a text that lies beside this file, and each token's log-probability after all before it is
//! asked for. Perplexity is `exp` of minus their mean. The text was written for this, so that no model can have
//! learnt it.
//!
//! `cargo bench --bench perplexity [-- MODEL_DIR]`; the model is SmolLM2-135M if none is named. Nothing is timed.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "a bench prints")]

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

/// Of weights, and of keys and values.
const TYPES: [(&str, &str); 7] = [
    ("f32", "f32"),
    ("bf16", "bf16"),
    ("bf16", "fp8"),
    ("int8", "bf16"),
    ("int8", "fp8"),
    ("int8-weight", "bf16"),
    ("int4-weight", "bf16"),
];
const TEXT: &str = include_str!("perplexity/river.txt");

fn main() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let named = std::env::args().skip(1).find(|arg| !arg.starts_with("--"));
    let model = named.map_or_else(|| root.join("models/smollm2-135m"), PathBuf::from);
    assert!(
        model.join("config.json").is_file(),
        "no model in {model:?}; `cargo smollm2` makes the usual one"
    );
    let model = model.canonicalize().expect("the model's path");

    let mut bf16 = None;
    println!("dtype        kv    tokens  perplexity  against bf16");
    for (dtype, kv) in [("bf16", "bf16")].into_iter().chain(TYPES) {
        let logprobs = logprobs(&model, dtype, kv);
        let perplexity = (-logprobs.iter().sum::<f64>() / logprobs.len() as f64).exp();
        match bf16 {
            None => bf16 = Some(perplexity),
            Some(bf16) => {
                let more = 100.0 * (perplexity / bf16 - 1.0);
                println!("{dtype:<12} {kv:<4}  {:6}  {perplexity:10.3}  {more:+11.2} %", logprobs.len());
            }
        }
    }
}

/// The log-probability of each token of the text but the first.
fn logprobs(model: &Path, dtype: &str, kv: &str) -> Vec<f64> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| folder.path().join(name);
    let body = json!({"prompt": TEXT, "max_tokens": 0, "echo": true, "logprobs": 1});
    let line = json!({"custom_id": "text", "method": "POST", "url": "/v1/completions", "body": body});
    std::fs::write(path("input.jsonl"), format!("{line}\n")).expect("write the input");
    let job = format!(
        "[model]\npath = {model:?}\ndtype = {dtype:?}\n[pipeline]\nkv_cache_dtype = {kv:?}\n[job]\ninput = \"input.jsonl\"\noutput = \"out\"\n"
    );
    std::fs::write(path("job.toml"), job).expect("write the job file");
    let program = env!("CARGO_BIN_EXE_spanwise");
    let done = Command::new(program).arg("run").arg(path("job.toml")).args(["--progress", "none"]).output();
    let done = done.expect("start spanwise");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let line = std::fs::read_to_string(path("out/output.jsonl")).expect("an output file");
    let line: Value = serde_json::from_str(&line).expect("JSON");
    let found = line["response"]["body"]["choices"][0]["logprobs"]["token_logprobs"].as_array();
    let found = found.unwrap_or_else(|| panic!("no log-probabilities in {line}"));
    found.iter().skip(1).map(|value| value.as_f64().expect("a number")).collect()
}
