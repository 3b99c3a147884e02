//! What each fuzz target does with its bytes: one of the program's doors, opened the way a job opens it.
//!
//! A target passes when nothing panics, hangs or eats the memory, and when what the door promises holds:
//! the assertions here say what that is. `tests/corpus/` runs the same functions over the kept corpora.
#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use jobs::{
    Line, Message, ModelText, ModelTextOptions, Preparer, Prompt, PromptOptions, Reader, Row, RowOptions,
    SamplingOptions,
};
use stages::{Model, ModelConfig};
use tempfile::TempDir;

/// A model of one block whose tokens 0 to 255 are bytes.
const MODEL: [(&str, &str); 3] = [
    ("config.json", include_str!("../model/config.json")),
    ("tokenizer.json", include_str!("../model/tokenizer.json")),
    ("tokenizer_config.json", include_str!("../model/tokenizer_config.json")),
];

/// Tokens of [`MODEL`].
const VOCAB: usize = 270;

/// Longest prompt and answer together.
const CONTEXT: u32 = 64;

/// Stands between the files of an input that is several; no text holds it.
const SEPARATOR: u8 = 0xff;

thread_local! {
    static SCRATCH: TempDir = scratch();
    static TEXT: Arc<ModelText> = {
        let folder = scratch();
        MODEL.iter().for_each(|(name, content)| write(&folder.path().join(name), content));
        Arc::new(open_text(folder.path()).expect("the model is good"))
    };
}

/// A folder in memory where the system has one: a disk would set the pace.
fn scratch() -> TempDir {
    let memory = Path::new("/dev/shm");
    let made = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    made.expect("a temporary folder")
}

fn write(path: &Path, content: impl AsRef<[u8]>) {
    std::fs::write(path, content).expect("the temporary folder takes files");
}

fn open_text(folder: &Path) -> jobs::Result<ModelText> {
    // 2026-03-01, noon.
    let options = ModelTextOptions { vocab_size: VOCAB, eos_token_ids: vec![], unix_seconds: 1_772_366_400 };
    ModelText::open(folder, &options)
}

fn row_options(prompt: Option<PromptOptions>) -> RowOptions {
    RowOptions {
        model_identity: "fuzz".to_owned(),
        prompt,
        grader: None,
        sampling: SamplingOptions::default(),
        seed: 7,
        max_context_tokens: CONTEXT,
    }
}

/// An input file, read as batch lines and as plain rows.
pub fn rows(data: &[u8]) {
    let user = "{{ text }}{% for item in items | default([]) %}{{ item }}{% endfor %}".to_owned();
    let prompts = [None, Some(PromptOptions { system: None, user })];
    for prompt in prompts {
        SCRATCH.with(|folder| read_rows(&folder.path().join("input.jsonl"), data, prompt));
    }
}

fn read_rows(path: &Path, data: &[u8], prompt: Option<PromptOptions>) {
    write(path, data);
    let preparer = Preparer::new(TEXT.with(Arc::clone), row_options(prompt)).expect("the settings are good");
    let mut reader = Reader::open(path, preparer, None).expect("a file");
    let rows: Vec<Row> = reader.by_ref().collect::<Result<_, _>>().expect("a file can be read");
    assert_eq!(reader.record().bytes, data.len() as u64, "every byte is read");
    let keys: Vec<_> = rows.iter().map(check_row).collect();
    assert_eq!(keys.iter().collect::<HashSet<_>>().len(), keys.len(), "two rows have two keys");
    let lines = data.split(|&byte| byte == b'\n').filter(|line| !line.trim_ascii().is_empty());
    // A carriage return alone and a byte order mark alone are no rows.
    assert!(rows.len() <= lines.count());
}

/// The key of a row that is as the pipeline trusts it to be.
fn check_row(row: &Row) -> u128 {
    match row {
        Row::Request(row) => {
            let (prompt, sampling) = (&row.request.prompt, &row.request.sampling);
            assert!(!prompt.is_empty() && prompt.len() <= CONTEXT as usize);
            assert!(prompt.len() + sampling.max_tokens as usize <= CONTEXT as usize);
            assert!(prompt.iter().chain(&sampling.stop_token_ids).all(|&token| (token as usize) < VOCAB));
            assert!(sampling.temperature >= 0.0 && sampling.temperature.is_finite());
            assert!(sampling.top_p > 0.0 && sampling.top_p <= 1.0);
            row.request.key.0
        }
        Row::Rejected(row) => {
            let line = Line::rejected(row).json;
            assert!(!line.contains('\n') && !row.error.message.is_empty());
            serde_json::from_str::<serde_json::Value>(&line).expect("an error line is JSON");
            row.key.0
        }
        Row::Finished(row) => panic!("{row:?} was finished by nobody"),
    }
}

/// A job file and, after each zero byte, an argument of `--set` (or, with a `!`, a variable).
pub fn job_file(data: &[u8]) {
    SCRATCH.with(|folder| {
        let mut parts = data.split(|&byte| byte == 0);
        let path = folder.path().join("job.toml");
        write(&path, parts.next().unwrap_or_default());
        let parts: Vec<String> = parts.map(|part| String::from_utf8_lossy(part).into_owned()).collect();
        let (variables, sets): (Vec<_>, Vec<_>) = parts.into_iter().partition(|part| part.starts_with('!'));
        let variables = variables.iter().map(|variable| {
            let (name, value) = variable[1..].split_once('=').unwrap_or((&variable[1..], ""));
            (format!("{}{name}", configs::ENVIRONMENT_PREFIX), value.to_owned())
        });
        match configs::load(&path, &sets, variables, folder.path()) {
            Err(error) => assert!(!error.to_string().is_empty()),
            Ok(loaded) => {
                write(&path, loaded.job.to_toml());
                let again = configs::load(&path, &[], std::iter::empty(), folder.path());
                assert_eq!(again.expect("a job that was loaded").job, loaded.job);
            }
        }
    });
}

/// A shard, or after a separator an index beside a shard that it may name, of a model whose configuration
/// is right.
pub fn checkpoint(data: &[u8]) {
    let (shard, index) = match data.iter().position(|&byte| byte == SEPARATOR) {
        Some(0) => (None, Some(&data[1..])),
        _ => (Some(data), None),
    };
    SCRATCH.with(|folder| {
        let folder = folder.path();
        write(&folder.join("config.json"), MODEL[0].1);
        let single = folder.join("model.safetensors");
        match (shard, index) {
            (Some(shard), _) => write(&single, shard),
            (None, index) => {
                let _ = std::fs::remove_file(&single);
                write(&folder.join("model.safetensors.index.json"), index.unwrap_or_default());
                write(&folder.join("a.safetensors"), include_bytes!("../model/a.safetensors"));
            }
        }
        match Model::open(folder, false) {
            Err(error) => assert!(!error.to_string().is_empty()),
            Ok((model, _)) => {
                for (name, shape) in
                    [("model.embed_tokens.weight", &[VOCAB, 4][..]), ("model.norm.weight", &[4])]
                {
                    let (values, bytes) =
                        model.weights.with(name, shape, |view| (view.rows * view.cols, view.bytes.len()));
                    assert_eq!(values, shape.iter().product::<usize>(), "{name}");
                    assert!(bytes == 2 * values || bytes == 4 * values, "{name}: {bytes} bytes");
                }
            }
        }
    });
}

/// A `config.json`.
pub fn model_config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match ModelConfig::parse(Path::new("config.json"), text) {
        Err(error) => assert!(!error.to_string().is_empty()),
        Ok(config) => {
            assert!(!config.blocks.is_empty() && config.blocks.len() <= config.num_slots);
            assert!(config.params() > 0);
            assert_eq!(stages::cost::pieces(&config, None).len(), config.blocks.len());
            let frequencies = config.rope.inverse_frequencies(config.dims.head_dim);
            assert_eq!(frequencies.len(), config.dims.head_dim / 2);
        }
    }
}

/// A chat template, which is also tried as the `[prompt] user` of a job.
pub fn template(data: &[u8]) {
    let Ok(source) = std::str::from_utf8(data) else { return };
    SCRATCH.with(|folder| {
        let folder = folder.path();
        // Without a tokenizer a chat is rendered all the same, and models open ten times as fast.
        let _ = std::fs::remove_file(folder.join("tokenizer.json"));
        write(&folder.join("chat_template.jinja"), source);
        write(&folder.join("tokenizer_config.json"), r#"{"bos_token": "<|begin_of_text|>"}"#);
        match open_text(folder) {
            Err(error) => assert!(!error.to_string().is_empty()),
            Ok(text) => {
                let preparer = Preparer::new(Arc::new(text), row_options(None)).expect("good settings");
                let chat =
                    [("system", "Be brief."), ("user", "Hello\n{{ x }}"), ("assistant", ""), ("user", "é😀")];
                for length in [1, 2, 4] {
                    let chat = chat[..length].iter().map(|&(role, text)| Message::new(role, text)).collect();
                    if let Err(error) = preparer.prompt(Prompt::Chat(chat), SamplingOptions::default()) {
                        assert!(!error.message.is_empty());
                    }
                }
            }
        }
        let options = PromptOptions { system: None, user: source.to_owned() };
        if let Ok(preparer) = Preparer::new(TEXT.with(Arc::clone), row_options(Some(options))) {
            let input = folder.join("plain.jsonl");
            write_once(&input, include_str!("../model/plain.jsonl"));
            let rows = Reader::open(&input, preparer, None).expect("a file");
            rows.for_each(|row| assert_ne!(check_row(&row.expect("a row")), 0));
        }
    });
}

/// `tokenizer_config.json`, `generation_config.json` and `special_tokens_map.json`, one after the other.
pub fn model_text(data: &[u8]) {
    SCRATCH.with(|folder| {
        let folder = folder.path();
        write_once(&folder.join("tokenizer.json"), MODEL[1].1);
        let _ = std::fs::remove_file(folder.join("chat_template.jinja"));
        let mut parts = data.split(|&byte| byte == SEPARATOR);
        for name in ["tokenizer_config.json", "generation_config.json", "special_tokens_map.json"] {
            write(&folder.join(name), parts.next().unwrap_or(b"{}"));
        }
        match open_text(folder) {
            Err(error) => assert!(!error.to_string().is_empty()),
            Ok(text) => {
                let ids = text.eos_token_ids();
                assert!(ids.iter().all(|&id| (id as usize) < VOCAB) && ids.is_sorted());
                let preparer =
                    Preparer::new(Arc::new(text), row_options(None)).expect("its sampling was checked");
                let asked = preparer.prompt(Prompt::Text("hello".into()), SamplingOptions::default());
                asked.expect("a prompt of one token fits");
            }
        }
    });
}

fn write_once(path: &Path, content: &str) {
    if !path.exists() {
        write(path, content);
    }
}
