//! A model that is small and has every kind of half.

use std::path::Path;

use serde_json::{Value, json};
use stages::Model;

/// Its longest context.
pub(crate) const CONTEXT: usize = 256;

/// Hidden 256, 8 heads; every kind of half, an FFN of 1,000 columns that is no multiple of anything, and one of 100.
pub(crate) fn small(folder: &Path, tied: bool) -> Model {
    small_with(folder, tied, 1000)
}

/// The same with so many columns in the FFN that stands alone.
pub(crate) fn small_with(folder: &Path, tied: bool, width: usize) -> Model {
    let attention = |group: Option<usize>, linear: bool| json!({"n_heads_in_group": group, "no_op": group.is_none() && !linear, "replace_with_linear": linear});
    let ffn = |width: Option<usize>, linear: bool| match width {
        Some(width) => json!({"intermediate_size": width, "no_op": false, "replace_with_linear": false}),
        None => json!({"no_op": !linear, "replace_with_linear": linear}),
    };
    let blocks = [
        (attention(Some(2), false), ffn(Some(512), false)),
        (attention(None, true), ffn(Some(1000), false)),
        (attention(Some(8), false), ffn(None, true)),
        (attention(None, false), ffn(Some(width), false)),
        (attention(Some(4), false), ffn(Some(100), false)),
        (attention(Some(1), false), ffn(None, false)),
    ];
    let blocks: Vec<Value> =
        blocks.into_iter().map(|(attention, ffn)| json!({"attention": attention, "ffn": ffn})).collect();
    let config = json!({
        "architectures": ["DeciLMForCausalLM"], "model_type": "nemotron-nas", "hidden_act": "silu",
        "hidden_size": 256, "num_attention_heads": 8, "num_hidden_layers": blocks.len(), "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "rope_scaling": null, "tie_word_embeddings": tied, "vocab_size": 700,
        "max_position_embeddings": CONTEXT, "eos_token_id": [], "block_configs": blocks,
        "attention_bias": false, "mlp_bias": false,
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    Model::open(folder, true).unwrap().0
}
