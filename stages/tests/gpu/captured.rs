//! Steps that are captured.

use stages::{Stage, WeightType, load};

use crate::small_model::small;
use crate::{LARGEST, decode_batches, device, dtypes, options, parts, step};

/// Every answer's bits.
#[test]
fn captured_steps_have_the_bits_of_others() {
    let folder = tempfile::tempdir().unwrap();
    let model = small(folder.path(), false);
    for (weights, num_stages) in [(WeightType::Bf16, 2), (WeightType::Fp8, 1)] {
        let answers = |has_graphs: bool| {
            let load = |part| {
                let options = options(part, Some(LARGEST));
                load(&model, &device(true, has_graphs), dtypes(weights), options).unwrap()
            };
            let mut stages: Vec<Box<dyn Stage>> = parts(&model, num_stages).into_iter().map(load).collect();
            decode_batches(&model)
                .iter()
                .map(|batch| format!("{:?}", step(&mut stages, batch)))
                .collect::<Vec<_>>()
        };
        let (plain, captured) = (answers(false), answers(true));
        for (index, (plain, captured)) in plain.iter().zip(&captured).enumerate() {
            assert_eq!(plain, captured, "{} on {num_stages} stages, micro-batch {index}", weights.name());
        }
    }
}
