//! Which thread block attends to what.
//!
//! Rows that stand alone, as in decoding, are split over the context where there are too few of them to fill the device.
//! Chunks of prompts go in tiles of 64 queries. Where results must not depend on the batch all rows go in tiles: how a
//! context is split depends on how many rows there are.

use std::sync::Arc;

use super::program::{self, Source};
use super::stream::{Grid, Kernel, Stream};
use crate::backend::{AttentionSlice, KvDtype, PAGE_TOKENS};
use crate::error::{Error, Result};

/// Queries of a tile of attention_prefill.cu, sixteen for each warp.
pub(crate) const TILE_QUERIES: usize = 64;
/// Query heads that attention_decode.cu takes at once: GROUP there.
pub(crate) const DECODE_GROUP: usize = 16;
/// Threads of a block of both.
pub(crate) const THREADS: usize = 128;
/// Blocks of attention_decode.cu for each multiprocessor, where the context is long enough: two run at once, and one that
/// ends early should find another.
const BLOCKS_PER_MULTIPROCESSOR: usize = 4;
/// A part of the context is no shorter than this: what it costs to merge it is then little.
const LEAST_PART_PAGES: usize = 4;

/// Words of a tile and of a row that stands alone, see [`Plan`].
pub(crate) const TILE_WORDS: usize = 4;
pub(crate) const ROW_WORDS: usize = 3;

/// Pages of the only part of a context that is not split: more than any has.
const ALL_PAGES: usize = 1 << 26;

/// A number of pages from which splits are told, no less than the longest context's: the splits of a batch then stay the same while
/// its contexts grow by an eighth.
fn rounded(pages: usize) -> usize {
    let step = (pages.next_power_of_two() / 16).max(1);
    pages.next_multiple_of(step)
}

/// Attention for one width of heads.
#[derive(Debug)]
pub(crate) struct AttentionKernels {
    pub(crate) prefill: Kernel,
    pub(crate) prefill_bytes: usize,
    /// Nothing where a block has too little memory for it.
    pub(crate) decode: Option<Kernel>,
    pub(crate) decode_bytes: usize,
}

impl AttentionKernels {
    /// A head's width in whole fragments.
    pub(crate) fn padded(head_dim: usize) -> usize {
        head_dim.next_multiple_of(16)
    }

    /// Compiles and loads them; a block may have so much memory.
    ///
    /// # Errors
    /// A block needs more than that for a prompt, what the compiler or the driver refuses.
    pub(crate) fn load(
        stream: &Arc<Stream>,
        cubin: impl Fn(Source, usize) -> Result<Vec<u8>>,
        (head_dim, kv): (usize, KvDtype),
        most_bytes: usize,
    ) -> Result<AttentionKernels> {
        let padded = AttentionKernels::padded(head_dim);
        let [prefill_bytes, decode_bytes] = block_bytes(padded, kv);
        if prefill_bytes > most_bytes {
            return Err(Error::Unsupported(format!(
                "attention over heads of {head_dim} numbers with keys and values of {}: a thread block takes {prefill_bytes} bytes of \
                 its multiprocessor's memory, and this GPU has {most_bytes} for it",
                kv.name()
            )));
        }
        let suffix = if kv == KvDtype::Fp8 { "_fp8" } else { "" };
        let load = |source, name, bytes| {
            Arc::new(stream.module(&cubin(source, padded)?)?).kernel(&format!("{name}{suffix}"), bytes)
        };
        Ok(AttentionKernels {
            prefill: load(program::ATTENTION_PREFILL, "attention_prefill", prefill_bytes)?,
            prefill_bytes,
            decode: (decode_bytes <= most_bytes)
                .then(|| load(program::ATTENTION_DECODE, "attention_decode", decode_bytes))
                .transpose()?,
            decode_bytes,
        })
    }
}

/// Bytes of a block's memory in attention_prefill.cu and in attention_decode.cu, for a width of heads in whole fragments.
fn block_bytes(padded: usize, kv: KvDtype) -> [usize; 2] {
    // Keys and values of a page, and a tile of queries; in bf16 rows are a chunk wider than a head.
    let rows = |rows: usize| rows * (padded + 8) * size_of::<u16>();
    let (page, queries) = (rows(2 * PAGE_TOKENS), rows(TILE_QUERIES));
    // STAGES of attention_prefill.cu.
    let at_once = if padded > 128 { 1 } else { 2 };
    match kv {
        // CODED_PAGE of attention.cuh; what a prompt reads of it is unpacked to one page in bf16.
        KvDtype::Fp8 => {
            let coded = 2 * PAGE_TOKENS * (((padded / 16) | 1) * 16 + 1);
            [at_once * coded + page + queries, 3 * coded]
        }
        KvDtype::F32 | KvDtype::Bf16 => [at_once * page + queries, 3 * page],
    }
}

/// What decides how a batch is shared out, beside the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PlanShape {
    /// Query heads of a KV head.
    pub(crate) group: usize,
    pub(crate) kv_heads: usize,
    /// Rows that stand alone may be split over so many.
    pub(crate) multiprocessors: Option<usize>,
}

/// How a batch is shared out.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Plan {
    /// Tiles, as attention_prefill.cu has them: first row, number of rows, first position, start of the pages.
    pub(crate) tiles: Vec<u32>,
    /// Rows that stand alone, as attention_decode.cu has them: row, number of keys, start of the pages.
    pub(crate) rows: Vec<u32>,
    /// Pages of all sequences, one after the other.
    pub(crate) pages: Vec<u32>,
    /// Parts that the context of rows that stand alone is split into, and the pages of each.
    pub(crate) num_parts: usize,
    pub(crate) part_pages: usize,
}

impl Plan {
    /// For these slices, and for so many rows behind theirs that nobody asked for: those see one key, of any page, and what comes of
    /// them is of no meaning.
    pub(crate) fn new(slices: &[AttentionSlice], padding: usize, shape: PlanShape) -> Plan {
        let PlanShape { group, kv_heads, multiprocessors } = shape;
        let mut plan = Plan { num_parts: 1, ..Plan::default() };
        let mut longest = 1;
        for slice in slices.iter().filter(|slice| slice.num_rows > 0) {
            let pages = plan.pages.len() as u32;
            let num_keys = slice.first_position + slice.num_rows;
            let num_pages = num_keys.div_ceil(PAGE_TOKENS);
            plan.pages.extend(&slice.pages[..num_pages]);
            if multiprocessors.is_some() && slice.num_rows == 1 && group <= DECODE_GROUP {
                plan.rows.extend([slice.first_row as u32, num_keys as u32, pages]);
                longest = longest.max(num_pages);
                continue;
            }
            let tile_rows = TILE_QUERIES / group;
            for first in (0..slice.num_rows).step_by(tile_rows) {
                let num_rows = tile_rows.min(slice.num_rows - first);
                let (row, position) = (slice.first_row + first, slice.first_position + first);
                plan.tiles.extend([row as u32, num_rows as u32, position as u32, pages]);
            }
        }
        let pages = plan.pages.len() as u32;
        let first = slices.iter().map(|slice| slice.num_rows).sum::<usize>();
        for row in first..first + padding {
            match multiprocessors.is_some() && group <= DECODE_GROUP {
                true => plan.rows.extend([row as u32, 1, pages]),
                false => plan.tiles.extend([row as u32, 1, 0, pages]),
            }
        }
        plan.pages.extend((padding > 0).then_some(0));
        let blocks = plan.num_rows() * kv_heads;
        if let (Some(multiprocessors), 1..) = (multiprocessors, blocks) {
            let longest = rounded(longest);
            let wanted = (multiprocessors * BLOCKS_PER_MULTIPROCESSOR).div_ceil(blocks);
            plan.part_pages = match wanted {
                1 => ALL_PAGES,
                _ => longest.div_ceil(wanted).max(LEAST_PART_PAGES.min(longest)),
            };
            plan.num_parts = longest.div_ceil(plan.part_pages);
        }
        plan
    }

    /// What kernels are told of splits, beside tables.
    pub(crate) fn parts(&self) -> (usize, usize) {
        (self.num_parts, self.part_pages)
    }

    pub(crate) fn num_tiles(&self) -> usize {
        self.tiles.len() / TILE_WORDS
    }

    pub(crate) fn num_rows(&self) -> usize {
        self.rows.len() / ROW_WORDS
    }

    /// Groups of query heads whose parts are kept: `[rows, kv_heads, parts]`, of DECODE_GROUP heads each.
    pub(crate) fn num_partials(&self, kv_heads: usize) -> usize {
        self.num_rows() * kv_heads * self.num_parts * DECODE_GROUP
    }

    /// What [`Plan::num_partials`] is at most for so many rows, with those that pad them: there are fewer blocks than twice those
    /// that are wanted, or no more than one for each row and KV head.
    pub(crate) fn most_partials(rows: usize, kv_heads: usize, multiprocessors: usize) -> usize {
        (multiprocessors * BLOCKS_PER_MULTIPROCESSOR + rows * kv_heads) * DECODE_GROUP
    }

    pub(crate) fn prefill_grid(&self, kv_heads: usize, kernels: &AttentionKernels) -> Grid {
        Grid { blocks: [self.num_tiles(), kv_heads, 1], threads: THREADS, block_bytes: kernels.prefill_bytes }
    }

    pub(crate) fn decode_grid(&self, kv_heads: usize, kernels: &AttentionKernels) -> Grid {
        let blocks = [self.num_rows(), kv_heads, self.num_parts];
        Grid { blocks, threads: THREADS, block_bytes: kernels.decode_bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice(first_row: usize, num_rows: usize, first_position: usize, pages: &[u32]) -> AttentionSlice {
        AttentionSlice { first_row, num_rows, first_position, pages: pages.to_vec() }
    }

    fn shape(group: usize, kv_heads: usize, multiprocessors: Option<usize>) -> PlanShape {
        PlanShape { group, kv_heads, multiprocessors }
    }

    #[test]
    fn an_a100_has_room_for_heads_of_256_and_smaller_gpus_in_bf16() {
        let prompts = |kv| block_bytes(256, kv)[0];
        assert_eq!([KvDtype::Bf16, KvDtype::Fp8].map(prompts), [101_376, 136_320]);
        assert!(prompts(KvDtype::Fp8) <= 163 << 10 && prompts(KvDtype::Bf16) <= 99 << 10);
        assert!([KvDtype::Bf16, KvDtype::Fp8].iter().all(|&kv| block_bytes(128, kv)[0] <= 99 << 10));
    }

    #[test]
    fn rows_that_nobody_asked_for_see_one_key_of_any_page() {
        let one = [slice(0, 1, 64, &[2, 5])];
        let plan = Plan::new(&one, 2, shape(4, 2, None));
        assert_eq!((&plan.tiles[4..], &plan.pages[..]), (&[1, 1, 0, 2, 2, 1, 0, 2][..], &[2, 5, 0][..]));
        let plan = Plan::new(&one, 2, shape(4, 2, Some(4)));
        assert_eq!((&plan.rows[3..], plan.tiles.len()), (&[1, 1, 2, 2, 1, 2][..], 0));
    }

    #[test]
    fn splits_stay_while_contexts_grow_by_less_than_an_eighth() {
        assert_eq!([1, 7, 16, 17, 19, 33, 65, 2000].map(rounded), [1, 7, 16, 18, 20, 36, 72, 2048]);
        assert!((1..5000).all(|pages| rounded(pages) >= pages && rounded(pages) * 8 <= pages * 9));
    }

    #[test]
    fn rows_alone_are_split_and_chunks_go_in_tiles() {
        let long: Vec<u32> = (10..42).collect();
        let slices =
            [slice(0, 1, 2047, &long), slice(1, 0, 0, &[]), slice(1, 9, 60, &[3, 4]), slice(10, 1, 0, &[7])];
        let plan = Plan::new(&slices, 0, shape(16, 8, Some(132)));
        assert_eq!(plan.rows, [0, 2048, 0, 10, 1, 34]);
        assert_eq!(plan.tiles, [1, 4, 60, 32, 5, 4, 64, 32, 9, 1, 68, 32]);
        assert_eq!(plan.pages[32..], [3, 4, 7]);
        // 16 blocks: 132 · 4 / 16 = 33 parts would be wanted, of one page; four pages are the least.
        assert_eq!((plan.part_pages, plan.num_parts), (4, 8));
        assert_eq!(plan.num_partials(8), 2 * 8 * 8 * 16);
    }

    #[test]
    fn enough_rows_are_not_split_and_parts_cover_the_longest() {
        let pages: Vec<u32> = (0..17).collect();
        let slices: Vec<AttentionSlice> = (0..256).map(|row| slice(row, 1, 64 * 17 - 1, &pages)).collect();
        let plan = Plan::new(&slices, 0, shape(8, 8, Some(132)));
        assert_eq!(plan.parts(), (1, ALL_PAGES));
        let plan = Plan::new(&slices[..1], 0, shape(8, 1, Some(4)));
        assert_eq!((plan.num_parts, plan.part_pages), (5, 4));
    }

    #[test]
    fn no_step_has_more_partials_than_there_is_room_for() {
        let pages: Vec<u32> = (0..300).collect();
        for (rows, padding) in
            [1, 2, 7, 33, 57, 66, 132, 200].into_iter().flat_map(|rows| [(rows, 0), (rows, 7)])
        {
            for keys in [1, 64, 700, 64 * 300] {
                let slices: Vec<AttentionSlice> =
                    (0..rows).map(|row| slice(row, 1, keys - 1, &pages)).collect();
                let found = Plan::new(&slices, padding, shape(8, 8, Some(132))).num_partials(8);
                let most = Plan::most_partials(rows + padding, 8, 132);
                assert!(found <= most, "{rows} and {padding} rows at {keys}: {found} of {most}");
            }
        }
    }

    #[test]
    fn without_splits_all_rows_go_in_tiles_and_so_do_wide_groups() {
        let one = [slice(0, 1, 5, &[2])];
        assert_eq!(Plan::new(&one, 0, shape(4, 2, None)).tiles, [0, 1, 5, 0]);
        assert_eq!(Plan::new(&one, 0, shape(17, 2, Some(4))).tiles, [0, 1, 5, 0]);
        assert_eq!(Plan::new(&[], 0, shape(4, 2, Some(4))).num_partials(2), 0);
    }
}
