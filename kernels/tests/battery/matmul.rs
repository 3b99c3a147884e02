//! `matmul` and `matmul_add`.

use crate::battery::device::{Check, Device, F32_UNIT, Readable, all_rounded, every_weight_device};
use crate::battery::exact::{Bounded, assert_within, dot};
use crate::battery::random::Random;

/// `[rows, in, out]`: single numbers, tails on every side, one past a tile or a panel, a row alone.
const SHAPES: [[usize; 3]; 12] = [
    [1, 1, 1],
    [2, 3, 1],
    [1, 64, 64],
    [1, 257, 131],
    [3, 8, 65],
    [6, 16, 128],
    [7, 33, 63],
    [13, 100, 200],
    [65, 129, 17],
    [64, 96, 192],
    [31, 700, 47],
    [130, 40, 80],
];

struct Matmul;

impl Check for Matmul {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let mut random = Random::new(1);
        let backend = &device.backend;
        let (mut product, mut sum) = (backend.array(), backend.array());
        for [rows, inputs, outputs] in SHAPES {
            for x in [random.values(rows * inputs), random.wild_rows(rows, inputs)] {
                let (x, x_values) = device.operand(&x, inputs);
                for w in [random.values(outputs * inputs), random.wild_rows(outputs, inputs)] {
                    let before = random.values(rows * outputs);
                    let matrix = device.matrix(&w, outputs, inputs);
                    backend.matmul(&x, &matrix, &mut product).unwrap();
                    backend.upload(&before, rows, outputs, &mut sum).unwrap();
                    backend.matmul_add(&x, &matrix, &mut sum).unwrap();
                    let expected = exact(&x_values, &all_rounded(device.weights, &w), inputs);
                    let what = format!("{} [{rows}, {inputs}] x [{outputs}, {inputs}]", device.name());
                    assert_within(&what, &device.values(&product), &expected);
                    let expected: Vec<Bounded> =
                        expected.iter().zip(&before).map(|(product, &before)| add(product, before)).collect();
                    assert_within(&what, &device.values(&sum), &expected);
                }
            }
        }
    }
}

fn exact(x: &[f32], w: &[f32], inputs: usize) -> Vec<Bounded> {
    x.chunks_exact(inputs).flat_map(|x| w.chunks_exact(inputs).map(move |w| dot(x, w))).collect()
}

/// One more rounding, of the sum.
fn add(product: &Bounded, before: f32) -> Bounded {
    let value = product.value + f64::from(before);
    Bounded { value, error: product.error }.stored(F32_UNIT)
}

#[test]
fn matmul_is_the_product_summed_in_f32() {
    every_weight_device(&Matmul);
}

struct NoRows;

impl Check for NoRows {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let (x, _) = device.operand(&[], 9);
        let mut out = device.array(&[1.0, 2.0], 2);
        device.backend.matmul(&x, &device.matrix(&[0.5; 45], 5, 9), &mut out).unwrap();
        assert!(device.values(&out).is_empty(), "{}", device.name());
    }
}

#[test]
fn no_rows_are_no_work() {
    every_weight_device(&NoRows);
}
