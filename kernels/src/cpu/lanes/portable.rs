//! Lanes in plain Rust, which the compiler turns into what the target has.

use super::{Lanes, Terms};
use crate::cpu::exp::exp_f32;
use crate::dtype::bf16_bits;

/// A register at the portable level: plain arrays, which the compiler turns into what the target has.
/// Multiply and add are apart, since most targets without FMA would call a function for it.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; 8]);

impl Portable {
    #[inline(always)]
    fn zip(self, other: Portable, op: impl Fn(f32, f32) -> f32) -> Portable {
        Portable(std::array::from_fn(|i| op(self.0[i], other.0[i])))
    }
}

impl Lanes for Portable {
    const LANES: usize = 8;
    // In SSE2: 4 * 1 * 2 registers of sums, 4 of entries, 2 of factors: 14 of 16.
    const TILE_ROWS: usize = 4;
    const TILE_COLS: usize = 1;
    type Bf16Terms = PortablePairs;

    #[inline(always)]
    fn prefetch(_: *const u32) {}

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Portable([x; 8])
    }

    #[inline(always)]
    unsafe fn load(at: *const f32) -> Self {
        // SAFETY: the caller's.
        Portable(unsafe { at.cast::<[f32; 8]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, at: *mut f32) {
        // SAFETY: the caller's.
        unsafe { at.cast::<[f32; 8]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn load_first(at: *const f32, n: usize) -> Self {
        // SAFETY: the caller's.
        Portable(std::array::from_fn(|i| if i < n { unsafe { *at.add(i) } } else { 0.0 }))
    }

    #[inline(always)]
    unsafe fn store_first(self, at: *mut f32, n: usize) {
        for (i, x) in self.0.into_iter().enumerate().take(n) {
            // SAFETY: the caller's.
            unsafe { *at.add(i) = x };
        }
    }

    #[inline(always)]
    unsafe fn first_or(self, n: usize, other: Self) -> Self {
        Portable(std::array::from_fn(|i| if i < n { self.0[i] } else { other.0[i] }))
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, sum: Self) -> Self {
        Portable(std::array::from_fn(|i| self.0[i] * factor.0[i] + sum.0[i]))
    }

    #[inline(always)]
    unsafe fn mul_sub_from(self, factor: Self, sum: Self) -> Self {
        Portable(std::array::from_fn(|i| sum.0[i] - self.0[i] * factor.0[i]))
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    unsafe fn exp(self) -> Self {
        Portable(self.0.map(exp_f32))
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let [a, b, c, d, e, f, g, h] = self.0;
        ((a + e) + (c + g)) + ((b + f) + (d + h))
    }

    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        self.0.into_iter().fold(f32::NEG_INFINITY, |max, x| if x > max { x } else { max })
    }

    #[inline(always)]
    unsafe fn first(self) -> f32 {
        self.0[0]
    }
}

/// Pairs of bf16, widened by shifts; factors are rounded to bf16 and kept as f32.
pub(crate) struct PortablePairs;

impl Terms<Portable> for PortablePairs {
    const TERMS: usize = 2;
    const PARTS: usize = 1;
    type Entries = [u32; 8];
    type Factor = (f32, f32);

    #[inline(always)]
    unsafe fn entries(at: *const u32, _: usize) -> [u32; 8] {
        // SAFETY: the caller's.
        unsafe { at.cast::<[u32; 8]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn factor(at: *const f32, step: usize, _: usize) -> (f32, f32) {
        // SAFETY: the caller's.
        unsafe { (*at.add(2 * step), *at.add(2 * step + 1)) }
    }

    #[inline(always)]
    unsafe fn mul_add(entries: [u32; 8], factor: (f32, f32), sum: Portable) -> Portable {
        Portable(std::array::from_fn(|i| {
            let even = f32::from_bits(entries[i] << 16) * factor.0 + sum.0[i];
            f32::from_bits(entries[i] & 0xffff_0000) * factor.1 + even
        }))
    }

    #[inline(always)]
    unsafe fn store_factors(values: Portable, at: *mut f32, term: usize) -> Portable {
        let rounded = Portable(values.0.map(|x| f32::from_bits(u32::from(bf16_bits(x)) << 16)));
        // SAFETY: the caller's.
        unsafe { rounded.store(at.add(term)) };
        rounded
    }
}
