//! Registers of f32 lanes: kernels are written once over [`Lanes`] and compiled for every SIMD level.
//!
//! A kernel is a [`Kernel`] whose `run` is generic and `#[inline(always)]`; [`at_level`] inlines it into a
//! function that has the level's features, where the intrinsics below become single instructions. All
//! lanes of an operation are independent, and [`Lanes::sum`] adds in one fixed order, so that a result
//! never depends on where a number stands in memory.

mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

use crate::cpu::simd::Simd;
use portable::Portable;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86::upper_halves;

/// Work that is generic over the level.
pub(crate) trait Kernel {
    /// What it returns.
    type Output;

    /// Does the work. Implementations are `#[inline(always)]`, and so is all they call.
    ///
    /// # Safety
    /// The processor has the features of `L`, and all that the kernel holds is as it says.
    unsafe fn run<L: Lanes>(self) -> Self::Output;
}

/// Runs a kernel at a level.
///
/// # Safety
/// The processor has the level, which [`Cpu::new`](crate::cpu::Cpu::new) sees to, and all that the kernel holds is as it says: its
/// pointers, above all.
pub(crate) unsafe fn at_level<K: Kernel>(simd: Simd, kernel: K) -> K::Output {
    debug_assert!(simd.is_available(), "{} is not available", simd.name());
    match simd {
        // SAFETY: the caller's.
        #[cfg(target_arch = "x86_64")]
        Simd::Avx512 | Simd::Amx => unsafe { x86::run_avx512(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Simd::Avx2 => unsafe { x86::run_avx2(kernel) },
        // SAFETY: the caller's; plain Rust needs no features.
        _ => unsafe { kernel.run::<Portable>() },
    }
}

/// A register of f32 lanes.
///
/// # Safety
/// Every function needs the features of the level; pointers must be valid for the lanes they name, at any
/// alignment.
pub(crate) trait Lanes: Copy {
    /// Number of lanes, a power of two that divides 16.
    const LANES: usize;
    /// Rows of a register tile: with TILE_COLS columns it fills the register file but for operands.
    const TILE_ROWS: usize;
    /// Registers of columns in a register tile.
    const TILE_COLS: usize;
    /// How the level multiplies pairs of bf16 where the factors are rounded to bf16 as well.
    type Bf16Terms: Terms<Self>;

    /// Asks for a cache line that will be read soon; the address may be any.
    fn prefetch(at: *const u32);
    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(at: *const f32) -> Self;
    unsafe fn store(self, at: *mut f32);
    /// Loads the first `n <= LANES` lanes, the others are zero.
    unsafe fn load_first(at: *const f32, n: usize) -> Self;
    /// Stores the first `n <= LANES` lanes.
    unsafe fn store_first(self, at: *mut f32, n: usize);
    /// The first `n` lanes of `self`, the others of `other`; all of `self` for `n >= LANES`.
    unsafe fn first_or(self, n: usize, other: Self) -> Self;
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    /// `self * factor + sum`, fused where the level can.
    unsafe fn mul_add(self, factor: Self, sum: Self) -> Self;
    /// `sum - self * factor`, fused where the level can.
    unsafe fn mul_sub_from(self, factor: Self, sum: Self) -> Self;
    /// The larger of each two lanes; of `other` where either is NaN.
    unsafe fn max(self, other: Self) -> Self;
    unsafe fn exp(self) -> Self;
    /// The sum of all lanes: halves are added until one lane is left.
    unsafe fn sum(self) -> f32;
    /// The largest lane; of no meaning if one is NaN.
    unsafe fn largest(self) -> f32;
    /// The first lane.
    unsafe fn first(self) -> f32;
}

/// How entries in memory are multiplied by factors. Memory is in words of 32 bits: one f32, or a pair of
/// bf16 whose terms follow each other. A *step* takes a word per lane: `lanes += entries · factors`.
///
/// # Safety
/// As of [`Lanes`].
pub(crate) trait Terms<L: Lanes> {
    /// Terms in a word.
    const TERMS: usize;
    /// Parts of a step, one after the other: each takes entries and factors of its own, where the registers have no room for
    /// those of all terms.
    const PARTS: usize;
    /// A register of words.
    type Entries: Copy;
    /// The factors of a word, the same for every lane.
    type Factor: Copy;

    /// Loads a part of `LANES` words.
    unsafe fn entries(at: *const u32, part: usize) -> Self::Entries;
    /// The factors of a part of step `step`, as `store_factors` has put them.
    unsafe fn factor(at: *const f32, step: usize, part: usize) -> Self::Factor;
    /// `sum + entries · factor`.
    unsafe fn mul_add(entries: Self::Entries, factor: Self::Factor, sum: L) -> L;
    /// Puts `LANES` factors down as the terms from `term` (a multiple of `LANES`) on, and returns them as they
    /// will count. A row of `n` factors takes at most `n` words.
    unsafe fn store_factors(values: L, at: *mut f32, term: usize) -> L;
}

/// Words of one f32.
pub(crate) struct F32Terms;

impl<L: Lanes> Terms<L> for F32Terms {
    const TERMS: usize = 1;
    const PARTS: usize = 1;
    type Entries = L;
    type Factor = L;

    #[inline(always)]
    unsafe fn entries(at: *const u32, _: usize) -> L {
        // SAFETY: the caller's.
        unsafe { L::load(at.cast()) }
    }

    #[inline(always)]
    unsafe fn factor(at: *const f32, step: usize, _: usize) -> L {
        // SAFETY: the caller's.
        unsafe { L::splat(*at.add(step)) }
    }

    #[inline(always)]
    unsafe fn mul_add(entries: L, factor: L, sum: L) -> L {
        // SAFETY: the caller's.
        unsafe { entries.mul_add(factor, sum) }
    }

    #[inline(always)]
    unsafe fn store_factors(values: L, at: *mut f32, term: usize) -> L {
        // SAFETY: the caller's.
        unsafe { values.store(at.add(term)) };
        values
    }
}
