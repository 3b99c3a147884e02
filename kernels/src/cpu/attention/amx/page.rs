//! One block of queries against one page of keys and values: scores, their weights, and the values they weigh.

use std::arch::x86_64::*;

use super::ahead::{Ahead, SCORES, UPRIGHT, VALUES, WEIGHTS};
use super::registers::{Scores, Values, scores, values};
use super::vectors::{exp2, transpose};
use super::{Attend, BLOCK, PAGE_STEPS, STEP, Scratch};
use crate::backend::PAGE_TOKENS;

/// One block against one page.
pub(super) struct Page<'a> {
    job: &'a Attend<'a>,
    scratch: &'a Scratch,
    block: usize,
    /// Columns of the block that are somebody's.
    columns: usize,
    /// Of the first head; others follow.
    keys: *const u32,
    values: *const u32,
    /// Keys of the page that each column sees, and the fewest and the most.
    seen: __m512i,
    fewest_seen: usize,
    pub(super) most_seen: usize,
}

// SAFETY (of all blocks in these functions): the caller of `attend` vouches for the level; pointers stay inside of the
// scratch and of the page's heads.
#[allow(clippy::undocumented_unsafe_blocks, reason = "one sentence above holds for all of them")]
impl<'a> Page<'a> {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) unsafe fn new(
        job: &'a Attend<'a>,
        scratch: &'a Scratch,
        (page_idx, keys): (usize, *const u32),
        block: usize,
        columns: usize,
    ) -> Self {
        let columns = BLOCK.min(columns - block * BLOCK);
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
                keys,
                values: keys.wrapping_add(job.cache.key_words()),
                seen,
                fewest_seen: _mm512_mask_reduce_min_epi32(mask, seen) as usize,
                most_seen: _mm512_mask_reduce_max_epi32(mask, seen) as usize,
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) unsafe fn attend(&self, ahead: &mut Ahead) {
        let Page { job, scratch, .. } = self;
        unsafe {
            for first in (0..self.most_seen).step_by(STEP) {
                let share = SCORES / self.most_seen.div_ceil(STEP);
                let hints = ahead.during(share, job.num_heads * scratch.steps);
                scores(&mut Scores {
                    keys: self.keys.add(first * job.cache.key_stride()),
                    key_bytes: job.cache.key_stride() * 4,
                    head_bytes: job.cache.head_words() * 4,
                    heads: job.num_heads,
                    queries: scratch.queries.add(self.part() * scratch.steps * BLOCK * BLOCK),
                    steps: scratch.steps,
                    out: scratch.scores.add(first * BLOCK),
                    hints,
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
            let eighths = self.most_seen.next_multiple_of(STEP) / 8;
            let mut hints = ahead.during(WEIGHTS, 4 * eighths);
            for _ in 0..eighths {
                for pair in 0..4 {
                    hints.fetch();
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
            // Four at a time: one waits for the one before it.
            let mut largest = [max; 4];
            for first in (0..self.fewest_seen / 4 * 4).step_by(4) {
                for (i, largest) in largest.iter_mut().enumerate() {
                    *largest = _mm512_max_ps(_mm512_load_ps(scores.add((first + i) * BLOCK)), *largest);
                }
            }
            for key in self.fewest_seen / 4 * 4..self.most_seen {
                let score = _mm512_load_ps(scores.add(key * BLOCK));
                let score = _mm512_mask_blend_ps(self.sees(key), hidden, score);
                _mm512_store_ps(scores.add(key * BLOCK), score);
                largest[0] = _mm512_max_ps(score, largest[0]);
            }
            for key in self.most_seen..self.most_seen.next_multiple_of(STEP) {
                _mm512_store_ps(scores.add(key * BLOCK), hidden);
            }
            _mm512_max_ps(_mm512_max_ps(largest[0], largest[1]), _mm512_max_ps(largest[2], largest[3]))
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
        let steps = self.most_seen.div_ceil(STEP);
        let mut hints = ahead.during(UPRIGHT, steps);
        for step in 0..steps {
            hints.fetch();
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
            let registers = (stride - first).div_ceil(BLOCK).min(4);
            let share = VALUES / stride.div_ceil(4 * BLOCK);
            let hints = ahead.during(share, (factors.len() / 2).max(1));
            let sums = sums.wrapping_add(first);
            let product = Values { factors, offset: first * 4, stride: stride * 4, sums, hints };
            unsafe { values(registers, &product) };
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
