//! What this crate refuses. Everything here is about what a caller asked for; a broken invariant
//! of our own is an assertion instead.

/// Why a request or a plan is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// There is no token to continue from.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// Prompt and completion together would not fit the model's context.
    #[error("sequence of {tokens} tokens exceeds the context of {context_tokens}")]
    SequenceTooLong {
        /// Prompt tokens plus `max_tokens`.
        tokens: usize,
        /// The context.
        context_tokens: usize,
    },
    /// Even with every page of a lane to itself the sequence could not finish.
    #[error(
        "sequence needs {needed_tokens} tokens of KV cache, the cache has {available_tokens} for one sequence"
    )]
    ExceedsPagePool {
        /// Positions the sequence may come to hold; see [`Request::max_positions`](crate::Request::max_positions).
        needed_tokens: usize,
        /// Positions in all pages that one sequence may have.
        available_tokens: usize,
    },
    /// Every stage needs a block.
    #[error("{num_blocks} blocks cannot be cut into {num_stages} stages")]
    TooFewBlocks {
        /// Blocks to share out.
        num_blocks: usize,
        /// Stages to give them to.
        num_stages: usize,
    },
}
