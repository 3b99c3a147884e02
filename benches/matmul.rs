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
//! A shape is NxK, or `576+192+192x576` for three products in one go, as a block does q, k and v.
//!
//! With `--ladder` it asks instead where the time goes: the product is done as far as each rung of [`Rung`], which says what is left
//! out. There is none for `int8`, which the peak of its instructions bounds: the first line has it beside the one of bf16.
//!
//! A time is the median, and the best, of 15 samples of at least a millisecond.

#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "a bench prints")]

mod common;

use anyhow::{Context, Result, bail};
use common::{numbers, random, time};
use kernels::{Array, Backend, Ceilings, Cpu, CpuMatrix, CpuOperand, CpuOptions, KvDtype, Rung, Simd};
use kernels::{TensorView, ViewDtype, WeightType, available_cores, cold_bytes, cold_bytes_with_room};

/// SmolLM2-135M (q and o; k and v alone; q, k and v as a block has them; gate and up; down; head), a 1.1 B Llama (alike), and
/// a narrow slice of Ultra (an eighth of q and of o, k and v alone, an eighth of q, k and v, the narrowest FFN).
const SHAPES: [&str; 18] = [
    "576x576",
    "192x576",
    "576+192+192x576",
    "1536x576",
    "576x1536",
    "49152x576",
    "2048x2048",
    "512x2048",
    "2048+512+512x2048",
    "8192x2048",
    "2048x8192",
    "32000x2048",
    "2048x16384",
    "16384x2048",
    "1024x16384",
    "2048+128+128x16384",
    "5376x16384",
    "16384x5376",
];
/// Those of a ladder, where none are named: few enough for one tile, and enough for several; weights that are beyond every cache as
/// one matrix or as its copies.
const LADDER_ROWS: [usize; 3] = [1, 4, 64];
const LADDER_SHAPES: [&str; 3] = ["1536x576", "2048x2048", "8192x2048"];
const ROWS: [usize; 6] = [1, 4, 16, 64, 256, 512];
const WEIGHTS: [WeightType; 4] =
    [WeightType::Bf16, WeightType::Int8, WeightType::Int8Weight, WeightType::Int4Weight];
/// Copies of weights take at least as much together.
const LEAST_COLD_BYTES: usize = 128 << 20;

/// Weights of products with the same input, `[n, k]` each: one, or three that are made in one go.
struct Shape {
    n: Vec<usize>,
    k: usize,
}

struct Options {
    threads: usize,
    simd: Simd,
    weights: WeightType,
    rows: Vec<usize>,
    shapes: Vec<Shape>,
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
    let (bf16, int8) = (ceilings.bf16_flops(), ceilings.int8_flops());
    println!(
        "{threads} threads, {}, weights in {}: products in bf16 {:.0} GFLOP/s, in int8 {:.0} ({:.2} of that), in f32 {:.0}; \
         memory read {:.1} GB/s",
        simd.name(),
        weights.name(),
        bf16 / 1e9,
        int8 / 1e9,
        int8 / bf16,
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
            println!(
                "           [n, k]      rows  rung        time us      GB/s   of memory        of the whole   of peak"
            )
        }
        false => println!("           [n, k]      rows  time us   GFLOP/s  of peak        GB/s   of memory"),
    }
    for shape in shapes {
        let matrices = Weights::new(&cpu, shape, is_warm)?;
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

/// Copies of random matrices, packed.
struct Weights {
    shape: Shape,
    copies: Vec<Vec<CpuMatrix>>,
}

impl Weights {
    fn new(cpu: &Cpu, shape: Shape, is_warm: bool) -> Result<Self> {
        let k = shape.k;
        let random_bits = |n: &usize| random(n * k, 0).map(|v| (v.to_bits() >> 16) as u16);
        let bits = shape.n.iter().map(|n| random_bits(n).flat_map(u16::to_le_bytes).collect::<Vec<u8>>());
        let bits: Vec<_> = shape.n.iter().copied().zip(bits).collect();
        let copy = || -> Result<Vec<CpuMatrix>> {
            let matrices =
                bits.iter().map(|(n, bits)| Ok(cpu.matrix(TensorView::new(ViewDtype::Bf16, *n, k, bits))?));
            matrices.collect()
        };
        let first = copy()?;
        let bytes = bytes(&first);
        let num_copies =
            if is_warm { 1 } else { cold_bytes_with_room(LEAST_COLD_BYTES).div_ceil(bytes).max(2) };
        let others = (1..num_copies).map(|_| copy());
        let copies = std::iter::once(Ok(first)).chain(others).collect::<Result<_>>()?;
        Ok(Self { shape, copies })
    }

    /// The one matrix of a copy.
    fn only(&self, copy: usize) -> Result<&CpuMatrix> {
        match &self.copies[copy][..] {
            [w] => Ok(w),
            _ => bail!("a ladder is of one product"),
        }
    }

    /// The shape, as a line of a table begins.
    fn name(&self) -> String {
        let n: Vec<String> = self.shape.n.iter().map(usize::to_string).collect();
        format!("[{:>14}, {:5}]", n.join("+"), self.shape.k)
    }
}

/// Memory of packed weights.
fn bytes(weights: &[CpuMatrix]) -> usize {
    weights.iter().map(CpuMatrix::bytes).sum()
}

/// All products of the weights with x.
fn multiply(cpu: &Cpu, x: &CpuOperand, weights: &[CpuMatrix], out: &mut [Array]) -> Result<()> {
    match (weights, out) {
        ([w], [out]) => cpu.matmul(x, w, out)?,
        ([q, k, v], [a, b, c]) => cpu.matmul_each(x, [q, k, v], [a, b, c])?,
        (weights, _) => bail!("{} products in one go, where one or three can be measured", weights.len()),
    }
    Ok(())
}

fn report(
    cpu: &Cpu,
    ceilings: &Ceilings<'_>,
    weights: &Weights,
    rows: usize,
    has_integer_inputs: bool,
) -> Result<()> {
    let Shape { n, k } = &weights.shape;
    let x = operand(cpu, rows, *k)?;
    let mut out: Vec<Array> = n.iter().map(|_| cpu.array()).collect();
    let first = weights.copies.first().context("no weights")?;
    multiply(cpu, &x, first, &mut out)?;
    for (w, out) in first.iter().zip(&out) {
        check(&x, w, out, has_integer_inputs)?;
    }

    let flops = 2.0 * (rows * n.iter().sum::<usize>() * k) as f64;
    let bytes = bytes(first) as f64;
    // Few rows are as fast as memory is just now, many as the clock.
    let (before, peak) = (ceilings.read_bandwidth(), ceilings.product_flops());
    let mut copies = weights.copies.iter().cycle();
    let ours = time(flops / peak, || multiply(cpu, &x, copies.next().context("no weights")?, &mut out))?;
    let bandwidth = before.max(ceilings.read_bandwidth());
    println!(
        "{} {rows:5} {:9.0} {:9.0} {:5.1}% ({:5.1}%) {:7.1} {:5.1}% ({:5.1}%)",
        weights.name(),
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
    let x = operand(cpu, rows, weights.shape.k)?;
    let mut out = cpu.array();
    let first = weights.only(0)?;
    cpu.climb(&x, first, Rung::Whole, &mut out)?;
    check(&x, first, &out, false)?;

    let bytes = first.bytes() as f64;
    let flops = 2.0 * (rows * weights.shape.k * out.cols()) as f64;
    let (before, peak) = (ceilings.read_bandwidth(), ceilings.product_flops());
    let mut copies = (0..weights.copies.len()).cycle();
    let rungs = cpu.rungs(&x, first)?;
    let times = rungs.iter().map(|&rung| {
        let least = if rung.multiplies() { flops / peak } else { 0.0 };
        time(least.max(bytes / before), || {
            let w = weights.only(copies.next().context("no weights")?)?;
            Ok(cpu.climb(&x, w, rung, &mut out)?)
        })
    });
    let times = times.collect::<Result<Vec<_>>>()?;
    let bandwidth = before.max(ceilings.read_bandwidth());
    let whole = times.last().context("no rungs")?.median;
    for (rung, ours) in rungs.iter().zip(&times) {
        let of_peak = 100.0 * flops / ours.median / peak;
        let of_peak = if rung.multiplies() { format!("{of_peak:8.1}%") } else { String::new() };
        println!(
            "{} {rows:5}  {:<10} {:8.0} {:9.1} {:5.1}% ({:5.1}%) {:11.1}% {of_peak}",
            weights.name(),
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
fn check(x: &CpuOperand, w: &CpuMatrix, out: &Array, has_integer_inputs: bool) -> Result<()> {
    let (n, k) = (out.cols(), x.cols());
    let (mut row, mut weights) = (vec![0.0; k], vec![0.0; k]);
    for i in 0..x.rows() {
        x.copy_row(i, &mut row);
        let largest = row.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        // Half a step of what is then quantised, for every weight.
        let step = if has_integer_inputs { f64::from(largest) / 253.0 } else { 0.0 };
        for col in (i % 7..n).step_by(n / 16 + 1) {
            w.copy_row(col, &mut weights);
            let terms = || row.iter().zip(&weights).map(|(&x, &w)| f64::from(x) * f64::from(w));
            let (sum, magnitudes) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
            let found = f64::from(out.row(i)[col]);
            // Half a unit in the last place of at most the sum of magnitudes, for every product and addition.
            let magnitude: f64 = weights.iter().map(|&w| f64::from(w).abs()).sum();
            let tolerance = magnitudes * 2.0 * (k as f64 + 3.0) * 2f64.powi(-24) + step * magnitude;
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
    let (rows, shapes): (&[_], &[&str]) = match options.is_ladder {
        true => (&LADDER_ROWS, &LADDER_SHAPES),
        false => (&ROWS, &SHAPES),
    };
    if options.rows.is_empty() {
        options.rows = rows.to_vec();
    }
    if options.shapes.is_empty() {
        options.shapes = shapes.iter().map(|text| shape(text)).collect::<Result<_>>()?;
    }
    Ok(options)
}

fn shape(text: &str) -> Result<Shape> {
    let (n, k) = text.split_once('x').with_context(|| format!("{text} is not NxK or N+N+NxK"))?;
    let n = n.split('+').map(str::parse).collect::<Result<_, _>>()?;
    Ok(Shape { n, k: k.parse()? })
}
