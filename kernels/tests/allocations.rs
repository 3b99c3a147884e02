//! The steady state of a step allocates nothing: all operations of a block and of the head, on every level.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use kernels::{
    Array, AttentionSlice, Backend, Cpu, CpuMatrix, CpuOperand, CpuOptions, KvCache, Largest, LogitStats,
    PAGE_TOKENS, RopeTable, Simd, TensorView, ViewDtype, WeightType,
};

/// The system's allocator, with a count of what it gave.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is the system's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's.
        unsafe { System.realloc(memory, layout, new_size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const HIDDEN: usize = 192;
const HEADS: usize = 6;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 32;
const FFN: usize = 256;
const VOCAB: usize = 500;

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
    fn new(simd: Simd, weights: WeightType, threads: usize) -> Step {
        let kv = weights.operands().into();
        let cpu = Cpu::new(CpuOptions { cores: Vec::new(), threads, simd, weights, kv }).unwrap();
        let bytes = |rows: usize, cols: usize| -> Vec<u8> {
            (0..rows * cols).flat_map(|i| ((i * 7 % 19) as f32 / 19.0 - 0.4).to_le_bytes()).collect()
        };
        let matrix = |rows: usize, cols: usize| {
            cpu.matrix(TensorView::new(ViewDtype::F32, rows, cols, &bytes(rows, cols))).unwrap()
        };
        let (q, kv) = (matrix(HEADS * HEAD_DIM, HIDDEN), matrix(KV_HEADS * HEAD_DIM, HIDDEN));
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

    fn run(&mut self, tokens: &[u32], positions: &[u32], slices: &[AttentionSlice]) {
        let Step { cpu, x, arrays: [q, k, v, logits], normed, inner, .. } = self;
        cpu.embed(&self.table, tokens, x).unwrap();
        cpu.rms_norm(x, &self.norm, 1e-5, normed).unwrap();
        cpu.matmul_each(normed, [&self.q, &self.kv, &self.kv], [&mut *q, &mut *k, &mut *v]).unwrap();
        let angles = (&self.rope, positions);
        cpu.attend([&mut *q, &mut *k], v, angles, &mut self.cache, slices, inner).unwrap();
        cpu.rope(q, &self.rope, positions).unwrap();
        cpu.rope(k, &self.rope, positions).unwrap();
        cpu.kv_append(&mut self.cache, k, v, slices).unwrap();
        cpu.attention(q, &self.cache, slices, inner).unwrap();
        cpu.matmul_add(inner, &self.q, x).unwrap();
        cpu.rms_norm(x, &self.norm, 1e-5, normed).unwrap();
        cpu.swiglu(normed, &self.gate, &self.gate, inner).unwrap();
        cpu.matmul_add(inner, &self.down, x).unwrap();
        cpu.gather(x, &positions[..2], k).unwrap();
        cpu.rms_norm(k, &self.norm, 1e-5, normed).unwrap();
        cpu.matmul(normed, &self.table, logits).unwrap();
        cpu.logit_stats(logits, &mut self.stats).unwrap();
        cpu.download(logits, &mut self.host).unwrap();
        cpu.matmul_argmax(normed, &self.table, logits, &mut self.largest).unwrap();
    }
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

/// Allocations of each of some steps, one after the other.
fn allocations(simd: Simd, weights: WeightType, threads: usize) -> Vec<usize> {
    let slices = slices();
    let (tokens, positions): (Vec<u32>, Vec<u32>) = (0..63).map(|i| (i * 7, i % 50)).unzip();
    let mut step = Step::new(simd, weights, threads);
    let mut counts = vec![0; 40];
    for count in &mut counts {
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        step.run(&tokens, &positions, &slices);
        *count = ALLOCATIONS.load(Ordering::Relaxed) - before;
    }
    counts
}

// One test, as the count is of the whole process.
#[test]
fn the_steady_state_of_a_step_allocates_nothing() {
    for simd in Simd::ALL.into_iter().filter(|simd| simd.is_available()) {
        for weights in [WeightType::F32, WeightType::Bf16, WeightType::Int8, WeightType::Int4Weight] {
            let name = format!("{} {}", simd.name(), weights.name());
            let alone = allocations(simd, weights, 1);
            assert!(alone[0] > 0, "{name}: the first step finds no memory, or nothing is counted");
            assert_eq!(alone[1..], [0; 39], "{name}");
            // Which thread takes which task is left to chance: one may meet its first, or its largest, in any step. Then
            // its memory grows, of which it has three pieces; but nothing is allocated step by step.
            let shared = allocations(simd, weights, 2);
            assert!(shared[1..].iter().sum::<usize>() < 39, "{name} on two threads: {shared:?}");
        }
    }
}
