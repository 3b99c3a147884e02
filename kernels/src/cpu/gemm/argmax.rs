//! The largest entry of each row of a product, found while its sums are at hand.
//!
//! Units meet a row's columns in any order and on any thread, so that the largest is kept as a number whose order is that
//! of what it stands for: the value first, and of equal values the lowest index. The largest of such numbers is the same
//! in whichever order they come.

use crate::backend::Largest;
use crate::cpu::lanes::{Kernel, Lanes};
use std::sync::atomic::{AtomicU64, Ordering};

/// The largest entry of a row so far.
#[derive(Debug, Default)]
pub(crate) struct RowBest(AtomicU64);

impl RowBest {
    /// Looks at entries of the row, of which the first has index `first`; `max` is the largest, if there is no NaN.
    #[inline(always)]
    fn meet(&self, entries: &[f32], first: usize, max: f32, has_nan: bool) {
        if has_nan {
            let nan = entries.iter().position(|entry| entry.is_nan()).unwrap_or(0);
            self.0.fetch_max(rank(f32::NAN, first + nan), Ordering::Relaxed);
            return;
        }
        // Nothing is written where these entries are not the largest, as it is mostly: threads share the line. Relaxed:
        // the number orders nothing but itself, and the pool orders the rest.
        if rank(max, first) > self.0.load(Ordering::Relaxed) {
            let at = entries.iter().position(|&entry| entry == max).unwrap_or(0);
            self.0.fetch_max(rank(max, first + at), Ordering::Relaxed);
        }
    }

    /// What it is, once all of the row was met.
    pub(crate) fn largest(&self) -> Largest {
        let rank = self.0.load(Ordering::Relaxed);
        let (ordered, index) = ((rank >> 32) as u32, !(rank as u32));
        let value = match ordered {
            u32::MAX => f32::NAN,
            positive if positive >> 31 == 1 => f32::from_bits(positive & !(1 << 31)),
            negative => f32::from_bits(!negative),
        };
        Largest { index, value }
    }
}

/// The higher, the larger the value, NaN above all; and of equal values, which both zeros are, the lower the index.
fn rank(value: f32, index: usize) -> u64 {
    let bits = (value + 0.0).to_bits();
    let ordered = match (value.is_nan(), bits >> 31) {
        (true, _) => u32::MAX,
        (false, 0) => bits | 1 << 31,
        (false, _) => !bits,
    };
    u64::from(ordered) << 32 | u64::from(!(index as u32))
}

/// Looks at the finished sums of a tile.
pub(super) struct MeetTile<'a> {
    /// `[rows, cols]`, a row every `stride`.
    pub(super) sums: *const f32,
    pub(super) stride: usize,
    pub(super) cols: usize,
    /// Index of the first column in its row.
    pub(super) first: usize,
    /// The tile's rows.
    pub(super) best: &'a [RowBest],
}

impl Kernel for MeetTile<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        // SAFETY: whoever made the kernel vouches for the sums, and the features are the caller's to vouch for; loads end
        // at a row's last entry.
        unsafe {
            let lowest = L::splat(f32::NEG_INFINITY);
            for (row, best) in self.best.iter().enumerate() {
                let entries = std::slice::from_raw_parts(self.sums.add(row * self.stride), self.cols);
                let (mut largest, mut nothing) = (lowest, L::splat(0.0));
                for (i, part) in entries.chunks(L::LANES).enumerate() {
                    let at = entries.as_ptr().add(i * L::LANES);
                    let part = match part.len() == L::LANES {
                        true => L::load(at),
                        false => L::load_first(at, part.len()),
                    };
                    // A NaN is passed over here, and found as what is not nothing when it is times zero.
                    nothing = part.mul_add(L::splat(0.0), nothing);
                    largest = part.first_or(entries.len() - i * L::LANES, lowest).max(largest);
                }
                // So is an infinity, and then they are looked at one by one.
                let has_nan = nothing.sum().is_nan() && entries.iter().any(|entry| entry.is_nan());
                best.meet(entries, self.first, largest.largest(), has_nan);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::lanes::at_level;
    use crate::cpu::simd::Simd;

    fn largest(parts: &[(usize, &[f32])]) -> Largest {
        let best = RowBest::default();
        for &(first, entries) in parts {
            let (sums, cols, best) = (entries.as_ptr(), entries.len(), std::slice::from_ref(&best));
            // SAFETY: the level was asked for, and the sums are the one row's.
            unsafe { at_level(Simd::detect(), MeetTile { sums, stride: 0, cols, first, best }) };
        }
        best.largest()
    }

    #[test]
    fn parts_in_any_order_have_the_lowest_of_the_largest() {
        let (a, b, c) = ([1.0, 7.5, -2.0], [7.5; 20], [-0.0, 7.5, 3.0]);
        for parts in [[(0, &a[..]), (3, &b), (23, &c)], [(23, &c[..]), (3, &b), (0, &a)]] {
            assert_eq!(largest(&parts), Largest { index: 1, value: 7.5 });
        }
    }

    #[test]
    fn values_that_are_not_finite_are_ranked_too() {
        let inf = f32::INFINITY;
        assert_eq!(largest(&[(4, &[-0.0, 0.0, -0.0])]), Largest { index: 4, value: 0.0 });
        assert_eq!(largest(&[(0, &[-inf, -1e38]), (2, &[-inf])]), Largest { index: 1, value: -1e38 });
        assert_eq!(largest(&[(0, &[-inf; 3])]), Largest { index: 0, value: -inf });
        assert_eq!(largest(&[(0, &[1.0, inf]), (2, &[inf])]), Largest { index: 1, value: inf });
        for nan in [f32::NAN, -f32::NAN] {
            let found = largest(&[(0, &[1.0, nan, inf]), (3, &[inf])]);
            assert!(found.value.is_nan() && found.index == 1, "{found:?}");
        }
    }
}
