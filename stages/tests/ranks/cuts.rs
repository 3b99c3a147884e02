//! FFNs of the small model that neighbouring stages share.

use scheduler::Span;
use stages::{Device, Dtypes, INT8_BLOCK, KvDtype, Part, SUM_CUT, Simd, WeightType};

use crate::layout::{ON_FIRST_RANK, SHARED, StageOf, alone, parted, ranks, run, whole};
use crate::small_model::{small, small_with};
use crate::{BF16, BF16_BOUND, F32, F32_BOUND, bits, cpu, difference};

/// All places where the FFN of the small model that stands alone can be cut, and some in others.
fn cuts() -> Vec<(usize, usize)> {
    let alone = (SUM_CUT..1000).step_by(SUM_CUT).map(|column| (3, column));
    alone.chain([(0, SUM_CUT), (0, 448), (1, 512), (4, SUM_CUT)]).collect()
}

#[test]
fn every_column_cut_keeps_the_bits_of_the_uncut_run_at_every_level() {
    let folder = tempfile::tempdir().unwrap();
    let model = small(folder.path(), false);
    let int4 = Dtypes { weights: WeightType::Int4Weight, kv: KvDtype::Bf16 };
    let mut devices: Vec<(Device, Vec<Dtypes>)> = vec![(Device::Reference, vec![F32])];
    let levels = Simd::ALL.into_iter().filter(|simd| simd.is_available());
    devices.extend(levels.map(|simd| (cpu(simd), vec![F32, BF16, int4])));
    for (device, all) in devices {
        for dtypes in all {
            let expected = bits(&run(&model, &device, dtypes, &[alone(whole(&model))]));
            // The plain loops take seconds for each; levels beside the machine's own have some of the cuts.
            let every = match &device {
                Device::Cpu { simd, .. } if *simd == Simd::detect() => 1,
                Device::Reference => 7,
                _ => 3,
            };
            for at in cuts().into_iter().step_by(every) {
                let found = run(&model, &device, dtypes, &parted(&model, at).map(alone));
                assert!(bits(&found) == expected, "{device:?} {dtypes:?} cut at {at:?}");
            }
        }
    }
}

#[test]
fn every_cut_in_integers_keeps_the_bits_of_the_uncut_run_at_every_level() {
    let folder = tempfile::tempdir().unwrap();
    // Three blocks of columns that share scales, and some columns.
    let model = small_with(folder.path(), false, 3 * INT8_BLOCK + 77);
    let dtypes = Dtypes { weights: WeightType::Int8, kv: KvDtype::Bf16 };
    for device in Simd::ALL.into_iter().filter(|simd| simd.is_available()).map(cpu) {
        let uncut = bits(&run(&model, &device, dtypes, &[alone(whole(&model))]));
        for column in [1, 2, 3].map(|blocks| blocks * INT8_BLOCK) {
            let found = run(&model, &device, dtypes, &parted(&model, (3, column)).map(alone));
            assert!(bits(&found) == uncut, "{device:?} cut at {column}");
        }
        // Between blocks there is no reason for the bits of another one.
        let elsewhere = run(&model, &device, dtypes, &parted(&model, (3, SUM_CUT)).map(alone));
        assert!(bits(&elsewhere) != uncut, "{device:?}: the test would see other bits");
    }
}

#[test]
fn an_ffn_may_be_cut_more_than_once_and_ranks_may_share_what_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let model = small(folder.path(), false);
    let device = cpu(Simd::detect());
    let columns = [0, 192, 448, 832, 1000];
    let part = |index: usize| Part {
        blocks: Span {
            start: if index == 0 { 0 } else { 3 },
            end: if index == 3 { model.config.blocks.len() } else { 4 },
        },
        first_column: columns[index],
        end_column: (index < 3).then_some(columns[index + 1]),
    };
    let expected = run(&model, &device, BF16, &[alone(whole(&model))]);
    let found = run(&model, &device, BF16, &[0, 1, 2, 3].map(|index| alone(part(index))));
    assert_eq!(bits(&found), bits(&expected));
    let shared = [2, 3, 1, 4].into_iter().zip(0..4).map(|(num_ranks, index)| ranks(part(index), num_ranks));
    let shared: Vec<StageOf> = shared.collect();
    for (dtypes, bound) in [(F32, F32_BOUND), (BF16, BF16_BOUND)] {
        let expected = run(&model, &device, dtypes, &[alone(whole(&model))]);
        let found = run(&model, &device, dtypes, &shared);
        let off = difference(&found, &expected);
        assert!(off <= bound, "{dtypes:?}: off by {off:e}");
        assert_eq!(bits(&run(&model, &device, dtypes, &shared)), bits(&found), "the same every time");
    }
}

#[test]
fn a_cut_ffn_may_be_the_first_ranks_on_either_side_of_the_cut() {
    let folder = tempfile::tempdir().unwrap();
    let model = small(folder.path(), false);
    let device = cpu(Simd::detect());
    let expected = run(&model, &device, F32, &[alone(whole(&model))]);
    let [front, back] = parted(&model, (3, 448));
    for [front_way, back_way] in
        [[ON_FIRST_RANK, SHARED], [SHARED, ON_FIRST_RANK], [ON_FIRST_RANK, ON_FIRST_RANK]]
    {
        let stage = |part, num_ranks, way| StageOf { part, num_ranks, way };
        let layout = [stage(front, 2, front_way), stage(back, 3, back_way)];
        let off = difference(&run(&model, &device, F32, &layout), &expected);
        assert!(off <= F32_BOUND, "{front_way:?}, {back_way:?}: off by {off:e}");
    }
}
