//! What stages take that several devices share: their halves of blocks, measured as ranks take them, side by side and with
//! what they tell each other.

use kernels::PAGE_TOKENS;

use super::measure::{Bench, Curve, HALF, Part, WHOLE};
use super::points::{Both, Seconds, TokenPoint};
use super::subject::{self, Place, Step, Subject};
use super::{Half, HalfEntry, SharedEntry, SharedHalf, meetings};
use crate::block::{Attention, Block, Ffn};
use crate::error::Result;

impl Bench<'_> {
    /// What ranks of so many devices take beside their blocks.
    pub(super) fn shared(&self, ranks: usize, hop: &Curve) -> Result<SharedEntry> {
        let (devices, dtypes) = (&self.options.devices[..ranks], self.options.dtypes);
        let tokens = self.tokens();
        let times = meetings::times(devices, dtypes, self.hidden(), &tokens, self.options.effort)?;
        let broadcast = self.meeting_points(&times.broadcast);
        let head = self.shared_head(ranks, hop, &broadcast)?;
        let all_reduce = self.meeting_points(&times.all_reduce);
        let all_gather = self.meeting_points(&times.all_gather);
        Ok(SharedEntry { ranks, all_reduce, all_gather, broadcast, head, halves: Vec::new() })
    }

    fn meeting_points(&self, times: &[Seconds]) -> Vec<TokenPoint> {
        let point = |(tokens, seconds): (usize, &Seconds)| TokenPoint {
            tokens,
            seconds: *seconds,
            flops_per_second: 0.0,
            bytes_per_second: (tokens * self.hidden() * size_of::<f32>()) as f64 / seconds.median,
        };
        self.tokens().into_iter().zip(times).map(point).collect()
    }

    /// The head alone: what it begins with on ranks that lack the rows is what stages are charged with anyway.
    fn shared_head(&self, ranks: usize, hop: &Curve, broadcast: &[TokenPoint]) -> Result<Curve> {
        let weight_bytes = self.table_bytes();
        let scrub_bytes = (self.walked_bytes / ranks as u64).saturating_sub(weight_bytes / ranks as u64);
        let steps: Vec<Step> = self.steps(1);
        let subject = Subject::no_blocks(self.model, Place::Last);
        let times = self.gang(ranks, scrub_bytes).time(&subject, &[], &steps)?;
        let part = Part { flops_per_token: 2 * self.table_params(), weight_bytes, copies: 1 };
        Ok(part.curve(&self.tokens(), &times, Some((&entered(hop, HALF, broadcast), WHOLE))))
    }

    /// A half of a block on as many devices.
    pub(super) fn half(
        &self,
        wanted: SharedHalf,
        hop: &Curve,
        broadcast: &[TokenPoint],
    ) -> Result<HalfEntry> {
        let SharedHalf { ranks, half } = wanted;
        let dims = self.model.config.dims;
        let block = self.half_block(half);
        let weight_bytes = self.weight_bytes(block.params(dims));
        // By sequences all ranks have all weights.
        let held = match half {
            Half::AttentionBySequences(_) => weight_bytes * ranks as u64,
            Half::Attention(_) | Half::Ffn(_) => weight_bytes,
        };
        let copies = self.copies_on("half of one", held, ranks)?;
        let tokens = self.tokens();
        let num_lanes = match half {
            Half::AttentionBySequences(_) => ranks,
            Half::Attention(_) | Half::Ffn(_) => 1,
        };
        let most = tokens.last().map_or(1, |tokens| *tokens);
        let num_pages = subject::pages_of_short_rows(most, num_lanes);
        let subject = Subject::blocks(self.model, block, copies, num_pages, PAGE_TOKENS);
        let subject = match half {
            Half::AttentionBySequences(_) => subject.by_sequences(),
            Half::Attention(_) | Half::Ffn(_) => subject,
        };
        let times = self.gang(ranks, 0).time(&subject, &[], &self.steps(num_lanes))?;
        let part = Part { flops_per_token: block.flops_per_token(dims), weight_bytes, copies };
        let entry = if wanted.is_of_first_rank(dims) { hop.clone() } else { entered(hop, WHOLE, broadcast) };
        let points = part.curve(&tokens, &times, Some((&entry, WHOLE)));
        Ok(HalfEntry { half, weight_bytes, copies, points })
    }

    /// The model's first block that has it, without the other half.
    fn half_block(&self, half: Half) -> Block {
        match half {
            Half::Attention(attention) | Half::AttentionBySequences(attention) => {
                Block { ffn: Ffn::None, ..self.block_like(|block| block.attention == attention) }
            }
            Half::Ffn(ffn) => {
                Block { attention: Attention::None, ..self.block_like(|block| block.ffn == ffn) }
            }
        }
    }

    fn steps(&self, num_lanes: usize) -> Vec<Step> {
        let step = |tokens| subject::short_rows(tokens, num_lanes, Some(self.hidden()), self.vocab());
        self.tokens().into_iter().map(step).collect()
    }
}

/// What a stage of several devices begins and ends with: a share of a hop, and giving all ranks what came.
fn entered(hop: &Curve, share: f64, broadcast: &[TokenPoint]) -> Curve {
    let of = |hop: &Vec<TokenPoint>, _| -> Vec<TokenPoint> {
        let sum = |(hop, broadcast): (&TokenPoint, &TokenPoint)| {
            let median = share * hop.seconds.median + broadcast.seconds.median;
            TokenPoint { seconds: Seconds { median, ..hop.seconds }, ..*hop }
        };
        hop.iter().zip(broadcast).map(sum).collect()
    };
    Both::map(hop, of)
}
