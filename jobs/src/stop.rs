//! Stop strings: where a sequence ends because of its text.
//!
//! Matching goes by text and not by tokens, so a stop string may begin and end anywhere inside a
//! token. Among several matches the one that ends first counts, then the longest: reading the text
//! character by character would find the same one, wherever the borders of tokens lie.

use std::sync::Arc;

use scheduler::{Sampling, TokenId};

use crate::detokenizer::Detokenizer;
use crate::tokenizer::Tokenizer;

/// Watches one sequence for its stop strings.
pub struct StopMatcher {
    detokenizer: Detokenizer,
    stops: Vec<String>,
    min_tokens: u32,
    num_tokens: u32,
    /// The end of the text so far, as far as a stop string that begins there could reach back.
    tail: Vec<u8>,
    /// Bytes of text before `tail`.
    tail_start: usize,
    cut: Option<usize>,
}

impl StopMatcher {
    /// A matcher for one sequence, before its first token.
    pub fn new(tokenizer: Arc<Tokenizer>, sampling: &Sampling) -> Self {
        StopMatcher {
            detokenizer: Detokenizer::new(tokenizer),
            stops: sampling.stop.clone(),
            min_tokens: sampling.min_tokens,
            num_tokens: 0,
            tail: Vec::new(),
            tail_start: 0,
            cut: None,
        }
    }

    /// A matcher for a sequence that has some tokens already, none of which completed a stop string.
    pub fn after(tokenizer: Arc<Tokenizer>, sampling: &Sampling, tokens: &[TokenId]) -> Self {
        let mut matcher = StopMatcher::new(tokenizer, sampling);
        for &token in tokens {
            matcher.push(token);
        }
        matcher
    }

    /// Takes the next token; true when a stop string is complete and the sequence ends here.
    ///
    /// Only text that comes with a token after the first `min_tokens` can complete a match.
    pub fn push(&mut self, token: TokenId) -> bool {
        self.push_for_text(token);
        self.cut.is_some()
    }

    /// Takes the next token and returns the text that came with it.
    pub(crate) fn push_for_text(&mut self, token: TokenId) -> String {
        self.num_tokens += 1;
        let text = self.detokenizer.push(token);
        if self.cut.is_none() {
            self.look_at(&text);
        }
        text
    }

    pub(crate) fn finish(&mut self) -> String {
        self.detokenizer.finish()
    }

    /// How many bytes at the end of the text may turn out to begin a stop string.
    pub(crate) fn undecided(&self) -> usize {
        let begins = |len: usize| {
            self.stops.iter().any(|stop| stop.as_bytes().starts_with(&self.tail[self.tail.len() - len..]))
        };
        (1..=self.tail.len()).rev().find(|&len| begins(len)).unwrap_or(0)
    }

    fn look_at(&mut self, text: &str) {
        let old = self.tail.len();
        self.tail.extend_from_slice(text.as_bytes());
        if self.num_tokens > self.min_tokens {
            self.cut = first_match(&self.tail, old, &self.stops).map(|start| self.tail_start + start);
        }
        let reach = self.stops.iter().map(String::len).max().unwrap_or(0).saturating_sub(1);
        let dropped = self.tail.len().saturating_sub(reach);
        self.tail.drain(..dropped);
        self.tail_start += dropped;
    }
}

/// Start of the stop string in `text` that ends first beyond byte `old`, the longest among equals.
fn first_match(text: &[u8], old: usize, stops: &[String]) -> Option<usize> {
    let find = |stop: &String| {
        let from = (old + 1).saturating_sub(stop.len());
        let start = from + text[from..].windows(stop.len()).position(|window| window == stop.as_bytes())?;
        Some((start + stop.len(), start))
    };
    stops.iter().filter(|stop| !stop.is_empty()).filter_map(find).min().map(|(_, start)| start)
}

/// The text of one sequence as it grows: special tokens left out, cut before a stop string.
pub struct Transcript {
    matcher: StopMatcher,
    text: String,
    /// Bytes handed out by [`Transcript::take_settled`].
    taken: usize,
}

impl Transcript {
    /// The transcript of one sequence, before its first token.
    pub fn new(tokenizer: Arc<Tokenizer>, sampling: &Sampling) -> Self {
        Transcript { matcher: StopMatcher::new(tokenizer, sampling), text: String::new(), taken: 0 }
    }

    /// Takes the next token; true when a stop string ends the sequence here.
    ///
    /// A token of `Sampling::stop_token_ids` that ended the sequence is no part of its text: it is
    /// not handed in.
    pub fn push(&mut self, token: TokenId) -> bool {
        if self.matcher.cut.is_some() {
            return true;
        }
        self.text.push_str(&self.matcher.push_for_text(token));
        if let Some(cut) = self.matcher.cut {
            self.text.truncate(cut);
        }
        self.matcher.cut.is_some()
    }

    /// The text so far.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Text since the last call that no stop string can take back, for a reader who watches.
    pub fn take_settled(&mut self) -> &str {
        let undecided = if self.matcher.cut.is_some() { 0 } else { self.matcher.undecided() };
        let end = self.text.len().saturating_sub(undecided).max(self.taken);
        &self.text[std::mem::replace(&mut self.taken, end)..end]
    }

    /// The whole text; the sequence has ended.
    pub fn finish(mut self) -> String {
        self.end();
        self.text
    }

    /// What [`Transcript::take_settled`] has not handed out yet; the sequence has ended.
    pub fn finish_settled(mut self) -> String {
        self.end();
        self.text.split_off(self.taken)
    }

    fn end(&mut self) {
        if self.matcher.cut.is_none() {
            self.text.push_str(&self.matcher.finish());
        }
    }
}
