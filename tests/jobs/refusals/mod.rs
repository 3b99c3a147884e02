//! Bad input: one clear error that names what is wrong, a non-zero exit, nothing lost.

mod folders;
mod inputs;
mod job_files;
mod model_configs;
mod model_files;
mod table;

use std::path::Path;

use serde_json::{Value, json};

use crate::harness::{Done, Job, fixture, read_json};

const MODEL: &str = "hetero-0-bf16";

/// A copy of a model directory whose config.json was changed.
fn changed_config(fixture_name: &str, change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture(fixture_name)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
    }
    let path = copy.path().join("config.json");
    let mut config = read_json(&path);
    change(&mut config);
    std::fs::write(path, config.to_string()).unwrap();
    copy
}

fn run_on(model: &Path) -> Done {
    Job::on_model(model)
        .completion("row", json!({"prompt": "hello", "max_tokens": 2, "ignore_eos": true}))
        .run()
}

#[track_caller]
fn assert_refused(done: &Done, words: &[&str]) {
    assert_eq!(done.code, Some(2), "stdout:\n{}\nstderr:\n{}", done.stdout, done.stderr);
    for word in words {
        assert!(done.stderr.contains(word), "{word:?} is not in:\n{}", done.stderr);
    }
    assert!(!done.stderr.contains("panicked"), "{}", done.stderr);
    assert_eq!(done.text("output.jsonl"), "");
}

#[test]
fn dynamic_rope_is_refused_beyond_its_context_only() {
    let row = json!({"prompt": "hello", "max_tokens": 2, "ignore_eos": true});
    let within = Job::on("dynamic-rope").completion("row", row.clone()).run();
    within.ok();
    let beyond = Job::on("dynamic-rope").set("model.max_context_tokens=100000").completion("row", row).run();
    assert_refused(&beyond, &["max_context_tokens", "100000", "max_position_embeddings"]);
}

#[test]
fn an_output_matrix_that_is_not_there_is_missed() {
    let untied = changed_config("tied", |config| config["tie_word_embeddings"] = json!(false));
    assert_refused(&run_on(untied.path()), &["lm_head.weight", "missing"]);
}

#[test]
fn surplus_tensors_are_one_warning_with_names() {
    let model = changed_config("tied", |_| {});
    let path = model.path().join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let header_bytes = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + header_bytes]).unwrap();
    let data = bytes.len() - 8 - header_bytes;
    for (i, name) in
        ["extra.one", "extra.two", "model.layers.0.self_attn.rotary_emb.inv_freq"].iter().enumerate()
    {
        header[name] =
            json!({"dtype": "F32", "shape": [1], "data_offsets": [data + 4 * i, data + 4 * i + 4]});
    }
    let mut header = header.to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut changed = (header.len() as u64).to_le_bytes().to_vec();
    changed.extend(header);
    changed.extend(&bytes[8 + header_bytes..]);
    changed.extend([0; 12]);
    std::fs::write(&path, changed).unwrap();
    let done = run_on(model.path()).ok();
    assert_eq!(done.stderr.matches("extra.one").count(), 1, "{}", done.stderr);
    assert!(done.stderr.contains("extra.two") && !done.stderr.contains("inv_freq"), "{}", done.stderr);
}

#[test]
fn an_output_folder_with_results_is_not_overwritten() {
    let job =
        Job::on(MODEL).completion("row", json!({"prompt": "hello", "max_tokens": 2, "ignore_eos": true}));
    assert!(job.run_once(&[]).status.success());
    let output = job.out().join("output.jsonl");
    let before = std::fs::read_to_string(&output).unwrap();
    // The same job finds everything done.
    assert!(job.run_once(&[]).status.success());
    assert_eq!(std::fs::read_to_string(&output).unwrap(), before);

    // Lines of nobody knows what are not touched.
    std::fs::remove_file(job.out().join("journal.sqlite")).unwrap();
    let refused = job.run_once(&[]);
    let stderr = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("output.jsonl exists") && stderr.contains("--fresh"), "{stderr}");
    assert_eq!(std::fs::read_to_string(&output).unwrap(), before);
    assert!(job.run_once(&["--fresh"]).status.success());
    assert_eq!(std::fs::read_to_string(&output).unwrap().lines().count(), 1);
}

#[test]
fn a_row_beyond_the_kv_pool_is_an_error_line_before_it_starts() {
    let done = Job::on(MODEL)
        .set("pipeline.kv_cache_tokens=128")
        .completion(
            "fits",
            json!({"prompt": "hello", "max_tokens": 100, "ignore_eos": true, "temperature": 0}),
        )
        .completion("does-not", json!({"prompt": "hello", "max_tokens": 200}))
        .run()
        .ok();
    assert_eq!(done.lines("output.jsonl").len(), 1);
    let errors = done.lines("errors.jsonl");
    assert_eq!(errors[0]["custom_id"], "does-not");
    assert!(errors[0].to_string().contains("128"), "{}", errors[0]);
}
