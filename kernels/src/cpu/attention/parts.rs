//! Which steps of a page's values the rows of a tile take together: they see different numbers of keys, and of a word of two values
//! perhaps the first alone.

use std::ops::Range;

use super::product::MAX_ROWS;

/// Steps of values that a few rows take together.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Part {
    pub(super) first_row: u8,
    pub(super) num_rows: u8,
    pub(super) first_step: u8,
    pub(super) num_steps: u8,
    /// A last step of which the rows see the first term alone.
    pub(super) is_half: bool,
}

/// All rows together, then for each row alone the whole steps that are left, and half a step.
pub(super) const MAX_PARTS: usize = 1 + 2 * MAX_ROWS;

/// Cuts the steps that rows see (`visible` keys each, never falling) into parts; every row meets its steps in
/// order.
#[inline(always)]
pub(super) fn parts(visible: &[usize], terms: usize) -> ([Part; MAX_PARTS], usize) {
    let mut parts = [Part::default(); MAX_PARTS];
    let mut num_parts = 0;
    let mut push = |first_row: usize, num_rows: usize, steps: Range<usize>, is_half| {
        let (first_step, num_steps) = (steps.start as u8, steps.len() as u8);
        let (first_row, num_rows) = (first_row as u8, num_rows as u8);
        parts[num_parts] = Part { first_row, num_rows, first_step, num_steps, is_half };
        num_parts += 1;
    };
    let common = visible[0] / terms;
    push(0, visible.len(), 0..common, false);
    let mut row = 0;
    while row < visible.len() {
        let alike = visible[row..].iter().take_while(|&&seen| seen == visible[row]).count();
        let whole = visible[row] / terms;
        if whole > common {
            push(row, alike, common..whole, false);
        }
        if !visible[row].is_multiple_of(terms) {
            push(row, alike, whole..whole + 1, true);
        }
        row += alike;
    }
    (parts, num_parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_meets_the_steps_it_sees_once_and_in_order() {
        for visible in
            [&[64usize; 6][..], &[1], &[1, 1, 1, 2, 2, 2], &[7, 8, 9, 10], &[63, 64, 64], &[30, 33]]
        {
            for terms in [1, 2] {
                let (parts, num_parts) = parts(visible, terms);
                for (row, &seen) in visible.iter().enumerate() {
                    let mut keys = 0;
                    for part in &parts[..num_parts] {
                        if (part.first_row..part.first_row + part.num_rows).contains(&(row as u8)) {
                            assert_eq!(part.first_step as usize * terms, keys, "{visible:?} {part:?}");
                            keys += part.num_steps as usize * if part.is_half { 1 } else { terms };
                        }
                    }
                    assert_eq!(keys, seen, "{visible:?}");
                }
            }
        }
    }
}
