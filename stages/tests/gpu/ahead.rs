//! Steps that are begun before those before them have come to an end.

use std::collections::VecDeque;
use std::sync::Arc;

use scheduler::{
    Completion, Generated, MicroBatch, MicroBatchOutput, Request, RequestKey, Sampling, Scheduler,
};
use stages::{Device, Gpu, Model, PAGE_TOKENS, Stage, StageOutput, WeightType, load};

use crate::small_model::{CONTEXT, small};
use crate::{
    LARGEST, PAGES_OF_SEQUENCE, SEQUENCES, decode_batches, device, device_at, dtypes, emulator,
    micro_batches, options, part_on, parts, step,
};

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
pub(crate) struct Played {
    pub(crate) completions: Vec<String>,
    num_fed_back: usize,
    num_decoded: u64,
}

/// When a micro-batch is given to the stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    /// When the answer to the one before is known.
    InStep,
    /// As soon as it is issued, before that answer is there.
    Ahead,
    /// Issued before that answer was there, and given to the stage behind it.
    Late,
}

/// Plays all requests.
pub(crate) fn play(model: &Model, stage: &mut dyn Stage, when: When) -> Played {
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
        let told = part_on(&[("EMULATED_GPUS", "2"), ("EMULATED_SEED", seed)], "ahead::two_gpus_ahead");
        assert!(told.contains("1 passed"), "{told}");
    }
}
