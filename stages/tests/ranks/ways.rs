//! The small model on ranks that share its halves in every way.

use std::path::Path;

use scheduler::Span;
use stages::{Device, Part, Simd};

use crate::layout::{BY_SEQUENCES, ON_FIRST_RANK, SHARED, StageOf, Way, alone, ranks, run, whole};
use crate::small_model::small;
use crate::{BF16, BF16_BOUND, F32, F32_BOUND, bits, cpu, difference};

const WAYS: [Way; 4] = [SHARED, BY_SEQUENCES, ON_FIRST_RANK, Way::Mixed(0)];

#[test]
fn stages_of_one_to_four_ranks_agree_with_the_stage_that_has_everything() {
    for tied in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let model = small(folder.path(), tied);
        // Logits of the tied model are products with the embedding, whose numbers have variance 1 and not 1 / hidden.
        let scale = if tied { (model.config.dims.hidden as f32).sqrt() } else { 1.0 };
        for (device, dtypes, bound) in [
            (cpu(Simd::detect()), F32, F32_BOUND),
            (cpu(Simd::detect()), BF16, BF16_BOUND),
            (Device::Reference, F32, F32_BOUND),
        ] {
            let bound = bound * scale;
            let expected = run(&model, &device, dtypes, &[alone(whole(&model))]);
            let cut = |end: usize| {
                let num_blocks = model.config.blocks.len();
                [Span { start: 0, end }, Span { start: end, end: num_blocks }].map(Part::from)
            };
            for num_ranks in 1..=4 {
                for way in WAYS {
                    let layout = [StageOf { part: whole(&model), num_ranks, way }];
                    let found = run(&model, &device, dtypes, &layout);
                    let off = difference(&found, &expected);
                    assert!(
                        off <= bound,
                        "{num_ranks} ranks, {way:?}, {device:?} {dtypes:?}: off by {off:e}"
                    );
                    assert_eq!(
                        bits(&run(&model, &device, dtypes, &layout)),
                        bits(&found),
                        "the same every time"
                    );
                    if num_ranks == 1 {
                        assert_eq!(bits(&found), bits(&expected));
                    }
                }
                let [first, second] = cut(2 + num_ranks % 3);
                let found = run(
                    &model,
                    &device,
                    dtypes,
                    &[ranks(first, num_ranks), ranks(second, 1 + num_ranks % 2)],
                );
                let off = difference(&found, &expected);
                assert!(off <= bound, "two stages, {num_ranks} ranks: off by {off:e}");
            }
        }
    }
}

#[test]
fn every_half_agrees_in_every_way_beside_halves_that_are_shared_in_others() {
    let folder = tempfile::tempdir().unwrap();
    let model = small(folder.path(), false);
    let device = cpu(Simd::detect());
    let expected = run(&model, &device, F32, &[alone(whole(&model))]);
    for num_ranks in 2..=4 {
        for way in (0..6).map(Way::Mixed) {
            let layout = [StageOf { part: whole(&model), num_ranks, way }];
            let off = difference(&run(&model, &device, F32, &layout), &expected);
            assert!(off <= F32_BOUND, "{num_ranks} ranks, {way:?}: off by {off:e}");
        }
    }
    // What the first rank does alone, it does as the only one.
    let layout = [StageOf { part: whole(&model), num_ranks: 3, way: ON_FIRST_RANK }];
    assert_eq!(bits(&run(&model, &device, F32, &layout)), bits(&expected));
}

/// As on CPUs, on GPUs that an emulator plays.
#[test]
fn gpus_agree_with_the_one_that_has_everything_in_every_way_to_share() {
    let folder = tempfile::tempdir().unwrap();
    let model = small(folder.path(), false);
    let libraries = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/cuda-emulator");
    assert!(libraries.join("libnccl.so.2").is_file(), "libnccl.so.2 is missing\nhint: cargo xtask emulator");
    let device = Device::Cuda {
        index: 0,
        libraries: Some(libraries),
        cubins: None,
        is_deterministic: true,
        has_graphs: true,
    };
    let expected = run(&model, &device, BF16, &[alone(whole(&model))]);
    for (num_ranks, way) in [(2, Way::Mixed(0)), (3, Way::Mixed(1))] {
        let layout = [StageOf { part: whole(&model), num_ranks, way }];
        let off = difference(&run(&model, &device, BF16, &layout), &expected);
        assert!(off <= BF16_BOUND, "{num_ranks} ranks, {way:?}: off by {off:e}");
    }
    // What the first rank does alone, it does as the only one.
    let layout = [StageOf { part: whole(&model), num_ranks: 2, way: ON_FIRST_RANK }];
    assert_eq!(bits(&run(&model, &device, BF16, &layout)), bits(&expected));
}
