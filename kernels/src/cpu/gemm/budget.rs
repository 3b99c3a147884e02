//! How much of a core's caches the parts of a product get.
//!
//! Every share is a sum that comes out at the sizes which were measured, on processors with 1 MiB of L2 and 32 KiB of L1, or
//! with AMX and 2 MiB and 48 KiB; elsewhere it is as large a part. No result depends on one.

use super::quantized::GROUP;
use super::tile::{Geometry, MR, PIECE_COLS};
use super::unpack::{MOST_UNPACKED_BYTES, MOST_WIDENED_TERMS};
use crate::cpu::caches::CoreCaches;

/// What AMX leaves of an L1 cache beside the weights that it sweeps over: 4 KiB for a block's sums on their way out of the tile
/// registers, and as much for the lines of x that stream past.
const BESIDE_AMX_SWEEP_BYTES: usize = (4 << 10) + (4 << 10);

/// Most pieces of a unit, whose sums wait together.
const MAX_UNIT_PIECES: usize = 8;

/// Terms that are unpacked to bf16 at a time below AMX, at most: 64 pairs of 64 columns, 16 KiB, with which L1 caches of 32 KiB
/// and of 48 were measured.
const MOST_UNPACKED_TERMS: usize = 128;

/// Shares of the caches, by a level's tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Budget {
    /// Weights that are swept over before the next ones.
    pub(super) sweep_bytes: usize,
    /// The same where a block of AMX has all rows; the other levels have no blocks.
    pub(super) lone_sweep_bytes: usize,
    /// Rows of x that go over all panels before the next ones.
    pub(super) block_bytes: usize,
    /// Most pieces of a unit.
    pub(super) unit_pieces: usize,
    /// Terms that are unpacked to bf16 at a time.
    pub(super) unpacked_terms: usize,
    /// Terms that are widened to f32 at a time, whole groups of K.
    pub(super) widened_terms: usize,
}

impl Budget {
    /// The shares of caches.
    pub(super) fn new(caches: CoreCaches, geometry: &Geometry) -> Self {
        match geometry.is_amx {
            true => Self::of_amx(caches, geometry),
            false => Self::below_amx(caches, geometry),
        }
    }

    /// L2 has weights and x. Of 1 MiB:
    /// * 256 KiB, a quarter, for the weights that are swept over;
    /// * 256 KiB for those of the next sweep, which are prefetched meanwhile;
    /// * 384 KiB, three eighths, for the rows of x that are swept with;
    /// * 128 KiB for sums and results.
    ///
    /// L1 has what is unpacked. Of 32 KiB:
    /// * 16 KiB, half of it, for what is unpacked to bf16, and the rest for x and sums;
    /// * or 25 KiB, four fifths, for what is widened to f32 and for a tile's rows of x: 18 KiB for 16 columns of 288 terms and 7 for
    ///   6 rows.
    fn below_amx(caches: CoreCaches, geometry: &Geometry) -> Self {
        let unpacked_terms = caches.l1 / 2 / bf16_bytes(geometry.strip);
        let widened_terms = caches.l1 / 5 * 4 / ((PIECE_COLS + MR) * size_of::<f32>());
        Self {
            sweep_bytes: caches.l2 / 4,
            lone_sweep_bytes: 0,
            block_bytes: caches.l2 / 8 * 3,
            unit_pieces: 1,
            unpacked_terms: whole(unpacked_terms.min(MOST_UNPACKED_TERMS), geometry.step),
            widened_terms: whole(widened_terms.min(MOST_WIDENED_TERMS), GROUP),
        }
    }

    /// L1 has weights. Of 48 KiB:
    /// * 40 KiB, all but 8, for those that are swept over. x streams past them from L2, 2 KiB for every 64 cycles of products;
    ///   shorter sweeps store and load sums more often;
    /// * or 32 KiB, two thirds, for what is unpacked: 256 pairs of 32 columns.
    ///
    /// L2 has x. Of 2 MiB:
    /// * 1 MiB, half of it, for rows of x that sweeps go over before the next ones. Where one tile's rows are more, a unit takes
    ///   several pieces, chunk by chunk: x is read from further away once for all of them;
    /// * 256 KiB, an eighth, for the sums of those pieces: eight of 256 rows by 32 columns in f32;
    /// * where one block has all rows, 64 KiB, a thirty-second, for the weights of a sweep, whose time is that of memory, and as much
    ///   for those of the next one. Sweeps of 20 KiB are no faster than without asking, and lines of 1 MiB leave L2 before they are
    ///   used (60 % of the speed of memory for 88).
    fn of_amx(caches: CoreCaches, geometry: &Geometry) -> Self {
        let unpacked_bytes = (caches.l1 / 3 * 2).min(MOST_UNPACKED_BYTES);
        let unit_pieces = caches.l2 / 8 / (geometry.sums() * size_of::<f32>());
        Self {
            sweep_bytes: caches.l1 - BESIDE_AMX_SWEEP_BYTES,
            lone_sweep_bytes: caches.l2 / 32,
            block_bytes: caches.l2 / 2,
            unit_pieces: unit_pieces.clamp(1, MAX_UNIT_PIECES),
            unpacked_terms: whole(unpacked_bytes / bf16_bytes(geometry.strip), geometry.step),
            widened_terms: 0, // Nothing is.
        }
    }
}

/// Bytes of a term of so many columns in bf16.
const fn bf16_bytes(columns: usize) -> usize {
    2 * columns
}

/// The most that is a multiple of `step`, but one at least.
fn whole(terms: usize, step: usize) -> usize {
    (terms / step).max(1) * step
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::WeightType;
    use crate::cpu::simd::Simd;

    const KIB: usize = 1 << 10;

    fn budget(simd: Simd, kind: WeightType, l1: usize, l2: usize) -> Budget {
        Budget::new(CoreCaches { l1, l2 }, &Geometry::new(simd, kind))
    }

    #[test]
    fn shares_are_those_that_were_measured_where_they_were() {
        for kind in [WeightType::Bf16, WeightType::Int8, WeightType::Int8Weight, WeightType::Int4Weight] {
            let below_amx = Budget {
                sweep_bytes: 256 * KIB,
                lone_sweep_bytes: 0,
                block_bytes: 384 * KIB,
                unit_pieces: 1,
                unpacked_terms: 128,
                widened_terms: 288,
            };
            for simd in [Simd::Portable, Simd::Avx2, Simd::Avx512] {
                for l1 in [32, 48] {
                    assert_eq!(budget(simd, kind, l1 * KIB, 1024 * KIB), below_amx, "{}", simd.name());
                }
            }
            #[cfg(target_arch = "x86_64")]
            assert_eq!(
                budget(Simd::Amx, kind, 48 * KIB, 2048 * KIB),
                Budget {
                    sweep_bytes: 40 * KIB,
                    lone_sweep_bytes: 64 * KIB,
                    block_bytes: 1024 * KIB,
                    unit_pieces: 8,
                    unpacked_terms: 512,
                    widened_terms: 0,
                }
            );
        }
    }

    #[test]
    fn shares_are_inside_of_caches_of_any_size() {
        for (l1, l2) in [(16, 128), (32, 256), (32, 512), (48, 1280), (64, 1024), (128, 3072)] {
            for simd in Simd::ALL {
                let found = budget(simd, WeightType::Int8Weight, l1 * KIB, l2 * KIB);
                let geometry = Geometry::new(simd, WeightType::Int8Weight);
                let (in_l1, in_l2) = match geometry.is_amx {
                    true => (found.sweep_bytes, found.block_bytes + found.unit_pieces * geometry.sums() * 4),
                    false => (
                        found.widened_terms * (PIECE_COLS + MR) * 4,
                        2 * found.sweep_bytes + found.block_bytes,
                    ),
                };
                assert!(2 * found.lone_sweep_bytes < l2 * KIB);
                assert!(in_l1 < l1 * KIB && in_l2 < l2 * KIB, "{} {found:?}", simd.name());
                assert!(found.unpacked_terms * bf16_bytes(geometry.strip) < l1 * KIB, "{found:?}");
                assert!(found.unpacked_terms.is_multiple_of(geometry.step), "{found:?}");
            }
        }
        assert_eq!(
            budget(Simd::Avx2, WeightType::Bf16, 32 * KIB, 512 * KIB),
            Budget {
                sweep_bytes: 128 * KIB,
                lone_sweep_bytes: 0,
                block_bytes: 192 * KIB,
                unit_pieces: 1,
                unpacked_terms: 128,
                widened_terms: 288,
            }
        );
    }
}
