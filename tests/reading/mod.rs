//! What a model makes of a text that it reads, for `benches/perplexity.rs` and the tests of jobs.
//!
//! Each token's log-probability after all before it is asked for. The text was written for this, so that no model can have
//! learnt it.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

/// 1,779 tokens of SmolLM2, in paragraphs, each a line.
pub(crate) const RIVER: &str = include_str!("river.txt");

/// The log-probability of each token of a text but the first, by a model with such weights, keys and values; `spanwise` is the
/// program.
pub(crate) fn logprobs(mut spanwise: Command, model: &Path, text: &str, dtype: &str, kv: &str) -> Vec<f64> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| folder.path().join(name);
    let body = json!({"prompt": text, "max_tokens": 0, "echo": true, "logprobs": 1});
    let line = json!({"custom_id": "text", "method": "POST", "url": "/v1/completions", "body": body});
    std::fs::write(path("input.jsonl"), format!("{line}\n")).expect("write the input");
    let job = format!(
        "[model]\npath = {model:?}\ndtype = {dtype:?}\n[pipeline]\nkv_cache_dtype = {kv:?}\n[job]\ninput = \"input.jsonl\"\noutput = \"out\"\n"
    );
    std::fs::write(path("job.toml"), job).expect("write the job file");
    let done = spanwise.arg("run").arg(path("job.toml")).args(["--progress", "none"]).output();
    let done = done.expect("start spanwise");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let line = std::fs::read_to_string(path("out/output.jsonl")).expect("an output file");
    let line: Value = serde_json::from_str(&line).expect("JSON");
    let found = line["response"]["body"]["choices"][0]["logprobs"]["token_logprobs"].as_array();
    let found = found.unwrap_or_else(|| panic!("no log-probabilities in {line}"));
    found.iter().skip(1).map(|value| value.as_f64().expect("a number")).collect()
}

/// `exp` of minus the mean of log-probabilities.
pub(crate) fn perplexity(logprobs: &[f64]) -> f64 {
    (-logprobs.iter().sum::<f64>() / logprobs.len() as f64).exp()
}
