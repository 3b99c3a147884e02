//! Writes the keys and values of a micro-batch's rows into the pages of their sequences, in the cache's own layout.

use std::ops::Range;

use super::{KeyLayout, KvCache, REGISTER_WORDS, head_start, terms};
use crate::array::Array;
use crate::backend::{AttentionSlice, Dtype, PAGE_TOKENS};
use crate::check;
use crate::cpu::lanes::{Kernel, Lanes, at_level};
use crate::cpu::pool::ThreadPool;
use crate::cpu::rope::Angles;
use crate::cpu::rows::SharedRows;
use crate::cpu::simd::Simd;
use crate::dtype::bf16_bits;
use crate::error::Result;
use crate::fp8::Exponent;

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
        // SAFETY: the device has its level, the slices were checked, and no other task has this half of this head.
        unsafe { at_level(simd, AppendHalf { cache, new, slices, is_wanted, head, is_keys }) };
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
