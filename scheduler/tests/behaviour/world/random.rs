//! Draws for the seeded tests, and requests of every kind made from them.

use std::sync::Arc;

use scheduler::{Options, Request, RequestKey, Sampling};

use super::{STOP_TOKEN, poison};

/// SplitMix64: the same seed, the same draws, on every machine.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// A number below `bound`.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % bound as u64) as usize
    }

    /// True once in `times`.
    pub(crate) fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    /// A request of at most 64 tokens, of any kind.
    pub(crate) fn request(&mut self) -> Request {
        let num_prompt = 1 + if self.once_in(3) { self.below(40) } else { self.below(8) };
        let max_tokens = if self.once_in(5) { 0 } else { 1 + self.below(24) as u32 };
        let sampling = Sampling {
            min_tokens: if self.once_in(4) { self.below(12) as u32 } else { 0 },
            stop_token_ids: if self.once_in(2) { vec![STOP_TOKEN] } else { vec![] },
            stop: if self.once_in(4) { vec!["stop".to_owned()] } else { vec![] },
            logprobs: self.once_in(4).then_some(0),
            prompt_logprobs: self.once_in(3),
            presence_penalty: if self.once_in(4) { 0.5 } else { 0.0 },
            repetition_penalty: if self.once_in(4) { 1.5 } else { 1.0 },
            ..Sampling::greedy(max_tokens)
        };
        Request {
            key: if self.once_in(12) { poison(self.below(48)) } else { RequestKey(0) },
            prompt: (0..num_prompt).map(|_| self.below(61) as u32).collect(),
            sample: 0,
            sampling: Arc::new(sampling),
        }
    }

    /// A pipeline in which a request of 64 tokens fits, just so or with ease.
    pub(crate) fn options(&mut self) -> Options {
        let page_tokens = [1, 3, 4, 16][self.below(4)];
        let least_pages = 64_usize.div_ceil(page_tokens);
        let num_stages = [1, 2, 4][self.below(3)];
        let num_lanes = [1, 1, 2, 3][self.below(4)];
        Options {
            num_stages,
            micro_batch_tokens: [1, 5, 16, 128, 1024][self.below(5)],
            max_sequences: [1, 3, 8, 64][self.below(4)],
            num_pages: num_lanes * (least_pages + [0, 1, least_pages / 2, 8 * least_pages][self.below(4)]),
            num_lanes,
            page_tokens,
            context_tokens: 64,
            efficient_tokens: [1, 4, 16][self.below(3)],
            num_memories: [1, num_stages][self.below(2)],
            feeds_back: false,
            is_ahead: self.once_in(2),
        }
    }
}
