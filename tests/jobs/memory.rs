//! What a job holds at most: its weights, its keys and values, and little beside them.

use serde_json::{Value, json};
use stages::{Block, ModelConfig, PAGE_TOKENS, WeightType};

use crate::harness::{Done, Job, smollm2};

/// For a tokenizer, what steps work in, and the program itself.
const BESIDE_BYTES: u64 = 150_000_000;

/// Keys and values of a block grow by huge pages, where the system gives them.
const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// The most memory that a run held, as its report says it.
fn peak_bytes(done: &Done) -> u64 {
    let mut lines = done.stderr.lines().chain(done.stdout.lines());
    let line = lines.find_map(|line| line.strip_prefix("memory ")).expect("the report tells it");
    let megabytes = line.trim().trim_end_matches(" MB at most").replace(',', "");
    1_000_000 * megabytes.parse::<u64>().expect("a number")
}

/// Packed weights, and keys and values of all rows at once, in the pages of so many replicas.
fn weight_and_kv_bytes(config: &ModelConfig, done: &Done, replicas: u64) -> u64 {
    let tokens = |body: &Value| body["usage"]["total_tokens"].as_u64().expect("a number");
    let pages: u64 = done.bodies().values().map(|body| tokens(body).div_ceil(PAGE_TOKENS as u64)).sum();
    let of_block = |block: &Block| {
        let bytes_per_token = 2 * block.attention.kv_values_per_token(config.dims);
        let own_pages = pages.div_ceil(replicas) * PAGE_TOKENS as u64;
        replicas * (own_pages * bytes_per_token).next_multiple_of(HUGE_PAGE_BYTES)
    };
    stages::weight_bytes(config, WeightType::Bf16) + config.blocks.iter().map(of_block).sum::<u64>()
}

/// SmolLM2's tied table is 57 MB, a fifth of its weights, and its tokenizer 54 while it is read: a second one of either would show, and
/// so would the weights of a second replica.
#[test]
fn stages_and_replicas_hold_weights_keys_and_values_and_little_beside_them() {
    let config = ModelConfig::read(&smollm2()).unwrap();
    for (devices, replicas) in
        [(r#"["cpu:0"]"#, 1), (r#"["cpu:0", "cpu:1"]"#, 1), (r#"["cpu:0", "cpu:1"]"#, 2)]
    {
        let mut job = Job::on_model(&smollm2())
            .set(format!("pipeline.devices={devices}"))
            .set(format!("pipeline.replicas={replicas}"));
        for row in 0..20 {
            let messages = json!([{"role": "user", "content": format!("What comes after {row}?")}]);
            let body = json!({"messages": messages, "max_tokens": 2, "temperature": 0});
            job = job.chat(&format!("row-{row}"), body);
        }
        let done = job.run().ok();
        let (held, most) = (weight_and_kv_bytes(&config, &done, replicas), peak_bytes(&done));
        assert!(
            (held / 2..held + BESIDE_BYTES).contains(&most),
            "{replicas} replicas of {devices}: {most} bytes, of which {held} are weights, keys and values"
        );
    }
}
