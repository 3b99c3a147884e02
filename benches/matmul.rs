//! How near is the product, in bf16 or with narrow weights, to the dot-product peak of this core?
//!
//! And, for few rows, how near to the speed at which memory can be read? Both ceilings are measured in the
//! same run, with the same threads. Weights are read cold, as in a model: every call takes another copy, of 128 MB together
//! or two copies at least; with `--warm` all take the same. Copies, and what the speed of memory is measured with, exceed twice
//! the last cache that the system tells of, as far as a quarter of the free memory has room for them; how much
//! they take is printed.
//!
//! ```text
//! cargo bench --bench matmul -- [--threads N] [--simd portable|avx2|avx512|amx] [--rows 1,64] [--shapes 576x1536]
//!                               [--weights bf16|int8|int8-weight|int4-weight] [--warm] [--ladder]
//! ```
//!
//! With `--ladder` it asks instead where the time of few rows of `int8-weight` or `int4-weight` goes: the product is done as far as
//! each rung of [`Rung`], which says what is left out.
//!
//! A time is the median, and the best, of 15 samples of at least a millisecond.

#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "a bench prints")]

mod common;

use anyhow::{Context, Result, bail};
use common::{numbers, random, time};
use kernels::{Array, Backend, Ceilings, Cpu, CpuMatrix, CpuOperand, CpuOptions, KvDtype, Rung, Simd};
use kernels::{TensorView, ViewDtype, WeightType, available_cores, cold_bytes, cold_bytes_with_room};

/// `[n, k]` of SmolLM2-135M (q and o; k and v; gate and up; down; head), of a 1.1 B Llama (alike), and of a narrow
/// slice of Ultra (an eighth of q and of o, k and v, the narrowest FFN).
const SHAPES: [(usize, usize); 15] = [
    (576, 576),
    (192, 576),
    (1536, 576),
    (576, 1536),
    (49_152, 576),
    (2048, 2048),
    (512, 2048),
    (8192, 2048),
    (2048, 8192),
    (32_000, 2048),
    (2048, 16_384),
    (16_384, 2048),
    (1024, 16_384),
    (5376, 16_384),
    (16_384, 5376),
];
/// Those of a ladder, where none are named: few enough for one tile, and weights that are beyond every cache as one matrix or as
/// its copies.
const LADDER_ROWS: [usize; 2] = [1, 4];
const LADDER_SHAPES: [(usize, usize); 3] = [(1536, 576), (2048, 2048), (8192, 2048)];
const ROWS: [usize; 6] = [1, 4, 16, 64, 256, 512];
const WEIGHTS: [WeightType; 4] =
    [WeightType::Bf16, WeightType::Int8, WeightType::Int8Weight, WeightType::Int4Weight];
/// Copies of weights take at least as much together.
const LEAST_COLD_BYTES: usize = 128 << 20;

struct Options {
    threads: usize,
    simd: Simd,
    weights: WeightType,
    rows: Vec<usize>,
    shapes: Vec<(usize, usize)>,
    /// Whether every call takes the same weights, which stay in the caches that they fit into.
    is_warm: bool,
    is_ladder: bool,
}

fn main() -> Result<()> {
    let Options { threads, simd, weights, rows, shapes, is_warm, is_ladder } = options()?;
    let cores = available_cores();
    let cpu = Cpu::new(CpuOptions { cores, threads, simd, weights, kv: KvDtype::Bf16 })?;
    cpu.pin_caller();
    let ceilings = Ceilings::new(&cpu)?;
    println!(
        "{threads} threads, {}, {}: product {:.0} GFLOP/s, f32 {:.0} GFLOP/s, memory read {:.1} GB/s",
        simd.name(),
        weights.name(),
        ceilings.product_flops() / 1e9,
        ceilings.f32_flops() / 1e9,
        ceilings.read_bandwidth() / 1e9
    );
    println!(
        "cold weights of {} MB, memory read over {} MB, last cache {} MB",
        cold_bytes_with_room(LEAST_COLD_BYTES) >> 20,
        ceilings.read_bytes() >> 20,
        (cold_bytes() / 2) >> 20
    );
    println!("shares are of the median (of the best)\n");
    match is_ladder {
        true => {
            println!("     [n, k]      rows  rung        time us      GB/s   of memory        of the whole")
        }
        false => println!("     [n, k]      rows  time us   GFLOP/s  of peak        GB/s   of memory"),
    }
    for (n, k) in shapes {
        let matrices = Weights::new(&cpu, n, k, is_warm)?;
        for &rows in &rows {
            if is_ladder {
                climb(&cpu, &ceilings, &matrices, rows)?;
                continue;
            }
            let has_integer_inputs = weights == WeightType::Int8;
            report(&cpu, &ceilings, &matrices, rows, has_integer_inputs)?;
        }
    }
    Ok(())
}

/// Copies of one random matrix, packed, and what was packed in f32.
struct Weights {
    n: usize,
    k: usize,
    packed: Vec<CpuMatrix>,
    plain: Vec<f32>,
}

impl Weights {
    fn new(cpu: &Cpu, n: usize, k: usize, is_warm: bool) -> Result<Self> {
        let bits: Vec<u16> = random(n * k, 0).map(|v| (v.to_bits() >> 16) as u16).collect();
        let bytes: Vec<u8> = bits.iter().flat_map(|bits| bits.to_le_bytes()).collect();
        let view = TensorView::new(ViewDtype::Bf16, n, k, &bytes);
        let first = cpu.matrix(view)?;
        let copies =
            if is_warm { 1 } else { cold_bytes_with_room(LEAST_COLD_BYTES).div_ceil(first.bytes()).max(2) };
        let others = (1..copies).map(|_| cpu.matrix(view));
        let packed = std::iter::once(Ok(first)).chain(others).collect::<Result<_, _>>()?;
        let packed: Vec<CpuMatrix> = packed;
        let mut plain = vec![0.0; n * k];
        plain.chunks_mut(k).enumerate().for_each(|(row, plain)| packed[0].copy_row(row, plain));
        Ok(Self { n, k, packed, plain })
    }
}

fn report(
    cpu: &Cpu,
    ceilings: &Ceilings<'_>,
    weights: &Weights,
    rows: usize,
    has_integer_inputs: bool,
) -> Result<()> {
    let &Weights { n, k, ref packed, ref plain } = weights;
    let x = operand(cpu, rows, k)?;
    let mut out = cpu.array();
    cpu.matmul(&x, &packed[0], &mut out)?;
    check(&x, plain, &out, [n, k], has_integer_inputs)?;

    let flops = 2.0 * (rows * n * k) as f64;
    let bytes = packed[0].bytes() as f64;
    // Few rows are as fast as memory is just now, many as the clock.
    let (before, peak) = (ceilings.read_bandwidth(), ceilings.product_flops());
    let mut copies = packed.iter().cycle();
    let ours = time(flops / peak, || {
        let w = copies.next().context("no weights")?;
        Ok(cpu.matmul(&x, w, &mut out)?)
    })?;
    let bandwidth = before.max(ceilings.read_bandwidth());
    println!(
        "[{n:6}, {k:5}] {rows:5} {:9.0} {:9.0} {:5.1}% ({:5.1}%) {:7.1} {:5.1}% ({:5.1}%)",
        ours.median * 1e6,
        flops / ours.median / 1e9,
        100.0 * flops / ours.median / peak,
        100.0 * flops / ours.best / peak,
        bytes / ours.median / 1e9,
        100.0 * bytes / ours.median / bandwidth,
        100.0 * bytes / ours.best / bandwidth
    );
    Ok(())
}

/// Times a product as far as each rung.
fn climb(cpu: &Cpu, ceilings: &Ceilings<'_>, weights: &Weights, rows: usize) -> Result<()> {
    let &Weights { n, k, ref packed, ref plain } = weights;
    let x = operand(cpu, rows, k)?;
    let mut out = cpu.array();
    cpu.climb(&x, &packed[0], Rung::Whole, &mut out)?;
    check(&x, plain, &out, [n, k], false)?;

    let bytes = packed[0].bytes() as f64;
    let before = ceilings.read_bandwidth();
    let mut copies = packed.iter().cycle();
    let times = Rung::ALL.map(|rung| {
        time(bytes / before, || {
            let w = copies.next().context("no weights")?;
            Ok(cpu.climb(&x, w, rung, &mut out)?)
        })
    });
    let bandwidth = before.max(ceilings.read_bandwidth());
    let times = times.into_iter().collect::<Result<Vec<_>>>()?;
    let whole = times.last().context("no rungs")?.median;
    for (rung, ours) in Rung::ALL.iter().zip(&times) {
        println!(
            "[{n:6}, {k:5}] {rows:5}  {:<10} {:8.0} {:9.1} {:5.1}% ({:5.1}%) {:11.1}%",
            rung.name(),
            ours.median * 1e6,
            bytes / ours.median / 1e9,
            100.0 * bytes / ours.median / bandwidth,
            100.0 * bytes / ours.best / bandwidth,
            100.0 * ours.median / whole
        );
    }
    Ok(())
}

/// Random rows in the device's number type: a norm is what makes a matmul's input from f32.
fn operand(cpu: &Cpu, rows: usize, k: usize) -> Result<CpuOperand> {
    let values: Vec<f32> = random(rows * k, 0).collect();
    let ones: Vec<u8> = (0..k).flat_map(|_| 1f32.to_le_bytes()).collect();
    let ones = cpu.vector(TensorView::new(ViewDtype::F32, 1, k, &ones))?;
    let (mut x, mut operand) = (cpu.array(), cpu.operand());
    cpu.upload(&values, rows, k, &mut x)?;
    cpu.rms_norm(&x, &ones, 1e-5, &mut operand)?;
    Ok(operand)
}

/// Compare elements of every row, spread over the columns, with their sums in f64.
fn check(x: &CpuOperand, w: &[f32], out: &Array, [n, k]: [usize; 2], has_integer_inputs: bool) -> Result<()> {
    let mut row = vec![0.0; k];
    for i in 0..x.rows() {
        x.copy_row(i, &mut row);
        let largest = row.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        // Half a step of what is then quantised, for every weight.
        let step = if has_integer_inputs { f64::from(largest) / 253.0 } else { 0.0 };
        for col in (i % 7..n).step_by(n / 16 + 1) {
            let terms = || row.iter().zip(&w[col * k..]).map(|(&x, &w)| f64::from(x) * f64::from(w));
            let (sum, magnitudes) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
            let found = f64::from(out.row(i)[col]);
            // Half a unit in the last place of at most the sum of magnitudes, for every product and addition.
            let weights: f64 = w[col * k..][..k].iter().map(|&w| f64::from(w).abs()).sum();
            let tolerance = magnitudes * 2.0 * (k as f64 + 3.0) * 2f64.powi(-24) + step * weights;
            if (found - sum).abs() > tolerance {
                bail!("[{}, {k}] · [{n}, {k}]: element [{i}, {col}] is {found}, not {sum}", x.rows());
            }
        }
    }
    Ok(())
}

fn options() -> Result<Options> {
    let mut options = Options {
        threads: available_cores().len(),
        simd: Simd::detect(),
        weights: WeightType::Bf16,
        rows: vec![],
        shapes: vec![],
        is_warm: false,
        is_ladder: false,
    };
    let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    while let Some(key) = args.next() {
        match key.as_str() {
            "--warm" => {
                options.is_warm = true;
                continue;
            }
            "--ladder" => {
                options.is_ladder = true;
                continue;
            }
            _ => {}
        }
        let value = common::value_of(&key, &mut args)?;
        match key.as_str() {
            "--threads" => options.threads = value.parse()?,
            "--simd" => options.simd = common::simd(&value)?,
            "--weights" => {
                let weights = WEIGHTS.into_iter().find(|weights| weights.name() == value);
                options.weights = weights.with_context(|| format!("unknown type {value}"))?;
            }
            "--rows" => options.rows = numbers(&value)?,
            "--shapes" => options.shapes = value.split(',').map(shape).collect::<Result<_>>()?,
            _ => bail!("unknown option {key}"),
        }
    }
    let (rows, shapes): (&[_], &[_]) = match options.is_ladder {
        true => (&LADDER_ROWS, &LADDER_SHAPES),
        false => (&ROWS, &SHAPES),
    };
    if options.rows.is_empty() {
        options.rows = rows.to_vec();
    }
    if options.shapes.is_empty() {
        options.shapes = shapes.to_vec();
    }
    Ok(options)
}

fn shape(text: &str) -> Result<(usize, usize)> {
    let (n, k) = text.split_once('x').with_context(|| format!("{text} is not NxK"))?;
    Ok((n.parse()?, k.parse()?))
}
