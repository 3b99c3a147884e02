//! Token ids back to text, one at a time.
//!
//! A [`Detokenizer`] follows one sequence: what it hands out never has to be taken back, so it keeps
//! the first bytes of a character until the rest has come. Special tokens are left out. The text is
//! the one a decoder makes of all tokens at once, save that a SentencePiece-like vocabulary keeps the
//! space in front of the first word (the tokens follow a prompt) and shows bytes that are no UTF-8 as
//! one replacement character per broken character.

use std::sync::Arc;

use scheduler::TokenId;

use crate::tokenizer::Tokenizer;

/// Turns the tokens of one sequence into text as they come.
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    /// Bytes handed in that are the beginning of a character.
    pending: Vec<u8>,
    window: Window,
}

/// Tokens around the border between text handed out and text to come, for vocabularies whose text is
/// not the concatenation of their tokens.
#[derive(Default)]
struct Window {
    tokens: Vec<TokenId>,
    // The text of the first `settled` tokens is out already.
    settled: usize,
}

impl Detokenizer {
    /// A detokenizer for one sequence, before its first token.
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Detokenizer { tokenizer, pending: Vec::new(), window: Window::default() }
    }

    /// Takes the next token and returns the text that is certain now; often a word, sometimes nothing.
    pub fn push(&mut self, token: TokenId) -> String {
        if self.tokenizer.is_special(token) {
            return String::new();
        }
        if !self.tokenizer.spells_by_bytes() {
            return self.window.push(&self.tokenizer, token);
        }
        // Rows of the embedding beyond the vocabulary stand for no text.
        self.pending.extend_from_slice(self.tokenizer.token_bytes(token).unwrap_or_default());
        take_characters(&mut self.pending)
    }

    /// Returns what was held back: the sequence has ended, a broken character stays broken.
    pub fn finish(&mut self) -> String {
        if !self.tokenizer.spells_by_bytes() {
            return self.window.finish(&self.tokenizer);
        }
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }
}

/// Moves whole characters out of `pending`, broken ones as U+FFFD, and leaves the beginning of one.
fn take_characters(pending: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut rest = pending.as_slice();
    loop {
        let error = match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                rest = &[];
                break;
            }
            Err(error) => error,
        };
        let (valid, broken) = rest.split_at(error.valid_up_to());
        text.push_str(std::str::from_utf8(valid).expect("valid up to here"));
        rest = broken;
        let Some(len) = error.error_len() else { break };
        text.push(char::REPLACEMENT_CHARACTER);
        rest = &rest[len..];
    }
    let kept = rest.len();
    pending.drain(..pending.len() - kept);
    text
}

impl Window {
    /// Tokens kept back at most. More than any character has bytes, so a text that still ends in a
    /// replacement character then means it.
    const MAX_UNSETTLED: usize = 8;

    fn push(&mut self, tokenizer: &Tokenizer, token: TokenId) -> String {
        self.tokens.push(token);
        let (settled, whole) = self.texts(tokenizer);
        let is_broken = whole.ends_with(char::REPLACEMENT_CHARACTER);
        if is_broken && self.tokens.len() - self.settled < Self::MAX_UNSETTLED {
            return String::new();
        }
        self.tokens.drain(..self.settled);
        self.settled = self.tokens.len();
        suffix(&whole, settled.len())
    }

    fn finish(&mut self, tokenizer: &Tokenizer) -> String {
        let (settled, whole) = self.texts(tokenizer);
        self.settled = self.tokens.len();
        suffix(&whole, settled.len())
    }

    fn texts(&self, tokenizer: &Tokenizer) -> (String, String) {
        // A decoder that cannot decode a token has no text for it.
        let text = |tokens: &[TokenId]| tokenizer.decode(tokens).unwrap_or_default();
        (text(&self.tokens[..self.settled]), text(&self.tokens))
    }
}

/// What follows the first `start` bytes; a decoder that rewrites earlier text may leave nothing.
fn suffix(text: &str, start: usize) -> String {
    text.get(start..).unwrap_or_default().to_owned()
}
