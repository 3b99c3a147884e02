//! A real language model: SmolLM2-135M-Instruct against what transformers says in float32.

use serde_json::{Value, json};

use crate::harness::{Job, read_json, root, smollm2};

/// bf16 against float32 on a log-probability. The model's logits have a standard deviation of 8, and 30
/// blocks round five operands each to 8 bits. If those 150 errors of up to 2^-9 all counted they would come
/// to 0.19 as a random walk; on these 640 tokens the largest is 0.07, and this is about twice that.
const BF16_BOUND: f64 = 0.15;

fn golden() -> Vec<Value> {
    let golden = read_json(&root().join("tests/golden/smollm2_greedy.json"));
    golden["prompts"].as_array().expect("prompts").clone()
}

/// The largest log-probability of a map from tokens, which also holds the token that stands in the text.
fn best(top: &Value) -> f64 {
    let values = top.as_object().expect("a map").values();
    values.map(|value| value.as_f64().expect("a number")).fold(f64::NEG_INFINITY, f64::max)
}

#[test]
fn greedy_continuations_in_f32_equal_those_of_transformers() {
    let prompts = golden();
    assert_eq!(prompts.len(), 20);
    let mut job = Job::on_model(&smollm2()).set("model.dtype=f32");
    for prompt in &prompts {
        let body = json!({"prompt": prompt["prompt_ids"], "max_tokens": 32, "temperature": 0, "return_token_ids": true});
        job = job.completion(prompt["name"].as_str().unwrap(), body);
    }
    let done = job.run().ok();
    for prompt in &prompts {
        let name = prompt["name"].as_str().unwrap();
        assert_eq!(done.choice(name)["token_ids"], prompt["ids"], "{name}");
    }
}

#[test]
fn chat_prompts_are_tokenized_as_transformers_does() {
    let prompts: Vec<Value> = golden().into_iter().filter(|prompt| prompt["kind"] == "chat").collect();
    let mut job = Job::on_model(&smollm2()).set("model.dtype=f32");
    for prompt in &prompts {
        let body = json!({"messages": prompt["messages"], "max_tokens": 8, "temperature": 0,
                          "return_token_ids": true});
        job = job.chat(prompt["name"].as_str().unwrap(), body);
    }
    let done = job.run().ok();
    for prompt in &prompts {
        let name = prompt["name"].as_str().unwrap();
        let usage = &done.bodies()[name]["usage"];
        assert_eq!(usage["prompt_tokens"], prompt["prompt_ids"].as_array().unwrap().len(), "{name}");
        let found = done.choice(name)["token_ids"].as_array().unwrap().clone();
        let expected = &prompt["ids"].as_array().unwrap()[..found.len()];
        assert_eq!(found, expected, "{name}");
    }
}

#[test]
fn teacher_forced_in_bf16_the_log_probabilities_stay_within_the_bound() {
    let prompts = golden();
    let mut job = Job::on_model(&smollm2());
    for prompt in &prompts {
        let ids = |key: &str| prompt[key].as_array().expect("ids").clone();
        let forced = [ids("prompt_ids"), ids("ids")].concat();
        let body = json!({"prompt": forced, "max_tokens": 0, "echo": true, "logprobs": 1});
        job = job.completion(prompt["name"].as_str().unwrap(), body);
    }
    let done = job.run().ok();
    let mut largest = 0.0f64;
    for prompt in &prompts {
        let name = prompt["name"].as_str().unwrap();
        let first = prompt["prompt_ids"].as_array().unwrap().len();
        let logprobs = &done.choice(name)["logprobs"];
        for (i, expected) in prompt["logprobs"].as_array().unwrap().iter().enumerate() {
            let found = logprobs["token_logprobs"][first + i].as_f64().expect("a number");
            let difference = (found - expected.as_f64().expect("a number")).abs();
            largest = largest.max(difference);
            assert!(difference <= BF16_BOUND, "{name}, token {i}: off by {difference}");
            let is_argmax = best(&logprobs["top_logprobs"][first + i]) <= found + 1e-6;
            let margin = prompt["margins"][i].as_f64().expect("a margin");
            assert!(
                is_argmax || margin < 2.0 * BF16_BOUND,
                "{name}, token {i}: another token leads, though by {margin} in float32"
            );
        }
    }
    // A bound that nothing comes near guards nothing.
    assert!(largest > BF16_BOUND / 5.0, "the largest difference is {largest}");
}
