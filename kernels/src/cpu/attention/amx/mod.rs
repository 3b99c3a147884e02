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
mod registers;

use super::Attend;
use crate::array::Array;
use crate::backend::PAGE_TOKENS;
use crate::cpu::gemm::Registers;
use crate::cpu::kv_cache::KvCache;
use ahead::Ahead;
use registers::{Scores, scores, values};

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
            blocks * BLOCK,
            blocks * BLOCK,
            blocks * BLOCK,
        ];
        memory.reshape(1, sizes.iter().sum());
        let base = memory.values_mut().as_mut_ptr();
        let mut at = 0;
        let [queries, scores, pairs, weights, outputs, spare, seen_values, max, sum, seen] =
            sizes.map(|words| {
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
        let registers = Registers::shape(BLOCK);
        start(&job, &scratch, columns);
        for page_idx in 0..=last_page {
            let mut ahead = Ahead::new(&job, page_idx, last_page);
            for block in 0..scratch.blocks {
                let page = Page::new(&job, &scratch, page_idx, block, columns);
                if page.most_seen > 0 {
                    page.attend(&mut ahead);
                }
            }
            ahead.fetch_rest();
        }
        drop(registers);
        finish(&mut job, &scratch, columns);
    }
}

/// Puts the queries down in pairs of dimensions and clears the sums.
///
/// # Safety
/// As of [`attend`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn start(job: &Attend<'_>, scratch: &Scratch, columns: usize) {
    let (head_dim, head_rows) = (job.cache.head_dim(), job.num_positions * job.group);
    // SAFETY: rows and columns of q are the slice's, and writes are inside of the scratch's parts.
    unsafe {
        // With several heads a part for each, of one block; with one head a part for each block.
        for part in 0..job.num_heads.max(scratch.blocks) {
            let own = match job.num_heads {
                1 => part * BLOCK..columns.min((part + 1) * BLOCK),
                _ => part * head_rows..(part + 1) * head_rows,
            };
            for step in 0..scratch.steps {
                let mut rows = [_mm512_setzero_si512(); BLOCK];
                for column in own.clone() {
                    let (row, first) = job.place(column);
                    let query = job.q.row(row)[first..][..head_dim].as_ptr();
                    rows[column % BLOCK] = bf16_words(query, step * STEP, head_dim);
                }
                let out = scratch.queries.add((part * scratch.steps + step) * BLOCK * BLOCK);
                transpose(&mut rows);
                rows.iter()
                    .enumerate()
                    .for_each(|(i, &row)| _mm512_store_si512(out.add(i * BLOCK).cast(), row));
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
unsafe fn finish(job: &mut Attend<'_>, scratch: &Scratch, columns: usize) {
    let head_dim = job.cache.head_dim();
    for column in 0..columns {
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

/// One block against one page.
struct Page<'a> {
    job: &'a Attend<'a>,
    scratch: &'a Scratch,
    block: usize,
    /// Columns of the block that are somebody's.
    columns: usize,
    /// Of the first head.
    keys: *const u32,
    values: *const u32,
    /// Keys of the page that each column sees, and the fewest and the most.
    seen: __m512i,
    fewest_seen: usize,
    most_seen: usize,
}

// SAFETY (of all blocks in these functions): the caller of `attend` vouches for the level; pointers stay inside of the
// scratch and of the page's heads.
#[allow(clippy::undocumented_unsafe_blocks, reason = "one sentence above holds for all of them")]
impl<'a> Page<'a> {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn new(
        job: &'a Attend<'a>,
        scratch: &'a Scratch,
        page_idx: usize,
        block: usize,
        columns: usize,
    ) -> Self {
        let columns = BLOCK.min(columns - block * BLOCK);
        let page = job.slice.pages[page_idx];
        let (keys, values) = (job.cache.keys(page, job.first_head), job.cache.values(page, job.first_head));
        unsafe {
            let seen = _mm512_load_si512(scratch.seen.add(block * BLOCK).cast());
            let seen = _mm512_sub_epi32(seen, _mm512_set1_epi32((page_idx * PAGE_TOKENS) as i32));
            let seen = _mm512_min_epi32(seen, _mm512_set1_epi32(PAGE_TOKENS as i32));
            let seen = _mm512_max_epi32(seen, _mm512_setzero_si512());
            let mask = ((1u32 << columns) - 1) as u16;
            Page {
                job,
                scratch,
                block,
                columns,
                keys: keys.as_ptr(),
                values: values.as_ptr(),
                seen,
                fewest_seen: _mm512_mask_reduce_min_epi32(mask, seen) as usize,
                most_seen: _mm512_mask_reduce_max_epi32(mask, seen) as usize,
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn attend(&self, ahead: &mut Ahead) {
        let Page { job, scratch, .. } = self;
        unsafe {
            for first in (0..self.most_seen).step_by(STEP) {
                ahead.fetch_part();
                scores(&Scores {
                    keys: self.keys.add(first * job.cache.key_stride()),
                    key_bytes: job.cache.key_stride() * 4,
                    head_bytes: job.cache.head_words() * 4,
                    heads: job.num_heads,
                    queries: scratch.queries.add(self.part() * scratch.steps * BLOCK * BLOCK),
                    steps: scratch.steps,
                    out: scratch.scores.add(first * BLOCK),
                });
            }
            let rescale = self.weigh(ahead);
            self.rescale(rescale);
            self.stand_up(ahead);
            self.add_values(ahead);
        }
    }

    /// Where the block's queries are.
    fn part(&self) -> usize {
        if self.job.num_heads == 1 { self.block } else { 0 }
    }

    /// Turns scores into pairs of weights, and returns what the sums so far are scaled by.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn weigh(&self, ahead: &mut Ahead) -> __m512 {
        let at = self.block * BLOCK;
        unsafe {
            let (max_at, sum_at) = (self.scratch.max.add(at), self.scratch.sum.add(at));
            let max = _mm512_load_ps(max_at);
            let new_max = self.hide_unseen(max);
            let scale = 1.0 / (self.job.cache.head_dim() as f32).sqrt();
            let factor = _mm512_set1_ps(scale * std::f32::consts::LOG2_E);
            let rescale = exp2(_mm512_mul_ps(_mm512_sub_ps(max, new_max), factor));
            let ones = std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(0x3f80_3f80));
            let interleave = _mm512_loadu_si512(INTERLEAVE.as_ptr().cast());
            let (mut scores, mut pairs) = (self.scratch.scores.cast_const(), self.scratch.pairs);
            let mut total = [_mm512_setzero_ps(); 2];
            for eighth in 0..self.most_seen.next_multiple_of(STEP) / 8 {
                if eighth % 2 == 0 {
                    ahead.fetch_part();
                }
                for pair in 0..4 {
                    let weight = |key: usize| {
                        let score = _mm512_load_ps(scores.add(key * BLOCK));
                        exp2(_mm512_mul_ps(_mm512_sub_ps(score, new_max), factor))
                    };
                    let (even, odd) = (weight(2 * pair), weight(2 * pair + 1));
                    // All of the even key's, then all of the odd one's: a lane's two are to be neighbours.
                    let both = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(odd, even));
                    let both = _mm512_permutexvar_epi16(interleave, both);
                    _mm512_store_si512(pairs.add(pair * BLOCK).cast(), both);
                    // The sum is that of the weights as they will count, so that they add up to one.
                    let both = std::mem::transmute::<__m512i, __m512bh>(both);
                    total[pair % 2] = _mm512_dpbf16_ps(total[pair % 2], both, ones);
                }
                scores = scores.add(8 * BLOCK);
                pairs = pairs.add(4 * BLOCK);
            }
            let total = _mm512_add_ps(total[0], total[1]);
            _mm512_store_ps(max_at, new_max);
            _mm512_store_ps(sum_at, _mm512_fmadd_ps(_mm512_load_ps(sum_at), rescale, total));
            rescale
        }
    }

    /// Replaces the scores of keys that a column does not see, up to the end of a step, and returns the largest of the
    /// others and of `max`. A NaN is passed over here, and comes out again as the exponential's.
    #[target_feature(enable = "avx512f")]
    unsafe fn hide_unseen(&self, max: __m512) -> __m512 {
        let scores = self.scratch.scores;
        let hidden = _mm512_set1_ps(f32::NEG_INFINITY);
        unsafe {
            let (mut even, mut odd) = (max, max);
            for pair in 0..self.fewest_seen / 2 {
                even = _mm512_max_ps(_mm512_load_ps(scores.add(2 * pair * BLOCK)), even);
                odd = _mm512_max_ps(_mm512_load_ps(scores.add((2 * pair + 1) * BLOCK)), odd);
            }
            for key in self.fewest_seen / 2 * 2..self.most_seen {
                let score = _mm512_load_ps(scores.add(key * BLOCK));
                let score = _mm512_mask_blend_ps(self.sees(key), hidden, score);
                _mm512_store_ps(scores.add(key * BLOCK), score);
                even = _mm512_max_ps(score, even);
            }
            for key in self.most_seen..self.most_seen.next_multiple_of(STEP) {
                _mm512_store_ps(scores.add(key * BLOCK), hidden);
            }
            _mm512_max_ps(even, odd)
        }
    }

    /// The columns that see a key.
    #[target_feature(enable = "avx512f")]
    unsafe fn sees(&self, key: usize) -> u16 {
        _mm512_cmpgt_epi32_mask(self.seen, _mm512_set1_epi32(key as i32))
    }

    /// Brings the outputs so far to the new largest scores; where those are the old ones nothing changes.
    #[target_feature(enable = "avx512f")]
    unsafe fn rescale(&self, rescale: __m512) {
        let mut changed = _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(rescale, _mm512_set1_ps(1.0));
        let mut factors = [0.0f32; BLOCK];
        unsafe { _mm512_storeu_ps(factors.as_mut_ptr(), rescale) };
        changed &= ((1u32 << self.columns) - 1) as u16;
        while changed != 0 {
            let column = changed.trailing_zeros() as usize;
            changed &= changed - 1;
            unsafe {
                let outputs = self.outputs().add(column * self.scratch.stride);
                let factor = _mm512_set1_ps(factors[column]);
                for d in (0..self.scratch.stride).step_by(16) {
                    _mm512_store_ps(outputs.add(d), _mm512_mul_ps(_mm512_load_ps(outputs.add(d)), factor));
                }
            }
        }
    }

    fn outputs(&self) -> *mut f32 {
        self.scratch.outputs.wrapping_add(self.block * BLOCK * self.scratch.stride)
    }

    /// Puts the weights upright: a row for each column, with its pairs of keys.
    #[target_feature(enable = "avx512f")]
    unsafe fn stand_up(&self, ahead: &mut Ahead) {
        for step in 0..self.most_seen.div_ceil(STEP) {
            ahead.fetch_part();
            unsafe {
                let mut rows = [_mm512_setzero_si512(); BLOCK];
                for (i, row) in rows.iter_mut().enumerate() {
                    *row = _mm512_load_si512(self.scratch.pairs.add((step * BLOCK + i) * BLOCK).cast());
                }
                transpose(&mut rows);
                for (column, &row) in rows.iter().enumerate().take(self.columns) {
                    _mm512_store_si512(
                        self.weights(self.head_of(column), step).add(column * BLOCK).cast(),
                        row,
                    );
                }
            }
        }
    }

    fn head_of(&self, column: usize) -> usize {
        if self.job.num_heads == 1 { 0 } else { column / (self.job.num_positions * self.job.group) }
    }

    /// A head's weights for a step over the page's positions: `[BLOCK][16 pairs]` words.
    fn weights(&self, head: usize, step: usize) -> *mut u32 {
        self.scratch.weights.wrapping_add((head * PAGE_STEPS + step) * BLOCK * BLOCK)
    }

    /// Adds the weighted values to the outputs.
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn add_values(&self, ahead: &mut Ahead) {
        let mut factors = Factors { list: [std::ptr::null(); 2 * MAX_FACTORS], len: 0 };
        unsafe {
            for step in 0..self.most_seen.div_ceil(STEP) {
                let end = (step + 1) * STEP;
                let is_shared = end > self.fewest_seen && self.fewest_seen < self.most_seen;
                if is_shared && self.has_strange_values(step) {
                    // What is listed so far comes before it.
                    self.multiply(factors.listed(), self.outputs(), ahead);
                    return self.add_by_position(step, ahead);
                }
                for head in 0..self.job.num_heads {
                    let values = match end <= self.most_seen {
                        true => self.step_values(head, step),
                        false => self.seen_values(head, step, self.most_seen),
                    };
                    factors.push(self.weights(head, step), values);
                }
            }
            self.multiply(factors.listed(), self.outputs(), ahead);
        }
    }

    /// The same from `step` on, for each number of keys that is seen alone: for values that are not finite, and not to
    /// be met by rows that do not see them.
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn add_by_position(&self, first_step: usize, ahead: &mut Ahead) {
        let stride = self.scratch.stride;
        let mut seen = [0i32; BLOCK];
        unsafe {
            _mm512_storeu_si512(seen.as_mut_ptr().cast(), self.seen);
            for most_seen in 1..=self.most_seen {
                if !seen[..self.columns].contains(&(most_seen as i32)) {
                    continue;
                }
                self.scratch.spare.copy_from_nonoverlapping(self.outputs(), BLOCK * stride);
                for step in first_step..most_seen.div_ceil(STEP) {
                    for head in 0..self.job.num_heads {
                        let values = self.seen_values(head, step, most_seen);
                        let factors = [self.weights(head, step).cast_const(), values];
                        self.multiply(&factors, self.scratch.spare, ahead);
                    }
                }
                for column in (0..self.columns).filter(|&column| seen[column] == most_seen as i32) {
                    let (from, to) = (self.scratch.spare, self.outputs());
                    to.add(column * stride).copy_from_nonoverlapping(from.add(column * stride), stride);
                }
            }
        }
    }

    /// `sums += weights · values` over a list of both.
    unsafe fn multiply(&self, factors: &[*const u32], sums: *mut f32, ahead: &mut Ahead) {
        let stride = self.scratch.stride;
        for first in (0..stride).step_by(4 * BLOCK) {
            ahead.fetch_part();
            let registers = (stride - first).div_ceil(BLOCK).min(4);
            unsafe { values(registers, factors, first * 4, stride * 4, sums.add(first)) };
        }
    }

    /// A head's values in a step: `[16 pairs][stride]` words.
    fn step_values(&self, head: usize, step: usize) -> *const u32 {
        self.values.wrapping_add(head * self.job.cache.head_words() + step * STEP / 2 * self.scratch.stride)
    }

    /// The same with zeros for those from the position `most_seen` of the page on.
    #[target_feature(enable = "avx512f")]
    unsafe fn seen_values(&self, head: usize, step: usize, most_seen: usize) -> *const u32 {
        let stride = self.scratch.stride;
        let (from, to) =
            (self.step_values(head, step), self.scratch.seen_values.wrapping_add(head * STEP / 2 * stride));
        let seen = (most_seen - step * STEP).min(STEP);
        unsafe {
            for pair in 0..STEP / 2 {
                let kept = match seen.saturating_sub(2 * pair) {
                    0 => 0,
                    1 => 0xffff,
                    _ => -1,
                };
                for word in (0..stride).step_by(16) {
                    let words = match kept {
                        0 => _mm512_setzero_si512(),
                        _ => _mm512_load_si512(from.add(pair * stride + word).cast()),
                    };
                    let words = _mm512_and_si512(words, _mm512_set1_epi32(kept));
                    _mm512_store_si512(to.add(pair * stride + word).cast(), words);
                }
            }
        }
        to
    }

    /// Whether a value of the step that some columns see and others do not is infinite or NaN.
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn has_strange_values(&self, step: usize) -> bool {
        let exponent = _mm512_set1_epi16(0x7f80);
        let first = self.fewest_seen.max(step * STEP) - step * STEP;
        let end = self.most_seen.min((step + 1) * STEP) - step * STEP;
        let mut strange = 0;
        for head in 0..self.job.num_heads {
            for pair in first / 2..end.div_ceil(2) {
                for word in (0..self.scratch.stride).step_by(16) {
                    let at = self.step_values(head, step).wrapping_add(pair * self.scratch.stride + word);
                    let bits = unsafe { _mm512_and_si512(_mm512_load_si512(at.cast()), exponent) };
                    strange |= _mm512_cmpeq_epi16_mask(bits, exponent);
                }
            }
        }
        strange != 0
    }
}

/// Steps of all heads that share a block: a head has a column at least.
const MAX_FACTORS: usize = BLOCK * PAGE_STEPS;

/// Weights and values in turn, whose products are added.
struct Factors {
    list: [*const u32; 2 * MAX_FACTORS],
    len: usize,
}

impl Factors {
    fn push(&mut self, weights: *const u32, values: *const u32) {
        self.list[self.len..self.len + 2].copy_from_slice(&[weights, values]);
        self.len += 2;
    }

    fn listed(&self) -> &[*const u32] {
        &self.list[..self.len]
    }
}

/// From sixteen numbers of 16 bits and then sixteen others to pairs of one of each.
const INTERLEAVE: [u16; 32] = {
    let mut order = [0; 32];
    let mut i = 0;
    while i < 32 {
        order[i] = (i / 2 + i % 2 * 16) as u16;
        i += 1;
    }
    order
};

/// `2^x` for x at most 0, with an error of 7e-6: a sixth of a hundredth of bf16's half unit. What would be denormal is
/// zero, as the products take it: a processor is slow to make denormals. NaN stays NaN.
#[target_feature(enable = "avx512f")]
fn exp2(x: __m512) -> __m512 {
    // (2^r - 1) / r at the four Chebyshev nodes of [-1/2, 1/2], highest power first.
    const POLYNOMIAL: [f32; 4] = [9.656_71e-3, 5.583_828e-2, 0.240_225_3, 0.693_136_75];
    let is_normal = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(-126.0));
    let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
    let r = _mm512_sub_ps(x, n);
    let mut p = _mm512_set1_ps(POLYNOMIAL[0]);
    for c in &POLYNOMIAL[1..] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(*c));
    }
    _mm512_maskz_scalef_ps(is_normal, _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0)), n)
}

/// Rows of sixteen words become columns.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(rows: &mut [__m512i; BLOCK]) {
    let mut pairs = *rows;
    for i in 0..BLOCK / 2 {
        pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    // Lane L of `fours[i + j]` is column 4 L + j of rows i to i + 3.
    let mut fours = pairs;
    for i in 0..BLOCK / 4 {
        let i = 4 * i;
        fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
        fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    const EVEN: i32 = 0x88;
    const ODD: i32 = 0xdd;
    for j in 0..4 {
        let (a, b) = (fours[j], fours[j + 4]);
        let (c, d) = (fours[j + 8], fours[j + 12]);
        let (even, odd) = (_mm512_shuffle_i32x4::<EVEN>(a, b), _mm512_shuffle_i32x4::<ODD>(a, b));
        let (even2, odd2) = (_mm512_shuffle_i32x4::<EVEN>(c, d), _mm512_shuffle_i32x4::<ODD>(c, d));
        rows[j] = _mm512_shuffle_i32x4::<EVEN>(even, even2);
        rows[j + 4] = _mm512_shuffle_i32x4::<EVEN>(odd, odd2);
        rows[j + 8] = _mm512_shuffle_i32x4::<ODD>(even, even2);
        rows[j + 12] = _mm512_shuffle_i32x4::<ODD>(odd, odd2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::Simd;

    #[target_feature(enable = "avx512f")]
    unsafe fn transposed(mut words: [[u32; 16]; 16]) -> [[u32; 16]; 16] {
        // SAFETY: a row is sixteen words, and the feature is this function's own.
        unsafe {
            let mut rows = words.map(|row| _mm512_loadu_si512(row.as_ptr().cast()));
            transpose(&mut rows);
            words
                .iter_mut()
                .zip(rows)
                .for_each(|(out, row)| _mm512_storeu_si512(out.as_mut_ptr().cast(), row));
        }
        words
    }

    #[test]
    fn rows_become_columns() {
        if !Simd::Avx512.is_available() {
            return;
        }
        let words = std::array::from_fn(|i| std::array::from_fn(|j| (16 * i + j) as u32));
        // SAFETY: the level was asked for.
        let found = unsafe { transposed(words) };
        (0..16).for_each(|i| (0..16).for_each(|j| assert_eq!(found[i][j], words[j][i])));
    }

    #[test]
    fn powers_of_two_are_within_what_is_said() {
        if !Simd::Avx512.is_available() {
            return;
        }
        #[target_feature(enable = "avx512f")]
        unsafe fn at(x: f32) -> f32 {
            _mm512_cvtss_f32(exp2(_mm512_set1_ps(x)))
        }
        // SAFETY: the level was asked for.
        let at = |x: f32| unsafe { at(x) };
        for i in 0..100_000 {
            let x = -120.0 * (i as f32 / 100_000.0);
            let exact = f64::from(x).exp2();
            assert!((f64::from(at(x)) - exact).abs() < 8e-6 * exact, "{x}: {}", at(x));
        }
        assert_eq!([0.0, -126.5, -1e30, f32::NEG_INFINITY].map(at), [1.0, 0.0, 0.0, 0.0]);
        assert!(at(f32::NAN).is_nan());
    }
}
