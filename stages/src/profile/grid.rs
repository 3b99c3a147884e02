//! Which points are measured.

/// Tokens of the largest micro-batch that attention is measured with, about: how many rows that is follows from
/// their context.
const ATTENDED_POSITIONS: usize = 16_384;

/// Rows that decode together: more would only take longer.
const MAX_DECODE_ROWS: usize = 64;

/// A chunk of a prompt.
pub(super) const CHUNK_TOKENS: usize = 128;

/// 1, 2, 4, ... and `most` itself.
pub(super) fn tokens(most: usize) -> Vec<usize> {
    let doubled =
        std::iter::successors(Some(1), |tokens| Some(tokens * 2)).take_while(|tokens| *tokens < most);
    doubled.chain([most.max(1)]).collect()
}

/// 64, 256, 1024, ... below `most`, and `most` itself.
pub(super) fn contexts(most: usize) -> Vec<usize> {
    let grown =
        std::iter::successors(Some(64), |context| Some(context * 4)).take_while(|context| *context < most);
    grown.chain([most.max(1)]).collect()
}

/// Rows of a micro-batch that decodes at a context: enough for the time of one to be told from chance, and
/// no more positions than it takes to fill caches.
pub(super) fn decode_rows(context: usize, most: usize) -> usize {
    (ATTENDED_POSITIONS / context).clamp(1, MAX_DECODE_ROWS.min(most))
}

/// Where a chunk of a prompt begins, and its tokens, for a mean context of about `context`.
pub(super) fn chunk(context: usize, most: usize) -> (usize, usize) {
    let tokens = CHUNK_TOKENS.min(most).min(2 * context).max(2);
    (context.saturating_sub(tokens / 2), tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grids_end_with_what_was_asked_for() {
        assert_eq!(tokens(10), [1, 2, 4, 8, 10]);
        assert_eq!(tokens(4), [1, 2, 4]);
        assert_eq!(contexts(2000), [64, 256, 1024, 2000]);
        assert_eq!(contexts(50), [50]);
    }

    #[test]
    fn chunks_lie_around_their_context_and_end_within_twice_of_it() {
        assert_eq!(chunk(64, 512), (0, 128));
        assert_eq!(chunk(1024, 512), (960, 128));
        assert_eq!(chunk(1024, 16), (1016, 16));
        assert_eq!(decode_rows(64, 512), 64);
        assert_eq!(decode_rows(4096, 512), 4);
        assert_eq!(decode_rows(1 << 20, 512), 1);
    }
}
