//! Where does the time of a step go, and how far is each operation from what the machine can do?
//!
//! A step of a model's shapes, all blocks and the head, with KV in bf16. Each operation is
//! timed over all blocks, so that weights, keys and values come from as far away as in a run, and stands beside
//! the multiplications and additions, and the bytes of weights, keys and values, that it cannot do without.
//!
//! ```text
//! cargo bench --bench step -- [--model smollm2|llama] [--threads N] [--simd portable|avx2|avx512|amx] [--weights bf16|int8|int8-weight|int4-weight]
//!                              [--rows 256] [--chunk 1] [--context 150] [--apart]
//! ```
//!
//! `smollm2` is SmolLM2-135M, `llama` the Llama of 1.1 billion parameters of [`bulk_job`](bulk_job/main.rs).
//!
//! With `--apart` q, k and v are three products, and turning heads, writing keys and values, and attention three operations.
//!
//! A micro-batch is `rows` tokens in chunks of `chunk` (1: decode; more: prefill) of sequences whose chunk ends at
//! a context of `context` tokens on average: from half of it to one and a half. A time is the median of 9 steps.

#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "a bench prints")]

mod common;

use anyhow::{Context, Result, bail, ensure};
use common::{median, random};
use kernels::{
    Array, AttentionSlice, Backend, Ceilings, Cpu, CpuMatrix, CpuOperand, CpuOptions, KvCache, KvDtype,
};
use kernels::{Largest, PAGE_TOKENS, RopeTable, Simd, TensorView, ViewDtype, WeightType, available_cores};
use std::time::Instant;

/// A model whose blocks are all alike.
#[derive(Clone, Copy)]
struct Shapes {
    name: &'static str,
    blocks: usize,
    hidden: usize,
    heads: usize,
    kv_heads: usize,
    ffn: usize,
    vocab: usize,
}

const SMOLLM2: Shapes =
    Shapes { name: "smollm2", blocks: 30, hidden: 576, heads: 9, kv_heads: 3, ffn: 1536, vocab: 49_152 };
const LLAMA: Shapes =
    Shapes { name: "llama", blocks: 16, hidden: 2048, heads: 32, kv_heads: 8, ffn: 8192, vocab: 32_000 };
const HEAD_DIM: usize = 64;
const STEPS: usize = 9;
const EPS: f32 = 1e-5;

struct Options {
    shapes: Shapes,
    threads: usize,
    simd: Simd,
    rows: usize,
    chunk: usize,
    context: usize,
    weights: WeightType,
    is_apart: bool,
}

struct Block {
    norm: Vec<f32>,
    q: CpuMatrix,
    k: CpuMatrix,
    v: CpuMatrix,
    o: CpuMatrix,
    gate: CpuMatrix,
    up: CpuMatrix,
    down: CpuMatrix,
    cache: KvCache,
}

/// An operation's time in a step, over all blocks, and what it cannot do without.
struct Cost {
    name: &'static str,
    seconds: Vec<f64>,
    flops: f64,
    bytes: f64,
}

fn main() -> Result<()> {
    let options = options()?;
    let Options { shapes, threads, simd, rows, chunk, context, weights, is_apart } = options;
    let cores = available_cores();
    let cpu = Cpu::new(CpuOptions { cores, threads, simd, weights, kv: KvDtype::Bf16 })?;
    cpu.pin_caller();
    let ceilings = Ceilings::new(&cpu)?;
    let (peak, bandwidth) = (ceilings.product_flops(), ceilings.read_bandwidth());
    println!(
        "{}, {threads} threads, {}, {}: product {:.0} GFLOP/s, memory read {:.1} GB/s; {rows} rows in chunks of {chunk} at contexts of about {context}",
        shapes.name,
        simd.name(),
        weights.name(),
        peak / 1e9,
        bandwidth / 1e9
    );
    let mut step = Step::new(&cpu, &options)?;
    let mut costs = step.costs();
    step.fill(&cpu)?;
    for run in 0..=STEPS {
        step.run(&cpu, &mut costs, is_apart)?;
        if run == 0 {
            costs.iter_mut().for_each(|cost| cost.seconds.clear()); // To warm up.
        }
    }
    report(&costs, peak, bandwidth);
    Ok(())
}

fn report(costs: &[Cost], peak: f64, bandwidth: f64) {
    let median = |cost: &Cost| median(&cost.seconds);
    let total: f64 = costs.iter().map(median).sum();
    let floor = |cost: &Cost| (cost.flops / peak).max(cost.bytes / bandwidth);
    println!("operation       ms  share   GFLOP/s    GB/s  floor ms  of floor");
    let line = |name: &str, seconds: f64, flops: f64, bytes: f64, floor: f64| {
        println!(
            "{name:<11} {:6.2} {:5.1}% {:9.0} {:7.1} {:9.2} {:8.1}%",
            seconds * 1e3,
            100.0 * seconds / total,
            flops / seconds / 1e9,
            bytes / seconds / 1e9,
            floor * 1e3,
            100.0 * floor / seconds
        );
    };
    costs.iter().for_each(|cost| line(cost.name, median(cost), cost.flops, cost.bytes, floor(cost)));
    let sum = |of: &dyn Fn(&Cost) -> f64| costs.iter().map(of).sum::<f64>();
    line("step", total, sum(&|cost| cost.flops), sum(&|cost| cost.bytes), sum(&floor));
}

/// A model, a micro-batch, and the arrays it is worked out in.
struct Step {
    shapes: Shapes,
    weights: WeightType,
    table: CpuMatrix,
    blocks: Vec<Block>,
    rope: RopeTable,
    tokens: Vec<u32>,
    positions: Vec<u32>,
    slices: Vec<AttentionSlice>,
    sampled: Vec<u32>,
    x: Array,
    normed: CpuOperand,
    q: Array,
    k: Array,
    v: Array,
    inner: CpuOperand,
    last: Array,
    logits: Array,
    largest: Vec<Largest>,
}

impl Step {
    fn new(cpu: &Cpu, options: &Options) -> Result<Step> {
        let &Options { shapes, rows, chunk, context, .. } = options;
        let Shapes { blocks, hidden, heads, kv_heads, ffn, vocab, .. } = shapes;
        let num_sequences = rows.div_ceil(chunk);
        let mut slices = Vec::new();
        let mut next_page = 0;
        for i in 0..num_sequences {
            let num_rows = chunk.min(rows - i * chunk);
            let end = (context / 2 + context * i / num_sequences.max(1)).max(num_rows);
            let num_pages = end.div_ceil(PAGE_TOKENS) as u32;
            let pages = (next_page..next_page + num_pages).collect();
            next_page += num_pages;
            slices.push(AttentionSlice {
                first_row: i * chunk,
                num_rows,
                first_position: end - num_rows,
                pages,
            });
        }
        let positions: Vec<u32> = (slices.iter())
            .flat_map(|slice| (slice.first_position..slice.first_position + slice.num_rows).map(|p| p as u32))
            .collect();
        let most = 1 + *positions.iter().max().context("no rows")? as usize;
        let block = |i: usize| -> Result<Block> {
            let matrix = |n, k| matrix(cpu, n, k, i as u64);
            Ok(Block {
                norm: vec![1.0; hidden],
                q: matrix(heads * HEAD_DIM, hidden)?,
                k: matrix(kv_heads * HEAD_DIM, hidden)?,
                v: matrix(kv_heads * HEAD_DIM, hidden)?,
                o: matrix(hidden, heads * HEAD_DIM)?,
                gate: matrix(ffn, hidden)?,
                up: matrix(ffn, hidden)?,
                down: matrix(hidden, ffn)?,
                cache: cpu.kv_cache(next_page as usize, kv_heads, HEAD_DIM)?,
            })
        };
        let angles = |f: fn(f32) -> f32| {
            let angle =
                |i: usize| (i / (HEAD_DIM / 2)) as f32 * 1e5f32.powf(-((i % (HEAD_DIM / 2)) as f32) / 32.0);
            (0..most * HEAD_DIM / 2).map(|i| f(angle(i))).collect()
        };
        Ok(Step {
            shapes,
            weights: options.weights,
            table: cpu.table(TensorView::new(ViewDtype::F32, vocab, hidden, &numbers(vocab, hidden, 99)))?,
            blocks: (0..blocks).map(block).collect::<Result<_>>()?,
            rope: RopeTable { head_dim: HEAD_DIM, cos: angles(f32::cos), sin: angles(f32::sin) },
            tokens: (0..rows).map(|i| (i * 7919 % vocab) as u32).collect(),
            sampled: slices.iter().map(|slice| (slice.first_row + slice.num_rows - 1) as u32).collect(),
            positions,
            slices,
            x: cpu.array(),
            normed: cpu.operand(),
            q: cpu.array(),
            k: cpu.array(),
            v: cpu.array(),
            inner: cpu.operand(),
            last: cpu.array(),
            logits: cpu.array(),
            largest: Vec::new(),
        })
    }

    /// Writes keys and values of all positions before the micro-batch's.
    fn fill(&mut self, cpu: &Cpu) -> Result<()> {
        let cols = self.shapes.kv_heads * HEAD_DIM;
        for slice in &self.slices {
            let before = AttentionSlice {
                first_row: 0,
                num_rows: slice.first_position,
                first_position: 0,
                ..slice.clone()
            };
            let values: Vec<f32> = random(before.num_rows * cols, slice.first_row as u64).collect();
            cpu.upload(&values, before.num_rows, cols, &mut self.k)?;
            for block in &mut self.blocks {
                cpu.kv_append(&mut block.cache, &self.k, &self.k, std::slice::from_ref(&before))?;
            }
        }
        Ok(())
    }

    fn costs(&self) -> Vec<Cost> {
        let Shapes { blocks, hidden, heads, kv_heads, ffn, vocab, .. } = self.shapes;
        let rows = self.tokens.len() as f64;
        let product = |n: usize, k: usize| {
            let bytes = blocks * CpuMatrix::bytes_of(self.weights, n, k);
            (2.0 * rows * (blocks * n * k) as f64, bytes as f64)
        };
        let seen: usize = (self.slices.iter())
            .flat_map(|slice| (0..slice.num_rows).map(|i| slice.first_position + i + 1))
            .sum();
        let cached: usize = self.slices.iter().map(|slice| slice.first_position + slice.num_rows).sum();
        let kv_bytes = (2 * 2 * kv_heads * HEAD_DIM * blocks) as f64;
        let head = 2.0 * (self.sampled.len() * vocab * hidden) as f64;
        let cost = |name, (flops, bytes)| Cost { name, seconds: Vec::new(), flops, bytes };
        vec![
            cost("embed", (0.0, 0.0)),
            cost("rms_norm", (0.0, 0.0)),
            cost("q, k, v", product((heads + 2 * kv_heads) * HEAD_DIM, hidden)),
            cost("rope", (0.0, 0.0)),
            cost("kv_append", (0.0, kv_bytes * rows)),
            cost("attention", ((4 * heads * HEAD_DIM * blocks * seen) as f64, kv_bytes * cached as f64)),
            cost("o", product(hidden, heads * HEAD_DIM)),
            cost("gate, up", product(2 * ffn, hidden)),
            cost("down", product(hidden, ffn)),
            cost("head", (head, (2 * vocab * hidden) as f64)),
        ]
    }

    fn run(&mut self, cpu: &Cpu, costs: &mut [Cost], is_apart: bool) -> Result<()> {
        costs.iter_mut().for_each(|cost| cost.seconds.push(0.0));
        let mut clock = Instant::now();
        let mut lap = |op: usize| {
            let now = Instant::now();
            *costs[op].seconds.last_mut().expect("a run has begun") += (now - clock).as_secs_f64();
            clock = now;
        };
        let Step { x, normed, q, k, v, inner, .. } = self;
        cpu.embed(&self.table, &self.tokens, x)?;
        lap(0);
        for block in &mut self.blocks {
            cpu.rms_norm(x, &block.norm, EPS, normed)?;
            lap(1);
            if is_apart {
                cpu.matmul(normed, &block.q, q)?;
                cpu.matmul(normed, &block.k, k)?;
                cpu.matmul(normed, &block.v, v)?;
                lap(2);
                cpu.rope(q, &self.rope, &self.positions)?;
                cpu.rope(k, &self.rope, &self.positions)?;
                lap(3);
                cpu.kv_append(&mut block.cache, k, v, &self.slices)?;
                lap(4);
                cpu.attention(q, &block.cache, &self.slices, inner)?;
            } else {
                cpu.matmul_each(normed, [&block.q, &block.k, &block.v], [&mut *q, &mut *k, &mut *v])?;
                lap(2);
                let angles = (&self.rope, &self.positions[..]);
                cpu.attend([q, k], v, angles, &mut block.cache, &self.slices, inner)?;
            }
            lap(5);
            cpu.matmul_add(inner, &block.o, x)?;
            lap(6);
            cpu.rms_norm(x, &block.norm, EPS, normed)?;
            lap(1);
            cpu.swiglu(normed, &block.gate, &block.up, inner)?;
            lap(7);
            cpu.matmul_add(inner, &block.down, x)?;
            lap(8);
        }
        cpu.gather(x, &self.sampled, &mut self.last)?;
        cpu.rms_norm(&self.last, &self.blocks[0].norm, EPS, normed)?;
        lap(1);
        cpu.matmul_argmax(normed, &self.table, &mut self.logits, &mut self.largest)?;
        lap(9);
        ensure!(self.largest.iter().all(|largest| largest.value.is_finite()), "logits are not finite");
        Ok(())
    }
}

fn matrix(cpu: &Cpu, n: usize, k: usize, seed: u64) -> Result<CpuMatrix> {
    Ok(cpu.matrix(TensorView::new(ViewDtype::F32, n, k, &numbers(n, k, seed)))?)
}

/// Weights in f32.
fn numbers(n: usize, k: usize, seed: u64) -> Vec<u8> {
    let scale = (k as f32).sqrt().recip();
    random(n * k, seed).flat_map(|v| (v * scale).to_le_bytes()).collect()
}

fn options() -> Result<Options> {
    let mut options = Options {
        shapes: SMOLLM2,
        threads: available_cores().len(),
        simd: Simd::detect(),
        rows: 256,
        chunk: 1,
        context: 150,
        weights: WeightType::Bf16,
        is_apart: false,
    };
    let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    while let Some(key) = args.next() {
        if key == "--apart" {
            options.is_apart = true;
            continue;
        }
        let value = common::value_of(&key, &mut args)?;
        match key.as_str() {
            "--model" => {
                options.shapes = match value.as_str() {
                    "smollm2" => SMOLLM2,
                    "llama" => LLAMA,
                    _ => bail!("unknown model {value}"),
                }
            }
            "--threads" => options.threads = value.parse()?,
            "--simd" => options.simd = common::simd(&value)?,
            "--weights" => {
                let named = WeightType::ALL.into_iter().find(|weights| weights.name() == value);
                options.weights = named.with_context(|| format!("unknown number type {value}"))?;
            }
            "--rows" => options.rows = value.parse()?,
            "--chunk" => options.chunk = value.parse()?,
            "--context" => options.context = value.parse()?,
            _ => bail!("unknown option {key}"),
        }
    }
    ensure!(
        options.rows > 0 && options.chunk > 0 && options.context > 0,
        "rows, chunk and context are counts"
    );
    Ok(options)
}
