//! Abacus, the model that ships with the program: what it gets right, and that its score is a guard.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::disturbed::assert_done;
use crate::harness::{Done, Job, devices, levels, read_json, root};

const THINKING: &str = r#"
[prompt]
system = "detailed thinking on"
user = "{{ prompt }}"
[sampling]
temperature = 0.6
top_p = 0.95
max_tokens = 256
[grade]
kind = "boxed"
"#;

fn abacus() -> PathBuf {
    root().join("models/abacus")
}

/// The first of the questions of the quickstart; kinds take turns in it.
fn questions(count: usize) -> Vec<String> {
    let path = root().join("configs/quickstart/questions.jsonl");
    let text = fs::read_to_string(path).expect("the questions");
    let questions: Vec<String> = text.lines().take(count).map(str::to_owned).collect();
    assert_eq!(questions.len(), count);
    questions
}

fn score(done: &Done) -> f64 {
    let manifest = read_json(&done.folder.path().join("out/manifest.json"));
    assert_eq!(manifest["scores"]["all"]["rows"], manifest["counts"]["total"]);
    manifest["scores"]["all"]["pass_at_1"].as_f64().expect("a score")
}

#[test]
fn it_is_right_on_every_level_of_instructions() {
    for simd in levels() {
        // The plain loops take minutes for all that the others do in seconds.
        let count = if simd == "reference" { 24 } else { 240 };
        let done = Job::on_model(&abacus())
            .lines(questions(count))
            .toml(THINKING)
            .set(format!("pipeline.simd={simd}"))
            .set(devices(2))
            .run()
            .ok();
        let score = score(&done);
        assert!(score >= 0.95, "{simd}: {score}\n{}", done.stdout);
        assert!(done.stdout.lines().any(|line| line == format!("pass@1 {score:.3}")), "{}", done.stdout);
        assert!(done.stdout.lines().any(|line| line.starts_with("  sorting")), "{}", done.stdout);
    }
}

/// Of 1,000 questions it gets 97 % right in bf16, and in every narrow type within half a point of that.
#[test]
fn it_is_right_with_narrow_weights() {
    for (dtype, least) in [("int8", 0.93), ("int8-weight", 0.95), ("int4-weight", 0.93)] {
        for simd in levels().into_iter().filter(|level| *level != "reference") {
            let done = Job::on_model(&abacus())
                .lines(questions(120))
                .toml(THINKING)
                .set(format!("pipeline.simd={simd}"))
                .set(format!("model.dtype={dtype}"))
                .run()
                .ok();
            let score = score(&done);
            assert!(score >= least, "{dtype} on {simd}: {score}\n{}", done.stdout);
        }
    }
}

#[test]
fn without_thinking_it_is_clearly_worse() {
    let at_once = THINKING.replace("thinking on", "thinking off").replace("0.6", "0");
    let done = Job::on_model(&abacus()).lines(questions(120)).toml(&at_once).run().ok();
    let score = score(&done);
    assert!(score < 0.6, "{score}\n{}", done.stdout);
}

#[test]
fn several_runs_of_a_row_are_choices_of_one_line_and_their_mean_its_score() {
    let job = Job::on_model(&abacus()).lines(questions(12)).toml(&format!("{THINKING}runs = 4\n"));
    let done = job.set("sampling.temperature=2").set("sampling.top_p=1").run().ok();
    let lines = done.lines("output.jsonl");
    assert_eq!(lines.len(), 12);
    let mut right = 0;
    let mut num_different = 0;
    for line in &lines {
        let choices = line["response"]["body"]["choices"].as_array().expect("choices");
        let indices: Vec<&Value> = choices.iter().map(|choice| &choice["index"]).collect();
        assert_eq!(json!(indices), json!([0, 1, 2, 3]));
        let texts: Vec<&Value> = choices.iter().map(|choice| &choice["message"]["content"]).collect();
        num_different += usize::from(texts.iter().any(|text| *text != texts[0]));
        let correct = line["grade"]["correct"].as_array().expect("a grade");
        assert_eq!(correct.len(), 4);
        right += correct.iter().filter(|correct| **correct == true).count();
    }
    assert!(num_different > 0, "each choice has draws of its own");
    assert!((score(&done) - right as f64 / 48.0).abs() < 1e-9);
}

/// A copy of the model with its configuration changed, and perhaps its weights.
fn broken(change: impl FnOnce(&mut Value), weights: impl FnOnce(&mut Vec<u8>)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for entry in fs::read_dir(abacus()).expect("the model") {
        let path = entry.expect("a file").path();
        if path.is_file() {
            fs::copy(&path, folder.path().join(path.file_name().expect("a name"))).expect("copy the model");
        }
    }
    let config = folder.path().join("config.json");
    let mut json = read_json(&config);
    change(&mut json);
    fs::write(&config, json.to_string()).expect("write config.json");
    let shard = folder.path().join("model.safetensors");
    let mut bytes = fs::read(&shard).expect("the weights");
    weights(&mut bytes);
    fs::write(&shard, bytes).expect("write the weights");
    folder
}

fn score_of(model: &Path) -> f64 {
    score(&Job::on_model(model).lines(questions(60)).toml(THINKING).run().ok())
}

/// Gives tensors each other's names, which are of one length.
fn swap(bytes: &mut [u8], one: &str, other: &str) {
    let length = u64::from_le_bytes(*bytes.first_chunk().expect("a header")) as usize;
    let header = std::str::from_utf8(&bytes[8..8 + length]).expect("a header of text");
    assert!(header.contains(one) && header.contains(other), "{one} or {other} is not in the header");
    let swapped = header.replace(one, "\u{0}").replace(other, one).replace('\u{0}', other);
    bytes[8..8 + length].copy_from_slice(swapped.as_bytes());
}

#[test]
fn a_broken_rope_norm_or_block_order_makes_the_score_collapse() {
    let rope = broken(|config| config["rope_theta"] = json!(3.0), |_| {});
    let norm = broken(|config| config["rms_norm_eps"] = json!(10.0), |_| {});
    let order = broken(
        |config| config["block_configs"].as_array_mut().expect("blocks").swap(0, 3),
        |bytes| swap(bytes, "model.layers.0.", "model.layers.3."),
    );
    for (what, model) in [("rope", rope), ("norm", norm), ("order", order)] {
        let score = score_of(model.path());
        assert!(score < 0.5, "with a broken {what} the score is {score}");
    }
}

#[test]
fn it_is_small_and_its_blocks_are_not_alike() {
    let weights = fs::metadata(abacus().join("model.safetensors")).expect("the weights").len();
    assert!(weights <= 8_000_000, "{weights} bytes of weights");
    let output = crate::harness::spanwise().arg("inspect").arg(abacus()).output().expect("start spanwise");
    assert_done(&output);
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    for what in ["linear", "none", "swiglu"] {
        assert!(shown.contains(what), "{what} is not in\n{shown}");
    }
}
