//! Which points are measured.

use crate::stage::Device;

/// How points are spread, by what it takes to see what a kind of device can do.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid {
    /// Positions that all rows of a micro-batch attend to, about: how many rows that is follows from their context.
    attended_positions: usize,
    /// Rows that decode together, at most: more would only take longer.
    max_decode_rows: usize,
    /// A chunk of a prompt.
    pub(super) chunk_tokens: usize,
    /// From so many tokens on there is a point between each and its double.
    denser_from: usize,
}

/// As many positions as it takes to fill the caches of a core.
const CPU: Grid =
    Grid { attended_positions: 16_384, max_decode_rows: 64, chunk_tokens: 128, denser_from: usize::MAX };

/// A GPU has a hundred multiprocessors and more, which few rows leave idle: 256 of them with 8 KV heads are 15 thread blocks
/// for each. Its products go by tiles of 64 or 128 rows, so that times have steps where a line between two doubles has none.
const GPU: Grid =
    Grid { attended_positions: 1 << 20, max_decode_rows: 256, chunk_tokens: 512, denser_from: 128 };

impl Grid {
    pub(super) fn of(device: &Device) -> Grid {
        match device {
            Device::Cuda { .. } => GPU,
            Device::Cpu { .. } | Device::Reference => CPU,
        }
    }

    /// 1, 2, 4, ... and `most` itself, where the grid is denser also half as many more.
    pub(super) fn tokens(self, most: usize) -> Vec<usize> {
        let doubled = std::iter::successors(Some(1), |tokens| Some(tokens * 2));
        let with_between = doubled.flat_map(|tokens| {
            [Some(tokens), (tokens >= self.denser_from).then(|| tokens + tokens / 2)].into_iter().flatten()
        });
        with_between.take_while(|tokens| *tokens < most).chain([most.max(1)]).collect()
    }

    /// Rows of a micro-batch that decodes at a context: enough for the time of one to be told from chance, and
    /// no more positions than it takes to fill caches.
    pub(super) fn decode_rows(self, context: usize, most: usize) -> usize {
        (self.attended_positions / context).clamp(1, self.max_decode_rows.min(most))
    }

    /// Where a chunk of a prompt begins, and its tokens, for a mean context of about `context`.
    pub(super) fn chunk(self, context: usize, most: usize) -> (usize, usize) {
        let tokens = self.chunk_tokens.min(most).min(2 * context).max(2);
        (context.saturating_sub(tokens / 2), tokens)
    }
}

/// 64, 256, 1024, ... below `most`, and `most` itself.
pub(super) fn contexts(most: usize) -> Vec<usize> {
    let grown =
        std::iter::successors(Some(64), |context| Some(context * 4)).take_while(|context| *context < most);
    grown.chain([most.max(1)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grids_end_with_what_was_asked_for() {
        assert_eq!(CPU.tokens(10), [1, 2, 4, 8, 10]);
        assert_eq!(CPU.tokens(4), [1, 2, 4]);
        assert_eq!(CPU.tokens(512).len(), 10);
        assert_eq!(GPU.tokens(1000), [1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1000]);
        assert_eq!(GPU.tokens(192).last_chunk(), Some(&[128, 192]));
        assert_eq!(contexts(2000), [64, 256, 1024, 2000]);
        assert_eq!(contexts(50), [50]);
    }

    #[test]
    fn chunks_lie_around_their_context_and_end_within_twice_of_it() {
        assert_eq!(CPU.chunk(64, 512), (0, 128));
        assert_eq!(CPU.chunk(1024, 512), (960, 128));
        assert_eq!(CPU.chunk(1024, 16), (1016, 16));
        assert_eq!(CPU.decode_rows(64, 512), 64);
        assert_eq!(CPU.decode_rows(4096, 512), 4);
        assert_eq!(CPU.decode_rows(1 << 20, 512), 1);
        assert_eq!(GPU.chunk(1024, 4096), (768, 512));
        assert_eq!([4096, 16_384, 131_072].map(|context| GPU.decode_rows(context, 4096)), [256, 64, 8]);
    }
}
