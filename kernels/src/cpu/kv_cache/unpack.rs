//! A page in E4M3 as words of bf16, which attention then reads as it reads a page in bf16: a pair of codes becomes a pair of numbers.
//!
//! Every step is a few operations on whole words without a branch, so that the loops are vectorised with the features of the
//! function they are inlined into. Nothing is rounded: bf16 holds what codes and powers of two come to.

use std::ops::Range;

use super::{KeyLayout, KvCache};
use crate::backend::PAGE_TOKENS;
use crate::fp8::Exponent;

/// Positions are unpacked in steps of this: attention reads no more beyond those that are seen, on any level.
const STEP: usize = 32;

/// Unpacks the first positions of some neighbouring heads of a page: each becomes `cache.head_words()` words from `out` on, its
/// keys and behind them its values.
///
/// # Safety
/// There is room for the words of all these heads.
#[inline(always)]
pub(crate) unsafe fn unpack(cache: &KvCache, page: u32, heads: Range<usize>, num_keys: usize, out: *mut u32) {
    let num_keys = num_keys.next_multiple_of(STEP);
    for (index, head) in heads.enumerate() {
        let (entries, exponents) = cache.entries(page, head).split_at(2 * cache.head_words());
        let (keys, values) = entries.split_at(2 * cache.key_words());
        let mut scales = [0.0; 2 * PAGE_TOKENS];
        scales.iter_mut().zip(exponents).for_each(|(scale, &byte)| *scale = Exponent(byte).scale());
        let (key_scales, value_scales) = scales.split_at(PAGE_TOKENS);
        // SAFETY: the caller vouches for the room, of which this is a head's.
        let words = unsafe {
            std::slice::from_raw_parts_mut(out.add(index * cache.head_words()), cache.head_words())
        };
        let (key_words, value_words) = words.split_at_mut(cache.key_words());
        match cache.layout() {
            KeyLayout::Columns => {
                let rows = key_words.chunks_exact_mut(PAGE_TOKENS).zip(keys.chunks_exact(2 * PAGE_TOKENS));
                for (words, pairs) in rows {
                    let lanes = words[..num_keys].iter_mut().zip(pairs.as_chunks().0).zip(key_scales);
                    lanes.for_each(|((word, &pair), &scale)| *word = numbers(pair, scale, scale));
                }
            }
            KeyLayout::Rows => {
                let stride = cache.key_stride();
                let rows = key_words.chunks_exact_mut(stride).zip(keys.chunks_exact(2 * stride));
                for ((words, pairs), &scale) in rows.zip(key_scales).take(num_keys) {
                    let lanes = words.iter_mut().zip(pairs.as_chunks().0);
                    lanes.for_each(|(word, &pair)| *word = numbers(pair, scale, scale));
                }
            }
        }
        let stride = cache.value_stride();
        let rows = value_words.chunks_exact_mut(stride).zip(values.chunks_exact(2 * stride));
        for ((words, pairs), &[even, odd]) in rows.zip(value_scales.as_chunks().0).take(num_keys / 2) {
            let lanes = words.iter_mut().zip(pairs.as_chunks().0);
            lanes.for_each(|(word, &pair)| *word = numbers(pair, even, odd));
        }
    }
}

/// A pair of codes as a pair of bf16.
#[inline(always)]
fn numbers(pair: [u8; 2], low_scale: f32, high_scale: f32) -> u32 {
    let pair = u32::from(u16::from_le_bytes(pair));
    let (low, high) = (number(pair & 0xff, low_scale), number(pair >> 8, high_scale));
    low.to_bits() >> 16 | high.to_bits() & 0xffff_0000
}

/// A code times a power of two; what `f32_of` of `fp8.rs` gives, times it.
#[inline(always)]
fn number(code: u32, scale: f32) -> f32 {
    let magnitude = (code & 0x7f) << 20;
    // Exponent and fraction in place, with the other bias; below 2⁻⁶, where a number has no leading one, 2⁻⁶ is taken away.
    let normal = f32::from_bits(magnitude + (120 << 23));
    let small = f32::from_bits(magnitude | 121 << 23) - f32::from_bits(121 << 23);
    let magnitude = if magnitude < 1 << 23 { small } else { normal };
    f32::from_bits(magnitude.to_bits() | (code & 0x80) << 24) * scale
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fp8;

    #[test]
    fn every_code_is_its_number() {
        for code in (0..=u8::MAX).filter(|code| code & 0x7f != 0x7f) {
            for scale in [1.0, 0.25, 1024.0] {
                let expected = fp8::f32_of(code) * scale;
                assert_eq!(number(u32::from(code), scale).to_bits(), expected.to_bits(), "{code:#x}");
            }
        }
        assert!(number(0, f32::NAN).is_nan());
    }
}
