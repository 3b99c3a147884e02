//! `attention` at the end of the longest context: a row alone, whose context a GPU splits, and the last chunk of a prompt.
//!
//! Of two query heads the first must see every page to be right: in each page one key counts, all of these as much as any other,
//! and each page's value is a one in one dimension, in turn. So a dimension's answer is its share of all pages, exactly in any number
//! type, and a page more or less is seen in every type. The second head weighs all keys.
//!
//! A few pages of the cache stand for all of the context's, over and over: a row may read a page as often as its table says.

use std::cell::RefCell;
use std::collections::HashMap;

use kernels::{AttentionSlice, KvDtype, PAGE_TOKENS};

use crate::battery::attention::{attend, scattered_pages};
use crate::battery::device::{Check, Device, Readable, every_device, unit};
use crate::battery::exact::{Bounded, assert_within};
use crate::battery::random::Random;

/// What Nemotron's models are trained for.
const CONTEXT: usize = 131_072;
const NUM_PAGES: usize = CONTEXT / PAGE_TOKENS;
const HEAD_DIM: usize = 16;
/// Pages that are not alike, one for each dimension.
const KINDS: usize = HEAD_DIM;
const HEADS: usize = 2;
/// Rows of a prompt's last chunk.
const CHUNK: usize = 5;

/// Whether a key is the one of its page that counts; in the last page it lies before the chunk.
fn counts(position: usize) -> bool {
    position % PAGE_TOKENS == position / PAGE_TOKENS % KINDS * 37 % PAGE_TOKENS
}

/// Exact in every number type.
fn key(position: usize) -> f32 {
    if counts(position) { 4.0 } else { -4.0 }
}

fn value(position: usize, dim: usize) -> f32 {
    if counts(position) {
        return if position / PAGE_TOKENS % KINDS == dim { 1.0 } else { 0.0 };
    }
    ((position % (KINDS * PAGE_TOKENS) * 3 + dim * 5) % 7) as f32 / 4.0 - 0.75
}

/// Scores of the first head are 512 apart, so that weights are ones and zeros; those of the second one about 3.
fn query(head: usize, dim: usize) -> f32 {
    if head == 0 { 16.0 } else { [0.0, 0.0625, 0.125, 0.1875][dim % 4] }
}

#[derive(Default)]
pub(crate) struct LongContext {
    /// The second head's answers by the number of keys, the slowest part: they depend on the cache's type alone.
    known: RefCell<HashMap<(KvDtype, usize), Vec<Bounded>>>,
}

impl LongContext {
    fn expected(&self, kv: KvDtype, num_keys: usize) -> Vec<Bounded> {
        let mut known = self.known.borrow_mut();
        let of_all = known.entry((kv, num_keys)).or_insert_with(|| {
            let query: Vec<f32> = (0..HEAD_DIM).map(|dim| query(1, dim)).collect();
            let keys: Vec<Vec<f32>> = (0..num_keys).map(|position| vec![key(position); HEAD_DIM]).collect();
            let values: Vec<Vec<f32>> = (0..num_keys)
                .map(|position| (0..HEAD_DIM).map(|dim| value(position, dim)).collect())
                .collect();
            attend(&query, &keys, &values, kv)
        });
        let share = 1.0 / HEAD_DIM as f64;
        let of_pages = std::iter::repeat_n(Bounded { value: share, error: 0.0 }, HEAD_DIM);
        of_pages.chain(of_all.iter().copied()).collect()
    }
}

impl Check for LongContext {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let backend = &device.backend;
        let mut cache = backend.kv_cache(NUM_PAGES, 1, HEAD_DIM).unwrap();
        let kinds = scattered_pages(&mut Random::new(15), KINDS * PAGE_TOKENS, NUM_PAGES);
        let slice = |num_rows: usize, end: usize| {
            let pages = kinds.iter().copied().cycle().take(end / PAGE_TOKENS).collect();
            [AttentionSlice { first_row: 0, num_rows, first_position: end - num_rows, pages }]
        };
        let num_entries = KINDS * PAGE_TOKENS;
        let entries = |entry: &dyn Fn(usize, usize) -> f32| {
            let values: Vec<f32> =
                (0..num_entries * HEAD_DIM).map(|i| entry(i / HEAD_DIM, i % HEAD_DIM)).collect();
            device.array(&values, HEAD_DIM)
        };
        let (k, v) = (entries(&|position, _| key(position)), entries(&value));
        backend.kv_append(&mut cache, &k, &v, &slice(num_entries, num_entries)).unwrap();
        let row: Vec<f32> = (0..HEADS * HEAD_DIM).map(|i| query(i / HEAD_DIM, i % HEAD_DIM)).collect();
        let mut out = backend.operand();
        for num_rows in [1, CHUNK] {
            let q = device.array(&row.repeat(num_rows), HEADS * HEAD_DIM);
            backend.attention(&q, &cache, &slice(num_rows, CONTEXT), &mut out).unwrap();
            let exact =
                (CONTEXT - num_rows + 1..=CONTEXT).flat_map(|num_keys| self.expected(device.kv, num_keys));
            let stored: Vec<Bounded> = exact
                .map(|bounded| match bounded.error {
                    0.0 => bounded, // A power of two.
                    _ => bounded.stored(unit(device.weights.operands())),
                })
                .collect();
            assert_within(&format!("{} {num_rows} rows at the end", device.name()), &B::read(&out), &stored);
        }
    }
}

#[test]
fn the_longest_context_is_seen_from_its_end() {
    every_device(&LongContext::default());
}
