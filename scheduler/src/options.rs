//! How large the pipeline is, in the scheduler's terms, and what that leaves no room for.

use crate::error::Error;
use crate::request::Request;

/// What a [`Scheduler`](crate::Scheduler) may use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Stages that a micro-batch passes through.
    pub num_stages: usize,
    /// Token budget: most tokens in one micro-batch.
    pub micro_batch_tokens: usize,
    /// Most sequences running at once in the whole pipeline.
    pub max_sequences: usize,
    /// KV pages in each stage: a multiple of `num_lanes`.
    pub num_pages: usize,
    /// Page `p` is of lane `p % num_lanes`, and all pages of a sequence are of one lane: where ranks of a stage share out sequences
    /// it says which rank has it. 1 where none do.
    pub num_lanes: usize,
    /// Positions in one page.
    pub page_tokens: usize,
    /// Most tokens of one sequence, prompt and completion together.
    pub context_tokens: usize,
    /// A micro-batch below this many tokens leaves the device waiting for its own memory.
    pub efficient_tokens: usize,
    /// Memories from which the stages read their weights: that of all processors of a machine is one, and each GPU has its own.
    pub num_memories: usize,
    /// Whether a lone stage takes a token that it draws from where it has drawn it: decode steps are then issued before
    /// anybody knows the tokens that they begin with. Of no meaning where there are several stages.
    pub feeds_back: bool,
    /// Whether stages may have begun with the micro-batch behind the one that they are at: where one ends, either may be the reason. A
    /// lone stage always has where tokens are fed back.
    pub is_ahead: bool,
}

impl Options {
    /// Micro-batches that may be in flight now: a lone stage has a second one only of sequences that run ahead of their tokens.
    pub(crate) const fn most_in_flight(&self, runs_ahead: bool) -> usize {
        if self.num_stages == 1 && !runs_ahead { 1 } else { self.max_in_flight() }
    }

    /// Micro-batches in flight when there is work enough. Fewer starve a stage; more only hold pages longer.
    pub const fn max_in_flight(&self) -> usize {
        if self.num_stages == 1 {
            // A lone stage has nobody to hand over to: one micro-batch holds all that is ready. The next one, with the
            // tokens that this one draws, waits behind it where they need not come here first.
            return if self.feeds_back { 2 } else { 1 };
        }
        let mut sum = 0;
        sum += self.num_stages; // One computing in every stage.
        sum += 1; // One hopping, or being sampled.
        sum
    }

    /// Positions that all pages hold together.
    pub const fn cache_tokens(&self) -> usize {
        self.num_pages * self.page_tokens
    }

    /// Positions that one sequence may hold: those of a lane.
    pub const fn lane_tokens(&self) -> usize {
        self.num_pages / self.num_lanes * self.page_tokens
    }

    /// Why `request` can never be served, if so.
    pub fn check(&self, request: &Request) -> Result<(), Error> {
        let context_tokens = self.context_tokens;
        let available_tokens = self.lane_tokens();
        if request.prompt.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        let tokens = request.prompt.len() + request.sampling.max_tokens as usize;
        if tokens > context_tokens {
            return Err(Error::SequenceTooLong { tokens, context_tokens });
        }
        let needed_tokens = request.max_positions();
        if needed_tokens > available_tokens {
            return Err(Error::ExceedsPagePool { needed_tokens, available_tokens });
        }
        Ok(())
    }

    /// Pages that `num_positions` positions fill, the last one perhaps in part.
    pub(crate) const fn pages_for(&self, num_positions: usize) -> usize {
        num_positions.div_ceil(self.page_tokens)
    }

    pub(crate) fn assert_sane(&self) {
        let counts = [
            self.num_stages,
            self.micro_batch_tokens,
            self.max_sequences,
            self.num_pages,
            self.num_lanes,
            self.page_tokens,
            self.context_tokens,
            self.efficient_tokens,
            self.num_memories,
        ];
        assert!(counts.iter().all(|&count| count > 0), "every option must be positive: {self:?}");
        let Options { num_memories, num_stages, .. } = *self;
        assert!(num_memories <= num_stages, "{num_memories} memories of {num_stages} stages");
        let Options { num_pages, num_lanes, .. } = *self;
        assert!(num_pages.is_multiple_of(num_lanes), "{num_pages} pages in {num_lanes} lanes");
        // Page indices and positions travel as u32.
        assert!(u32::try_from(self.num_pages).is_ok(), "{} pages exceed a page index", self.num_pages);
        assert!(
            u32::try_from(self.context_tokens).is_ok(),
            "{} tokens exceed a position",
            self.context_tokens
        );
    }
}
