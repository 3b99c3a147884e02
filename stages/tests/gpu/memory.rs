//! What stages take of a GPU's memory, and that no step takes more.

use stages::{Gpu, GpuMemory, RankPlace, Sharing, Stage, WeightType, load};

use crate::small_model::small;
use crate::{LARGEST, device, dtypes, emulator, free_bytes, micro_batches, options, parts, step};

#[test]
fn a_step_of_any_size_allocates_nothing_on_the_gpu() {
    let folder = tempfile::tempdir().unwrap();
    let model = small(folder.path(), false);
    for (weights, is_deterministic, num_stages) in [
        (WeightType::Bf16, true, 2),
        (WeightType::Bf16, false, 1),
        (WeightType::Fp8, true, 1),
        (WeightType::Int4Weight, true, 1),
    ] {
        let what = format!("{} on {num_stages} stages, deterministic {is_deterministic}", weights.name());
        let load = |part| {
            load(&model, &device(is_deterministic, true), dtypes(weights), options(part, Some(LARGEST)))
                .unwrap()
        };
        let mut stages: Vec<Box<dyn Stage>> = parts(&model, num_stages).into_iter().map(load).collect();
        let batches = micro_batches(&model);
        if !is_deterministic {
            // A library is timed at the first product of a shape.
            batches.iter().for_each(|batch| drop(step(&mut stages, batch)));
        }
        let free = free_bytes();
        for (index, batch) in batches.iter().enumerate() {
            step(&mut stages, batch);
            assert_eq!(free_bytes(), free, "{what}: micro-batch {index}");
        }
    }
}

/// Whole model and halves of it, each with its share of what was asked for.
#[test]
fn stages_take_no_more_of_a_gpu_than_was_planned() {
    let folder = tempfile::tempdir().unwrap();
    let model = small(folder.path(), false);
    let multiprocessors = Gpu::nth(Some(&emulator()), 0).unwrap().multiprocessors as usize;
    for (weights, is_deterministic) in [
        (WeightType::Bf16, true),
        (WeightType::Bf16, false),
        (WeightType::Fp8, true),
        (WeightType::Int4Weight, true),
    ] {
        for part in [parts(&model, 1), parts(&model, 2)].concat() {
            let options = options(part, Some(LARGEST));
            let place = (RankPlace::ALONE, &Sharing::default());
            let split_over = (!is_deterministic).then_some(multiprocessors);
            let planned = GpuMemory::of(&model.config, part, place, dtypes(weights), (LARGEST, split_over));
            let free = free_bytes();
            let stage = load(&model, &device(is_deterministic, true), dtypes(weights), options).unwrap();
            let taken = free - free_bytes();
            let most = planned.with_pages(options.num_pages);
            let what = format!("{part} in {}, deterministic {is_deterministic}", weights.name());
            assert!(taken <= most && taken > most / 8, "{what}: {taken} of {most}");
            drop(stage);
            assert_eq!(free_bytes(), free, "all is given back");
        }
    }
}
