//! What travels through the stages, and what comes back from the last one.

use std::sync::Arc;

use smallvec::SmallVec;

use crate::request::{Request, SequenceId, TokenId};

/// Names one micro-batch inside one pipeline, in the order of issue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MicroBatchId(pub u64);

/// A logical KV page: the same index in every stage, stored there for the stage's own attention blocks.
pub type PageIdx = u32;

/// Tokens of a slice: most slices are a decode step of one token, which needs no memory of its own.
pub type SliceTokens = SmallVec<[TokenId; 4]>;

/// Sequences travelling together through the stages.
#[derive(Debug, Clone)]
pub struct MicroBatch {
    /// Its name.
    pub id: MicroBatchId,
    /// One entry per sequence; a sequence has at most one slice in a micro-batch.
    pub slices: Vec<Slice>,
}

/// The consecutive tokens of one sequence that a micro-batch computes.
///
/// A decode step is a slice of one token, a prefill chunk one of several: no stage tells them apart.
#[derive(Debug, Clone)]
pub struct Slice {
    /// Whose tokens these are.
    pub sequence: SequenceId,
    /// Position of `tokens[0]` in the sequence.
    pub first_position: u32,
    /// Tokens to compute, never empty.
    pub tokens: SliceTokens,
    /// Pages that hold positions `0 .. first_position + tokens.len()`, in order; page `i` holds
    /// positions `i * page_tokens ..`. Shared with the sequence, whose pages change only once in `page_tokens`.
    pub pages: Arc<Vec<PageIdx>>,
    /// Draw the token that follows the last one of this slice.
    pub sample: bool,
    /// Prompt tokens whose log-probability is wanted: `score[i]` follows `tokens[i]`. Empty unless the
    /// request asks for prompt log-probabilities; one shorter than `tokens` where the prompt ends here.
    pub score: Vec<TokenId>,
    /// The request, for its sampling parameters and its key.
    pub request: Arc<Request>,
}

impl MicroBatch {
    /// Number of tokens that the stages compute for this micro-batch.
    pub fn num_tokens(&self) -> usize {
        self.slices.iter().map(|slice| slice.tokens.len()).sum()
    }
}

/// A token and how likely the model held it and its rivals.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// The token that stands in the text.
    pub token: TokenId,
    /// Natural logarithm of the probability the model gave it, before temperature and truncation.
    pub logprob: f32,
    /// The most likely tokens in falling order, ties by token id; as many as were asked for.
    pub top: Vec<(TokenId, f32)>,
}

/// What the last stage returns for a micro-batch: token ids and log-probabilities, no activations.
#[derive(Debug, Clone)]
pub struct MicroBatchOutput {
    /// Which micro-batch this answers.
    pub id: MicroBatchId,
    /// One entry per slice, in the order of the micro-batch.
    pub slices: Vec<SliceOutput>,
}

/// The answer to one slice.
#[derive(Debug, Clone)]
pub struct SliceOutput {
    /// Whose it is.
    pub sequence: SequenceId,
    /// The token drawn, where the slice asked for one; `logprobs` says more where the request asked.
    pub token: Option<TokenId>,
    /// Log-probabilities of the drawn token.
    pub logprobs: Option<TokenLogprobs>,
    /// Log-probabilities of `Slice::score`.
    pub prompt_logprobs: Vec<TokenLogprobs>,
    /// Set where this sequence alone cannot go on.
    pub failure: Option<Failure>,
}

/// Why one sequence failed while its neighbours did not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The model's logits hold a NaN or an infinity, so that no token can be drawn.
    #[error("the logits at position {position} are not finite")]
    NonFiniteLogits {
        /// Position of the token whose logits they are.
        position: u32,
    },
    /// A stage ended each time it computed this sequence, the last times with nothing beside it.
    #[error("the stage that computes this row ends each time")]
    EndsStage,
}
