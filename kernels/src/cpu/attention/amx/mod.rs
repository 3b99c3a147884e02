//! One tile of attention in AMX: both products by `TDPBF16PS`, 16 queries to a register.
//!
//! A *column* is a query row of the tile, and sixteen columns are a *block*. Pages are walked in order. For every page and
//! block
//! 1. scores, transposed: keys as they lie in the cache, row by row, times the queries in pairs of dimensions. A
//!    register of scores is a key's, a lane a column's, so that the largest and the sum need no walk across lanes;
//! 2. weights: `2^((score - m) · c)`, `m` the largest score so far, rounded to bf16; sums so far are scaled to the new `m`;
//! 3. outputs: weights, put upright sixteen keys at a time, times the values as they lie in the cache, in pairs of positions.
//!
//! Where few rows of several heads share a block, each head's queries are zeros in the others' columns, and so are its
//! weights in their rows: products of zeros are added, which change no sum. (Where a row's own keys or values are not
//! finite, all of its heads in the tile show it.)
//!
//! The sums of both products run over steps of 32 terms that begin at fixed dimensions and positions, so that a row's
//! bits depend on its query and on the keys and values that it sees. A key that a row does not see has the weight zero. Its
//! value is not read where no row sees it, and where another row does and it is not finite, that step is taken
//! for each position alone.

use std::arch::x86_64::*;

mod ahead;
mod page;
mod registers;
mod vectors;

use super::Attend;
use crate::array::Array;
use crate::backend::PAGE_TOKENS;
use crate::cpu::kv_cache::{KvCache, unpack};
use crate::cpu::simd::Simd;
use ahead::Ahead;
use page::Page;
use vectors::transpose;

/// Columns of a block, keys of a register of scores, dimensions of a register of outputs.
pub(super) const BLOCK: usize = 16;

/// Terms that an instruction sums: 32 of bf16.
const STEP: usize = 32;

/// Bytes of a register: 16 rows of 64.
const REGISTER_BYTES: usize = 1024;

/// Steps over a page's positions.
const PAGE_STEPS: usize = PAGE_TOKENS / STEP;

/// Where a tile is worked out; all are aligned to cache lines.
struct Scratch {
    /// Queries in pairs of dimensions: `[heads or blocks][steps][16 pairs][BLOCK]` words.
    queries: *mut u32,
    /// A block's scores: `[PAGE_TOKENS][BLOCK]`.
    scores: *mut f32,
    /// A block's weights in pairs of positions: `[PAGE_TOKENS / 2][BLOCK]` words.
    pairs: *mut u32,
    /// The same upright, as the factors of values: `[heads][PAGE_STEPS][BLOCK][16 pairs]` words.
    weights: *mut u32,
    /// Sums of weighted values: `[blocks][BLOCK][stride]`.
    outputs: *mut f32,
    /// A block's sums while a step is taken for single positions: `[BLOCK][stride]`.
    spare: *mut f32,
    /// The heads' entries of a page, of a cache that is packed: `[heads][head words]`.
    unpacked: *mut u32,
    /// A step of values without what is not seen: `[heads][16 pairs][stride]` words.
    seen_values: *mut u32,
    /// Largest score so far, and sum of weights so far: `[blocks][BLOCK]`.
    max: *mut f32,
    sum: *mut f32,
    /// Positions that a column sees, of its sequence: `[blocks][BLOCK]`; zero for a column that is nobody's.
    seen: *mut i32,
    /// Words from step to step of values.
    stride: usize,
    blocks: usize,
    steps: usize,
}

impl Scratch {
    fn new(memory: &mut Array, columns: usize, heads: usize, cache: &KvCache) -> Scratch {
        let (stride, steps) = (cache.value_stride(), cache.key_stride() * 2 / STEP);
        let blocks = columns.div_ceil(BLOCK);
        let register = REGISTER_BYTES / 4;
        let sizes = [
            heads.max(blocks) * steps * register,
            PAGE_TOKENS * BLOCK,
            PAGE_TOKENS / 2 * BLOCK,
            heads * PAGE_STEPS * register,
            blocks * BLOCK * stride,
            BLOCK * stride,
            heads * STEP / 2 * stride,
            if cache.is_packed() { heads * cache.head_words() } else { 0 },
            blocks * BLOCK,
            blocks * BLOCK,
            blocks * BLOCK,
        ];
        memory.reshape(1, sizes.iter().sum());
        let base = memory.values_mut().as_mut_ptr();
        let mut at = 0;
        let [queries, scores, pairs, weights, outputs, spare, seen_values, unpacked, max, sum, seen] = sizes
            .map(|words| {
                at += words;
                base.wrapping_add(at - words)
            });
        Scratch {
            queries: queries.cast(),
            scores,
            pairs: pairs.cast(),
            weights: weights.cast(),
            outputs,
            spare,
            seen_values: seen_values.cast(),
            unpacked: unpacked.cast(),
            max,
            sum,
            seen: seen.cast(),
            stride,
            blocks,
            steps,
        }
    }
}

/// Works out one tile and writes its rows of the output. With several heads all of its rows fit a block.
///
/// # Safety
/// The processor has the level `amx`, the cache is of bf16 with its keys in rows, and the slice was checked against `q`
/// and the cache.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn attend(mut job: Attend<'_>) {
    let head_rows = job.num_positions * job.group;
    let columns = job.num_heads * head_rows;
    assert!(job.num_heads == 1 || columns <= BLOCK, "{columns} columns of {} heads", job.num_heads);
    let scratch = Scratch::new(job.scratch, columns, job.num_heads, job.cache);
    let last_page = (job.first_position + job.num_positions - 1) / PAGE_TOKENS;
    // SAFETY: the level is the caller's to vouch for; the scratch has room for the tile, and every page of the slice was
    // checked.
    unsafe {
        let mut ahead = Ahead::new(&job, 0, last_page);
        start(&job, &scratch, columns, &mut ahead);
        for page_idx in 0..=last_page {
            if page_idx > 0 {
                ahead.fetch_rest();
                ahead = Ahead::new(&job, page_idx, last_page);
            }
            if page_idx == last_page {
                job.append(Simd::Amx); // Its lines have been asked for meanwhile.
            }
            let page = job.slice.pages[page_idx];
            let keys = if job.cache.is_packed() {
                let end = job.first_position + job.num_positions - page_idx * PAGE_TOKENS;
                let heads = job.first_head..job.first_head + job.num_heads;
                unpack(job.cache, page, heads, end.min(PAGE_TOKENS), scratch.unpacked);
                scratch.unpacked.cast_const()
            } else {
                job.cache.keys(page, job.first_head).as_ptr()
            };
            for block in 0..scratch.blocks {
                let page = Page::new(&job, &scratch, (page_idx, keys), block, columns);
                if page.most_seen > 0 {
                    page.attend(&mut ahead);
                }
            }
        }
        finish(&mut job, &scratch, columns, &mut ahead);
        ahead.fetch_rest();
    }
}

/// Puts the queries down in pairs of dimensions and clears the sums.
///
/// # Safety
/// As of [`attend`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn start(job: &Attend<'_>, scratch: &Scratch, columns: usize, ahead: &mut Ahead) {
    let (head_dim, head_rows) = (job.cache.head_dim(), job.num_positions * job.group);
    let mut hints = ahead.during(ahead::START, scratch.blocks * scratch.steps);
    // SAFETY: rows and columns of q are the slice's, and writes are inside of the scratch's parts.
    unsafe {
        for block in 0..scratch.blocks {
            let own = block * BLOCK..columns.min((block + 1) * BLOCK);
            for step in 0..scratch.steps {
                hints.fetch();
                let mut rows = [_mm512_setzero_si512(); BLOCK];
                for column in own.clone() {
                    let query = job.query(job.place(column)).as_ptr();
                    rows[column % BLOCK] = bf16_words(query, step * STEP, head_dim);
                }
                transpose(&mut rows);
                // With several heads, of one block, a part for each, with zeros in the others' columns.
                for head in 0..job.num_heads {
                    let own = match job.num_heads {
                        1 => u16::MAX,
                        _ => (((1u32 << head_rows) - 1) << (head * head_rows)) as u16,
                    };
                    let out = scratch.queries.add(((block + head) * scratch.steps + step) * BLOCK * BLOCK);
                    for (i, &row) in rows.iter().enumerate() {
                        _mm512_store_si512(out.add(i * BLOCK).cast(), _mm512_maskz_mov_epi32(own, row));
                    }
                }
            }
        }
        let register = REGISTER_BYTES / 4;
        scratch.weights.write_bytes(0, job.num_heads * PAGE_STEPS * register);
        scratch.outputs.write_bytes(0, scratch.blocks * BLOCK * scratch.stride);
        for column in 0..scratch.blocks * BLOCK {
            // Not -inf: a row whose first scores are all -inf must not become inf - inf.
            *scratch.max.add(column) = f32::MIN;
            *scratch.sum.add(column) = 0.0;
            let position = job.first_position + column % head_rows / job.group;
            *scratch.seen.add(column) = if column < columns { position as i32 + 1 } else { 0 };
        }
    }
}

/// The bf16 of `values[first..len]`, at most 32 of them, the others zero: a word is a pair.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn bf16_words(values: *const f32, first: usize, len: usize) -> __m512i {
    let half = |from: usize| {
        let mask = ((1u32 << len.saturating_sub(from).min(16)) - 1) as u16;
        // SAFETY: the caller vouches for `len` numbers, and lanes beyond are not read.
        unsafe { _mm512_maskz_loadu_ps(mask, values.wrapping_add(from)) }
    };
    // SAFETY: all bits are bf16 and words.
    unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(half(first + 16), half(first))) }
}

/// Divides by the sums and hands the rows out.
///
/// # Safety
/// As of [`attend`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn finish(job: &mut Attend<'_>, scratch: &Scratch, columns: usize, ahead: &mut Ahead) {
    let head_dim = job.cache.head_dim();
    let mut hints = ahead.during(ahead::FINISH, columns);
    for column in 0..columns {
        hints.fetch();
        let (row, first) = job.place(column);
        // SAFETY: the column is one of the scratch's, its row one of the slice's, and no other tile has this head at this
        // position, so that nobody else writes its columns.
        unsafe {
            let outputs = scratch.outputs.add(column * scratch.stride);
            let scale = _mm512_set1_ps(1.0 / *scratch.sum.add(column));
            for d in (0..scratch.stride).step_by(16) {
                _mm512_store_ps(outputs.add(d), _mm512_mul_ps(_mm512_load_ps(outputs.add(d)), scale));
            }
            job.writer.write(row, first, std::slice::from_raw_parts(outputs, head_dim));
        }
    }
}
