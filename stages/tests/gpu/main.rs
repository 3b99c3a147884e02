//! Stages on GPUs of the emulator: what they take of its memory, and that a step is the same whether it is captured or not, and
//! whether its tokens come from the host or from the step before. The last is so on any device.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use scheduler::{
    MicroBatch, MicroBatchId, MicroBatchOutput, Request, RequestKey, Sampling, SequenceId, Slice,
    SliceTokens, Span, TokenCount, TokenMask,
};
use stages::{
    Activations, Device, Dtypes, Gpu, KvDtype, Model, PAGE_TOKENS, Part, SpanOptions, Stage, StageOutput,
    StepSize, WeightType,
};

mod ahead;
mod captured;
mod memory;
mod shortage;
#[path = "../small_model/mod.rs"]
mod small_model;

use small_model::CONTEXT;

const PAGES_OF_SEQUENCE: usize = CONTEXT / PAGE_TOKENS;
const SEQUENCES: usize = 8;
const LARGEST: StepSize =
    StepSize { rows: 40, sequences: SEQUENCES, context_tokens: CONTEXT, micro_batches: 3, arrivals: 1 };

/// Where `cargo xtask emulator` puts it.
fn emulator() -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/cuda-emulator");
    assert!(
        folder.join("libcuda.so").is_file(),
        "{} is missing\nhint: cargo xtask emulator",
        folder.display()
    );
    folder
}

fn device(is_deterministic: bool, has_graphs: bool) -> Device {
    device_at(0, is_deterministic, has_graphs)
}

fn device_at(index: usize, is_deterministic: bool, has_graphs: bool) -> Device {
    Device::Cuda { index, libraries: Some(emulator()), cubins: None, is_deterministic, has_graphs }
}

fn free_bytes() -> u64 {
    Gpu::nth(Some(&emulator()), 0).unwrap().free_bytes().unwrap()
}

fn dtypes(weights: WeightType) -> Dtypes {
    Dtypes { weights, kv: KvDtype::Bf16 }
}

/// The model as one stage, or as two.
fn parts(model: &Model, num_stages: usize) -> Vec<Part> {
    let end = model.config.blocks.len();
    let span = |start, end| Span { start, end }.into();
    if num_stages == 1 { vec![span(0, end)] } else { vec![span(0, 3), span(3, end)] }
}

fn options(part: Part, largest_step: Option<StepSize>) -> SpanOptions {
    SpanOptions { part, num_pages: SEQUENCES * PAGES_OF_SEQUENCE, context_tokens: CONTEXT, largest_step }
}

/// What a sequence asks for.
#[derive(Debug, Clone, Copy)]
enum Asks {
    Nothing,
    Greedy,
    Drawn,
    /// Log-probabilities of its prompt and of what is drawn, with those of the twenty likeliest tokens.
    Logprobs,
    /// With a penalty for most tokens of the vocabulary, a bias and a mask.
    Edited,
}

fn micro_batch(model: &Model, slices: &[(usize, Range<usize>, Asks)]) -> MicroBatch {
    let vocab = model.config.dims.vocab;
    let token = |sequence: usize, position: usize| ((sequence * 131 + position * 37 + 5) % vocab) as u32;
    let slice = |(sequence, positions, asks): &(usize, Range<usize>, Asks)| {
        let tokens: SliceTokens = positions.clone().map(|position| token(*sequence, position)).collect();
        let mut sampling = Sampling::greedy(4);
        let (mut score, mut counts, mut mask) = (Vec::new(), None, None);
        match asks {
            Asks::Nothing | Asks::Greedy => {}
            Asks::Drawn => (sampling.temperature, sampling.seed) = (0.9, 7),
            Asks::Logprobs => {
                (sampling.logprobs, sampling.prompt_logprobs) = (Some(20), true);
                score = positions.clone().skip(1).map(|position| token(*sequence, position)).collect();
            }
            Asks::Edited => {
                (sampling.repetition_penalty, sampling.logit_bias) = (1.5, vec![(3, 2.0)]);
                let tokens =
                    (0..vocab as u32 - 7).map(|token| TokenCount { token, generated: 1, in_prompt: false });
                counts = Some(Arc::new(tokens.collect()));
                mask = Some(TokenMask::known(Some(vec![0x7777_7777; vocab.div_ceil(32)])));
            }
        }
        let num_pages = positions.end.div_ceil(PAGE_TOKENS);
        let request = Request {
            key: RequestKey(*sequence as u128),
            prompt: vec![0],
            sampling: Arc::new(sampling),
            sample: 0,
        };
        Slice {
            sequence: SequenceId(*sequence as u64),
            first_position: positions.start as u32,
            tokens,
            pages: Arc::new(
                (0..num_pages).map(|page| (sequence * PAGES_OF_SEQUENCE + page) as u32).collect(),
            ),
            sample: !matches!(asks, Asks::Nothing),
            bars_stops: false,
            score,
            counts,
            mask,
            fed_back: None,
            request: Arc::new(request),
        }
    };
    MicroBatch { id: MicroBatchId(0), slices: slices.iter().map(slice).collect() }
}

/// Prompts in chunks of many sizes, all that there is to ask for, and rows that decode alone and together.
fn micro_batches(model: &Model) -> Vec<MicroBatch> {
    use Asks::{Drawn, Edited, Greedy, Logprobs, Nothing};
    let batch = |slices: &[(usize, Range<usize>, Asks)]| micro_batch(model, slices);
    let mut batches = vec![
        batch(&[(0, 0..40, Nothing)]),
        batch(&[(0, 40..67, Nothing)]),
        batch(&[(1, 0..14, Logprobs), (2, 0..26, Logprobs)]),
        batch(&[(3, 0..1, Edited), (4, 0..30, Drawn), (0, 67..68, Greedy)]),
        batch(&[(5, 0..9, Greedy), (6, 0..5, Drawn), (7, 0..2, Logprobs)]),
    ];
    let lengths = [68, 14, 26, 1, 30, 9, 5, 2];
    let asks = [Greedy, Logprobs, Edited, Edited, Greedy, Drawn, Edited, Greedy];
    for rows in [8, 1, 3, 8, 5] {
        let first = batches.len();
        let row = |sequence: usize| {
            let position = lengths[sequence] + first;
            (sequence, position..position + 1, asks[sequence])
        };
        batches.push(batch(&(0..rows).map(row).collect::<Vec<_>>()));
    }
    batches
}

fn step(stages: &mut [Box<dyn Stage>], batch: &MicroBatch) -> MicroBatchOutput {
    let mut input: Option<Activations> = None;
    for stage in stages {
        match stage.step(batch, input.take()).unwrap() {
            StageOutput::Activations(activations) => input = Some(activations),
            StageOutput::Tokens(output) => return output,
        }
    }
    panic!("the last stage gives tokens")
}

/// Rows that decode together for a while, their number falling from step to step and rising again.
fn decode_batches(model: &Model) -> Vec<MicroBatch> {
    use Asks::{Drawn, Greedy, Nothing};
    let lengths = [17, 1, 9, 5, 12, 3, 20, 2];
    let prompt = |sequence: usize| (sequence, 0..lengths[sequence], Nothing);
    let mut batches: Vec<MicroBatch> =
        [0..4, 4..8].map(|some| micro_batch(model, &some.map(prompt).collect::<Vec<_>>())).into();
    let mut done = [0; SEQUENCES];
    for rows in [8, 7, 6, 3, 3, 4, 1, 1, 1, 8, 5] {
        let mut row = |sequence: usize| {
            let position = lengths[sequence] + done[sequence];
            done[sequence] += 1;
            (sequence, position..position + 1, if sequence.is_multiple_of(2) { Greedy } else { Drawn })
        };
        let slices: Vec<_> = (0..rows).map(&mut row).collect();
        batches.push(micro_batch(model, &slices));
    }
    batches
}

/// What one of the tests that are parts of others prints on such a machine.
fn part_on(machine: &[(&str, &str)], part: &str) -> String {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", part, "--ignored", "--nocapture"]).envs(machine.iter().copied());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}
