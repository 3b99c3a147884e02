//! What travels through the stages, and what comes back from the last one.

use std::sync::Arc;

use smallvec::SmallVec;

use crate::counts::TokenCount;
use crate::mask::TokenMask;
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
    /// Where the only one of `tokens` is still to be drawn: who draws it. What stands in its place is of no meaning.
    pub fed_back: Option<FedBack>,
    /// Pages that hold positions `0 .. first_position + tokens.len()`, in order; page `i` holds
    /// positions `i * page_tokens ..`. Shared with the sequence, whose pages change only once in `page_tokens`.
    pub pages: Arc<Vec<PageIdx>>,
    /// Draw the token that follows the last one of this slice.
    pub sample: bool,
    /// Whether that token may be none of the request's `stop_token_ids`: there are fewer than its `min_tokens` yet.
    pub bars_stops: bool,
    /// Prompt tokens whose log-probability is wanted: `score[i]` follows `tokens[i]`. Empty unless the
    /// request asks for prompt log-probabilities; one shorter than `tokens` where the prompt ends here.
    pub score: Vec<TokenId>,
    /// Tokens of the sequence by rising id, where it has penalties and a token is drawn: those that were generated, and where the
    /// repetition penalty asks for them those of the prompt. Shared with the sequence.
    pub counts: Option<Arc<Vec<TokenCount>>>,
    /// Tokens that may be drawn, where the answer follows a guide. Whoever follows it fills it in: the scheduler does not.
    pub mask: Option<TokenMask>,
    /// The request, for its sampling parameters and its key.
    pub request: Arc<Request>,
}

/// The token that a slice of the micro-batch before draws.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FedBack {
    /// The micro-batch, which was issued and had not come back when this was.
    pub micro_batch: MicroBatchId,
    /// Index of the slice in it; it is of the same sequence.
    pub slice: usize,
}

impl MicroBatch {
    /// Number of tokens that the stages compute for this micro-batch.
    pub fn num_tokens(&self) -> usize {
        self.slices.iter().map(|slice| slice.tokens.len()).sum()
    }

    /// Two micro-batches of about half of the tokens each that make the same when they are computed one after the other,
    /// or nothing where there is a single token. A slice that lies on the cut is in both; [`MicroBatchOutput::joined`] puts
    /// the answers together.
    pub fn halves(&self) -> Option<(MicroBatch, MicroBatch)> {
        let cut = self.num_tokens() / 2;
        if cut == 0 {
            return None;
        }
        let (mut front, mut back) = (Vec::new(), Vec::new());
        let mut first = 0;
        for slice in &self.slices {
            let end = first + slice.tokens.len();
            match (first >= cut, end <= cut) {
                (true, _) => back.push(slice.clone()),
                (_, true) => front.push(slice.clone()),
                _ => {
                    let (before, after) = slice.cut(cut - first);
                    front.push(before);
                    back.push(after);
                }
            }
            first = end;
        }
        let batch = |slices| MicroBatch { id: self.id, slices };
        Some((batch(front), batch(back)))
    }
}

impl Slice {
    /// The first tokens and the rest, neither empty. Both have all pages: a step reads none beyond its own positions.
    fn cut(&self, tokens: usize) -> (Slice, Slice) {
        let scored = tokens.min(self.score.len());
        let before = Slice {
            tokens: SliceTokens::from_slice(&self.tokens[..tokens]),
            score: self.score[..scored].to_vec(),
            sample: false,
            bars_stops: false,
            ..self.clone()
        };
        let after = Slice {
            first_position: self.first_position + tokens as u32,
            tokens: SliceTokens::from_slice(&self.tokens[tokens..]),
            score: self.score[scored..].to_vec(),
            ..self.clone()
        };
        (before, after)
    }
}

impl MicroBatchOutput {
    /// The answer to a micro-batch from those to its [`MicroBatch::halves`].
    pub fn joined(mut self, back: MicroBatchOutput) -> MicroBatchOutput {
        for after in back.slices {
            match self.slices.last_mut() {
                // A sequence has one slice in a micro-batch: one that is in both halves lies on the cut.
                Some(last) if last.sequence == after.sequence => last.join(after),
                _ => self.slices.push(after),
            }
        }
        self
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

impl SliceOutput {
    /// Goes on with the answer to the tokens after those of this one.
    fn join(&mut self, after: SliceOutput) {
        self.token = after.token;
        self.logprobs = after.logprobs;
        self.prompt_logprobs.extend(after.prompt_logprobs);
        self.failure = self.failure.or(after.failure);
    }
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
    /// What the request bars leaves no token that could be drawn.
    #[error("nothing is left to draw from after position {position}: all tokens are barred")]
    NothingLeft {
        /// Position of the token whose successor was asked for.
        position: u32,
    },
    /// What must be followed by the answer costs too much to be followed, or does not allow what it is said to.
    #[error("the guide of the answer gives up after position {position}")]
    GuideGaveUp {
        /// Position of the token whose successor was asked for.
        position: u32,
    },
    /// A stage ended each time it computed this sequence, the last times with nothing beside it.
    #[error("the stage that computes this row ends each time")]
    EndsStage,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::{RequestKey, Sampling};

    fn request() -> Arc<Request> {
        let sampling = Arc::new(Sampling::greedy(1));
        Arc::new(Request { key: RequestKey(0), sample: 0, prompt: vec![1, 2, 3], sampling })
    }

    /// Tokens are numbered through; all but the last of a slice are scored.
    fn batch(lengths: &[usize]) -> MicroBatch {
        let mut next = 0;
        let slice = |(sequence, length): (usize, &usize)| {
            let tokens: SliceTokens = (next..next + *length as u32).collect();
            next += *length as u32;
            Slice {
                sequence: SequenceId(sequence as u64),
                first_position: 10,
                score: tokens[1..].to_vec(),
                tokens,
                fed_back: None,
                pages: Arc::new(vec![0]),
                sample: true,
                bars_stops: false,
                counts: None,
                mask: None,
                request: request(),
            }
        };
        MicroBatch { id: MicroBatchId(7), slices: lengths.iter().enumerate().map(slice).collect() }
    }

    /// What a stage would answer: the drawn token says which was the last of its slice.
    fn answer(batch: &MicroBatch) -> MicroBatchOutput {
        let logprobs = |token: &TokenId| TokenLogprobs { token: *token, logprob: -1.0, top: Vec::new() };
        let slice = |slice: &Slice| SliceOutput {
            sequence: slice.sequence,
            token: slice.sample.then(|| slice.first_position * 1000 + slice.tokens[slice.tokens.len() - 1]),
            logprobs: None,
            prompt_logprobs: slice.score.iter().map(logprobs).collect(),
            failure: None,
        };
        MicroBatchOutput { id: batch.id, slices: batch.slices.iter().map(slice).collect() }
    }

    #[test]
    fn halves_have_all_tokens_once_and_their_answers_are_the_whole_one() {
        for lengths in [&[1, 1, 1, 1][..], &[5], &[2], &[1, 7, 1], &[3, 4, 2, 8]] {
            let whole = batch(lengths);
            let (front, back) = whole.halves().unwrap();
            assert_eq!(front.num_tokens(), whole.num_tokens() / 2, "{lengths:?}");
            let tokens = |batch: &MicroBatch| -> Vec<TokenId> {
                batch.slices.iter().flat_map(|slice| slice.tokens.clone()).collect()
            };
            assert_eq!([tokens(&front), tokens(&back)].concat(), tokens(&whole));
            assert!(front.slices.iter().chain(&back.slices).all(|slice| !slice.tokens.is_empty()));
            let joined = answer(&front).joined(answer(&back));
            let scored = |output: &MicroBatchOutput| -> Vec<Vec<TokenLogprobs>> {
                output.slices.iter().map(|slice| slice.prompt_logprobs.clone()).collect()
            };
            assert_eq!(scored(&joined), scored(&answer(&whole)), "{lengths:?}");
            let last = |output: &MicroBatchOutput| -> Vec<Option<TokenId>> {
                output.slices.iter().map(|slice| slice.token.map(|token| token % 1000)).collect()
            };
            assert_eq!(last(&joined), last(&answer(&whole)), "{lengths:?}");
        }
        assert!(batch(&[1]).halves().is_none());
        assert!(batch(&[]).halves().is_none());
    }

    #[test]
    fn a_slice_on_the_cut_goes_on_where_its_front_ends_and_fails_once() {
        let (front, back) = batch(&[5]).halves().unwrap();
        let (before, after) = (&front.slices[0], &back.slices[0]);
        assert_eq!((before.first_position, before.tokens.len(), before.sample), (10, 2, false));
        assert_eq!((after.first_position, after.tokens.len(), after.sample), (12, 3, true));
        let mut failed = answer(&front);
        failed.slices[0].failure = Some(Failure::NonFiniteLogits { position: 10 });
        let joined = failed.joined(answer(&back));
        assert_eq!(joined.slices[0].failure, Some(Failure::NonFiniteLogits { position: 10 }));
    }
}
