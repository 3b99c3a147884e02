//! One tile of attention: online softmax over pages of keys.
//!
//! Pages are walked in order. For every page and every few rows of the tile (as many as fill the registers)
//! 1. scores: a product of the page's transposed keys with the queries;
//! 2. weights: `exp(score - m)`, `m` the largest score so far; sums so far are scaled to the new `m`;
//! 3. outputs: a product of the page's values with the weights is added.
//!
//! Pages stand at absolute positions and all orders of summing are fixed, so that a row's bits depend on its
//! query and on the keys and values it sees: not on the rows beside it, nor on how the prompt was cut. A key
//! that a row does not see counts for nothing at all: its score is replaced before it is used, and its
//! value is not read, even where it shares a word with one that is seen.
//!
//! With bf16 entries, queries and weights are rounded to bf16 as well, so that VDPBF16PS does both products. Of
//! 250 keys, head_dim 64, rounding the weights takes the output's relative error from 26e-4 to 31e-4 at worst
//! (flat scores, values around zero) and from 38e-4 to 38e-4 where scores differ; the rest is that of the
//! entries and of the output's own bf16.

use super::Attend;
use super::parts::parts;
use super::product::{MAX_ROWS, Product, product};
use crate::backend::{Dtype, PAGE_TOKENS};
use crate::cpu::kv_cache::{KvCache, unpack};
use crate::cpu::lanes::{F32Terms, Lanes, Terms};

/// Keys whose scores are computed together: a register of the widest level.
const KEY_GROUP: usize = 16;

/// Query rows of a head from which on the next entries are fetched ahead by instruction. So many rows keep the
/// units busy for longer than a page takes to arrive, and the fetches spread over that time (32 query
/// heads on 4 KV heads, 64 sequences: 1.2 ms for 1.6). Fewer rows wait for memory alone, and the
/// processor's own prefetching of the stream of heads is the faster then (9 on 3: 0.56 ms for 0.76). But a
/// level whose register tile is narrower than a page's row of keys reads no stream: it walks the same
/// lines several times in strides, and always fetches ahead (AVX2, 9 on 3: 0.8 ms for 1.75).
const FETCH_ROWS: usize = 6;

/// A tile's working memory, `rows` being its query rows.
struct Scratch {
    /// Queries as factors: `[rows][stride]`.
    queries: *mut f32,
    /// Sums of weighted values: `[rows][stride]`.
    outputs: *mut f32,
    /// Scores of a page: `[MAX_ROWS][PAGE_TOKENS]`.
    scores: *mut f32,
    /// Weights of a page as factors: `[MAX_ROWS][PAGE_TOKENS]`.
    weights: *mut f32,
    /// A head's entries of a page, of a cache that is packed.
    unpacked: *mut u32,
    /// A step of values, of which the second term is removed: `[stride]`.
    half_step: *mut u32,
    /// Largest score so far: `[rows]`.
    max: *mut f32,
    /// Sum of weights so far: `[rows]`.
    sum: *mut f32,
    /// A head's width in whole registers.
    stride: usize,
}

/// Works out one tile and writes its rows of the output.
///
/// # Safety
/// The processor has the features of `L`, and the slice was checked against `q` and the cache.
#[inline(always)]
pub(super) unsafe fn attend<L: Lanes>(job: Attend<'_>) {
    // SAFETY: the caller's.
    unsafe {
        match job.cache.dtype() {
            Dtype::F32 => attend_in::<L, F32Terms>(job),
            Dtype::Bf16 => attend_in::<L, L::Bf16Terms>(job),
        }
    }
}

#[inline(always)]
unsafe fn attend_in<L: Lanes, T: Terms<L>>(mut job: Attend<'_>) {
    let head_rows = job.num_positions * job.group;
    let rows = job.num_heads * head_rows;
    let last_page = (job.first_position + job.num_positions - 1) / PAGE_TOKENS;
    let scratch = Scratch::new(job.scratch, rows, job.cache);
    // SAFETY: the scratch has room for `rows` rows, and every page of the slice was checked.
    unsafe {
        start_rows::<L, T>(&job, &scratch, rows);
        // All heads of a page, and then the next page: a head's entries are followed by the next head's.
        for page_idx in 0..=last_page {
            for head in 0..job.num_heads {
                let next = if head + 1 < job.num_heads { (page_idx, head + 1) } else { (page_idx + 1, 0) };
                let page = if job.cache.is_packed() {
                    let end = job.first_position + job.num_positions - page_idx * PAGE_TOKENS;
                    let (page, head) = (job.slice.pages[page_idx], job.first_head + head);
                    unpack(job.cache, page, head..head + 1, end.min(PAGE_TOKENS), scratch.unpacked);
                    Page::unpacked(&job, &scratch)
                } else {
                    Page::new(&job, (page_idx, head), (next.0.min(last_page), next.1))
                };
                attend_head::<L, T>(&job, &scratch, &page, page_idx * PAGE_TOKENS, head * head_rows);
            }
        }
        finish_rows::<L>(&mut job, &scratch, rows);
    }
}

/// One head's rows against one page, a few at a time.
///
/// # Safety
/// As of [`start_rows`]; `page` is the head's, `first_key` its first position, `first_row` the head's first.
#[inline(always)]
unsafe fn attend_head<L: Lanes, T: Terms<L>>(
    job: &Attend<'_>,
    scratch: &Scratch,
    page: &Page,
    first_key: usize,
    first_row: usize,
) {
    let rows = job.num_positions * job.group;
    // Rows before the page see nothing of it.
    let mut row = first_key.saturating_sub(job.first_position) * job.group;
    let mut page = *page;
    if rows < FETCH_ROWS && L::TILE_COLS * L::LANES >= PAGE_TOKENS {
        page.next = std::ptr::null();
    }
    while row < rows {
        let num_rows = L::TILE_ROWS.min(rows - row);
        let mut visible = [0; MAX_ROWS];
        for (i, visible) in visible.iter_mut().enumerate().take(num_rows) {
            let position = job.first_position + (row + i) / job.group;
            *visible = (position + 1 - first_key).min(PAGE_TOKENS);
        }
        let head_dim = job.cache.head_dim();
        let page_rows = PageRows { row: first_row + row, visible: &visible[..num_rows], head_dim };
        // SAFETY: the caller's.
        unsafe { attend_page::<L, T>(scratch, &page_rows, &page) };
        page.next = std::ptr::null();
        row += num_rows;
    }
}

impl Scratch {
    #[inline(always)]
    fn new(memory: &mut crate::array::Array, rows: usize, cache: &KvCache) -> Scratch {
        let stride = cache.value_stride();
        let mut words = 0;
        let mut take = |count: usize| {
            words += count.next_multiple_of(KEY_GROUP);
            words - count.next_multiple_of(KEY_GROUP)
        };
        let queries = take(rows * stride);
        let outputs = take(rows * stride);
        let scores = take(MAX_ROWS * PAGE_TOKENS);
        let weights = take(MAX_ROWS * PAGE_TOKENS);
        let unpacked = take(if cache.is_packed() { cache.head_words() } else { 0 });
        let half_step = take(stride);
        let max = take(rows);
        let sum = take(rows);
        memory.reshape(1, words);
        let base = memory.values_mut().as_mut_ptr();
        let at = |start: usize| base.wrapping_add(start);
        Scratch {
            queries: at(queries),
            outputs: at(outputs),
            scores: at(scores),
            weights: at(weights),
            unpacked: at(unpacked).cast(),
            half_step: at(half_step).cast(),
            max: at(max),
            sum: at(sum),
            stride,
        }
    }
}

/// Puts the queries down as factors and clears the sums.
///
/// # Safety
/// As of [`attend`]; the scratch has room for `rows` rows.
#[inline(always)]
unsafe fn start_rows<L: Lanes, T: Terms<L>>(job: &Attend<'_>, scratch: &Scratch, rows: usize) {
    let head_dim = job.cache.head_dim();
    for row in 0..rows {
        // SAFETY: the row is one of the tile's; rows of the scratch are `stride` words, which whole registers fit.
        unsafe {
            let query = job.query(job.place(row)).as_ptr();
            let factors = scratch.queries.add(row * scratch.stride);
            let outputs = scratch.outputs.add(row * scratch.stride);
            let mut d = 0;
            while d < head_dim {
                let values = L::load_first(query.add(d), (head_dim - d).min(L::LANES));
                T::store_factors(values, factors, d);
                d += L::LANES;
            }
            outputs.write_bytes(0, scratch.stride);
            // Not -inf: a row whose first scores are all -inf must not become inf - inf.
            *scratch.max.add(row) = f32::MIN;
            *scratch.sum.add(row) = 0.0;
        }
    }
}

/// Divides by the sums and hands the rows out.
///
/// # Safety
/// As of [`start_rows`].
#[inline(always)]
unsafe fn finish_rows<L: Lanes>(job: &mut Attend<'_>, scratch: &Scratch, rows: usize) {
    let head_dim = job.cache.head_dim();
    for row in 0..rows {
        let (batch_row, column) = job.place(row);
        // SAFETY: the row is one of the scratch's and of the slice's, and no other tile has this head at this
        // position, so that nobody else writes its columns.
        unsafe {
            let outputs = scratch.outputs.add(row * scratch.stride);
            let scale = L::splat(1.0 / *scratch.sum.add(row));
            let mut d = 0;
            while d < scratch.stride {
                L::load(outputs.add(d)).mul(scale).store(outputs.add(d));
                d += L::LANES;
            }
            let outputs = std::slice::from_raw_parts(outputs, head_dim);
            job.writer.write(batch_row, column, outputs);
        }
    }
}

/// A few rows of the tile against one page.
struct PageRows<'a> {
    /// The first of them.
    row: usize,
    /// How many of the page's keys each sees, never falling.
    visible: &'a [usize],
    head_dim: usize,
}

/// A head's entries in a page, keys and behind them values.
#[derive(Clone, Copy)]
struct Page {
    keys: *const u32,
    values: *const u32,
    /// What to fetch meanwhile: the entries that are needed next, or null.
    next: *const u32,
    /// Words from a head's keys to its values.
    key_words: usize,
}

impl Page {
    #[inline(always)]
    fn new(job: &Attend<'_>, at: (usize, usize), next: (usize, usize)) -> Page {
        let entries = |(page_idx, head): (usize, usize)| {
            let page = job.slice.pages[page_idx];
            (job.cache.keys(page, job.first_head + head), job.cache.values(page, job.first_head + head))
        };
        let (keys, values) = entries(at);
        let next = entries(next).0.as_ptr();
        Page { keys: keys.as_ptr(), values: values.as_ptr(), next, key_words: keys.len() }
    }

    /// The page that was unpacked last; what comes next is not fetched ahead, as it is read in one stream.
    #[inline(always)]
    fn unpacked(job: &Attend<'_>, scratch: &Scratch) -> Page {
        let (keys, key_words) = (scratch.unpacked.cast_const(), job.cache.key_words());
        Page { keys, values: keys.wrapping_add(key_words), next: std::ptr::null(), key_words }
    }

    /// What to fetch while the values are read.
    #[inline(always)]
    fn next_values(&self) -> *const u32 {
        if self.next.is_null() { self.next } else { self.next.wrapping_add(self.key_words) }
    }
}

/// # Safety
/// As of [`start_rows`]; the page's pointers are a head's in a page.
#[inline(always)]
unsafe fn attend_page<L: Lanes, T: Terms<L>>(scratch: &Scratch, page_rows: &PageRows<'_>, page: &Page) {
    let num_rows = page_rows.visible.len();
    let num_keys = page_rows.visible[num_rows - 1].next_multiple_of(KEY_GROUP);
    let scale = 1.0 / (page_rows.head_dim as f32).sqrt();
    let mut rescales = [0.0; MAX_ROWS];
    // SAFETY: the caller's; scores and weights have room for MAX_ROWS rows of PAGE_TOKENS.
    unsafe {
        product::<L, T>(
            num_rows,
            &Product {
                entries: page.keys,
                ahead: page.next,
                stride: PAGE_TOKENS,
                steps: page_rows.head_dim / T::TERMS,
                registers: num_keys / L::LANES,
                factors: scratch.queries.add(page_rows.row * scratch.stride),
                factor_stride: scratch.stride,
                first_step: 0,
                sums: scratch.scores,
                sum_stride: PAGE_TOKENS,
                rescales: std::ptr::null(),
            },
        );
        for (i, &visible) in page_rows.visible.iter().enumerate() {
            let (max, sum) = (scratch.max.add(page_rows.row + i), scratch.sum.add(page_rows.row + i));
            let scores = scratch.scores.add(i * PAGE_TOKENS);
            let weights = scratch.weights.add(i * PAGE_TOKENS);
            rescales[i] = weigh::<L, T>(scores, weights, visible, num_keys, scale, &mut *max, &mut *sum);
        }
        add_values::<L, T>(scratch, page_rows, page, &rescales);
    }
}

/// Turns a row's scores into weights, and returns what its sums so far were scaled by.
///
/// # Safety
/// `scores` and `weights` have room for `num_keys`, a multiple of KEY_GROUP.
#[inline(always)]
unsafe fn weigh<L: Lanes, T: Terms<L>>(
    scores: *mut f32,
    weights: *mut f32,
    visible: usize,
    num_keys: usize,
    scale: f32,
    max: &mut f32,
    sum: &mut f32,
) -> f32 {
    // SAFETY: the caller's.
    unsafe {
        let (scale, hidden) = (L::splat(scale), L::splat(f32::NEG_INFINITY));
        let mut largest = L::splat(*max);
        let mut key = 0;
        while key < num_keys {
            let seen = visible.saturating_sub(key);
            let score = L::load(scores.add(key)).mul(scale).first_or(seen, hidden);
            score.store(scores.add(key));
            // A NaN is passed over here, and comes out again as the exponential's.
            largest = score.max(largest);
            key += L::LANES;
        }
        let new_max = largest.largest();
        let rescale = L::splat(*max - new_max).exp().first();
        let shift = L::splat(new_max);
        let mut total = L::splat(0.0);
        let mut key = 0;
        while key < num_keys {
            let weight = L::load(scores.add(key)).sub(shift).exp();
            // The sum is that of the weights as they will count, so that they add up to one.
            total = total.add(T::store_factors(weight, weights, key));
            key += L::LANES;
        }
        *max = new_max;
        *sum = *sum * rescale + total.sum();
        rescale
    }
}

/// Adds the page's weighted values to the outputs.
///
/// # Safety
/// As of [`attend_page`].
#[inline(always)]
unsafe fn add_values<L: Lanes, T: Terms<L>>(
    scratch: &Scratch,
    page_rows: &PageRows<'_>,
    page: &Page,
    rescales: &[f32; MAX_ROWS],
) {
    let (parts, num_parts) = parts(page_rows.visible, T::TERMS);
    for (index, part) in parts[..num_parts].iter().enumerate() {
        let first_row = part.first_row as usize;
        let mut entries = page.values.wrapping_add(part.first_step as usize * scratch.stride);
        // SAFETY: the caller's; a part's steps end where its rows' visible keys do.
        unsafe {
            if part.is_half {
                halve_step(scratch, entries);
                entries = scratch.half_step;
            }
            product::<L, T>(
                part.num_rows as usize,
                &Product {
                    entries,
                    ahead: if index == 0 { page.next_values() } else { std::ptr::null() },
                    stride: scratch.stride,
                    steps: part.num_steps as usize,
                    registers: scratch.stride / L::LANES,
                    factors: scratch.weights.add(first_row * PAGE_TOKENS),
                    factor_stride: PAGE_TOKENS,
                    first_step: part.first_step as usize,
                    sums: scratch.outputs.add((page_rows.row + first_row) * scratch.stride),
                    sum_stride: scratch.stride,
                    // The first part takes all rows, and brings their sums to the new scale.
                    rescales: if index == 0 { rescales.as_ptr() } else { ONES.as_ptr() },
                },
            );
        }
    }
}

const ONES: [f32; MAX_ROWS] = [1.0; MAX_ROWS];

/// Copies a step of values without its second term, the one that is not seen.
///
/// # Safety
/// `step` has `stride` words.
#[inline(always)]
unsafe fn halve_step(scratch: &Scratch, step: *const u32) {
    for word in 0..scratch.stride {
        // SAFETY: the caller's; the copy has `stride` words.
        unsafe { *scratch.half_step.add(word) = *step.add(word) & 0xffff };
    }
}
