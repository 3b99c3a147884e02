//! Published configurations, read as they come.

use std::path::Path;

use serde_json::{Value, json};
use stages::{Attention, Ffn, ModelConfig, Rope, swiglu_width};

fn shipped(name: &str) -> ModelConfig {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/models").join(name);
    ModelConfig::read(&path).expect("the shipped config.json")
}

#[test]
fn ultra_253b_has_the_blocks_and_the_parameters_that_are_published() {
    let ultra = shipped("Llama-3_1-Nemotron-Ultra-253B-v1");
    assert_eq!(ultra.params(), 253_401_268_224);
    assert_eq!((ultra.num_slots, ultra.blocks.len()), (162, 81));
    let with_attention =
        ultra.blocks.iter().filter(|b| b.attention == Attention::Gqa { kv_heads: 8 }).count();
    assert_eq!(with_attention, 64);
    let widest = ultra.blocks.iter().find(|block| block.slot == 134).unwrap();
    assert_eq!((widest.attention, widest.ffn), (Attention::None, Ffn::SwiGlu { width: 425_984 }));
    assert!(matches!(ultra.rope, Rope::Llama3 { factor: 16.0, .. }));
    assert_eq!(ultra.eos_token_ids, [128_001, 128_008, 128_009]);
    // 64 attention blocks of 8 KV heads of 128, keys and values.
    let kv: u64 = ultra.blocks.iter().map(|block| block.attention.kv_values_per_token(ultra.dims)).sum();
    assert_eq!(kv * 2, 262_144);
}

#[test]
fn super_49b_has_the_parameters_that_are_published() {
    let model = shipped("Llama-3_3-Nemotron-Super-49B-v1");
    assert_eq!((model.params() as f64 / 1e6).round(), 49_867.0);
    assert_eq!(model.blocks.iter().filter(|b| b.attention != Attention::None).count(), 49);
}

#[test]
fn the_width_rule_is_that_of_the_checkpoints() {
    assert_eq!(swiglu_width(4.875, 16_384), 53_248);
    assert_eq!(swiglu_width(0.4875, 16_384), 5_376);
    assert_eq!(swiglu_width(39.0, 16_384), 425_984);
    assert_eq!(swiglu_width(2.0, 2_048), 2_816);
}

/// TensorRT-LLM's covering list of block variants, in the older form with three keys a half.
#[test]
fn keys_that_older_configurations_lack_take_their_defaults() {
    let block = |attention: Value, ffn: Value| json!({"attention": attention, "ffn": ffn});
    let none = json!({"n_heads_in_group": null, "no_op": true, "replace_with_linear": false});
    let linear = json!({"n_heads_in_group": null, "no_op": false, "replace_with_linear": true});
    let group = |n: usize| json!({"n_heads_in_group": n, "no_op": false, "replace_with_linear": false});
    let width = |mult: f64| json!({"ffn_mult": mult, "no_op": false, "replace_with_linear": false});
    let blocks = [
        block(group(8), width(2.0)),
        block(group(16), width(2.0)),
        block(linear.clone(), width(2.0)),
        block(none.clone(), width(2.0)),
        block(group(8), linear.clone()),
        block(group(4), none.clone()),
        block(none.clone(), none.clone()),
    ];
    let config = json!({
        "architectures": ["DeciLMForCausalLM"], "hidden_size": 2048, "num_attention_heads": 32,
        "num_hidden_layers": blocks.len(), "block_configs": blocks, "vocab_size": 32128,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
    });
    let model = ModelConfig::parse(Path::new("config.json"), &config.to_string()).unwrap();
    let gqa = |kv_heads| Attention::Gqa { kv_heads };
    let swiglu = Ffn::SwiGlu { width: 2816 };
    let found: Vec<_> = model.blocks.iter().map(|block| (block.slot, block.attention, block.ffn)).collect();
    assert_eq!(
        found,
        [
            (0, gqa(4), swiglu),
            (1, gqa(2), swiglu),
            (2, Attention::Linear, swiglu),
            (3, Attention::None, swiglu),
            (4, gqa(4), Ffn::Linear),
            (5, gqa(8), Ffn::None),
        ]
    );
}
