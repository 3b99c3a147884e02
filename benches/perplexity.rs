//! What does a narrow number type cost in perplexity?
//!
//! Of a text that `tests/reading` has; `tests/jobs/perplexity.rs` holds what a piece of it may cost.
//!
//! `cargo bench --bench perplexity [-- MODEL_DIR]`; the model is SmolLM2-135M if none is named. Nothing is timed.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "a bench prints")]

#[path = "../tests/reading/mod.rs"]
mod reading;

use std::path::{Path, PathBuf};
use std::process::Command;

use reading::{RIVER, logprobs, perplexity};

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
        let program = Command::new(env!("CARGO_BIN_EXE_spanwise"));
        let logprobs = logprobs(program, &model, RIVER, dtype, kv);
        let perplexity = perplexity(&logprobs);
        match bf16 {
            None => bf16 = Some(perplexity),
            Some(bf16) => {
                let more = 100.0 * (perplexity / bf16 - 1.0);
                println!("{dtype:<12} {kv:<4}  {:6}  {perplexity:10.3}  {more:+11.2} %", logprobs.len());
            }
        }
    }
}
