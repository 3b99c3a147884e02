//! The shapes of the arrays that a step works in, at most: what is planned of a GPU's memory is what is made at load.

use kernels::WorkSize;

use crate::block::{Attention, Ffn};
use crate::config::ModelConfig;
use crate::head::LOGIT_ROWS;
use crate::memory::StepSize;
use crate::part::Part;
use crate::shard::{AttentionShard, FfnShard, RankPlace};
use crate::sharing::Sharing;

/// Rows and columns of each array of `span::Work` and `head::HeadWork`, zeros for what is not needed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct WorkShapes {
    pub(crate) x: [usize; 2],
    pub(crate) normed: [usize; 2],
    pub(crate) q: [usize; 2],
    /// Keys, and values alike.
    pub(crate) kv: [usize; 2],
    pub(crate) inner: [usize; 2],
    pub(crate) added: [usize; 2],
    /// What ranks put together, from columns or from rows of their own sequences.
    pub(crate) gathered: [usize; 2],
    /// Rows of a rank's own sequences.
    pub(crate) own_rows: [usize; 2],
    pub(crate) sums: [usize; 2],
    pub(crate) head_rows: [usize; 2],
    pub(crate) head_normed: [usize; 2],
    pub(crate) logits: [usize; 2],
    /// A rank's columns of these, or its candidates for the largest.
    pub(crate) logit_part: [usize; 2],
    /// Numbers of the largest array that ranks tell each other, 0 where there are no others.
    pub(crate) told: usize,
    /// What operations keep.
    pub(crate) kept: WorkSize,
}

impl WorkShapes {
    /// Those of a part, or of a rank's shard of it.
    pub(crate) fn of(
        config: &ModelConfig,
        part: Part,
        (place, sharing): (RankPlace, &Sharing),
        step: StepSize,
    ) -> Self {
        let dims = config.dims;
        let (hidden, rows, is_last) = (dims.hidden, step.rows, part.is_last(config));
        let (mut query, mut kv_heads, mut ffn) = (0, 0, 0);
        let (mut gathers, mut has_own_rows) = (false, false);
        for index in part.blocks.range() {
            let (block, sharing) = (config.blocks[index], sharing.of(index));
            let attention = place.attention(block.attention, dims, sharing.attention);
            has_own_rows |= part.has_attention(index) && attention == AttentionShard::Sequences;
            gathers |= has_own_rows || matches!(attention, AttentionShard::Columns(_));
            if let (true, Attention::Gqa { kv_heads: all }) = (part.has_attention(index), block.attention) {
                let heads = match attention {
                    AttentionShard::Heads { query, kv } => (query.len(), kv.len()),
                    AttentionShard::FirstRank if place.rank > 0 => (0, 0),
                    _ => (dims.heads, all),
                };
                query = query.max(heads.0 * dims.head_dim);
                kv_heads = kv_heads.max(heads.1);
            }
            let columns = match block.ffn {
                Ffn::SwiGlu { width } => part.columns(index, width),
                Ffn::Linear | Ffn::None => 0..0,
            };
            match place.ffn(block.ffn, dims, columns, sharing.ffn) {
                FfnShard::Inner(columns) => ffn = ffn.max(columns.len()),
                FfnShard::FirstRank(columns) if place.rank == 0 && block.ffn != Ffn::Linear => {
                    ffn = ffn.max(columns.len());
                }
                FfnShard::Columns(_) => gathers = true,
                FfnShard::FirstRank(_) | FfnShard::None => {}
            }
        }
        let is_cut = part.first_column > 0 || part.end_column.is_some();
        let drawn = if is_last { step.drawn_rows() } else { 0 };
        let handed_over = if part.end_column.is_some() { 2 } else { 1 };
        let taken_over = if part.first_column > 0 { 2 } else { 1 };
        let has_others = place.num_ranks > 1;
        let columns_of_logits =
            place.columns(0..dims.vocab).filter(|_| has_others).map_or(0, |columns| columns.len());
        let gathered_logits =
            if columns_of_logits > 0 && place.rank == 0 { drawn.min(LOGIT_ROWS) * dims.vocab } else { 0 };
        let of = |is_there: bool, rows: usize, cols: usize| if is_there { [rows, cols] } else { [0, 0] };
        WorkShapes {
            x: [rows, hidden],
            normed: [rows, hidden],
            q: [rows, query],
            kv: [rows, kv_heads * dims.head_dim],
            inner: [rows, query.max(ffn)],
            added: of(has_others, rows, hidden),
            gathered: of(has_others && gathers, rows, hidden),
            own_rows: of(has_own_rows, rows, hidden),
            sums: of(is_cut, rows, hidden),
            head_rows: [drawn, hidden],
            head_normed: [drawn, hidden],
            logits: [drawn, dims.vocab],
            logit_part: of(columns_of_logits > 0, drawn, columns_of_logits.max(2)),
            told: if has_others { (rows * hidden).max(gathered_logits) } else { 0 },
            kept: WorkSize {
                rows,
                sequences: step.sequences,
                context_tokens: step.context_tokens,
                hidden,
                ffn,
                kv_heads,
                head_dim: dims.head_dim,
                logit_rows: drawn,
                choice_rows: drawn.min(LOGIT_ROWS),
                vocab: dims.vocab,
                parcels: if is_last || place.rank > 0 { 0 } else { step.micro_batches * handed_over },
                arrivals: if part.is_first() || place.rank > 0 { 0 } else { step.arrivals * taken_over },
            },
        }
    }
}
