//! Narrow weights as panels of bf16, which hold their integers exactly.
//!
//! A chunk of K is unpacked into a buffer that stays in the L1 cache, and the tiles of a unit read it there.
//! Scales are applied to sums, so that no weight is rounded.

#[cfg(target_arch = "x86_64")]
use super::tile::PIECE_COLS;
use crate::backend::WeightType;
use crate::cpu::simd::Simd;
#[cfg(target_arch = "x86_64")]
use crate::cpu::simd::has_vbmi;

/// Most bytes that are unpacked at a time: what L1 caches of 48 KiB have room for.
pub(super) const MOST_UNPACKED_BYTES: usize = 32 << 10;

/// A chunk of a panel, unpacked: `[terms / 2][strip][2]` bf16.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Unpacked(pub(super) [u32; MOST_UNPACKED_BYTES / 4]);

/// Most terms that are widened to f32 at a time: what L1 caches of 32 KiB have room for.
pub(super) const MOST_WIDENED_TERMS: usize = 288;

/// Some columns of a chunk in f32.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Widened(pub(super) [f32; MOST_WIDENED_TERMS * PIECE_COLS]);

/// What to unpack, and where to.
pub(super) struct Unpack {
    /// The piece's words from the chunk's first on, `strip` words from one to the next.
    pub(super) words: *const u32,
    /// NR, or in AMX half of it.
    pub(super) strip: usize,
    /// Terms, a multiple of KR.
    pub(super) terms: usize,
    /// 16, 32 or 64.
    pub(super) cols: usize,
    /// `[terms / 2][strip]` pairs, of which `cols` of each strip are written; `[terms][cols]` numbers in f32 where they are
    /// widened.
    pub(super) out: *mut u32,
}

/// Unpacks a chunk.
///
/// # Safety
/// The pointers are valid for its shape, and the processor has the level of the function.
pub(super) type UnpackFn = unsafe fn(&Unpack);

/// The function of a level for a narrow type.
pub(super) fn unpack_fn(simd: Simd, kind: WeightType) -> UnpackFn {
    let is_int4 = kind == WeightType::Int4Weight;
    match (simd, is_int4) {
        #[cfg(target_arch = "x86_64")]
        (Simd::Avx512 | Simd::Amx, true) => x86::int4_avx512,
        #[cfg(target_arch = "x86_64")]
        // Every processor with AMX has VBMI, but nothing says that it must.
        (Simd::Amx, false) if has_vbmi() => x86::int8_vbmi,
        #[cfg(target_arch = "x86_64")]
        (Simd::Avx512 | Simd::Amx, false) => x86::int8_avx512,
        (_, true) => unpack::<8, 4>,
        (_, false) => unpack::<4, 2>,
    }
}

/// Words of `TERMS` integers to `PAIRS` pairs. The loop is one that the compiler vectorises with the features of
/// the function it is inlined into.
///
/// # Safety
/// As [`UnpackFn`].
#[inline(always)]
unsafe fn unpack<const TERMS: usize, const PAIRS: usize>(chunk: &Unpack) {
    for word in 0..chunk.terms / TERMS {
        for first in (0..chunk.cols).step_by(LANES) {
            // SAFETY: the caller vouches for `terms / TERMS` rows of words, and for PAIRS times as many of pairs.
            unsafe {
                let words = chunk.words.add(word * chunk.strip + first).cast::<[u32; LANES]>().read();
                for pair in 0..PAIRS {
                    let pairs = words.map(|word| match TERMS {
                        8 => join(nibble(word, 4 * pair), nibble(word, 16 + 4 * pair)),
                        _ => join(byte(word, 16 * pair), byte(word, 16 * pair + 8)),
                    });
                    let out = chunk.out.add((word * PAIRS + pair) * chunk.strip + first);
                    out.cast::<[u32; LANES]>().write(pairs);
                }
            }
        }
    }
}

/// Columns that are unpacked side by side.
pub(super) const LANES: usize = 16;

/// The integer of 4 bits that starts at bit `at`, as f32.
#[inline(always)]
pub(super) fn nibble(word: u32, at: usize) -> f32 {
    ((word << (28 - at)).cast_signed() >> 28) as f32
}

/// The integer of 8 bits that starts at bit `at`, as f32.
#[inline(always)]
fn byte(word: u32, at: usize) -> f32 {
    ((word << (24 - at)).cast_signed() >> 24) as f32
}

/// A pair of bf16 of two numbers that need no more than the upper half of an f32.
#[inline(always)]
pub(super) fn join(even: f32, odd: f32) -> u32 {
    odd.to_bits() | even.to_bits() >> 16
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{LANES, Unpack};
    use std::arch::x86_64::*;

    /// Where `VPERMT2W` finds the upper halves of two registers, in turn.
    const UPPER_HALVES: [u16; 32] = {
        let mut places = [0; 32];
        let mut i = 0;
        while i < 32 {
            places[i] = (i as u16 | 1) + if i % 2 == 1 { 32 } else { 0 };
            i += 1;
        }
        places
    };

    /// A byte, 128 above itself, becomes the lowest bits of 2²³ as f32, from which 2²³ + 128 is taken off: fewer
    /// steps than extending its sign and converting. The upper halves of two such numbers are a pair.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) unsafe fn int8_avx512(chunk: &Unpack) {
        let flip = _mm512_set1_epi8(-128);
        let (byte, exponent) = (_mm512_set1_epi32(0xff), _mm512_set1_epi32(0x4b00_0000));
        let offset = _mm512_set1_ps(8_388_736.0);
        // (word & byte) | exponent
        let number = |words| {
            let bits = _mm512_ternarylogic_epi32::<0xea>(words, byte, exponent);
            _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(bits), offset))
        };
        // SAFETY: 64 bytes.
        let upper = unsafe { _mm512_loadu_si512(UPPER_HALVES.as_ptr().cast()) };
        // SAFETY: the caller vouches for the chunk's pointers, two pairs to a word.
        unsafe {
            for word in 0..chunk.terms / 4 {
                for first in (0..chunk.cols).step_by(LANES) {
                    let words = _mm512_loadu_si512(chunk.words.add(word * chunk.strip + first).cast());
                    let words = _mm512_xor_si512(words, flip);
                    let out = chunk.out.add(word * 2 * chunk.strip + first);
                    let (even, odd) = (number(words), number(_mm512_srli_epi32::<8>(words)));
                    _mm512_storeu_si512(out.cast(), _mm512_permutex2var_epi16(even, upper, odd));
                    let (even, odd) =
                        (number(_mm512_srli_epi32::<16>(words)), number(_mm512_srli_epi32::<24>(words)));
                    _mm512_storeu_si512(
                        out.add(chunk.strip).cast(),
                        _mm512_permutex2var_epi16(even, upper, odd),
                    );
                }
            }
        }
    }

    /// The same with each byte put under its exponent by one instruction, and pairs made by a shift and a mask.
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    pub(super) unsafe fn int8_vbmi(chunk: &Unpack) {
        const LOWEST: u64 = 0x1111_1111_1111_1111;
        const ODD: u32 = 0xaaaa_aaaa;
        let flip = _mm512_set1_epi8(-128);
        let (exponent, offset) = (_mm512_set1_epi32(0x4b00_0000), _mm512_set1_ps(8_388_736.0));
        // Byte `i` of every word.
        let places: [__m512i; 4] = std::array::from_fn(|i| {
            let first = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60);
            _mm512_add_epi32(first, _mm512_set1_epi32(i as i32))
        });
        let number = |words, place| {
            let bits = _mm512_mask_permutexvar_epi8(exponent, LOWEST, place, words);
            _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(bits), offset))
        };
        let pair = |even, odd| _mm512_mask_blend_epi16(ODD, _mm512_srli_epi32::<16>(even), odd);
        // SAFETY: the caller vouches for the chunk's pointers, two pairs to a word.
        unsafe {
            for word in 0..chunk.terms / 4 {
                for first in (0..chunk.cols).step_by(LANES) {
                    let words = _mm512_loadu_si512(chunk.words.add(word * chunk.strip + first).cast());
                    let words = _mm512_xor_si512(words, flip);
                    let [a, b, c, d] = places.map(|place| number(words, place));
                    let out = chunk.out.add(word * 2 * chunk.strip + first);
                    _mm512_storeu_si512(out.cast(), pair(a, b));
                    _mm512_storeu_si512(out.add(chunk.strip).cast(), pair(c, d));
                }
            }
        }
    }

    /// The integers 0 ..= 7 and -8 ..= -1 in bf16, twice: `VPERMW` looks at five bits of an index, of which the
    /// fifth belongs to the next integer.
    const TABLE: [u16; 32] = {
        let one_to_seven = [0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0];
        let mut table = [0; 32];
        let mut i = 0;
        while i < 32 {
            table[i] = match i % 16 {
                0 => 0,
                8 => 0xc100,
                n if n < 8 => one_to_seven[n - 1],
                n => one_to_seven[15 - n] | 0x8000,
            };
            i += 1;
        }
        table
    };

    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) unsafe fn int4_avx512(chunk: &Unpack) {
        // SAFETY: the table is 64 bytes; the caller vouches for the chunk's pointers, four pairs to a word.
        unsafe {
            let table = _mm512_loadu_si512(TABLE.as_ptr().cast());
            for word in 0..chunk.terms / 8 {
                for first in (0..chunk.cols).step_by(LANES) {
                    let words = _mm512_loadu_si512(chunk.words.add(word * chunk.strip + first).cast());
                    let out = chunk.out.add(word * 4 * chunk.strip + first);
                    _mm512_storeu_si512(out.cast(), _mm512_permutexvar_epi16(words, table));
                    let words_of = |pairs| _mm512_permutexvar_epi16(pairs, table);
                    _mm512_storeu_si512(out.add(chunk.strip).cast(), words_of(_mm512_srli_epi16::<4>(words)));
                    _mm512_storeu_si512(
                        out.add(2 * chunk.strip).cast(),
                        words_of(_mm512_srli_epi16::<8>(words)),
                    );
                    _mm512_storeu_si512(
                        out.add(3 * chunk.strip).cast(),
                        words_of(_mm512_srli_epi16::<12>(words)),
                    );
                }
            }
        }
    }

    #[cfg(test)]
    mod tests {
        use super::TABLE;

        #[test]
        fn the_table_holds_every_integer_of_four_bits() {
            for (i, &bits) in TABLE.iter().enumerate() {
                let integer = ((i as u32) << 28).cast_signed() >> 28;
                assert_eq!(half::bf16::from_bits(bits).to_f32(), integer as f32);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::gemm::tile::NR;

    #[test]
    fn every_level_unpacks_every_integer() {
        let words: Vec<u32> = (0..16 * NR as u32).map(|i| i.wrapping_mul(0x9e37_79b9)).collect();
        for kind in [WeightType::Int8Weight, WeightType::Int4Weight] {
            let per_word = if kind == WeightType::Int4Weight { 8 } else { 4 };
            for simd in Simd::ALL.into_iter().filter(|simd| simd.is_available()) {
                for (col, cols) in [(0, 64), (32, 32), (48, 16)] {
                    let mut out = vec![0u32; 16 * per_word / 2 * NR];
                    let chunk = Unpack {
                        words: words[col..].as_ptr(),
                        strip: NR,
                        terms: 16 * per_word,
                        cols,
                        out: out[col..].as_mut_ptr(),
                    };
                    // SAFETY: the level is available; words and pairs reach to the end of the 16th row.
                    unsafe { unpack_fn(simd, kind)(&chunk) };
                    for (i, &pair) in out.iter().enumerate() {
                        let (k, column) = (i / NR * 2, i % NR);
                        let integer = |k: usize| {
                            let word = words[k / per_word * NR + column];
                            match per_word {
                                8 => (word << (28 - (k % 2 * 16 + k % 8 / 2 * 4))).cast_signed() >> 28,
                                _ => i32::from(word.to_le_bytes()[k % 4].cast_signed()),
                            }
                        };
                        let found =
                            [pair as u16, (pair >> 16) as u16].map(|b| half::bf16::from_bits(b).to_f32());
                        let is_inside = (col..col + cols).contains(&column);
                        let expected = [k, k + 1].map(|k| if is_inside { integer(k) as f32 } else { 0.0 });
                        assert_eq!(found, expected, "{} {kind:?} [{k}, {column}]", simd.name());
                    }
                }
            }
        }
    }
}
