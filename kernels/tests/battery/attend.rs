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

pub(crate) struct Attend;

impl Check for Attend {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let mut random = Random::new(21);
        for shape in SHAPES {
            for batch in BATCHES {
                let found = attended(device, &mut random.clone(), shape, batch, true);
                let expected = attended(device, &mut random, shape, batch, false);
                assert!(found == expected, "{} {shape:?} {batch:?}", device.name());
            }
        }
    }
}

/// What attention gives, and then what it gives to a row that follows each slice, which reads what was written.
fn attended<B: Readable>(
    device: &Device<B>,
    random: &mut Random,
    [heads, kv_heads, head_dim]: [usize; 3],
    batch: &[(usize, usize)],
    at_once: bool,
) -> Vec<u32> {
    let backend = &device.backend;
    let pages_each = 4;
    let mut cache = backend.kv_cache(pages_each * batch.len(), kv_heads, head_dim).unwrap();
    let angles = |random: &mut Random| random.values(pages_each * PAGE_TOKENS * head_dim / 2);
    let rope = RopeTable { head_dim, cos: angles(random), sin: angles(random) };
    let rope = backend.rope_table(rope).unwrap();
    let next: Vec<(usize, usize)> = batch.iter().map(|(rows, first)| (1, first + rows)).collect();
    let before: Vec<(usize, usize)> = batch.iter().map(|&(_, first)| (first, 0)).collect();
    let mut out = Vec::new();
    for (step, slices) in [&before[..], batch, &next].into_iter().enumerate() {
        let mut first_row = 0;
        let slices: Vec<AttentionSlice> = (slices.iter().enumerate())
            .map(|(i, &(num_rows, first_position))| {
                let first_page = (i * pages_each) as u32;
                let pages = (first_page..first_page + pages_each as u32).rev().collect();
                first_row += num_rows;
                AttentionSlice { first_row: first_row - num_rows, num_rows, first_position, pages }
            })
            .collect();
        let positions: Vec<u32> = (slices.iter())
            .flat_map(|slice| (0..slice.num_rows).map(|i| (slice.first_position + i) as u32))
            .collect();
        let array = |random: &mut Random, cols: usize| device.array(&random.values(first_row * cols), cols);
        let (mut q, mut k) = (array(random, heads * head_dim), array(random, kv_heads * head_dim));
        let v = array(random, kv_heads * head_dim);
        let mut result = backend.operand();
        if at_once && step == 1 {
            let angles = (&rope, &positions[..]);
            backend.attend([&mut q, &mut k], &v, angles, &mut cache, &slices, &mut result).unwrap();
        } else {
            backend.rope(&mut q, &rope, &positions).unwrap();
            backend.rope(&mut k, &rope, &positions).unwrap();
            backend.kv_append(&mut cache, &k, &v, &slices).unwrap();
            backend.attention(&q, &cache, &slices, &mut result).unwrap();
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
