//! `embed`, `gather`, and the way through host memory.

use crate::battery::device::{Check, Device, Readable, all_rounded, bits, every_weight_device};
use crate::battery::random::Random;

pub(crate) struct Copies;

impl Check for Copies {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let mut random = Random::new(6);
        let mut out = device.array(&[1.0; 12], 4);
        for (vocabulary, hidden) in [(1, 1), (5, 3), (130, 17), (70, 576)] {
            let table = random.wild_rows(vocabulary, hidden);
            let matrix = device.table(&table, vocabulary, hidden);
            let rounded = all_rounded(device.weights.operands(), &table);
            let array = device.array(&table, hidden);
            assert_eq!(bits(&device.values(&array)), bits(&table), "{}: upload", device.name());
            device.backend.zeros(3, hidden, &mut out).unwrap();
            assert_eq!(device.values(&out), vec![0.0; 3 * hidden], "{}: zeros", device.name());
            for count in [0, 1, 3, 200] {
                let rows: Vec<u32> = (0..count).map(|_| random.below(vocabulary) as u32).collect();
                device.backend.embed(&matrix, &rows, &mut out).unwrap();
                assert_eq!(bits(&device.values(&out)), picked(&rounded, hidden, &rows), "{}", device.name());
                device.backend.gather(&array, &rows, &mut out).unwrap();
                assert_eq!(bits(&device.values(&out)), picked(&table, hidden, &rows), "{}", device.name());
            }
        }
    }
}

fn picked(table: &[f32], cols: usize, rows: &[u32]) -> Vec<u32> {
    rows.iter().flat_map(|&row| bits(&table[row as usize * cols..][..cols])).collect()
}

#[test]
fn embed_and_gather_copy_rows() {
    every_weight_device(&Copies);
}
