//! `rope`.

use kernels::RopeTable;

use crate::battery::device::{Check, Device, F32_UNIT, Readable, every_weight_device};
use crate::battery::exact::{Bounded, assert_within};
use crate::battery::random::Random;

/// Angles of a plain rotary embedding with base 10000.
pub(crate) fn table(head_dim: usize, positions: usize) -> RopeTable {
    let half = head_dim / 2;
    let angle = |i: usize| (i / half) as f64 * 10000f64.powf(-((i % half) as f64) / half as f64);
    RopeTable {
        head_dim,
        cos: (0..positions * half).map(|i| angle(i).cos() as f32).collect(),
        sin: (0..positions * half).map(|i| angle(i).sin() as f32).collect(),
    }
}

pub(crate) struct Rope;

impl Check for Rope {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let mut random = Random::new(4);
        for head_dim in [2, 8, 24, 64, 80, 128, 256] {
            let table = table(head_dim, 50);
            let rope = device.backend.rope_table(table.clone()).unwrap();
            for (rows, heads) in [(1, 1), (3, 5), (40, 9)] {
                let values = random.wild_rows(rows, heads * head_dim);
                let positions: Vec<u32> = (0..rows).map(|_| random.below(50) as u32).collect();
                let mut x = device.array(&values, heads * head_dim);
                device.backend.rope(&mut x, &rope, &positions).unwrap();
                let rows = values.chunks_exact(heads * head_dim).zip(&positions);
                let expected: Vec<Bounded> = rows
                    .flat_map(|(row, &position)| row.chunks_exact(head_dim).map(move |head| (head, position)))
                    .flat_map(|(head, position)| exact(head, &table, position as usize))
                    .collect();
                let what = format!("{} head_dim {head_dim}", device.name());
                assert_within(&what, &device.values(&x), &expected);
            }
        }
    }
}

/// Two products and a sum: each is rounded at most once.
fn exact(head: &[f32], table: &RopeTable, position: usize) -> Vec<Bounded> {
    let half = head.len() / 2;
    let turned = |j: usize| {
        let at = position * half + j % half;
        let (cos, sin) = (f64::from(table.cos[at]), f64::from(table.sin[at]));
        let (a, b) = (f64::from(head[j % half]), f64::from(head[j % half + half]));
        let (x, y) = if j < half { (a * cos, -b * sin) } else { (b * cos, a * sin) };
        Bounded { value: x + y, error: (x.abs() + y.abs()) * F32_UNIT }.stored(F32_UNIT)
    };
    (0..head.len()).map(turned).collect()
}

#[test]
fn rope_turns_each_dimension_with_the_one_half_a_head_away() {
    every_weight_device(&Rope);
}
