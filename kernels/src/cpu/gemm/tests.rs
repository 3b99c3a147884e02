//! Products against a plain one in f64, and against themselves in other company.

use super::*;
use crate::backend::{Dtype, INT8_BLOCK};
use crate::quantize::Quantizer;
use crate::tensor_view::{TensorView, ViewDtype};

const KINDS: [WeightType; 5] =
    [WeightType::F32, WeightType::Bf16, WeightType::Int8, WeightType::Int8Weight, WeightType::Int4Weight];

fn levels() -> impl Iterator<Item = Simd> {
    Simd::ALL.into_iter().filter(|simd| simd.is_available())
}

fn pool(threads: usize) -> ThreadPool {
    ThreadPool::new(&[], threads)
}

/// Values in -1..1 from a small generator.
fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn pack(simd: Simd, values: &[f32], rows: usize, cols: usize, kind: WeightType) -> PackedMatrix {
    let bytes = bytemuck::cast_slice(values);
    let view = TensorView::new(ViewDtype::F32, rows, cols, bytes);
    PackedMatrix::pack(simd, view, kind, &pool(1)).unwrap()
}

fn operand(simd: Simd, values: &[f32], rows: usize, cols: usize, kind: WeightType) -> Operand {
    let mut x = Operand::beside(simd, kind);
    x.reset(rows, cols);
    (0..rows).for_each(|row| x.set_row(row, &values[row * cols..][..cols]));
    x
}

fn row_of(x: &Operand, row: usize) -> Vec<f32> {
    let mut values = vec![0.0; x.cols()];
    x.copy_row(row, &mut values);
    values
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// `x · wᵀ` of the rounded numbers in f64, and for each element the sum of its terms' magnitudes.
fn plain_product(x: &Operand, w: &PackedMatrix) -> Vec<(f64, f64)> {
    let weights: Vec<Vec<f32>> = (0..w.rows())
        .map(|row| {
            let mut values = vec![0.0; w.cols()];
            w.copy_row(row, &mut values);
            values
        })
        .collect();
    let mut out = Vec::new();
    for row in 0..x.rows() {
        let mut x = row_of(x, row);
        if w.kind() == WeightType::Int8 {
            for x in x.chunks_mut(INT8_BLOCK) {
                let quantizer = Quantizer::int8_of(x);
                x.iter_mut().for_each(|x| *x = f32::from(quantizer.quantize(*x)) * quantizer.scale);
            }
        }
        for w in &weights {
            let terms = || x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w));
            out.push((terms().sum(), terms().map(f64::abs).sum()));
        }
    }
    out
}

/// What rounding may do to a sum of `k` terms in order: half a unit in the last place of the running sum
/// for each addition, and for each product where it is not fused; the running sum is at most the sum of
/// the magnitudes. An integer times its scale is rounded here and another time there, on both sides at most:
/// four more. The smallest normal numbers make room for flushed denormals.
fn tolerance(k: usize, magnitudes: f64) -> f64 {
    let unit = 2f64.powi(-24);
    magnitudes * 2.0 * (k as f64 + 3.0) * unit + k as f64 * 1.2e-38
}

fn check(found: &[f32], expected: &[(f64, f64)], k: usize, what: &str) {
    assert_eq!(found.len(), expected.len());
    for (i, (&found, &(sum, magnitudes))) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(found) - sum).abs();
        assert!(error <= tolerance(k, magnitudes), "{what}: element {i} is {found}, not {sum}");
    }
}

#[test]
fn products_agree_with_f64_for_odd_shapes() {
    let pool = pool(2);
    for kind in KINDS {
        for simd in levels() {
            for n in [1, 2, 15, 16, 17, 63, 64, 65, 130] {
                for k in [1, 2, 3, 5, 7, 8, 9, 17, 64, 65, 130, 257] {
                    let w = pack(simd, &random(n * k, 1), n, k, kind);
                    for rows in [1, 2, 3, 5, 6, 7, 13, 17] {
                        let x = operand(simd, &random(rows * k, 2), rows, k, kind);
                        let mut out = vec![f32::NAN; rows * n];
                        matmul(simd, &pool, &x, &w, &mut out, false);
                        let what = format!("{} {kind:?} [{rows}, {k}] [{n}, {k}]", simd.name());
                        check(&out, &plain_product(&x, &w), k, &what);
                    }
                }
            }
        }
    }
}

#[test]
fn products_agree_with_f64_when_k_is_walked_in_chunks() {
    let pool = pool(2);
    for kind in KINDS {
        for simd in levels() {
            for (rows, n, k) in [(1, 65, 2049), (7, 64, 4096), (65, 130, 5000), (50, 33, 6145)] {
                let w = pack(simd, &random(n * k, 3), n, k, kind);
                let x = operand(simd, &random(rows * k, 4), rows, k, kind);
                let mut out = vec![f32::NAN; rows * n];
                matmul(simd, &pool, &x, &w, &mut out, false);
                let what = format!("{} {kind:?} [{rows}, {k}] [{n}, {k}]", simd.name());
                check(&out, &plain_product(&x, &w), k, &what);
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_company() {
    const ROWS: usize = 1024;
    let (one, two) = (pool(1), pool(2));
    for kind in KINDS {
        for simd in levels() {
            // K beyond one chunk in both number types, and columns that end inside of a panel.
            for (n, k) in [(80, 2312), (200, 96), (17, 33)] {
                let rows_step = if k > 2000 { 61 } else { 1 };
                let w = pack(simd, &random(n * k, 5), n, k, kind);
                let values = random(ROWS * k, 6);
                let all = operand(simd, &values, ROWS, k, kind);
                let mut expected = vec![0.0; ROWS * n];
                for row in 0..ROWS {
                    let x = operand(simd, &values[row * k..][..k], 1, k, kind);
                    matmul(simd, &one, &x, &w, &mut expected[row * n..][..n], false);
                }
                let mut out = vec![0.0; ROWS * n];
                matmul(simd, &two, &all, &w, &mut out, false);
                assert!(bits(&out) == bits(&expected), "{} {kind:?} k = {k}: all rows", simd.name());
                let mut x = Operand::beside(simd, kind);
                for rows in (1..=200).step_by(rows_step).chain([255, 511, 1000]) {
                    let first = ROWS - rows; // So that a row's place in its tile changes.
                    x.reset(rows, k);
                    (0..rows).for_each(|row| x.set_row(row, &values[(first + row) * k..][..k]));
                    let out = &mut out[..rows * n];
                    matmul(simd, &two, &x, &w, out, false);
                    let same = bits(out) == bits(&expected[first * n..]);
                    assert!(same, "{} {kind:?} k = {k}: {rows} rows", simd.name());
                }
            }
        }
    }
}

#[test]
fn every_number_of_rows_up_to_1024_gives_the_bits_of_one() {
    const ROWS: usize = 1024;
    let (n, k) = (24, 40);
    let pool = pool(2);
    for kind in KINDS {
        for simd in levels() {
            let w = pack(simd, &random(n * k, 7), n, k, kind);
            let values = random(ROWS * k, 8);
            let mut expected = vec![0.0; ROWS * n];
            for row in 0..ROWS {
                let x = operand(simd, &values[row * k..][..k], 1, k, kind);
                matmul(simd, &pool, &x, &w, &mut expected[row * n..][..n], false);
            }
            let mut x = Operand::beside(simd, kind);
            let mut out = vec![0.0; ROWS * n];
            for rows in 1..=ROWS {
                x.reset(rows, k);
                (0..rows).for_each(|row| x.set_row(row, &values[row * k..][..k]));
                let out = &mut out[..rows * n];
                matmul(simd, &pool, &x, &w, out, false);
                assert!(bits(out) == bits(&expected[..rows * n]), "{} {kind:?}: {rows} rows", simd.name());
            }
        }
    }
}

/// Where x is larger than a cache, a unit of AMX takes several panels, chunk by chunk.
#[test]
fn units_of_several_panels_give_the_bits_of_one_row() {
    let (rows, n, k) = (40, 300, 17_000);
    let pool = pool(1);
    for simd in levels() {
        let kind = WeightType::Bf16;
        let w = pack(simd, &random(n * k, 26), n, k, kind);
        let values = random(rows * k, 27);
        let mut out = vec![0.0; rows * n];
        matmul(simd, &pool, &operand(simd, &values, rows, k, kind), &w, &mut out, false);
        let mut alone = vec![0.0; n];
        for row in 0..rows {
            let x = operand(simd, &values[row * k..][..k], 1, k, kind);
            matmul(simd, &pool, &x, &w, &mut alone, false);
            assert!(bits(&alone) == bits(&out[row * n..][..n]), "{} row {row}", simd.name());
        }
    }
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    let pools = [pool(1), pool(2), pool(3)];
    for kind in KINDS {
        for simd in levels() {
            for (rows, n, k) in [(1, 1000, 300), (4, 576, 576), (70, 192, 576), (13, 100, 5000)] {
                let w = pack(simd, &random(n * k, 9), n, k, kind);
                let x = operand(simd, &random(rows * k, 10), rows, k, kind);
                let results = pools.each_ref().map(|pool| {
                    let mut out = vec![0.5; rows * n];
                    matmul(simd, pool, &x, &w, &mut out, true);
                    bits(&out)
                });
                assert!(results[0] == results[1] && results[0] == results[2], "{} {kind:?}", simd.name());
            }
        }
    }
}

#[test]
fn accumulate_adds_the_finished_product() {
    let pool = pool(2);
    for kind in KINDS {
        for simd in levels() {
            for (rows, n, k) in [(1, 70, 9), (9, 64, 64), (20, 100, 3000)] {
                let w = pack(simd, &random(n * k, 11), n, k, kind);
                let x = operand(simd, &random(rows * k, 12), rows, k, kind);
                let before = random(rows * n, 13);
                let (mut product, mut sum) = (vec![0.0; rows * n], before.clone());
                matmul(simd, &pool, &x, &w, &mut product, false);
                matmul(simd, &pool, &x, &w, &mut sum, true);
                let expected: Vec<f32> = before.iter().zip(&product).map(|(b, p)| b + p).collect();
                assert!(bits(&sum) == bits(&expected), "{} {kind:?} k = {k}", simd.name());
            }
        }
    }
}

#[test]
fn swiglu_agrees_with_f64() {
    let pool = pool(2);
    for kind in KINDS {
        for simd in levels() {
            for (rows, n, k) in
                [(1, 1, 1), (2, 17, 5), (6, 64, 64), (7, 100, 130), (65, 192, 1200), (20, 70, 3000)]
            {
                // Gates of up to about 8, where silu bends.
                let scale = 8.0 / (k as f32).sqrt();
                let gate = random(n * k, 14).iter().map(|g| g * scale).collect::<Vec<_>>();
                let (gate, up) = (pack(simd, &gate, n, k, kind), pack(simd, &random(n * k, 15), n, k, kind));
                let x = operand(simd, &random(rows * k, 16), rows, k, kind);
                let mut out = Operand::beside(simd, kind);
                swiglu(simd, &pool, &x, &gate, &up, &mut out);
                assert_eq!((out.rows(), out.cols()), (rows, n));
                let (g, u) = (plain_product(&x, &gate), plain_product(&x, &up));
                for row in 0..rows {
                    for (col, found) in row_of(&out, row).into_iter().enumerate() {
                        let ((g, g_terms), (u, u_terms)) = (g[row * n + col], u[row * n + col]);
                        let silu = g / (1.0 + (-g).exp());
                        // silu has a slope below 1.1; exp, sum, quotient and product add a few units; the
                        // result is rounded once more, by at most 2⁻⁸ of itself in bf16.
                        let rounding = if kind.operands() == Dtype::Bf16 { 2f64.powi(-8) } else { 0.0 };
                        let bound = 1.1 * tolerance(k, g_terms) * u.abs()
                            + tolerance(k, u_terms) * silu.abs()
                            + (silu * u).abs() * (rounding + 8.0 * 2f64.powi(-24))
                            + 1e-37;
                        let error = (f64::from(found) - silu * u).abs();
                        assert!(error <= bound, "{} {kind:?}: {found}, not {}", simd.name(), silu * u);
                    }
                }
            }
        }
    }
}

#[test]
fn swiglu_gives_a_row_the_same_bits_in_any_company() {
    let (rows, n, k) = (77, 100, 600);
    let (one, three) = (pool(1), pool(3));
    for kind in KINDS {
        for simd in levels() {
            for k in [k, 2500] {
                let (gate, up) =
                    (pack(simd, &random(n * k, 17), n, k, kind), pack(simd, &random(n * k, 18), n, k, kind));
                let values = random(rows * k, 19);
                let mut all = Operand::beside(simd, kind);
                swiglu(simd, &three, &operand(simd, &values, rows, k, kind), &gate, &up, &mut all);
                let mut single = Operand::beside(simd, kind);
                for row in 0..rows {
                    let x = operand(simd, &values[row * k..][..k], 1, k, kind);
                    swiglu(simd, &one, &x, &gate, &up, &mut single);
                    assert!(bits(&row_of(&single, 0)) == bits(&row_of(&all, row)), "{}", simd.name());
                }
            }
        }
    }
}

#[test]
fn zeros_and_large_values_come_through() {
    let pool = pool(1);
    let (rows, n, k) = (7, 66, 30);
    for kind in KINDS {
        for simd in levels() {
            let w = pack(simd, &random(n * k, 20), n, k, kind);
            let mut out = vec![f32::NAN; rows * n];
            matmul(simd, &pool, &operand(simd, &vec![0.0; rows * k], rows, k, kind), &w, &mut out, false);
            assert!(out.iter().all(|&v| v == 0.0));

            // 2¹⁰⁰ · 2²⁰ is finite, 2¹⁰⁰ · 2⁶⁰ is not.
            let w = pack(simd, &vec![2f32.powi(20); n * k], n, k, kind);
            let x = operand(simd, &vec![2f32.powi(100); rows * k], rows, k, kind);
            matmul(simd, &pool, &x, &w, &mut out, false);
            let product = 30.0 * 2f32.powi(120);
            // 2²⁰ and 2¹⁰⁰ are no multiples of their scales, of which each may be off by half a unit.
            let bound = if kind == kind.operands().into() { 0.0 } else { product * 2f32.powi(-21) };
            assert!(out.iter().all(|&v| (v - product).abs() <= bound), "{kind:?}: {}", out[0]);
            let w = pack(simd, &vec![2f32.powi(60); n * k], n, k, kind);
            matmul(simd, &pool, &x, &w, &mut out, false);
            assert!(out.iter().all(|&v| v == f32::INFINITY));
        }
    }
}

#[test]
fn a_row_that_is_not_finite_spoils_no_other() {
    let pool = pool(1);
    let (rows, n, k) = (8, 70, 30);
    for kind in KINDS {
        for simd in levels() {
            let w = pack(simd, &random(n * k, 21), n, k, kind);
            let mut values = random(rows * k, 22);
            values[k] = f32::NAN;
            values[2 * k + 1] = f32::INFINITY;
            let x = operand(simd, &values, rows, k, kind);
            let mut out = vec![0.0; rows * n];
            matmul(simd, &pool, &x, &w, &mut out, false);
            for (row, out) in out.chunks(n).enumerate() {
                match row {
                    1 => assert!(out.iter().all(|v| v.is_nan())),
                    2 if kind == kind.operands().into() => assert!(out.iter().all(|v| v.is_infinite())),
                    // Quantised it is NaN, and so is its product with the integer 0.
                    2 => assert!(out.iter().all(|v| !v.is_finite())),
                    _ => assert!(out.iter().all(|v| v.is_finite())),
                }
            }
            // And an operand that held NaN in a wider shape has zeros in its padding again.
            let mut h = Operand::beside(simd, kind);
            swiglu(simd, &pool, &x, &w, &w, &mut h);
            swiglu(simd, &pool, &operand(simd, &values[3 * k..], 5, k, kind), &w, &w, &mut h);
            let down = pack(simd, &random(3 * n, 23), 3, n, kind);
            let mut out = vec![0.0; 5 * 3];
            matmul(simd, &pool, &h, &down, &mut out, false);
            assert!(out.iter().all(|v| v.is_finite()));
        }
    }
}

#[test]
fn empty_shapes_are_no_trouble() {
    let pool = pool(2);
    for kind in KINDS {
        for simd in levels() {
            let w = pack(simd, &[], 3, 0, kind);
            let mut out = vec![1.0; 6];
            matmul(simd, &pool, &operand(simd, &[], 2, 0, kind), &w, &mut out, false);
            assert_eq!(out, [0.0; 6]);
            let w = pack(simd, &[1.0; 6], 3, 2, kind);
            matmul(simd, &pool, &operand(simd, &[], 0, 2, kind), &w, &mut [], false);
            let w = pack(simd, &[], 0, 2, kind);
            matmul(simd, &pool, &operand(simd, &[1.0; 4], 2, 2, kind), &w, &mut [], false);
        }
    }
}

#[test]
fn integers_give_the_same_bits_at_every_level() {
    let pool = pool(2);
    for (rows, n, k) in [(1, 70, 9), (7, 130, 4096), (13, 66, 5000), (3, 64, 9000), (0, 5, 7)] {
        let x = operand(Simd::detect(), &random(rows * k, 25), rows, k, WeightType::Int8);
        let mut first = None;
        for simd in levels() {
            let w = pack(simd, &random(n * k, 24), n, k, WeightType::Int8);
            let mut out = vec![f32::NAN; rows * n];
            matmul(simd, &pool, &x, &w, &mut out, false);
            let expected = first.get_or_insert_with(|| bits(&out));
            assert!(bits(&out) == *expected, "{} [{rows}, {k}] [{n}, {k}]", simd.name());
        }
    }
}

/// Beyond 2³¹ / (255 · 127) terms a sum of integers would overflow.
#[test]
fn integers_do_not_overflow_for_any_k() {
    let (n, k) = (2, 425_984);
    let pool = pool(1);
    for simd in levels() {
        for sign in [1.0, -1.0] {
            let w = pack(simd, &vec![sign; n * k], n, k, WeightType::Int8);
            let x = operand(simd, &vec![3.0; k], 1, k, WeightType::Int8);
            let mut out = vec![0.0; n];
            matmul(simd, &pool, &x, &w, &mut out, false);
            let expected = 3.0 * sign * k as f32;
            assert!(
                out.iter().all(|v| (v - expected).abs() <= 1e-5 * expected.abs()),
                "{}: {}",
                simd.name(),
                out[0]
            );
        }
    }
}

#[test]
fn an_operand_that_is_written_again_is_quantised_again() {
    let pool = pool(2);
    let w = pack(Simd::detect(), &[1.0; 3 * 10], 3, 10, WeightType::Int8);
    let mut x = operand(Simd::detect(), &[1.0; 20], 2, 10, WeightType::Int8);
    let mut out = vec![0.0; 6];
    for value in [1.0f32, -2.0, 0.5] {
        (0..2).for_each(|row| x.set_row(row, &[value; 10]));
        matmul(Simd::detect(), &pool, &x, &w, &mut out, false);
        assert!(out.iter().all(|&v| (v - 10.0 * value).abs() < 1e-4), "{value}: {}", out[0]);
    }
}
