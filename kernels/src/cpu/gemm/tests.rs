//! Products against a plain one in f64; in `same_bits` against themselves, in `rungs` with parts left out.

mod rungs;
mod same_bits;

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
