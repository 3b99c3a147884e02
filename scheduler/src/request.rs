//! The words for one request: what is asked, how it is sampled, how it ends.

use std::sync::Arc;

use crate::micro_batch::{Failure, TokenLogprobs};

/// A token's index in the model's vocabulary.
pub type TokenId = u32;

/// Names one sequence inside one pipeline, in the order of submission.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

/// The identity of a request's content, from which its random stream is derived.
///
/// Equal rows of one input are told apart by their ordinal before the key is made, so that each has
/// a key of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestKey(pub u128);

/// What the text of an answer must be.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Guide {
    /// JSON that a schema allows.
    Json {
        /// The schema as JSON; answers have properties in its order.
        schema: String,
        /// Whether space may stand wherever JSON allows it; else nowhere but in strings.
        any_space: bool,
    },
    /// What a regular expression matches as a whole.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// What a context-free grammar derives, in llguidance's form of Lark.
    Grammar(String),
}

/// How the next token is chosen, and when a sequence ends.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 is greedy, where a tie goes to the lowest token id.
    pub temperature: f32,
    /// Keep the smallest set of most likely tokens whose probabilities sum to at least this; 1 keeps all.
    pub top_p: f32,
    /// Keep this many most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Drop tokens less likely than this share of the most likely one's probability; 0 drops none.
    pub min_p: f32,
    /// Divides the logits above 0 of tokens that stand in the prompt or were generated, and multiplies the others; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Taken off a token's logit for each time that it was generated; 0 changes nothing.
    pub frequency_penalty: f32,
    /// Taken off the logit of each token that was generated; 0 changes nothing.
    pub presence_penalty: f32,
    /// Added to the logits of these tokens, each of which is named once, by rising id.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// What the answer must be; whoever follows it gives each slice that draws its mask.
    pub guide: Option<Guide>,
    /// First key of the counter-based generator; the request's key is the other.
    pub seed: u64,
    /// Most tokens to generate. Already clipped to what the context leaves; 0 only scores the prompt.
    pub max_tokens: u32,
    /// Until this many tokens are generated, no stop token can be drawn and no stop string ends the sequence.
    pub min_tokens: u32,
    /// Tokens that end the sequence: the request's own and, unless it ignores them, the model's
    /// end-of-sequence ids.
    pub stop_token_ids: Vec<TokenId>,
    /// Texts that end the sequence, matched across token borders.
    pub stop: Vec<String>,
    /// Report the log-probability of each generated token, with this many of the most likely ones.
    pub logprobs: Option<u32>,
    /// Report the same for each prompt token but the first.
    pub prompt_logprobs: bool,
}

impl Sampling {
    /// The most likely token each time, so many of them, whatever they are; nothing else is asked.
    pub fn greedy(max_tokens: u32) -> Self {
        Sampling {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            guide: None,
            seed: 0,
            max_tokens,
            min_tokens: 0,
            stop_token_ids: Vec::new(),
            stop: Vec::new(),
            logprobs: None,
            prompt_logprobs: false,
        }
    }

    /// Whether a draw depends on which tokens were generated before.
    pub fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.frequency_penalty != 0.0 || self.presence_penalty != 0.0
    }

    /// Whether a token can be drawn before it is known which one was drawn last: neither penalties nor a guide ask for it. What
    /// ends the sequence is another matter, and told afterwards.
    pub fn draws_ahead(&self) -> bool {
        !self.has_penalties() && self.guide.is_none()
    }
}

/// One tokenized request.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Identity of the content; see [`RequestKey`].
    pub key: RequestKey,
    /// Prompt, never empty, with whatever special tokens its template asks for.
    pub prompt: Vec<TokenId>,
    /// How to continue it.
    pub sampling: Arc<Sampling>,
    /// Which of several continuations this is, from 0: each has draws of its own.
    pub sample: u32,
}

impl Request {
    /// The most positions that its sequence computes, each holding a place in the KV cache.
    ///
    /// The last token of a sequence is reported and never computed, so that this is one less than
    /// its tokens; and nothing at all is computed where neither a token nor a score is wanted.
    pub fn max_positions(&self) -> usize {
        let is_anything_wanted = self.sampling.max_tokens > 0 || self.sampling.prompt_logprobs;
        if is_anything_wanted { self.prompt.len() + self.sampling.max_tokens as usize - 1 } else { 0 }
    }

    /// Whether a sequence of this request can go on from `so_far`: nothing, or some tokens with what the
    /// request wants to know about them, and still fewer than it wants.
    pub fn goes_on_from(&self, so_far: &Generated) -> bool {
        let Generated { tokens, logprobs, prompt_logprobs } = so_far;
        let sampling = &self.sampling;
        let wanted = |is_wanted: bool, num: usize| if is_wanted { num } else { 0 };
        *so_far == Generated::default()
            || (tokens.len() < sampling.max_tokens as usize
                && logprobs.len() == wanted(sampling.logprobs.is_some(), tokens.len())
                && prompt_logprobs.len() == wanted(sampling.prompt_logprobs, self.prompt.len() - 1))
    }
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token was drawn or a stop string was completed.
    Stop,
    /// `max_tokens` were generated.
    Length,
}

/// What a sequence has brought so far.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Generated {
    /// Every generated token, the one that ended the sequence included.
    pub tokens: Vec<TokenId>,
    /// One entry per generated token where the request asked for log-probabilities, else empty.
    pub logprobs: Vec<TokenLogprobs>,
    /// One entry per prompt token but the first where the request asked for them, else empty.
    pub prompt_logprobs: Vec<TokenLogprobs>,
}

impl Generated {
    /// What came after the first `first` tokens.
    pub fn since(&self, first: usize) -> Generated {
        let rest = |logprobs: &[TokenLogprobs]| logprobs.get(first..).unwrap_or_default().to_vec();
        Generated {
            tokens: self.tokens[first..].to_vec(),
            logprobs: rest(&self.logprobs),
            prompt_logprobs: if first == 0 { self.prompt_logprobs.clone() } else { Vec::new() },
        }
    }

    /// Adds what came since; see [`Generated::since`].
    pub fn extend(&mut self, since: &Generated) {
        self.tokens.extend_from_slice(&since.tokens);
        self.logprobs.extend_from_slice(&since.logprobs);
        self.prompt_logprobs.extend_from_slice(&since.prompt_logprobs);
    }
}

/// A sequence that has ended.
#[derive(Debug, Clone)]
pub struct Completion {
    /// Its name in the pipeline.
    pub sequence: SequenceId,
    /// What was asked.
    pub request: Arc<Request>,
    /// All that was generated.
    pub generated: Generated,
    /// How it ended.
    pub outcome: Result<FinishReason, Failure>,
}
