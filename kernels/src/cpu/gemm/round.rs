//! Rounding f32 to bf16, to nearest even, with the same bits at every SIMD level.
//!
//! Integer arithmetic and not `VCVTNEPS2BF16`, which flushes denormals: so an operand's bits depend on the
//! values alone.

use crate::cpu::simd::Simd;
use crate::dtype::bf16_bits;

/// A bf16 as f32, exactly.
#[inline(always)]
pub(super) fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Round `values` into `out`, of the same length.
#[inline]
pub(super) fn round_row(simd: Simd, values: &[f32], out: &mut [u16]) {
    debug_assert_eq!(values.len(), out.len());
    match simd {
        // SAFETY: callers pass a level that this processor has.
        #[cfg(target_arch = "x86_64")]
        Simd::Avx512 | Simd::Amx => unsafe { round_row_avx512(values, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Simd::Avx2 => unsafe { round_row_avx2(values, out) },
        _ => round_each(values, out),
    }
}

/// The same, with the results in f32.
#[inline]
pub(super) fn round_wide(simd: Simd, values: &[f32], out: &mut [f32]) {
    debug_assert_eq!(values.len(), out.len());
    match simd {
        // SAFETY: callers pass a level that this processor has.
        #[cfg(target_arch = "x86_64")]
        Simd::Avx2 | Simd::Avx512 | Simd::Amx => unsafe { round_wide_avx2(values, out) },
        _ => round_each_wide(values, out),
    }
}

/// The loop that the compiler vectorises with the features of the function it is inlined into.
#[inline(always)]
fn round_each(values: &[f32], out: &mut [u16]) {
    for (out, &value) in out.iter_mut().zip(values) {
        *out = bf16_bits(value);
    }
}

/// Alike.
#[inline(always)]
fn round_each_wide(values: &[f32], out: &mut [f32]) {
    for (out, &value) in out.iter_mut().zip(values) {
        *out = bf16_to_f32(bf16_bits(value));
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn round_wide_avx2(values: &[f32], out: &mut [f32]) {
    round_each_wide(values, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn round_row_avx512(values: &[f32], out: &mut [u16]) {
    round_each(values, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn round_row_avx2(values: &[f32], out: &mut [u16]) {
    round_each(values, out);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_rounds_as_the_half_crate_does() {
        // A stride through all bit patterns that meets every exponent, halfway cases and NaNs.
        let values: Vec<f32> = (0..=u32::MAX / 9973)
            .map(|i| f32::from_bits(i * 9973))
            .chain((0..65536u32).map(|high| f32::from_bits(high << 16 | 0x8000)))
            .collect();
        let expected: Vec<u16> = values.iter().map(|&v| half::bf16::from_f32(v).to_bits()).collect();
        let (mut found, mut wide) = (vec![0; values.len()], vec![0.0; values.len()]);
        for simd in Simd::ALL {
            if simd.is_available() {
                round_row(simd, &values, &mut found);
                assert!(found == expected, "{}", simd.name());
                round_wide(simd, &values, &mut wide);
                let is_same = |(wide, &bits): (&f32, &u16)| wide.to_bits() == u32::from(bits) << 16;
                assert!(wide.iter().zip(&expected).all(is_same), "{}", simd.name());
            }
        }
    }
}
