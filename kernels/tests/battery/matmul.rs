//! `matmul`, `matmul_add`, `matmul_onto` and `add`.

use kernels::{INT8_BLOCK, SUM_CUT, WeightType};

use crate::battery::device::{
    Check, Device, F32_UNIT, Readable, bits, every_weight_device, reference_with_long_groups,
};
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

pub(crate) struct Matmul;

impl Check for Matmul {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let mut random = Random::new(1);
        let backend = &device.backend;
        let (mut product, mut sum) = (backend.array(), backend.array());
        for [rows, inputs, outputs] in SHAPES {
            for x in [random.values(rows * inputs), random.wild_rows(rows, inputs)] {
                let (x, x_values) = device.operand(&x, inputs);
                let x_values = device.multiplied(&x_values, inputs);
                for w in [random.values(outputs * inputs), random.wild_rows(outputs, inputs)] {
                    let before = random.values(rows * outputs);
                    let matrix = device.matrix(&w, outputs, inputs);
                    backend.matmul(&x, &matrix, &mut product).unwrap();
                    backend.upload(&before, rows, outputs, &mut sum).unwrap();
                    backend.matmul_add(&x, &matrix, &mut sum).unwrap();
                    let expected = exact(&x_values, &device.kept(&w, inputs), inputs);
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

fn exact(x: &[f64], w: &[f64], inputs: usize) -> Vec<Bounded> {
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
    Matmul.check(&reference_with_long_groups());
}

pub(crate) struct NoRows;

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

pub(crate) struct NotFinite;

impl Check for NotFinite {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let (rows, inputs, outputs) = (9, 150, 70);
        let mut random = Random::new(3);
        let mut values = random.values(rows * inputs);
        values[2 * inputs + 7] = f32::NAN;
        values[5 * inputs + 140] = f32::NAN;
        let (x, _) = device.operand(&values, inputs);
        let matrix = device.matrix(&random.values(outputs * inputs), outputs, inputs);
        let (mut product, mut gated) = (device.backend.array(), device.backend.operand());
        device.backend.matmul(&x, &matrix, &mut product).unwrap();
        device.backend.swiglu(&x, &matrix, &matrix, &mut gated).unwrap();
        for values in [device.values(&product), B::read(&gated)] {
            for (row, values) in values.chunks_exact(outputs).enumerate() {
                let is_spoilt = row == 2 || row == 5;
                let is_right = |value: &f32| if is_spoilt { value.is_nan() } else { value.is_finite() };
                assert!(values.iter().all(is_right), "{} row {row}", device.name());
            }
        }
    }
}

/// So that the row fails, and no other.
#[test]
fn a_row_with_a_nan_is_nan_and_spoils_no_other() {
    every_weight_device(&NotFinite);
}

struct Integers;

impl Check for Integers {
    fn check<B: Readable>(&self, device: &Device<B>) {
        if device.weights != WeightType::Int8 {
            return;
        }
        let mut random = Random::new(4);
        let mut out = device.backend.array();
        for [rows, inputs, outputs] in SHAPES.into_iter().chain(SEVERAL_BLOCKS) {
            let (x, x_values) = device.operand(&random.wild_rows(rows, inputs), inputs);
            let w = random.wild_rows(outputs, inputs);
            device.backend.matmul(&x, &device.matrix(&w, outputs, inputs), &mut out).unwrap();
            let w: Vec<Vec<(Vec<i64>, f32)>> = w.chunks_exact(inputs).map(blocks).collect();
            let mut expected = Vec::new();
            for x in x_values.chunks_exact(inputs).map(blocks) {
                for w in &w {
                    let terms = x.iter().zip(w).map(|((x, x_scale), (w, w_scale))| {
                        let sum: i64 = x.iter().zip(w).map(|(x, w)| x * w).sum();
                        sum as f32 * (x_scale * w_scale)
                    });
                    expected.push(terms.reduce(|sum, term| sum + term).unwrap());
                }
            }
            let what = format!("{} [{rows}, {inputs}] x [{outputs}, {inputs}]", device.name());
            assert_eq!(bits(&device.values(&out)), bits(&expected), "{what}");
        }
    }
}

/// `[rows, in, out]` of more inputs than share a scale: tiles and panels with tails, some rows and many, and a last block
/// that is short, of a whole one.
const SEVERAL_BLOCKS: [[usize; 3]; 4] = [
    [1, INT8_BLOCK + 1, 3],
    [7, 2 * INT8_BLOCK, 65],
    [50, 2 * INT8_BLOCK + 77, 33],
    [3, 4 * INT8_BLOCK - 1, 17],
];

/// A row's blocks.
fn blocks(row: &[f32]) -> Vec<(Vec<i64>, f32)> {
    row.chunks(INT8_BLOCK).map(integers).collect()
}

/// A block's integers and its scale; numbers that would make the scale denormal are zeros.
fn integers(row: &[f32]) -> (Vec<i64>, f32) {
    let largest = row.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
    if largest / 127.0 < f32::MIN_POSITIVE {
        return (vec![0; row.len()], 0.0);
    }
    let inverse = 127.0 / largest;
    (row.iter().map(|value| (value * inverse).round_ties_even() as i64).collect(), largest / 127.0)
}

/// A sum of integers is exact, and what follows it has one order, at every level.
#[test]
fn products_in_integers_have_the_bits_of_plain_loops() {
    every_weight_device(&Integers);
}

/// `[rows, in, out]` of products whose sums are parted: some tiles and panels, several chunks of K.
const PARTED: [[usize; 3]; 5] = [[1, 130, 70], [7, 192, 64], [3, 1000, 17], [70, 300, 129], [2, 9000, 65]];

pub(crate) struct Parted;

impl Check for Parted {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let mut random = Random::new(5);
        let backend = &device.backend;
        let (mut whole, mut sums) = (backend.array(), backend.array());
        let is_in_integers = device.weights == WeightType::Int8;
        for &[rows, inputs, outputs] in if is_in_integers { &SEVERAL_BLOCKS[..] } else { &PARTED } {
            let w = random.wild_rows(outputs, inputs);
            let w_columns = |columns: std::ops::Range<usize>| -> Vec<f32> {
                w.chunks_exact(inputs).flat_map(|row| row[columns.clone()].to_vec()).collect()
            };
            let x = Parts { rows, up: random.values(inputs) };
            let what = format!("{} [{rows}, {inputs}] x [{outputs}, {inputs}]", device.name());
            backend
                .matmul(&x.operand(device, 0..inputs), &device.matrix(&w, outputs, inputs), &mut whole)
                .unwrap();
            for cut in cuts(device.weights, inputs) {
                if device.weights == WeightType::Int4Weight && !cut.is_multiple_of(device.int4.inputs()) {
                    continue; // Other groups have other scales.
                }
                let second = device.matrix(&w_columns(cut..inputs), outputs, inputs - cut);
                let first = device.matrix(&w_columns(0..cut), outputs, cut);
                backend.matmul(&x.operand(device, 0..cut), &first, &mut sums).unwrap();
                let before = device.values(&sums);
                backend.matmul_onto(&x.operand(device, cut..inputs), &second, &mut sums).unwrap();
                let found = device.values(&sums);
                if device.weights.sum_cut().is_none() {
                    backend.upload(&before, rows, outputs, &mut sums).unwrap();
                    backend.matmul_add(&x.operand(device, cut..inputs), &second, &mut sums).unwrap();
                    assert_eq!(bits(&found), bits(&device.values(&sums)), "{what} cut at {cut}");
                } else {
                    assert_eq!(bits(&found), bits(&device.values(&whole)), "{what} cut at {cut}");
                }
            }
        }
    }
}

/// Where to part sums over so many inputs: at some of all places.
fn cuts(weights: WeightType, inputs: usize) -> impl Iterator<Item = usize> {
    let unit = weights.sum_cut().unwrap_or(SUM_CUT);
    (unit..inputs).step_by(unit.max(SUM_CUT * (1 + inputs / 250)).next_multiple_of(unit))
}

/// A matmul's input of which columns can be had alone.
struct Parts {
    rows: usize,
    up: Vec<f32>,
}

impl Parts {
    /// `silu(x) ∘ (x up)` of rows of one number each: columns depend on their own weights alone.
    fn operand<B: Readable>(&self, device: &Device<B>, columns: std::ops::Range<usize>) -> B::Operand {
        let x: Vec<f32> = (0..self.rows).map(|row| 0.3 + row as f32 / 64.0).collect();
        let (x, _) = device.operand(&x, 1);
        let gate = device.matrix(&vec![1.0; columns.len()], columns.len(), 1);
        let up = device.matrix(&self.up[columns.clone()], columns.len(), 1);
        let mut out = device.backend.operand();
        device.backend.swiglu(&x, &gate, &up, &mut out).unwrap();
        out
    }
}

/// So that an FFN may be cut by its columns between two stages.
#[test]
fn sums_that_are_gone_on_with_have_the_bits_of_one_product() {
    every_weight_device(&Parted);
    Parted.check(&reference_with_long_groups());
}

pub(crate) struct Add;

impl Check for Add {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let mut random = Random::new(6);
        for (rows, cols) in [(0, 5), (1, 1), (3, 7), (70, 513)] {
            let (x, y) = (random.values(rows * cols), random.values(rows * cols));
            let mut out = device.array(&y, cols);
            device.backend.add(&device.array(&x, cols), &mut out).unwrap();
            let expected: Vec<f32> = x.iter().zip(&y).map(|(x, y)| y + x).collect();
            assert_eq!(bits(&device.values(&out)), bits(&expected), "{} [{rows}, {cols}]", device.name());
        }
    }
}

#[test]
fn add_adds_number_by_number() {
    every_weight_device(&Add);
}
