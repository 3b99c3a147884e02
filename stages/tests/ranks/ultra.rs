//! A scaled-down Ultra: its own 81 blocks at hidden 512 with 32 heads.

use std::cmp::Reverse;
use std::path::Path;

use stages::{Dtypes, Ffn, INT8_BLOCK, KvDtype, Model, Part, SUM_CUT, Simd, WeightType};

use crate::layout::{SHARED, StageOf, Way, alone, parted_at, ranks, run_over, whole};
use crate::micro_batches::Prompts;
use crate::{BF16, F32, bits, cpu, difference};

/// That of whole jobs: its 259 million weights are there, where making them takes several times as long as a run.
fn scaled_ultra() -> Model {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/fixtures/scaled-ultra");
    assert!(folder.join("config.json").is_file(), "{} is missing\nhint: cargo fixtures", folder.display());
    let model = Model::open(&folder, false).unwrap().0;
    let size = (model.config.blocks.len(), model.config.dims.hidden, model.config.dims.heads);
    assert_eq!(size, (81, 512, 32), "it is not current\nhint: cargo fixtures");
    model
}

/// Over 81 blocks: the bounds of docs/run.md.
const ULTRA_F32_BOUND: f32 = 1e-4;
const ULTRA_BF16_BOUND: f32 = 0.2;

/// The model in a numeric type, and what one stage finds that has everything.
struct Unsplit {
    model: Model,
    dtypes: Dtypes,
    found: Vec<f32>,
}

impl Unsplit {
    fn of(dtypes: Dtypes) -> Unsplit {
        let model = scaled_ultra();
        let found = run(&model, dtypes, &[alone(whole(&model))]);
        Unsplit { model, dtypes, found }
    }

    #[track_caller]
    fn keeps_its_bits(&self, layout: &[StageOf], how: &str) {
        assert!(bits(&run(&self.model, self.dtypes, layout)) == bits(&self.found), "{how}");
    }

    #[track_caller]
    fn agrees(&self, layout: &[StageOf], bound: f32, how: &str) {
        let off = difference(&run(&self.model, self.dtypes, layout), &self.found);
        assert!(off <= bound, "{how}: off by {off:e}");
    }
}

fn run(model: &Model, dtypes: Dtypes, layout: &[StageOf]) -> Vec<f32> {
    run_over(Prompts::SHORT, model, &cpu(Simd::detect()), dtypes, layout)
}

/// The parts between places in each of the four fused FFNs, which are the widest; all are multiples of so many columns. `at` has
/// which multiples, where there are so many inside of an FFN.
fn parted_in_each_fused_ffn(model: &Model, multiple: usize, at: impl Fn(usize) -> Vec<usize>) -> Vec<Part> {
    let width = |block: &usize| match model.config.blocks[*block].ffn {
        Ffn::SwiGlu { width } => width,
        Ffn::Linear | Ffn::None => 0,
    };
    let mut fused: Vec<usize> = (0..model.config.blocks.len()).collect();
    fused.sort_by_key(|block| Reverse(width(block)));
    fused.truncate(4);
    fused.sort_unstable();
    assert_eq!(fused, [66, 67, 68, 69]);
    let of_block = |block: &usize| {
        let multiples = at((width(block) - 1) / multiple).into_iter();
        multiples.map(|which| (*block, which * multiple)).collect::<Vec<_>>()
    };
    parted_at(model, &fused.iter().flat_map(of_block).collect::<Vec<_>>())
}

#[test]
fn a_scaled_down_ultra_agrees_on_one_to_four_ranks_cut_through_its_fused_ffns_and_both() {
    let unsplit = Unsplit::of(F32);
    let model = &unsplit.model;
    // In four of the six ways that are mixed an attention half is the first rank's, or an FFN.
    for (num_ranks, way) in [(2, SHARED), (3, SHARED), (4, SHARED), (2, Way::Mixed(0)), (3, Way::Mixed(1))] {
        let layout = [StageOf { part: whole(model), num_ranks, way }];
        unsplit.agrees(&layout, ULTRA_F32_BOUND, &format!("{num_ranks} ranks, {way:?}"));
    }
    // First, last, and an odd one between.
    let parts = parted_in_each_fused_ffn(model, SUM_CUT, |last| vec![1, (last / 2) | 1, last]);
    assert_eq!(parts.len(), 13);
    unsplit.keeps_its_bits(&parts.iter().copied().map(alone).collect::<Vec<_>>(), "cut");
    // Neighbours have all numbers of ranks in turn, the same one now and then.
    let shared = (0..).zip(parts).map(|(stage, part)| ranks(part, 1 + (3 * stage + stage / 4) % 4));
    unsplit.agrees(&shared.collect::<Vec<_>>(), ULTRA_F32_BOUND, "cut and shared");
}

#[test]
fn a_scaled_down_ultra_in_integers_keeps_its_bits_cut_wherever_its_fused_ffns_can_be() {
    let unsplit = Unsplit::of(Dtypes { weights: WeightType::Int8, kv: KvDtype::Bf16 });
    let parts = parted_in_each_fused_ffn(&unsplit.model, INT8_BLOCK, |last| (1..=last).collect());
    assert_eq!(parts.len(), 11);
    unsplit.keeps_its_bits(&parts.into_iter().map(alone).collect::<Vec<_>>(), "cut");
}

#[test]
fn a_scaled_down_ultra_agrees_in_bf16_on_ranks_that_share_it_in_every_way() {
    let unsplit = Unsplit::of(BF16);
    for (num_ranks, way) in [(2, SHARED), (3, Way::Mixed(0)), (4, Way::Mixed(1))] {
        let layout = [StageOf { part: whole(&unsplit.model), num_ranks, way }];
        unsplit.agrees(&layout, ULTRA_BF16_BOUND, &format!("{num_ranks} ranks, {way:?}"));
    }
}
