//! What is not of a device's own kind is refused before any memory is touched.

use super::*;
use crate::tensor_view::ViewDtype;

fn levels() -> impl Iterator<Item = Simd> {
    Simd::ALL.into_iter().filter(|simd| simd.is_available())
}

fn device(simd: Simd, weights: WeightType, kv: KvDtype) -> Cpu {
    Cpu::new(CpuOptions { cores: Vec::new(), threads: 2, simd, weights, kv }).unwrap()
}

/// `[8, 16]`, as a device of a level has it, which need not be there.
fn matrix(simd: Simd, kind: WeightType) -> CpuMatrix {
    let view = TensorView::new(ViewDtype::F32, 8, 16, bytemuck::cast_slice(&[1.0f32; 8 * 16]));
    CpuMatrix(PackedMatrix::pack(simd, view, kind, &ThreadPool::new(&[], 1)).unwrap())
}

/// `[3, 16]`, the same.
fn operand(simd: Simd, weights: WeightType) -> CpuOperand {
    let mut operand = Operand::beside(simd, weights);
    operand.reset(3, 16);
    (0..3).for_each(|row| operand.set_row(row, &[1.0; 16]));
    CpuOperand(operand)
}

/// The names of all products, and of the matrix that each is given last.
const PRODUCTS: [(&str, &str); 7] = [
    ("matmul", "w"),
    ("matmul_add", "w"),
    ("matmul_onto", "w"),
    ("matmul_argmax", "w"),
    ("climb", "w"),
    ("matmul", "w"),
    ("swiglu", "up"),
];

/// What they come to: all with x and a matrix, those of several matrices with another one before it.
fn products(cpu: &Cpu, x: &CpuOperand, first: &CpuMatrix, w: &CpuMatrix) -> [Result<()>; PRODUCTS.len()] {
    let (mut out, mut other, mut sums) = (cpu.array(), cpu.array(), cpu.array());
    cpu.zeros(3, 8, &mut sums).unwrap();
    [
        cpu.matmul(x, w, &mut out),
        cpu.matmul_add(x, w, &mut sums),
        cpu.matmul_onto(x, w, &mut sums),
        cpu.matmul_argmax(x, w, &mut out, &mut Vec::new()),
        cpu.climb(x, w, Rung::Whole, &mut out),
        cpu.matmul_each(x, [first, w], [&mut out, &mut other]),
        cpu.swiglu(x, first, w, &mut cpu.operand()),
    ]
}

fn refused(outcome: Result<()>, expected: &str) {
    assert_eq!(outcome.expect_err(expected).to_string(), expected);
}

#[test]
fn matrices_of_two_types_are_refused() {
    for simd in levels() {
        let cpu = device(simd, WeightType::Int8, KvDtype::Bf16);
        let x = operand(simd, WeightType::Int8);
        let [table, matrix] = [WeightType::Bf16, WeightType::Int8].map(|kind| matrix(simd, kind));
        let [.., each, swiglu] = products(&cpu, &x, &table, &matrix);
        refused(each, "matmul: w's type is int8, expected bf16");
        refused(swiglu, "swiglu: up's type is int8, expected bf16");
    }
}

#[test]
fn inputs_and_outputs_of_another_type_or_width_are_refused() {
    for simd in levels() {
        let widths = ["bf16 in 32 bits", "bf16"];
        let (own, other) = if simd < Simd::Avx512 { (0, Simd::Avx512) } else { (1, Simd::Avx2) };
        for (x, weights, found, expected) in [
            (operand(simd, WeightType::Bf16), WeightType::F32, widths[own], "f32"),
            (operand(simd, WeightType::F32), WeightType::Int4Weight, "f32", widths[own]),
            (operand(other, WeightType::Bf16), WeightType::Bf16, widths[1 - own], widths[own]),
        ] {
            let w = matrix(simd, weights);
            let outcomes = products(&device(simd, weights, KvDtype::Bf16), &x, &w, &w);
            for (outcome, (op, _)) in outcomes.into_iter().zip(PRODUCTS) {
                refused(outcome, &format!("{op}: x's type is {found}, expected {expected}"));
            }
        }
        let (x, w) = (operand(simd, WeightType::Bf16), matrix(simd, WeightType::Bf16));
        let mut out = operand(other, WeightType::Bf16);
        let outcome = device(simd, WeightType::Bf16, KvDtype::Bf16).swiglu(&x, &w, &w, &mut out);
        refused(outcome, &format!("swiglu: out's type is {}, expected {}", widths[1 - own], widths[own]));
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn matrices_that_lie_as_another_level_has_them_are_refused() {
    for simd in levels() {
        let names = ["whole panels", "strips for amx"];
        let (own, other) = if simd < Simd::Amx { (0, Simd::Amx) } else { (1, Simd::Avx512) };
        let (x, weights) = (operand(simd, WeightType::Bf16), WeightType::Bf16);
        let [first, w] = [simd, other].map(|simd| matrix(simd, weights));
        let outcomes = products(&device(simd, weights, KvDtype::Bf16), &x, &first, &w);
        for (outcome, (op, name)) in outcomes.into_iter().zip(PRODUCTS) {
            refused(
                outcome,
                &format!("{op}: {name}'s packing is {}, expected {}", names[1 - own], names[own]),
            );
        }
    }
}

#[test]
fn caches_of_another_type_or_layout_are_refused() {
    let cache = |kv, layout| KvCache::new(kv, layout, 1, 1, 16).unwrap();
    for simd in levels() {
        let own = KeyLayout::of(simd, KvDtype::Bf16);
        let other = if own == KeyLayout::Rows { KeyLayout::Columns } else { KeyLayout::Rows };
        for (cache, expected) in [
            (cache(KvDtype::F32, KeyLayout::Columns), "cache's type is f32, expected bf16".to_owned()),
            (cache(KvDtype::Fp8, own), "cache's type is fp8, expected bf16".to_owned()),
            (
                cache(KvDtype::Bf16, other),
                format!("cache's layout of keys is {}, expected {}", other.name(), own.name()),
            ),
        ] {
            let outcomes = uses(&device(simd, WeightType::Bf16, KvDtype::Bf16), cache);
            for (outcome, op) in outcomes.into_iter().zip(["kv_append", "attention", "attend"]) {
                refused(outcome, &format!("{op}: {expected}"));
            }
        }
    }
}

/// All that is done to a cache, for the first row of a sequence.
fn uses(cpu: &Cpu, mut cache: KvCache) -> [Result<()>; 3] {
    let slices = [AttentionSlice { first_row: 0, num_rows: 1, first_position: 0, pages: vec![0] }];
    let rope = cpu.rope_table(RopeTable { head_dim: 16, cos: vec![1.0; 8], sin: vec![0.0; 8] }).unwrap();
    let [mut q, mut k, mut v] = [(); 3].map(|()| cpu.array());
    [&mut q, &mut k, &mut v].into_iter().for_each(|array| cpu.zeros(1, 16, array).unwrap());
    let mut out = cpu.operand();
    [
        cpu.kv_append(&mut cache, &k, &v, &slices),
        cpu.attention(&q, &cache, &slices, &mut out),
        cpu.attend([&mut q, &mut k], &v, (&rope, &[0]), &mut cache, &slices, &mut out),
    ]
}
