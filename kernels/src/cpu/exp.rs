//! The exponential, for SwiGLU and softmax: one polynomial, at every SIMD level.
//!
//! `exp(x) = 2ⁿ · exp(r)` with `n = round(x / ln 2)` and `|r| <= ln 2 / 2`, where `exp(r)` is the
//! minimax polynomial of Cephes' `expf`. The error is below 2 units in the last place. Lanes do not see
//! each other, so that a value does not depend on where it stands. Levels that have fused
//! multiply-add may differ from the portable one in the last bit.
//!
//! Infinities and NaN behave as in `f32::exp`; results below the normal range are rounded, not flushed.

/// Above it the result is infinite: `ln(f32::MAX) = 88.72`. The scale `2^n` still has room for it.
const HIGHEST: f32 = 89.0;
/// Below it the result is zero: half the smallest denormal is `exp(-103.97)`.
const LOWEST: f32 = -104.0;
/// `ln 2` in two parts; the first has 9 significant bits, so that `n · LN2_HIGH` is exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;
/// `exp(r) = 1 + r + r² · P(r)`, highest power first (Cephes, `expf.c`, rounded to f32).
const POLYNOMIAL: [f32; 6] =
    [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];

/// `exp(x)`; a loop over it is vectorised by the compiler.
#[inline(always)]
#[allow(clippy::manual_clamp, reason = "NaN must pass, and `clamp` does not become two instructions")]
pub(crate) fn exp_f32(x: f32) -> f32 {
    // 1.5 · 2²³: adding it leaves the nearest integer in the low bits of the mantissa.
    const MAGIC: f32 = 12_582_912.0;
    let x = if x > HIGHEST { HIGHEST } else { x };
    let x = if x < LOWEST { LOWEST } else { x };
    let shifted = x * std::f32::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    let p = POLYNOMIAL.iter().fold(0.0, |p, &c| p * r + c);
    let y = p * (r * r) + r + 1.0;
    // 2ⁿ in two factors, so that each is a normal number: n is in -151..=129.
    let n = (shifted.to_bits() as i32).wrapping_sub(MAGIC.to_bits() as i32);
    let half = n >> 1;
    y * power_of_two(half) * power_of_two(n.wrapping_sub(half))
}

/// `2ⁿ` for `n` in -126..=127; for a NaN's meaningless `n` any value at all, the product is NaN anyway.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// The exponential in AVX-512.
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512 {
    use super::{HIGHEST, LN2_HIGH, LN2_LOW, LOWEST, POLYNOMIAL};
    use std::arch::x86_64::*;

    /// (2^r - 1) / r at the four Chebyshev nodes of [-1/2, 1/2], highest power first.
    const EXP2: [f32; 4] = [9.656_71e-3, 5.583_828e-2, 0.240_225_3, 0.693_136_75];

    /// `2^x` for what is rounded to bf16, as `[m, n]` of `m · 2^n`, where n is whole: with an error of 7e-6, a sixth of a
    /// hundredth of bf16's half unit.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(crate) fn rough_exp2(x: __m512) -> [__m512; 2] {
        let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
        let r = _mm512_sub_ps(x, n);
        let mut p = _mm512_set1_ps(EXP2[0]);
        for c in &EXP2[1..] {
            p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(*c));
        }
        [_mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0)), n]
    }

    /// `exp(x)` of 16 lanes.
    ///
    /// # Safety
    /// The processor has AVX-512F.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(crate) unsafe fn exp_ps(x: __m512) -> __m512 {
        // Not by way of a denormal, which a processor is slow to make. A NaN is not less.
        let is_zero = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, _mm512_set1_ps(LOWEST));
        // With the bound first, min and max hand on a NaN in x.
        let x = _mm512_min_ps(_mm512_set1_ps(HIGHEST), x);
        let x = _mm512_max_ps(_mm512_set1_ps(LOWEST), x);
        let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(_mm512_mul_ps(
            x,
            _mm512_set1_ps(std::f32::consts::LOG2_E),
        ));
        let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(LN2_HIGH), x);
        let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(LN2_LOW), r);
        let mut p = _mm512_set1_ps(POLYNOMIAL[0]);
        for c in &POLYNOMIAL[1..] {
            p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(*c));
        }
        let y = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r);
        _mm512_maskz_scalef_ps(!is_zero, _mm512_add_ps(y, _mm512_set1_ps(1.0)), n)
    }
}

/// The exponential in AVX2.
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2 {
    use super::{HIGHEST, LN2_HIGH, LN2_LOW, LOWEST, POLYNOMIAL};
    use std::arch::x86_64::*;

    /// `exp(x)` of 8 lanes.
    ///
    /// # Safety
    /// The processor has AVX2 and FMA.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    pub(crate) unsafe fn exp_ps(x: __m256) -> __m256 {
        // With the bound first, min and max hand on a NaN in x.
        let x = _mm256_min_ps(_mm256_set1_ps(HIGHEST), x);
        let x = _mm256_max_ps(_mm256_set1_ps(LOWEST), x);
        let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(_mm256_mul_ps(
            x,
            _mm256_set1_ps(std::f32::consts::LOG2_E),
        ));
        let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(LN2_HIGH), x);
        let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(LN2_LOW), r);
        let mut p = _mm256_set1_ps(POLYNOMIAL[0]);
        for c in &POLYNOMIAL[1..] {
            p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(*c));
        }
        let y = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r);
        let y = _mm256_add_ps(y, _mm256_set1_ps(1.0));
        // 2ⁿ in two factors, so that each is a normal number: n is in -151..=129.
        let n = _mm256_cvtps_epi32(n);
        let half = _mm256_srai_epi32::<1>(n);
        let scale =
            |n| _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(n, _mm256_set1_epi32(127))));
        _mm256_mul_ps(_mm256_mul_ps(y, scale(half)), scale(_mm256_sub_epi32(n, half)))
    }
}

#[cfg(test)]
mod tests {
    use super::exp_f32;
    use crate::cpu::simd::Simd;

    fn exp_at(simd: Simd, x: f32) -> f32 {
        match simd {
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 | Simd::Amx => {
                use std::arch::x86_64::*;
                // SAFETY: callers pass available levels only.
                unsafe {
                    #[target_feature(enable = "avx512f")]
                    unsafe fn first(x: f32) -> f32 {
                        // SAFETY: the feature is this function's own.
                        _mm512_cvtss_f32(unsafe { super::avx512::exp_ps(_mm512_set1_ps(x)) })
                    }
                    first(x)
                }
            }
            #[cfg(target_arch = "x86_64")]
            Simd::Avx2 => {
                use std::arch::x86_64::*;
                // SAFETY: callers pass available levels only.
                unsafe {
                    #[target_feature(enable = "avx2,fma")]
                    unsafe fn first(x: f32) -> f32 {
                        // SAFETY: the features are this function's own.
                        _mm256_cvtss_f32(unsafe { super::avx2::exp_ps(_mm256_set1_ps(x)) })
                    }
                    first(x)
                }
            }
            _ => exp_f32(x),
        }
    }

    fn levels() -> impl Iterator<Item = Simd> {
        Simd::ALL.into_iter().filter(|simd| simd.is_available())
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        for simd in levels() {
            let mut worst = 0.0f64;
            for i in 0..400_000 {
                let x = -87.0 + 175.5 * (i as f32 / 400_000.0);
                let exact = f64::from(x).exp();
                let ulp = exact * 2f64.powi(-23); // At most two units, at least one.
                worst = worst.max((f64::from(exp_at(simd, x)) - exact).abs() / ulp);
            }
            assert!(worst < 2.0, "{}: {worst} units", simd.name());
        }
    }

    #[test]
    fn exp_keeps_the_special_values() {
        for simd in levels() {
            assert_eq!(exp_at(simd, 0.0), 1.0);
            assert_eq!(exp_at(simd, f32::INFINITY), f32::INFINITY);
            assert_eq!(exp_at(simd, 89.0), f32::INFINITY);
            assert_eq!(exp_at(simd, 1e30), f32::INFINITY);
            assert_eq!(exp_at(simd, f32::NEG_INFINITY), 0.0);
            assert_eq!(exp_at(simd, -1e30), 0.0);
            assert_eq!(exp_at(simd, -104.0), 0.0);
            assert!(exp_at(simd, f32::NAN).is_nan());
            let denormal = exp_at(simd, -100.0);
            assert!((denormal / 3.783_5e-44 - 1.0).abs() < 0.05, "{}: {denormal:e}", simd.name());
        }
    }
}
