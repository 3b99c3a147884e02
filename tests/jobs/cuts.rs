//! FFNs that a run cuts by itself.

use serde_json::{Value, json};

use crate::disturbed::row;
use crate::harness::{Job, fixture, read_json};
use crate::layouts::{all_lines, done};

/// Five blocks of the small model, the third of which has an FFN that is eight times as wide as the others.
fn model() -> tempfile::TempDir {
    let (from, to) = (fixture("small"), tempfile::tempdir().unwrap());
    for file in ["generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(from.join(file), to.path().join(file)).unwrap();
    }
    let mut config = read_json(&from.join("config.json"));
    let block = config["block_configs"][0].clone();
    let of_width = |width: usize| {
        let mut block = block.clone();
        block["ffn"]["ffn_mult"] = json!(width as f64 * 1.5 / 64.0);
        block
    };
    config["block_configs"] = [1024, 1024, 8192, 1024, 1024].map(of_width).to_vec().into();
    config["num_hidden_layers"] = json!(5);
    std::fs::write(to.path().join("config.json"), config.to_string()).unwrap();
    to
}

/// The places between a job's stages: a block, and a column where one is cut.
fn cuts(job: &Job) -> Vec<(u64, u64)> {
    let manifest = read_json(&job.out().join("manifest.json"));
    let number = |value: &Value| value.as_u64().expect("a number");
    let stages = manifest["plan"]["stages"].as_array().expect("stages").clone();
    stages[1..].iter().map(|stage| (number(&stage["blocks"][0]), number(&stage["first_column"]))).collect()
}

#[test]
fn a_run_cuts_an_ffn_by_itself_where_that_is_faster_and_answers_the_same() {
    let model = model();
    let sets = [
        "model.random_weights=true",
        "model.max_context_tokens=64",
        "pipeline.devices=[\"cpu:0\", \"cpu:1\"]",
        "pipeline.tensor_parallel=off",
        "pipeline.virtual_stages=off",
    ];
    let job = sets.iter().fold(Job::on_model(model.path()), |job, set| job.set(*set));
    let job = job.lines((0..12).map(row));
    let (auto, off) = (["--set", "pipeline.column_cuts=auto"], ["--set", "pipeline.column_cuts=off"]);

    let cut = job.anew();
    let said = done(cut.run_once(&[]));
    let [(2, column @ 1..)] = cuts(&cut)[..] else { panic!("{:?}: {said}", cuts(&cut)) };
    assert!(said.contains(&format!("stages: [[0, \"2:{column}\"], [\"2:{column}\", 5]]")), "{said}");
    let whole = job.anew();
    done(whole.run_once(&off));
    assert!(matches!(cuts(&whole)[..], [(_, 0)]), "{:?}", cuts(&whole));
    assert!(all_lines(&cut) == all_lines(&whole));
    // A cut changes no bit, so that a job may go on with it or without.
    for (first, then, expected) in [(auto, off, &whole), (off, auto, &cut)] {
        let job = job.anew();
        done(job.run_once(&[&["--limit", "4"], &first[..]].concat()));
        assert_ne!(cuts(&job), cuts(expected));
        done(job.run_once(&then));
        assert_eq!(cuts(&job), cuts(expected));
        assert!(all_lines(&job) == all_lines(&cut), "{first:?}, then {then:?}");
    }
}
