//! Largest entry and log-sum-exp of rows of logits.
//!
//! A row is cut into segments of a fixed length, each with its own largest entry and sum, so that one row
//! of a large vocabulary is work for all threads; segments are joined in order, so that how many threads
//! there are does not show.

use std::cell::RefCell;

use crate::array::Array;
use crate::backend::LogitStats;
use crate::check;
use crate::cpu::exp::exp_f32;
use crate::cpu::lanes::{Kernel, Lanes, at_level};
use crate::cpu::pool::ThreadPool;
use crate::cpu::simd::Simd;
use crate::error::Result;

/// Logits of a segment: 16 KiB, read twice and the second time from L1. A vocabulary of 49152 has 12 of them.
const SEGMENT: usize = 4096;

/// What is known of a segment.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Segment {
    max: f32,
    /// `Σ exp(logit - max)`
    sum: f32,
    has_nan: bool,
}

const UNKNOWN: Segment = Segment { max: f32::NEG_INFINITY, sum: 0.0, has_nan: false };

thread_local! {
    /// The caller's list of segments, kept for the next call.
    static SEGMENTS: RefCell<Vec<Segment>> = const { RefCell::new(Vec::new()) };
}

/// Largest entry and log-sum-exp of every row; `out` is cleared first.
pub(crate) fn logit_stats(
    simd: Simd,
    pool: &ThreadPool,
    logits: &Array,
    out: &mut Vec<LogitStats>,
) -> Result<()> {
    check::logits(logits.cols())?;
    let per_row = logits.cols().div_ceil(SEGMENT);
    SEGMENTS.with_borrow_mut(|segments| {
        segments.clear();
        segments.resize(logits.rows() * per_row, UNKNOWN);
        let known = Segments(segments.as_mut_ptr());
        pool.for_each(segments.len(), |task| {
            let row = logits.row(task / per_row);
            let first = task % per_row * SEGMENT;
            let segment = &row[first..row.len().min(first + SEGMENT)];
            // SAFETY: the device has its level.
            let stats = unsafe { at_level(simd, Survey { segment }) };
            // SAFETY: the task is below the list's length, and its entry is its own.
            unsafe { known.entry(task).write(stats) };
        });
        out.clear();
        let rows = segments.chunks_exact(per_row).enumerate();
        out.extend(rows.map(|(t, segments)| join(logits.row(t), segments)));
    });
    Ok(())
}

/// The list, for the threads that fill it.
struct Segments(*mut Segment);

// SAFETY: tasks write disjoint entries of a list that the caller holds.
unsafe impl Sync for Segments {}

impl Segments {
    fn entry(&self, index: usize) -> *mut Segment {
        self.0.wrapping_add(index)
    }
}

/// Joins a row's segments, in order.
fn join(row: &[f32], segments: &[Segment]) -> LogitStats {
    if segments.iter().any(|segment| segment.has_nan) {
        let argmax = row.iter().position(|logit| logit.is_nan());
        return LogitStats { argmax: argmax.unwrap_or(0) as u32, max: f32::NAN, log_sum_exp: f32::NAN };
    }
    let max = segments.iter().fold(f32::NEG_INFINITY, |max, segment| max.max(segment.max));
    // The first segment that holds the maximum holds its lowest index.
    let first = segments.iter().position(|segment| segment.max == max).unwrap_or(0) * SEGMENT;
    let argmax = first + row[first..].iter().position(|&logit| logit == max).unwrap_or(0);
    let sum: f32 = segments.iter().map(|segment| segment.sum * exp_f32(segment.max - max)).sum();
    LogitStats { argmax: argmax as u32, max, log_sum_exp: sum.ln() }
}

struct Survey<'a> {
    segment: &'a [f32],
}

impl Kernel for Survey<'_> {
    type Output = Segment;

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) -> Segment {
        const CHAINS: usize = 4;
        let (at, len) = (self.segment.as_ptr(), self.segment.len());
        let step = CHAINS * L::LANES;
        // SAFETY: the features are the caller's to vouch for; loads end at the segment's end.
        unsafe {
            let lowest = L::splat(f32::NEG_INFINITY);
            // NaNs are passed over here.
            let mut largest = [lowest; CHAINS];
            let mut i = 0;
            while i + step <= len {
                for (chain, largest) in largest.iter_mut().enumerate() {
                    *largest = L::load(at.add(i + chain * L::LANES)).max(*largest);
                }
                i += step;
            }
            while i < len {
                let n = (len - i).min(L::LANES);
                largest[0] = L::load_first(at.add(i), n).first_or(n, lowest).max(largest[0]);
                i += L::LANES;
            }
            let max = largest[0].max(largest[1]).max(largest[2].max(largest[3])).largest();
            // A segment of -inf alone adds nothing, rather than -inf less -inf.
            let shift = L::splat(if max == f32::NEG_INFINITY { 0.0 } else { max });
            let mut sums = [L::splat(0.0); CHAINS];
            let mut i = 0;
            while i + step <= len {
                for (chain, sum) in sums.iter_mut().enumerate() {
                    *sum = sum.add(L::load(at.add(i + chain * L::LANES)).sub(shift).exp());
                }
                i += step;
            }
            while i < len {
                let n = (len - i).min(L::LANES);
                let x = L::load_first(at.add(i), n).first_or(n, lowest);
                sums[0] = sums[0].add(x.sub(shift).exp());
                i += L::LANES;
            }
            let sum = sums[0].add(sums[1]).add(sums[2].add(sums[3])).sum();
            // A NaN among the logits shows in the sum, and so does an infinity.
            let has_nan = sum.is_nan() && self.segment.iter().any(|logit| logit.is_nan());
            Segment { max, sum, has_nan }
        }
    }
}
