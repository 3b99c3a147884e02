//! The made-up model, and what it says when no scheduler stands between.

use scheduler::{
    Completion, Failure, FinishReason, Generated, Options, PageIdx, Request, RequestKey, Slice, SliceOutput,
    TokenCount, TokenId, TokenLogprobs,
};

/// The token that ends sequences whose requests name it.
pub(crate) const STOP_TOKEN: TokenId = 7;

/// The key of a request that fails when `position` is computed.
pub(crate) fn poison(position: usize) -> RequestKey {
    RequestKey(position as u128 + 1)
}

/// The key of a request that ends a stage which computes `position`.
pub(crate) fn deadly(position: usize) -> RequestKey {
    RequestKey(DEADLY | position as u128)
}

const DEADLY: u128 = 1 << 64;

/// Where a request fails, and how.
fn poisoned_position(request: &Request) -> Option<(usize, Failure)> {
    let position = (request.key.0 & (DEADLY - 1)) as usize;
    match request.key.0 & DEADLY {
        0 => position.checked_sub(1).map(|at| (at, Failure::NonFiniteLogits { position: at as u32 })),
        _ => Some((position, Failure::EndsStage)),
    }
}

/// Whether a stage that computes this slice ends.
pub(crate) fn is_deadly(slice: &Slice) -> bool {
    let first = slice.first_position as usize;
    poisoned_position(&slice.request).is_some_and(|(position, failure)| {
        failure == Failure::EndsStage && (first..first + slice.tokens.len()).contains(&position)
    })
}

/// The caller's verdict on stop strings after `num_generated` tokens, of which `token` is the last.
pub(crate) fn stops_text(request: &Request, num_generated: usize, token: TokenId) -> bool {
    num_generated >= request.sampling.min_tokens as usize && token % 32 == 5
}

fn hash(tokens: impl IntoIterator<Item = TokenId>) -> u64 {
    tokens.into_iter().fold(0xcbf2_9ce4_8422_2325, |hash, token| {
        (hash ^ u64::from(token)).wrapping_mul(0x0100_0000_01b3).rotate_left(17)
    })
}

/// The token that follows `before`, the prompt and all that was generated.
fn draw(request: &Request, before: &[TokenId]) -> TokenId {
    let token = (hash(before.iter().copied()) % 61) as TokenId;
    let num_generated = before.len() - request.prompt.len();
    let is_forbidden = num_generated < request.sampling.min_tokens as usize && token == STOP_TOKEN;
    if is_forbidden { token + 1 } else { token }
}

fn logprobs(before: &[TokenId], token: TokenId) -> TokenLogprobs {
    let logprob = -((hash(before.iter().copied().chain([token])) % 1000) as f32);
    TokenLogprobs { token, logprob, top: vec![] }
}

/// One stage's cache: at each position of a page stands the token computed there.
pub(crate) struct Cache {
    page_tokens: usize,
    tokens: Vec<Option<TokenId>>,
}

impl Cache {
    pub(crate) fn new(options: &Options) -> Self {
        Self { page_tokens: options.page_tokens, tokens: vec![None; options.cache_tokens()] }
    }

    fn place(&self, pages: &[PageIdx], position: usize) -> usize {
        pages[position / self.page_tokens] as usize * self.page_tokens + position % self.page_tokens
    }

    /// Computes a slice: writes its tokens, and answers from what all positions so far hold.
    pub(crate) fn compute(&mut self, slice: &Slice) -> SliceOutput {
        let first = slice.first_position as usize;
        let end = first + slice.tokens.len();
        for (position, &token) in (first..).zip(&slice.tokens) {
            let place = self.place(&slice.pages, position);
            self.tokens[place] = Some(token);
        }
        let mut output = SliceOutput {
            sequence: slice.sequence,
            token: None,
            logprobs: None,
            prompt_logprobs: vec![],
            failure: None,
        };
        if let Some((_, failure)) =
            poisoned_position(&slice.request).filter(|(position, _)| (first..end).contains(position))
        {
            output.failure = Some(failure);
            return output;
        }
        let content: Vec<TokenId> = (0..end)
            .map(|position| {
                self.tokens[self.place(&slice.pages, position)].expect("the position is computed")
            })
            .collect();
        let scored = slice.score.iter().enumerate();
        output.prompt_logprobs =
            scored.map(|(index, &token)| logprobs(&content[..=first + index], token)).collect();
        check_counts(slice, &content);
        let num_generated = content.len().checked_sub(slice.request.prompt.len());
        let is_short = num_generated.is_some_and(|num| num < slice.request.sampling.min_tokens as usize);
        assert_eq!(slice.bars_stops, slice.sample && is_short, "{:?} bars its stop tokens", slice.sequence);
        if slice.sample {
            let token = draw(&slice.request, &content);
            output.token = Some(token);
            output.logprobs = slice.request.sampling.logprobs.map(|_| logprobs(&content, token));
        }
        output
    }
}

/// Insists that a slice which draws has the counts of all tokens before, where its request has penalties.
fn check_counts(slice: &Slice, before: &[TokenId]) {
    let Request { prompt, sampling, .. } = &*slice.request;
    let is_wanted = slice.sample && sampling.has_penalties();
    assert_eq!(slice.counts.is_some(), is_wanted, "{:?} has counts", slice.sequence);
    let Some(counts) = &slice.counts else { return };
    let counted = if sampling.repetition_penalty == 1.0 { prompt.len() } else { 0 };
    let mut tokens = before[counted..].to_vec();
    tokens.sort_unstable();
    tokens.dedup();
    let count = |token: TokenId| TokenCount {
        token,
        generated: before[prompt.len()..].iter().filter(|&&other| other == token).count() as u32,
        in_prompt: counted == 0 && prompt.contains(&token),
    };
    let expected: Vec<TokenCount> = tokens.into_iter().map(count).collect();
    assert_eq!(**counts, expected, "{:?}: counts", slice.sequence);
}

/// What a request gives, computed in one plain loop.
#[derive(Debug)]
pub(crate) struct Expected {
    generated: Generated,
    outcome: Result<FinishReason, Failure>,
}

impl Expected {
    pub(crate) fn of(request: &Request) -> Self {
        let Request { prompt, sampling, .. } = request;
        let mut expected = Self { generated: Generated::default(), outcome: Ok(FinishReason::Length) };
        if sampling.prompt_logprobs {
            expected.generated.prompt_logprobs =
                (1..prompt.len()).map(|end| logprobs(&prompt[..end], prompt[end])).collect();
        }
        let poisoned_position =
            poisoned_position(request).filter(|&(position, _)| position < request.max_positions());
        loop {
            let before = [&prompt[..], &expected.generated.tokens].concat();
            if let Some((_, failure)) = poisoned_position.filter(|&(position, _)| position < before.len()) {
                expected.outcome = Err(failure);
                return expected;
            }
            if expected.generated.tokens.len() == sampling.max_tokens as usize {
                return expected;
            }
            let token = draw(request, &before);
            expected.generated.tokens.push(token);
            if sampling.logprobs.is_some() {
                expected.generated.logprobs.push(logprobs(&before, token));
            }
            let num_generated = expected.generated.tokens.len();
            let is_late_enough = num_generated >= sampling.min_tokens as usize;
            let is_stop_token = is_late_enough && sampling.stop_token_ids.contains(&token);
            if is_stop_token || (!sampling.stop.is_empty() && stops_text(request, num_generated, token)) {
                expected.outcome = Ok(FinishReason::Stop);
                return expected;
            }
        }
    }

    /// What an earlier run may have of it: its first `num_tokens`, where there are more.
    pub(crate) fn so_far(&self, num_tokens: usize) -> Generated {
        if num_tokens == 0 || num_tokens >= self.generated.tokens.len() {
            return Generated::default();
        }
        let mut so_far = self.generated.clone();
        so_far.tokens.truncate(num_tokens);
        so_far.logprobs.truncate(num_tokens);
        so_far
    }

    pub(crate) fn check(&self, completion: &Completion) {
        let id = completion.sequence;
        assert_eq!(completion.outcome, self.outcome, "{id:?}: outcome");
        assert_eq!(completion.generated.tokens, self.generated.tokens, "{id:?}: tokens");
        assert_eq!(completion.generated.logprobs, self.generated.logprobs, "{id:?}: log-probabilities");
        // How many scores came before a failure depends on the chunks.
        if completion.outcome.is_ok() {
            assert_eq!(
                completion.generated.prompt_logprobs, self.generated.prompt_logprobs,
                "{id:?}: prompt log-probabilities"
            );
        }
    }
}
