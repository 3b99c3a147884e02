//! How near is attention at decode to the speed at which memory is copied?

use std::fmt;

use anyhow::Result;
use kernels::{AttentionSlice, Backend, Cuda, KvDtype, PAGE_TOKENS, WeightType};

use crate::bars;
use crate::items::Setting;

/// What split contexts are to reach of the copy bandwidth.
const LEAST: f64 = 0.75;

/// Ultra's and Super's.
const HEAD_DIM: usize = 128;

/// Rows that decode, each with pages of its own.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Case {
    rows: usize,
    kv_heads: usize,
    /// Queries that read the same keys.
    group: usize,
    context: usize,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Case { rows, kv_heads, group, context } = self;
        write!(f, "group {group}, {kv_heads} KV heads, {rows} rows at {context} tokens")
    }
}

pub(crate) fn cases(setting: &Setting) -> Vec<Case> {
    let case = |rows, group, context| Case { rows, kv_heads: 8, group, context };
    match setting.is_small {
        true => vec![Case { rows: 2, kv_heads: 1, group: 2, context: 70 }],
        false => vec![case(128, 16, 2048), case(128, 8, 2048), case(16, 16, 32_768), case(16, 8, 32_768)],
    }
}

/// A line for contexts that are split over thread blocks, and one for those that are not, of each type of keys and values.
pub(crate) fn measure(case: Case, setting: &Setting) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    let splits = [(false, "split"), (true, "in one go")];
    let cases = [KvDtype::Bf16, KvDtype::Fp8].into_iter().flat_map(|kv| splits.map(|split| (kv, split)));
    for (kv, (is_deterministic, name)) in cases {
        let cuda = setting.cuda(WeightType::Bf16, kv, is_deterministic)?;
        let seconds = seconds(&cuda, case)?;
        let bytes = (case.rows * case.context * case.kv_heads * 2 * kv.head_bytes(HEAD_DIM)) as f64;
        let share = bytes / seconds / cuda.copy_bandwidth()?;
        let verdict =
            if is_deterministic { String::new() } else { format!(", {}", bars::verdict(share >= LEAST)) };
        lines.push(format!(
            "{}, {name}: {:.1} us, keys and values at {:.0} GB/s, {:.1} % of the copy bandwidth{verdict}",
            kv.name(),
            seconds * 1e6,
            bytes / seconds / 1e9,
            100.0 * share
        ));
    }
    Ok(lines)
}

fn seconds(cuda: &Cuda, case: Case) -> Result<f64> {
    let Case { rows, kv_heads, group, context } = case;
    let pages_of_row = context.div_ceil(PAGE_TOKENS);
    let mut cache = cuda.kv_cache(rows * pages_of_row, kv_heads, HEAD_DIM)?;
    fill(cuda, &mut cache, rows * pages_of_row, kv_heads * HEAD_DIM)?;
    let cols = kv_heads * group * HEAD_DIM;
    let queries: Vec<f32> = (0..rows * cols).map(|i| (i as f32 * 0.73).sin()).collect();
    let (mut q, mut out) = (cuda.array(), cuda.operand());
    cuda.upload(&queries, rows, cols, &mut q)?;
    let slice = |row: usize| AttentionSlice {
        first_row: row,
        num_rows: 1,
        first_position: context - 1,
        pages: (row * pages_of_row..(row + 1) * pages_of_row).map(|page| page as u32).collect(),
    };
    let slices: Vec<AttentionSlice> = (0..rows).map(slice).collect();
    Ok(cuda.seconds_of(|| cuda.attention(&q, &cache, &slices, &mut out))?)
}

/// Keys and values in every page, the same ones every 64 pages.
fn fill(cuda: &Cuda, cache: &mut kernels::CudaKvCache, num_pages: usize, cols: usize) -> Result<()> {
    const PAGES: usize = 64;
    let rows = PAGES.min(num_pages) * PAGE_TOKENS;
    let values: Vec<f32> = (0..rows * cols).map(|i| (i as f32 * 0.61).sin()).collect();
    let mut x = cuda.array();
    cuda.upload(&values, rows, cols, &mut x)?;
    let mut first = 0;
    while first < num_pages {
        // The last pages of all may be filled twice.
        let start = first.min(num_pages - rows / PAGE_TOKENS);
        let pages = (start..start + rows / PAGE_TOKENS).map(|page| page as u32).collect();
        let slice = AttentionSlice { first_row: 0, num_rows: rows, first_position: 0, pages };
        cuda.kv_append(cache, &x, &x, &[slice])?;
        first += rows / PAGE_TOKENS;
    }
    Ok(())
}
