//! Products against themselves: other rows beside a row, other threads, other caches and another cut change no bit.

use super::*;
use crate::backend::Largest;
use crate::cpu::caches::CoreCaches;

/// What each form of a product comes to, in bits.
#[derive(Debug, PartialEq)]
struct Results {
    /// `x · wᵀ`, and sums over columns before gone on with, `[rows][n]` each.
    sums: Vec<[Vec<u32>; 2]>,
    /// Two matrices gated, `[rows][n]`.
    gated: Vec<Vec<u32>>,
    /// `[rows]`
    largest: Vec<Largest>,
}

impl Results {
    /// Of x and a matrix, or of the two.
    fn of(simd: Simd, pool: &ThreadPool, x: &Operand, w: &[PackedMatrix; 2]) -> Self {
        let (rows, n) = (x.rows(), w[0].rows());
        let (mut plain, mut onto) = (vec![f32::NAN; rows * n], vec![0.75; rows * n]);
        matmul(simd, pool, x, &w[0], &mut plain, false);
        matmul_onto(simd, pool, x, &w[0], &mut onto);
        let mut gated = Operand::beside(simd, w[0].kind());
        swiglu(simd, pool, x, &w[0], &w[1], &mut gated);
        let best: Vec<RowBest> = (0..rows).map(|_| RowBest::default()).collect();
        argmax(simd, pool, x, &w[0], &best);
        let of_row = |values: &[f32], row: usize| bits(&values[row * n..][..n]);
        Self {
            sums: (0..rows).map(|row| [&plain, &onto].map(|values| of_row(values, row))).collect(),
            gated: (0..rows).map(|row| bits(&row_of(&gated, row))).collect(),
            largest: best.iter().map(RowBest::largest).collect(),
        }
    }

    /// Those of a row.
    fn row(&self, row: usize) -> Self {
        Self {
            sums: vec![self.sums[row].clone()],
            gated: vec![self.gated[row].clone()],
            largest: vec![self.largest[row]],
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_company() {
    const ROWS: usize = 1024;
    let (one, two) = (pool(1), pool(2));
    for kind in KINDS {
        for simd in levels() {
            // K beyond one chunk in both number types, and columns that end inside of a panel.
            for (n, k) in [(80, 2312), (200, 96), (17, 33)] {
                let rows_step = if k > 2000 { 61 } else { 1 };
                let w = pack(simd, &random(n * k, 5), n, k, kind);
                let values = random(ROWS * k, 6);
                let all = operand(simd, &values, ROWS, k, kind);
                let mut expected = vec![0.0; ROWS * n];
                for row in 0..ROWS {
                    let x = operand(simd, &values[row * k..][..k], 1, k, kind);
                    matmul(simd, &one, &x, &w, &mut expected[row * n..][..n], false);
                }
                let mut out = vec![0.0; ROWS * n];
                matmul(simd, &two, &all, &w, &mut out, false);
                assert!(bits(&out) == bits(&expected), "{} {kind:?} k = {k}: all rows", simd.name());
                let mut x = Operand::beside(simd, kind);
                for rows in (1..=200).step_by(rows_step).chain([255, 511, 1000]) {
                    let first = ROWS - rows; // So that a row's place in its tile changes.
                    x.reset(rows, k);
                    (0..rows).for_each(|row| x.set_row(row, &values[(first + row) * k..][..k]));
                    let out = &mut out[..rows * n];
                    matmul(simd, &two, &x, &w, out, false);
                    let same = bits(out) == bits(&expected[first * n..]);
                    assert!(same, "{} {kind:?} k = {k}: {rows} rows", simd.name());
                }
            }
        }
    }
}

#[test]
fn every_number_of_rows_up_to_1024_gives_the_bits_of_one() {
    const ROWS: usize = 1024;
    let (n, k) = (24, 40);
    let pool = pool(2);
    for kind in KINDS {
        for simd in levels() {
            let w = pack(simd, &random(n * k, 7), n, k, kind);
            let values = random(ROWS * k, 8);
            let mut expected = vec![0.0; ROWS * n];
            for row in 0..ROWS {
                let x = operand(simd, &values[row * k..][..k], 1, k, kind);
                matmul(simd, &pool, &x, &w, &mut expected[row * n..][..n], false);
            }
            let mut x = Operand::beside(simd, kind);
            let mut out = vec![0.0; ROWS * n];
            for rows in 1..=ROWS {
                x.reset(rows, k);
                (0..rows).for_each(|row| x.set_row(row, &values[row * k..][..k]));
                let out = &mut out[..rows * n];
                matmul(simd, &pool, &x, &w, out, false);
                assert!(bits(out) == bits(&expected[..rows * n]), "{} {kind:?}: {rows} rows", simd.name());
            }
        }
    }
}

/// Where x is larger than a cache, a unit of AMX takes several panels, chunk by chunk.
#[test]
fn units_of_several_panels_give_the_bits_of_one_row() {
    let (rows, n, k) = (40, 300, 17_000);
    let (pool, seen) = (pool(1), [0, 31, 32, 39]);
    for kind in KINDS {
        let w = [26, 27].map(|seed| random(n * k, seed));
        let values = random(rows * k, 28);
        for simd in levels() {
            let w = w.each_ref().map(|w| pack(simd, w, n, k, kind));
            let all = Results::of(simd, &pool, &operand(simd, &values, rows, k, kind), &w);
            for row in seen {
                let x = operand(simd, &values[row * k..][..k], 1, k, kind);
                let alone = Results::of(simd, &pool, &x, &w);
                assert!(all.row(row) == alone, "{} {kind:?} row {row}", simd.name());
            }
        }
    }
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    let pools = [pool(1), pool(2), pool(3)];
    for kind in KINDS {
        for simd in levels() {
            for (rows, n, k) in [(1, 1000, 300), (4, 576, 576), (70, 192, 576), (13, 100, 5000)] {
                let w = pack(simd, &random(n * k, 9), n, k, kind);
                let x = operand(simd, &random(rows * k, 10), rows, k, kind);
                let results = pools.each_ref().map(|pool| {
                    let mut out = vec![0.5; rows * n];
                    matmul(simd, pool, &x, &w, &mut out, true);
                    bits(&out)
                });
                assert!(results[0] == results[1] && results[0] == results[2], "{} {kind:?}", simd.name());
            }
        }
    }
}

/// From the least that a core may have on. With 40 rows AMX takes several pieces at a time where L2 is of 512 KiB and of 1 MiB, and one
/// elsewhere.
#[test]
fn the_sizes_of_caches_do_not_change_a_bit() {
    let caches = [(16, 128), (32, 512), (32, 1024), (48, 2048)]
        .map(|(l1, l2)| CoreCaches { l1: l1 << 10, l2: l2 << 10 });
    let pools = caches.map(|caches| pool(1).with_caches(caches));
    for kind in KINDS {
        for (rows, n, k) in [(1, 70, 2500), (7, 130, 1300), (40, 300, 4200), (130, 200, 600)] {
            let w = [29, 30].map(|seed| random(n * k, seed));
            let values = random(rows * k, 31);
            for simd in levels() {
                let w = w.each_ref().map(|w| pack(simd, w, n, k, kind));
                let x = operand(simd, &values, rows, k, kind);
                let results = pools.each_ref().map(|pool| Results::of(simd, pool, &x, &w));
                for (found, caches) in results.iter().zip(caches) {
                    assert!(*found == results[0], "{} {kind:?} [{rows}, {k}] {caches:?}", simd.name());
                }
            }
        }
    }
}

#[test]
fn swiglu_gives_a_row_the_same_bits_in_any_company() {
    let (rows, n, k) = (77, 100, 600);
    let (one, three) = (pool(1), pool(3));
    for kind in KINDS {
        for simd in levels() {
            for k in [k, 2500] {
                let (gate, up) =
                    (pack(simd, &random(n * k, 17), n, k, kind), pack(simd, &random(n * k, 18), n, k, kind));
                let values = random(rows * k, 19);
                let mut all = Operand::beside(simd, kind);
                swiglu(simd, &three, &operand(simd, &values, rows, k, kind), &gate, &up, &mut all);
                let mut single = Operand::beside(simd, kind);
                for row in 0..rows {
                    let x = operand(simd, &values[row * k..][..k], 1, k, kind);
                    swiglu(simd, &one, &x, &gate, &up, &mut single);
                    assert!(bits(&row_of(&single, 0)) == bits(&row_of(&all, row)), "{}", simd.name());
                }
            }
        }
    }
}

#[test]
fn integers_give_the_same_bits_at_every_level() {
    let pool = pool(2);
    for (rows, n, k) in [(1, 70, 9), (7, 130, 4096), (13, 66, 5000), (3, 64, 9000), (0, 5, 7)] {
        let x = operand(Simd::detect(), &random(rows * k, 25), rows, k, WeightType::Int8);
        let mut first = None;
        for simd in levels() {
            let w = pack(simd, &random(n * k, 24), n, k, WeightType::Int8);
            let mut out = vec![f32::NAN; rows * n];
            matmul(simd, &pool, &x, &w, &mut out, false);
            let expected = first.get_or_insert_with(|| bits(&out));
            assert!(bits(&out) == *expected, "{} [{rows}, {k}] [{n}, {k}]", simd.name());
        }
    }
}
