//! What a slice has changed of its logits before the draw: penalties, biases, tokens that must not end it yet, and its mask.
//!
//! In this order, and before temperature: the repetition penalty divides or multiplies; frequency and presence penalties are
//! taken off and the bias is added, as one number that was rounded once; what the mask does not allow is barred.

use kernels::{Edit, Edits, RowEdits};
use scheduler::{Slice, TokenCount, TokenId, TokenMask};

/// Edits of rows in the making.
#[derive(Debug, Default)]
pub(crate) struct EditWork {
    /// Of all rows so far.
    pub(crate) all: Edits,
    row: Vec<Edit>,
}

impl EditWork {
    /// Adds a row of which nothing is changed.
    pub(crate) fn add_none(&mut self) {
        self.all.add_row(RowEdits::default());
    }

    /// Adds the row from which a slice draws.
    pub(crate) fn add(&mut self, slice: &Slice) {
        let EditWork { all, row } = self;
        row.clear();
        let sampling = &slice.request.sampling;
        for &TokenCount { token, generated, .. } in slice.counts.as_deref().into_iter().flatten() {
            let presence = if generated > 0 { f64::from(sampling.presence_penalty) } else { 0.0 };
            let frequency = f64::from(generated) * f64::from(sampling.frequency_penalty);
            let shift = -(frequency + presence) as f32;
            row.push(Edit { token, scale: sampling.repetition_penalty, shift });
        }
        row.extend(sampling.logit_bias.iter().map(|&(token, bias)| Edit { token, scale: 1.0, shift: bias }));
        row.extend(barred(slice).iter().map(|&token| Edit { token, scale: 1.0, shift: f32::NEG_INFINITY }));
        // Runs that are sorted are merged; edits of one token stay in the order from above.
        row.sort_by_key(|edit| edit.token);
        row.dedup_by(|next, kept| {
            let is_same = next.token == kept.token;
            if is_same {
                kept.shift += next.shift;
            }
            is_same
        });
        // One that there cannot be bars nothing: its row fails, whatever is drawn.
        let mask = slice.mask.as_ref().and_then(TokenMask::wait);
        all.add_row(RowEdits { edits: row, mask });
    }
}

/// Whether anything is changed of the row from which a slice draws.
pub(crate) fn is_edited(slice: &Slice) -> bool {
    let sampling = &slice.request.sampling;
    slice.counts.is_some()
        || slice.mask.is_some()
        || !sampling.logit_bias.is_empty()
        || !barred(slice).is_empty()
}

/// Tokens that would end a sequence which must not end yet.
fn barred(slice: &Slice) -> &[TokenId] {
    if slice.bars_stops { &slice.request.sampling.stop_token_ids } else { &[] }
}
