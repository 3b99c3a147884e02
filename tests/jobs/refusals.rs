//! Bad input: one clear error that names what is wrong, a non-zero exit, nothing lost.

use std::path::Path;

use serde_json::{Value, json};

use crate::harness::{Done, Job, fixture, read_json};

const MODEL: &str = "hetero-0-bf16";

/// What a case does to a config.json.
type Change = Box<dyn FnOnce(&mut Value)>;

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
fn configurations_that_are_not_implemented_are_refused_by_name_and_block() {
    let attention = |key: &'static str, value: Value| {
        move |config: &mut Value| config["block_configs"][1]["attention"][key] = value
    };
    let cases: Vec<(Change, Vec<&str>)> = vec![
        (Box::new(|c| c["architectures"] = json!(["MistralForCausalLM"])), vec!["architectures", "Mistral"]),
        (
            Box::new(|c| c["rope_scaling"]["rope_type"] = json!("yarn")),
            vec!["rope_scaling.rope_type", "yarn"],
        ),
        (Box::new(|c| c["rope_scaling"]["rope_type"] = json!("longrope")), vec!["longrope"]),
        (
            Box::new(attention("window_length", json!(64))),
            vec!["block_configs[1].attention.window_length", "64"],
        ),
        (
            Box::new(attention("num_sink_tokens", json!(4))),
            vec!["block_configs[1].attention.num_sink_tokens"],
        ),
        (
            Box::new(attention("unshifted_sink", json!(true))),
            vec!["block_configs[1].attention.unshifted_sink"],
        ),
        (
            Box::new(attention("n_heads_in_group", json!(3))),
            vec!["block_configs[1].attention", "divisor", "8"],
        ),
        (Box::new(attention("n_heads_in_group", Value::Null)), vec!["n_heads_in_group", "nothing"]),
        (
            Box::new(|c| c["block_configs"][2]["ffn"]["ffn_mult"] = json!(-1)),
            vec!["block_configs[2].ffn.ffn_mult"],
        ),
        (
            Box::new(|c| c["block_configs"][2]["ffn"]["sparsify"] = json!(["x"])),
            vec!["block_configs[2].ffn.sparsify"],
        ),
        (Box::new(|c| c["num_hidden_layers"] = json!(3)), vec!["num_hidden_layers", "3", "block_configs"]),
        (Box::new(|c| c["hidden_act"] = json!("gelu")), vec!["hidden_act", "gelu", "silu"]),
        (Box::new(|c| c["attention_bias"] = json!(true)), vec!["attention_bias"]),
        (Box::new(|c| c["hidden_size"] = json!("many")), vec!["hidden_size", "many"]),
        (Box::new(|c| c["quantization_config"] = json!({"bits": 4})), vec!["quantization_config"]),
        (Box::new(|c| c["sliding_window"] = json!(128)), vec!["sliding_window"]),
    ];
    for (change, words) in cases {
        let model = changed_config(MODEL, change);
        assert_refused(&run_on(model.path()), &words);
    }
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
fn tensors_that_do_not_fit_the_configuration_are_named_with_their_shapes() {
    // Block 0 has attention and an FFN: called absent, its weights contradict the configuration.
    let absent = changed_config(MODEL, |config| {
        config["block_configs"][0]["attention"]["no_op"] = json!(true);
        config["block_configs"][0]["attention"]["n_heads_in_group"] = Value::Null;
    });
    assert_refused(&run_on(absent.path()), &["model.layers.0.self_attn.q_proj.weight", "absent"]);

    let wider = changed_config(MODEL, |config| config["block_configs"][0]["ffn"]["ffn_mult"] = json!(3.0));
    assert_refused(
        &run_on(wider.path()),
        &["model.layers.0.mlp.gate_proj.weight", "[512, 256]", "[256, 256]"],
    );

    let untied = changed_config("tied", |config| config["tie_word_embeddings"] = json!(false));
    assert_refused(&run_on(untied.path()), &["lm_head.weight", "missing"]);
}

#[test]
fn damaged_shards_are_named_before_any_work() {
    let truncated = changed_config(MODEL, |_| {});
    let path = truncated.path().join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 1000]).unwrap();
    assert_refused(&run_on(truncated.path()), &["model.safetensors", "truncated"]);

    std::fs::write(&path, &bytes[..100]).unwrap();
    assert_refused(&run_on(truncated.path()), &["model.safetensors", "truncated"]);

    std::fs::remove_file(&path).unwrap();
    assert_refused(&run_on(truncated.path()), &["model.safetensors", "random_weights"]);

    let sharded = changed_config("sharded", |_| {});
    std::fs::remove_file(sharded.path().join("model-00002-of-00003.safetensors")).unwrap();
    assert_refused(&run_on(sharded.path()), &["model-00002-of-00003.safetensors", "missing"]);
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
fn stages_must_fit_the_model() {
    let row = json!({"prompt": "hello"});
    let job = |set: &str| {
        let devices = "pipeline.devices=[\"cpu:0\", \"cpu:1\"]";
        Job::on(MODEL).set(devices).set(set).completion("row", row.clone()).run()
    };
    assert_refused(&job("pipeline.stages=[[0, 3], [3, 9]]"), &["stages", "block 9", "11 blocks", "12 slots"]);
    let many: Vec<&str> = vec!["\"cpu:0\""; 12];
    let job =
        Job::on(MODEL).set(format!("pipeline.devices=[{}]", many.join(","))).completion("row", row).run();
    assert_refused(&job, &["11 blocks", "12 stages"]);
}

#[test]
fn a_missing_model_and_a_missing_input_are_named() {
    assert_refused(&run_on(Path::new("/nonexistent/model")), &["/nonexistent/model/config.json"]);
    let done = Job::on(MODEL).set("job.input=\"/nonexistent/rows.jsonl\"").run();
    assert_refused(&done, &["/nonexistent/rows.jsonl"]);
}

#[test]
fn a_mistyped_key_is_refused_with_its_line_and_the_nearest_key() {
    let done = Job::on(MODEL).toml("[pipeline]\nmicro_batch_token = 64\n").run();
    assert_refused(&done, &["micro_batch_token", "job.toml:7:1", "micro_batch_tokens"]);
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
fn bad_rows_become_error_lines_and_the_job_goes_on() {
    let bad = |body: Value| {
        json!({"prompt": "a", "max_tokens": 1}).as_object().map(|base| {
            let mut merged = base.clone();
            merged.extend(body.as_object().unwrap().clone());
            Value::Object(merged)
        })
    };
    let done = Job::on(MODEL)
        .completion("good", json!({"prompt": "hello", "max_tokens": 2, "ignore_eos": true}))
        .line("{\"custom_id\": ")
        .line(r#"{"custom_id": "no-body", "method": "POST", "url": "/v1/completions"}"#)
        .completion("n", bad(json!({"n": 2})).unwrap())
        .completion("penalty", bad(json!({"presence_penalty": 0.5})).unwrap())
        .completion("unknown", bad(json!({"temprature": 1})).unwrap())
        .completion("value", bad(json!({"top_p": 7})).unwrap())
        .completion("long", json!({"prompt": vec![5; 5000]}))
        .completion("good", json!({"prompt": "again"}))
        .completion("stream", bad(json!({"stream": true})).unwrap())
        .run()
        .ok();
    assert_eq!(done.lines("output.jsonl").len(), 1);
    let errors = done.lines("errors.jsonl");
    assert_eq!(errors.len(), 9);
    let error = |id: &str| {
        let line = errors.iter().find(|line| line["custom_id"] == id).unwrap_or_else(|| panic!("no {id}"));
        line["response"]["body"]["error"].clone()
    };
    assert_eq!(error("n")["param"], "n");
    assert!(error("penalty")["message"].as_str().unwrap().contains("presence_penalty"));
    assert!(error("unknown")["message"].as_str().unwrap().contains("temperature"), "{}", error("unknown"));
    assert!(error("value")["message"].as_str().unwrap().contains("top_p"));
    assert!(error("long")["message"].as_str().unwrap().contains("5000"));
    assert_eq!(error("good")["code"], "duplicate_custom_id");
    assert_eq!(error("stream")["param"], "stream");
    let lines: Vec<u64> = (errors.iter())
        .map(|line| line["response"]["body"]["error"]["line"].as_u64().expect("a line number"))
        .collect();
    assert_eq!(lines, [2, 3, 4, 5, 6, 7, 8, 9, 10]);
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
