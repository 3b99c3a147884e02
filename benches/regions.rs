//! What does a region of the thread pool cost, and what is left of the speed when a neighbour keeps a core busy?
//!
//! The products are those of a block of SmolLM2-135M, one after the other, each a region of a few microseconds. The
//! neighbour is another process that counts as fast as it can, on a core that the system chooses. The bar is 45 % of
//! the undisturbed speed: threads that spin at barriers keep a tenth to a half.
//!
//! ```text
//! cargo bench --bench regions -- [ROWS]
//! ```

#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "a bench prints")]

mod common;

use anyhow::{Context, Result};
use common::{interval::Interval, median};
use kernels::{Backend, Ceilings, Cpu, CpuMatrix, CpuOptions, KvDtype, Simd, WeightType};
use kernels::{TensorView, ViewDtype, available_cores};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// `[n, k]` of q, k, v, o, gate, up and down.
const SHAPES: [(usize, usize); 7] =
    [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)];
/// Alone and disturbed in turn, so many times.
const PAIRS: usize = 9;
const SAMPLE: Duration = Duration::from_millis(700);

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    let rows = match args.next().as_deref() {
        Some("neighbour") => return neighbour(),
        Some(rows) => rows.parse().context("ROWS is a number")?,
        None => 64,
    };
    let cores = available_cores();
    let threads = cores.len();
    let simd = Simd::detect();
    let cpu = Cpu::new(CpuOptions { cores, threads, simd, weights: WeightType::Bf16, kv: KvDtype::Bf16 })?;
    cpu.pin_caller();
    let region = Ceilings::new(&cpu)?.region_seconds();
    println!("{threads} threads, {}: a region takes {:.2} us", simd.name(), region * 1e6);

    let weights: Vec<CpuMatrix> = SHAPES.iter().map(|&(n, k)| matrix(&cpu, n, k)).collect::<Result<_>>()?;
    let mut shares = Vec::new();
    for _ in 0..PAIRS {
        let alone = blocks_per_second(&cpu, &weights, rows)?;
        let mut child = start_neighbour()?;
        let disturbed = blocks_per_second(&cpu, &weights, rows);
        child.kill().and_then(|()| child.wait()).context("end the neighbour")?;
        let disturbed = disturbed?;
        println!("{alone:8.0} blocks of {rows} rows a second alone, {disturbed:8.0} beside a busy process");
        shares.push(100.0 * disturbed / alone);
    }
    println!("left of the speed, in percent: median {:.1}, {:.1}", median(&shares), Interval::of(&shares));
    Ok(())
}

fn matrix(cpu: &Cpu, n: usize, k: usize) -> Result<CpuMatrix> {
    let bytes: Vec<u8> = (0..n * k).flat_map(|i| ((i as f32 * 0.37).sin()).to_le_bytes()).collect();
    Ok(cpu.matrix(TensorView::new(ViewDtype::F32, n, k, &bytes))?)
}

/// How often all products are made in a second.
fn blocks_per_second(cpu: &Cpu, weights: &[CpuMatrix], rows: usize) -> Result<f64> {
    let (mut x, mut out) = (cpu.array(), cpu.array());
    let mut operands = Vec::new();
    for (_, k) in SHAPES {
        let ones: Vec<u8> = (0..k).flat_map(|_| 1f32.to_le_bytes()).collect();
        let ones = cpu.vector(TensorView::new(ViewDtype::F32, 1, k, &ones))?;
        let values: Vec<f32> = (0..rows * k).map(|i| (i as f32 * 0.73).cos()).collect();
        let mut operand = cpu.operand();
        cpu.upload(&values, rows, k, &mut x)?;
        cpu.rms_norm(&x, &ones, 1e-5, &mut operand)?;
        operands.push(operand);
    }
    let start = Instant::now();
    let mut blocks = 0;
    while start.elapsed() < SAMPLE {
        for (operand, matrix) in operands.iter().zip(weights) {
            cpu.matmul(operand, matrix, &mut out)?;
        }
        blocks += 1;
    }
    Ok(f64::from(blocks) / start.elapsed().as_secs_f64())
}

/// This program once more, as the neighbour.
fn start_neighbour() -> Result<Child> {
    let program = std::env::current_exe().context("find this program")?;
    let child = Command::new(program).arg("neighbour").spawn().context("start the neighbour")?;
    std::thread::sleep(Duration::from_millis(50)); // Until it counts.
    Ok(child)
}

/// Counts until it is killed, or the one who would kill it has not come.
fn neighbour() -> Result<()> {
    let start = Instant::now();
    let mut count = 0u64;
    while start.elapsed() < 4 * SAMPLE {
        (0..1000).for_each(|i| count = std::hint::black_box(count.wrapping_mul(3).wrapping_add(i)));
    }
    Ok(())
}
