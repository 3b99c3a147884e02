//! Small models of the kinds of block that a search leaves, with random weights, which are the same wherever they are made.

use serde_json::{Value, json};

/// Shapes of a model.
struct Dims {
    hidden: usize,
    heads: usize,
    head_dim: usize,
    is_tied: bool,
}

/// What a model is called, and its config.json.
pub(crate) fn models() -> [(&'static str, Value); 2] {
    let small = Dims { hidden: 96, heads: 6, head_dim: 16, is_tied: true };
    let like_ultra = Dims { hidden: 256, heads: 16, head_dim: 128, is_tied: false };
    let blocks = [
        (group(2), swiglu(1.5)),
        (nothing(), swiglu(1.0)),
        (linear(), swiglu(0.5)),
        (group(6), nothing()),
        (nothing(), nothing()),
        (group(1), linear()),
        (linear(), linear()),
        (nothing(), linear()),
        (group(3), swiglu(5.25)),
    ];
    let of_ultra = [
        (group(16), swiglu(2.0)),
        (nothing(), swiglu(6.0)),
        (group(8), nothing()),
        (group(16), linear()),
        (linear(), swiglu(1.0)),
    ];
    [
        ("a tied model of heads of 16, with every kind of block", config(&small, &blocks)),
        (
            "a model of heads of 128 in groups of 16 and 8, as Ultra and Super have them",
            config(&like_ultra, &of_ultra),
        ),
    ]
}

fn half(changes: Value) -> Value {
    let mut half =
        json!({"no_op": false, "replace_with_linear": false, "n_heads_in_group": null, "ffn_mult": null});
    changes.as_object().expect("an object").iter().for_each(|(key, value)| half[key] = value.clone());
    half
}

/// So many query heads read the same keys.
fn group(heads: usize) -> Value {
    half(json!({"n_heads_in_group": heads}))
}

/// So many times as wide as usual.
fn swiglu(ffn_mult: f64) -> Value {
    half(json!({"ffn_mult": ffn_mult}))
}

fn linear() -> Value {
    half(json!({"replace_with_linear": true}))
}

fn nothing() -> Value {
    half(json!({"no_op": true}))
}

fn config(dims: &Dims, blocks: &[(Value, Value)]) -> Value {
    let blocks: Vec<Value> =
        blocks.iter().map(|(attention, ffn)| json!({"attention": attention, "ffn": ffn})).collect();
    json!({
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "block_configs": blocks,
        "eos_token_id": [],
        "head_dim": dims.head_dim,
        "hidden_act": "silu",
        "hidden_size": dims.hidden,
        "max_position_embeddings": 512,
        "num_attention_heads": dims.heads,
        "num_hidden_layers": blocks.len(),
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": dims.is_tied,
        "vocab_size": 500,
    })
}
