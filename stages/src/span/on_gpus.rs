//! Two GPUs of the emulator share a stage: where one of them has no room for a step, it goes in halves on both.

use std::ops::Range;
use std::process::Command;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Barrier};
use std::thread::JoinHandle;
use std::time::Duration;

use kernels::{Backend, Cuda, CudaArray, KvDtype, PAGE_TOKENS, WeightType};
use scheduler::{MicroBatch, MicroBatchId, Request, RequestKey, Sampling, SequenceId, Slice, Span};

use super::on_gpu::{device, model};
use super::{SpanOptions, SpanStage};
use crate::error::Result;
use crate::memory::StepSize;
use crate::model::Model;
use crate::ranks::{CollectiveClock, RankGroup, RankStep};
use crate::sharing::Sharing;
use crate::stage::{Dtypes, Follower, Stage, StageOutput, cuda, cuda_rank};

const SEQUENCES: usize = 16;
/// Tokens of each: together more rows than are summed at once.
const LENGTH: usize = 25;
const BF16: Dtypes = Dtypes { weights: WeightType::Bf16, kv: KvDtype::Bf16 };

/// Larger steps find no room that was made for them.
const SMALL: StepSize =
    StepSize { rows: 8, sequences: SEQUENCES, context_tokens: PAGE_TOKENS, micro_batches: 1, arrivals: 1 };
const WHOLE: StepSize = StepSize { rows: SEQUENCES * LENGTH, ..SMALL };

/// Bytes that another program leaves.
const LEFT: u64 = 250_000;

/// Likeliest tokens that a row asks for, and more than there is room for before anybody asks.
const FEW: u32 = 3;
const MANY: u32 = 60;

/// A stage's first rank on the first GPU, and the way to the second on a thread of its own, which gives it back when there are no
/// more steps.
struct TwoRanks {
    first: SpanStage<Cuda>,
    steps: Sender<RankStep>,
    second: JoinHandle<(SpanStage<Cuda>, Result<()>)>,
}

impl TwoRanks {
    fn load(model: &Model, largest_step: Option<StepSize>) -> TwoRanks {
        let options = SpanOptions {
            part: Span { start: 0, end: 1 }.into(),
            num_pages: SEQUENCES,
            context_tokens: PAGE_TOKENS,
            largest_step,
        };
        let mut ranks = kernels::thread_ranks(2, Duration::from_secs(60)).into_iter().map(|rank| RankGroup {
            collective: Box::new(rank),
            sharing: Sharing::default(),
            clock: Arc::new(CollectiveClock::default()),
            exit: kernels::GroupExit::default(),
        });
        let (first, second) = (ranks.next().unwrap(), ranks.next().unwrap());
        let (steps, told) = channel::<RankStep>();
        let (of_second, loaded) = (model.clone(), Arc::new(Barrier::new(2)));
        let is_loaded = Arc::clone(&loaded);
        let second = std::thread::spawn(move || {
            let mut rank = cuda_rank(&of_second, &device(1), BF16, options, second).unwrap();
            is_loaded.wait();
            let done = told.iter().try_for_each(|step| rank.follow(&step));
            (rank, done)
        });
        let first = cuda_rank(model, &device(0), BF16, options, first).unwrap();
        loaded.wait();
        TwoRanks { first, steps, second }
    }

    fn step(&mut self, batch: &MicroBatch) -> Result<String> {
        self.steps.send(RankStep::of(batch, true)).unwrap();
        match self.first.step(batch, None)? {
            StageOutput::Tokens(output) => Ok(format!("{output:?}")),
            StageOutput::Activations(_) => panic!("the stage is the last"),
        }
    }

    /// Whether each rank has gone in halves, and what became of the second.
    fn end(self) -> ([bool; 2], Result<()>) {
        drop(self.steps);
        let (second, done) = self.second.join().unwrap();
        ([self.first.has_halved, second.has_halved], done)
    }
}

/// Sequences' tokens from a position on. Some want their prompt's log-probabilities, with those of so many tokens more, or a draw.
fn batch(tokens: Range<usize>, top: u32) -> MicroBatch {
    let slice = |sequence: usize| {
        let mut sampling = Sampling::greedy(4);
        let scores = sequence.is_multiple_of(3) && tokens.len() > 1;
        (sampling.temperature, sampling.logprobs) = (0.7 * (sequence % 2) as f32, scores.then_some(top));
        let token = |position: usize| ((sequence * 31 + position * 7) % 100) as u32;
        Slice {
            sequence: SequenceId(sequence as u64),
            first_position: tokens.start as u32,
            tokens: tokens.clone().map(token).collect(),
            pages: Arc::new(vec![sequence as u32]),
            sample: true,
            bars_stops: false,
            score: if scores { tokens.clone().skip(1).map(token).collect() } else { Vec::new() },
            counts: None,
            mask: None,
            fed_back: None,
            request: Arc::new(Request {
                key: RequestKey(sequence as u128),
                prompt: vec![0],
                sampling: Arc::new(sampling),
                sample: 0,
            }),
        }
    };
    MicroBatch { id: MicroBatchId(tokens.start as u64), slices: (0..SEQUENCES).map(slice).collect() }
}

/// Another program's memory on a GPU, of which it leaves so many bytes.
fn leave(index: usize, bytes: u64) -> (Cuda, CudaArray) {
    let other = cuda(&device(index), BF16).unwrap();
    let mut taken = other.array();
    let numbers = (other.free_bytes().unwrap() - bytes) as usize / size_of::<f32>();
    other.reserve(&mut taken, 1, numbers).unwrap();
    (other, taken)
}

#[test]
#[ignore = "a part of a_gpu_without_room_has_the_step_go_in_halves_on_all"]
fn halves() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let batches = |top| [batch(0..LENGTH, top), batch(LENGTH..LENGTH + 1, top)];
    let answers = |ranks: &mut TwoRanks, top| batches(top).map(|batch| ranks.step(&batch).unwrap());
    let mut plenty = TwoRanks::load(&model, Some(WHOLE));
    let expected = [FEW, MANY].map(|top| answers(&mut plenty, top));
    assert_eq!(plenty.end().0, [false; 2]);
    // Where a row asks for more than is usual, there is no room in the middle of a step.
    for (short, largest_step, left, top) in
        [(0, SMALL, LEFT, FEW), (1, SMALL, LEFT, FEW), (0, WHOLE, 0, MANY)]
    {
        let expected = &expected[usize::from(top == MANY)];
        let mut ranks = TwoRanks::load(&model, Some(largest_step));
        let other = leave(short, left);
        assert_eq!(&answers(&mut ranks, top), expected, "GPU {short} is short of memory");
        drop(other);
        assert_eq!(&answers(&mut ranks, top), expected, "there is memory again");
        let refusals = &ranks.first.room.as_ref().unwrap().refusals;
        assert!(refusals.num_untried > 0, "rooms were freed and made again");
        let (have_halved, done) = ranks.end();
        done.unwrap();
        assert_eq!(have_halved, [true; 2], "GPU {short} was short of memory");
    }
}

#[test]
#[ignore = "a part of a_gpu_without_room_for_a_token_is_named"]
fn one_token() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let mut ranks = TwoRanks::load(&model, None);
    let _other = leave(0, 0);
    let mut one = batch(0..1, FEW);
    one.slices.truncate(1);
    let [first, second] = [ranks.step(&one).unwrap_err(), ranks.end().1.unwrap_err()];
    assert!(!first.is_of_other_rank() && second.is_of_other_rank(), "{first:?}, {second:?}");
    let first = first.to_string();
    assert!(first.starts_with("a step of one token: cuda:0: ") && first.contains(" are free"), "{first}");
    let seen = "a step of one token: rank 0 has too little memory left, with all given back";
    assert!(second.to_string().starts_with(seen), "{second}");
    assert!(second.to_string().contains(" memory of rank 0's GPU "), "{second}");
}

fn on_two_gpus(part: &str) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", part, "--ignored"]).env("EMULATED_GPUS", "2");
    let output = command.output().unwrap();
    let [told, errors] = [&output.stdout, &output.stderr].map(|told| String::from_utf8_lossy(told));
    assert!(output.status.success() && told.contains("1 passed"), "{told}{errors}");
}

#[test]
fn a_gpu_without_room_has_the_step_go_in_halves_on_all() {
    on_two_gpus("span::on_gpus::halves");
}

#[test]
fn a_gpu_without_room_for_a_token_is_named() {
    on_two_gpus("span::on_gpus::one_token");
}
