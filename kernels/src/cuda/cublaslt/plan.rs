//! What is decided about products of cuBLASLt, without the library: which share an algorithm, how wide ones are cut, and
//! which candidate is taken.

use std::ops::Range;

/// Candidates that the library's heuristics are asked for.
pub(crate) const MOST_CANDIDATES: usize = 16;

/// Numbers of a matrix that one call may reach: beyond 2³¹ there have been kernels that count in 32 bits.
const MOST_NUMBERS: usize = 1 << 31;

/// Parts of a matrix begin at multiples of so many rows, so that each begins at [`ALIGNMENT`].
const CUT_ROWS: usize = 256;

/// Matrices begin at multiples of so many bytes: what the library takes for granted when it names algorithms, unless it is told
/// otherwise. One product's algorithm serves others of its key, so that all must keep this. Chunks of few columns do not, as tests
/// have them: our own kernel multiplies these.
pub(crate) const ALIGNMENT: usize = 256;

/// Number types of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// Both matrices in bf16.
    Bf16,
    /// Both in E4M3, with a scale for each row of either.
    Fp8,
}

/// Products that share an algorithm on one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Key {
    pub(crate) kind: Kind,
    /// Rows of x, as [`bucket`] has them.
    pub(crate) rows: usize,
    /// Rows of w.
    pub(crate) cols: usize,
    /// Columns of both.
    pub(crate) depth: usize,
    /// Whether the product is added to what is there.
    pub(crate) adds: bool,
}

/// An algorithm as the library writes it, for its own version and one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Algorithm(pub(crate) [u64; 8]);

/// What has been found for a key.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Choice {
    pub(crate) algorithm: Algorithm,
    /// What it took when it was chosen.
    pub(crate) microseconds: f64,
}

impl Kind {
    pub(crate) const ALL: [Kind; 2] = [Kind::Bf16, Kind::Fp8];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Bf16 => "bf16",
            Kind::Fp8 => "fp8",
        }
    }
}

/// The number of rows that stands for so many: powers of two from 16 on, and 384, where a step of two is a large one.
pub(crate) fn bucket(rows: usize) -> usize {
    match rows {
        0..=16 => 16,
        257..=384 => 384,
        more => more.next_power_of_two(),
    }
}

/// Of several times, in the heuristics' order, the least; the first of equal ones. A candidate that failed has none.
pub(crate) fn fastest(microseconds: &[Option<f64>]) -> Option<usize> {
    let timed = microseconds.iter().enumerate().filter_map(|(index, time)| Some((index, (*time)?)));
    timed.reduce(|best, next| if next.1 < best.1 { next } else { best }).map(|(index, _)| index)
}

/// Cuts rows of a matrix of this stride into calls that each reach at most [`MOST_NUMBERS`] numbers.
pub(crate) fn cuts(rows: usize, stride: usize) -> impl Iterator<Item = Range<usize>> {
    let fitting = MOST_NUMBERS / stride.max(1) / CUT_ROWS * CUT_ROWS;
    let step = fitting.max(CUT_ROWS);
    (0..rows).step_by(step).map(move |first| first..(first + step).min(rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_rounded_up_to_powers_of_two_and_384() {
        let found = [1, 16, 17, 64, 65, 200, 256, 257, 384, 385, 512, 513, 4096].map(bucket);
        assert_eq!(found, [16, 16, 32, 64, 128, 256, 256, 384, 384, 512, 512, 1024, 4096]);
    }

    #[test]
    fn the_least_time_is_taken_and_the_first_of_equal_ones() {
        assert_eq!(fastest(&[Some(3.0), Some(2.0), None, Some(2.0)]), Some(1));
        assert_eq!(fastest(&[None, Some(9.0)]), Some(1));
        assert_eq!(fastest(&[None, None]), None);
    }

    #[test]
    fn no_call_reaches_beyond_two_to_the_31() {
        // Ultra's widest FFN: gate of 425,984 rows, and Ultra's output matrix.
        for (rows, stride) in [(425_984, 16_384), (128_256, 16_384), (16_384, 53_248), (7, 8)] {
            let cuts: Vec<_> = cuts(rows, stride).collect();
            assert!(cuts.iter().all(|cut| cut.len() * stride <= MOST_NUMBERS), "{rows} {stride}");
            assert_eq!(cuts.iter().map(ExactSizeIterator::len).sum::<usize>(), rows);
            assert!(cuts.iter().all(|cut| cut.start % CUT_ROWS == 0));
        }
        assert_eq!(cuts(16_384, 53_248).count(), 1);
        assert_eq!(cuts(0, 8).count(), 0);
    }
}
