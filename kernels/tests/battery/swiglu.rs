//! `swiglu`.

use crate::battery::device::{Check, Device, F32_UNIT, Readable, every_weight_device, unit};
use crate::battery::exact::{Bounded, assert_within, dot};
use crate::battery::random::Random;

/// `[rows, in, width]`
const SHAPES: [[usize; 3]; 9] = [
    [1, 1, 1],
    [1, 64, 130],
    [2, 9, 63],
    [7, 33, 65],
    [13, 100, 200],
    [65, 129, 17],
    [64, 96, 192],
    // Inputs that are walked in parts of a block that shares a scale, and of several.
    [40, 1400, 34],
    [34, 4200, 33],
];

pub(crate) struct Swiglu;

impl Check for Swiglu {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let mut random = Random::new(2);
        let backend = &device.backend;
        let mut out = backend.operand();
        for [rows, inputs, width] in SHAPES {
            let (x, x_values) = device.operand(&random.wild_rows(rows, inputs), inputs);
            let x_values = device.multiplied(&x_values, inputs);
            // Gates from far below zero, where silu vanishes, to far above, where it is the identity.
            let gate: Vec<f32> = random.values(width * inputs).iter().map(|gate| gate * 30.0).collect();
            let up = random.values(width * inputs);
            let gate_matrix = device.matrix(&gate, width, inputs);
            let up_matrix = device.matrix(&up, width, inputs);
            backend.swiglu(&x, &gate_matrix, &up_matrix, &mut out).unwrap();
            let (gate, up) = (device.kept(&gate, inputs), device.kept(&up, inputs));
            let mut expected = Vec::new();
            for x in x_values.chunks_exact(inputs) {
                for (gate, up) in gate.chunks_exact(inputs).zip(up.chunks_exact(inputs)) {
                    expected.push(exact(dot(x, gate), dot(x, up)).stored(unit(device.weights.operands())));
                }
            }
            let what = format!("{} [{rows}, {inputs}] width {width}", device.name());
            assert_within(&what, &B::read(&out), &expected);
        }
    }
}

/// The slope of silu is below 1.1 everywhere. The exponential, a sum, a quotient and a product are a handful of
/// roundings, of the exponential 2 units; 8 in all.
fn exact(gate: Bounded, up: Bounded) -> Bounded {
    let silu = gate.value / (1.0 + (-gate.value).exp());
    let value = silu * up.value;
    let gate_error = 1.1 * gate.error;
    let inherited = gate_error * up.value.abs() + silu.abs() * up.error + gate_error * up.error;
    Bounded { value, error: inherited + 8.0 * F32_UNIT * value.abs() }
}

#[test]
fn swiglu_gates_one_product_by_the_silu_of_the_other() {
    every_weight_device(&Swiglu);
}
