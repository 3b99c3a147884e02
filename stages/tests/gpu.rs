//! Stages on GPUs of the emulator: what they take of its memory, and that a step is the same whether it is captured or not, and
//! whether its tokens come from the host or from the step before. The last is so on any device.

use std::collections::VecDeque;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use scheduler::{
    Completion, Generated, MicroBatch, MicroBatchId, MicroBatchOutput, Request, RequestKey, Sampling,
    Scheduler, SequenceId, Slice, SliceTokens, Span, TokenCount, TokenMask,
};
use stages::{
    Activations, Device, Dtypes, Gpu, GpuMemory, KvDtype, Model, PAGE_TOKENS, Part, RankPlace, Sharing,
    SpanOptions, Stage, StageOutput, StepSize, WeightType, load,
};

mod small_model;

use small_model::{CONTEXT, small};

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

/// Prompts of some lengths, and every way to be answered that does not ask for the tokens before. They end by a token in six, or
/// by their length.
fn requests(model: &Model) -> Vec<Request> {
    let vocab = model.config.dims.vocab as u32;
    let request = |row: u32| {
        let mut sampling = Sampling::greedy(3 + row * 5 % 7);
        sampling.stop_token_ids = (0..vocab).filter(|token| (token + row).is_multiple_of(6)).collect();
        if !row.is_multiple_of(4) {
            (sampling.temperature, sampling.seed) = (1.5, 3);
        }
        match row % 5 {
            1 => sampling.min_tokens = 4,
            2 => sampling.logprobs = Some(2),
            3 => sampling.logit_bias = (0..20).map(|token| (token, 3.0)).collect(),
            4 => sampling.prompt_logprobs = true,
            _ => {}
        }
        let prompt = (0..1 + row * 13 % 30).map(|at| (row * 131 + at * 37 + 5) % vocab).collect();
        Request { key: RequestKey(u128::from(row)), prompt, sampling: Arc::new(sampling), sample: 0 }
    };
    (0..10).map(request).collect()
}

/// How a job went on one stage.
struct Played {
    completions: Vec<String>,
    num_fed_back: usize,
    num_decoded: u64,
}

/// When a micro-batch is given to the stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    /// When the answer to the one before is known.
    InStep,
    /// As soon as it is issued, before that answer is there.
    Ahead,
    /// Issued before that answer was there, and given to the stage behind it.
    Late,
}

/// Plays all requests.
fn play(model: &Model, stage: &mut dyn Stage, when: When) -> Played {
    let mut scheduler = Scheduler::new(scheduler::Options {
        num_stages: 1,
        micro_batch_tokens: LARGEST.rows,
        max_sequences: SEQUENCES / 2,
        num_pages: SEQUENCES * PAGES_OF_SEQUENCE,
        num_lanes: 1,
        page_tokens: PAGE_TOKENS,
        context_tokens: CONTEXT,
        efficient_tokens: 1,
        num_memories: 1,
        feeds_back: when != When::InStep,
        is_ahead: false,
    });
    for request in requests(model) {
        scheduler.submit(Arc::new(request), Generated::default()).unwrap();
    }
    let (mut completions, mut num_fed_back) = (Vec::<Completion>::new(), 0);
    let (mut issued, mut num_queued) = (VecDeque::<Arc<MicroBatch>>::new(), 0);
    loop {
        while let Some(batch) = scheduler.next_micro_batch() {
            num_fed_back += batch.slices.iter().filter(|slice| slice.fed_back.is_some()).count();
            issued.push_back(Arc::new(batch));
        }
        let output = if when == When::InStep {
            let Some(batch) = issued.pop_front() else { break };
            step_alone(stage, &batch)
        } else {
            // One that finds no room goes behind the answer too.
            let may_queue = |num_queued| num_queued == 0 || when == When::Ahead;
            while may_queue(num_queued)
                && let Some(batch) = issued.front()
                && stage.queue(batch, None).unwrap().is_some()
            {
                (_, num_queued) = (issued.pop_front(), num_queued + 1);
            }
            if num_queued == 0 {
                break;
            }
            num_queued -= 1;
            let output = stage.collect().unwrap().output.unwrap();
            if when == When::Late
                && let Some(batch) = issued.pop_front()
            {
                stage.queue(&batch, None).unwrap().expect("nothing else is queued");
                num_queued += 1;
            }
            output
        };
        completions.extend(scheduler.complete(output, |_, _| false));
        scheduler.check_integrity();
    }
    assert!(issued.is_empty() && num_queued == 0, "all that was issued is answered");
    completions.sort_by_key(|completion| completion.sequence);
    Played {
        completions: completions
            .iter()
            .map(|done| format!("{:?} {:?}", done.outcome, done.generated))
            .collect(),
        num_fed_back,
        num_decoded: scheduler.stats().decode_tokens,
    }
}

fn step_alone(stage: &mut dyn Stage, batch: &MicroBatch) -> MicroBatchOutput {
    match stage.step(batch, None).unwrap() {
        StageOutput::Tokens(output) => output,
        StageOutput::Activations(_) => panic!("the last stage gives tokens"),
    }
}

/// Every answer's bits, on the emulator with graphs and without, and on processors.
#[test]
fn tokens_that_are_fed_back_on_the_device_change_no_answer() {
    let folder = tempfile::tempdir().unwrap();
    let model = small(folder.path(), false);
    let cpu = Device::Cpu { cores: Vec::new(), threads: 2, simd: stages::Simd::detect() };
    for (device, weights) in [
        (Device::Reference, WeightType::Bf16),
        (cpu, WeightType::Bf16),
        (device(true, true), WeightType::Bf16),
        (device(true, false), WeightType::Fp8),
    ] {
        let what = format!("{device:?} in {}", weights.name());
        let part = parts(&model, 1)[0];
        let mut stage = load(&model, &device, dtypes(weights), options(part, Some(LARGEST))).unwrap();
        let in_step = play(&model, &mut *stage, When::InStep);
        assert_eq!((in_step.num_fed_back, in_step.completions.len()), (0, requests(&model).len()), "{what}");
        for when in [When::Ahead, When::Late] {
            let ahead = play(&model, &mut *stage, when);
            assert!(ahead.num_fed_back > 20, "{what} {when:?}: {} fed back", ahead.num_fed_back);
            assert!(ahead.num_decoded > in_step.num_decoded, "{what}: some rows end while they run ahead");
            for (row, (in_step, ahead)) in in_step.completions.iter().zip(&ahead.completions).enumerate() {
                assert_eq!(in_step, ahead, "{what} {when:?}: row {row}");
            }
        }
    }
}

/// What two stages give that have begun with a micro-batch before they are done with the one before.
fn answers_of_two_ahead(stages: &mut [Box<dyn Stage>], batches: &[MicroBatch]) -> Vec<String> {
    let mut answers = Vec::new();
    let mut collect = |stages: &mut [Box<dyn Stage>]| {
        let outputs: Vec<_> = stages.iter_mut().filter_map(|stage| stage.collect().unwrap().output).collect();
        answers.extend(outputs.iter().map(|output| format!("{output:?}")));
    };
    for (index, batch) in batches.iter().enumerate() {
        if index > 1 {
            collect(stages);
        }
        let (batch, mut input) = (Arc::new(batch.clone()), None);
        for stage in &mut *stages {
            input = stage.queue(&batch, input.as_ref()).unwrap().expect("there is room").activations;
        }
    }
    batches.iter().take(2).for_each(|_| collect(stages));
    answers
}

/// Stages on two GPUs, with room for one micro-batch that arrives while another one is computed.
#[test]
#[ignore = "a part of a_pipeline_of_gpus_that_are_ahead_has_the_answers_of_one_that_waits"]
fn two_gpus_ahead() {
    let folder = tempfile::tempdir().unwrap();
    let model = small(folder.path(), false);
    let on = |gpus: [usize; 2], has_graphs| {
        let load = |(part, index)| {
            let device = device_at(index, true, has_graphs);
            load(&model, &device, dtypes(WeightType::Bf16), options(part, Some(LARGEST))).unwrap()
        };
        parts(&model, 2).into_iter().zip(gpus).map(load).collect::<Vec<_>>()
    };
    let free = || [0, 1].map(|index| Gpu::nth(Some(&emulator()), index).unwrap().free_bytes().unwrap());
    let batches = [&micro_batches(&model)[2..4], &decode_batches(&model)].concat();
    let mut waiting = on([0, 0], false);
    let expected: Vec<_> = batches.iter().map(|batch| format!("{:?}", step(&mut waiting, batch))).collect();
    let mut ahead = on([0, 1], true);
    let loaded = free();
    let found = answers_of_two_ahead(&mut ahead, &batches);
    assert_eq!(found.len(), expected.len());
    for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
        assert_eq!(found, expected, "micro-batch {index}");
    }
    assert_eq!(free(), loaded);
}

/// What one queue does beside the other is drawn.
#[test]
fn a_pipeline_of_gpus_that_are_ahead_has_the_answers_of_one_that_waits() {
    for seed in ["2", "3"] {
        let told = part_on(&[("EMULATED_GPUS", "2"), ("EMULATED_SEED", seed)], "two_gpus_ahead");
        assert!(told.contains("1 passed"), "{told}");
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

/// Stages to which nobody says how large steps will be. Their weights are made by 32 launches.
fn two_stages(model: &Model) -> Vec<Box<dyn Stage>> {
    let load =
        |part| load(model, &device(true, true), dtypes(WeightType::Bf16), options(part, None)).unwrap();
    parts(model, 2).into_iter().map(load).collect()
}

/// Answers where memory is short, which the child of another test is asked for.
#[test]
#[ignore = "a part of a_step_without_room_goes_in_halves_to_the_same_answers"]
#[allow(clippy::print_stdout, reason = "what it prints is what the other test compares")]
fn answers() {
    let folder = tempfile::tempdir().unwrap();
    let model = small(folder.path(), false);
    let mut stages = two_stages(&model);
    let free = free_bytes();
    for batch in micro_batches(&model) {
        println!("answer: {:?}", step(&mut stages, &batch));
    }
    println!("grown by {}", free - free_bytes());
}

/// The same of rows whose tokens are fed back.
#[test]
#[ignore = "a part of a_step_without_room_that_is_fed_back_does_too"]
#[allow(clippy::print_stdout, reason = "what it prints is what the other test compares")]
fn answers_ahead() {
    let folder = tempfile::tempdir().unwrap();
    let model = small(folder.path(), false);
    let options = options(parts(&model, 1)[0], None);
    let mut stage = load(&model, &device(true, true), dtypes(WeightType::Bf16), options).unwrap();
    let free = free_bytes();
    for completion in play(&model, &mut *stage, When::Ahead).completions {
        println!("answer: {completion}");
    }
    println!("grown by {}", free - free_bytes());
}

/// What one of the tests that are parts of others prints on such a machine.
fn part_on(machine: &[(&str, &str)], part: &str) -> String {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", part, "--ignored", "--nocapture"]).envs(machine.iter().copied());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A step of one token where memory is short, which the child of another test is asked for.
#[test]
#[ignore = "a part of a_token_without_room_is_an_error_of_its_own"]
#[allow(clippy::print_stdout, reason = "what it prints is what the other test reads")]
fn one_token() {
    let folder = tempfile::tempdir().unwrap();
    let model = small(folder.path(), false);
    let mut stages = two_stages(&model);
    let done = stages[0].step(&micro_batch(&model, &[(0, 0..1, Asks::Greedy)]), None);
    println!("{}", done.err().map_or("it has room".to_owned(), |error| error.to_string()));
}

/// What larger steps had has been given back by then.
#[test]
fn a_token_without_room_is_an_error_of_its_own() {
    assert!(part_on(&[], "one_token").contains("it has room"));
    // The 33rd launch is the first of a step, which has none of its other arrays yet.
    let told = part_on(&[("EMULATED_LEFT", "0@33")], "one_token");
    assert!(told.contains("a step of one token: cuda:0: ") && told.contains(" are free"), "{told}");
}

/// Where nobody said how large steps would be: another program takes what they would need.
#[test]
fn a_step_without_room_goes_in_halves_to_the_same_answers() {
    assert_same_without_room("answers", 10);
}

/// Each half is waited for, and so are the tokens that it begins with.
#[test]
fn a_step_without_room_that_is_fed_back_does_too() {
    assert_same_without_room("answers_ahead", 10);
}

/// The same of so many lines of another test, with memory enough and with little of it.
fn assert_same_without_room(test: &str, count: usize) {
    let answers = |machine: &[(&str, &str)]| part_on(machine, test);
    let outputs = |text: &str| {
        text.lines().filter(|line| line.starts_with("answer: ")).map(str::to_owned).collect::<Vec<_>>()
    };
    let plain = answers(&[]);
    assert_eq!(outputs(&plain).len(), count);
    let grown = plain.lines().find_map(|line| line.strip_prefix("grown by ")).unwrap();
    assert!(grown.parse::<u64>().unwrap() > 2 * LEFT, "{grown}");
    // The first micro-batch's launches are more than the rest, behind those of the weights.
    let short = answers(&[("EMULATED_LEFT", &format!("{LEFT}@40"))]);
    assert_eq!(outputs(&short), outputs(&plain));
}

/// Bytes that another program leaves.
const LEFT: u64 = 150_000;
