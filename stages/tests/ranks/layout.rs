//! Layouts of stages: how their ranks share blocks, and what comes of a run.

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use scheduler::{Span, TokenLogprobs};
use stages::{
    AttentionSharing, BlockSharing, CollectiveClock, Device, Dtypes, FfnSharing, Follower, Model, Part,
    RankGroup, RankStep, Sharing, SpanOptions, Stage, StageOutput, load, load_first_rank, load_follower,
    thread_ranks,
};

use crate::micro_batches::{NUM_PAGES, Prompts};
use crate::small_model::CONTEXT;

const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) const SHARED: Way = Way::Alike(AttentionSharing::Heads, FfnSharing::Columns);
pub(crate) const BY_SEQUENCES: Way = Way::Alike(AttentionSharing::Sequences, FfnSharing::Columns);
pub(crate) const ON_FIRST_RANK: Way = Way::Alike(AttentionSharing::FirstRank, FfnSharing::FirstRank);

/// A stage of a layout: its blocks, its ranks, how they share these.
#[derive(Clone, Copy)]
pub(crate) struct StageOf {
    pub(crate) part: Part,
    pub(crate) num_ranks: usize,
    pub(crate) way: Way,
}

/// How ranks share the blocks of a stage.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Way {
    /// All in one way.
    Alike(AttentionSharing, FfnSharing),
    /// Each in another way than those beside it; of six blocks each has every way for one of the numbers from 0 to 5.
    Mixed(usize),
}

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

pub(crate) fn alone(part: Part) -> StageOf {
    ranks(part, 1)
}

pub(crate) fn ranks(part: Part, num_ranks: usize) -> StageOf {
    StageOf { part, num_ranks, way: SHARED }
}

pub(crate) fn whole(model: &Model) -> Part {
    Span { start: 0, end: model.config.blocks.len() }.into()
}

pub(crate) fn parted(model: &Model, at: (usize, usize)) -> [Part; 2] {
    parted_at(model, &[at]).try_into().expect("two parts at one place")
}

/// The parts before, between and after some places, blocks with the columns of their FFNs.
pub(crate) fn parted_at(model: &Model, places: &[(usize, usize)]) -> Vec<Part> {
    let starts = std::iter::once((0, 0)).chain(places.iter().copied());
    let ends = places.iter().map(|&(block, column)| (block + 1, Some(column)));
    let ends = ends.chain([(model.config.blocks.len(), None)]);
    let part = |((start, first_column), (end, end_column))| Part {
        blocks: Span { start, end },
        first_column,
        end_column,
    };
    starts.zip(ends).map(part).collect()
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

/// Log-probabilities of all that the micro-batches score, with those of the most likely tokens, and tokens drawn.
pub(crate) fn run(model: &Model, device: &Device, dtypes: Dtypes, layout: &[StageOf]) -> Vec<f32> {
    run_over(Prompts::LONG, model, device, dtypes, layout)
}

/// The same over other prompts.
pub(crate) fn run_over(
    prompts: Prompts,
    model: &Model,
    device: &Device,
    dtypes: Dtypes,
    layout: &[StageOf],
) -> Vec<f32> {
    assert!(Part::cover(&layout.iter().map(|of| of.part).collect::<Vec<_>>(), &model.config));
    let mut stages: Vec<Running> =
        layout.iter().map(|of| Running::start(model, device, dtypes, *of)).collect();
    let mut found = Vec::new();
    for batch in prompts.micro_batches(model.config.dims.vocab as u32) {
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
    assert_eq!(found.len(), prompts.num_scored() * 6 + 2, "all rows are scored, and two tokens drawn");
    found
}
