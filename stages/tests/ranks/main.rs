//! Stages of several ranks, and FFNs that are cut by columns, against the stage that has everything: on a small model with
//! every kind of half, and on a scaled-down Ultra.

mod cuts;
mod layout;
mod micro_batches;
#[path = "../small_model/mod.rs"]
mod small_model;
mod ultra;
mod ways;

use stages::{Device, Dtypes, KvDtype, Simd, WeightType};

const F32: Dtypes = Dtypes { weights: WeightType::F32, kv: KvDtype::F32 };
const BF16: Dtypes = Dtypes { weights: WeightType::Bf16, kv: KvDtype::Bf16 };

/// Ranks add up the same products in another order, in f32: some hundred to a thousand terms near 1 for each of a dozen
/// halves, rounded to 2^-24. Users are promised what docs/run.md derives, "How far ranks are from one device", which is more.
const F32_BOUND: f32 = 2e-5;

/// Beside bf16 inputs, a sum that is off by its last bit may round to the other neighbour, which later halves carry on. As
/// docs/run.md derives it, for the 23 operands of the small model and its head, whose logits have a deviation of 1.
const BF16_BOUND: f32 = 0.05;

fn cpu(simd: Simd) -> Device {
    Device::Cpu { cores: Vec::new(), threads: 1, simd }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Largest difference of two runs.
fn difference(one: &[f32], other: &[f32]) -> f32 {
    assert_eq!(one.len(), other.len());
    one.iter().zip(other).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}
