//! A scaled-down Ultra: its own 81 blocks at hidden 512 with 32 heads.

use std::path::Path;

use stages::{Dtypes, INT8_BLOCK, KvDtype, Model, SUM_CUT, Simd, WeightType};

use crate::layout::{SHARED, StageOf, Way, alone, parted, ranks, run_over, whole};
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

/// Blocks 67 and 69 have the widest FFNs.
#[test]
fn a_scaled_down_ultra_agrees_on_one_to_four_ranks_cut_through_its_widest_ffns_and_both() {
    let unsplit = Unsplit::of(F32);
    let model = &unsplit.model;
    // In four of the six ways that are mixed an attention half is the first rank's, or an FFN.
    for (num_ranks, way) in [(2, SHARED), (3, SHARED), (4, SHARED), (2, Way::Mixed(0)), (3, Way::Mixed(1))] {
        let layout = [StageOf { part: whole(model), num_ranks, way }];
        unsplit.agrees(&layout, ULTRA_F32_BOUND, &format!("{num_ranks} ranks, {way:?}"));
    }
    for column in [SUM_CUT, 6400, 12800] {
        unsplit.keeps_its_bits(&parted(model, (67, column)).map(alone), &format!("cut at {column}"));
    }
    let [first, second] = parted(model, (69, 8192));
    unsplit.agrees(&[ranks(first, 2), ranks(second, 3)], ULTRA_F32_BOUND, "cut and shared");
}

#[test]
fn a_scaled_down_ultra_in_integers_keeps_its_bits_cut_through_its_widest_ffn() {
    let unsplit = Unsplit::of(Dtypes { weights: WeightType::Int8, kv: KvDtype::Bf16 });
    unsplit.keeps_its_bits(&parted(&unsplit.model, (67, INT8_BLOCK)).map(alone), "cut");
}

#[test]
fn a_scaled_down_ultra_agrees_in_bf16_on_ranks_that_share_it_in_every_way() {
    let unsplit = Unsplit::of(BF16);
    for (num_ranks, way) in [(2, SHARED), (3, Way::Mixed(0)), (4, Way::Mixed(1))] {
        let layout = [StageOf { part: whole(&unsplit.model), num_ranks, way }];
        unsplit.agrees(&layout, ULTRA_BF16_BOUND, &format!("{num_ranks} ranks, {way:?}"));
    }
}
