//! Files beside `config.json` that cannot be: shards and their index, and the files of text.

use serde_json::{Value, json};

use super::table::{Case, World, case, check};

const SHARDS: &[Case] = &[
    case(
        "no weights",
        |w| w.remove("model/model.safetensors"),
        "error: load model: FOLDER/model: found neither model.safetensors nor model.safetensors.index.json\nhint: a job file may have random ones made from config.json alone, by [model] random_weights = true",
    ),
    case(
        "weights that are a folder",
        |w| w.folder("model/model.safetensors"),
        "error: load model: FOLDER/model: found neither model.safetensors nor model.safetensors.index.json\nhint: a job file may have random ones made from config.json alone, by [model] random_weights = true",
    ),
    case(
        "weights that link to nothing",
        |w| w.link("model/model.safetensors", "blob"),
        "error: load model: FOLDER/model: found neither model.safetensors nor model.safetensors.index.json\nhint: a job file may have random ones made from config.json alone, by [model] random_weights = true",
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
        |w| w.config(|c| c["block_configs"][1]["attention"]["no_op"] = json!(true)),
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
        "error: FOLDER/model/tokenizer.json: data did not match any variant of untagged enum ModelUntagged at line 1 column 15051",
    ),
    case(
        "a tokenizer.json whose merges are unknown",
        |w| w.json("model/tokenizer.json", |t| t["model"]["merges"] = json!([["zz", "qq"]])),
        "error: FOLDER/model/tokenizer.json: Token `zz` out of vocabulary at line 1 column 9014",
    ),
    case(
        "a tokenizer.json with a broken pattern",
        |w| {
            w.json("model/tokenizer.json", |t| t["pre_tokenizer"] = json!({"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": false}))
        },
        "error: FOLDER/model/tokenizer.json: Parsing error at position 1: Opening parenthesis without closing parenthesis at line 1 column 796",
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

fn rename(header: &mut Value, from: &str, to: &str) {
    let tensor = header.as_object_mut().expect("an object").remove(from).expect("a tensor");
    header[to] = tensor;
}

fn index(world: &World, text: &str) {
    world.remove("model/model.safetensors");
    world.file("model/model.safetensors.index.json", text);
}

#[test]
fn shards_that_cannot_be_are_refused() {
    check(SHARDS);
}

#[test]
fn files_of_text_that_cannot_be_are_refused() {
    check(TEXT);
}
