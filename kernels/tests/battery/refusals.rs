//! Shapes are checked before any memory is touched.

use kernels::{AttentionSlice, Error, RopeTable, TensorView, ViewDtype};

use crate::battery::device::{Check, Device, Readable, every_device};

fn refused<T>(outcome: Result<T, Error>, expected: &str) {
    let error = outcome.err().unwrap_or_else(|| panic!("not refused, expected: {expected}"));
    assert_eq!(error.to_string(), expected);
}

pub(crate) struct Refusals;

impl Check for Refusals {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let backend = &device.backend;
        let (x, _) = device.operand(&[1.0; 12], 4);
        let array = device.array(&[1.0; 12], 4);
        let (mut out, mut out_operand) = (backend.array(), backend.operand());
        let matrix = device.matrix(&[1.0; 15], 3, 5);
        let fitting = device.matrix(&[1.0; 8], 2, 4);

        refused(
            backend.matrix(TensorView::new(ViewDtype::Bf16, 2, 3, &[0; 13])).map(drop),
            "matrix: bytes has shape [13], expected [12]",
        );
        refused(backend.upload(&[0.0; 5], 2, 3, &mut out), "upload: values has shape [5], expected [6]");
        refused(backend.embed(&matrix, &[0, 3], &mut out), "embed: token 3 is outside 0..3");
        refused(
            backend.rms_norm(&array, &device.vector(&[1.0; 3]), 1e-5, &mut out_operand),
            "rms_norm: weight has shape [3], expected [4]",
        );
        refused(backend.matmul(&x, &matrix, &mut out), "matmul: x's columns has shape [4], expected [5]");
        let mut wrong = device.array(&[0.0; 9], 3);
        refused(
            backend.matmul_add(&x, &fitting, &mut wrong),
            "matmul_add: out has shape [3, 3], expected [3, 2]",
        );
        refused(
            backend.matmul_onto(&x, &fitting, &mut wrong),
            "matmul_onto: sums has shape [3, 3], expected [3, 2]",
        );
        refused(
            backend.matmul_onto(&x, &matrix, &mut wrong),
            "matmul_onto: x's columns has shape [4], expected [5]",
        );
        refused(backend.add(&array, &mut wrong), "add: out has shape [3, 3], expected [3, 4]");
        refused(
            backend.swiglu(&x, &fitting, &matrix, &mut out_operand),
            "swiglu: up has shape [3, 5], expected [2, 4]",
        );
        refused(backend.gather(&array, &[2, 3], &mut out), "gather: row 3 is outside 0..3");
        let nothing = device.array(&[], 0);
        assert!(backend.logit_stats(&nothing, &mut Vec::new()).is_err());
        self.check_positions(device);
    }
}

impl Refusals {
    fn check_positions<B: Readable>(&self, device: &Device<B>) {
        let backend = &device.backend;
        let mut array = device.array(&[1.0; 12], 4);
        let mut out_operand = backend.operand();
        let table = |head_dim, cos: usize, sin: usize| RopeTable {
            head_dim,
            cos: vec![1.0; cos],
            sin: vec![0.0; sin],
        };
        assert!(backend.rope_table(table(3, 3, 3)).is_err());
        assert!(backend.rope_table(table(4, 5, 5)).is_err());
        assert!(backend.rope_table(table(4, 4, 6)).is_err());
        let rope = backend.rope_table(table(4, 6, 6)).unwrap();
        refused(backend.rope(&mut array, &rope, &[0, 3, 0]), "rope: position 3 is outside 0..3");
        refused(backend.rope(&mut array, &rope, &[0]), "rope: positions has shape [1], expected [3]");
        let wide = backend.rope_table(table(6, 3, 3)).unwrap();
        refused(backend.rope(&mut array, &wide, &[0; 3]), "rope: x's columns has shape [4], expected [0]");

        assert!(backend.kv_cache(1, 1, 3).is_err(), "an odd head");
        assert!(backend.kv_cache(1, 0, 4).is_err(), "no heads");
        assert!(backend.kv_cache(usize::MAX / 64, 8, 128).is_err(), "more than there is");
        let mut cache = backend.kv_cache(2, 2, 2).unwrap();
        let slices = |num_rows, first_position, pages: &[u32]| {
            [AttentionSlice { first_row: 0, num_rows, first_position, pages: pages.to_vec() }]
        };
        let narrow = device.array(&[1.0; 6], 2);
        let good = slices(3, 0, &[1]);
        refused(
            backend.kv_append(&mut cache, &narrow, &narrow, &good),
            "kv_append: k's columns has shape [2], expected [4]",
        );
        refused(
            backend.kv_append(&mut cache, &array, &narrow, &good),
            "kv_append: v has shape [3, 2], expected [3, 4]",
        );
        refused(
            backend.kv_append(&mut cache, &array, &array, &slices(3, 62, &[1])),
            "kv_append: position 64 is outside 0..64",
        );
        refused(
            backend.attention(&array, &cache, &slices(3, 0, &[2]), &mut out_operand),
            "attention: page 2 is outside 0..2",
        );
        refused(
            backend.attention(&array, &cache, &slices(2, 0, &[1]), &mut out_operand),
            "attention: slices' rows has shape [2], expected [3]",
        );
        refused(
            backend.attention(&narrow, &cache, &good, &mut out_operand),
            "attention: q's columns has shape [2], expected [4]",
        );
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused_with_their_numbers() {
    every_device(&Refusals);
}
