//! Are products and attention right at the shapes of Ultra and Super, which no emulator gets through?
//!
//! All numbers of a result must be there, and some of them, spread over it, are held against f64.

use anyhow::{Result, ensure};
use kernels::{AttentionSlice, Backend, Cuda, Int4Groups, KvDtype, PAGE_TOKENS, RandomTensor, WeightType};

use crate::battery::attention::{Sequence, attend};
use crate::battery::device::{Device, Readable, all_rounded, bits, cached, unit};
use crate::battery::exact::assert_within;
use crate::battery::random::Random;
use crate::items::Setting;

/// Rows, columns or heads of a result that are looked at: the first, the last and some between.
const SAMPLES: usize = 8;

/// Of a product whose terms' squares add up to one, and whose terms are so many. A tensor core takes 16 terms at once or 8, and cuts a
/// few bits below the last place of the partial sum, which stays within four deviations: 2^-22 of that for every 8.
///
/// Of E4M3 it may keep 14 bits of the largest of 32 terms and the sum that it goes on with, until 128 are added to an f32. Such a sum has
/// a deviation of 11 terms in the end, and each of the 33 numbers may be short of 2^-13 of that, to either side: over all of K that
/// deviates by 0.58 · 2^-13 · 11 · sqrt(33 / 32), less than a thousandth whatever K is. The bound is twenty times as much, beside
/// f32's; a step of 128 terms that is left out moves a sum by the root of 128 / K, which is more at every width here.
fn bound(weights: WeightType, depth: usize) -> f64 {
    let chained = |terms: f64, unit: f64| (depth as f64 / terms).ceil() * 4.0 * unit;
    match weights {
        WeightType::Fp8 => (-6f64).exp2() + chained(128.0, (-24f64).exp2()),
        _ => chained(8.0, (-22f64).exp2()),
    }
}

/// Weights `[n, k]` that inputs are multiplied with.
pub(crate) type Matrix = [usize; 2];

pub(crate) const ULTRA: [Matrix; 6] = [
    [16_384, 16_384],
    [2048, 16_384],
    [53_248, 16_384],
    [16_384, 53_248],
    // The widest FFN: in chunks of columns.
    [425_984, 16_384],
    [16_384, 425_984],
];
pub(crate) const SUPER: [Matrix; 6] =
    [[8192, 8192], [1024, 8192], [28_672, 8192], [8192, 28_672], [5376, 8192], [8192, 5376]];
pub(crate) const SMALL: [Matrix; 2] = [[96, 64], [70, 130]];

/// So many of a range, evenly.
fn spread(of: usize) -> impl Iterator<Item = usize> {
    (0..SAMPLES).map(move |sample| sample * (of - 1) / (SAMPLES - 1))
}

fn device(
    setting: &Setting,
    weights: WeightType,
    kv: KvDtype,
    is_deterministic: bool,
) -> Result<Device<Cuda>> {
    let cuda = setting.cuda(weights, kv, is_deterministic)?;
    cuda.poison_memory();
    Ok(Device { int4: Int4Groups::Of128, ..Device::new(cuda, weights, kv) })
}

/// Types of weights, and whether a row's bits are the same in any batch.
const WAYS: [(WeightType, bool); 5] = [
    (WeightType::Bf16, false),
    (WeightType::Bf16, true),
    (WeightType::Fp8, false),
    (WeightType::Fp8, true),
    (WeightType::Int4Weight, true),
];

/// Numbers of rows for which there are different tiles at one width or another: a row alone, and enough for blocks of 64 and of 128.
fn row_counts(setting: &Setting) -> [usize; 3] {
    if setting.is_small { [1, 20, 70] } else { [1, 100, 200] }
}

/// A line for each matrix and way to multiply.
pub(crate) fn products(matrices: &[Matrix], setting: &Setting) -> Result<Vec<String>> {
    let devices = WAYS.map(|(weights, is_deterministic)| {
        Ok((device(setting, weights, KvDtype::Bf16, is_deterministic)?, is_deterministic))
    });
    let devices = devices.into_iter().collect::<Result<Vec<_>>>()?;
    let counts = row_counts(setting);
    let mut lines = Vec::new();
    for &[n, k] in matrices {
        let x = RandomTensor::new(2, 2.0, counts[2], k).values();
        let x: Vec<f32> = x.iter().map(|x| x.to_f32()).collect();
        for (device, is_deterministic) in &devices {
            let matrix = device.backend.random_matrix(weights(n, k))?;
            let found = counts.map(|rows| product(device, &matrix, &x[..rows * k], [rows, n, k]));
            let [alone, few, many] = found;
            let (alone, few, many) = (alone?, few?, many?);
            // Each number of rows has the tile that suits it; the bits of the first are not to show which.
            let is_same = few.first == alone.first && many.first == alone.first;
            ensure!(
                !is_deterministic || is_same,
                "{} [{n}, {k}]: the first of {} or {} rows has not the bits that it has alone",
                device.name(),
                counts[1],
                counts[2]
            );
            let off = [alone.off, few.off, many.off].map(|off| 100.0 * off);
            lines.push(format!(
                "[{n}, {k}], {}: off by {:.0} % of the bound at most for a row alone, {:.0} % for {} together, {:.0} % for {}{}",
                device.name(),
                off[0],
                off[1],
                counts[1],
                off[2],
                counts[2],
                if *is_deterministic { "; the first has the same bits" } else { "" }
            ));
        }
    }
    Ok(lines)
}

fn weights(n: usize, k: usize) -> RandomTensor {
    RandomTensor::new(1, 0.02, n, k)
}

/// What a product came to.
struct Found {
    /// How far it is off at most, as a share of what it may be.
    off: f64,
    /// Bits of its first row.
    first: Vec<u32>,
}

fn product(
    device: &Device<Cuda>,
    matrix: &kernels::CudaMatrix,
    x: &[f32],
    [rows, n, k]: [usize; 3],
) -> Result<Found> {
    let (operand, x) = device.operand(x, k);
    let mut out = device.backend.array();
    device.backend.matmul(&operand, matrix, &mut out)?;
    let found = device.values(&out);
    let what = format!("{} [{rows}, {k}] x [{n}, {k}]", device.name());
    ensure!(found.len() == rows * n, "{what}: {} numbers", found.len());
    ensure!(found.iter().all(|number| number.is_finite()), "{what}: not all numbers were written");
    let (bound, mut most) = (bound(device.weights, k), 0.0);
    let x: Vec<(usize, Vec<f64>)> =
        spread(rows).map(|row| (row, device.multiplied(&x[row * k..][..k], k))).collect();
    for col in spread(n) {
        let row: Vec<f32> =
            weights(n, k).part(col..col + 1, 0..k).values().iter().map(|w| w.to_f32()).collect();
        let w = device.kept(&row, k);
        for (row, x) in &x {
            let terms = x.iter().zip(&w).map(|(x, w)| x * w);
            let (sum, squares) =
                terms.fold((0.0, 0.0), |(sum, squares), term| (sum + term, squares + term * term));
            let number = found[row * n + col];
            let off = (f64::from(number) - sum).abs() / (bound * squares.sqrt());
            ensure!(off <= 1.0, "{what}: [{row}, {col}] is {number}, expected {sum}");
            most = f64::max(most, off);
        }
    }
    Ok(Found { off: most, first: bits(&found[..n]) })
}

/// Attention with so many queries to a head of keys.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    pub(crate) kv_heads: usize,
    pub(crate) group: usize,
    pub(crate) head_dim: usize,
    pub(crate) context: usize,
    /// Rows of a prompt's last chunk, beside a row that decodes.
    pub(crate) chunk: usize,
}

pub(crate) fn heads(setting: &Setting) -> Vec<Heads> {
    let real = |(group, context)| Heads { kv_heads: 8, group, head_dim: 128, context, chunk: 100 };
    match setting.is_small {
        true => vec![Heads { kv_heads: 2, group: 3, head_dim: 16, context: 130, chunk: 5 }],
        false => [(16, 2048), (8, 2048), (16, 32_768), (8, 32_768)].map(real).to_vec(),
    }
}

/// A line for each type of keys and values, contexts being split or not.
pub(crate) fn attention(heads: Heads, setting: &Setting) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for kv in [KvDtype::Bf16, KvDtype::Fp8] {
        for is_deterministic in [false, true] {
            let device = device(setting, WeightType::Bf16, kv, is_deterministic)?;
            let count = attended(&device, heads)?;
            lines.push(format!("{}: {count} numbers are within their bounds", device.name()));
        }
    }
    Ok(lines)
}

/// A row that decodes and the last chunk of a prompt, of the same keys and values. How many numbers were looked at.
fn attended(device: &Device<Cuda>, heads: Heads) -> Result<usize> {
    let Heads { kv_heads, group, head_dim, context, chunk } = heads;
    let (backend, mut random) = (&device.backend, Random::new(31));
    let [q_cols, kv_cols] = [kv_heads * group * head_dim, kv_heads * head_dim];
    // Queries of the rows alone, and scores with a spread as the battery has them.
    let Sequence { q, .. } = Sequence::new(&mut random, 1 + chunk, [kv_heads * group, kv_heads, head_dim]);
    let [k, v] = [(); 2].map(|()| random.values(context * kv_cols));
    let pages: Vec<u32> = (0..context.div_ceil(PAGE_TOKENS) as u32).rev().collect();
    let slice = |first_row: usize, num_rows: usize| AttentionSlice {
        first_row,
        num_rows,
        first_position: context - num_rows,
        pages: pages.clone(),
    };
    let mut cache = backend.kv_cache(pages.len(), kv_heads, head_dim)?;
    backend.kv_append(
        &mut cache,
        &device.array(&k, kv_cols),
        &device.array(&v, kv_cols),
        &[slice(0, context)],
    )?;
    let mut out = backend.operand();
    backend.attention(&device.array(&q, q_cols), &cache, &[slice(0, 1), slice(1, chunk)], &mut out)?;
    let found = Cuda::read(&out);
    ensure!(found.iter().all(|number| number.is_finite()), "{}: not all numbers were written", device.name());
    let q = all_rounded(device.kv.multiplied(), &q);
    let [k, v] = [&k, &v].map(|values| cached(device.kv, values, head_dim));
    let mut count = 0;
    for row in [0, 1, 1 + chunk / 2, chunk] {
        let num_keys = if row == 0 { context } else { context - chunk + row };
        for head in spread(kv_heads * group) {
            let at = row * q_cols + head * head_dim;
            let of_head = |values: &[f32]| -> Vec<Vec<f32>> {
                let entry =
                    |key: usize| values[key * kv_cols + head / group * head_dim..][..head_dim].to_vec();
                (0..num_keys).map(entry).collect()
            };
            let exact = attend(&q[at..][..head_dim], &of_head(&k), &of_head(&v), device.kv);
            let stored: Vec<_> =
                exact.iter().map(|bounded| bounded.stored(unit(device.weights.operands()))).collect();
            assert_within(
                &format!("{} row {row} head {head}", device.name()),
                &found[at..][..head_dim],
                &stored,
            );
            count += stored.len();
        }
    }
    Ok(count)
}
