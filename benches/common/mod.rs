//! What benches share: random numbers, times that can be trusted, medians with where they lie, and words of their command lines.

#![allow(dead_code, reason = "each bench takes what it needs")]

pub(crate) mod interval;

use std::time::Instant;

use anyhow::{Context, Result};
use kernels::Simd;

const SAMPLES: usize = 15;
/// Long enough for the clock, which counts in tens of nanoseconds.
const SAMPLE_SECONDS: f64 = 1e-3;

/// Seconds of a call.
pub(crate) struct Time {
    pub(crate) median: f64,
    pub(crate) best: f64,
}

/// Times a call in 15 samples of at least a millisecond, after one that is not counted; `expected` is its time in
/// seconds, about.
pub(crate) fn time(expected: f64, mut call: impl FnMut() -> Result<()>) -> Result<Time> {
    let calls = ((SAMPLE_SECONDS / expected) as usize).clamp(1, 1000);
    let mut seconds = Vec::with_capacity(SAMPLES + 1);
    for _ in 0..=SAMPLES {
        let start = Instant::now();
        (0..calls).try_for_each(|_| call())?;
        seconds.push(start.elapsed().as_secs_f64() / calls as f64);
    }
    seconds.remove(0); // To warm up.
    seconds.sort_by(f64::total_cmp);
    Ok(Time { median: seconds[SAMPLES / 2], best: seconds[0] })
}

/// The value in the middle, or the mean of the two there.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (low, high) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
    (low + high) / 2.0
}

/// Numbers in -1..1: Knuth's linear congruential generator, the same on every machine.
pub(crate) fn random(len: usize, seed: u64) -> impl Iterator<Item = f32> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed + 1);
    (0..len).map(move |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    })
}

/// The value that follows a key of the command line.
pub(crate) fn value_of(key: &str, args: &mut impl Iterator<Item = String>) -> Result<String> {
    args.next().with_context(|| format!("{key} needs a value"))
}

/// A SIMD level by its name.
pub(crate) fn simd(name: &str) -> Result<Simd> {
    Simd::ALL.into_iter().find(|simd| simd.name() == name).with_context(|| format!("unknown level {name}"))
}

/// Whole numbers with commas between them.
pub(crate) fn numbers(list: &str) -> Result<Vec<usize>> {
    Ok(list.split(',').map(str::parse).collect::<Result<_, _>>()?)
}
