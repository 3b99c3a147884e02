//! What a micro-batch asks of a stage, in numbers that a cost can be told from.

use crate::micro_batch::MicroBatch;

/// One micro-batch, or the average of many.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Load {
    /// Rows that decode, a token each.
    pub decode_tokens: f64,
    /// Positions that each of them attends to, on average.
    pub decode_context: f64,
    /// Tokens of prompts.
    pub prefill_tokens: f64,
    /// Positions that each of them attends to, on average.
    pub prefill_context: f64,
    /// Rows of logits that the last stage makes.
    pub logit_rows: f64,
}

impl Load {
    /// All tokens of the micro-batch.
    pub fn tokens(&self) -> f64 {
        self.decode_tokens + self.prefill_tokens
    }

    /// So many times as many tokens and rows, with contexts as they are.
    #[must_use]
    pub fn scaled(self, times: f64) -> Self {
        Load {
            decode_tokens: times * self.decode_tokens,
            prefill_tokens: times * self.prefill_tokens,
            logit_rows: times * self.logit_rows,
            ..self
        }
    }

    /// Its decode tokens alone.
    #[must_use]
    pub fn decode_only(self) -> Self {
        Load { prefill_tokens: 0.0, ..self }
    }

    /// Its prompt tokens alone, no logits made.
    #[must_use]
    pub fn prefill_only(self) -> Self {
        Load { decode_tokens: 0.0, logit_rows: 0.0, ..self }
    }
}

impl MicroBatch {
    /// What it asks of a stage. A slice of one token counts as a decode step: a stage makes no difference.
    pub fn load(&self) -> Load {
        let mut load = Load::default();
        let (mut decode_positions, mut prefill_positions) = (0.0, 0.0);
        for slice in &self.slices {
            let (first, tokens) = (f64::from(slice.first_position), slice.tokens.len() as f64);
            let attended = tokens * (first + (tokens + 1.0) / 2.0); // first + 1, first + 2, ...
            if slice.tokens.len() == 1 {
                load.decode_tokens += 1.0;
                decode_positions += attended;
            } else {
                load.prefill_tokens += tokens;
                prefill_positions += attended;
            }
            load.logit_rows += slice.score.len() as f64 + f64::from(u8::from(slice.sample));
        }
        load.decode_context = decode_positions / load.decode_tokens.max(1.0);
        load.prefill_context = prefill_positions / load.prefill_tokens.max(1.0);
        load
    }
}
