//! `matmul_argmax`.

use kernels::Largest;

use crate::battery::device::{Check, Device, Readable, every_weight_device};
use crate::battery::random::Random;

/// `[rows, in, out]`: a single number, tails on every side, more rows than a tile, more columns than a segment.
const SHAPES: [[usize; 3]; 7] =
    [[1, 1, 1], [1, 64, 64], [3, 9, 65], [7, 33, 15], [33, 40, 130], [70, 64, 4500], [257, 32, 1000]];

fn largest<B: Readable>(device: &Device<B>, x: &B::Operand, w: &B::Matrix) -> Vec<Largest> {
    let mut largest = vec![Largest { index: 7, value: 7.0 }];
    device.backend.matmul_argmax(x, w, &mut device.backend.array(), &mut largest).unwrap();
    largest
}

pub(crate) struct Products;

impl Check for Products {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let mut random = Random::new(8);
        for [rows, inputs, outputs] in SHAPES {
            let (x, _) = device.operand(&random.values(rows * inputs), inputs);
            let mut w = random.values(outputs * inputs);
            // The largest stands at several places: the second half is the first once more.
            let half = outputs / 2 * inputs;
            w.copy_within(..half, outputs * inputs - half);
            let w = device.matrix(&w, outputs, inputs);
            let mut product = device.backend.array();
            device.backend.matmul(&x, &w, &mut product).unwrap();
            let found = largest(device, &x, &w);
            assert_eq!(found.len(), rows, "{}", device.name());
            for (row, (found, logits)) in
                found.iter().zip(device.values(&product).chunks_exact(outputs)).enumerate()
            {
                let value = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let index = logits.iter().position(|&logit| logit == value).unwrap() as u32;
                let what = format!("{} row {row} of [{rows}, {inputs}] x {outputs}", device.name());
                assert_eq!(*found, Largest { index, value }, "{what}");
            }
        }
    }
}

#[test]
fn matmul_argmax_finds_the_lowest_of_the_largest_of_the_product() {
    every_weight_device(&Products);
}

pub(crate) struct NotFinite;

impl Check for NotFinite {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let (rows, inputs, outputs) = (40, 64, 200);
        let mut random = Random::new(9);
        let mut values = random.values(rows * inputs);
        values[17 * inputs + 63] = f32::NAN;
        let (x, _) = device.operand(&values, inputs);
        let w = device.matrix(&random.values(outputs * inputs), outputs, inputs);
        for (row, found) in largest(device, &x, &w).iter().enumerate() {
            assert_eq!(found.value.is_nan(), row == 17, "{} row {row}: {found:?}", device.name());
        }
        let (nothing, _) = device.operand(&[], inputs);
        assert!(largest(device, &nothing, &w).is_empty(), "{}", device.name());
    }
}

#[test]
fn matmul_argmax_lets_no_nan_pass() {
    every_weight_device(&NotFinite);
}
