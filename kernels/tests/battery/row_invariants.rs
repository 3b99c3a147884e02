//! Rows are independent, to the bit: of an operation's T rows, each is what it would be alone.

use kernels::{Backend, Cpu, KvDtype};

use crate::battery::device::{Check, Device, Readable, WEIGHT_TYPES, bits, cpu, every_weight_device, levels};
use crate::battery::random::Random;
use crate::battery::rope::table;

const MAX_ROWS: usize = 1024;
/// Odd sizes, which leave tails in every direction.
const INPUTS: usize = 43;
const OUTPUTS: usize = 83;
/// 13 heads of 6.
const HEADS: usize = 78;

/// Numbers of rows to look at: for the fast backends all that end within their first tiles, then every rest of a tile.
fn row_counts(is_fast: bool) -> Vec<usize> {
    if is_fast {
        (1..=192).chain((197..=MAX_ROWS - 2).step_by(17)).chain([MAX_ROWS - 1, MAX_ROWS]).collect()
    } else {
        vec![1, 2, 3, 63, 64, 65, 256]
    }
}

pub(crate) struct RowsAlone;

impl Check for RowsAlone {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let mut random = Random::new(7);
        let backend = &device.backend;
        let x = random.values(MAX_ROWS * INPUTS);
        let before = random.values(MAX_ROWS * OUTPUTS);
        let weight = device.vector(&random.values(INPUTS));
        let matrix = device.matrix(&random.values(OUTPUTS * INPUTS), OUTPUTS, INPUTS);
        let gate = device.matrix(&random.values(OUTPUTS * INPUTS), OUTPUTS, INPUTS);
        let rope = backend.rope_table(table(6, MAX_ROWS)).unwrap();
        let positions: Vec<u32> = (0..MAX_ROWS as u32).map(|t| t * 7 % 1000).collect();

        // Rows [first, first + count) through every operation: bits per operation.
        let run = |first: usize, count: usize| -> [Vec<u32>; 5] {
            let x = device.array(&x[first * INPUTS..][..count * INPUTS], INPUTS);
            let heads = &before[first * HEADS..][..count * HEADS];
            let before = &before[first * OUTPUTS..][..count * OUTPUTS];
            let (mut normed, mut gated) = (backend.operand(), backend.operand());
            let mut product = backend.array();
            let mut sum = device.array(before, OUTPUTS);
            backend.rms_norm(&x, &weight, 1e-5, &mut normed).unwrap();
            backend.matmul(&normed, &matrix, &mut product).unwrap();
            backend.matmul_add(&normed, &matrix, &mut sum).unwrap();
            backend.swiglu(&normed, &gate, &matrix, &mut gated).unwrap();
            let mut turned = device.array(heads, HEADS);
            backend.rope(&mut turned, &rope, &positions[first..first + count]).unwrap();
            [
                bits(&B::read(&normed)),
                bits(&device.values(&product)),
                bits(&device.values(&sum)),
                bits(&B::read(&gated)),
                bits(&device.values(&turned)),
            ]
        };
        const OPS: [(&str, usize); 5] = [
            ("rms_norm", INPUTS),
            ("matmul", OUTPUTS),
            ("matmul_add", OUTPUTS),
            ("swiglu", OUTPUTS),
            ("rope", HEADS),
        ];
        let counts = row_counts(device.name().starts_with("cpu"));
        let longest = *counts.last().unwrap();
        let alone: Vec<[Vec<u32>; 5]> = (0..longest).map(|t| run(t, 1)).collect();
        for count in counts {
            // Not always from the first row: where a row stands must not matter either.
            let first = random.below(longest - count + 1);
            let together = run(first, count);
            for (op, (name, cols)) in OPS.into_iter().enumerate() {
                for (t, row) in together[op].chunks_exact(cols).enumerate() {
                    assert!(row == alone[first + t][op], "{} {name}: row {t} of {count}", device.name());
                }
            }
        }
    }
}

#[test]
fn rows_together_are_what_each_is_alone() {
    every_weight_device(&RowsAlone);
}

/// The wide products of a real model, whose K is cut into chunks.
#[test]
fn rows_of_long_sums_are_what_each_is_alone() {
    const LONG: usize = 4100;
    for simd in levels() {
        for weights in WEIGHT_TYPES {
            let kv = weights.operands().into();
            let device = Device::new(cpu(simd, 3, weights, kv), weights, kv);
            let mut random = Random::new(8);
            let matrix = device.matrix(&random.values(LONG * 70), 70, LONG);
            let x = random.values(100 * LONG);
            let product = |first: usize, count: usize| {
                let (operand, _) = device.operand(&x[first * LONG..][..count * LONG], LONG);
                let mut out = device.backend.array();
                device.backend.matmul(&operand, &matrix, &mut out).unwrap();
                bits(&device.values(&out))
            };
            let alone: Vec<Vec<u32>> = (0..100).map(|t| product(t, 1)).collect();
            for count in [2, 5, 6, 7, 33, 64, 100] {
                for (t, row) in product(100 - count, count).chunks_exact(70).enumerate() {
                    assert!(row == alone[100 - count + t], "{} {weights:?} row {t} of {count}", simd.name());
                }
            }
        }
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    for (simd, weights) in levels().flat_map(|simd| WEIGHT_TYPES.map(|weights| (simd, weights))) {
        let of_threads = |threads: usize| {
            let kv = KvDtype::Bf16;
            let device = Device::new(cpu(simd, threads, weights, kv), weights, kv);
            let mut random = Random::new(9);
            let (x, normed) = device.operand(&random.values(70 * 300), 300);
            let matrix = device.matrix(&random.values(5000 * 300), 5000, 300);
            let gate = device.matrix(&random.values(5000 * 300), 5000, 300);
            let (mut logits, mut gated) = (device.backend.array(), device.backend.operand());
            device.backend.matmul(&x, &matrix, &mut logits).unwrap();
            device.backend.swiglu(&x, &gate, &matrix, &mut gated).unwrap();
            let mut stats = Vec::new();
            device.backend.logit_stats(&logits, &mut stats).unwrap();
            let stats: Vec<u32> =
                stats.iter().flat_map(|s| [s.argmax, s.max.to_bits(), s.log_sum_exp.to_bits()]).collect();
            (bits(&normed), bits(&device.values(&logits)), bits(&Cpu::read(&gated)), stats)
        };
        let one = of_threads(1);
        for threads in [2, 3, 5] {
            assert!(of_threads(threads) == one, "{} {weights:?} with {threads} threads", simd.name());
        }
    }
}
