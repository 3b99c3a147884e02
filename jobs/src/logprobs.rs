//! Log-probabilities in OpenAI's two shapes.
//!
//! Every generated token has its entry, the one that ended the sequence and those behind a stop
//! string too, so that their sum is the sequence's log-probability. A token whose bytes are no UTF-8
//! of their own is named by them, as OpenAI does; a token without a text is named `token_id:123`.

use std::fmt::Write;

use scheduler::{Completion, TokenId, TokenLogprobs};
use serde::ser::{Serialize, SerializeMap, Serializer};

use crate::prepared::PreparedRow;
use crate::tokenizer::Tokenizer;

/// What stands for a logarithm that JSON cannot hold; the number OpenAI uses.
const LEAST_LOGPROB: f32 = -9999.0;

/// Names of tokens; without a tokenizer, their ids.
pub(crate) struct TokenNames<'a>(pub(crate) Option<&'a Tokenizer>);

impl TokenNames<'_> {
    fn bytes(&self, token: TokenId) -> Option<&[u8]> {
        self.0.and_then(|tokenizer| tokenizer.token_bytes(token))
    }

    /// The name of a token, with `prefix` in front of escaped bytes.
    fn name(&self, token: TokenId, prefix: &str) -> String {
        let Some(bytes) = self.bytes(token) else { return format!("token_id:{token}") };
        match std::str::from_utf8(bytes) {
            Ok(text) => text.to_owned(),
            Err(_) => bytes.iter().fold(prefix.to_owned(), |mut name, byte| {
                write!(name, "\\x{byte:02x}").expect("a string takes all");
                name
            }),
        }
    }
}

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { LEAST_LOGPROB }
}

/// `choices[].logprobs` of a chat completion.
#[derive(serde::Serialize)]
pub(crate) struct ChatLogprobs {
    content: Vec<ChatToken>,
    refusal: Option<()>,
}

#[derive(serde::Serialize)]
struct ChatToken {
    #[serde(flatten)]
    token: ChatAlternative,
    top_logprobs: Vec<ChatAlternative>,
}

#[derive(serde::Serialize)]
struct ChatAlternative {
    token: String,
    bytes: Option<Vec<u8>>,
    logprob: f32,
}

impl ChatLogprobs {
    pub(crate) fn new(names: &TokenNames<'_>, logprobs: &[TokenLogprobs]) -> Self {
        let alternative = |token, logprob| ChatAlternative {
            token: names.name(token, ""),
            bytes: names.bytes(token).map(<[u8]>::to_vec),
            logprob: finite(logprob),
        };
        let content = logprobs.iter().map(|entry| ChatToken {
            token: alternative(entry.token, entry.logprob),
            top_logprobs: entry.top.iter().map(|&(token, logprob)| alternative(token, logprob)).collect(),
        });
        ChatLogprobs { content: content.collect(), refusal: None }
    }
}

/// `choices[].logprobs` of a text completion.
#[derive(serde::Serialize)]
pub(crate) struct CompletionLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<TopLogprobs>>,
    text_offset: Vec<usize>,
}

/// The most likely tokens by name, in falling order. The chosen one is always among them; of two
/// tokens with the same name the more likely stands.
struct TopLogprobs(Vec<(String, f32)>);

impl Serialize for TopLogprobs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, logprob) in &self.0 {
            map.serialize_entry(name, logprob)?;
        }
        map.end()
    }
}

impl TopLogprobs {
    fn new(names: &TokenNames<'_>, entry: &TokenLogprobs) -> Self {
        let mut top: Vec<(String, f32)> = Vec::with_capacity(entry.top.len() + 1);
        for &(token, logprob) in entry.top.iter().chain([&(entry.token, entry.logprob)]) {
            let name = names.name(token, "bytes:");
            if top.iter().all(|(other, _)| *other != name) {
                top.push((name, finite(logprob)));
            }
        }
        TopLogprobs(top)
    }
}

impl CompletionLogprobs {
    /// `offsets` are those of the generated tokens in the generated text, in characters.
    pub(crate) fn new(
        names: &TokenNames<'_>,
        row: &PreparedRow,
        completion: &Completion,
        offsets: &[usize],
    ) -> Self {
        let mut all = CompletionLogprobs {
            tokens: Vec::new(),
            token_logprobs: Vec::new(),
            top_logprobs: Vec::new(),
            text_offset: Vec::new(),
        };
        let mut echo_chars = 0;
        if let Some(echo) = &row.reply.echo {
            let prompt_offsets = echo_offsets(names, echo, &row.request.prompt);
            // Nothing stands before the first token that it could follow from.
            all.push(names, row.request.prompt[0], None, prompt_offsets[0]);
            for (entry, &offset) in completion.generated.prompt_logprobs.iter().zip(&prompt_offsets[1..]) {
                all.push(names, entry.token, Some(entry), offset);
            }
            echo_chars = echo.chars().count();
        }
        for (entry, offset) in completion.generated.logprobs.iter().zip(offsets) {
            all.push(names, entry.token, Some(entry), echo_chars + offset);
        }
        all
    }

    fn push(&mut self, names: &TokenNames<'_>, token: TokenId, entry: Option<&TokenLogprobs>, offset: usize) {
        self.tokens.push(names.name(token, "bytes:"));
        self.token_logprobs.push(entry.map(|entry| finite(entry.logprob)));
        self.top_logprobs.push(entry.map(|entry| TopLogprobs::new(names, entry)));
        self.text_offset.push(offset);
    }
}

/// Where each prompt token begins in the repeated prompt, in characters.
///
/// A token whose bytes do not stand at its place, such as a beginning-of-sequence token that the
/// tokenizer has added, takes no room.
fn echo_offsets(names: &TokenNames<'_>, echo: &str, prompt: &[TokenId]) -> Vec<usize> {
    let mut rest = echo.as_bytes();
    let mut chars = 0;
    let mut offset_of = |token: &TokenId| {
        let start = chars;
        let bytes = names.bytes(*token).unwrap_or_default();
        // SentencePiece-like vocabularies put a space before the first word that the text lacks.
        let trimmed = if start == 0 { bytes.strip_prefix(b" ").unwrap_or_default() } else { &[] };
        if let Some(tail) = rest.strip_prefix(bytes).or_else(|| rest.strip_prefix(trimmed)) {
            chars += rest[..rest.len() - tail.len()].iter().filter(|&&byte| begins_character(byte)).count();
            rest = tail;
        }
        start
    };
    prompt.iter().map(&mut offset_of).collect()
}

/// Whether a byte of UTF-8 is a character's first.
fn begins_character(byte: u8) -> bool {
    byte & 0xC0 != 0x80
}
