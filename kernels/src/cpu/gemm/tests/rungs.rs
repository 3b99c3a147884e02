//! Products with parts of them left out.

use super::*;

#[test]
fn the_top_rung_is_the_product_and_those_below_write_nothing() {
    let pool = pool(2);
    for kind in [WeightType::Int8Weight, WeightType::Int4Weight] {
        for simd in levels() {
            for (rows, n, k) in [(1, 130, 257), (1, 64, 2049), (4, 65, 600), (6, 200, 64)] {
                let w = pack(simd, &random(n * k, 5), n, k, kind);
                let x = operand(simd, &random(rows * k, 6), rows, k, kind);
                let mut product = vec![f32::NAN; rows * n];
                matmul(simd, &pool, &x, &w, &mut product, false);
                for rung in Rung::ALL {
                    let mut out = vec![f32::NAN; rows * n];
                    let what = format!("{} {kind:?} [{rows}, {k}] [{n}, {k}] {rung:?}", simd.name());
                    assert!(climb(simd, &pool, &x, &w, rung, &mut out), "{what}");
                    match rung {
                        Rung::Whole => assert_eq!(bits(&out), bits(&product), "{what}"),
                        _ => assert!(out.iter().all(|value| value.is_nan()), "{what}"),
                    }
                }
            }
        }
    }
}

#[test]
fn weights_that_are_not_narrow_have_no_rungs() {
    for kind in [WeightType::F32, WeightType::Bf16] {
        let simd = Simd::detect();
        let (w, x) = (pack(simd, &[1.0; 64], 8, 8, kind), operand(simd, &[1.0; 8], 1, 8, kind));
        assert!(!climb(simd, &pool(1), &x, &w, Rung::Read, &mut [0.0; 8]), "{kind:?}");
    }
}
