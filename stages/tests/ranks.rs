//! Stages of several ranks, and FFNs that are cut by columns, against the stage that has everything: on a small model with
//! every kind of half, and on a scaled-down Ultra.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use scheduler::{
    MicroBatch, MicroBatchId, Request, RequestKey, Sampling, SequenceId, Slice, SliceTokens, Span, TokenId,
    TokenLogprobs,
};
use serde_json::{Value, json};
use stages::{
    AttentionSharing, BlockSharing, CollectiveClock, Device, Dtypes, FfnSharing, Follower, INT8_BLOCK,
    KvDtype, Model, PAGE_TOKENS, Part, RankGroup, RankStep, SUM_CUT, Sharing, Simd, SpanOptions, Stage,
    StageOutput, WeightType, load, load_first_rank, load_follower, thread_ranks,
};

mod small_model;

use small_model::{CONTEXT, small, small_with};

const F32: Dtypes = Dtypes { weights: WeightType::F32, kv: KvDtype::F32 };
const BF16: Dtypes = Dtypes { weights: WeightType::Bf16, kv: KvDtype::Bf16 };
/// A multiple of all numbers of ranks here: sequences that are numbered through are on one rank each, in turn.
const LANES: usize = 12;
const NUM_PAGES: usize = 2 * LANES;
const PATIENCE: Duration = Duration::from_secs(60);

/// A stage of a layout: its blocks, its ranks, how they share these.
#[derive(Clone, Copy)]
struct StageOf {
    part: Part,
    num_ranks: usize,
    way: Way,
}

/// How ranks share the blocks of a stage.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// All in one way.
    Alike(AttentionSharing, FfnSharing),
    /// Each in another way than those beside it; of six blocks each has every way for one of the numbers from 0 to 5.
    Mixed(usize),
}

const SHARED: Way = Way::Alike(AttentionSharing::Heads, FfnSharing::Columns);
const BY_SEQUENCES: Way = Way::Alike(AttentionSharing::Sequences, FfnSharing::Columns);
const ON_FIRST_RANK: Way = Way::Alike(AttentionSharing::FirstRank, FfnSharing::FirstRank);

impl Way {
    fn of(self, block: usize) -> BlockSharing {
        use AttentionSharing::{Heads, Sequences};
        use FfnSharing::Columns;
        let (attention, ffn) = match self {
            Way::Alike(attention, ffn) => (attention, ffn),
            Way::Mixed(number) => [
                (Heads, FfnSharing::FirstRank),
                (AttentionSharing::FirstRank, FfnSharing::FirstRank),
                (AttentionSharing::FirstRank, Columns),
                (Sequences, FfnSharing::FirstRank),
                (Heads, Columns),
                (Sequences, Columns),
            ][(block + number) % 6],
        };
        BlockSharing { attention, ffn }
    }

    fn sharing(self, part: Part) -> Sharing {
        part.blocks.range().map(|block| (block, self.of(block))).collect()
    }
}

fn alone(part: Part) -> StageOf {
    ranks(part, 1)
}

fn ranks(part: Part, num_ranks: usize) -> StageOf {
    StageOf { part, num_ranks, way: SHARED }
}

fn whole(model: &Model) -> Part {
    Span { start: 0, end: model.config.blocks.len() }.into()
}

/// Ultra's own 81 blocks at hidden 256 with 32 heads: at 512, where whole jobs have them, layouts here take minutes.
fn scaled_ultra(folder: &Path) -> Model {
    let ultra = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../configs/models/Llama-3_1-Nemotron-Ultra-253B-v1/config.json");
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(ultra).unwrap()).unwrap();
    let scaled = [
        ("hidden_size", 256),
        ("num_attention_heads", 32),
        ("head_dim", 8),
        ("vocab_size", 2000),
        ("max_position_embeddings", CONTEXT),
    ];
    for (key, value) in scaled {
        config[key] = json!(value);
    }
    config["eos_token_id"] = json!([]);
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    Model::open(folder, true).unwrap().0
}

fn cpu(simd: Simd) -> Device {
    Device::Cpu { cores: Vec::new(), threads: 1, simd }
}

/// A stage with the threads of its other ranks.
struct Running {
    stage: Box<dyn Stage>,
    draws: bool,
    followers: Vec<Sender<RankStep>>,
}

impl Running {
    fn start(model: &Model, device: &Device, dtypes: Dtypes, of: StageOf) -> Running {
        let options =
            SpanOptions { part: of.part, num_pages: NUM_PAGES, context_tokens: CONTEXT, largest_step: None };
        let draws = of.part.is_last(&model.config);
        if of.num_ranks == 1 {
            let stage = load(model, device, dtypes, options).unwrap();
            return Running { stage, draws, followers: Vec::new() };
        }
        let sharing = of.way.sharing(of.part);
        let group = |rank| RankGroup {
            collective: Box::new(rank),
            sharing: sharing.clone(),
            clock: Arc::new(CollectiveClock::default()),
            exit: stages::GroupExit::default(),
        };
        let mut ranks = thread_ranks(of.num_ranks, PATIENCE).into_iter();
        let first = ranks.next().unwrap();
        let followers = ranks
            .map(|rank| {
                let (sender, steps) = channel::<RankStep>();
                let (model, device, group) = (model.clone(), device.clone(), group(rank));
                std::thread::spawn(move || {
                    let follower: Box<dyn Follower> =
                        load_follower(&model, &device, dtypes, options, group).unwrap();
                    let mut follower = follower;
                    steps.iter().for_each(|step| follower.follow(&step).unwrap());
                });
                sender
            })
            .collect();
        Running {
            stage: load_first_rank(model, device, dtypes, options, group(first)).unwrap(),
            draws,
            followers,
        }
    }
}

/// Three sequences: one is prefilled in two chunks, one beside it, all decode together, and two draw.
fn micro_batches(vocab: u32) -> Vec<MicroBatch> {
    let sampling = Sampling { logprobs: Some(5), prompt_logprobs: true, ..Sampling::greedy(4) };
    let sampling = Arc::new(sampling);
    let token = |sequence: usize, position: usize| (sequence as u32 * 131 + position as u32 * 37 + 5) % vocab;
    let slice = |sequence: usize, positions: Range<usize>| {
        let tokens: SliceTokens = positions.clone().map(|position| token(sequence, position)).collect();
        let score: Vec<TokenId> = positions.clone().map(|position| token(sequence, position + 1)).collect();
        let request = Request {
            key: RequestKey(sequence as u128),
            prompt: vec![0],
            sampling: Arc::clone(&sampling),
            sample: 0,
        };
        let pages =
            (0..positions.end.div_ceil(PAGE_TOKENS)).map(|page| (LANES * page + sequence) as u32).collect();
        Slice {
            sequence: SequenceId(sequence as u64),
            first_position: positions.start as u32,
            tokens,
            pages: Arc::new(pages),
            sample: false,
            score,
            counts: None,
            mask: None,
            fed_back: None,
            request: Arc::new(request),
        }
    };
    // Draws a token and asks for nothing else.
    let greedy = |slice: Slice| {
        let request = Request { sampling: Arc::new(Sampling::greedy(4)), ..(*slice.request).clone() };
        Slice { sample: true, score: Vec::new(), request: Arc::new(request), ..slice }
    };
    let batches = [
        vec![slice(0, 0..70)],
        vec![slice(0, 70..90), slice(1, 0..33)],
        vec![slice(2, 0..1), slice(1, 33..34), slice(0, 90..91)],
        vec![slice(1, 34..35), greedy(slice(2, 1..2)), greedy(slice(0, 91..93))],
    ];
    (0..).zip(batches).map(|(id, slices)| MicroBatch { id: MicroBatchId(id), slices }).collect()
}

/// Log-probabilities of all that the micro-batches score, with those of the most likely tokens, and tokens drawn.
fn run(model: &Model, device: &Device, dtypes: Dtypes, layout: &[StageOf]) -> Vec<f32> {
    assert!(Part::cover(&layout.iter().map(|of| of.part).collect::<Vec<_>>(), &model.config));
    let mut stages: Vec<Running> =
        layout.iter().map(|of| Running::start(model, device, dtypes, *of)).collect();
    let mut found = Vec::new();
    for batch in micro_batches(model.config.dims.vocab as u32) {
        let mut input = None;
        for Running { stage, draws, followers } in &mut stages {
            let step = RankStep::of(&batch, *draws);
            followers.iter().for_each(|follower| follower.send(step.clone()).unwrap());
            match stage.step(&batch, input.take()).unwrap() {
                StageOutput::Activations(activations) => input = Some(activations),
                StageOutput::Tokens(output) => {
                    let scored = output.slices.iter().flat_map(|slice| &slice.prompt_logprobs);
                    let numbers = |scored: &TokenLogprobs| {
                        let top: Vec<f32> = scored.top.iter().map(|(_, logprob)| *logprob).collect();
                        std::iter::once(scored.logprob).chain(top).collect::<Vec<f32>>()
                    };
                    found.extend(scored.flat_map(numbers));
                    found.extend(
                        output.slices.iter().filter_map(|slice| slice.token).map(|token| token as f32),
                    );
                }
            }
        }
    }
    assert_eq!(found.len(), (70 + 20 + 33 + 3 + 1) * 6 + 2, "all rows are scored, and two tokens drawn");
    found
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Largest difference of two runs.
fn difference(one: &[f32], other: &[f32]) -> f32 {
    assert_eq!(one.len(), other.len());
    one.iter().zip(other).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Ranks add up the same products in another order, in f32: some hundred to a thousand terms near 1 for each of a dozen
/// halves, rounded to 2^-24. Users are promised what docs/run.md derives, "How far ranks are from one device", which is more.
const F32_BOUND: f32 = 2e-5;

/// Beside bf16 inputs, a sum that is off by its last bit may round to the other neighbour, which later halves carry on. As
/// docs/run.md derives it, for the 23 operands of the small model and its head, whose logits have a deviation of 1.
const BF16_BOUND: f32 = 0.05;

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

/// All places where the FFN of the small model that stands alone can be cut, and some in others.
fn cuts() -> Vec<(usize, usize)> {
    let alone = (SUM_CUT..1000).step_by(SUM_CUT).map(|column| (3, column));
    alone.chain([(0, SUM_CUT), (0, 448), (1, 512), (4, SUM_CUT)]).collect()
}

fn parted(model: &Model, (block, column): (usize, usize)) -> [Part; 2] {
    let num_blocks = model.config.blocks.len();
    [
        Part { blocks: Span { start: 0, end: block + 1 }, first_column: 0, end_column: Some(column) },
        Part { blocks: Span { start: block, end: num_blocks }, first_column: column, end_column: None },
    ]
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

/// Over 81 blocks: the bounds of docs/run.md.
const ULTRA_F32_BOUND: f32 = 1e-4;
const ULTRA_BF16_BOUND: f32 = 0.2;

#[test]
fn a_scaled_down_ultra_agrees_on_one_to_four_ranks_and_cut_through_its_widest_ffns() {
    let folder = tempfile::tempdir().unwrap();
    let model = scaled_ultra(folder.path());
    let device = cpu(Simd::detect());
    let expected = run(&model, &device, F32, &[alone(whole(&model))]);
    // In four of the six ways that are mixed an attention half is the first rank's, or an FFN.
    for (num_ranks, way) in [(2, SHARED), (3, SHARED), (4, SHARED), (2, Way::Mixed(0)), (3, Way::Mixed(1))] {
        let found = run(&model, &device, F32, &[StageOf { part: whole(&model), num_ranks, way }]);
        let off = difference(&found, &expected);
        assert!(off <= ULTRA_F32_BOUND, "{num_ranks} ranks, {way:?}: off by {off:e}");
    }
    // Block 67 has the widest FFN.
    let found = run(&model, &device, F32, &parted(&model, (67, 6400)).map(alone));
    assert_eq!(bits(&found), bits(&expected));
    let int8 = Dtypes { weights: WeightType::Int8, kv: KvDtype::Bf16 };
    let uncut = run(&model, &device, int8, &[alone(whole(&model))]);
    let found = run(&model, &device, int8, &parted(&model, (67, INT8_BLOCK)).map(alone));
    assert_eq!(bits(&found), bits(&uncut));
    let [first, second] = parted(&model, (69, 4096));
    let found = run(&model, &device, F32, &[ranks(first, 2), ranks(second, 3)]);
    let off = difference(&found, &expected);
    assert!(off <= ULTRA_F32_BOUND, "cut and shared: off by {off:e}");
}

#[test]
fn a_scaled_down_ultra_agrees_in_bf16_on_ranks_that_share_it_in_every_way() {
    let folder = tempfile::tempdir().unwrap();
    let model = scaled_ultra(folder.path());
    let device = cpu(Simd::detect());
    let expected = run(&model, &device, BF16, &[alone(whole(&model))]);
    for (num_ranks, way) in [(2, SHARED), (3, Way::Mixed(0)), (4, Way::Mixed(1))] {
        let found = run(&model, &device, BF16, &[StageOf { part: whole(&model), num_ranks, way }]);
        let off = difference(&found, &expected);
        assert!(off <= ULTRA_BF16_BOUND, "{num_ranks} ranks, {way:?}: off by {off:e}");
    }
}
