//! Lanes in AVX-512 and AVX2.

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
    const PARTS: usize = 1;
    type Entries = __m512bh;
    type Factor = __m512bh;

    #[inline(always)]
    unsafe fn entries(at: *const u32, _: usize) -> __m512bh {
        unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(at.cast())) }
    }

    #[inline(always)]
    unsafe fn factor(at: *const f32, step: usize, _: usize) -> __m512bh {
        unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(*at.add(step).cast::<i32>())) }
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
    // 6 * 2 registers of sums, 2 of widened entries, 1 of factors: 15 of 16.
    const TILE_ROWS: usize = 6;
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

    // A masked access takes many times as long as a plain one on some processors, even where the mask has all lanes or none.
    #[inline(always)]
    unsafe fn load_first(at: *const f32, n: usize) -> Self {
        unsafe {
            match n {
                0 => _mm256_setzero_ps(),
                1..8 => _mm256_maskload_ps(at, lanes_below(n)),
                _ => _mm256_loadu_ps(at),
            }
        }
    }

    #[inline(always)]
    unsafe fn store_first(self, at: *mut f32, n: usize) {
        unsafe {
            match n {
                0 => {}
                1..8 => _mm256_maskstore_ps(at, lanes_below(n), self),
                _ => _mm256_storeu_ps(at, self),
            }
        }
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

/// Ones in the upper half of every word, as the compiler does not know: else it makes of the mask a blend with zeros,
/// which takes the units of the products on processors where a mask may take others.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn upper_halves() -> __m256i {
    let mut mask = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
    // SAFETY: a comment changes nothing.
    unsafe {
        std::arch::asm!("/* {0} */", inout(ymm_reg) mask, options(pure, nomem, nostack, preserves_flags));
    }
    mask
}

/// Pairs of bf16, widened by shifts; factors are rounded to bf16 and kept as f32.
pub(crate) struct Avx2Pairs;

// SAFETY (of all blocks below): the features and the pointers are the caller's to vouch for.
#[allow(clippy::undocumented_unsafe_blocks, reason = "one sentence above holds for all of them")]
impl Terms<__m256> for Avx2Pairs {
    const TERMS: usize = 2;
    const PARTS: usize = 2;
    type Entries = __m256;
    type Factor = __m256;

    #[allow(clippy::pointers_in_nomem_asm_block, reason = "a comment looks at no memory")]
    #[inline(always)]
    unsafe fn entries(at: *const u32, part: usize) -> __m256 {
        unsafe {
            if part == 0 {
                return _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_loadu_si256(at.cast())));
            }
            // As if it were another address, so that the words are read again instead of kept: they would be registers too many.
            let mut again = at;
            std::arch::asm!("/* {0} */", inout(reg) again, options(nomem, nostack, preserves_flags));
            _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(again.cast()), upper_halves()))
        }
    }

    #[inline(always)]
    unsafe fn factor(at: *const f32, step: usize, part: usize) -> __m256 {
        unsafe { _mm256_set1_ps(*at.add(2 * step + part)) }
    }

    #[inline(always)]
    unsafe fn mul_add(entries: __m256, factor: __m256, sum: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(entries, factor, sum) }
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
