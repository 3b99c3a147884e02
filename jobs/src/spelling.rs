//! The bytes each token stands for, worked out once from the tokenizer's decoder.
//!
//! In the byte-level and SentencePiece-like vocabularies of language models a text is nothing but the
//! concatenation of its tokens' bytes, read as UTF-8. Knowing them makes detokenizing exact and
//! linear in the number of tokens, whatever the borders of tokens cut through.

use std::collections::HashMap;

use scheduler::TokenId;
use serde_json::Value;

/// Most token ids there can be. The table is as long as the highest id; no vocabulary comes near this.
const MAX_VOCAB: u32 = 1 << 24;

/// How the decoder turns a token's content into bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Alphabet {
    /// GPT-2's: each character of the content stands for one byte.
    ByteLevel,
    /// SentencePiece's: a replacement character stands for a space, `<0x0A>` for the byte 10.
    SentencePiece { space: char, byte_fallback: bool },
    /// Another: the text of several tokens is not the concatenation of theirs.
    Other,
}

/// Bytes of all tokens, in one arena.
pub(crate) struct Spelling {
    alphabet: Alphabet,
    arena: Vec<u8>,
    // Start of each token's bytes in the arena, and one more for the end of the last.
    starts: Vec<u32>,
    // Ids below the highest that stand for no token.
    holes: Vec<TokenId>,
}

impl Spelling {
    /// The spelling of a tokenizer's tokens; the error is for its file.
    pub(crate) fn of(tokenizer: &tokenizers::Tokenizer) -> Result<Spelling, String> {
        let alphabet = alphabet(&serde_json::to_value(tokenizer.get_decoder()).unwrap_or(Value::Null));
        let byte_of = byte_of_char();
        let added = tokenizer.get_added_tokens_decoder();
        let vocab = tokenizer.get_vocab(true);
        let size = vocab.values().max().map_or(0, |&id| id.saturating_add(1));
        if size > MAX_VOCAB {
            return Err(format!("expected token ids below {MAX_VOCAB}, found {}", size - 1));
        }
        let mut spelling = Spelling { alphabet, arena: Vec::new(), starts: vec![0], holes: Vec::new() };
        for id in 0..size {
            match (added.get(&id), tokenizer.id_to_token(id)) {
                (Some(token), _) if token.special => {
                    spelling.arena.extend_from_slice(token.content.as_bytes())
                }
                (_, Some(content)) => alphabet.spell(&content, &byte_of, &mut spelling.arena),
                (_, None) => spelling.holes.push(id),
            }
            spelling.starts.push(u32::try_from(spelling.arena.len()).expect("a vocabulary under 4 GiB"));
        }
        Ok(spelling)
    }

    pub(crate) fn bytes(&self, id: TokenId) -> Option<&[u8]> {
        let idx = id as usize;
        if idx >= self.len() || self.holes.binary_search(&id).is_ok() {
            return None;
        }
        Some(&self.arena[self.starts[idx] as usize..self.starts[idx + 1] as usize])
    }

    pub(crate) fn len(&self) -> usize {
        self.starts.len() - 1
    }

    pub(crate) fn is_exact(&self) -> bool {
        self.alphabet != Alphabet::Other
    }
}

impl Alphabet {
    fn spell(self, content: &str, byte_of: &HashMap<char, u8>, arena: &mut Vec<u8>) {
        match self {
            Alphabet::ByteLevel => {
                // A token with any character outside the alphabet was added as plain text.
                match content.chars().map(|c| byte_of.get(&c).copied()).collect::<Option<Vec<u8>>>() {
                    Some(bytes) => arena.extend_from_slice(&bytes),
                    None => arena.extend_from_slice(content.as_bytes()),
                }
            }
            Alphabet::SentencePiece { space, byte_fallback } => match fallback_byte(content) {
                Some(byte) if byte_fallback => arena.push(byte),
                _ => arena.extend_from_slice(content.replace(space, " ").as_bytes()),
            },
            Alphabet::Other => arena.extend_from_slice(content.replace('\u{2581}', " ").as_bytes()),
        }
    }
}

/// The byte of a content such as `<0x0A>`.
fn fallback_byte(content: &str) -> Option<u8> {
    let hex = content.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() == 2 { u8::from_str_radix(hex, 16).ok() } else { None }
}

/// GPT-2's alphabet: printable Latin-1 characters stand for themselves, the other bytes for the
/// characters from U+0100 on, in order.
fn byte_of_char() -> HashMap<char, u8> {
    let is_printable = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut next = 0x100u32;
    let mut table = HashMap::new();
    for byte in 0..=255u8 {
        if is_printable(byte) {
            table.insert(char::from(byte), byte);
        } else {
            table.insert(char::from_u32(next).expect("U+0100 to U+0143 are characters"), byte);
            next += 1;
        }
    }
    table
}

/// Reads the alphabet off the decoder's JSON, whose fields the library keeps private.
fn alphabet(decoder: &Value) -> Alphabet {
    let kind = |value: &Value| value["type"].as_str().unwrap_or_default().to_owned();
    match kind(decoder).as_str() {
        "ByteLevel" => Alphabet::ByteLevel,
        // A sequence follows a prompt, so its first token keeps the space that a text of its own loses.
        "Metaspace" => Alphabet::SentencePiece {
            space: decoder["replacement"].as_str().and_then(|s| s.chars().next()).unwrap_or('\u{2581}'),
            byte_fallback: false,
        },
        "Sequence" => sequence_alphabet(decoder["decoders"].as_array().map_or(&[], Vec::as_slice), kind),
        _ => Alphabet::Other,
    }
}

fn sequence_alphabet(parts: &[Value], kind: impl Fn(&Value) -> String) -> Alphabet {
    let kinds: Vec<String> = parts.iter().map(&kind).collect();
    match kinds.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [_] => alphabet(&parts[0]),
        // Llama 2's and Gemma's form. The strip takes one space off the very front of a text of its own.
        ["Replace", "ByteFallback", "Fuse"] | ["Replace", "ByteFallback", "Fuse", "Strip"] => {
            let from = parts[0]["pattern"]["String"].as_str().unwrap_or_default();
            match (from.chars().next(), from.chars().count(), parts[0]["content"].as_str()) {
                (Some(space), 1, Some(" ")) => Alphabet::SentencePiece { space, byte_fallback: true },
                _ => Alphabet::Other,
            }
        }
        _ => Alphabet::Other,
    }
}
