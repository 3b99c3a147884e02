//! Cuts, of all levels and types.

use super::*;
use crate::cpu::gemm::pack::padded_terms;
use crate::cpu::simd::Simd;

/// Levels that differ in their tiles, with the types of weights.
const LEVELS: [(Simd, WeightType); 13] = [
    (Simd::Avx2, WeightType::Bf16),
    (Simd::Avx2, WeightType::Int8),
    (Simd::Avx2, WeightType::Int8Weight),
    (Simd::Avx2, WeightType::Int4Weight),
    (Simd::Avx512, WeightType::F32),
    (Simd::Avx512, WeightType::Bf16),
    (Simd::Avx512, WeightType::Int8),
    (Simd::Avx512, WeightType::Int8Weight),
    (Simd::Avx512, WeightType::Int4Weight),
    (Simd::Amx, WeightType::Bf16),
    (Simd::Amx, WeightType::Int8),
    (Simd::Amx, WeightType::Int8Weight),
    (Simd::Amx, WeightType::Int4Weight),
];

/// Caches of all sizes, the usual ones first.
const CACHES: [CoreCaches; 4] = [
    CoreCaches { l1: 32 << 10, l2: 1 << 20 },
    CoreCaches { l1: 48 << 10, l2: 2 << 20 },
    CoreCaches { l1: 32 << 10, l2: 512 << 10 },
    CoreCaches { l1: 16 << 10, l2: 128 << 10 },
];

/// A product that gives f32.
fn shape(rows: usize, n: usize, k: usize, kind: WeightType) -> Shape {
    Shape { rows, n, k, kind, num_matrices: 1, output_bytes: 4 }
}

/// One by two matrices, which gives the next one's x.
fn gated(rows: usize, n: usize, k: usize, kind: WeightType) -> Shape {
    Shape { num_matrices: 2, output_bytes: tile_bytes(kind.operands().into()), ..shape(rows, n, k, kind) }
}

fn avx512(kind: WeightType) -> Geometry {
    Geometry::new(Simd::Avx512, kind)
}

#[test]
fn every_element_belongs_to_one_unit() {
    for rows in [1, 2, 6, 7, 13, 64, 100, 500] {
        for (n, k, num_matrices) in [(1, 8, 1), (64, 64, 2), (200, 3000, 1), (576, 1536, 2), (65, 9000, 1)] {
            for (threads, (simd, kind)) in [1, 2, 3, 64].into_iter().flat_map(|t| LEVELS.map(|l| (t, l))) {
                let (geometry, caches) = (Geometry::new(simd, kind), CACHES[threads % CACHES.len()]);
                let shape = if num_matrices == 1 { shape } else { gated };
                let shape = shape(rows, n, padded_terms(kind, k), kind);
                let plan = Plan::new(shape, geometry, caches, threads);
                let padded = n.next_multiple_of(NR);
                let mut seen = vec![0; rows * padded];
                for unit in (0..plan.num_units()).map(|i| plan.unit(i)) {
                    assert!((1..=geometry.group_tiles).contains(&unit.tiles.len()), "{plan:?} {unit:?}");
                    assert!(unit.tiles.len() * unit.pieces.len() <= plan.unit_tiles(), "{plan:?} {unit:?}");
                    for tile in unit.tiles.clone() {
                        assert!((1..=geometry.rows).contains(&plan.rows(tile).len()), "{plan:?} {unit:?}");
                        for row in plan.rows(tile) {
                            let pieces = unit.pieces.clone();
                            let cols = pieces.flat_map(|piece| plan.cols(piece));
                            cols.for_each(|col| seen[row * padded + col] += 1);
                        }
                    }
                }
                let is_right = |(i, &count): (usize, &i32)| count == 1 || (count == 0 && i % padded >= n);
                assert!(seen.iter().enumerate().all(is_right), "{plan:?}");
                assert!(plan.num_chunks * plan.chunk >= k && (plan.num_chunks - 1) * plan.chunk < k);
                assert_eq!(plan.chunk % geometry.step, 0);
            }
        }
    }
}

#[test]
fn sweeps_stay_inside_the_caches() {
    for ((k, (simd, kind)), caches) in [576, 2048, 8192, 106_496]
        .into_iter()
        .flat_map(|k| LEVELS.map(|level| (k, level)))
        .flat_map(|shape| CACHES.map(|caches| (shape, caches)))
    {
        let geometry = Geometry::new(simd, kind);
        let plan = Plan::new(shape(512, 4096, k, kind), geometry, caches, 2);
        let term_bytes = geometry.strip * tile_bytes(kind);
        let most = match kind {
            // Blocks have their own scales, and AMX alone goes on with a part of one.
            WeightType::Int8 if !geometry.is_amx => BLOCK * term_bytes,
            _ => Budget::new(caches, &geometry).sweep_bytes,
        };
        let chunk = plan.chunk.min(k) * term_bytes;
        assert!(chunk <= most + geometry.step * term_bytes, "{caches:?} {plan:?}");
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn a_lone_block_of_amx_has_longer_sweeps_which_end_while_l2_holds_two_of_them() {
    for (kind, k) in [(WeightType::Bf16, 16_384), (WeightType::Int8, BLOCK)] {
        let geometry = Geometry::new(Simd::Amx, kind);
        let budget = Budget::new(CACHES[1], &geometry);
        let sweep = |rows| {
            Plan::new(shape(rows, 1024, k, kind), geometry, CACHES[1], 2).chunk
                * geometry.strip
                * tile_bytes(kind)
        };
        for rows in [1, 4, 16, 32] {
            let found = sweep(rows);
            assert!(
                (budget.sweep_bytes + 1..=budget.lone_sweep_bytes).contains(&found),
                "{rows} rows: {found}"
            );
        }
        assert!(sweep(33) <= budget.sweep_bytes, "{} with 33 rows", sweep(33));
    }
}

#[test]
fn cuts_follow_the_caches_where_it_is_theirs_to_say() {
    let kind = WeightType::Bf16;
    let shape = shape(512, 576, 2048, kind);
    let [usual, _, half, _] = CACHES.map(|caches| Plan::new(shape, avx512(kind), caches, 2));
    assert_eq!([usual.num_chunks, half.num_chunks], [1, 2]);
    assert_eq!([usual.num_groups, half.num_groups], [86, 11]);
    let shape = Shape { k: 576, ..shape };
    let [usual, _, half, _] = CACHES.map(|caches| Plan::new(shape, avx512(kind), caches, 2));
    assert_eq!([usual.groups_per_block, half.groups_per_block], [43, 22]);
}

#[test]
#[cfg(target_arch = "x86_64")]
fn units_of_amx_take_several_pieces_of_every_type_where_rows_are_long() {
    for kind in [WeightType::Bf16, WeightType::Int8, WeightType::Int8Weight, WeightType::Int4Weight] {
        for (num_matrices, caches) in [(1, CACHES[0]), (2, CACHES[0]), (1, CACHES[1]), (2, CACHES[1])] {
            let shape = if num_matrices == 1 { shape } else { gated };
            let shape = shape(40, 300, 17_024, kind);
            let plan = Plan::new(shape, Geometry::new(Simd::Amx, kind), caches, 1);
            assert!(plan.unit_pieces > 1, "{plan:?}");
        }
    }
}

#[test]
fn what_is_unpacked_serves_a_group_of_tiles() {
    let shape = shape(96, 640, 576, WeightType::Int4Weight);
    let plan = Plan::new(shape, avx512(WeightType::Int4Weight), CACHES[0], 1);
    assert_eq!((plan.num_units(), plan.unit(0).tiles), (20, 0..8));
}

#[test]
fn a_narrow_product_is_cut_fine_enough_for_two_threads() {
    let kind = WeightType::Bf16;
    let plan = |rows, n, k| Plan::new(shape(rows, n, k, kind), avx512(kind), CACHES[0], 2);
    // SmolLM2's k projection for 16 rows: 3 panels times 3 tiles would be 5 units against 4.
    assert_eq!(plan(16, 192, 576).num_units(), 18);
    // A single tile reads its panels whole.
    assert_eq!(plan(4, 192, 576).num_units(), 3);
    // A tiny one is not worth a second thread.
    assert_eq!(plan(1, 64, 64).num_shares, 1);
}

#[test]
fn a_gated_piece_has_whole_lines_of_bf16() {
    let cols = |shape, geometry| Plan::new(shape, geometry, CACHES[0], 16).piece_cols;
    for kind in [WeightType::Bf16, WeightType::Int8, WeightType::Int8Weight, WeightType::Int4Weight] {
        // With 16 threads pieces are as narrow as they may be.
        assert_eq!(cols(shape(16, 192, 576, kind), avx512(kind)), 16);
        assert_eq!(cols(gated(16, 192, 576, kind), avx512(kind)), 32);
    }
    let kind = WeightType::F32;
    assert_eq!(cols(gated(16, 192, 576, kind), avx512(kind)), 16);
    // What a level keeps in f32 has a line in 16 columns.
    let wide = Shape { output_bytes: 4, ..gated(16, 192, 576, WeightType::Bf16) };
    assert_eq!(cols(wide, Geometry::new(Simd::Avx2, WeightType::Bf16)), 16);
}
