//! How near are bf16 products to the fastest that the device does, and to the best of cuBLASLt's settings, by cuBLASLt as we call
//! it and by our own kernel?

use std::fmt;

use anyhow::Result;
use kernels::{Backend, Cuda, KvDtype, RandomTensor, TensorView, ViewDtype, WeightType};

use crate::bars;
use crate::items::Setting;

/// What cuBLASLt as we call it is to reach of the best of its settings.
const LEAST: f64 = 0.85;

/// Weights of fewer bytes, multiplied again and again, might come from the device's cache, wholly or in part, which in a model they do not: twice
/// what a B200 has of it, while an H200 has 50 MB. Of those that are smaller so many copies take turns that they are as large together.
const LEAST_BYTES: usize = 2 * 126_000_000;

/// A product `[rows, k] · [n, k]ᵀ` of several numbers of rows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    what: &'static str,
    n: usize,
    k: usize,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} [{}, {}]", self.what, self.n, self.k)
    }
}

impl Shape {
    /// Copies of its weights that take turns.
    fn copies(self, setting: &Setting) -> u64 {
        let bytes = self.n * self.k * size_of::<u16>();
        if setting.is_small { 2 } else { LEAST_BYTES.div_ceil(bytes) as u64 }
    }
}

/// Those of Ultra's and Super's blocks.
pub(crate) fn shapes(setting: &Setting) -> Vec<Shape> {
    let shape = |what, n, k| Shape { what, n, k };
    match setting.is_small {
        true => vec![shape("small", 96, 64)],
        false => vec![
            shape("Ultra q and o", 16_384, 16_384),
            shape("Ultra up", 53_248, 16_384),
            shape("Ultra down", 16_384, 53_248),
            shape("Super q and o", 8192, 8192),
            shape("Super up", 28_672, 8192),
            shape("Super down", 8192, 28_672),
            shape("Ultra k and v", 2048, 16_384),
            shape("Super k and v", 1024, 8192),
        ],
    }
}

/// A line for each number of rows.
pub(crate) fn measure(shape: Shape, setting: &Setting) -> Result<Vec<String>> {
    // Both ends of the range, and its middle, where tiles and ways to split K change.
    let rows = if setting.is_small { vec![16] } else { vec![128, 256, 512] };
    let mut lines = vec![String::new(); rows.len()];
    let mut best = vec![None; rows.len()];
    let mut peak = 0.0;
    for is_deterministic in [false, true] {
        let cuda = setting.cuda(WeightType::Bf16, KvDtype::Bf16, is_deterministic)?;
        let copies = (1..=shape.copies(setting)).map(|seed| RandomTensor::new(seed, 0.02, shape.n, shape.k));
        let weights = copies.map(|copy| cuda.random_matrix(copy)).collect::<kernels::Result<Vec<_>>>()?;
        // The device's, by whatever multiplies fastest.
        peak = f64::max(peak, cuda.product_flops()?);
        let has_library = cuda.numeric_profile().contains("cublaslt");
        let name = if has_library { "cuBLASLt" } else { "own kernel" };
        for (index, (line, &rows)) in lines.iter_mut().zip(&rows).enumerate() {
            let x = operand(&cuda, [rows, shape.k])?;
            let seconds = seconds(&cuda, &weights, &x)?;
            let flops = 2.0 * (rows * shape.n * shape.k) as f64 / seconds;
            let bytes = 2.0 * (shape.n * shape.k) as f64;
            if line.is_empty() {
                *line = format!("{rows} rows:");
            }
            best[index] = cuda.fastest_product(&x, &weights)?.or(best[index]);
            *line += &format!(
                " {name} {:.1} us, {}{:.1} TFLOP/s, {:.1} % of the peak, weights at {:.0} GB/s;",
                seconds * 1e6,
                share_of_best(best[index], seconds, has_library),
                flops / 1e12,
                100.0 * flops / peak,
                bytes / seconds / 1e9
            );
        }
    }
    Ok(lines)
}

/// Such as `91.2 % of the best of 240 settings of cuBLASLt, bar met, `; without the library there is no best, and the bar is not met. Our
/// own kernel has no bar.
fn share_of_best(best: Option<(f64, usize)>, seconds: f64, has_bar: bool) -> String {
    let Some((best, count)) = best else { return format!("no cuBLASLt, {}, ", bars::verdict(false)) };
    let share = best / seconds;
    let verdict = if has_bar { format!("{}, ", bars::verdict(share >= LEAST)) } else { String::new() };
    format!("{:.1} % of the best of {count} settings of cuBLASLt, {verdict}", 100.0 * share)
}

/// Numbers without a pattern that matters.
fn operand(cuda: &Cuda, [rows, k]: [usize; 2]) -> Result<kernels::CudaOperand> {
    let (mut x, mut normed) = (cuda.array(), cuda.operand());
    let values: Vec<f32> = (0..rows * k).map(|i| (i as f32 * 0.37).sin()).collect();
    cuda.upload(&values, rows, k, &mut x)?;
    let ones = cuda.vector(TensorView::new(ViewDtype::Bf16, 1, k, &[0x80, 0x3f].repeat(k)))?;
    cuda.rms_norm(&x, &ones, 1e-6, &mut normed)?;
    Ok(normed)
}

/// Of a product, as of the best of cuBLASLt's.
fn seconds(cuda: &Cuda, weights: &[kernels::CudaMatrix], x: &kernels::CudaOperand) -> Result<f64> {
    let (mut out, mut turns) = (cuda.array(), weights.iter().cycle());
    Ok(cuda.seconds_of(|| cuda.matmul(x, turns.next().expect("there are weights"), &mut out))?)
}
