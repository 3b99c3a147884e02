//! Shape checks, made before any memory is touched. Every operation of every backend starts with these.

use crate::array::Array;
use crate::backend::{AttentionSlice, PAGE_TOKENS, RopeTable};
use crate::choice::{Choice, Edit, Edits};
use crate::error::{Error, Result};
use crate::tensor_view::{Scales, TensorView};

/// `found` is `expected`.
pub(crate) fn shape<const N: usize>(
    op: &'static str,
    operand: &'static str,
    found: [usize; N],
    expected: [usize; N],
) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::Shape { op, operand, found: found.to_vec(), expected: expected.to_vec() })
}

/// `found` is `expected`, of things that have names.
pub(crate) fn kind<T: Copy + PartialEq>(
    op: &'static str,
    (operand, what): (&'static str, &'static str),
    [found, expected]: [T; 2],
    name: fn(T) -> &'static str,
) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::Kind { op, operand, what, found: name(found), expected: name(expected) })
}

/// `value < bound`.
pub(crate) fn below(op: &'static str, what: &'static str, value: usize, bound: usize) -> Result<()> {
    if value < bound {
        return Ok(());
    }
    Err(Error::OutOfRange { op, what, value: value as u64, bound: bound as u64 })
}

/// Every index is below `bound`.
pub(crate) fn all_below(op: &'static str, what: &'static str, indices: &[u32], bound: usize) -> Result<()> {
    indices.iter().try_for_each(|&index| below(op, what, index as usize, bound))
}

/// The view's bytes are as many as its shape needs.
pub(crate) fn view(op: &'static str, view: &TensorView<'_>) -> Result<()> {
    let TensorView { rows, cols, stride, .. } = *view;
    if stride < cols {
        return Err(Error::OutOfRange {
            op,
            what: "number of columns",
            value: cols as u64,
            bound: stride as u64 + 1,
        });
    }
    let numbers = match rows.checked_mul(cols) {
        Some(1..) => (rows - 1).checked_mul(stride).and_then(|before| before.checked_add(cols)),
        other => other,
    };
    let expected = numbers
        .filter(|&numbers| numbers <= usize::MAX / size_of::<f32>())
        .map(|numbers| view.dtype.bytes_of(numbers));
    if let Some(scales) = &view.scales {
        scales_of(op, view, scales)?;
    }
    match expected {
        Some(expected) => shape(op, "bytes", [view.bytes.len()], [expected]),
        None => Err(Error::Unsupported(format!("{op}: [{}, {}] overflows", view.rows, view.cols))),
    }
}

/// There are scales, and zeros where there are any, for every place of the view.
fn scales_of(op: &'static str, view: &TensorView<'_>, scales: &Scales<'_>) -> Result<()> {
    let Scales { dtype, bytes, stride, group, order, zeros, first: [row, col] } = *scales;
    if dtype.has_scales() || group == 0 {
        return Err(Error::Unsupported(format!("{op}: scales are of {dtype:?}, in groups of {group}")));
    }
    if view.rows == 0 || view.cols == 0 {
        return Ok(());
    }
    if let Some(order) = order {
        below(op, "column with a group", col + view.cols - 1, order.len() / 4)?;
    }
    let last_group = match order {
        Some(_) => (0..view.cols).map(|col| scales.group_of(col)).max().unwrap_or(0),
        None => (col + view.cols - 1) / group,
    };
    let last_row = row + view.rows - 1;
    if stride > 0 {
        below(op, "group of scales", last_group, stride)?;
    }
    below(op, "scale", last_row * stride + last_group, bytes.len() / dtype.bytes_of(1))?;
    zeros.map_or(Ok(()), |zeros| below(op, "zero", last_row / 8 * stride + last_group, zeros.len() / 4))
}

/// `x` is `[rows, heads * head_dim]` for some number of heads that `kv_heads` divides; returns the group.
pub(crate) fn heads(
    op: &'static str,
    operand: &'static str,
    cols: usize,
    kv_heads: usize,
    head_dim: usize,
) -> Result<usize> {
    let group = cols / (kv_heads * head_dim);
    shape(op, operand, [cols], [group.max(1) * kv_heads * head_dim])?;
    Ok(group)
}

/// Heads can be turned in pairs: the table is whole and of an even width.
pub(crate) fn rope_table(table: &RopeTable) -> Result<()> {
    const OP: &str = "rope_table";
    if table.head_dim == 0 || !table.head_dim.is_multiple_of(2) {
        return Err(Error::Unsupported(format!("{OP}: head_dim {} is not even", table.head_dim)));
    }
    let half = table.head_dim / 2;
    shape(OP, "cos", [table.cos.len()], [table.cos.len() / half * half])?;
    shape(OP, "sin", [table.sin.len()], [table.cos.len()])
}

/// Rows of `x` hold whole heads, and the table has an angle for every row; returns half a head's width.
pub(crate) fn rope(op: &'static str, x: &Array, table: &RopeTable, positions: &[u32]) -> Result<usize> {
    let half = table.head_dim / 2;
    rope_shapes(op, [x.rows(), x.cols()], table.head_dim, table.cos.len() / half, positions)?;
    Ok(half)
}

/// The same for heads and angles that are elsewhere.
pub(crate) fn rope_shapes(
    op: &'static str,
    [rows, cols]: [usize; 2],
    head_dim: usize,
    num_positions: usize,
    positions: &[u32],
) -> Result<()> {
    shape(op, "x's columns", [cols], [cols / head_dim * head_dim])?;
    shape(op, "positions", [positions.len()], [rows])?;
    all_below(op, "position", positions, num_positions)
}

/// A cache of this shape can be made; returns the numbers of one half (keys or values) of it.
pub(crate) fn kv_cache(num_pages: usize, kv_heads: usize, head_dim: usize) -> Result<usize> {
    const OP: &str = "kv_cache";
    if kv_heads == 0 || head_dim == 0 || !head_dim.is_multiple_of(2) {
        let found = format!("{kv_heads} kv heads of head_dim {head_dim}");
        return Err(Error::Unsupported(format!("{OP}: {found}: head_dim must be even and neither may be 0")));
    }
    let half = num_pages.checked_mul(kv_heads).and_then(|heads| heads.checked_mul(head_dim * PAGE_TOKENS));
    half.filter(|&half| half <= isize::MAX as usize / 16).ok_or_else(|| {
        Error::Unsupported(format!("{OP}: {num_pages} pages of {kv_heads} heads of {head_dim} overflow"))
    })
}

/// A row of logits has an entry to find, and its indices fit a token's type.
pub(crate) fn logits(cols: usize) -> Result<()> {
    if cols == 0 {
        return Err(Error::Unsupported("logit_stats: a row of no logits has no largest".to_owned()));
    }
    below("logit_stats", "number of logits", cols, u32::MAX as usize)
}

/// The slices lie one after another over rows `0..rows`, and their pages exist and reach their last position.
pub(crate) fn slices(
    op: &'static str,
    slices: &[AttentionSlice],
    rows: usize,
    num_pages: usize,
) -> Result<()> {
    let mut next_row = 0;
    for slice in slices {
        shape(op, "slice's first row", [slice.first_row], [next_row])?;
        below(op, "number of a slice's rows", slice.num_rows, rows - next_row + 1)?;
        next_row += slice.num_rows;
        let end = slice.first_position.saturating_add(slice.num_rows);
        let num_used = end.div_ceil(PAGE_TOKENS);
        if num_used > slice.pages.len() {
            below(op, "position", end - 1, slice.pages.len() * PAGE_TOKENS)?;
        }
        all_below(op, "page", &slice.pages[..num_used], num_pages)?;
    }
    shape(op, "slices' rows", [next_row], [rows])
}

/// One choice for each row of logits and edits for all or for none, within the vocabulary and of numbers that mean something.
pub(crate) fn choices(choices: &[Choice], edits: &Edits, rows: usize, vocabulary: usize) -> Result<()> {
    const OP: &str = "choose";
    shape(OP, "choices", [choices.len()], [rows])?;
    for choice in choices {
        if let Some(token) = choice.given {
            below(OP, "token", token as usize, vocabulary)?;
        }
        let Choice { temperature, top_p, min_p, .. } = *choice;
        let is_temperature = temperature.is_finite() && temperature >= 0.0;
        let are_shares = top_p > 0.0 && top_p <= 1.0 && (0.0..=1.0).contains(&min_p);
        if !(is_temperature && are_shares) {
            return Err(Error::Unsupported(format!(
                "{OP}: found temperature {temperature}, top_p {top_p} and min_p {min_p}, expected none below 0, and shares up to 1"
            )));
        }
    }
    if !edits.rows.is_empty() {
        shape(OP, "edits", [edits.rows.len()], [rows])?;
    }
    (0..edits.rows.len()).try_for_each(|row| {
        let row = edits.row(row);
        if let Some(mask) = row.mask {
            shape(OP, "mask", [mask.len()], [vocabulary.div_ceil(32)])?;
        }
        // Edits of one token beside each other would come about in any order.
        let is_rising = row.edits.is_sorted_by(|a, b| a.token < b.token);
        let is_number = |edit: &Edit| edit.scale > 0.0 && edit.scale.is_finite() && edit.shift < f32::INFINITY;
        if let Some(edit) = row.edits.iter().find(|edit| !is_rising || !is_number(edit)) {
            return Err(Error::Unsupported(format!(
                "{OP}: found {edit:?}, expected a finite scale above 0, a shift below infinity, and rising tokens"
            )));
        }
        row.edits.iter().try_for_each(|edit| below(OP, "edited token", edit.token as usize, vocabulary))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor_view::ViewDtype;

    fn slice(first_row: usize, num_rows: usize, first_position: usize, pages: &[u32]) -> AttentionSlice {
        AttentionSlice { first_row, num_rows, first_position, pages: pages.to_vec() }
    }

    #[test]
    fn slices_cover_the_rows_in_order_and_stay_inside_their_pages() {
        let ok = [slice(0, 3, 62, &[4, 2]), slice(3, 1, 0, &[0])];
        assert!(slices("op", &ok, 4, 5).is_ok());
        assert!(slices("op", &[], 0, 5).is_ok());
        let gap = slices("op", &[slice(1, 3, 0, &[0])], 4, 5).unwrap_err();
        assert_eq!(gap.to_string(), "op: slice's first row has shape [1], expected [0]");
        let short = slices("op", &[slice(0, 3, 0, &[0])], 4, 5).unwrap_err();
        assert_eq!(short.to_string(), "op: slices' rows has shape [3], expected [4]");
        let long = slices("op", &[slice(0, 5, 0, &[0])], 4, 5).unwrap_err();
        assert_eq!(long.to_string(), "op: number of a slice's rows 5 is outside 0..5");
        let past_pages = slices("op", &[slice(0, 3, 62, &[4])], 3, 5).unwrap_err();
        assert_eq!(past_pages.to_string(), "op: position 64 is outside 0..64");
        let no_page = slices("op", &[slice(0, 3, 62, &[4, 5])], 3, 5).unwrap_err();
        assert_eq!(no_page.to_string(), "op: page 5 is outside 0..5");
    }

    #[test]
    fn a_page_that_no_row_reaches_may_be_anything() {
        assert!(slices("op", &[slice(0, 3, 0, &[0, u32::MAX])], 3, 1).is_ok());
    }

    #[test]
    fn odd_heads_and_absurd_sizes_are_refused() {
        let odd = kv_cache(1, 2, 63).unwrap_err();
        let expected = "kv_cache: 2 kv heads of head_dim 63: head_dim must be even and neither may be 0";
        assert_eq!(odd.to_string(), expected);
        assert!(kv_cache(usize::MAX / 2, 8, 128).is_err());
        assert_eq!(kv_cache(3, 2, 8).unwrap(), 3 * 2 * 8 * PAGE_TOKENS);
    }

    #[test]
    fn bytes_of_a_view_match_its_shape() {
        let view_of = |rows, cols, bytes| TensorView::new(ViewDtype::Bf16, rows, cols, bytes);
        assert!(view("op", &view_of(2, 3, &[0; 12])).is_ok());
        assert!(view("op", &view_of(2, 3, &[0; 13])).is_err());
        assert!(view("op", &view_of(usize::MAX, 3, &[0; 13])).is_err());
        let columns = view_of(2, 3, &[0; 12]).columns(1..3);
        assert!(view("op", &columns).is_ok());
        assert!(view("op", &TensorView { stride: 1, ..columns }).is_err());
        assert!(view("op", &TensorView { bytes: &[0; 12], ..columns }).is_err());
    }
}
