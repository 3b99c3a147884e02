//! Stands in the place of the last stage's draws: each sequence gets its stop token at its drawn length.

use std::collections::VecDeque;
use std::sync::Arc;

use super::Lengths;
use crate::micro_batch::{MicroBatch, MicroBatchId, MicroBatchOutput, Slice, SliceOutput};
use crate::options::Options;
use crate::request::{Request, RequestKey, Sampling, SequenceId, TokenId};

const STOP_TOKEN: TokenId = 1;
const OTHER_TOKEN: TokenId = 0;

/// Makes requests of given lengths, and ends each where it is to end.
#[derive(Debug)]
pub(super) struct Draw {
    sampling: Arc<Sampling>,
    /// The job's limit.
    max_tokens: u32,
    /// Tokens of the longest prompt and completion together.
    most: usize,
    /// The last request made: only its length tells it from the next, which shares it where that is the same.
    request: Option<Arc<Request>>,
    /// Drawn lengths of the sequences from `oldest` on, 0 for those that have ended. The oldest always makes
    /// progress, so that this is little more than what is in the pipeline.
    lengths: VecDeque<u32>,
    oldest: u64,
}

/// What comes back of a micro-batch: much smaller than its answer, and there are thousands on their way.
#[derive(Debug)]
pub(super) struct Drawn {
    id: MicroBatchId,
    tokens: Vec<(SequenceId, Option<TokenId>)>,
}

impl Drawn {
    /// How many tokens were drawn.
    pub(super) fn num_tokens(&self) -> u64 {
        self.tokens.iter().filter(|(_, token)| token.is_some()).count() as u64
    }

    /// The answer to show to the scheduler.
    pub(super) fn answer(&self) -> MicroBatchOutput {
        let answer = |&(sequence, token)| SliceOutput {
            sequence,
            token,
            logprobs: None,
            prompt_logprobs: vec![],
            failure: None,
        };
        MicroBatchOutput { id: self.id, slices: self.tokens.iter().map(answer).collect() }
    }
}

impl Draw {
    pub(super) fn new(max_tokens: u32, options: &Options) -> Self {
        let sampling = Sampling { stop_token_ids: vec![STOP_TOKEN], ..Sampling::greedy(max_tokens) };
        // The last token of a sequence is never computed, so that its lane need not hold it.
        let most = options.context_tokens.min(options.lane_tokens() + 1);
        let sampling = Arc::new(sampling);
        Self { sampling, max_tokens, most, request: None, lengths: VecDeque::new(), oldest: 0 }
    }

    /// The request to submit next; its sequence must be the next one too.
    pub(super) fn request(&mut self, lengths: Lengths) -> Arc<Request> {
        self.lengths.push_back(lengths.output_tokens.max(1));
        let prompt_tokens = lengths.prompt_tokens as usize;
        match &self.request {
            Some(request) if request.prompt.len() == prompt_tokens => request.clone(),
            _ => {
                let request = Arc::new(Request {
                    key: RequestKey(0),
                    prompt: vec![OTHER_TOKEN; prompt_tokens],
                    sampling: self.sampling(prompt_tokens),
                    sample: 0,
                });
                self.request = Some(request.clone());
                request
            }
        }
    }

    /// Clipped to what the prompt leaves, as a job does it.
    fn sampling(&mut self, prompt_tokens: usize) -> Arc<Sampling> {
        let left = u32::try_from(self.most.saturating_sub(prompt_tokens)).unwrap_or(u32::MAX);
        let max_tokens = self.max_tokens.min(left.max(1));
        if self.sampling.max_tokens != max_tokens {
            self.sampling = Arc::new(Sampling { max_tokens, ..(*self.sampling).clone() });
        }
        self.sampling.clone()
    }

    /// Forgets a sequence that has ended.
    pub(super) fn ended(&mut self, sequence: SequenceId) {
        self.lengths[(sequence.0 - self.oldest) as usize] = 0;
        while self.lengths.front() == Some(&0) {
            self.lengths.pop_front();
            self.oldest += 1;
        }
    }

    /// What the last stage will draw.
    pub(super) fn draw(&self, micro_batch: &MicroBatch) -> Drawn {
        let draw = |slice: &Slice| (slice.sequence, slice.sample.then(|| self.token(slice)));
        Drawn { id: micro_batch.id, tokens: micro_batch.slices.iter().map(draw).collect() }
    }

    fn token(&self, slice: &Slice) -> TokenId {
        let positions = slice.first_position as usize + slice.tokens.len();
        let num_generated = positions - slice.request.prompt.len() + 1;
        let length = self.lengths[(slice.sequence.0 - self.oldest) as usize];
        if num_generated < length as usize { OTHER_TOKEN } else { STOP_TOKEN }
    }
}
