//! Products against a plain one in f64, and against themselves in other company.

use super::*;
use crate::backend::{Dtype, TensorView, ViewDtype};

const DTYPES: [Dtype; 2] = [Dtype::F32, Dtype::Bf16];

fn levels() -> impl Iterator<Item = Simd> {
    [Simd::Portable, Simd::Avx2, Simd::Avx512].into_iter().filter(|simd| simd.is_available())
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

fn pack(values: &[f32], rows: usize, cols: usize, dtype: Dtype) -> PackedMatrix {
    let bytes = bytemuck::cast_slice(values);
    PackedMatrix::pack(TensorView { dtype: ViewDtype::F32, rows, cols, bytes }, dtype, &pool(1)).unwrap()
}

fn operand(values: &[f32], rows: usize, cols: usize, dtype: Dtype) -> Operand {
    let mut x = Operand::new(dtype);
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
        let x = row_of(x, row);
        for w in &weights {
            let terms = || x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w));
            out.push((terms().sum(), terms().map(f64::abs).sum()));
        }
    }
    out
}

/// What rounding may do to a sum of `k` terms in order: half a unit in the last place of the running sum
/// for each addition, and for each product where it is not fused; the running sum is at most the sum of
/// the magnitudes. The smallest normal numbers make room for flushed denormals.
fn tolerance(k: usize, magnitudes: f64) -> f64 {
    let unit = 2f64.powi(-24);
    magnitudes * 2.0 * (k as f64 + 1.0) * unit + k as f64 * 1.2e-38
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
    for dtype in DTYPES {
        for simd in levels() {
            for n in [1, 2, 15, 16, 17, 63, 64, 65, 130] {
                for k in [1, 2, 3, 5, 7, 8, 9, 17, 64, 65, 130, 257] {
                    let w = pack(&random(n * k, 1), n, k, dtype);
                    for rows in [1, 2, 3, 5, 6, 7, 13, 17] {
                        let x = operand(&random(rows * k, 2), rows, k, dtype);
                        let mut out = vec![f32::NAN; rows * n];
                        matmul(simd, &pool, &x, &w, &mut out, false);
                        let what = format!("{} {dtype:?} [{rows}, {k}] [{n}, {k}]", simd.name());
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
    for dtype in DTYPES {
        for simd in levels() {
            for (rows, n, k) in [(1, 65, 2049), (7, 64, 4096), (65, 130, 5000), (50, 33, 6145)] {
                let w = pack(&random(n * k, 3), n, k, dtype);
                let x = operand(&random(rows * k, 4), rows, k, dtype);
                let mut out = vec![f32::NAN; rows * n];
                matmul(simd, &pool, &x, &w, &mut out, false);
                let what = format!("{} {dtype:?} [{rows}, {k}] [{n}, {k}]", simd.name());
                check(&out, &plain_product(&x, &w), k, &what);
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_company() {
    const ROWS: usize = 1024;
    let (one, two) = (pool(1), pool(2));
    for dtype in DTYPES {
        for simd in levels() {
            // K beyond one chunk in both number types, and columns that end inside of a panel.
            for (n, k) in [(80, 2312), (200, 96), (17, 33)] {
                let rows_step = if k > 2000 { 61 } else { 1 };
                let w = pack(&random(n * k, 5), n, k, dtype);
                let values = random(ROWS * k, 6);
                let all = operand(&values, ROWS, k, dtype);
                let mut expected = vec![0.0; ROWS * n];
                for row in 0..ROWS {
                    let x = operand(&values[row * k..][..k], 1, k, dtype);
                    matmul(simd, &one, &x, &w, &mut expected[row * n..][..n], false);
                }
                let mut out = vec![0.0; ROWS * n];
                matmul(simd, &two, &all, &w, &mut out, false);
                assert!(bits(&out) == bits(&expected), "{} {dtype:?} k = {k}: all rows", simd.name());
                let mut x = Operand::new(dtype);
                for rows in (1..=200).step_by(rows_step).chain([255, 511, 1000]) {
                    let first = ROWS - rows; // So that a row's place in its tile changes.
                    x.reset(rows, k);
                    (0..rows).for_each(|row| x.set_row(row, &values[(first + row) * k..][..k]));
                    let out = &mut out[..rows * n];
                    matmul(simd, &two, &x, &w, out, false);
                    let same = bits(out) == bits(&expected[first * n..]);
                    assert!(same, "{} {dtype:?} k = {k}: {rows} rows", simd.name());
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
    for dtype in DTYPES {
        for simd in levels() {
            let w = pack(&random(n * k, 7), n, k, dtype);
            let values = random(ROWS * k, 8);
            let mut expected = vec![0.0; ROWS * n];
            for row in 0..ROWS {
                let x = operand(&values[row * k..][..k], 1, k, dtype);
                matmul(simd, &pool, &x, &w, &mut expected[row * n..][..n], false);
            }
            let mut x = Operand::new(dtype);
            let mut out = vec![0.0; ROWS * n];
            for rows in 1..=ROWS {
                x.reset(rows, k);
                (0..rows).for_each(|row| x.set_row(row, &values[row * k..][..k]));
                let out = &mut out[..rows * n];
                matmul(simd, &pool, &x, &w, out, false);
                assert!(bits(out) == bits(&expected[..rows * n]), "{} {dtype:?}: {rows} rows", simd.name());
            }
        }
    }
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    let pools = [pool(1), pool(2), pool(3)];
    for dtype in DTYPES {
        for simd in levels() {
            for (rows, n, k) in [(1, 1000, 300), (4, 576, 576), (70, 192, 576), (13, 100, 5000)] {
                let w = pack(&random(n * k, 9), n, k, dtype);
                let x = operand(&random(rows * k, 10), rows, k, dtype);
                let results = pools.each_ref().map(|pool| {
                    let mut out = vec![0.5; rows * n];
                    matmul(simd, pool, &x, &w, &mut out, true);
                    bits(&out)
                });
                assert!(results[0] == results[1] && results[0] == results[2], "{} {dtype:?}", simd.name());
            }
        }
    }
}

#[test]
fn accumulate_adds_the_finished_product() {
    let pool = pool(2);
    for dtype in DTYPES {
        for simd in levels() {
            for (rows, n, k) in [(1, 70, 9), (9, 64, 64), (20, 100, 3000)] {
                let w = pack(&random(n * k, 11), n, k, dtype);
                let x = operand(&random(rows * k, 12), rows, k, dtype);
                let before = random(rows * n, 13);
                let (mut product, mut sum) = (vec![0.0; rows * n], before.clone());
                matmul(simd, &pool, &x, &w, &mut product, false);
                matmul(simd, &pool, &x, &w, &mut sum, true);
                let expected: Vec<f32> = before.iter().zip(&product).map(|(b, p)| b + p).collect();
                assert!(bits(&sum) == bits(&expected), "{} {dtype:?} k = {k}", simd.name());
            }
        }
    }
}

#[test]
fn swiglu_agrees_with_f64() {
    let pool = pool(2);
    for dtype in DTYPES {
        for simd in levels() {
            for (rows, n, k) in
                [(1, 1, 1), (2, 17, 5), (6, 64, 64), (7, 100, 130), (65, 192, 1200), (20, 70, 3000)]
            {
                // Gates of up to about 8, where silu bends.
                let scale = 8.0 / (k as f32).sqrt();
                let gate = random(n * k, 14).iter().map(|g| g * scale).collect::<Vec<_>>();
                let (gate, up) = (pack(&gate, n, k, dtype), pack(&random(n * k, 15), n, k, dtype));
                let x = operand(&random(rows * k, 16), rows, k, dtype);
                let mut out = Operand::new(dtype);
                swiglu(simd, &pool, &x, &gate, &up, &mut out);
                assert_eq!((out.rows(), out.cols()), (rows, n));
                let (g, u) = (plain_product(&x, &gate), plain_product(&x, &up));
                for row in 0..rows {
                    for (col, found) in row_of(&out, row).into_iter().enumerate() {
                        let ((g, g_terms), (u, u_terms)) = (g[row * n + col], u[row * n + col]);
                        let silu = g / (1.0 + (-g).exp());
                        // silu has a slope below 1.1; exp, sum, quotient and product add a few units; the
                        // result is rounded once more, by at most 2⁻⁸ of itself in bf16.
                        let rounding = if dtype == Dtype::Bf16 { 2f64.powi(-8) } else { 0.0 };
                        let bound = 1.1 * tolerance(k, g_terms) * u.abs()
                            + tolerance(k, u_terms) * silu.abs()
                            + (silu * u).abs() * (rounding + 8.0 * 2f64.powi(-24))
                            + 1e-37;
                        let error = (f64::from(found) - silu * u).abs();
                        assert!(error <= bound, "{} {dtype:?}: {found}, not {}", simd.name(), silu * u);
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
    for dtype in DTYPES {
        for simd in levels() {
            for k in [k, 2500] {
                let (gate, up) =
                    (pack(&random(n * k, 17), n, k, dtype), pack(&random(n * k, 18), n, k, dtype));
                let values = random(rows * k, 19);
                let mut all = Operand::new(dtype);
                swiglu(simd, &three, &operand(&values, rows, k, dtype), &gate, &up, &mut all);
                let mut single = Operand::new(dtype);
                for row in 0..rows {
                    let x = operand(&values[row * k..][..k], 1, k, dtype);
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
    for dtype in DTYPES {
        for simd in levels() {
            let w = pack(&random(n * k, 20), n, k, dtype);
            let mut out = vec![f32::NAN; rows * n];
            matmul(simd, &pool, &operand(&vec![0.0; rows * k], rows, k, dtype), &w, &mut out, false);
            assert!(out.iter().all(|&v| v == 0.0));

            // 2¹⁰⁰ · 2²⁰ is finite, 2¹⁰⁰ · 2⁶⁰ is not.
            let w = pack(&vec![2f32.powi(20); n * k], n, k, dtype);
            let x = operand(&vec![2f32.powi(100); rows * k], rows, k, dtype);
            matmul(simd, &pool, &x, &w, &mut out, false);
            assert!(out.iter().all(|&v| v == 30.0 * 2f32.powi(120)));
            let w = pack(&vec![2f32.powi(60); n * k], n, k, dtype);
            matmul(simd, &pool, &x, &w, &mut out, false);
            assert!(out.iter().all(|&v| v == f32::INFINITY));
        }
    }
}

#[test]
fn a_row_that_is_not_finite_spoils_no_other() {
    let pool = pool(1);
    let (rows, n, k) = (8, 70, 30);
    for dtype in DTYPES {
        for simd in levels() {
            let w = pack(&random(n * k, 21), n, k, dtype);
            let mut values = random(rows * k, 22);
            values[k] = f32::NAN;
            values[2 * k + 1] = f32::INFINITY;
            let x = operand(&values, rows, k, dtype);
            let mut out = vec![0.0; rows * n];
            matmul(simd, &pool, &x, &w, &mut out, false);
            for (row, out) in out.chunks(n).enumerate() {
                match row {
                    1 => assert!(out.iter().all(|v| v.is_nan())),
                    2 => assert!(out.iter().all(|v| v.is_infinite())),
                    _ => assert!(out.iter().all(|v| v.is_finite())),
                }
            }
            // And an operand that held NaN in a wider shape has zeros in its padding again.
            let mut h = Operand::new(dtype);
            swiglu(simd, &pool, &x, &w, &w, &mut h);
            swiglu(simd, &pool, &operand(&values[3 * k..], 5, k, dtype), &w, &w, &mut h);
            let down = pack(&random(3 * n, 23), 3, n, dtype);
            let mut out = vec![0.0; 5 * 3];
            matmul(simd, &pool, &h, &down, &mut out, false);
            assert!(out.iter().all(|v| v.is_finite()));
        }
    }
}

#[test]
fn empty_shapes_are_no_trouble() {
    let pool = pool(2);
    for dtype in DTYPES {
        for simd in levels() {
            let w = pack(&[], 3, 0, dtype);
            let mut out = vec![1.0; 6];
            matmul(simd, &pool, &operand(&[], 2, 0, dtype), &w, &mut out, false);
            assert_eq!(out, [0.0; 6]);
            let w = pack(&[1.0; 6], 3, 2, dtype);
            matmul(simd, &pool, &operand(&[], 0, 2, dtype), &w, &mut [], false);
            let w = pack(&[], 0, 2, dtype);
            matmul(simd, &pool, &operand(&[1.0; 4], 2, 2, dtype), &w, &mut [], false);
        }
    }
}
