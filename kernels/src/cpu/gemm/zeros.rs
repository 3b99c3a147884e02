//! Zero points of weights of 4 bits: a checkpoint's integers that are around another number than 8.
//!
//! They are unpacked as all are, with 8 taken off, and what a group's zero is beyond that is taken off the unpacked ones. bf16 holds
//! what comes of it exactly, from -15 to 15. So no level unpacks them in a way of its own, and integers around 8
//! take the time that they took.
//!
//! The zeros of a matrix lie behind its panels, `[panels][groups / 8][NR]`: a word has a column's for eight groups of K, the
//! lowest first.

use super::quantized::{GROUP, num_groups};
use super::tile::NR;
use super::unpack::{LANES, Unpack, join, nibble};
use crate::backend::WeightType;
use crate::cpu::lanes::{Kernel, Lanes};
use crate::tensor_view::{TensorView, ViewDtype};

/// Groups whose zeros are in a word.
const GROUPS: usize = 8;

/// Words of the zeros of a panel.
pub(super) fn panel_words(view: &TensorView<'_>, kind: WeightType) -> usize {
    let are_kept = (view.dtype, kind) == (ViewDtype::Int4, WeightType::Int4Weight);
    let has_zeros = view.scales.as_ref().is_some_and(|scales| scales.zeros.is_some());
    if are_kept && has_zeros { num_groups(view.cols).div_ceil(GROUPS) * NR } else { 0 }
}

/// Fill a panel's with those of the rows from `first_row` on; `out` is zero where nothing is written.
pub(super) fn pack_zeros(view: &TensorView<'_>, first_row: usize, out: &mut [u32]) {
    let scales = view.scales.as_ref().expect("integers have scales");
    for row in first_row..view.rows.min(first_row + NR) {
        for group in 0..num_groups(view.cols) {
            let zero = scales.zero(row, group * GROUP).wrapping_sub(8) & 0xf;
            out[group / GROUPS * NR + row - first_row] |= u32::from(zero) << shift(group);
        }
    }
}

/// Where a group's zeros are in their words.
fn shift(group: usize) -> usize {
    group % GROUPS * 4
}

/// Of a panel's zeros, that of a column for a group, beyond 8.
pub(super) fn zero(panel: &[u32], column: usize, group: usize) -> f32 {
    nibble(panel[group / GROUPS * NR + column], shift(group))
}

/// Takes the zeros of a group off its integers.
pub(super) struct TakeOff {
    /// The words in which the piece's columns have the group's zeros, `[cols]`.
    words: *const u32,
    shift: usize,
    /// `[terms / 2][strip]` pairs of bf16, of which `cols` of each strip are changed.
    pairs: *mut u32,
    /// NR, or in AMX half of it.
    strip: usize,
    terms: usize,
    /// 16, 32 or 64.
    cols: usize,
}

impl TakeOff {
    /// Of a panel's zeros those of a group, from a column on; `unpacked` says of what.
    pub(super) fn new(panel: &[u32], column: usize, group: usize, unpacked: &Unpack) -> TakeOff {
        let words = panel[group / GROUPS * NR + column..].as_ptr();
        let Unpack { strip, terms, cols, out, .. } = *unpacked;
        TakeOff { words, shift: shift(group), pairs: out, strip, terms, cols }
    }
}

impl Kernel for TakeOff {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        for first in (0..self.cols).step_by(LANES) {
            // SAFETY: whoever made the kernel vouches for the pointers; `cols` is a multiple of LANES.
            unsafe {
                let words = self.words.add(first).cast::<[u32; LANES]>().read();
                let zeros = words.map(|word| nibble(word, self.shift));
                for pair in 0..self.terms / 2 {
                    let at = self.pairs.add(pair * self.strip + first).cast::<[u32; LANES]>();
                    let mut pairs = at.read();
                    for (pair, zero) in pairs.iter_mut().zip(zeros) {
                        let [even, odd] = [*pair << 16, *pair & 0xffff_0000].map(f32::from_bits);
                        *pair = join(even - zero, odd - zero);
                    }
                    at.write(pairs);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::gemm::round::bf16_to_f32;
    use crate::cpu::lanes::at_level;
    use crate::cpu::simd::Simd;
    use crate::dtype::bf16_bits;

    /// Every integer less every zero, in whole strips and in pieces of them, and nothing beside these.
    #[test]
    fn every_zero_is_taken_off_every_integer_at_every_level() {
        let integer = |k: usize| (k % 16) as f32 - 8.0;
        let panel: Vec<u32> = (0..2 * NR as u32).map(|i| i.wrapping_mul(0x9e37_79b9)).collect();
        let mut zeros: Vec<f32> = (0..16)
            .flat_map(|group| (0..NR).map(move |column| (column, group)))
            .map(|(column, group)| zero(&panel, column, group))
            .collect();
        zeros.sort_by(f32::total_cmp);
        zeros.dedup();
        assert_eq!(zeros, (-8..8).map(|zero| zero as f32).collect::<Vec<_>>());
        for simd in Simd::ALL.into_iter().filter(|simd| simd.is_available()) {
            for (first, cols, group) in [(0, NR, 0), (32, 32, 7), (48, 16, 9), (0, NR, 15)] {
                let halves = |k: usize| u32::from(bf16_bits(integer(k)));
                let mut pairs: Vec<u32> =
                    (0..16 * NR).map(|i| halves(i / NR * 2) | halves(i / NR * 2 + 1) << 16).collect();
                let take_off = TakeOff {
                    words: panel[group / GROUPS * NR + first..].as_ptr(),
                    shift: shift(group),
                    pairs: pairs[first..].as_mut_ptr(),
                    strip: NR,
                    terms: 32,
                    cols,
                };
                // SAFETY: the level was asked for, and there are sixteen pairs for each column.
                unsafe { at_level(simd, take_off) };
                for (i, &pair) in pairs.iter().enumerate() {
                    let (k, column) = (i / NR * 2, i % NR);
                    let is_inside = (first..first + cols).contains(&column);
                    let zero = if is_inside { zero(&panel, column, group) } else { 0.0 };
                    let found = [pair as u16, (pair >> 16) as u16].map(bf16_to_f32);
                    assert_eq!(
                        found,
                        [k, k + 1].map(|k| integer(k) - zero),
                        "{} [{k}, {column}]",
                        simd.name()
                    );
                }
            }
        }
    }
}
