//! What a body asks for is what its row gets.

use serde_json::{Value, json};

use crate::harness::{Job, fixture, read_json};

const MODEL: &str = "hetero-0-bf16";

fn ask(body: Value) -> Value {
    Job::on(MODEL).completion("row", body).run().ok().bodies()["row"].clone()
}

fn text(body: &Value) -> &str {
    body["choices"][0]["text"].as_str().expect("text")
}

#[test]
fn max_tokens_ends_a_row_with_length() {
    let body = ask(json!({"prompt": "hello world", "max_tokens": 7, "temperature": 0, "ignore_eos": true}));
    assert_eq!(body["usage"]["completion_tokens"], 7);
    assert_eq!(body["choices"][0]["finish_reason"], "length");
}

#[test]
fn a_stop_string_ends_the_text_before_it_and_usage_counts_all_tokens() {
    let free = ask(json!({"prompt": "hello", "max_tokens": 40, "temperature": 0, "ignore_eos": true}));
    let whole = text(&free);
    // Two characters from the middle, so that the match may lie across a token's border.
    let chars: Vec<char> = whole.chars().collect();
    let stop: String = chars[chars.len() / 2..chars.len() / 2 + 2].iter().collect();
    let body =
        ask(json!({"prompt": "hello", "max_tokens": 40, "temperature": 0, "ignore_eos": true, "stop": stop}));
    assert_eq!(text(&body), &whole[..whole.find(&stop).unwrap()]);
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    let tokens = body["usage"]["completion_tokens"].as_u64().unwrap();
    assert!((1..=40).contains(&tokens), "{tokens} tokens");
}

#[test]
fn stop_token_ids_and_min_tokens_work_together() {
    let ask = |extra: Value| {
        let mut body = json!({"prompt": "hello", "max_tokens": 30, "temperature": 0, "ignore_eos": true,
                              "return_token_ids": true});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        ask(body)["choices"][0].clone()
    };
    let free: Vec<u64> = ids(&ask(json!({})));
    let stop = free[3];
    let first = free.iter().position(|&id| id == stop).unwrap();
    let stopped = ask(json!({"stop_token_ids": [stop]}));
    assert_eq!(ids(&stopped), free[..=first]);
    assert_eq!(stopped["finish_reason"], "stop");
    let delayed = ask(json!({"stop_token_ids": [stop], "min_tokens": 10}));
    assert!(ids(&delayed).len() >= 10);
    assert!(!ids(&delayed)[..10].contains(&stop), "a stop token cannot be drawn before min_tokens");
}

fn ids(choice: &Value) -> Vec<u64> {
    choice["token_ids"].as_array().expect("token_ids").iter().map(|id| id.as_u64().unwrap()).collect()
}

/// A token as bytes, which no two share, and the most likely ones in its place with their log-probabilities.
type Step = (Vec<u64>, Vec<(Vec<u64>, f64)>);

/// A greedy chat's tokens.
fn greedy(extra: Value) -> Vec<Step> {
    let mut body = json!({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 60, "temperature": 0,
                          "logprobs": true, "top_logprobs": 20, "ignore_eos": true});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    let choice = Job::on(MODEL).chat("row", body).run().ok().choice("row");
    let bytes = |token: &Value| -> Vec<u64> {
        token["bytes"].as_array().unwrap().iter().map(|byte| byte.as_u64().unwrap()).collect()
    };
    let step = |step: &Value| {
        let top = step["top_logprobs"].as_array().unwrap();
        (bytes(step), top.iter().map(|top| (bytes(top), top["logprob"].as_f64().unwrap())).collect())
    };
    choice["logprobs"]["content"].as_array().unwrap().iter().map(step).collect()
}

#[test]
fn a_penalised_greedy_token_is_the_best_of_the_model_s_own_after_its_penalties() {
    let free = greedy(json!({}));
    let steps = greedy(json!({"frequency_penalty": 0.3, "presence_penalty": 0.2}));
    let tokens = |steps: &[Step]| steps.iter().map(|step| step.0.clone()).collect::<Vec<_>>();
    assert_ne!(tokens(&steps), tokens(&free), "penalties that change nothing show nothing");
    let mut counts = std::collections::HashMap::new();
    let mut num_demoted = 0;
    for (token, top) in &steps {
        let score = |(bytes, logprob): &(Vec<u64>, f64)| match counts.get(bytes) {
            Some(&count) => logprob - 0.3 * f64::from(count) - 0.2,
            None => *logprob,
        };
        let own = top.iter().find(|(bytes, _)| bytes == token).expect("it is among the most likely");
        let best = top.iter().map(score).fold(f64::NEG_INFINITY, f64::max);
        assert!((score(own) - best).abs() < 1e-4, "{token:?} of {top:?}");
        num_demoted += usize::from(top[0].0 != *token);
        *counts.entry(token.clone()).or_insert(0) += 1;
    }
    assert!(num_demoted > 0, "the model's first choice was always taken");
}

#[test]
fn a_repetition_penalty_counts_the_prompt_too() {
    let prompt = [9, 300, 17, 42, 77];
    let body = json!({"prompt": prompt, "max_tokens": 50, "temperature": 0, "ignore_eos": true, "return_token_ids": true,
                      "logit_bias": {"9": 3, "300": 3, "17": 3}});
    let biased = ids(&ask(body.clone())["choices"][0]);
    assert!(biased.iter().any(|&id| prompt.contains(&id)), "{biased:?} has nothing of the prompt");
    let mut penalised = body;
    let fields = penalised.as_object_mut().unwrap();
    fields.remove("logit_bias");
    fields.insert("repetition_penalty".to_owned(), json!(100));
    let mut all = ids(&ask(penalised)["choices"][0]);
    all.extend(prompt);
    let num_all = all.len();
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), num_all, "a token came twice");
}

#[test]
fn a_bias_forces_a_token_or_bars_it() {
    let body = |bias: Value| {
        json!({"prompt": "hello", "max_tokens": 12, "temperature": 1, "ignore_eos": true, "seed": 3,
                                    "return_token_ids": true, "logit_bias": bias})
    };
    let draw = |bias: Value| ids(&ask(body(bias))["choices"][0]);
    assert_eq!(draw(json!({"33": 100})), [33; 12]);
    let free = draw(json!({}));
    let barred = draw(json!({free[0].to_string(): -100, free[1].to_string(): -100}));
    assert!(!barred.contains(&free[0]) && !barred.contains(&free[1]), "{barred:?} of {free:?}");
}

#[test]
fn a_row_that_bars_all_tokens_fails_alone() {
    let vocab = read_json(&fixture(MODEL).join("config.json"))["vocab_size"].as_u64().unwrap();
    let all: Vec<u64> = (0..vocab).collect();
    let done = Job::on(MODEL)
        .completion(
            "none",
            json!({"prompt": "hello", "max_tokens": 5, "min_tokens": 2, "stop_token_ids": all}),
        )
        .completion("some", json!({"prompt": "hello", "max_tokens": 5}))
        .run()
        .ok();
    assert_eq!(done.lines("output.jsonl").len(), 1);
    let error = &done.lines("errors.jsonl")[0]["error"];
    assert_eq!(error["code"], "nothing_left", "{error}");
}

#[test]
fn equal_seeds_draw_alike_and_others_do_not() {
    let draw = |seed: u64| {
        text(&ask(json!({"prompt": "hello", "max_tokens": 30, "temperature": 1, "seed": seed}))).to_owned()
    };
    assert_eq!(draw(5), draw(5));
    assert_ne!(draw(5), draw(6));
}

#[test]
fn the_job_s_sampling_stands_behind_the_body_and_before_the_defaults() {
    let run = |body: Value| {
        let body = Job::on(MODEL)
            .toml("[sampling]\nmax_tokens = 5\ntemperature = 0\nignore_eos = true\n")
            .completion("row", body)
            .run()
            .ok()
            .bodies()["row"]
            .clone();
        body["usage"]["completion_tokens"].as_u64().unwrap()
    };
    assert_eq!(run(json!({"prompt": "hello"})), 5);
    assert_eq!(run(json!({"prompt": "hello", "max_tokens": 3})), 3);
}

#[test]
fn logprobs_of_generated_tokens_are_those_of_the_same_text_scored() {
    let body = ask(json!({"prompt": [9, 300, 17], "max_tokens": 12, "temperature": 0, "ignore_eos": true,
                          "logprobs": 2, "return_token_ids": true}));
    let generated = &body["choices"][0];
    let mut all = vec![9, 300, 17];
    all.extend(ids(generated));
    let scored = ask(json!({"prompt": all, "max_tokens": 0, "echo": true, "logprobs": 2}));
    let scores = scored["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap()[3..].to_vec();
    assert_eq!(generated["logprobs"]["token_logprobs"].as_array().unwrap(), &scores);
}

#[test]
fn a_greedy_token_is_the_most_likely_one() {
    let body = ask(json!({"prompt": "hello", "max_tokens": 10, "temperature": 0, "logprobs": 1}));
    let logprobs = &body["choices"][0]["logprobs"];
    for (token, top) in logprobs["token_logprobs"]
        .as_array()
        .unwrap()
        .iter()
        .zip(logprobs["top_logprobs"].as_array().unwrap())
    {
        // The map also holds the chosen token, so that it has one entry where that is the most likely one.
        assert_eq!(top.as_object().unwrap().values().collect::<Vec<_>>(), [token]);
    }
}

#[test]
fn a_model_without_tokenizer_takes_and_returns_token_ids() {
    let bare = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(fixture(MODEL).join(file), bare.path().join(file)).unwrap();
    }
    let body = json!({"prompt": [9, 300, 17], "max_tokens": 6, "temperature": 0, "ignore_eos": true});
    let done = Job::on_model(bare.path())
        .completion("ids", body.clone())
        .completion("text", json!({"prompt": "hello"}))
        .run()
        .ok();
    let mut with_text = body;
    with_text["return_token_ids"] = json!(true);
    assert_eq!(ids(&done.choice("ids")), ids(&ask(with_text)["choices"][0]));
    assert_eq!(done.lines("errors.jsonl").len(), 1);
}

#[test]
fn random_weights_need_a_config_alone_and_are_the_same_each_time() {
    let bare = tempfile::tempdir().unwrap();
    std::fs::copy(fixture(MODEL).join("config.json"), bare.path().join("config.json")).unwrap();
    let run = |stages: usize| {
        let body = json!({"prompt": [9, 300, 17], "max_tokens": 6, "temperature": 0, "ignore_eos": true});
        let job =
            Job::on_model(bare.path()).set("model.random_weights=true").set(crate::harness::devices(stages));
        ids(&job.completion("row", body).run().ok().choice("row"))
    };
    assert_eq!(run(1), run(2));
}

#[test]
fn plain_rows_go_through_the_job_s_prompt_template() {
    let done = Job::on(MODEL)
        .toml("[prompt]\nsystem = \"be short\"\nuser = \"What is {{ a }} plus {{ b }}?\"\n[sampling]\nmax_tokens = 4\n")
        .line(r#"{"id": 7, "a": 1, "b": 2}"#)
        .line(r#"{"a": 3, "b": 4}"#)
        .line(r#"{"a": 3, "b": 4}"#)
        .line(r#"{"id": "lacks-b", "a": 3}"#)
        .run()
        .ok();
    let ids: Vec<String> = done
        .lines("output.jsonl")
        .iter()
        .map(|line| line["custom_id"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(ids.len(), 3);
    assert_eq!(ids[0], "7");
    assert!(ids[1].starts_with("row-") && ids[2].starts_with("row-") && ids[1] != ids[2], "{ids:?}");
    let error = &done.lines("errors.jsonl")[0];
    assert_eq!(error["custom_id"], "lacks-b");
    assert_eq!(error["response"]["body"]["error"]["param"], "b", "{error}");
}

#[test]
fn the_manifest_says_what_was_run() {
    let done = Job::on(MODEL)
        .completion("row", json!({"prompt": "hello", "max_tokens": 3, "ignore_eos": true}))
        .line("not json")
        .set("job.seed=11")
        .run()
        .ok();
    let manifest = read_json(&done.folder.path().join("out/manifest.json"));
    assert_eq!(manifest["status"], "complete");
    let counts = json!({"total": 2, "completed": 1, "failed": 1, "resumed": 0, "stale": 0});
    assert_eq!(manifest["counts"], counts);
    assert_eq!(manifest["tokens"]["generated"], 3);
    assert_eq!(manifest["config"]["job"]["seed"], 11);
    assert!(manifest["model"]["identity"].as_str().unwrap().len() >= 32);
    assert!(manifest["numeric_profile"]["simd"].is_string());
}
