//! Keys and values of one attention block, in pages, laid out for attention's register tiles.
//!
//! Memory is in words of 32 bits: an f32, or a pair of bf16. A page holds for each KV head
//! * its keys, by [`KeyLayout`]: in columns, `[head_dim / terms][PAGE_TOKENS]` words, where a bf16 word is a pair of
//!   neighbouring dimensions, so that a register of words is one step of the scores of 16 keys; or in rows,
//!   `[PAGE_TOKENS][key_stride]` words, as AMX reads them, and a token is written to one or two cache lines;
//! * its values: `[PAGE_TOKENS / terms][value_words]` words, where a bf16 word is a pair of neighbouring
//!   positions, so that a register of words is one step of 16 dimensions of the output. Rows are padded
//!   with zeros to whole registers.
//!
//! What a page held for an earlier owner stays there until it is overwritten: attention reads no word that
//! holds an entry beyond the last position a row may see, so that not even a NaN of old can leak.

use memmap2::MmapMut;

use crate::array::Array;
use crate::backend::{AttentionSlice, Dtype, PAGE_TOKENS};
use crate::check;
use crate::cpu::lanes::{Kernel, Lanes, at_level};
use crate::cpu::pool::ThreadPool;
use crate::cpu::simd::Simd;
use crate::dtype::bf16_bits;
use crate::error::{Error, Result};

/// Rows of values are padded to the widest register of any level.
const REGISTER_WORDS: usize = 16;

/// The size of a huge page on x86-64; a smaller cache cannot fill one.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Words of a row of keys are padded to what AMX takes at once.
const KEY_STEP_WORDS: usize = 16;

/// How the keys of a head lie in a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum KeyLayout {
    /// Dimension by dimension, for levels that have a key in each lane.
    Columns,
    /// Key by key, padded with zeros; of bf16.
    Rows,
}

/// Keys and values of one attention block, in pages.
#[derive(Debug)]
pub struct KvCache {
    dtype: Dtype,
    layout: KeyLayout,
    num_pages: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Zeroed by the system page by page, on first touch.
    memory: MmapMut,
    /// The first byte used, and the number of words from there on.
    start: usize,
    num_words: usize,
}

impl KvCache {
    pub(crate) fn new(
        dtype: Dtype,
        layout: KeyLayout,
        num_pages: usize,
        kv_heads: usize,
        head_dim: usize,
    ) -> Result<KvCache> {
        check::kv_cache(num_pages, kv_heads, head_dim)?;
        assert!(layout == KeyLayout::Columns || dtype == Dtype::Bf16, "rows of keys are of bf16");
        let head_words = key_words(dtype, layout, head_dim) + value_words(dtype, head_dim);
        let head_bytes = head_words * size_of::<u32>();
        let refuse = |why: String| {
            let shape = format!("{num_pages} pages of {kv_heads} heads of {head_dim}");
            Error::Unsupported(format!("kv_cache: {shape}: {why}"))
        };
        let bytes = num_pages.checked_mul(kv_heads).and_then(|heads| heads.checked_mul(head_bytes));
        let bytes = bytes.filter(|&bytes| bytes <= isize::MAX as usize);
        let bytes = bytes.ok_or_else(|| refuse("overflow".to_owned()))?;
        let (memory, start) = map(bytes).map_err(|error| refuse(format!("{bytes} bytes: {error}")))?;
        let num_words = bytes / size_of::<u32>();
        Ok(KvCache { dtype, layout, num_pages, kv_heads, head_dim, memory, start, num_words })
    }

    pub(crate) fn dtype(&self) -> Dtype {
        self.dtype
    }

    pub(crate) fn layout(&self) -> KeyLayout {
        self.layout
    }

    pub(crate) fn num_pages(&self) -> usize {
        self.num_pages
    }

    pub(crate) fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    pub(crate) fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// The head's keys in a page, aligned to a cache line.
    pub(crate) fn keys(&self, page: u32, head: usize) -> &[u32] {
        let start = head_start(self, page, head);
        &self.words()[start..][..self.key_words()]
    }

    /// The head's values in a page: `[PAGE_TOKENS / terms][value_stride]` words, aligned to a cache line.
    pub(crate) fn values(&self, page: u32, head: usize) -> &[u32] {
        let start = head_start(self, page, head) + self.key_words();
        &self.words()[start..][..value_words(self.dtype, self.head_dim)]
    }

    /// Words from key to key where they lie in rows: the head's width, padded to whole steps.
    pub(crate) fn key_stride(&self) -> usize {
        key_stride(self.head_dim)
    }

    /// Words of a head's keys and values in a page: from one head's to the next one's.
    pub(crate) fn head_words(&self) -> usize {
        self.key_words() + value_words(self.dtype, self.head_dim)
    }

    fn key_words(&self) -> usize {
        key_words(self.dtype, self.layout, self.head_dim)
    }

    /// Words from step to step of values: the head's width, padded to whole registers.
    pub(crate) fn value_stride(&self) -> usize {
        value_stride(self.head_dim)
    }

    fn words(&self) -> &[u32] {
        let words = self.memory[self.start..].as_ptr().cast();
        // SAFETY: `map` has made room for the words from an aligned start on, and any bits are a u32.
        unsafe { std::slice::from_raw_parts(words, self.num_words) }
    }
}

/// Maps zeroed memory, and says where in it to start.
fn map(bytes: usize) -> std::io::Result<(MmapMut, usize)> {
    if bytes < HUGE_PAGE_BYTES {
        // A system maps no empty range; a cache without pages gets one byte.
        return Ok((MmapMut::map_anon(bytes.max(1))?, 0));
    }
    // Keys of many sequences lie far apart: with small pages every few hundred of them miss the TLB. Addresses
    // that are skipped or not yet used take no memory.
    let memory = MmapMut::map_anon(bytes + HUGE_PAGE_BYTES)?;
    let start = memory.as_ptr().align_offset(HUGE_PAGE_BYTES);
    #[cfg(target_os = "linux")]
    {
        // A wish: with small pages the results are the same.
        memory.advise_range(memmap2::Advice::HugePage, start, bytes).ok();
    }
    Ok((memory, start))
}

/// Terms in a word.
fn terms(dtype: Dtype) -> usize {
    match dtype {
        Dtype::F32 => 1,
        Dtype::Bf16 => 2,
    }
}

fn value_stride(head_dim: usize) -> usize {
    head_dim.next_multiple_of(REGISTER_WORDS)
}

fn key_stride(head_dim: usize) -> usize {
    (head_dim / 2).next_multiple_of(KEY_STEP_WORDS)
}

fn key_words(dtype: Dtype, layout: KeyLayout, head_dim: usize) -> usize {
    match layout {
        KeyLayout::Columns => head_dim / terms(dtype) * PAGE_TOKENS,
        KeyLayout::Rows => PAGE_TOKENS * key_stride(head_dim),
    }
}

fn value_words(dtype: Dtype, head_dim: usize) -> usize {
    PAGE_TOKENS / terms(dtype) * value_stride(head_dim)
}

fn head_start(cache: &KvCache, page: u32, head: usize) -> usize {
    assert!((page as usize) < cache.num_pages && head < cache.kv_heads, "page {page} head {head}");
    (page as usize * cache.kv_heads + head) * cache.head_words()
}

/// Writes keys and values `[T, kv_heads * head_dim]` of every slice's rows into their pages.
pub(crate) fn append(
    simd: Simd,
    pool: &ThreadPool,
    cache: &mut KvCache,
    k: &Array,
    v: &Array,
    slices: &[AttentionSlice],
) -> Result<()> {
    const OP: &str = "kv_append";
    check::shape(OP, "k's columns", [k.cols()], [cache.kv_heads * cache.head_dim])?;
    check::shape(OP, "v", [v.rows(), v.cols()], [k.rows(), k.cols()])?;
    check::slices(OP, slices, k.rows(), cache.num_pages)?;
    let base = Words(cache.memory[cache.start..].as_mut_ptr().cast());
    let cache = &*cache;
    // A task is one half of one head, over all slices: tasks then never meet, whatever the pages are.
    let num_halves = 2 * cache.kv_heads;
    let is_small = k.rows() * k.cols() < SMALL_APPEND;
    let append_half = |half: usize| {
        let (head, is_keys) = (half / 2, half.is_multiple_of(2));
        at_level(simd, AppendHalf { cache, base, k, v, slices, head, is_keys });
    };
    if is_small {
        (0..num_halves).for_each(append_half);
    } else {
        pool.for_each(num_halves, append_half);
    }
    Ok(())
}

/// One head's keys or its values, of all slices. The loops are ones that the compiler vectorises with the features of the
/// function they are inlined into.
struct AppendHalf<'a> {
    cache: &'a KvCache,
    base: Words,
    k: &'a Array,
    v: &'a Array,
    slices: &'a [AttentionSlice],
    head: usize,
    is_keys: bool,
}

impl Kernel for AppendHalf<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let AppendHalf { cache, base, k, v, slices, head, is_keys } = self;
        for (index, slice) in slices.iter().enumerate() {
            if let Some(next) = slices.get(index + FETCH_AHEAD) {
                fetch_slot(cache, base, next, head, is_keys);
            }
            for_each_run(slice, |page, slot, row, num_rows| {
                let start = head_start(cache, page, head);
                // SAFETY: `head_start` has checked the page and the head, so that the start is inside; the
                // words of this half of this head in any page are written by this task alone.
                unsafe {
                    if is_keys {
                        write_keys(cache, base.at(start), slot, &Rows { array: k, row, num_rows, head });
                    } else {
                        let start = start + cache.key_words();
                        write_values(cache, base.at(start), slot, &Rows { array: v, row, num_rows, head });
                    }
                }
            });
        }
    }
}

/// Slices from a write to the slice whose lines are fetched meanwhile: a write to two to four lines takes a tenth of the
/// time in which they arrive.
const FETCH_AHEAD: usize = 8;

/// Numbers below which one thread is as fast as several: about 1 ns each, against a region's few µs.
const SMALL_APPEND: usize = 4096;

/// The cache's memory, for the threads that write it.
#[derive(Clone, Copy)]
struct Words(*mut u32);

// SAFETY: tasks write disjoint words, inside the mutable borrow of `append`.
unsafe impl Sync for Words {}

impl Words {
    fn at(&self, word: usize) -> *mut u32 {
        self.0.wrapping_add(word)
    }
}

/// One head's columns of a run of rows.
struct Rows<'a> {
    array: &'a Array,
    row: usize,
    num_rows: usize,
    head: usize,
}

impl Rows<'_> {
    #[inline(always)]
    fn get(&self, i: usize, head_dim: usize) -> &[f32] {
        &self.array.row(self.row + i)[self.head * head_dim..][..head_dim]
    }
}

/// Calls `each(page, first slot, first row, number of rows)` for a slice's rows, page by page.
#[inline(always)]
fn for_each_run(slice: &AttentionSlice, mut each: impl FnMut(u32, usize, usize, usize)) {
    let mut done = 0;
    while done < slice.num_rows {
        let position = slice.first_position + done;
        let slot = position % PAGE_TOKENS;
        let num_rows = (slice.num_rows - done).min(PAGE_TOKENS - slot);
        each(slice.pages[position / PAGE_TOKENS], slot, slice.first_row + done, num_rows);
        done += num_rows;
    }
}

/// Fetches the lines that a slice's first row will be written to. A decode step writes one row to each of many
/// pages that nobody has touched since the last step: one line for every pair of dimensions.
#[inline(always)]
fn fetch_slot(cache: &KvCache, base: Words, slice: &AttentionSlice, head: usize, is_keys: bool) {
    if slice.num_rows == 0 {
        return;
    }
    let page = slice.pages[slice.first_position / PAGE_TOKENS];
    let slot = slice.first_position % PAGE_TOKENS;
    let start = head_start(cache, page, head);
    let (words, step) = match (is_keys, cache.layout) {
        (true, KeyLayout::Columns) => (start + slot..start + cache.key_words(), PAGE_TOKENS),
        (true, KeyLayout::Rows) => {
            let first = start + slot * cache.key_stride();
            (first..first + cache.key_stride(), REGISTER_WORDS)
        }
        (false, _) => {
            let first = start + cache.key_words() + slot / terms(cache.dtype) * cache.value_stride();
            (first..first + cache.value_stride(), REGISTER_WORDS)
        }
    };
    words.step_by(step).for_each(|word| prefetch(base.at(word)));
}

#[inline(always)]
fn prefetch(word: *const u32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing and never faults, and SSE is part of x86-64.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(word.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = word;
}

/// Writes a run of keys from `slot` on.
///
/// # Safety
/// `keys` is the start of a head's keys in a page, `slot + num_rows <= PAGE_TOKENS`, and nobody else
/// writes or reads them.
#[inline(always)]
unsafe fn write_keys(cache: &KvCache, keys: *mut u32, slot: usize, rows: &Rows<'_>) {
    let (head_dim, words) = (cache.head_dim, cache.head_dim / terms(cache.dtype));
    for i in 0..rows.num_rows {
        let entries = rows.get(i, head_dim);
        let first = match cache.layout {
            KeyLayout::Columns => slot + i,
            KeyLayout::Rows => (slot + i) * cache.key_stride(),
        };
        match (cache.layout, cache.dtype) {
            (KeyLayout::Rows, _) => {
                // SAFETY: the slot is below PAGE_TOKENS and its row has room for the head's width.
                let out = unsafe { std::slice::from_raw_parts_mut(keys.add(first), words) };
                let pairs = out.iter_mut().zip(entries.as_chunks().0);
                pairs.for_each(|(word, &[even, odd])| *word = round(even) | round(odd) << 16);
            }
            (KeyLayout::Columns, dtype) => {
                // SAFETY: steps are below `head_dim / terms` and the slot below PAGE_TOKENS.
                let word = |step: usize| unsafe { &mut *keys.add(first + step * PAGE_TOKENS) };
                match dtype {
                    Dtype::F32 => (0..words).for_each(|step| *word(step) = entries[step].to_bits()),
                    Dtype::Bf16 => {
                        let pairs = entries.as_chunks().0.iter().enumerate();
                        pairs.for_each(|(step, &[even, odd])| *word(step) = round(even) | round(odd) << 16);
                    }
                }
            }
        }
    }
}

/// Writes a run of values from `slot` on.
///
/// # Safety
/// As of [`write_keys`], for the start of a head's values.
#[inline(always)]
unsafe fn write_values(cache: &KvCache, values: *mut u32, slot: usize, rows: &Rows<'_>) {
    let stride = cache.value_stride();
    for i in 0..rows.num_rows {
        let step = (slot + i) / terms(cache.dtype);
        // SAFETY: the step is below `PAGE_TOKENS / terms`, and its row has room for the head's width.
        let words = unsafe { std::slice::from_raw_parts_mut(values.add(step * stride), cache.head_dim) };
        let entries = words.iter_mut().zip(rows.get(i, cache.head_dim));
        match (cache.dtype, (slot + i) % 2) {
            (Dtype::F32, _) => entries.for_each(|(word, entry)| *word = entry.to_bits()),
            (Dtype::Bf16, 0) => {
                entries.for_each(|(word, &entry)| *word = *word & 0xffff_0000 | round(entry));
            }
            (Dtype::Bf16, _) => {
                entries.for_each(|(word, &entry)| *word = *word & 0x0000_ffff | round(entry) << 16);
            }
        }
    }
}

/// A number as bf16, in the lower half of a word.
#[inline(always)]
fn round(value: f32) -> u32 {
    u32::from(bf16_bits(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn array(rows: usize, cols: usize, value: impl Fn(usize, usize) -> f32) -> Array {
        let mut array = Array::new();
        array.reshape(rows, cols);
        (0..rows).for_each(|r| (0..cols).for_each(|c| array.row_mut(r)[c] = value(r, c)));
        array
    }

    fn term(dtype: Dtype, words: &[u32], stride: usize, term: usize, lane: usize) -> f32 {
        match dtype {
            Dtype::F32 => f32::from_bits(words[term * stride + lane]),
            Dtype::Bf16 => f32::from_bits(words[term / 2 * stride + lane] >> (16 * (term % 2)) << 16),
        }
    }

    #[test]
    fn every_entry_lies_where_the_layout_says() {
        let pool = ThreadPool::new(&[], 2);
        let (kv_heads, head_dim) = (3, 24);
        // Small whole numbers, exact in bf16.
        let key = |r: usize, c: usize| ((r * 7 + c * 3) % 251) as f32;
        let value = |r: usize, c: usize| ((r * 5 + c * 11) % 241) as f32 - 120.0;
        for (dtype, layout) in [
            (Dtype::F32, KeyLayout::Columns),
            (Dtype::Bf16, KeyLayout::Columns),
            (Dtype::Bf16, KeyLayout::Rows),
        ] {
            let mut cache = KvCache::new(dtype, layout, 5, kv_heads, head_dim).unwrap();
            let pages = vec![4, 1, 3];
            // Positions 61..=133 in chunks of odd sizes.
            let mut position = 61;
            for num_rows in [1, 2, 7, 63] {
                let k = array(num_rows, kv_heads * head_dim, |r, c| key(position + r, c));
                let v = array(num_rows, kv_heads * head_dim, |r, c| value(position + r, c));
                let slice =
                    AttentionSlice { first_row: 0, num_rows, first_position: position, pages: pages.clone() };
                append(Simd::detect(), &pool, &mut cache, &k, &v, &[slice]).unwrap();
                position += num_rows;
            }
            for position in 61..134 {
                let (page, slot) = (pages[position / PAGE_TOKENS], position % PAGE_TOKENS);
                for head in 0..kv_heads {
                    for d in 0..head_dim {
                        let keys = cache.keys(page, head);
                        let found = match layout {
                            KeyLayout::Columns => term(dtype, keys, PAGE_TOKENS, d, slot),
                            KeyLayout::Rows => term(dtype, &keys[slot * cache.key_stride()..], 1, d, 0),
                        };
                        assert_eq!(found, key(position, head * head_dim + d), "key {position} {head} {d}");
                        let found = term(dtype, cache.values(page, head), cache.value_stride(), slot, d);
                        assert_eq!(
                            found,
                            value(position, head * head_dim + d),
                            "value {position} {head} {d}"
                        );
                    }
                }
            }
            assert!(cache.keys(0, 0).iter().chain(cache.values(2, 1)).all(|&word| word == 0));
        }
    }

    #[test]
    fn a_cache_without_pages_is_possible() {
        assert_eq!(KvCache::new(Dtype::Bf16, KeyLayout::Columns, 0, 1, 8).unwrap().num_pages(), 0);
    }
}
