//! Products with parts of them left out.

use super::*;
use driver::Rung::{Multiplied, Read, Unpacked, Whole, Zeros};

/// `[rows, n, k]`: of one tile, of few, and of so many that widened weights pay.
const SHAPES: [[usize; 3]; 6] =
    [[1, 130, 257], [1, 64, 2049], [4, 65, 600], [6, 200, 64], [20, 70, 600], [64, 130, 600]];

fn product<'a>(simd: Simd, pool: &ThreadPool, x: &'a Operand, w: &'a PackedMatrix) -> Product<'a, 1> {
    Product::new(simd, pool, Input { numbers: x, integers: None }, [w])
}

#[test]
fn the_top_rung_is_the_product_and_those_below_write_nothing() {
    let pool = pool(2);
    for kind in [WeightType::F32, WeightType::Bf16, WeightType::Int8Weight, WeightType::Int4Weight] {
        for (simd, [rows, n, k]) in levels().flat_map(|simd| SHAPES.map(|shape| (simd, shape))) {
            let w = pack(simd, &random(n * k, 5), n, k, kind);
            let x = operand(simd, &random(rows * k, 6), rows, k, kind);
            let mut whole = vec![f32::NAN; rows * n];
            matmul(simd, &pool, &x, &w, &mut whole, false);
            let rungs = product(simd, &pool, &x, &w).rungs();
            assert_eq!((rungs.first(), rungs.last()), (Some(&Read), Some(&Whole)));
            for &rung in rungs {
                let mut out = vec![f32::NAN; rows * n];
                let what = format!("{} {kind:?} [{rows}, {k}] [{n}, {k}] {rung:?}", simd.name());
                product(simd, &pool, &x, &w).climb(&pool, rung, &mut out);
                match rung {
                    Whole => assert_eq!(bits(&out), bits(&whole), "{what}"),
                    _ => assert!(out.iter().all(|value| value.is_nan()), "{what}"),
                }
            }
        }
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn a_part_can_be_left_out_where_it_is_one() {
    let rungs_of = |simd, kind, rows| {
        let (w, x) =
            (pack(simd, &[1.0; 512], 64, 8, kind), operand(simd, &vec![1.0; rows * 8], rows, 8, kind));
        product(simd, &pool(1), &x, &w).rungs()
    };
    for simd in levels() {
        assert!(rungs_of(simd, WeightType::Int8, 1).is_empty(), "{}", simd.name());
        assert_eq!(rungs_of(simd, WeightType::F32, 1), [Read, Multiplied, Whole], "{}", simd.name());
        for kind in [WeightType::Int8Weight, WeightType::Int4Weight] {
            assert!(rungs_of(simd, kind, 1).starts_with(&[Read, Unpacked, Multiplied]), "{}", simd.name());
        }
    }
    if Simd::Avx2.is_available() {
        let bf16 = |rows| rungs_of(Simd::Avx2, WeightType::Bf16, rows);
        assert_eq!(bf16(4), [Read, Unpacked, Multiplied, Whole]);
        assert_eq!(bf16(20), [Read, Multiplied, Whole], "what is widened serves too few");
        assert_eq!(bf16(64), [Read, Unpacked, Zeros, Multiplied, Whole]);
    }
}
