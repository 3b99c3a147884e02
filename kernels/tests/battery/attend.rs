//! Operations that stand for several others have their bits: `attend`, `matmul_each` and `matmul_in_pieces`.

use std::ops::Range;

use kernels::{AttentionSlice, PAGE_TOKENS, Result, RopeTable};

use crate::battery::device::{Check, Device, Readable, bits, every_device, every_weight_device};
use crate::battery::random::Random;

/// `[heads, kv_heads, head_dim]`: groups of 1 and 3, one head and several, and a width of no whole registers.
const SHAPES: [[usize; 3]; 4] = [[9, 3, 64], [4, 4, 16], [6, 1, 24], [2, 2, 6]];

/// Rows of each slice of a micro-batch, and the position of its first row.
const BATCHES: [&[(usize, usize)]; 4] = [
    &[(1, 0), (1, 63), (1, 64), (1, 190), (1, 5)],
    &[(1, 70), (60, 40), (1, 127), (0, 3), (2, 62), (1, 1)],
    &[(130, 0)],
    &[(1, 100)],
];

/// Pages of a sequence of a batch.
const PAGES_EACH: usize = 4;

pub(crate) struct Attend;

impl Check for Attend {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let mut random = Random::new(21);
        let steps = BATCHES.map(own_pages).into_iter().chain([shared_pages()]);
        let cases = SHAPES.into_iter().flat_map(|shape| steps.clone().map(move |steps| (shape, steps)));
        for (shape, steps) in cases {
            let found = attended(device, &mut random.clone(), shape, &steps, true);
            let expected = attended(device, &mut random, shape, &steps, false);
            assert!(found == expected, "{} {shape:?} {:?}", device.name(), steps[1]);
        }
    }
}

/// The slices of what is there before a batch, of the batch, and of a row that follows each slice: every sequence has pages of its
/// own.
fn own_pages(batch: &[(usize, usize)]) -> [Vec<AttentionSlice>; 3] {
    let pages = |i: usize| (i * PAGES_EACH..(i + 1) * PAGES_EACH).rev().map(|page| page as u32).collect();
    let slices = |rows: &dyn Fn((usize, usize)) -> (usize, usize)| {
        follow(batch.iter().enumerate().map(|(i, &slice)| (rows(slice), pages(i))))
    };
    [slices(&|(_, first)| (first, 0)), slices(&|slice| slice), slices(&|(rows, first)| (1, first + rows))]
}

/// The same of rows that write to a page which others write to and read, each to a place of its own; and of one that reads all.
fn shared_pages() -> [Vec<AttentionSlice>; 3] {
    let slices = |slices: &[(usize, usize)]| follow(slices.iter().map(|&slice| (slice, vec![1, 0])));
    [slices(&[(80, 0)]), slices(&[(1, 6), (1, 70), (1, 7), (2, 62), (1, 9), (1, 64)]), slices(&[(1, 80)])]
}

/// Slices one after the other, of so many rows from a position on.
fn follow(slices: impl Iterator<Item = ((usize, usize), Vec<u32>)>) -> Vec<AttentionSlice> {
    let mut next_row = 0;
    slices
        .map(|((num_rows, first_position), pages)| {
            let first_row = next_row;
            next_row += num_rows;
            AttentionSlice { first_row, num_rows, first_position, pages }
        })
        .collect()
}

/// What attention gives at every step.
fn attended<B: Readable>(
    device: &Device<B>,
    random: &mut Random,
    [heads, kv_heads, head_dim]: [usize; 3],
    steps: &[Vec<AttentionSlice>; 3],
    at_once: bool,
) -> Vec<u32> {
    let backend = &device.backend;
    let num_pages = steps[1].iter().flat_map(|slice| &slice.pages).max().map_or(0, |page| page + 1);
    let mut cache = backend.kv_cache(num_pages as usize, kv_heads, head_dim).unwrap();
    let angles = |random: &mut Random| random.values(PAGES_EACH * PAGE_TOKENS * head_dim / 2);
    let rope = RopeTable { head_dim, cos: angles(random), sin: angles(random) };
    let rope = backend.rope_table(rope).unwrap();
    let mut out = Vec::new();
    for (step, slices) in steps.iter().enumerate() {
        let positions: Vec<u32> = (slices.iter())
            .flat_map(|slice| (0..slice.num_rows).map(|i| (slice.first_position + i) as u32))
            .collect();
        let array =
            |random: &mut Random, cols: usize| device.array(&random.values(positions.len() * cols), cols);
        let (mut q, mut k) = (array(random, heads * head_dim), array(random, kv_heads * head_dim));
        let v = array(random, kv_heads * head_dim);
        let mut result = backend.operand();
        if at_once && step == 1 {
            let angles = (&rope, &positions[..]);
            backend.attend([&mut q, &mut k], &v, angles, &mut cache, slices, &mut result).unwrap();
        } else {
            backend.rope(&mut q, &rope, &positions).unwrap();
            backend.rope(&mut k, &rope, &positions).unwrap();
            backend.kv_append(&mut cache, &k, &v, slices).unwrap();
            backend.attention(&q, &cache, slices, &mut result).unwrap();
        }
        out.extend(bits(&B::read(&result)));
    }
    out
}

#[test]
fn attending_at_once_has_the_bits_of_its_parts() {
    every_device(&Attend);
}

pub(crate) struct MatmulEach;

impl Check for MatmulEach {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let backend = &device.backend;
        let mut random = Random::new(22);
        for (rows, [q, k, v], cols) in
            [(1, [65, 7, 64], 96), (70, [130, 66, 3], 257), (0, [5, 5, 5], 8), (300, [576, 192, 192], 64)]
        {
            let (x, _) = device.operand(&random.values(rows * cols), cols);
            let matrices = [q, k, v].map(|n| device.matrix(&random.values(n * cols), n, cols));
            let mut at_once = [(); 3].map(|()| backend.array());
            let [a, b, c] = &mut at_once;
            let [q, k, v] = &matrices;
            backend.matmul_each(&x, [q, k, v], [a, b, c]).unwrap();
            for (matrix, found) in matrices.iter().zip(&at_once) {
                let mut expected = backend.array();
                backend.matmul(&x, matrix, &mut expected).unwrap();
                let [found, expected] = [found, &expected].map(|array| bits(&device.values(array)));
                assert!(found == expected, "{} {rows} rows of {cols}", device.name());
            }
        }
    }
}

pub(crate) struct MatmulInPieces;

impl Check for MatmulInPieces {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let backend = &device.backend;
        let mut random = Random::new(23);
        let cut = |ends: &[usize]| {
            let starts = std::iter::once(0).chain(ends.iter().copied());
            starts.zip(ends).map(|(start, &end)| start..end).collect::<Vec<Range<usize>>>()
        };
        for (ends, outputs, inputs) in [
            (vec![1], 65, 96),
            (vec![16, 17, 70], 130, 257),
            (vec![0], 5, 8),
            (vec![128, 256, 300], 192, 64),
            (vec![3, 3, 9], 7, 1),
        ] {
            let (rows, pieces) = (*ends.last().unwrap(), cut(&ends));
            let what = format!("{}, {pieces:?} of [{inputs}, {outputs}]", device.name());
            let (x, _) = device.operand(&random.values(rows * inputs), inputs);
            let matrix = device.matrix(&random.values(outputs * inputs), outputs, inputs);
            let (mut expected, mut found, mut told) = (backend.array(), backend.array(), Vec::new());
            backend.matmul(&x, &matrix, &mut expected).unwrap();
            let expected = bits(&device.values(&expected));
            let told_of = |found: &B::Array, piece: Range<usize>| -> Result<()> {
                let numbers = piece.start * outputs..piece.end * outputs;
                assert!(
                    bits(&device.values(found))[numbers.clone()] == expected[numbers],
                    "{what}: {piece:?}"
                );
                told.push(piece);
                Ok(())
            };
            backend.matmul_in_pieces(&x, &matrix, &mut found, &pieces, told_of).unwrap();
            assert_eq!(told, pieces, "{what}");
            assert!(bits(&device.values(&found)) == expected, "{what}");
        }
    }
}

#[test]
fn products_in_pieces_have_the_bits_of_one() {
    every_weight_device(&MatmulInPieces);
}

#[test]
fn products_at_once_have_the_bits_of_each() {
    every_weight_device(&MatmulEach);
}
