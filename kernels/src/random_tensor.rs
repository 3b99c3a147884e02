//! Matrices that are made from a seed, for shapes that are too large to ship. A number depends on the seed and its place
//! alone, so that parts agree with the whole and every device makes the same ones.

use std::ops::Range;

use half::bf16;

/// A matrix, or a part of one, of uniform numbers in bf16.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RandomTensor {
    /// What the numbers depend on beside their place.
    pub seed: u64,
    /// Numbers lie between this and its negative.
    pub half_width: f32,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Columns of the whole matrix.
    pub stride: usize,
    /// Place of the first number in the whole matrix, row by row.
    pub first: u64,
}

impl RandomTensor {
    /// A whole matrix.
    pub fn new(seed: u64, half_width: f32, rows: usize, cols: usize) -> RandomTensor {
        RandomTensor { seed, half_width, rows, cols, stride: cols, first: 0 }
    }

    /// Some columns of some rows.
    ///
    /// # Panics
    /// When they are not inside of it.
    pub fn part(&self, rows: Range<usize>, cols: Range<usize>) -> RandomTensor {
        assert!(rows.end <= self.rows && cols.end <= self.cols, "{rows:?}, {cols:?} of {self:?}");
        let first = self.first + rows.start as u64 * self.stride as u64 + cols.start as u64;
        RandomTensor { rows: rows.len(), cols: cols.len(), first, ..*self }
    }

    /// All its numbers, row by row.
    pub fn values(&self) -> Vec<bf16> {
        let row = |row: usize| {
            let start = self.first + row as u64 * self.stride as u64;
            (0..self.cols as u64).map(move |col| self.value(start + col))
        };
        (0..self.rows).flat_map(row).collect()
    }

    fn value(&self, place: u64) -> bf16 {
        let unit = (split_mix(self.seed.wrapping_add(place)) >> 40) as f32 / (1u64 << 24) as f32;
        bf16::from_f32((2.0 * unit - 1.0) * self.half_width)
    }
}

/// The finaliser of SplitMix64 (Steele et al. 2014) over a counter in steps of its odd constant.
fn split_mix(counter: u64) -> u64 {
    let mut z = counter.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_have_the_numbers_of_the_whole() {
        let whole = RandomTensor::new(u64::MAX - 3, 0.5, 6, 10);
        let values = whole.values();
        let part = whole.part(2..5, 3..9).part(1..3, 2..4);
        let expected = [3 * 10 + 5, 3 * 10 + 6, 4 * 10 + 5, 4 * 10 + 6].map(|place| values[place]);
        assert_eq!(part.values(), expected);
        assert!(values.iter().all(|value| value.to_f32().abs() <= 0.5));
        assert_ne!(values, RandomTensor::new(7, 0.5, 6, 10).values());
    }
}
