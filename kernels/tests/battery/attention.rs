//! `kv_append` and `attention` against a plain softmax in f64.

use std::cell::RefCell;
use std::collections::HashMap;

use kernels::{AttentionSlice, Dtype, KvDtype, PAGE_TOKENS};

use crate::battery::device::{
    Check, Device, F32_UNIT, Readable, all_rounded, cached, every_device, kv_unit, unit,
};
use crate::battery::exact::{Bounded, assert_within, dot};
use crate::battery::random::Random;

/// Queries, keys and values of a sequence.
pub(crate) struct Sequence {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) q: Vec<f32>,
    pub(crate) k: Vec<f32>,
    pub(crate) v: Vec<f32>,
}

impl Sequence {
    pub(crate) fn new(random: &mut Random, len: usize, shape: [usize; 3]) -> Sequence {
        let [heads, kv_heads, head_dim] = shape;
        // Scores with a spread of a few units, as models have them: some keys count much more than others.
        let q = random.values(len * heads * head_dim).iter().map(|q| q * 6.0).collect();
        let k = random.values(len * kv_heads * head_dim);
        let v = random.values(len * kv_heads * head_dim);
        Sequence { heads, kv_heads, head_dim, q, k, v }
    }

    pub(crate) fn q_cols(&self) -> usize {
        self.heads * self.head_dim
    }

    pub(crate) fn kv_cols(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    pub(crate) fn len(&self) -> usize {
        self.q.len() / self.q_cols()
    }
}

/// Pages for `len` positions, scattered over a cache.
pub(crate) fn scattered_pages(random: &mut Random, len: usize, num_pages: usize) -> Vec<u32> {
    let mut free: Vec<u32> = (0..num_pages as u32).collect();
    (0..len.div_ceil(PAGE_TOKENS)).map(|_| free.swap_remove(random.below(free.len()))).collect()
}

/// `[heads, kv_heads, head_dim]`: groups of 1 to 16, heads narrower than a register, of no whole number of
/// registers, and wide.
const SHAPES: [[usize; 3]; 14] = [
    [1, 1, 2],
    [3, 3, 8],
    [2, 1, 16],
    [9, 3, 64],
    [4, 1, 24],
    [10, 2, 40],
    [6, 1, 80],
    [14, 2, 64],
    [8, 1, 128],
    [2, 2, 96],
    [12, 1, 34],
    [15, 1, 64],
    [16, 1, 18],
    [2, 1, 256],
];

/// Lengths that end inside the first page, at its end, and in later pages.
const LENGTHS: [usize; 6] = [1, 15, 64, 65, 130, 200];

/// The cache's type, the shape and the length.
type Case = (KvDtype, [usize; 3], usize);

/// What is exact depends on the cache's type alone, and is the slowest part: it is kept for the next device.
#[derive(Default)]
pub(crate) struct Attention {
    known: RefCell<HashMap<Case, Vec<Bounded>>>,
}

impl Check for Attention {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let mut random = Random::new(10);
        let backend = &device.backend;
        let mut out = backend.operand();
        for shape in SHAPES {
            for len in LENGTHS {
                let sequence = Sequence::new(&mut random, len, shape);
                let mut cache = backend.kv_cache(6, sequence.kv_heads, sequence.head_dim).unwrap();
                let pages = scattered_pages(&mut random, len, 6);
                let slices = [AttentionSlice { first_row: 0, num_rows: len, first_position: 0, pages }];
                let k = device.array(&sequence.k, sequence.kv_cols());
                let v = device.array(&sequence.v, sequence.kv_cols());
                backend.kv_append(&mut cache, &k, &v, &slices).unwrap();
                let q = device.array(&sequence.q, sequence.q_cols());
                backend.attention(&q, &cache, &slices, &mut out).unwrap();
                let mut known = self.known.borrow_mut();
                let expected =
                    known.entry((device.kv, shape, len)).or_insert_with(|| exact(&sequence, device.kv));
                let expected: Vec<Bounded> =
                    expected.iter().map(|bounded| bounded.stored(unit(device.weights.operands()))).collect();
                assert_within(&format!("{} {shape:?} of {len}", device.name()), &B::read(&out), &expected);
            }
        }
    }
}

fn exact(sequence: &Sequence, kv: KvDtype) -> Vec<Bounded> {
    let q = all_rounded(kv.multiplied(), &sequence.q);
    let [k, v] = [&sequence.k, &sequence.v].map(|values| cached(kv, values, sequence.head_dim));
    let (head_dim, group) = (sequence.head_dim, sequence.heads / sequence.kv_heads);
    let mut out = Vec::new();
    for position in 0..sequence.len() {
        for head in 0..sequence.heads {
            let query = &q[(position * sequence.heads + head) * head_dim..][..head_dim];
            let entry = |values, key: usize| {
                let values: &Vec<f32> = values;
                values[(key * sequence.kv_heads + head / group) * head_dim..][..head_dim].to_vec()
            };
            let keys: Vec<Vec<f32>> = (0..=position).map(|key| entry(&k, key)).collect();
            let values: Vec<Vec<f32>> = (0..=position).map(|key| entry(&v, key)).collect();
            out.extend(attend(query, &keys, &values, kv));
        }
    }
    out
}

/// With s the error of a score, a weight `exp(score - max)` is off by `2 s` and the 4 units of a difference and
/// an exponential, and by a unit of its type where it is rounded to bf16; numerator and denominator are
/// sums of n weights, which add 2 n units each. Rescaling to a new maximum adds 4 units for each page.
pub(crate) fn attend(query: &[f32], keys: &[Vec<f32>], values: &[Vec<f32>], kv: KvDtype) -> Vec<Bounded> {
    let scale = 1.0 / (query.len() as f64).sqrt();
    let scores: Vec<Bounded> = keys.iter().map(|key| dot(query, key)).collect();
    let score_error = scores.iter().map(|score| score.error + 4.0 * F32_UNIT * score.value.abs());
    let score_error = score_error.fold(0.0, f64::max) * scale;
    let max = scores.iter().map(|score| score.value * scale).fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score.value * scale - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let n = keys.len() as f64;
    let pages = (n / PAGE_TOKENS as f64).ceil();
    let weight_unit = if kv.multiplied() == Dtype::Bf16 { unit(Dtype::Bf16) } else { 0.0 };
    let relative = 2.0 * (2.0 * score_error + weight_unit + (4.0 + 2.0 * n + 4.0 * pages) * F32_UNIT);
    (0..query.len())
        .map(|d| {
            let terms = weights.iter().zip(values).map(|(weight, value)| weight * f64::from(value[d]) / sum);
            let (value, size) =
                terms.fold((0.0, 0.0), |(value, size), term| (value + term, size + term.abs()));
            Bounded { value, error: relative * size }
        })
        .collect()
}

#[test]
fn attention_is_the_softmax_mean_of_the_values() {
    every_device(&Attention::default());
}

/// Few keys that are all the same, huge scores, scores that are all far below zero, numbers of any size, denormal ones too.
pub(crate) struct Extremes;

impl Check for Extremes {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let backend = &device.backend;
        let (len, head_dim) = (70, 16);
        let slices = [AttentionSlice { first_row: 0, num_rows: len, first_position: 0, pages: vec![1, 0] }];
        for (query, key, value) in [
            (0.0, 1.0, 3.0),
            (1e4, 1e4, -2.0),
            (-1e4, 1e4, 1e30),
            (1e-30, 1e-30, 1e-30),
            (1e-40, 1e-40, 3.0),
            (1e4, -1e-40, -1e30),
            (-1e-40, 1e4, 1e-40),
            (1e-40, 1e-40, -1e-40),
        ] {
            let mut cache = backend.kv_cache(2, 1, head_dim).unwrap();
            let (q, k) = (device.array(&vec![query; len * 16], 16), device.array(&vec![key; len * 16], 16));
            let v = device.array(&vec![value; len * 16], 16);
            backend.kv_append(&mut cache, &k, &v, &slices).unwrap();
            let mut out = backend.operand();
            backend.attention(&q, &cache, &slices, &mut out).unwrap();
            // The mean of equal values, however they are weighed; denormal ones may be flushed.
            let relative = kv_unit(device.kv)
                + unit(device.kv.multiplied())
                + unit(device.weights.operands())
                + 300.0 * F32_UNIT;
            let bound = f64::from(value).abs() * relative + f64::from(f32::MIN_POSITIVE);
            for found in B::read(&out) {
                let error = (f64::from(found) - f64::from(value)).abs();
                assert!(error <= bound, "{} {query} {key}: {found} for {value}", device.name());
            }
        }
    }
}

#[test]
fn equal_values_come_out_whatever_the_scores_are() {
    every_device(&Extremes);
}
