//! Memory for sums that wait, one piece for every thread, kept from product to product.

use super::operand::{LINE_BYTES, Line};
use std::cell::Cell;

thread_local! {
    static LINES: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// Calls `run` with room for `len` numbers, which are whatever was there.
pub(super) fn with_sums(len: usize, run: impl FnOnce(*mut f32)) {
    let mut lines = LINES.take();
    let num_lines = (len * 4).div_ceil(LINE_BYTES);
    if num_lines > lines.len() {
        lines.resize(num_lines, Line([0; LINE_BYTES]));
    }
    run(lines.as_mut_ptr().cast());
    LINES.set(lines);
}
