//! The steady state of a step allocates nothing: all operations of a block and of the head, on every level.

mod counting;

use std::sync::{Barrier, Mutex};

use kernels::{
    Array, AttentionSlice, Backend, Cpu, CpuMatrix, CpuOperand, CpuOptions, KvCache, KvDtype, Largest,
    LogitStats, PAGE_TOKENS, RopeTable, Scales, Simd, TensorView, ThreadPool, ViewDtype, WeightType,
    available_cores,
};

use counting::Allocated;

const HIDDEN: usize = 192;
const HEADS: usize = 6;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 32;
const FFN: usize = 256;
const VOCAB: usize = 500;

/// What a step is made of.
#[derive(Debug, Clone, Copy)]
struct Kind {
    simd: Simd,
    weights: WeightType,
    kv: KvDtype,
}

/// A block, a head, and the arrays of a step.
struct Step {
    cpu: Cpu,
    norm: Vec<f32>,
    q: CpuMatrix,
    kv: CpuMatrix,
    gate: CpuMatrix,
    down: CpuMatrix,
    table: CpuMatrix,
    cache: KvCache,
    rope: RopeTable,
    x: Array,
    arrays: [Array; 4],
    normed: CpuOperand,
    inner: CpuOperand,
    stats: Vec<LogitStats>,
    largest: Vec<Largest>,
    host: Vec<f32>,
}

impl Step {
    fn new(Kind { simd, weights, kv }: Kind, cores: Vec<usize>, threads: usize) -> Step {
        let cpu = Cpu::new(CpuOptions { cores, threads, simd, weights, kv }).unwrap();
        let bytes = |rows: usize, cols: usize| -> Vec<u8> {
            (0..rows * cols).flat_map(|i| ((i * 7 % 19) as f32 / 19.0 - 0.4).to_le_bytes()).collect()
        };
        let matrix = |rows: usize, cols: usize| {
            cpu.matrix(TensorView::new(ViewDtype::F32, rows, cols, &bytes(rows, cols))).unwrap()
        };
        let (q, kv) = (integers_with_zeros(&cpu), matrix(KV_HEADS * HEAD_DIM, HIDDEN));
        let (gate, down) = (matrix(FFN, HIDDEN), matrix(HIDDEN, FFN));
        let table = cpu.table(TensorView::new(ViewDtype::F32, VOCAB, HIDDEN, &bytes(VOCAB, HIDDEN))).unwrap();
        Step {
            norm: vec![1.0; HIDDEN],
            q,
            kv,
            gate,
            down,
            table,
            cache: cpu.kv_cache(12, KV_HEADS, HEAD_DIM).unwrap(),
            rope: RopeTable {
                head_dim: HEAD_DIM,
                cos: vec![1.0; 4 * PAGE_TOKENS * HEAD_DIM / 2],
                sin: vec![0.0; 4 * PAGE_TOKENS * HEAD_DIM / 2],
            },
            x: cpu.array(),
            arrays: [(); 4].map(|()| cpu.array()),
            normed: cpu.operand(),
            inner: cpu.operand(),
            stats: Vec::new(),
            largest: Vec::new(),
            host: Vec::new(),
            cpu,
        }
    }

    fn run(&mut self, Rows { tokens, positions, slices }: &Rows) {
        let Step { cpu, x, arrays: [q, k, v, logits], normed, inner, .. } = self;
        cpu.embed(&self.table, tokens, x).unwrap();
        cpu.rms_norm(x, &self.norm, 1e-5, normed).unwrap();
        cpu.matmul_each(normed, [&self.q, &self.kv, &self.kv], [&mut *q, &mut *k, &mut *v]).unwrap();
        let angles = (&self.rope, positions.as_slice());
        cpu.attend([&mut *q, &mut *k], v, angles, &mut self.cache, slices, inner).unwrap();
        cpu.rope(q, &self.rope, positions).unwrap();
        cpu.rope(k, &self.rope, positions).unwrap();
        cpu.kv_append(&mut self.cache, k, v, slices).unwrap();
        cpu.attention(q, &self.cache, slices, inner).unwrap();
        cpu.matmul_add(inner, &self.q, x).unwrap();
        cpu.rms_norm(x, &self.norm, 1e-5, normed).unwrap();
        cpu.swiglu(normed, &self.gate, &self.gate, inner).unwrap();
        cpu.matmul_add(inner, &self.down, x).unwrap();
        cpu.matmul_onto(inner, &self.down, x).unwrap();
        cpu.add(q, x).unwrap();
        cpu.gather(x, &positions[..2], k).unwrap();
        cpu.rms_norm(k, &self.norm, 1e-5, normed).unwrap();
        cpu.matmul(normed, &self.table, logits).unwrap();
        cpu.logit_stats(logits, &mut self.stats).unwrap();
        cpu.download(logits, &mut self.host).unwrap();
        cpu.matmul_argmax(normed, &self.table, logits, &mut self.largest).unwrap();
    }
}

/// A checkpoint's integers of 4 bits, which types of more bits take as numbers: `[HEADS * HEAD_DIM, HIDDEN]`.
fn integers_with_zeros(cpu: &Cpu) -> CpuMatrix {
    const GROUP: usize = 32;
    let (rows, groups) = (HEADS * HEAD_DIM, HIDDEN / GROUP);
    let numbers: Vec<u8> = (0..rows * HIDDEN / 2).map(|i| (i * 37) as u8).collect();
    let zeros: Vec<u8> = (0..rows * groups / 2).map(|i| (i * 53) as u8).collect();
    let scales = 0.01f32.to_le_bytes().repeat(rows * groups);
    let scales = Scales {
        dtype: ViewDtype::F32,
        bytes: &scales,
        stride: groups,
        group: GROUP,
        order: None,
        zeros: Some(&zeros),
        first: [0, 0],
    };
    cpu.matrix(TensorView::scaled(ViewDtype::Int4, rows, HIDDEN, &numbers, scales)).unwrap()
}

/// Three rows that decode and one that is prefilled, at some distance from their beginning.
fn slices() -> Vec<AttentionSlice> {
    let slice = |first_row, num_rows, first_position, first_page: u32| AttentionSlice {
        first_row,
        num_rows,
        first_position,
        pages: (first_page..first_page + 3).collect(),
    };
    vec![slice(0, 1, 70, 0), slice(1, 1, 3, 3), slice(2, 1, 127, 6), slice(3, 60, 40, 9)]
}

/// The micro-batch of all steps.
struct Rows {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    slices: Vec<AttentionSlice>,
}

impl Rows {
    fn new() -> Rows {
        let (tokens, positions) = (0..63).map(|i| (i * 7, i % 50)).unzip();
        Rows { tokens, positions, slices: slices() }
    }
}

/// Allocations of each of some steps, one after the other.
fn allocations(step: &mut Step, rows: &Rows) -> Vec<Allocated> {
    (0..40).map(|_| Allocated::during(|| step.run(rows))).collect()
}

/// The same on two threads, once either has met every task: which takes which is left to chance. So each first does a
/// whole step alone, as whoever is inside of a region does.
fn allocations_of_two(kind: Kind, rows: &Rows) -> Vec<Allocated> {
    let cores = available_cores();
    let pool = ThreadPool::of_device(&cores, 2);
    let mut steps = [(); 2].map(|()| Mutex::new(Step::new(kind, cores.clone(), 2)));
    let both = Barrier::new(2);
    pool.for_each(2, |thread| {
        both.wait();
        steps[thread].lock().unwrap().run(rows);
    });
    allocations(steps[0].get_mut().unwrap(), rows)
}

const WEIGHTS: [WeightType; 5] =
    [WeightType::F32, WeightType::Bf16, WeightType::Int8, WeightType::Int8Weight, WeightType::Int4Weight];

// One test, as the count is of the whole process.
#[test]
fn the_steady_state_of_a_step_allocates_nothing() {
    let rows = Rows::new();
    let mut kinds: Vec<(WeightType, KvDtype)> = WEIGHTS.map(|w| (w, w.operands().into())).to_vec();
    kinds.push((WeightType::Bf16, KvDtype::Fp8));
    for simd in Simd::ALL.into_iter().filter(|simd| simd.is_available()) {
        for &(weights, kv) in &kinds {
            let kind = Kind { simd, weights, kv };
            let alone = allocations(&mut Step::new(kind, Vec::new(), 1), &rows);
            assert_ne!(
                alone[0],
                Allocated::NOTHING,
                "{kind:?}: the first step finds no memory, or nothing is counted"
            );
            assert_eq!(alone[1..], [Allocated::NOTHING; 39], "{kind:?}");
            assert_eq!(allocations_of_two(kind, &rows), [Allocated::NOTHING; 40], "{kind:?} on two threads");
        }
    }
}
