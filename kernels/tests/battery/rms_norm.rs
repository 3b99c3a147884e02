//! `rms_norm`.

use crate::battery::device::{Check, Device, F32_UNIT, Readable, every_weight_device, unit};
use crate::battery::exact::{Bounded, assert_within};
use crate::battery::random::Random;

const WIDTHS: [usize; 12] = [1, 2, 7, 15, 16, 17, 63, 64, 129, 576, 1025, 5000];

pub(crate) struct RmsNorm;

impl Check for RmsNorm {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let mut random = Random::new(3);
        let mut out = device.backend.operand();
        for cols in WIDTHS {
            for rows in [1, 5, 70] {
                let x = random.wild_rows(rows, cols);
                let weight = random.values(cols);
                for eps in [1e-5, 1e-6] {
                    let (x_array, weight_vector) = (device.array(&x, cols), device.vector(&weight));
                    device.backend.rms_norm(&x_array, &weight_vector, eps, &mut out).unwrap();
                    let rows = x.chunks_exact(cols);
                    let expected: Vec<Bounded> = rows
                        .flat_map(|x| exact(x, &weight, eps))
                        .map(|x| x.stored(unit(device.weights.operands())))
                        .collect();
                    assert_within(&format!("{} {cols} wide", device.name()), &B::read(&out), &expected);
                }
            }
        }
    }
}

/// The sum of squares is within `n u` of itself, of which the root takes half; the mean, the eps, the root, the
/// quotient and two products add 6 roundings.
fn exact(x: &[f32], weight: &[f32], eps: f32) -> Vec<Bounded> {
    let n = x.len() as f64;
    let squares: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
    let rms = (squares / n + f64::from(eps)).sqrt();
    let relative = (n / 2.0 + 6.0) * F32_UNIT;
    let normed = x.iter().zip(weight).map(|(&x, &weight)| f64::from(x) / rms * f64::from(weight));
    normed.map(|value| Bounded { value, error: value.abs() * relative }).collect()
}

#[test]
fn rms_norm_divides_by_the_root_of_the_mean_square() {
    every_weight_device(&RmsNorm);
}
