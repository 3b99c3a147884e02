//! What sixteen numbers at a time need beside the tiles: powers of two, and rows that become columns.

use std::arch::x86_64::*;

use super::BLOCK;
use crate::cpu::exp::avx512::rough_exp2;

/// `2^x` for x at most 0, to what bf16 needs. What would be denormal is zero, as the products take it: a processor is
/// slow to make denormals. NaN stays NaN.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn exp2(x: __m512) -> __m512 {
    let is_normal = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(-126.0));
    let [m, n] = rough_exp2(x);
    _mm512_maskz_scalef_ps(is_normal, m, n)
}

/// Rows of sixteen words become columns.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn transpose(rows: &mut [__m512i; BLOCK]) {
    let mut pairs = *rows;
    for i in 0..BLOCK / 2 {
        pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    // Lane L of `fours[i + j]` is column 4 L + j of rows i to i + 3.
    let mut fours = pairs;
    for i in 0..BLOCK / 4 {
        let i = 4 * i;
        fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
        fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    const EVEN: i32 = 0x88;
    const ODD: i32 = 0xdd;
    for j in 0..4 {
        let (a, b) = (fours[j], fours[j + 4]);
        let (c, d) = (fours[j + 8], fours[j + 12]);
        let (even, odd) = (_mm512_shuffle_i32x4::<EVEN>(a, b), _mm512_shuffle_i32x4::<ODD>(a, b));
        let (even2, odd2) = (_mm512_shuffle_i32x4::<EVEN>(c, d), _mm512_shuffle_i32x4::<ODD>(c, d));
        rows[j] = _mm512_shuffle_i32x4::<EVEN>(even, even2);
        rows[j + 4] = _mm512_shuffle_i32x4::<EVEN>(odd, odd2);
        rows[j + 8] = _mm512_shuffle_i32x4::<ODD>(even, even2);
        rows[j + 12] = _mm512_shuffle_i32x4::<ODD>(odd, odd2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::Simd;

    #[target_feature(enable = "avx512f")]
    unsafe fn transposed(mut words: [[u32; 16]; 16]) -> [[u32; 16]; 16] {
        // SAFETY: a row is sixteen words, and the feature is this function's own.
        unsafe {
            let mut rows = words.map(|row| _mm512_loadu_si512(row.as_ptr().cast()));
            transpose(&mut rows);
            words
                .iter_mut()
                .zip(rows)
                .for_each(|(out, row)| _mm512_storeu_si512(out.as_mut_ptr().cast(), row));
        }
        words
    }

    #[test]
    fn rows_become_columns() {
        if !Simd::Avx512.is_available() {
            return;
        }
        let words = std::array::from_fn(|i| std::array::from_fn(|j| (16 * i + j) as u32));
        // SAFETY: the level was asked for.
        let found = unsafe { transposed(words) };
        (0..16).for_each(|i| (0..16).for_each(|j| assert_eq!(found[i][j], words[j][i])));
    }

    #[test]
    fn powers_of_two_are_within_what_is_said() {
        if !Simd::Avx512.is_available() {
            return;
        }
        #[target_feature(enable = "avx512f")]
        unsafe fn at(x: f32) -> f32 {
            _mm512_cvtss_f32(exp2(_mm512_set1_ps(x)))
        }
        // SAFETY: the level was asked for.
        let at = |x: f32| unsafe { at(x) };
        for i in 0..100_000 {
            let x = -120.0 * (i as f32 / 100_000.0);
            let exact = f64::from(x).exp2();
            assert!((f64::from(at(x)) - exact).abs() < 8e-6 * exact, "{x}: {}", at(x));
        }
        assert_eq!([0.0, -126.5, -1e30, f32::NEG_INFINITY].map(at), [1.0, 0.0, 0.0, 0.0]);
        assert!(at(f32::NAN).is_nan());
    }
}
