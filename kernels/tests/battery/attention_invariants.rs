//! A row's attention depends on its sequence alone, to the bit: not on chunks, neighbours, pages or threads.

use kernels::{AttentionSlice, KvDtype, PAGE_TOKENS, WeightType};

use crate::battery::attention::{Sequence, scattered_pages};
use crate::battery::device::{Check, Device, Readable, bits, cpu, every_device, levels};
use crate::battery::random::Random;

const SHAPE: [usize; 3] = [6, 2, 24];
const LEN: usize = 215;
const NUM_PAGES: usize = 24;

/// A device with a cache in use: pages have had owners before, whose entries were not even numbers.
struct World<'a, B: Readable> {
    device: &'a Device<B>,
    cache: B::KvCache,
}

/// The part of a sequence that a batch carries.
struct Part<'a> {
    sequence: &'a Sequence,
    pages: &'a [u32],
    first: usize,
    count: usize,
}

impl<'a, B: Readable> World<'a, B> {
    fn new(device: &'a Device<B>) -> World<'a, B> {
        let [_, kv_heads, head_dim] = SHAPE;
        let mut cache = device.backend.kv_cache(NUM_PAGES, kv_heads, head_dim).unwrap();
        let rows = NUM_PAGES * PAGE_TOKENS;
        let poison = device.array(&vec![f32::NAN; rows * kv_heads * head_dim], kv_heads * head_dim);
        let pages = (0..NUM_PAGES as u32).collect();
        let slices = [AttentionSlice { first_row: 0, num_rows: rows, first_position: 0, pages }];
        device.backend.kv_append(&mut cache, &poison, &poison, &slices).unwrap();
        World { device, cache }
    }

    /// One batch through the cache; the output's bits, part by part.
    fn batch(&mut self, parts: &[Part<'_>]) -> Vec<Vec<u32>> {
        let (mut q, mut k, mut v, mut slices) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut first_row = 0;
        for part in parts {
            let rows =
                |values: &[f32], cols: usize| values[part.first * cols..][..part.count * cols].to_vec();
            q.extend(rows(&part.sequence.q, part.sequence.q_cols()));
            k.extend(rows(&part.sequence.k, part.sequence.kv_cols()));
            v.extend(rows(&part.sequence.v, part.sequence.kv_cols()));
            slices.push(AttentionSlice {
                first_row,
                num_rows: part.count,
                first_position: part.first,
                pages: part.pages.to_vec(),
            });
            first_row += part.count;
        }
        let (q_cols, kv_cols) = (parts[0].sequence.q_cols(), parts[0].sequence.kv_cols());
        let [q, k, v] =
            [(q, q_cols), (k, kv_cols), (v, kv_cols)].map(|(x, cols)| self.device.array(&x, cols));
        let mut out = self.device.backend.operand();
        self.device.backend.kv_append(&mut self.cache, &k, &v, &slices).unwrap();
        self.device.backend.attention(&q, &self.cache, &slices, &mut out).unwrap();
        let out = bits(&B::read(&out));
        let rows =
            |slice: &AttentionSlice| out[slice.first_row * q_cols..][..slice.num_rows * q_cols].to_vec();
        slices.iter().map(rows).collect()
    }

    /// A whole sequence, alone, in chunks.
    fn in_chunks(&mut self, sequence: &Sequence, pages: &[u32], chunk: usize) -> Vec<u32> {
        let firsts = (0..sequence.len()).step_by(chunk);
        firsts
            .flat_map(|first| {
                let count = chunk.min(sequence.len() - first);
                self.batch(&[Part { sequence, pages, first, count }]).remove(0)
            })
            .collect()
    }
}

fn at_once<B: Readable>(device: &Device<B>, sequence: &Sequence) -> Vec<u32> {
    let out = World::new(device).in_chunks(sequence, &[3, 1, 7, 2], LEN);
    assert!(
        out.iter().all(|&bits| f32::from_bits(bits).is_finite()),
        "{}: a page's past leaked",
        device.name()
    );
    out
}

pub(crate) struct Chunks;

impl Check for Chunks {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let mut random = Random::new(11);
        let sequence = Sequence::new(&mut random, LEN, SHAPE);
        let expected = at_once(device, &sequence);
        for chunk in [1, 2, 7, 64, 100] {
            let pages = scattered_pages(&mut random, LEN, NUM_PAGES);
            let found = World::new(device).in_chunks(&sequence, &pages, chunk);
            assert!(found == expected, "{} in chunks of {chunk}", device.name());
        }
    }
}

#[test]
fn a_prompt_in_chunks_on_other_pages_gives_the_same_bits() {
    every_device(&Chunks);
}

/// Sequences that advance by random steps, in batches of random company and order.
pub(crate) struct Company;

impl Check for Company {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let mut random = Random::new(12);
        let sequences: Vec<Sequence> =
            [LEN, 1, 64, 130, 77].iter().map(|&len| Sequence::new(&mut random, len, SHAPE)).collect();
        let mut pages = scattered_pages(&mut random, NUM_PAGES * PAGE_TOKENS, NUM_PAGES).into_iter();
        let pages: Vec<Vec<u32>> = sequences
            .iter()
            .map(|sequence| pages.by_ref().take(sequence.len().div_ceil(PAGE_TOKENS)).collect())
            .collect();
        let mut world = World::new(device);
        let mut found = vec![Vec::new(); sequences.len()];
        let mut done = vec![0; sequences.len()];
        while done.iter().zip(&sequences).any(|(&done, sequence)| done < sequence.len()) {
            let mut order: Vec<usize> =
                (0..sequences.len()).filter(|&i| done[i] < sequences[i].len()).collect();
            (1..order.len()).for_each(|i| order.swap(i, random.below(i + 1)));
            order.truncate(1 + random.below(order.len()));
            let parts: Vec<Part<'_>> = order
                .iter()
                .map(|&i| {
                    let left = sequences[i].len() - done[i];
                    let count = left.min(if random.below(2) == 0 { 1 } else { 1 + random.below(40) });
                    Part { sequence: &sequences[i], pages: &pages[i], first: done[i], count }
                })
                .collect();
            for ((&i, part), bits) in order.iter().zip(&parts).zip(world.batch(&parts)) {
                found[i].extend(bits);
                done[i] += part.count;
            }
        }
        for (sequence, found) in sequences.iter().zip(found) {
            let expected = World::new(device).in_chunks(sequence, &[5, 0, 9, 2], LEN);
            assert!(found == expected, "{}: sequence of {}", device.name(), sequence.len());
        }
    }
}

#[test]
fn sequences_in_any_company_give_the_same_bits() {
    every_device(&Company);
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let mut random = Random::new(13);
    let sequence = Sequence::new(&mut random, LEN, SHAPE);
    for simd in levels() {
        for kv in KvDtype::ALL {
            let of_threads = |threads| {
                let device = Device::new(cpu(simd, threads, WeightType::F32, kv), WeightType::F32, kv);
                at_once(&device, &sequence)
            };
            let one = of_threads(1);
            for threads in [2, 3] {
                assert!(of_threads(threads) == one, "{} kv {kv:?} with {threads} threads", simd.name());
            }
        }
    }
}

/// A value that is not a number counts from its own position on, and for no row before it, although they
/// share a page and every second one a word.
pub(crate) struct Poison;

impl Check for Poison {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let mut random = Random::new(14);
        for poisoned in [0, 1, 2, 37, 63, 64, 65] {
            let clean = Sequence::new(&mut random, 80, SHAPE);
            let cols = clean.kv_cols();
            let expected = World::new(device).in_chunks(&clean, &[4, 5], 80);
            for key in [false, true] {
                let [mut k, mut v] = [clean.k.clone(), clean.v.clone()];
                let target = if key { &mut k } else { &mut v };
                target[poisoned * cols..][..cols].fill(if key { f32::NAN } else { f32::INFINITY });
                let dirty = Sequence { q: clean.q.clone(), k, v, ..clean };
                let found = World::new(device).in_chunks(&dirty, &[4, 5], 80);
                let border = poisoned * clean.q_cols();
                assert!(found[..border] == expected[..border], "{} before {poisoned}", device.name());
                let after = found[border..].iter().all(|&bits| !f32::from_bits(bits).is_finite());
                assert!(after, "{} from {poisoned} on", device.name());
            }
        }
    }
}

#[test]
fn what_a_row_does_not_see_counts_for_nothing() {
    every_device(&Poison);
}
