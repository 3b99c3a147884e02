//! Registers of f32 lanes: kernels are written once over [`Lanes`] and compiled for every SIMD level.
//!
//! A kernel is a [`Kernel`] whose `run` is generic and `#[inline(always)]`; [`at_level`] inlines it into a
//! function that has the level's features, where the intrinsics below become single instructions. All
//! lanes of an operation are independent, and [`Lanes::sum`] adds in one fixed order, so that a result
//! never depends on where a number stands in memory.

use crate::cpu::exp::exp_f32;
use crate::cpu::simd::Simd;
use crate::dtype::bf16_bits;

/// Work that is generic over the level.
pub(crate) trait Kernel {
    /// What it returns.
    type Output;

    /// Does the work. Implementations are `#[inline(always)]`, and so is all they call.
    ///
    /// # Safety
    /// The processor has the features of `L`.
    unsafe fn run<L: Lanes>(self) -> Self::Output;
}

/// Runs a kernel at a level that this processor has.
pub(crate) fn at_level<K: Kernel>(simd: Simd, kernel: K) -> K::Output {
    debug_assert!(simd.is_available(), "{} is not available", simd.name());
    match simd {
        // SAFETY: `Cpu::new` refuses a level that is not available.
        #[cfg(target_arch = "x86_64")]
        Simd::Avx512 => unsafe { x86::run_avx512(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Simd::Avx2 => unsafe { x86::run_avx2(kernel) },
        // SAFETY: plain Rust needs no features.
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
    /// A register of words.
    type Entries: Copy;
    /// The factors of a word, the same for every lane.
    type Factor: Copy;

    /// Loads `LANES` words.
    unsafe fn entries(at: *const u32) -> Self::Entries;
    /// The factors of step `step`, as `store_factors` has put them.
    unsafe fn factor(at: *const f32, step: usize) -> Self::Factor;
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
    type Entries = L;
    type Factor = L;

    #[inline(always)]
    unsafe fn entries(at: *const u32) -> L {
        // SAFETY: the caller's.
        unsafe { L::load(at.cast()) }
    }

    #[inline(always)]
    unsafe fn factor(at: *const f32, step: usize) -> L {
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
    type Entries = [u32; 8];
    type Factor = (f32, f32);

    #[inline(always)]
    unsafe fn entries(at: *const u32) -> [u32; 8] {
        // SAFETY: the caller's.
        unsafe { at.cast::<[u32; 8]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn factor(at: *const f32, step: usize) -> (f32, f32) {
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

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Kernel, Lanes, Terms};
    use crate::cpu::exp;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) unsafe fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: the features are this function's own.
        unsafe { kernel.run::<__m512>() }
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: the features are this function's own.
        unsafe { kernel.run::<__m256>() }
    }

    // SAFETY (of all blocks below): the features and the pointers are the caller's to vouch for.
    #[allow(clippy::undocumented_unsafe_blocks, reason = "one sentence above holds for all of them")]
    impl Lanes for __m512 {
        const LANES: usize = 16;
        // 6 * 4 registers of sums, 4 of entries, 1 of factors: 29 of 32. The 24 sums are more than the 2 units
        // times 6 cycles of latency need.
        const TILE_ROWS: usize = 6;
        const TILE_COLS: usize = 4;
        type Bf16Terms = Avx512Pairs;

        #[inline(always)]
        fn prefetch(at: *const u32) {
            // A prefetch never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
        }

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            unsafe { _mm512_set1_ps(x) }
        }

        #[inline(always)]
        unsafe fn load(at: *const f32) -> Self {
            unsafe { _mm512_loadu_ps(at) }
        }

        #[inline(always)]
        unsafe fn store(self, at: *mut f32) {
            unsafe { _mm512_storeu_ps(at, self) }
        }

        #[inline(always)]
        unsafe fn load_first(at: *const f32, n: usize) -> Self {
            unsafe { _mm512_maskz_loadu_ps(mask(n), at) }
        }

        #[inline(always)]
        unsafe fn store_first(self, at: *mut f32, n: usize) {
            unsafe { _mm512_mask_storeu_ps(at, mask(n), self) }
        }

        #[inline(always)]
        unsafe fn first_or(self, n: usize, other: Self) -> Self {
            unsafe { _mm512_mask_blend_ps(mask(n), other, self) }
        }

        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            unsafe { _mm512_add_ps(self, other) }
        }

        #[inline(always)]
        unsafe fn sub(self, other: Self) -> Self {
            unsafe { _mm512_sub_ps(self, other) }
        }

        #[inline(always)]
        unsafe fn mul(self, other: Self) -> Self {
            unsafe { _mm512_mul_ps(self, other) }
        }

        #[inline(always)]
        unsafe fn mul_add(self, factor: Self, sum: Self) -> Self {
            unsafe { _mm512_fmadd_ps(self, factor, sum) }
        }

        #[inline(always)]
        unsafe fn mul_sub_from(self, factor: Self, sum: Self) -> Self {
            unsafe { _mm512_fnmadd_ps(self, factor, sum) }
        }

        #[inline(always)]
        unsafe fn max(self, other: Self) -> Self {
            unsafe { _mm512_max_ps(self, other) }
        }

        #[inline(always)]
        unsafe fn exp(self) -> Self {
            unsafe { exp::avx512::exp_ps(self) }
        }

        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            unsafe {
                let upper = _mm512_extractf32x8_ps::<1>(self);
                _mm256_add_ps(_mm512_castps512_ps256(self), upper).sum()
            }
        }

        #[inline(always)]
        unsafe fn largest(self) -> f32 {
            unsafe {
                let upper = _mm512_extractf32x8_ps::<1>(self);
                _mm256_max_ps(_mm512_castps512_ps256(self), upper).largest()
            }
        }

        #[inline(always)]
        unsafe fn first(self) -> f32 {
            unsafe { _mm512_cvtss_f32(self) }
        }
    }

    /// The first `n` lanes of 16.
    #[inline(always)]
    fn mask(n: usize) -> u16 {
        ((1u32 << n.min(16)) - 1) as u16
    }

    /// Pairs of bf16 through VDPBF16PS; factors are bf16, two to a word.
    pub(crate) struct Avx512Pairs;

    // SAFETY (of all blocks below): the features and the pointers are the caller's to vouch for.
    #[allow(clippy::undocumented_unsafe_blocks, reason = "one sentence above holds for all of them")]
    impl Terms<__m512> for Avx512Pairs {
        const TERMS: usize = 2;
        type Entries = __m512bh;
        type Factor = __m512bh;

        #[inline(always)]
        unsafe fn entries(at: *const u32) -> __m512bh {
            unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(at.cast())) }
        }

        #[inline(always)]
        unsafe fn factor(at: *const f32, step: usize) -> __m512bh {
            unsafe {
                std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(*at.add(step).cast::<i32>()))
            }
        }

        #[inline(always)]
        unsafe fn mul_add(entries: __m512bh, factor: __m512bh, sum: __m512) -> __m512 {
            unsafe { _mm512_dpbf16_ps(sum, entries, factor) }
        }

        #[inline(always)]
        unsafe fn store_factors(values: __m512, at: *mut f32, term: usize) -> __m512 {
            unsafe {
                let rounded = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(values));
                _mm256_storeu_si256(at.add(term / 2).cast(), rounded);
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(rounded)))
            }
        }
    }

    // SAFETY (of all blocks below): the features and the pointers are the caller's to vouch for.
    #[allow(clippy::undocumented_unsafe_blocks, reason = "one sentence above holds for all of them")]
    impl Lanes for __m256 {
        const LANES: usize = 8;
        // 4 * 2 registers of sums, 4 of widened entries, 2 of factors: 14 of 16.
        const TILE_ROWS: usize = 4;
        const TILE_COLS: usize = 2;
        type Bf16Terms = Avx2Pairs;

        #[inline(always)]
        fn prefetch(at: *const u32) {
            // A prefetch never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
        }

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            unsafe { _mm256_set1_ps(x) }
        }

        #[inline(always)]
        unsafe fn load(at: *const f32) -> Self {
            unsafe { _mm256_loadu_ps(at) }
        }

        #[inline(always)]
        unsafe fn store(self, at: *mut f32) {
            unsafe { _mm256_storeu_ps(at, self) }
        }

        #[inline(always)]
        unsafe fn load_first(at: *const f32, n: usize) -> Self {
            unsafe { _mm256_maskload_ps(at, lanes_below(n)) }
        }

        #[inline(always)]
        unsafe fn store_first(self, at: *mut f32, n: usize) {
            unsafe { _mm256_maskstore_ps(at, lanes_below(n), self) }
        }

        #[inline(always)]
        unsafe fn first_or(self, n: usize, other: Self) -> Self {
            unsafe { _mm256_blendv_ps(other, self, _mm256_castsi256_ps(lanes_below(n))) }
        }

        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            unsafe { _mm256_add_ps(self, other) }
        }

        #[inline(always)]
        unsafe fn sub(self, other: Self) -> Self {
            unsafe { _mm256_sub_ps(self, other) }
        }

        #[inline(always)]
        unsafe fn mul(self, other: Self) -> Self {
            unsafe { _mm256_mul_ps(self, other) }
        }

        #[inline(always)]
        unsafe fn mul_add(self, factor: Self, sum: Self) -> Self {
            unsafe { _mm256_fmadd_ps(self, factor, sum) }
        }

        #[inline(always)]
        unsafe fn mul_sub_from(self, factor: Self, sum: Self) -> Self {
            unsafe { _mm256_fnmadd_ps(self, factor, sum) }
        }

        #[inline(always)]
        unsafe fn max(self, other: Self) -> Self {
            unsafe { _mm256_max_ps(self, other) }
        }

        #[inline(always)]
        unsafe fn exp(self) -> Self {
            unsafe { exp::avx2::exp_ps(self) }
        }

        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            unsafe {
                let four = _mm_add_ps(_mm256_castps256_ps128(self), _mm256_extractf128_ps::<1>(self));
                let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
            }
        }

        #[inline(always)]
        unsafe fn largest(self) -> f32 {
            unsafe {
                let four = _mm_max_ps(_mm256_castps256_ps128(self), _mm256_extractf128_ps::<1>(self));
                let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
            }
        }

        #[inline(always)]
        unsafe fn first(self) -> f32 {
            unsafe { _mm256_cvtss_f32(self) }
        }
    }

    /// All bits of the first `n` lanes of 8.
    ///
    /// # Safety
    /// The processor has AVX2.
    #[inline(always)]
    unsafe fn lanes_below(n: usize) -> __m256i {
        // SAFETY: the caller's.
        unsafe {
            let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            _mm256_cmpgt_epi32(_mm256_set1_epi32(n.min(8) as i32), lanes)
        }
    }

    /// Pairs of bf16, widened by shifts; factors are rounded to bf16 and kept as f32.
    pub(crate) struct Avx2Pairs;

    // SAFETY (of all blocks below): the features and the pointers are the caller's to vouch for.
    #[allow(clippy::undocumented_unsafe_blocks, reason = "one sentence above holds for all of them")]
    impl Terms<__m256> for Avx2Pairs {
        const TERMS: usize = 2;
        type Entries = (__m256, __m256);
        type Factor = (__m256, __m256);

        #[inline(always)]
        unsafe fn entries(at: *const u32) -> (__m256, __m256) {
            unsafe {
                let words = _mm256_loadu_si256(at.cast());
                let upper = _mm256_and_si256(words, _mm256_set1_epi32(0xffff_0000_u32 as i32));
                (_mm256_castsi256_ps(_mm256_slli_epi32::<16>(words)), _mm256_castsi256_ps(upper))
            }
        }

        #[inline(always)]
        unsafe fn factor(at: *const f32, step: usize) -> (__m256, __m256) {
            unsafe { (_mm256_set1_ps(*at.add(2 * step)), _mm256_set1_ps(*at.add(2 * step + 1))) }
        }

        #[inline(always)]
        unsafe fn mul_add(entries: (__m256, __m256), factor: (__m256, __m256), sum: __m256) -> __m256 {
            unsafe { _mm256_fmadd_ps(entries.1, factor.1, _mm256_fmadd_ps(entries.0, factor.0, sum)) }
        }

        #[inline(always)]
        unsafe fn store_factors(values: __m256, at: *mut f32, term: usize) -> __m256 {
            unsafe {
                // To nearest even: add half a unit less one, and one more where the kept part is odd.
                let bits = _mm256_castps_si256(values);
                let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
                let half = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), odd);
                let sum = _mm256_add_epi32(bits, half);
                let kept = _mm256_and_si256(sum, _mm256_set1_epi32(0xffff_0000_u32 as i32));
                // A NaN could lose its last bit, or run over: it stays as it is.
                let is_nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(values, values);
                let rounded = _mm256_blendv_ps(_mm256_castsi256_ps(kept), values, is_nan);
                rounded.store(at.add(term));
                rounded
            }
        }
    }
}
