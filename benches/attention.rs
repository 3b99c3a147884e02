//! How near is attention over the paged cache to what the machine can do, for prefill and for decode?
//!
//! By context and by the query heads that share a KV head. Both ceilings, products and reading memory, are measured
//! in the same run with the same threads; keys and values are bf16.
//!
//! ```text
//! cargo bench --bench attention -- [--threads N] [--simd portable|avx2|avx512|amx] [--contexts 128,1024]
//!                                  [--groups 1,8] [--head-dim 64]
//! ```
//!
//! Decode is one row of each of so many sequences that their keys and values take 128 MB, 256 at most. Prefill
//! is a chunk of 512 tokens, or as many as the context has, that ends at the context. Some rows are compared
//! with the plain loops before anything is timed. A time is the median of 15 samples of at least a millisecond.

#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "a bench prints")]

mod common;

use anyhow::{Result, bail, ensure};
use common::{numbers, random, time};
use kernels::{
    Array, AttentionSlice, Backend, Ceilings, Cpu, CpuOptions, KvCache, KvDtype, PAGE_TOKENS, Reference,
    Simd, WeightType, available_cores,
};

const KV_HEADS: usize = 4;
const CONTEXTS: [usize; 4] = [128, 512, 2048, 8192];
const GROUPS: [usize; 4] = [1, 3, 8, 16];
/// Keys and values of all sequences that decode.
const CACHE_BYTES: usize = 128 << 20;
const MAX_ROWS: usize = 256;
const CHUNK_TOKENS: usize = 512;
/// Queries are so large that few keys have nearly all of the weight: else every answer would be close to 0.
const QUERY_SIZE: f32 = 32.0;
/// Weights, and the answer, are rounded to bf16 on both sides: 2⁻⁹ of values below 1 each, and room for sums.
const TOLERANCE: f32 = 1.0 / 64.0;
/// Rows of a slice that are compared.
const CHECKED_ROWS: usize = 4;
/// Slices of which rows are compared.
const CHECKED_SLICES: usize = 2;

struct Options {
    threads: usize,
    simd: Simd,
    contexts: Vec<usize>,
    groups: Vec<usize>,
    head_dim: usize,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Prefill,
    Decode,
}

/// One question.
#[derive(Clone, Copy)]
struct Case {
    kind: Kind,
    context: usize,
    /// Query heads for each KV head.
    group: usize,
    head_dim: usize,
}

fn main() -> Result<()> {
    let Options { threads, simd, contexts, groups, head_dim } = options()?;
    let cores = available_cores();
    let cpu = Cpu::new(CpuOptions { cores, threads, simd, weights: WeightType::Bf16, kv: KvDtype::Bf16 })?;
    cpu.pin_caller();
    let ceilings = Ceilings::new(&cpu)?;
    println!(
        "{threads} threads, {}: product {:.0} GFLOP/s, memory read {:.1} GB/s; {KV_HEADS} KV heads of {head_dim}\n",
        simd.name(),
        ceilings.product_flops() / 1e9,
        ceilings.read_bandwidth() / 1e9
    );
    println!("         context  group   rows   time us   GFLOP/s  of peak    GB/s  of memory  of floor");
    for kind in [Kind::Decode, Kind::Prefill] {
        for &context in &contexts {
            for &group in &groups {
                report(&cpu, &ceilings, Case { kind, context, group, head_dim })?;
            }
        }
    }
    Ok(())
}

impl Case {
    fn name(self) -> &'static str {
        match self.kind {
            Kind::Prefill => "prefill",
            Kind::Decode => "decode",
        }
    }

    /// Bytes of keys and values of a position.
    fn kv_bytes(self) -> usize {
        2 * 2 * KV_HEADS * self.head_dim
    }

    /// Columns of queries.
    fn cols(self) -> usize {
        KV_HEADS * self.group * self.head_dim
    }

    fn slices(self) -> Vec<AttentionSlice> {
        let (sequences, num_rows) = match self.kind {
            Kind::Decode => ((CACHE_BYTES / (self.context * self.kv_bytes())).clamp(1, MAX_ROWS), 1),
            Kind::Prefill => (1, CHUNK_TOKENS.min(self.context)),
        };
        let num_pages = self.context.div_ceil(PAGE_TOKENS) as u32;
        let slice = |i: usize| AttentionSlice {
            first_row: i * num_rows,
            num_rows,
            first_position: self.context - num_rows,
            pages: (i as u32 * num_pages..(i as u32 + 1) * num_pages).collect(),
        };
        (0..sequences).map(slice).collect()
    }
}

fn report(cpu: &Cpu, ceilings: &Ceilings<'_>, case: Case) -> Result<()> {
    let slices = case.slices();
    let rows: usize = slices.iter().map(|slice| slice.num_rows).sum();
    let num_pages = slices.iter().map(|slice| slice.pages.len()).sum();
    let mut cache = cpu.kv_cache(num_pages, KV_HEADS, case.head_dim)?;
    let (mut q, mut out) = (cpu.array(), cpu.operand());
    let queries: Vec<f32> = random(rows * case.cols(), 0).map(|v| v * QUERY_SIZE).collect();
    cpu.upload(&queries, rows, case.cols(), &mut q)?;
    for slice in &slices {
        append(cpu, &mut cache, case, slice)?;
    }
    cpu.attention(&q, &cache, &slices, &mut out)?;
    let mut found = vec![0.0; case.cols()];
    for slice in slices.iter().take(CHECKED_SLICES) {
        check(case, slice, &queries, |row| {
            out.copy_row(row, &mut found);
            found.clone()
        })?;
    }

    let seen: usize = slices.iter().flat_map(|s| (1..=s.num_rows).map(|i| s.first_position + i)).sum();
    let flops = (4 * KV_HEADS * case.group * case.head_dim * seen) as f64;
    let bytes = (case.kv_bytes() * case.context * slices.len()) as f64;
    let before = (ceilings.product_flops(), ceilings.read_bandwidth());
    let expected = (flops / before.0).max(bytes / before.1);
    let seconds = time(expected, || Ok(cpu.attention(&q, &cache, &slices, &mut out)?))?.median;
    let (peak, bandwidth) = (before.0.max(ceilings.product_flops()), before.1.max(ceilings.read_bandwidth()));
    println!(
        "{:<7} {:8} {:6} {rows:6} {:9.0} {:9.0} {:7.1}% {:7.1} {:9.1}% {:8.1}%",
        case.name(),
        case.context,
        case.group,
        seconds * 1e6,
        flops / seconds / 1e9,
        100.0 * flops / seconds / peak,
        bytes / seconds / 1e9,
        100.0 * bytes / seconds / bandwidth,
        100.0 * (flops / peak).max(bytes / bandwidth) / seconds
    );
    Ok(())
}

/// Keys and values of one sequence, position by position.
fn keys_and_values(case: Case, slice: &AttentionSlice) -> [Vec<f32>; 2] {
    let numbers = case.context * KV_HEADS * case.head_dim;
    [1, 2].map(|which| random(numbers, 1 + 2 * u64::from(slice.pages[0]) + which).collect())
}

/// Writes all positions of a sequence.
fn append(cpu: &Cpu, cache: &mut KvCache, case: Case, slice: &AttentionSlice) -> Result<()> {
    let whole = AttentionSlice { first_row: 0, num_rows: case.context, first_position: 0, ..slice.clone() };
    let (mut k, mut v) = (cpu.array(), cpu.array());
    for (values, array) in keys_and_values(case, slice).iter().zip([&mut k, &mut v]) {
        cpu.upload(values, case.context, KV_HEADS * case.head_dim, array)?;
    }
    Ok(cpu.kv_append(cache, &k, &v, &[whole])?)
}

/// Compares the last rows of a slice with those of the plain loops.
fn check(
    case: Case,
    slice: &AttentionSlice,
    queries: &[f32],
    mut found: impl FnMut(usize) -> Vec<f32>,
) -> Result<()> {
    let plain = Reference::new(WeightType::Bf16, KvDtype::Bf16);
    let num_pages = slice.pages.len();
    let mut cache = plain.kv_cache(num_pages, KV_HEADS, case.head_dim)?;
    let pages: Vec<u32> = (0..num_pages as u32).collect();
    let mut arrays: [Array; 3] = std::array::from_fn(|_| plain.array());
    let [q, k, v] = &mut arrays;
    for (values, array) in keys_and_values(case, slice).iter().zip([&mut *k, &mut *v]) {
        plain.upload(values, case.context, KV_HEADS * case.head_dim, array)?;
    }
    let of = |first_position, num_rows| AttentionSlice {
        first_row: 0,
        num_rows,
        first_position,
        pages: pages.clone(),
    };
    plain.kv_append(&mut cache, k, v, &[of(0, case.context)])?;
    let num_rows = CHECKED_ROWS.min(slice.num_rows);
    let first_row = slice.first_row + slice.num_rows - num_rows;
    plain.upload(&queries[first_row * case.cols()..][..num_rows * case.cols()], num_rows, case.cols(), q)?;
    let mut out = plain.operand();
    plain.attention(q, &cache, &[of(case.context - num_rows, num_rows)], &mut out)?;
    for row in 0..num_rows {
        let pairs = out.array().row(row).iter().copied().zip(found(first_row + row));
        for (col, (expected, found)) in pairs.enumerate() {
            if !found.is_finite() || (found - expected).abs() > TOLERANCE {
                let Case { context, group, .. } = case;
                let (name, row) = (case.name(), first_row + row);
                bail!("{name}, context {context}, group {group}: [{row}, {col}] is {found}, not {expected}");
            }
        }
    }
    Ok(())
}

fn options() -> Result<Options> {
    let mut options = Options {
        threads: available_cores().len(),
        simd: Simd::detect(),
        contexts: CONTEXTS.to_vec(),
        groups: GROUPS.to_vec(),
        head_dim: 64,
    };
    let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    while let Some(key) = args.next() {
        let value = common::value_of(&key, &mut args)?;
        match key.as_str() {
            "--threads" => options.threads = value.parse()?,
            "--simd" => options.simd = common::simd(&value)?,
            "--contexts" => options.contexts = numbers(&value)?,
            "--groups" => options.groups = numbers(&value)?,
            "--head-dim" => options.head_dim = value.parse()?,
            _ => bail!("unknown option {key}"),
        }
    }
    let is_count = |numbers: &[usize]| numbers.iter().all(|number| *number > 0);
    ensure!(
        is_count(&options.contexts) && is_count(&options.groups) && is_count(&[options.head_dim]),
        "contexts, groups and head dimensions are counts"
    );
    Ok(options)
}
