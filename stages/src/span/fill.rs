//! Keys and values for whoever asks how long steps take and not what they give.
//!
//! Each block's attention makes them of the same rows, and writes them into all of its pages over and over: numbers as its steps have
//! them, none of which is a special case of arithmetic, without the time that so many prompts would take.

use kernels::{AttentionSlice, Backend, PAGE_TOKENS};

use super::attention::{AttentionOnDevice, Gqa};
use super::{BlockOnDevice, Work};
use crate::error::Result;

/// Pages that are written at once: no more rows than most steps have, so that arrays need not grow.
const PAGES_AT_ONCE: usize = 4;

/// Writes every page of a lone device's blocks.
pub(super) fn fill_pages<B: Backend>(
    (backend, eps, hidden): (&B, f32, usize),
    blocks: &mut [BlockOnDevice<B>],
    work: &mut Work<B>,
    num_pages: usize,
) -> Result<()> {
    let rows = PAGES_AT_ONCE.min(num_pages) * PAGE_TOKENS;
    // Of the size that norms expect.
    let values: Vec<f32> = (0..rows * hidden).map(|i| (i * 7919 % 1000) as f32 / 500.0 - 0.999).collect();
    backend.upload(&values, rows, hidden, &mut work.x)?;
    for block in blocks {
        if let AttentionOnDevice::Gqa(Gqa { norm, q, k, v, cache, .. }) = &mut block.attention {
            backend.rms_norm(&work.x, norm, eps, &mut work.normed)?;
            let out = [&mut work.q, &mut work.k, &mut work.v];
            backend.matmul_each(&work.normed, [&*q, &*k, &*v], out)?;
            for slice in slices(num_pages) {
                backend.kv_append(cache, &work.k, &work.v, &[slice])?;
            }
        }
    }
    Ok(())
}

/// All pages, as many at once in each slice; the last ones of all may come twice.
fn slices(num_pages: usize) -> impl Iterator<Item = AttentionSlice> {
    let at_once = PAGES_AT_ONCE.min(num_pages);
    (0..num_pages).step_by(PAGES_AT_ONCE).map(move |first| {
        let first = first.min(num_pages - at_once) as u32;
        let pages = (first..first + at_once as u32).collect();
        AttentionSlice { first_row: 0, num_rows: at_once * PAGE_TOKENS, first_position: 0, pages }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_is_written_by_as_many_rows() {
        for num_pages in [1, 3, 4, 9] {
            let slices: Vec<AttentionSlice> = slices(num_pages).collect();
            let mut pages: Vec<u32> = slices.iter().flat_map(|slice| slice.pages.clone()).collect();
            pages.sort_unstable();
            pages.dedup();
            assert_eq!(pages, (0..num_pages as u32).collect::<Vec<u32>>());
            let rows = |slice: &AttentionSlice| (slice.num_rows, slice.pages.len() * PAGE_TOKENS);
            let expected = num_pages.min(PAGES_AT_ONCE) * PAGE_TOKENS;
            assert!(slices.iter().all(|slice| rows(slice) == (expected, expected)));
        }
    }
}
