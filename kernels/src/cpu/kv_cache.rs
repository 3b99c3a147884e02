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
//! Of a cache in E4M3 (see [`KvDtype::Fp8`]) a page holds the same as of one in bf16 with a byte in the place of each number, and
//! behind that of a head a byte for each position's power of two, those of its keys before those of its values. It is not read as
//! it lies: `unpack.rs` makes words of bf16 of it, a few heads of a page at a time.
//!
//! What a page held for an earlier owner stays there until it is overwritten: attention reads no word that
//! holds an entry beyond the last position a row may see, so that not even a NaN of old can leak.

mod unpack;

use std::ops::Range;

use memmap2::MmapMut;

use crate::array::Array;
use crate::backend::{AttentionSlice, Dtype, KvDtype, PAGE_TOKENS};
use crate::check;
use crate::cpu::lanes::{Kernel, Lanes, at_level};
use crate::cpu::pool::ThreadPool;
use crate::cpu::rope::Angles;
use crate::cpu::rows::SharedRows;
use crate::cpu::simd::Simd;
use crate::dtype::bf16_bits;
use crate::error::{Error, Result};
use crate::fp8::Exponent;
pub(crate) use unpack::unpack;

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
    kv: KvDtype,
    /// What its words are of when they are multiplied.
    dtype: Dtype,
    layout: KeyLayout,
    num_pages: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Zeroed by the system page by page, on first touch.
    _memory: MmapMut,
    /// From the first byte on that is used, and how many there are.
    base: Bytes,
    num_bytes: usize,
}

impl KvCache {
    pub(crate) fn new(
        kv: KvDtype,
        layout: KeyLayout,
        num_pages: usize,
        kv_heads: usize,
        head_dim: usize,
    ) -> Result<KvCache> {
        check::kv_cache(num_pages, kv_heads, head_dim)?;
        let dtype = kv.multiplied();
        assert!(layout == KeyLayout::Columns || dtype == Dtype::Bf16, "rows of keys are of bf16");
        let head_words = key_words(dtype, layout, head_dim) + value_words(dtype, head_dim);
        let head_bytes = head_bytes(kv, head_words);
        let refuse = |why: String| {
            let shape = format!("{num_pages} pages of {kv_heads} heads of {head_dim}");
            Error::Unsupported(format!("kv_cache: {shape}: {why}"))
        };
        let bytes = num_pages.checked_mul(kv_heads).and_then(|heads| heads.checked_mul(head_bytes));
        let bytes = bytes.filter(|&bytes| bytes <= isize::MAX as usize);
        let bytes = bytes.ok_or_else(|| refuse("overflow".to_owned()))?;
        let (mut memory, start) = map(bytes).map_err(|error| refuse(format!("{bytes} bytes: {error}")))?;
        let base = Bytes(memory[start..].as_mut_ptr());
        let (_memory, num_bytes) = (memory, bytes);
        Ok(KvCache { kv, dtype, layout, num_pages, kv_heads, head_dim, _memory, base, num_bytes })
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        self.num_bytes
    }

    /// Whether it is to be unpacked before it is read.
    pub(crate) fn is_packed(&self) -> bool {
        self.kv == KvDtype::Fp8
    }

    /// The type of its words, once they are unpacked.
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

    /// The head's keys in a page, aligned to a cache line, of a cache that is not packed.
    pub(crate) fn keys(&self, page: u32, head: usize) -> &[u32] {
        &self.words_of(page, head)[..self.key_words()]
    }

    /// The head's values in a page: `[PAGE_TOKENS / terms][value_stride]` words, aligned to a cache line.
    pub(crate) fn values(&self, page: u32, head: usize) -> &[u32] {
        &self.words_of(page, head)[self.key_words()..]
    }

    /// All that a page holds of a head, as it lies.
    pub(crate) fn entries(&self, page: u32, head: usize) -> &[u8] {
        let start = head_start(self, page, head);
        // SAFETY: `head_start` has checked the page and the head, and an operation reads no entries while another thread
        // writes them.
        unsafe { std::slice::from_raw_parts(self.base.at(start), self.head_bytes()) }
    }

    /// Bytes of a head's entries in a page: from one head's to the next one's.
    pub(crate) fn head_bytes(&self) -> usize {
        head_bytes(self.kv, self.head_words())
    }

    /// Words from key to key where they lie in rows: the head's width, padded to whole steps.
    pub(crate) fn key_stride(&self) -> usize {
        key_stride(self.head_dim)
    }

    /// Words of a head's keys and values in a page, once they are unpacked: from one head's to the next one's.
    pub(crate) fn head_words(&self) -> usize {
        self.key_words() + value_words(self.dtype, self.head_dim)
    }

    /// Words of a head's keys in a page, once they are unpacked.
    pub(crate) fn key_words(&self) -> usize {
        key_words(self.dtype, self.layout, self.head_dim)
    }

    /// Words from step to step of values: the head's width, padded to whole registers.
    pub(crate) fn value_stride(&self) -> usize {
        value_stride(self.head_dim)
    }

    fn words_of(&self, page: u32, head: usize) -> &[u32] {
        debug_assert!(!self.is_packed(), "a packed cache is unpacked first");
        bytemuck::cast_slice(self.entries(page, head))
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

/// Bytes of so many words, or of what is unpacked to them.
fn head_bytes(kv: KvDtype, head_words: usize) -> usize {
    match kv {
        KvDtype::F32 | KvDtype::Bf16 => head_words * size_of::<u32>(),
        KvDtype::Fp8 => head_words * size_of::<u16>() + 2 * PAGE_TOKENS,
    }
}

/// The byte where a head's entries begin.
fn head_start(cache: &KvCache, page: u32, head: usize) -> usize {
    assert!((page as usize) < cache.num_pages && head < cache.kv_heads, "page {page} head {head}");
    (page as usize * cache.kv_heads + head) * cache.head_bytes()
}

/// Keys and values `[T, kv_heads * head_dim]` of a micro-batch's rows.
#[derive(Clone, Copy)]
pub(crate) struct NewEntries<'a> {
    pub(crate) k: SharedRows,
    pub(crate) v: SharedRows,
    /// What keys are still to be turned by, in place.
    pub(crate) angles: Option<Angles<'a>>,
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
    check_append(cache, k, v, slices)?;
    let new = NewEntries { k: SharedRows::read_only(k), v: SharedRows::read_only(v), angles: None };
    append_slices(simd, pool, cache, new, slices, |_| true);
    Ok(())
}

/// Keys and values are of the cache's width and of the slices' rows.
pub(crate) fn check_append(cache: &KvCache, k: &Array, v: &Array, slices: &[AttentionSlice]) -> Result<()> {
    const OP: &str = "kv_append";
    check::shape(OP, "k's columns", [k.cols()], [cache.kv_heads * cache.head_dim])?;
    check::shape(OP, "v", [v.rows(), v.cols()], [k.rows(), k.cols()])?;
    check::slices(OP, slices, k.rows(), cache.num_pages)
}

/// The same for the slices that `is_wanted` says; they have been checked.
pub(crate) fn append_slices(
    simd: Simd,
    pool: &ThreadPool,
    cache: &mut KvCache,
    new: NewEntries<'_>,
    slices: &[AttentionSlice],
    is_wanted: fn(&AttentionSlice) -> bool,
) {
    let cache = &*cache;
    // A task is one half of one head, over all slices: tasks then never meet, whatever the pages are.
    let num_halves = 2 * cache.kv_heads;
    let rows: usize = slices.iter().filter(|slice| is_wanted(slice)).map(|slice| slice.num_rows).sum();
    let append_half = |half: usize| {
        let (head, is_keys) = (half / 2, half.is_multiple_of(2));
        at_level(simd, AppendHalf { cache, new, slices, is_wanted, head, is_keys });
    };
    if rows * cache.kv_heads * cache.head_dim < SMALL_APPEND {
        (0..num_halves).for_each(append_half);
    } else {
        pool.for_each(num_halves, append_half);
    }
}

/// One head's keys or its values, of all slices that are wanted. The loops are ones that the compiler vectorises with the
/// features of the function they are inlined into.
struct AppendHalf<'a> {
    cache: &'a KvCache,
    new: NewEntries<'a>,
    slices: &'a [AttentionSlice],
    is_wanted: fn(&AttentionSlice) -> bool,
    head: usize,
    is_keys: bool,
}

impl Kernel for AppendHalf<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let AppendHalf { cache, new, slices, is_wanted, head, is_keys } = self;
        for (index, slice) in slices.iter().enumerate().filter(|(_, slice)| is_wanted(slice)) {
            if let Some(next) = slices.get(index + FETCH_AHEAD).filter(|slice| is_wanted(slice)) {
                fetch_slot(cache, next, head, is_keys);
            }
            for_each_run(slice, |page, slot, row, num_rows| {
                // SAFETY: the features are the caller's; the slices were checked, and the bytes of this half of this head
                // in any page are written by this task alone, as its columns are read and turned by it alone.
                unsafe {
                    match is_keys {
                        true => append_keys::<L>(cache, &new, page, slot, &Rows { row, num_rows, head }),
                        false => append_values(cache, &new, page, slot, &Rows { row, num_rows, head }),
                    }
                }
            });
        }
    }
}

/// One position's keys and values of some heads, where a single thread has all to do with them.
pub(crate) struct AppendPosition<'a> {
    pub(crate) cache: &'a KvCache,
    pub(crate) new: NewEntries<'a>,
    pub(crate) slice: &'a AttentionSlice,
    pub(crate) row: usize,
    pub(crate) position: usize,
    pub(crate) heads: Range<usize>,
}

impl Kernel for AppendPosition<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let AppendPosition { cache, new, slice, row, position, heads } = self;
        let (page, slot) = (slice.pages[position / PAGE_TOKENS], position % PAGE_TOKENS);
        for head in heads {
            let rows = Rows { row, num_rows: 1, head };
            // SAFETY: the features are the caller's, and whoever made the kernel vouches for the slice and for being alone
            // with these heads' entries of its pages.
            unsafe {
                append_keys::<L>(cache, &new, page, slot, &rows);
                append_values(cache, &new, page, slot, &rows);
            }
        }
    }
}

/// Turns a run of keys where they are still to be turned, and writes them from `slot` on.
///
/// # Safety
/// The processor has the features of `L`, the rows are inside of `new`, `slot + num_rows <= PAGE_TOKENS`, and nobody else
/// reads or writes these entries.
#[inline(always)]
unsafe fn append_keys<L: Lanes>(cache: &KvCache, new: &NewEntries<'_>, page: u32, slot: usize, rows: &Rows) {
    // SAFETY: the caller's; `head_start` has checked the page and the head, so that the start is inside.
    unsafe {
        if let Some(angles) = new.angles {
            for row in rows.row..rows.row + rows.num_rows {
                angles.turn::<L>(row, new.k.part_mut(row, rows.head * cache.head_dim, cache.head_dim));
            }
        }
        let at = cache.base.at(head_start(cache, page, rows.head));
        match cache.is_packed() {
            true => write_packed(cache, at, slot, new.k, rows, true),
            false => write_keys(cache, at.cast(), slot, new.k, rows),
        }
    }
}

/// Writes a run of values from `slot` on.
///
/// # Safety
/// As of [`append_keys`].
#[inline(always)]
unsafe fn append_values(cache: &KvCache, new: &NewEntries<'_>, page: u32, slot: usize, rows: &Rows) {
    let at = cache.base.at(head_start(cache, page, rows.head));
    // SAFETY: the caller's; `head_start` has checked the page and the head, so that the start is inside.
    unsafe {
        match cache.is_packed() {
            true => write_packed(cache, at, slot, new.v, rows, false),
            false => write_values(cache, at.cast::<u32>().wrapping_add(cache.key_words()), slot, new.v, rows),
        }
    }
}

/// Slices from a write to the slice whose lines are fetched meanwhile: a write to two to four lines takes a tenth of the
/// time in which they arrive.
const FETCH_AHEAD: usize = 8;

/// Numbers below which one thread is as fast as several: about 1 ns each, against a region's few µs.
const SMALL_APPEND: usize = 4096;

/// The cache's memory, for the threads that read and write it.
#[derive(Debug, Clone, Copy)]
struct Bytes(*mut u8);

// SAFETY: tasks write disjoint bytes, while an operation has the cache to itself.
unsafe impl Send for Bytes {}
// SAFETY: as above.
unsafe impl Sync for Bytes {}

impl Bytes {
    fn at(&self, byte: usize) -> *mut u8 {
        self.0.wrapping_add(byte)
    }
}

/// One head's columns of a run of rows.
struct Rows {
    row: usize,
    num_rows: usize,
    head: usize,
}

impl Rows {
    /// # Safety
    /// The rows are inside of the array, and nobody writes them.
    #[inline(always)]
    unsafe fn get<'a>(&self, array: SharedRows, i: usize, head_dim: usize) -> &'a [f32] {
        // SAFETY: the caller's.
        unsafe { array.part(self.row + i, self.head * head_dim, head_dim) }
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
fn fetch_slot(cache: &KvCache, slice: &AttentionSlice, head: usize, is_keys: bool) {
    if slice.num_rows == 0 {
        return;
    }
    let page = slice.pages[slice.first_position / PAGE_TOKENS];
    let slot = slice.first_position % PAGE_TOKENS;
    let start = head_start(cache, page, head);
    let (words, step) = match (is_keys, cache.layout) {
        (true, KeyLayout::Columns) => (slot..cache.key_words(), PAGE_TOKENS),
        (true, KeyLayout::Rows) => {
            let first = slot * cache.key_stride();
            (first..first + cache.key_stride(), REGISTER_WORDS)
        }
        (false, _) => {
            let first = cache.key_words() + slot / terms(cache.dtype) * cache.value_stride();
            (first..first + cache.value_stride(), REGISTER_WORDS)
        }
    };
    let bytes = if cache.is_packed() { size_of::<u16>() } else { size_of::<u32>() };
    words.step_by(step).for_each(|word| prefetch(cache.base.at(start + word * bytes)));
}

#[inline(always)]
fn prefetch(word: *const u8) {
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
unsafe fn write_keys(cache: &KvCache, keys: *mut u32, slot: usize, k: SharedRows, rows: &Rows) {
    let (head_dim, words) = (cache.head_dim, cache.head_dim / terms(cache.dtype));
    for i in 0..rows.num_rows {
        // SAFETY: the caller's.
        let entries = unsafe { rows.get(k, i, head_dim) };
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
unsafe fn write_values(cache: &KvCache, values: *mut u32, slot: usize, v: SharedRows, rows: &Rows) {
    let stride = cache.value_stride();
    for i in 0..rows.num_rows {
        let step = (slot + i) / terms(cache.dtype);
        // SAFETY: the step is below `PAGE_TOKENS / terms`, and its row has room for the head's width.
        let words = unsafe { std::slice::from_raw_parts_mut(values.add(step * stride), cache.head_dim) };
        // SAFETY: the caller's.
        let entries = words.iter_mut().zip(unsafe { rows.get(v, i, cache.head_dim) });
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

/// Writes a run of keys or of values from `slot` on, a byte for each number, and their powers of two.
///
/// # Safety
/// `head` is the start of a head's entries in a page, `slot + num_rows <= PAGE_TOKENS`, and nobody else writes or reads this
/// half of them.
#[inline(always)]
unsafe fn write_packed(
    cache: &KvCache,
    head: *mut u8,
    slot: usize,
    array: SharedRows,
    rows: &Rows,
    is_keys: bool,
) {
    let first = if is_keys { 0 } else { 2 * cache.key_words() };
    let exponents = 2 * cache.head_words() + if is_keys { 0 } else { PAGE_TOKENS };
    for i in 0..rows.num_rows {
        // SAFETY: the caller's.
        let (entries, slot) = (unsafe { rows.get(array, i, cache.head_dim) }, slot + i);
        // The place of a number's byte: that of the word of its pair, and which of the two it is.
        let (start, pair, number) = match (is_keys, cache.layout) {
            (true, KeyLayout::Columns) => (2 * slot, 2 * PAGE_TOKENS, 1),
            (true, KeyLayout::Rows) => (2 * slot * cache.key_stride(), 2, 1),
            (false, _) => (slot / 2 * 2 * cache.value_stride() + slot % 2, 4, 2),
        };
        let exponent = Exponent::of(entries);
        // SAFETY: the slot is below PAGE_TOKENS, and every place that of one of the head's numbers, or of its powers.
        unsafe {
            *head.add(exponents + slot) = exponent.0;
            let mut at = head.add(first + start);
            for [even, odd] in entries.as_chunks().0 {
                *at = exponent.code(*even);
                *at.add(number) = exponent.code(*odd);
                at = at.wrapping_add(pair);
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
        for (kv, layout) in [
            (KvDtype::F32, KeyLayout::Columns),
            (KvDtype::Bf16, KeyLayout::Columns),
            (KvDtype::Bf16, KeyLayout::Rows),
            (KvDtype::Fp8, KeyLayout::Columns),
            (KvDtype::Fp8, KeyLayout::Rows),
        ] {
            // Small whole numbers, exact in bf16; in E4M3 with a power of two for each position.
            let (most_key, most_value) = if kv == KvDtype::Fp8 { (16, 15) } else { (251, 241) };
            let power = |r: usize| if kv == KvDtype::Fp8 { ((r % 9) as f32 - 4.0).exp2() } else { 1.0 };
            let key = |r: usize, c: usize| ((r * 7 + c * 3) % most_key) as f32 * power(r);
            let value = |r: usize, c: usize| {
                (((r * 5 + c * 11) % most_value) as f32 - (most_value / 2) as f32) * power(r + 3)
            };
            let dtype = kv.multiplied();
            let mut cache = KvCache::new(kv, layout, 5, kv_heads, head_dim).unwrap();
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
                    let words = words(&cache, page, head);
                    let (keys, values) = words.split_at(cache.key_words());
                    for d in 0..head_dim {
                        let found = match layout {
                            KeyLayout::Columns => term(dtype, keys, PAGE_TOKENS, d, slot),
                            KeyLayout::Rows => term(dtype, &keys[slot * cache.key_stride()..], 1, d, 0),
                        };
                        assert_eq!(found, key(position, head * head_dim + d), "key {position} {head} {d}");
                        let found = term(dtype, values, cache.value_stride(), slot, d);
                        assert_eq!(
                            found,
                            value(position, head * head_dim + d),
                            "value {position} {head} {d}"
                        );
                    }
                }
            }
            assert!(cache.entries(0, 0).iter().chain(cache.entries(2, 1)).all(|&byte| byte == 0));
        }
    }

    /// A head's words as attention reads them.
    fn words(cache: &KvCache, page: u32, head: usize) -> Vec<u32> {
        if !cache.is_packed() {
            return [cache.keys(page, head), cache.values(page, head)].concat();
        }
        let mut words = vec![0; cache.head_words()];
        // SAFETY: there is room for a head's words.
        unsafe { unpack(cache, page, head..head + 1, PAGE_TOKENS, words.as_mut_ptr()) };
        words
    }

    #[test]
    fn a_cache_in_fp8_takes_half_of_one_in_bf16_and_a_byte_for_each_head() {
        let bytes = |kv, layout| KvCache::new(kv, layout, 100, 8, 128).unwrap().bytes();
        for layout in [KeyLayout::Columns, KeyLayout::Rows] {
            let tokens = 100 * PAGE_TOKENS;
            assert_eq!(bytes(KvDtype::Bf16, layout), tokens * 8 * 2 * 128 * 2);
            assert_eq!(bytes(KvDtype::Fp8, layout), tokens * 8 * 2 * KvDtype::Fp8.head_bytes(128));
        }
    }

    #[test]
    fn a_cache_without_pages_is_possible() {
        assert_eq!(KvCache::new(KvDtype::Bf16, KeyLayout::Columns, 0, 1, 8).unwrap().num_pages(), 0);
    }
}
