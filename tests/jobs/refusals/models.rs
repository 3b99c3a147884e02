//! Model directories that cannot be: `config.json`, shards, and the files of text.

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
        "quantized weights",
        |w| w.config(|c| c["quantization_config"] = json!({"bits": 4})),
        "error: load model: FOLDER/model/config.json: quantization_config: found {\"bits\":4}, expected nothing: it is not implemented",
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

const SHARDS: &[Case] = &[
    case(
        "no weights",
        |w| w.remove("model/model.safetensors"),
        "error: load model: FOLDER/model: found neither model.safetensors nor model.safetensors.index.json\nhint: [model] random_weights = true makes weights from config.json alone",
    ),
    case(
        "weights that are a folder",
        |w| w.folder("model/model.safetensors"),
        "error: load model: FOLDER/model: found neither model.safetensors nor model.safetensors.index.json\nhint: [model] random_weights = true makes weights from config.json alone",
    ),
    case(
        "weights that link to nothing",
        |w| w.link("model/model.safetensors", "blob"),
        "error: load model: FOLDER/model: found neither model.safetensors nor model.safetensors.index.json\nhint: [model] random_weights = true makes weights from config.json alone",
    ),
    case(
        "an empty shard",
        |w| w.file("model/model.safetensors", ""),
        "error: load model: FOLDER/model/model.safetensors: truncated: found 0 bytes, the length of a header alone takes 8",
    ),
    case(
        "a shard of three bytes",
        |w| w.file("model/model.safetensors", [7, 0, 0]),
        "error: load model: FOLDER/model/model.safetensors: truncated: found 3 bytes, the length of a header alone takes 8",
    ),
    case(
        "a shard that ends in its header",
        |w| w.bytes("model/model.safetensors", |b| b.truncate(100)),
        "error: load model: FOLDER/model/model.safetensors: truncated, or no safetensors file: found 100 bytes, the header should end at 7416",
    ),
    case(
        "a shard that ends in its data",
        |w| w.bytes("model/model.safetensors", |b| b.truncate(b.len() - 1000)),
        "error: load model: FOLDER/model/model.safetensors: truncated: found 6668048 bytes, the header says 6669048",
    ),
    case(
        "a shard with a tail",
        |w| w.bytes("model/model.safetensors", |b| b.extend([0; 5])),
        "error: load model: FOLDER/model/model.safetensors: too long: found 6669053 bytes, the header says 6669048",
    ),
    case(
        "a header length beyond u64's half",
        |w| w.bytes("model/model.safetensors", |b| b[..8].fill(0xff)),
        "error: load model: FOLDER/model/model.safetensors: truncated, or no safetensors file: found 6669048 bytes, the header should end at 18446744073709551615",
    ),
    case(
        "a header that is no JSON",
        |w| w.bytes("model/model.safetensors", |b| b[8] = b'x'),
        "error: load model: FOLDER/model/model.safetensors: damaged header: invalid JSON in header: expected value at line 1 column 1",
    ),
    case(
        "a header that is a list",
        |w| w.file("model/model.safetensors", b"\x02\0\0\0\0\0\0\0[]"),
        "error: load model: FOLDER/model/model.safetensors: damaged header: invalid JSON in header: invalid type: sequence, expected struct HashMetadata at line 1 column 0",
    ),
    case(
        "a header without tensors",
        |w| w.file("model/model.safetensors", b"\x02\0\0\0\0\0\0\0{}"),
        "error: load model: FOLDER/model: tensor model.embed_tokens.weight is missing, expected shape [768, 256]\n  tensor model.layers.0.input_layernorm.weight is missing, expected shape [256]\n  tensor model.layers.0.self_attn.q_proj.weight is missing, expected shape [256, 256]\n  tensor model.layers.0.self_attn.k_proj.weight is missing, expected shape [128, 256]\n  tensor model.layers.0.self_attn.v_proj.weight is missing, expected shape [128, 256]\n  tensor model.layers.0.self_attn.o_proj.weight is missing, expected shape [256, 256]\n  tensor model.layers.0.post_attention_layernorm.weight is missing, expected shape [256]\n  tensor model.layers.0.mlp.gate_proj.weight is missing, expected shape [256, 256]\n  and 61 more",
    ),
    case(
        "a header that is not UTF-8",
        |w| w.bytes("model/model.safetensors", |b| b[20] = 0xff),
        "error: load model: FOLDER/model/model.safetensors: damaged header: invalid UTF-8 in header: invalid utf-8 sequence of 1 bytes from index 12",
    ),
    case(
        "a large file by git lfs",
        |w| {
            w.file(
                "model/model.safetensors",
                "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 6669048\n",
            )
        },
        "error: load model: FOLDER/model/model.safetensors: truncated, or no safetensors file: found 72 bytes, the header should end at 2336927755350992254",
    ),
    case(
        "a tensor of an unknown type",
        |w| w.header(|h| h["model.norm.weight"]["dtype"] = json!("BF19")),
        "error: load model: FOLDER/model/model.safetensors: damaged header: invalid JSON in header: unknown variant `BF19`, expected one of `BOOL`, `F4`, `F6_E2M3`, `F6_E3M2`, `U8`, `I8`, `F8_E5M2`, `F8_E4M3`, `F8_E8M0`, `F8_E4M3FNUZ`, `F8_E5M2FNUZ`, `I16`, `U16`, `F16`, `BF16`, `I32`, `U32`, `F32`, `C64`, `F64`, `I64`, `U64` at line 1 column 7408",
    ),
    case(
        "a tensor of integers",
        |w| w.header(|h| h["model.norm.weight"]["dtype"] = json!("I16")),
        "error: load model: FOLDER/model: tensor model.norm.weight is of type I16, expected BF16, F16 or F32",
    ),
    case(
        "a tensor of a negative shape",
        |w| w.header(|h| h["model.norm.weight"]["shape"] = json!([-256])),
        "error: load model: FOLDER/model/model.safetensors: damaged header: invalid JSON in header: invalid value: integer `-256`, expected usize at line 1 column 7409",
    ),
    case(
        "a tensor whose shape overflows",
        |w| w.header(|h| h["model.norm.weight"]["shape"] = json!([u64::MAX, u64::MAX])),
        "error: load model: FOLDER/model/model.safetensors: damaged header: overflow computing buffer size from shape and/or element type",
    ),
    case(
        "a tensor that overlaps another",
        |w| w.header(|h| h["model.norm.weight"]["data_offsets"] = json!([0, 512])),
        "error: load model: FOLDER/model/model.safetensors: damaged header: invalid offset for tensor `model.embed_tokens.weight`",
    ),
    case(
        "a tensor whose end is before its beginning",
        |w| w.header(|h| h["model.norm.weight"]["data_offsets"] = json!([512, 0])),
        "error: load model: FOLDER/model/model.safetensors: damaged header: invalid offset for tensor `model.norm.weight`",
    ),
    case(
        "a tensor without offsets",
        |w| w.header(|h| drop(h["model.norm.weight"].as_object_mut().unwrap().remove("data_offsets"))),
        "error: load model: FOLDER/model/model.safetensors: damaged header: invalid JSON in header: missing field `data_offsets` at line 1 column 7375",
    ),
    case(
        "a tensor by another name",
        |w| w.header(|h| rename(h, "model.norm.weight", "model.nrom.weight")),
        "error: load model: FOLDER/model: tensor model.norm.weight is missing, expected shape [256]",
    ),
    case(
        "a tensor of another shape",
        |w| w.header(|h| h["model.norm.weight"]["shape"] = json!([16, 16])),
        "error: load model: FOLDER/model: tensor model.norm.weight has shape [16, 16], expected [256]",
    ),
    case(
        "a tensor of a half that is absent",
        |w| w.config(|c| attention(c)["no_op"] = json!(true)),
        "error: load model: FOLDER/model: tensor model.layers.1.input_layernorm.weight is there, but config.json calls the attention of slot 1 absent\n  tensor model.layers.1.self_attn.k_proj.weight is there, but config.json calls the attention of slot 1 absent\n  tensor model.layers.1.self_attn.o_proj.weight is there, but config.json calls the attention of slot 1 absent\n  tensor model.layers.1.self_attn.q_proj.weight is there, but config.json calls the attention of slot 1 absent\n  tensor model.layers.1.self_attn.v_proj.weight is there, but config.json calls the attention of slot 1 absent",
    ),
    case(
        "a block of another width",
        |w| w.config(|c| c["block_configs"][0]["ffn"]["ffn_mult"] = json!(3.0)),
        "error: load model: FOLDER/model: tensor model.layers.0.mlp.gate_proj.weight has shape [256, 256], expected [512, 256]\n  tensor model.layers.0.mlp.up_proj.weight has shape [256, 256], expected [512, 256]\n  tensor model.layers.0.mlp.down_proj.weight has shape [256, 256], expected [256, 512]",
    ),
    case(
        "an index that is no JSON",
        |w| index(w, "{"),
        "error: load model: FOLDER/model/model.safetensors.index.json: not JSON: EOF while parsing an object at line 1 column 1",
    ),
    case(
        "an index without a map",
        |w| index(w, "{\"metadata\": {}}"),
        "error: load model: FOLDER/model/model.safetensors.index.json: weight_map: found no object of tensor names and files",
    ),
    case(
        "an index of no shards",
        |w| index(w, "{\"weight_map\": {}}"),
        "error: load model: FOLDER/model: tensor model.embed_tokens.weight is missing, expected shape [768, 256]\n  tensor model.layers.0.input_layernorm.weight is missing, expected shape [256]\n  tensor model.layers.0.self_attn.q_proj.weight is missing, expected shape [256, 256]\n  tensor model.layers.0.self_attn.k_proj.weight is missing, expected shape [128, 256]\n  tensor model.layers.0.self_attn.v_proj.weight is missing, expected shape [128, 256]\n  tensor model.layers.0.self_attn.o_proj.weight is missing, expected shape [256, 256]\n  tensor model.layers.0.post_attention_layernorm.weight is missing, expected shape [256]\n  tensor model.layers.0.mlp.gate_proj.weight is missing, expected shape [256, 256]\n  and 61 more",
    ),
    case(
        "an index of a shard that is missing",
        |w| index(w, "{\"weight_map\": {\"a\": \"b.safetensors\"}}"),
        "error: load model: FOLDER/model/b.safetensors: the shard is missing",
    ),
    case(
        "an index that leaves the folder",
        |w| index(w, "{\"weight_map\": {\"a\": \"../b.safetensors\"}}"),
        "error: load model: FOLDER/model/model.safetensors.index.json: weight_map: a: found \"../b.safetensors\", expected a file name",
    ),
    case(
        "an index of a number",
        |w| index(w, "{\"weight_map\": {\"a\": 7}}"),
        "error: load model: FOLDER/model/model.safetensors.index.json: weight_map: a: found 7, expected a file name",
    ),
    case(
        "an index of a tensor that its shard lacks",
        |w| {
            w.bytes("model/model.safetensors", |_| ());
            std::fs::rename(w.path("model/model.safetensors"), w.path("model/all.safetensors")).unwrap();
            w.file(
                "model/model.safetensors.index.json",
                "{\"weight_map\": {\"ghost\": \"all.safetensors\"}}",
            );
        },
        "error: load model: FOLDER/model/model.safetensors.index.json: places tensor ghost in all.safetensors, which does not hold it",
    ),
];

const TEXT: &[Case] = &[
    case(
        "an empty tokenizer.json",
        |w| w.file("model/tokenizer.json", ""),
        "error: FOLDER/model/tokenizer.json: EOF while parsing a value at line 1 column 0",
    ),
    case(
        "a tokenizer.json that is a folder",
        |w| w.folder("model/tokenizer.json"),
        "error: read FOLDER/model/tokenizer.json: Is a directory (os error 21)",
    ),
    case(
        "a tokenizer.json that is a list",
        |w| w.file("model/tokenizer.json", "[]"),
        "error: FOLDER/model/tokenizer.json: invalid type: sequence, expected struct Tokenizer at line 1 column 2",
    ),
    case(
        "a tokenizer.json without a model",
        |w| w.file("model/tokenizer.json", "{\"version\": \"1.0\"}"),
        "error: FOLDER/model/tokenizer.json: Model missing. at line 1 column 18",
    ),
    case(
        "a tokenizer.json of an unknown model",
        |w| w.json("model/tokenizer.json", |t| t["model"]["type"] = json!("Magic")),
        "error: FOLDER/model/tokenizer.json: data did not match any variant of untagged enum ModelUntagged at line 1 column 14614",
    ),
    case(
        "a tokenizer.json whose merges are unknown",
        |w| w.json("model/tokenizer.json", |t| t["model"]["merges"] = json!([["zz", "qq"]])),
        "error: FOLDER/model/tokenizer.json: Token `zz` out of vocabulary at line 1 column 8577",
    ),
    case(
        "a tokenizer.json with a broken pattern",
        |w| {
            w.json("model/tokenizer.json", |t| t["pre_tokenizer"] = json!({"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": false}))
        },
        "error: FOLDER/model/tokenizer.json: Parsing error at position 1: Opening parenthesis without closing parenthesis at line 1 column 14761",
    ),
    case(
        "a tokenizer.json nested 100,000 deep",
        |w| w.file("model/tokenizer.json", "[".repeat(100_000)),
        "error: FOLDER/model/tokenizer.json: invalid type: sequence, expected struct Tokenizer at line 1 column 1",
    ),
    case(
        "a tokenizer_config.json that is no JSON",
        |w| w.file("model/tokenizer_config.json", "chat_template: x"),
        "error: FOLDER/model/tokenizer_config.json: expected value at line 1 column 1",
    ),
    case(
        "a tokenizer_config.json that is a list",
        |w| w.file("model/tokenizer_config.json", "[]"),
        "error: FOLDER/model/tokenizer_config.json: expected an object, found []",
    ),
    case(
        "a tokenizer_config.json that is a folder",
        |w| w.folder("model/tokenizer_config.json"),
        "error: read FOLDER/model/tokenizer_config.json: Is a directory (os error 21)",
    ),
    case(
        "a chat template that is a number",
        |w| w.json("model/tokenizer_config.json", |t| t["chat_template"] = json!(3)),
        "error: FOLDER/model/tokenizer_config.json: chat_template: expected a string or a named list, found 3",
    ),
    case(
        "a chat template that does not end",
        |w| w.json("model/tokenizer_config.json", |t| t["chat_template"] = json!("a\n{% if %}")),
        "error: FOLDER/model/tokenizer_config.json: syntax error: unexpected end of block (in chat_template:2)",
    ),
    case(
        "chat templates without a default",
        |w| {
            w.json("model/tokenizer_config.json", |t| {
                t["chat_template"] = json!([{"name": "rag", "template": "R"}])
            })
        },
        "error: FOLDER/model/tokenizer_config.json: chat_template has no entry named default, only rag",
    ),
    case(
        "a chat_template.jinja that is not UTF-8",
        |w| w.file("model/chat_template.jinja", b"\xff\xfe{"),
        "error: read FOLDER/model/chat_template.jinja: stream did not contain valid UTF-8",
    ),
    case(
        "a chat_template.jinja that is a folder",
        |w| w.folder("model/chat_template.jinja"),
        "error: read FOLDER/model/chat_template.jinja: Is a directory (os error 21)",
    ),
    case(
        "a chat_template.jinja nested 100,000 deep",
        |w| w.file("model/chat_template.jinja", "{% if 1 %}".repeat(100_000)),
        "error: FOLDER/model/chat_template.jinja: syntax error: a template of 1000000 bytes, expected at most 131072",
    ),
    case(
        "a chat_template.jinja of 100,000 parentheses",
        |w| w.file("model/chat_template.jinja", format!("{{{{ {} }}}}", "(".repeat(100_000))),
        "error: FOLDER/model/chat_template.jinja: syntax error: template exceeds maximum recursion limits (in chat_template:1)",
    ),
    case(
        "a chat_template.jinja of a megabyte",
        |w| w.file("model/chat_template.jinja", "x".repeat(1_000_000)),
        "error: FOLDER/model/chat_template.jinja: syntax error: a template of 1000000 bytes, expected at most 131072",
    ),
    case(
        "a chat_template.jinja of 100,000 negations",
        |w| w.file("model/chat_template.jinja", format!("{{{{ {}1 }}", "-".repeat(100_000))),
        "error: FOLDER/model/chat_template.jinja: syntax error: unexpected `}`, expected end of variable block (in chat_template:1)",
    ),
    case(
        "a generation_config.json that is no JSON",
        |w| w.file("model/generation_config.json", "{'temperature': 1}"),
        "error: FOLDER/model/generation_config.json: key must be a string at line 1 column 2",
    ),
    case(
        "a generation_config.json that is a text",
        |w| w.file("model/generation_config.json", "\"greedy\""),
        "error: FOLDER/model/generation_config.json: expected an object, found \"greedy\"",
    ),
    case(
        "a temperature below 0",
        |w| w.file("model/generation_config.json", "{\"temperature\": -1}"),
        "error: FOLDER/model/generation_config.json: temperature: expected a number from 0 to 2, found -1",
    ),
    case(
        "a temperature of infinity",
        |w| w.file("model/generation_config.json", "{\"temperature\": 1e999}"),
        "error: FOLDER/model/generation_config.json: number out of range at line 1 column 21",
    ),
    case(
        "a temperature that is a text",
        |w| w.file("model/generation_config.json", "{\"temperature\": \"hot\"}"),
        "error: FOLDER/model/generation_config.json: temperature: expected a number, found \"hot\"",
    ),
    case(
        "a top_k of half a token",
        |w| w.file("model/generation_config.json", "{\"top_k\": 0.5}"),
        "error: FOLDER/model/generation_config.json: top_k: expected an integer, found 0.5",
    ),
    case(
        "a do_sample that is a text",
        |w| w.file("model/generation_config.json", "{\"do_sample\": \"yes\"}"),
        "error: FOLDER/model/generation_config.json: do_sample: expected true or false, found \"yes\"",
    ),
    case(
        "an end of sequence beyond the vocabulary",
        |w| w.file("model/generation_config.json", "{\"eos_token_id\": 768}"),
        "error: FOLDER/model/generation_config.json: eos_token_id: expected token ids below 768, found 768",
    ),
    case(
        "a special_tokens_map.json that is a list",
        |w| w.file("model/special_tokens_map.json", "[]"),
        "error: FOLDER/model/special_tokens_map.json: expected an object, found []",
    ),
    case(
        "a [prompt] for a model without tokenizer",
        |w| {
            w.remove("model/tokenizer.json");
            w.set("prompt.user=x")
        },
        "error: [prompt] user needs a tokenizer.json, and the model model has none",
    ),
    case(
        "a [prompt] for a model without chat template",
        |w| {
            w.json("model/tokenizer_config.json", |t| t["chat_template"] = Value::Null);
            w.set("prompt.user=x")
        },
        "error: [prompt] user needs a chat template, and the model model has none",
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

fn rename(header: &mut Value, from: &str, to: &str) {
    let tensor = header.as_object_mut().expect("an object").remove(from).expect("a tensor");
    header[to] = tensor;
}

fn index(world: &super::table::World, text: &str) {
    world.remove("model/model.safetensors");
    world.file("model/model.safetensors.index.json", text);
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

#[test]
fn shards_that_cannot_be_are_refused() {
    check(SHARDS);
}

#[test]
fn files_of_text_that_cannot_be_are_refused() {
    check(TEXT);
}
