//! A model directory with next to nothing in it: a byte-level tokenizer whose ids can be told by eye.
//!
//! Token 0 to 255 is the byte of that number; then come a few merges, then the special tokens.

use std::path::Path;
use std::sync::Arc;

use jobs::{
    EarlierRuns, ModelText, ModelTextOptions, Preparer, PromptOptions, Reader, Row, RowOptions,
    SamplingOptions, Tokenizer,
};
use serde_json::{Value, json};
use tempfile::TempDir;

pub(crate) const HELLO: u32 = 259;
pub(crate) const WORLD: u32 = 264;
pub(crate) const BOS: u32 = 265;
pub(crate) const EOS: u32 = 266;
pub(crate) const START: u32 = 267;
pub(crate) const END: u32 = 268;
pub(crate) const EOT: u32 = 269;
pub(crate) const VOCAB: usize = 270;

/// 2026-03-01, noon.
pub(crate) const NOW: u64 = 1_772_366_400;

const MERGES: [[&str; 2]; 9] = [
    ["h", "e"],
    ["l", "l"],
    ["he", "ll"],
    ["hell", "o"],
    ["Ġ", "w"],
    ["o", "r"],
    ["Ġw", "or"],
    ["l", "d"],
    ["Ġwor", "ld"],
];

const SPECIALS: [&str; 5] =
    ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"];

pub(crate) const CHAT_TEMPLATE: &str = "{{- bos_token }}{%- for message in messages %}\
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>' + message['content'] | trim + '<|eot_id|>' }}\
    {%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>' }}{%- endif %}";

/// GPT-2's characters for the bytes 0 to 255.
fn byte_chars() -> Vec<char> {
    let mut extra = 0x100u32..;
    (0..=255u8)
        .map(|byte| match byte {
            33..=126 | 161..=172 | 174..=255 => char::from(byte),
            _ => char::from_u32(extra.next().unwrap()).unwrap(),
        })
        .collect()
}

/// A tokenizer that puts a beginning-of-sequence token in front, and cuts and pads if it is let.
pub(crate) fn tokenizer_json() -> Value {
    let mut vocab: Vec<String> = byte_chars().into_iter().map(String::from).collect();
    vocab.extend(MERGES.iter().map(|[left, right]| format!("{left}{right}")));
    let special = |(idx, content): (usize, &&str)| {
        json!({"id": vocab.len() + idx, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    let specials: Vec<Value> = SPECIALS.iter().enumerate().map(special).collect();
    let ids: serde_json::Map<String, Value> =
        vocab.iter().enumerate().map(|(id, token)| (token.clone(), id.into())).collect();
    let bos = json!({"SpecialToken": {"id": SPECIALS[0], "type_id": 0}});
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 266,
            "pad_type_id": 0, "pad_token": SPECIALS[1]},
        "added_tokens": specials,
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {SPECIALS[0]: {"id": SPECIALS[0], "ids": [BOS], "tokens": [SPECIALS[0]]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": ids, "merges": MERGES},
    })
}

pub(crate) fn tokenizer() -> Arc<Tokenizer> {
    Arc::new(Tokenizer::from_json(tokenizer_json().to_string().as_bytes()).unwrap())
}

/// A model directory and the settings of a job over it.
pub(crate) struct World {
    pub(crate) dir: TempDir,
    pub(crate) options: RowOptions,
    pub(crate) limit: Option<u64>,
}

impl World {
    /// A model with a tokenizer and a chat template; rows are batch lines.
    pub(crate) fn new() -> World {
        let world = World::without_tokenizer();
        world.file("tokenizer.json", tokenizer_json().to_string());
        world.tokenizer_config(json!({
            "bos_token": {"content": SPECIALS[0], "lstrip": false},
            "eos_token": SPECIALS[4],
            "chat_template": CHAT_TEMPLATE,
        }))
    }

    /// A model that knows token ids only.
    pub(crate) fn without_tokenizer() -> World {
        let options = RowOptions {
            model_identity: "tiny".to_owned(),
            prompt: None,
            grader: None,
            sampling: SamplingOptions::default(),
            seed: 7,
            max_context_tokens: 64,
        };
        World { dir: TempDir::with_prefix("tiny").unwrap(), options, limit: None }
    }

    pub(crate) fn file(&self, name: &str, content: impl AsRef<[u8]>) {
        std::fs::write(self.dir.path().join(name), content).unwrap();
    }

    pub(crate) fn tokenizer_config(self, config: Value) -> World {
        self.file("tokenizer_config.json", config.to_string());
        self
    }

    /// Rows are plain, and the user says this of them.
    pub(crate) fn user(mut self, template: &str) -> World {
        let system = self.options.prompt.take().and_then(|prompt| prompt.system);
        self.options.prompt = Some(PromptOptions { system, user: template.to_owned() });
        self
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn try_text(&self) -> jobs::Result<ModelText> {
        let options = ModelTextOptions { vocab_size: VOCAB, eos_token_ids: vec![EOS], unix_seconds: NOW };
        ModelText::open(self.path(), &options)
    }

    pub(crate) fn text(&self) -> Arc<ModelText> {
        Arc::new(self.try_text().unwrap())
    }

    pub(crate) fn preparer(&self) -> Preparer {
        Preparer::new(self.text(), self.options.clone()).unwrap()
    }

    pub(crate) fn reader(&self, input: impl AsRef<[u8]>) -> Reader {
        self.reader_after(input, EarlierRuns::default())
    }

    /// A reader that knows what earlier runs have done.
    pub(crate) fn reader_after(&self, input: impl AsRef<[u8]>, earlier: EarlierRuns) -> Reader {
        self.file("input.jsonl", input);
        Reader::open(&self.path().join("input.jsonl"), self.preparer(), self.limit).unwrap().after(earlier)
    }

    pub(crate) fn rows(&self, input: impl AsRef<[u8]>) -> Vec<Row> {
        self.reader(input).map(Result::unwrap).collect()
    }

    /// The one request of an input of one line.
    pub(crate) fn request(&self, line: &str) -> Box<jobs::PreparedRow> {
        match self.rows(line).pop().unwrap() {
            Row::Request(row) => row,
            Row::Rejected(row) => panic!("{line}: {}", row.error),
            Row::Finished(row) => panic!("{line}: {row:?}"),
        }
    }

    /// The request of a chat of one message, with further fields in its body.
    pub(crate) fn chat(&self, fields: Value) -> Box<jobs::PreparedRow> {
        self.request(&chat_line("a", fields))
    }

    /// The request of a completion of `hello`, with further fields in its body.
    pub(crate) fn completion(&self, fields: Value) -> Box<jobs::PreparedRow> {
        self.request(&completion_line("a", fields))
    }

    /// Why the one line of an input is refused: its code, its parameter and the message.
    pub(crate) fn refusal(&self, line: &str) -> String {
        match self.rows(line).pop().unwrap() {
            row @ (Row::Request(_) | Row::Finished(_)) => panic!("{line} is a request: {row:?}"),
            Row::Rejected(row) => {
                let param = row.error.param.unwrap_or_else(|| "-".to_owned());
                format!("{} {param} | {}", row.error.code, row.error.message)
            }
        }
    }
}

pub(crate) fn chat_line(custom_id: &str, fields: Value) -> String {
    let body = with(json!({"messages": [{"role": "user", "content": "hello"}]}), fields);
    json!({"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}).to_string()
}

pub(crate) fn completion_line(custom_id: &str, fields: Value) -> String {
    let body = with(json!({"prompt": "hello"}), fields);
    json!({"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}).to_string()
}

fn with(mut body: Value, fields: Value) -> Value {
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}
