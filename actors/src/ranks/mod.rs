//! A stage of several ranks, as its device thread sees it: the first rank, which tells the others what comes.
//!
//! The other ranks are threads of this process, or processes of their own. They meet in collectives; whoever is gone, or does
//! not come within the group's patience, ends the step of all, and with it the stage: its supervisor starts it again as one.

mod order;
mod process;
mod threads;
mod watch;
mod wire;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use scheduler::MicroBatch;
use stages::{
    Activations, CpuWeights, Device, Dtypes, Gate, GroupExit, Model, RankStep, Sharing, SpanOptions, Stage,
    StageOutput,
};

pub(crate) use order::SpanOrder;
#[cfg(test)]
pub(crate) use order::tests::order as some_order;
pub use process::serve_rank;
pub(crate) use watch::{Done, Watch};
#[cfg(test)]
pub(crate) use wire::tests::done as some_done;
pub(crate) use wire::{add_done, read_done};

use crate::thread::lock;
use watch::Doing;

/// How long a rank's word may take after others have seen it leave: it says why before it does, and that comes by another way.
const GRACE: Duration = Duration::from_millis(500);

/// How often is looked whether it has come.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// Where the ranks of a stage beside the first run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RankHome {
    /// Threads of this process.
    #[default]
    Threads,
    /// A process each, of this program, that talk by TCP.
    Processes,
}

/// What a stage of several ranks is made from.
#[derive(Clone)]
pub(crate) struct RanksArgs {
    pub(crate) stage: usize,
    pub(crate) model: Model,
    /// One for each rank.
    pub(crate) devices: Vec<Device>,
    pub(crate) dtypes: Dtypes,
    pub(crate) options: SpanOptions,
    pub(crate) sharing: Sharing,
    pub(crate) home: RankHome,
    /// How long ranks wait for each other. The watchdog is to be first.
    pub(crate) patience: Duration,
    pub(crate) watch: Watch,
    /// What stages of this process share.
    pub(crate) weights: Arc<CpuWeights>,
}

impl RanksArgs {
    /// Loads every rank's part on its device, in parallel; the first rank's on the calling thread. A stage of one device has
    /// no ranks.
    ///
    /// # Errors
    /// The first rank that could not be loaded.
    pub(crate) fn load(&self) -> stages::Result<Box<dyn Stage>> {
        if let [device] = &self.devices[..] {
            return stages::load_beside(&self.model, device, self.dtypes, self.options, &self.weights);
        }
        let draws = self.options.part.is_last(&self.model.config);
        // Of ranks in this process: another process ends with its rank.
        let mut exits = Exits(self.devices.iter().map(|_| GroupExit::default()).collect());
        let (first, others) = match self.home {
            RankHome::Threads => threads::load(self, &exits.0)?,
            RankHome::Processes => process::load(self, &exits.0[0])?,
        };
        // A core waits for others no longer than its patience.
        exits.0.retain(|_| matches!(self.devices[0], Device::Cuda { .. }));
        let watch = self.watch.clone();
        Ok(Box::new(RankedStage { first, others, draws, watch, is_amid_step: false, exits }))
    }
}

/// The first rank, and the way to the others.
struct RankedStage {
    // Before the others: a first rank that is gone ends those who wait for it.
    first: Box<dyn Stage>,
    others: Vec<Box<dyn RankLink>>,
    draws: bool,
    watch: Watch,
    /// Whether a step has begun that did not come to a good end.
    is_amid_step: bool,
    // Behind all that leaves its groups.
    exits: Exits,
}

/// How long NCCL may take to free what it had for groups that were left: long for what it does by itself, and where it waits for a rank
/// that hangs it may never come back.
const FREEING: Duration = Duration::from_secs(10);

/// The ways out of groups in which the ranks of this process may wait for others. Dropped, waits until what was left is freed: another
/// stage may be about to take its place.
struct Exits(Vec<GroupExit>);

impl Drop for Exits {
    fn drop(&mut self) {
        let since = Instant::now();
        let has_freed = |exit: &GroupExit| exit.has_freed_within(FREEING.saturating_sub(since.elapsed()));
        if !self.0.iter().all(has_freed) {
            tracing::warn!("a rank has left its group, and NCCL still holds what it had for it");
        }
    }
}

impl Drop for RankedStage {
    /// Lets the ranks out that wait on their devices for one that has failed. They would as long as the watchdog lets them, and the
    /// stage be said to hang. What it has failed in was not handed on, or is a device's that goes on with nothing.
    fn drop(&mut self) {
        if self.is_amid_step {
            self.exits.0.iter().for_each(GroupExit::leave);
        }
    }
}

/// The way to a rank beside the first.
trait RankLink: Send {
    /// Tells it what comes; false when it is gone, or does not take it within the ranks' patience. Does not wait for it to follow:
    /// a rank that does not is found in a collective.
    fn tell(&mut self, step: &Arc<RankStep>) -> bool;

    /// Where its end is told.
    fn end(&self) -> &RankEnd;
}

/// Why a rank has ended.
#[derive(Debug, Clone, Default)]
struct RankEnd(Arc<Mutex<Option<End>>>);

#[derive(Debug, Clone)]
struct End {
    message: String,
    /// Whether it only followed another's.
    is_consequence: bool,
}

impl RankEnd {
    /// The first word counts.
    fn tell(&self, message: String, is_consequence: bool) {
        lock(&self.0).get_or_insert(End { message, is_consequence });
    }

    fn read(&self) -> Option<End> {
        lock(&self.0).clone()
    }
}

impl Stage for RankedStage {
    fn step(&mut self, batch: &MicroBatch, input: Option<Activations>) -> stages::Result<StageOutput> {
        self.is_amid_step = true;
        let output = self.step_of_all(batch, input)?;
        self.is_amid_step = false;
        Ok(output)
    }

    fn finish(&mut self) -> stages::Result<Option<Duration>> {
        self.is_amid_step = true;
        let device_time = self.first.finish()?;
        if let Some(rank) = self.exits.0.iter().position(GroupExit::has_left) {
            // Its device went on with whatever numbers were there.
            return Err(stages::Error::Rank { rank, message: "its group was left".to_owned() });
        }
        self.is_amid_step = false;
        Ok(device_time)
    }

    fn gate(&self) -> Option<Gate> {
        self.first.gate()
    }

    fn exits(&self) -> Vec<GroupExit> {
        self.exits.0.clone()
    }
}

impl RankedStage {
    /// A step of the first rank, of which the others are told.
    fn step_of_all(&mut self, batch: &MicroBatch, input: Option<Activations>) -> stages::Result<StageOutput> {
        let step = Arc::new(RankStep::of(batch, self.draws));
        let is_there =
            |(index, other): (usize, &mut Box<dyn RankLink>)| (!other.tell(&step)).then_some(index + 1);
        if let Some(rank) = self.others.iter_mut().enumerate().find_map(is_there) {
            return Err(self.blame(Some(rank), "it takes no steps any more".to_owned()));
        }
        let clock = self.watch.clock(0);
        let doing = Doing::begin(&clock);
        let outcome = self.first.step(batch, input);
        if outcome.is_ok() {
            self.watch.tell(0, doing.end(&clock, &step));
        }
        match outcome {
            Err(error) if error.is_of_other_rank() => {
                Err(self.blame(error.rank_without_room(), error.to_string()))
            }
            outcome => outcome,
        }
    }

    /// The error of the rank that is to blame, as far as it says why; else that of `rank`, or of one that has ended, as others saw it.
    fn blame(&self, rank: Option<usize>, seen: String) -> stages::Error {
        let ends: Vec<&RankEnd> = self.others.iter().map(|other| other.end()).collect();
        let (rank, message) = cause(&ends).unwrap_or_else(|| (rank.or(ended(&ends)).unwrap_or(0), seen));
        stages::Error::Rank { rank, message }
    }
}

/// A rank that has ended, where one has. `ends` are those of ranks 1, 2, …
fn ended(ends: &[&RankEnd]) -> Option<usize> {
    ends.iter().position(|end| end.read().is_some()).map(|index| index + 1)
}

/// The rank that has ended of its own, and why, once others have seen one leave: waits for its word, which may be on its way. `ends` are
/// those of ranks 1, 2, …
fn cause(ends: &[&RankEnd]) -> Option<(usize, String)> {
    let told = || {
        ends.iter().enumerate().find_map(|(index, end)| {
            end.read().filter(|end| !end.is_consequence).map(|end| (index + 1, end.message))
        })
    };
    let since = Instant::now();
    loop {
        match told() {
            None if since.elapsed() < GRACE => std::thread::sleep(LOOK_EVERY),
            told => return told,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};

    use scheduler::{MicroBatchId, MicroBatchOutput, Request, RequestKey, Sampling, SequenceId, Slice, Span};
    use stages::{PAGE_TOKENS, TcpRank};

    use super::*;
    use crate::tests::emulated;

    /// A first rank that answers whatever happens.
    pub(super) struct Careless;

    impl Stage for Careless {
        fn step(&mut self, batch: &MicroBatch, _: Option<Activations>) -> stages::Result<StageOutput> {
            Ok(StageOutput::Tokens(MicroBatchOutput { id: batch.id, slices: Vec::new() }))
        }
    }

    /// That of such ranks.
    pub(super) fn stage(
        first: Box<dyn Stage>,
        others: Vec<Box<dyn RankLink>>,
        exits: Vec<GroupExit>,
    ) -> RankedStage {
        let watch = Watch::new(0, 1 + others.len(), None);
        RankedStage { first, others, draws: true, watch, is_amid_step: false, exits: Exits(exits) }
    }

    /// Of a token.
    pub(super) fn batch() -> MicroBatch {
        let request = Request {
            key: RequestKey(0),
            prompt: vec![7],
            sampling: Arc::new(Sampling::greedy(1)),
            sample: 0,
        };
        let slice = Slice {
            sequence: SequenceId(0),
            first_position: 0,
            tokens: [7].into_iter().collect(),
            pages: Arc::new(vec![0]),
            sample: true,
            bars_stops: false,
            score: Vec::new(),
            counts: None,
            mask: None,
            fed_back: None,
            request: Arc::new(request),
        };
        MicroBatch { id: MicroBatchId(7), slices: vec![slice] }
    }

    #[test]
    fn what_a_stage_has_made_is_an_error_once_a_rank_has_left_its_group() {
        let exits = vec![GroupExit::default(), GroupExit::default()];
        let mut stage = stage(Box::new(Careless), Vec::new(), exits);
        stage.step(&batch(), None).unwrap();
        stage.finish().unwrap();
        stage.step(&batch(), None).unwrap();
        stage.exits()[1].leave();
        assert_eq!(stage.finish().unwrap_err().to_string(), "rank 1: its group was left");
    }

    /// A stage of two ranks on the GPU that an emulator plays.
    fn two_ranks_on_a_gpu() -> RanksArgs {
        RanksArgs {
            stage: 0,
            model: emulated::model(),
            devices: vec![emulated::gpu(), emulated::gpu()],
            dtypes: emulated::DTYPES,
            options: SpanOptions {
                part: Span { start: 0, end: 1 }.into(),
                num_pages: 1,
                context_tokens: PAGE_TOKENS,
                largest_step: None,
            },
            sharing: Sharing::default(),
            home: RankHome::Threads,
            patience: Duration::from_secs(60),
            watch: Watch::new(0, 2, None),
            weights: Arc::default(),
        }
    }

    /// A rank that waits in the group for one that cannot join it would do so for a minute.
    #[test]
    fn a_first_rank_that_cannot_join_its_group_lets_the_others_out() {
        let exits = [(); 2].map(|()| GroupExit::default());
        exits[0].leave();
        let begun = Instant::now();
        let told =
            threads::load(&two_ranks_on_a_gpu(), &exits).err().expect("its group was left").to_string();
        assert!(told.contains("the group was left"), "{told}");
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
        assert!(exits[1].has_left());
    }

    #[test]
    fn a_stage_on_gpus_that_is_dropped_has_left_its_groups_and_freed_what_they_had() {
        for is_failing in [false, true] {
            let mut stage = two_ranks_on_a_gpu().load().unwrap();
            stage.step(&batch(), None).unwrap();
            stage.finish().unwrap();
            let exits = stage.exits();
            if is_failing {
                exits[1].leave();
                assert!(stage.step(&batch(), None).is_err());
            }
            drop(stage);
            assert!(exits.iter().all(|exit| exit.has_left() && exit.has_freed_within(Duration::ZERO)));
        }
    }

    #[test]
    fn the_exits_of_a_stage_on_gpus_are_those_of_the_group_in_which_its_ranks_compute() {
        for left in 0..2 {
            let mut stage = two_ranks_on_a_gpu().load().unwrap();
            stage.step(&batch(), None).unwrap();
            stage.finish().unwrap();
            stage.exits()[left].leave();
            assert!(
                stage.step(&batch(), None).is_err(),
                "rank {left} computes in the group that it has left"
            );
        }
    }

    /// A rank that takes whatever it is told.
    struct Patient(RankEnd);

    impl RankLink for Patient {
        fn tell(&mut self, _: &Arc<RankStep>) -> bool {
            true
        }

        fn end(&self) -> &RankEnd {
            &self.0
        }
    }

    /// A first rank that has seen another one leave.
    struct Left;

    impl Stage for Left {
        fn step(&mut self, _: &MicroBatch, _: Option<Activations>) -> stages::Result<StageOutput> {
            let nobody = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
            Err(TcpRank::join(nobody, 1, 3, 0, GRACE).unwrap_err().into())
        }
    }

    #[test]
    fn a_rank_is_blamed_for_what_it_says_though_its_word_comes_after_others_have_seen_it_leave() {
        let ends = [RankEnd::default(), RankEnd::default()];
        let others = ends.iter().map(|end| Box::new(Patient(end.clone())) as Box<dyn RankLink>).collect();
        let mut stage = stage(Box::new(Left), others, Vec::new());
        ends[0].tell("rank 2 is gone".to_owned(), true);
        let late = ends[1].clone();
        let word = std::thread::spawn(move || {
            std::thread::sleep(GRACE / 10);
            late.tell("it panicked".to_owned(), false);
        });
        let error = stage.step(&batch(), None).unwrap_err();
        assert_eq!(error.to_string(), "rank 2: it panicked");
        word.join().unwrap();
    }
}
