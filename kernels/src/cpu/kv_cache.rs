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
//! What a page held for an earlier owner stays there until it is overwritten. Attention uses nothing beyond the last position
//! that a row may see, so that not even a NaN of old can leak: it reads keys on to a whole register of them and replaces their
//! scores, and of a word of two values takes the half that is seen.

mod append;
mod unpack;

use memmap2::MmapMut;

use crate::backend::{Dtype, KvDtype, PAGE_TOKENS};
use crate::check;
use crate::cpu::simd::Simd;
use crate::error::{Error, Result};
pub(crate) use append::{AppendPosition, NewEntries, append, append_slices, check_append};
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

impl KeyLayout {
    /// That of a level's caches.
    pub(crate) fn of(simd: Simd, kv: KvDtype) -> Self {
        match (simd, kv.multiplied()) {
            (Simd::Amx, Dtype::Bf16) => Self::Rows,
            _ => Self::Columns,
        }
    }

    /// A word for it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Columns => "columns",
            Self::Rows => "rows",
        }
    }
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

    /// What its numbers are kept in.
    pub(crate) fn kv(&self) -> KvDtype {
        self.kv
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::array::Array;
    use crate::backend::AttentionSlice;
    use crate::cpu::pool::ThreadPool;

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
