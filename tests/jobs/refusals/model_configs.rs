//! `config.json` files that cannot be: no JSON, keys, blocks.

use serde_json::{Value, json};

use super::table::{Case, case, check};

const CONFIG_IS_NO_OBJECT: &[Case] = &[
    case(
        "no config.json",
        |w| w.remove("model/config.json"),
        "error: load model: read FOLDER/model/config.json: No such file or directory (os error 2)",
    ),
    case(
        "a config.json that is a folder",
        |w| w.folder("model/config.json"),
        "error: load model: read FOLDER/model/config.json: Is a directory (os error 21)",
    ),
    case(
        "a config.json that links to itself",
        |w| w.link("model/config.json", "config.json"),
        "error: load model: read FOLDER/model/config.json: Too many levels of symbolic links (os error 40)",
    ),
    case(
        "an empty config.json",
        |w| w.file("model/config.json", ""),
        "error: load model: FOLDER/model/config.json: not JSON: EOF while parsing a value at line 1 column 0",
    ),
    case(
        "a config.json of one NUL",
        |w| w.file("model/config.json", "\0"),
        "error: load model: FOLDER/model/config.json: not JSON: expected value at line 1 column 1",
    ),
    case(
        "a config.json cut short",
        |w| w.bytes("model/config.json", |b| b.truncate(100)),
        "error: load model: FOLDER/model/config.json: not JSON: EOF while parsing a list at line 6 column 0",
    ),
    case(
        "a config.json in UTF-16",
        |w| w.bytes("model/config.json", utf16),
        "error: load model: read FOLDER/model/config.json: stream did not contain valid UTF-8",
    ),
    case(
        "a config.json in Latin-1",
        |w| w.file("model/config.json", b"{\"a\": \"\xe9\"}"),
        "error: load model: read FOLDER/model/config.json: stream did not contain valid UTF-8",
    ),
    case(
        "a config.json that is a list",
        |w| w.file("model/config.json", "[1, 2]"),
        "error: load model: FOLDER/model/config.json: found no object at the top",
    ),
    case(
        "a config.json nested 100,000 deep",
        |w| w.file("model/config.json", "[".repeat(100_000)),
        "error: load model: FOLDER/model/config.json: not JSON: recursion limit exceeded at line 1 column 128",
    ),
    case(
        "a config.json with NaN",
        |w| w.file("model/config.json", "{\"rope_theta\": NaN}"),
        "error: load model: FOLDER/model/config.json: not JSON: expected value at line 1 column 16",
    ),
    case(
        "a config.json that is another thing altogether",
        |w| w.file("model/config.json", b"PK\x03\x04"),
        "error: load model: FOLDER/model/config.json: not JSON: expected value at line 1 column 1",
    ),
    case(
        "a model path that is a file",
        |w| w.set("model.path=rows.jsonl"),
        "error: load model: FOLDER/rows.jsonl: architectures: found nothing, expected LlamaForCausalLM or DeciLMForCausalLM",
    ),
    case(
        "a model path that is not there",
        |w| w.set("model.path=nowhere"),
        "error: load model: read FOLDER/nowhere/config.json: No such file or directory (os error 2)",
    ),
    case(
        "a model path through a file",
        |w| w.set("model.path=rows.jsonl/model"),
        "error: load model: read FOLDER/rows.jsonl/model/config.json: Not a directory (os error 20)",
    ),
];

const CONFIG_KEYS: &[Case] = &[
    case(
        "no architectures and no model_type",
        |w| {
            w.config(|c| {
                c["architectures"] = Value::Null;
                c["model_type"] = Value::Null
            })
        },
        "error: load model: FOLDER/model/config.json: architectures: found nothing, expected LlamaForCausalLM or DeciLMForCausalLM",
    ),
    case(
        "an unknown architecture",
        |w| w.config(|c| c["architectures"] = json!(["MistralForCausalLM"])),
        "error: load model: FOLDER/model/config.json: architectures: found \"MistralForCausalLM\", expected LlamaForCausalLM or DeciLMForCausalLM",
    ),
    case(
        "an architecture that is a number",
        |w| w.config(|c| c["architectures"] = json!([5])),
        "error: load model: FOLDER/model/config.json: architectures: found 5, expected LlamaForCausalLM or DeciLMForCausalLM",
    ),
    case(
        "architectures that are a text",
        |w| w.config(|c| c["architectures"] = json!("LlamaForCausalLM")),
        "error: load model: FOLDER/model/config.json: architectures: found \"LlamaForCausalLM\", expected a list of names",
    ),
    case(
        "no hidden_size",
        |w| w.config_lacks("hidden_size"),
        "error: load model: FOLDER/model/config.json: hidden_size: found nothing, expected a whole number from 1 to 524288",
    ),
    case(
        "a hidden_size of 0",
        |w| w.config(|c| c["hidden_size"] = json!(0)),
        "error: load model: FOLDER/model/config.json: hidden_size: found 0, expected a whole number from 1 to 524288",
    ),
    case(
        "a negative hidden_size",
        |w| w.config(|c| c["hidden_size"] = json!(-256)),
        "error: load model: FOLDER/model/config.json: hidden_size: found -256, expected a whole number from 1 to 524288",
    ),
    case(
        "a hidden_size that is no whole number",
        |w| w.config(|c| c["hidden_size"] = json!(256.5)),
        "error: load model: FOLDER/model/config.json: hidden_size: found 256.5, expected a whole number from 1 to 524288",
    ),
    case(
        "a hidden_size that is a text",
        |w| w.config(|c| c["hidden_size"] = json!("many")),
        "error: load model: FOLDER/model/config.json: hidden_size: found \"many\", expected a whole number from 1 to 524288",
    ),
    case(
        "a hidden_size beyond u64",
        |w| w.config(|c| c["hidden_size"] = json!(1e300)),
        "error: load model: FOLDER/model/config.json: hidden_size: found 1e+300, expected a whole number from 1 to 524288",
    ),
    case(
        "a hidden_size beyond all models",
        |w| w.config(|c| c["hidden_size"] = json!(u64::MAX)),
        "error: load model: FOLDER/model/config.json: hidden_size: found 18446744073709551615, expected a whole number from 1 to 524288",
    ),
    case(
        "a hidden_size that heads do not divide",
        |w| w.config(|c| c["hidden_size"] = json!(257)),
        "error: load model: FOLDER/model/config.json: num_attention_heads: found 8, expected a divisor of hidden_size 257",
    ),
    case(
        "no vocab_size",
        |w| w.config_lacks("vocab_size"),
        "error: load model: FOLDER/model/config.json: vocab_size: found nothing, expected a whole number from 1 to 67108864",
    ),
    case(
        "a vocab_size of billions",
        |w| w.config(|c| c["vocab_size"] = json!(5_000_000_000u64)),
        "error: load model: FOLDER/model/config.json: vocab_size: found 5000000000, expected a whole number from 1 to 67108864",
    ),
    case(
        "no num_attention_heads",
        |w| w.config_lacks("num_attention_heads"),
        "error: load model: FOLDER/model/config.json: num_attention_heads: found nothing, expected a whole number from 1 to 4096",
    ),
    case(
        "an odd head_dim",
        |w| w.config(|c| c["head_dim"] = json!(31)),
        "error: load model: FOLDER/model/config.json: head_dim: found 31, expected an even number, for the rotary halves",
    ),
    case(
        "no max_position_embeddings",
        |w| w.config_lacks("max_position_embeddings"),
        "error: load model: FOLDER/model/config.json: max_position_embeddings: found nothing, expected a whole number from 1 to 67108864",
    ),
    case(
        "no rms_norm_eps",
        |w| w.config_lacks("rms_norm_eps"),
        "error: load model: FOLDER/model/config.json: rms_norm_eps: found nothing, expected a number above 0",
    ),
    case(
        "a negative rms_norm_eps",
        |w| w.config(|c| c["rms_norm_eps"] = json!(-1e-5)),
        "error: load model: FOLDER/model/config.json: rms_norm_eps: found -0.00001, expected a number above 0",
    ),
    case(
        "an rms_norm_eps that f32 rounds to 0",
        |w| w.config(|c| c["rms_norm_eps"] = json!(1e-60)),
        "error: load model: FOLDER/model/config.json: rms_norm_eps: found 0.0000000000000000000000000000000000000000000000000000000000010000000000000001, expected a number above 0, also in f32",
    ),
    case(
        "a rope_theta of 0",
        |w| w.config(|c| c["rope_theta"] = json!(0)),
        "error: load model: FOLDER/model/config.json: rope_theta: found 0, expected a number above 0",
    ),
    case(
        "a rope of yarn",
        |w| w.config(|c| c["rope_scaling"]["rope_type"] = json!("yarn")),
        "error: load model: FOLDER/model/config.json: rope_scaling.rope_type: found \"yarn\", expected default, linear, dynamic or llama3",
    ),
    case(
        "a rope of longrope",
        |w| w.config(|c| c["rope_scaling"]["rope_type"] = json!("longrope")),
        "error: load model: FOLDER/model/config.json: rope_scaling.rope_type: found \"longrope\", expected default, linear, dynamic or llama3",
    ),
    case(
        "a rope_type that is a list",
        |w| w.config(|c| c["rope_scaling"]["rope_type"] = json!([])),
        "error: load model: FOLDER/model/config.json: rope_scaling.rope_type: found [], expected default, linear, dynamic or llama3",
    ),
    case(
        "a rope_scaling that is a text",
        |w| w.config(|c| c["rope_scaling"] = json!("llama3")),
        "error: load model: FOLDER/model/config.json: rope_scaling: found \"llama3\", expected an object",
    ),
    case(
        "a rope_scaling without its factor",
        |w| w.config(|c| c["rope_scaling"]["factor"] = Value::Null),
        "error: load model: FOLDER/model/config.json: rope_scaling.factor: found nothing, expected a number above 0",
    ),
    case(
        "a llama3 rope whose factors are crossed",
        |w| w.config(|c| c["rope_scaling"]["high_freq_factor"] = json!(0.5)),
        "error: load model: FOLDER/model/config.json: rope_scaling.high_freq_factor: found 0.5, expected no less than low_freq_factor 1",
    ),
    case(
        "an eos_token_id beyond the vocabulary",
        |w| w.config(|c| c["eos_token_id"] = json!([764, 768])),
        "error: load model: FOLDER/model/config.json: eos_token_id: found 768, expected token ids below vocab_size 768",
    ),
    case(
        "an eos_token_id that is a text",
        |w| w.config(|c| c["eos_token_id"] = json!("</s>")),
        "error: load model: FOLDER/model/config.json: eos_token_id: found \"</s>\", expected token ids below vocab_size 768",
    ),
    case(
        "a tie_word_embeddings that is a text",
        |w| w.config(|c| c["tie_word_embeddings"] = json!("no")),
        "error: load model: FOLDER/model/config.json: tie_word_embeddings: found \"no\", expected true or false",
    ),
    case(
        "biases in attention",
        |w| w.config(|c| c["attention_bias"] = json!(true)),
        "error: load model: FOLDER/model/config.json: attention_bias: found true, expected false: biases are not implemented",
    ),
    case(
        "gelu",
        |w| w.config(|c| c["hidden_act"] = json!("gelu")),
        "error: load model: FOLDER/model/config.json: hidden_act: found \"gelu\", expected \"silu\"",
    ),
    case(
        "quantized weights of an unknown kind",
        |w| w.config(|c| c["quantization_config"] = json!({"bits": 4})),
        "error: load model: FOLDER/model/config.json: quantization_config.quant_method: found nothing, expected \"compressed-tensors\" or \"modelopt\"",
    ),
    case(
        "GPTQ's own format",
        |w| w.config(|c| c["quantization_config"] = json!({"quant_method": "gptq", "bits": 4})),
        "error: load model: FOLDER/model/config.json: quantization_config.quant_method: found \"gptq\", expected \"compressed-tensors\" or \"modelopt\": others are not implemented",
    ),
    case(
        "compressed tensors of 8 bits",
        |w| {
            let weights = json!({"num_bits": 8, "type": "int", "strategy": "group", "symmetric": true});
            let groups = json!({"group_0": {"weights": weights}});
            w.config(|c| {
                c["quantization_config"] =
                    json!({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups})
            })
        },
        "error: load model: FOLDER/model/config.json: quantization_config.config_groups.group_0.weights.num_bits: found 8, expected 4",
    ),
    case(
        "numbers of 4 bits of ModelOpt",
        |w| {
            w.config(|c| {
                c["quantization_config"] = json!({"quant_method": "modelopt", "quant_algo": "NVFP4"})
            })
        },
        "error: load model: FOLDER/model/config.json: quantization_config.quant_algo: found \"NVFP4\", expected \"FP8\"",
    ),
    case(
        "a sliding window",
        |w| w.config(|c| c["sliding_window"] = json!(128)),
        "error: load model: FOLDER/model/config.json: sliding_window: found 128, expected nothing: it is not implemented",
    ),
    case(
        "a partial rotary factor",
        |w| w.config(|c| c["partial_rotary_factor"] = json!(0.5)),
        "error: load model: FOLDER/model/config.json: partial_rotary_factor: found 0.5, expected 1",
    ),
];

const BLOCKS: &[Case] = &[
    case(
        "no num_hidden_layers",
        |w| w.config_lacks("num_hidden_layers"),
        "error: load model: FOLDER/model/config.json: num_hidden_layers: found nothing, expected a whole number from 1 to 4096",
    ),
    case(
        "fewer layers than blocks",
        |w| w.config(|c| c["num_hidden_layers"] = json!(3)),
        "error: load model: FOLDER/model/config.json: num_hidden_layers: found 3, expected the 12 entries of block_configs",
    ),
    case(
        "no block_configs",
        |w| w.config_lacks("block_configs"),
        "error: load model: FOLDER/model/config.json: block_configs: found nothing, expected block_configs, or num_key_value_heads_per_layer with intermediate_size",
    ),
    case(
        "empty block_configs",
        |w| w.config(|c| c["block_configs"] = json!([])),
        "error: load model: FOLDER/model/config.json: block_configs: found [], expected a list of blocks",
    ),
    case(
        "block_configs that are an object",
        |w| w.config(|c| c["block_configs"] = json!({"0": {}})),
        "error: load model: FOLDER/model/config.json: block_configs: found {\"0\":{}}, expected a list of blocks",
    ),
    case(
        "a block that is a number",
        |w| w.config(|c| c["block_configs"][3] = json!(7)),
        "error: load model: FOLDER/model/config.json: block_configs[3]: found 7, expected an object",
    ),
    case(
        "a block without attention",
        |w| w.config(|c| c["block_configs"][1]["attention"] = Value::Null),
        "error: load model: FOLDER/model/config.json: block_configs[1].attention: found nothing, expected an object",
    ),
    case(
        "a block whose attention is a list",
        |w| w.config(|c| c["block_configs"][1]["attention"] = json!([])),
        "error: load model: FOLDER/model/config.json: block_configs[1].attention: found [], expected an object",
    ),
    case(
        "a block without FFN",
        |w| w.config(|c| c["block_configs"][1]["ffn"] = Value::Null),
        "error: load model: FOLDER/model/config.json: block_configs[1].ffn: found nothing, expected an object",
    ),
    case(
        "nothing but empty blocks",
        |w| w.config(only_empty_blocks),
        "error: load model: FOLDER/model/config.json: block_configs: found 2 empty slots, expected a block that does something",
    ),
    case(
        "a group that does not divide the heads",
        |w| w.config(|c| attention(c)["n_heads_in_group"] = json!(3)),
        "error: load model: FOLDER/model/config.json: block_configs[1].attention.n_heads_in_group: found 3, expected a divisor of num_attention_heads 8",
    ),
    case(
        "a group of nothing",
        |w| w.config(|c| attention(c)["n_heads_in_group"] = Value::Null),
        "error: load model: FOLDER/model/config.json: block_configs[1].attention.n_heads_in_group: found nothing, expected a whole number from 1 to 67108864",
    ),
    case(
        "windowed attention",
        |w| w.config(|c| attention(c)["window_length"] = json!(64)),
        "error: load model: FOLDER/model/config.json: block_configs[1].attention.window_length: found 64, expected nothing: it is not implemented",
    ),
    case(
        "attention sinks",
        |w| w.config(|c| attention(c)["num_sink_tokens"] = json!(4)),
        "error: load model: FOLDER/model/config.json: block_configs[1].attention.num_sink_tokens: found 4, expected nothing: it is not implemented",
    ),
    case(
        "an unshifted sink",
        |w| w.config(|c| attention(c)["unshifted_sink"] = json!(true)),
        "error: load model: FOLDER/model/config.json: block_configs[1].attention.unshifted_sink: found true, expected nothing: it is not implemented",
    ),
    case(
        "attention that is both absent and linear",
        |w| {
            w.config(|c| {
                attention(c)["no_op"] = json!(true);
                attention(c)["replace_with_linear"] = json!(true)
            })
        },
        "error: load model: FOLDER/model/config.json: block_configs[1].attention.replace_with_linear: found true, expected false where no_op is true",
    ),
    case(
        "a no_op that is a number",
        |w| w.config(|c| attention(c)["no_op"] = json!(1)),
        "error: load model: FOLDER/model/config.json: block_configs[1].attention.no_op: found 1, expected true or false",
    ),
    case(
        "an FFN of negative width",
        |w| w.config(|c| ffn(c)["ffn_mult"] = json!(-1)),
        "error: load model: FOLDER/model/config.json: block_configs[2].ffn.ffn_mult: found -1, expected a number above 0",
    ),
    case(
        "an FFN of enormous width",
        |w| w.config(|c| ffn(c)["ffn_mult"] = json!(1e30)),
        "error: load model: FOLDER/model/config.json: block_configs[2].ffn.ffn_mult: found 1e+30, a width of 1099511627776, expected a width from 1 to 67108864",
    ),
    case(
        "a sparse FFN",
        |w| w.config(|c| ffn(c)["sparsify"] = json!(["x"])),
        "error: load model: FOLDER/model/config.json: block_configs[2].ffn.sparsify: found [\"x\"], expected nothing: it is not implemented",
    ),
    case(
        "a mixture of experts",
        |w| w.config(|c| c["block_configs"][2]["moe"] = json!({"experts": 8})),
        "error: load model: FOLDER/model/config.json: block_configs[2].moe: found {\"experts\":8}, expected nothing: it is not implemented",
    ),
];

fn attention(config: &mut Value) -> &mut Value {
    &mut config["block_configs"][1]["attention"]
}

fn ffn(config: &mut Value) -> &mut Value {
    &mut config["block_configs"][2]["ffn"]
}

fn only_empty_blocks(config: &mut Value) {
    let nothing = json!({"no_op": true});
    config["block_configs"] =
        json!([{"attention": nothing, "ffn": nothing}, {"attention": nothing, "ffn": nothing}]);
    config["num_hidden_layers"] = json!(2);
}

fn utf16(bytes: &mut Vec<u8>) {
    let text = String::from_utf8(std::mem::take(bytes)).expect("UTF-8");
    *bytes = "\u{feff}".encode_utf16().chain(text.encode_utf16()).flat_map(u16::to_le_bytes).collect();
}

#[test]
fn a_config_that_is_no_json_object_is_refused() {
    check(CONFIG_IS_NO_OBJECT);
}

#[test]
fn a_config_whose_keys_cannot_be_is_refused() {
    check(CONFIG_KEYS);
}

#[test]
fn blocks_that_cannot_be_are_refused() {
    check(BLOCKS);
}
