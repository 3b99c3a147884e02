//! Every input that fuzzing has kept, once more, without a fuzzer: what went wrong once stays right.
#![forbid(unsafe_code)]

#[path = "../../fuzz/src/lib.rs"]
#[allow(unreachable_pub, reason = "a crate of its own where cargo-fuzz builds it")]
mod targets;

use std::path::Path;

/// Runs a target over its corpus, in the order of names.
#[track_caller]
fn run(target: &str, run: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let entries =
        std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("read {}: {error}", folder.display()));
    let mut inputs: Vec<_> = entries.map(|entry| entry.expect("read the corpus").path()).collect();
    inputs.sort();
    assert!(!inputs.is_empty(), "{} is empty", folder.display());
    for input in inputs {
        let bytes = std::fs::read(&input).expect("read an input");
        std::panic::catch_unwind(|| run(&bytes)).unwrap_or_else(|_| panic!("by {}", input.display()));
    }
}

#[test]
fn kept_inputs_pass_as_rows() {
    run("rows", targets::rows);
}

#[test]
fn kept_inputs_pass_as_job_files() {
    run("job_file", targets::job_file);
}

#[test]
fn kept_inputs_pass_as_checkpoints() {
    run("checkpoint", targets::checkpoint);
}

#[test]
fn kept_inputs_pass_as_model_configs() {
    run("model_config", targets::model_config);
}

#[test]
fn kept_inputs_pass_as_templates() {
    run("template", targets::template);
}

#[test]
fn kept_inputs_pass_as_files_of_a_models_text() {
    run("model_text", targets::model_text);
}
