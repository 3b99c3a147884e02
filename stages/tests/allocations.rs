//! In their steady state stages of a rank each allocate nothing for a step that decodes, hop included. The last one's answer alone is
//! new, as the scheduler keeps it; log-probabilities would be in it, and are asked of no row here.

#[path = "../../kernels/tests/counting/mod.rs"]
mod counting;
mod small_model;

use std::ops::Range;
use std::sync::Arc;

use scheduler::{
    MicroBatch, MicroBatchId, Request, RequestKey, Sampling, SequenceId, Slice, SliceOutput, Span,
};
use stages::{
    Activations, Device, Dtypes, KvDtype, Model, Part, Simd, SpanOptions, Stage, StageOutput, WeightType,
    load,
};

use counting::Allocated;
use small_model::CONTEXT;

/// Micro-batches in flight: one more than stages.
const IN_FLIGHT: usize = 3;

/// Rows of a micro-batch, a sequence each.
const ROWS: usize = 5;

const DTYPES: [Dtypes; 2] = [
    Dtypes { weights: WeightType::F32, kv: KvDtype::F32 },
    Dtypes { weights: WeightType::Bf16, kv: KvDtype::Bf16 },
];

/// Two stages between which rows alone travel, and two that share an FFN, so that sums travel beside them.
fn layouts(model: &Model) -> [[Part; 2]; 2] {
    let end = model.config.blocks.len();
    let part =
        |start, end, first_column, end_column| Part { blocks: Span { start, end }, first_column, end_column };
    [[part(0, 3, 0, None), part(3, end, 0, None)], [part(0, 2, 0, Some(512)), part(1, end, 512, None)]]
}

fn stage(model: &Model, dtypes: Dtypes, part: Part) -> Box<dyn Stage> {
    let device = Device::Cpu { cores: Vec::new(), threads: 1, simd: Simd::detect() };
    let num_pages = IN_FLIGHT * ROWS;
    load(model, &device, dtypes, SpanOptions { part, num_pages, context_tokens: CONTEXT, largest_step: None })
        .unwrap()
}

/// All that are in flight at a position of their sequences, each of which has a page.
fn micro_batches(position: u32) -> Vec<MicroBatch> {
    let slices = |sequences: Range<usize>| sequences.map(|n| decoding(n, position)).collect();
    let batch = |n: usize| MicroBatch {
        id: MicroBatchId(u64::from(position) * IN_FLIGHT as u64 + n as u64),
        slices: slices(n * ROWS..(n + 1) * ROWS),
    };
    (0..IN_FLIGHT).map(batch).collect()
}

/// A row that decodes: every other one takes the likeliest token, the rest draw.
fn decoding(sequence: usize, position: u32) -> Slice {
    let temperature = [0.0, 0.8][sequence % 2];
    let sampling = Sampling { temperature, top_k: 40, top_p: 0.9, ..Sampling::greedy(CONTEXT as u32) };
    let request = Request {
        key: RequestKey(sequence as u128),
        prompt: vec![0],
        sampling: Arc::new(sampling),
        sample: 0,
    };
    Slice {
        sequence: SequenceId(sequence as u64),
        first_position: position,
        tokens: [(sequence as u32 * 131 + position * 37) % 700].as_slice().into(),
        fed_back: None,
        pages: Arc::new(vec![sequence as u32]),
        sample: true,
        bars_stops: false,
        score: Vec::new(),
        counts: None,
        mask: None,
        request: Arc::new(request),
    }
}

/// What a stage allocates for a step, and what it gives.
fn step(stage: &mut dyn Stage, batch: &MicroBatch, input: Option<Activations>) -> (Allocated, StageOutput) {
    let mut output = None;
    let allocated = Allocated::during(|| output = Some(stage.step(batch, input).unwrap()));
    (allocated, output.unwrap())
}

/// What each of two stages allocates for each micro-batch in flight. All are on their way before the second takes the first.
fn round([first, second]: &mut [Box<dyn Stage>; 2], position: u32) -> [Vec<Allocated>; 2] {
    let batches = micro_batches(position);
    let (allocated, hops): (Vec<_>, Vec<_>) =
        batches.iter().map(|batch| step(&mut **first, batch, None)).unzip();
    let answer = |(batch, hop): (&MicroBatch, StageOutput)| {
        let StageOutput::Activations(hop) = hop else { panic!("the first stage is not the last") };
        let (allocated, output) = step(&mut **second, batch, Some(hop));
        let StageOutput::Tokens(answer) = output else { panic!("the second stage is the last") };
        assert!(answer.slices.len() == ROWS && answer.slices.iter().all(|slice| slice.token.is_some()));
        allocated
    };
    [allocated, batches.iter().zip(hops).map(answer).collect()]
}

// One test, as the count is of the whole process.
#[test]
fn the_steady_state_of_two_stages_allocates_answers_alone() {
    let folder = tempfile::tempdir().unwrap();
    let model = small_model::small(folder.path(), false);
    let answer = Allocated { times: 1, bytes: ROWS * size_of::<SliceOutput>() };
    for dtypes in DTYPES {
        for layout in layouts(&model) {
            let mut stages = layout.map(|part| stage(&model, dtypes, part));
            let [first, _] = round(&mut stages, 0);
            assert!(
                first[0].bytes > ROWS * model.config.dims.hidden * size_of::<f32>(),
                "nothing is counted"
            );
            for position in 1..40 {
                let expected = [vec![Allocated::NOTHING; IN_FLIGHT], vec![answer; IN_FLIGHT]];
                assert_eq!(round(&mut stages, position), expected, "{dtypes:?}, {layout:?}, step {position}");
            }
        }
    }
}
