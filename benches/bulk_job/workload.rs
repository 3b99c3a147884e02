//! The rows of the bulk job, and what a model must compute for them.

use std::path::Path;

use kernels::PAGE_TOKENS;
use serde_json::{Value, json};
use stages::{Attention, ModelConfig, WeightType};

/// New tokens of each row.
pub(crate) const NEW_TOKENS: usize = 128;

/// Tokens of SmolLM2's chat template around a prompt; the first 24 are the same in all.
const TEMPLATE_TOKENS: usize = 30;

/// Of the shortest prompt and of the longest, template counted.
const SHORTEST: usize = 34;
const LONGEST: usize = 407;

/// How much longer the longer prompts are: 256 of them have 31.8 thousand tokens, and half have 77 at most.
const SKEW: f64 = 3.147;

/// Each is one token of SmolLM2's.
const WORDS: &str = "the number system of water people answer short story long find day explain how a river shapes its \
                     valley and why bread rises when it is baked summarize this text about trains and old bridges";

/// A Llama of 1.1 billion parameters.
const LLAMA: &str = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048,
    "num_hidden_layers": 16, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "hidden_act": "silu", "tie_word_embeddings": false, "torch_dtype": "bfloat16", "bos_token_id": 1,
    "eos_token_id": 2}"#;

/// Rows of a job.
#[derive(Debug, Clone)]
pub(crate) struct Workload {
    /// Tokens of each prompt.
    pub(crate) prompts: Vec<usize>,
}

impl Workload {
    /// The first `rows` of 256: mostly short prompts and some long ones, in an order that is neither.
    pub(crate) fn first(rows: usize) -> Self {
        let tokens = |rank: usize| {
            let more = (LONGEST - SHORTEST) as f64 * (rank as f64 / 255.0).powf(SKEW);
            SHORTEST + more.round() as usize
        };
        // Any odd factor visits each rank once.
        Workload { prompts: (0..rows).map(|row| tokens(row * 97 % 256)).collect() }
    }

    pub(crate) fn prompt_tokens(&self) -> usize {
        self.prompts.iter().sum()
    }

    pub(crate) fn new_tokens(&self) -> usize {
        self.prompts.len() * NEW_TOKENS
    }

    /// Chat rows.
    pub(crate) fn chats(&self) -> String {
        let words: Vec<&str> = WORDS.split_whitespace().collect();
        let row = |(row, tokens): (usize, &usize)| {
            let mut next = random(row as u64);
            // Without a space before it not every word is one token; the first one is.
            let more = (TEMPLATE_TOKENS + 1..*tokens).map(|_| words[next(words.len())]);
            let text: Vec<&str> = std::iter::once(words[0]).chain(more).collect();
            let message = json!({"role": "user", "content": text.join(" ")});
            line(row, "/v1/chat/completions", json!({"messages": [message]}))
        };
        self.prompts.iter().enumerate().map(row).collect()
    }

    /// Rows of token ids, for a model without a tokenizer.
    pub(crate) fn token_ids(&self, vocab: usize) -> String {
        let row = |(row, tokens): (usize, &usize)| {
            let mut next = random(row as u64);
            let ids: Vec<usize> = (0..*tokens).map(|_| next(vocab)).collect();
            line(row, "/v1/completions", json!({"prompt": ids}))
        };
        self.prompts.iter().enumerate().map(row).collect()
    }

    /// Multiplications and additions that it cannot do without: the blocks for every token, the output matrix for those
    /// that are drawn, attention for each position.
    pub(crate) fn flops(&self, config: &ModelConfig) -> f64 {
        let sum = |of: &dyn Fn(&stages::Block) -> u64| config.blocks.iter().map(of).sum::<u64>() as f64;
        let per_token = sum(&|block| block.flops_per_token(config.dims));
        let per_position = sum(&|block| block.flops_per_context_token(config.dims));
        let head = 2.0 * (config.dims.vocab * config.dims.hidden) as f64;
        let of_row = |prompt: &usize| {
            // The last new token is drawn and goes through no block.
            let tokens = (prompt + NEW_TOKENS - 1) as f64;
            tokens * per_token + tokens * (tokens + 1.0) / 2.0 * per_position + NEW_TOKENS as f64 * head
        };
        self.prompts.iter().map(of_row).sum()
    }

    /// Bytes of packed weights, and of the pages of all rows at their end.
    pub(crate) fn weight_and_kv_bytes(&self, config: &ModelConfig) -> u64 {
        let values = |attention: Attention| attention.kv_values_per_token(config.dims);
        let per_token: u64 = config.blocks.iter().map(|block| 2 * values(block.attention)).sum();
        let pages = self.prompts.iter().map(|prompt| (prompt + NEW_TOKENS).div_ceil(PAGE_TOKENS));
        let positions = (pages.sum::<usize>() * PAGE_TOKENS) as u64;
        stages::weight_bytes(config, WeightType::Bf16) + positions * per_token
    }
}

/// Makes the folder of the 1.1 B model, which has no weights and no tokenizer.
pub(crate) fn make_llama(folder: &Path) {
    std::fs::create_dir_all(folder).expect("make the model's folder");
    std::fs::write(folder.join("config.json"), LLAMA).expect("write config.json");
}

fn line(row: usize, url: &str, mut body: Value) -> String {
    body["max_tokens"] = json!(NEW_TOKENS);
    body["temperature"] = json!(0);
    body["ignore_eos"] = json!(true);
    let line = json!({"custom_id": format!("row-{row}"), "method": "POST", "url": url, "body": body});
    format!("{line}\n")
}

/// Numbers below a bound: Knuth's linear congruential generator, the same on every machine.
fn random(seed: u64) -> impl FnMut(usize) -> usize {
    let mut state = seed + 1;
    move |bound| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % bound
    }
}
