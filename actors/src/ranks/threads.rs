//! Ranks that are threads of this process.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, bounded};
use stages::{
    Collective, Follower, GroupExit, RankGroup, RankStep, RankSteps, Stage, rank_steps, thread_ranks,
};

use super::watch::Doing;
use super::{RankEnd, RankLink, RanksArgs};
use crate::error::{panic_message, with_causes};

/// A thread that follows the first rank.
struct ThreadRank {
    /// Never holds more than a few: ranks meet in every micro-batch that they share.
    steps: mpsc::Sender<Arc<RankStep>>,
    end: RankEnd,
    /// Behind the steps, with which the thread ends.
    _departure: Departure,
}

/// Dropped, waits until a rank's thread has freed its device, for another may be about to take its place; no longer than ranks wait
/// for each other, for it may hang.
struct Departure {
    /// Ends with the thread.
    thread: Receiver<()>,
    patience: Duration,
}

impl Drop for Departure {
    fn drop(&mut self) {
        let _ = self.thread.recv_timeout(self.patience);
    }
}

impl RankLink for ThreadRank {
    fn tell(&mut self, step: &Arc<RankStep>) -> bool {
        self.steps.send(Arc::clone(step)).is_ok()
    }

    fn end(&self) -> &RankEnd {
        &self.end
    }
}

/// A stage's first rank, and the way to the others.
pub(super) type Loaded = (Box<dyn Stage>, Vec<Box<dyn RankLink>>);

/// Loads the first rank here, and each other on a thread of its own, each with its way out of the group.
pub(super) fn load(args: &RanksArgs, exits: &[GroupExit]) -> stages::Result<Loaded> {
    let mut ranks = thread_ranks(args.devices.len(), args.patience).into_iter();
    let first = Box::new(ranks.next().expect("a stage has a rank"));
    let mut others: Vec<Box<dyn RankLink>> = Vec::new();
    let mut loading = Vec::new();
    for (rank, collective) in (1..).zip(ranks) {
        let (steps, received) = rank_steps();
        let (ready, loaded) = bounded(1);
        let end = RankEnd::default();
        let exit = exits[rank].clone();
        let thread = Thread { args: args.clone(), rank, steps: received, end: end.clone(), exit };
        let name = format!("stage-{}.{rank}", args.stage);
        let (lives, thread_lives) = bounded(0);
        let run = move || {
            let _lives: Sender<()> = lives;
            thread.run(Box::new(collective), &ready);
        };
        std::thread::Builder::new().name(name).spawn(run).expect("the system starts a thread");
        let departure = Departure { thread: thread_lives, patience: args.patience };
        others.push(Box::new(ThreadRank { steps, end, _departure: departure }));
        loading.push(loaded);
    }
    let (sharing, clock) = (args.sharing.clone(), args.watch.clock(0));
    let group = RankGroup { collective: first, sharing, clock, exit: exits[0].clone() };
    let first = stages::load_first_rank(&args.model, &args.devices[0], args.dtypes, args.options, group)?;
    for (rank, loaded) in (1..).zip(loading) {
        let gone = || stages::Error::Rank { rank, message: "its thread ended while it loaded".to_owned() };
        loaded.recv().map_err(|_| gone())??;
    }
    Ok((first, others))
}

/// All that a rank's thread works with.
struct Thread {
    args: RanksArgs,
    rank: usize,
    steps: RankSteps,
    end: RankEnd,
    exit: GroupExit,
}

impl Thread {
    fn run(self, collective: Box<dyn Collective<stages::Array>>, ready: &Sender<stages::Result<()>>) {
        let Thread { args, rank, steps, end, exit } = self;
        let RanksArgs { stage, model, devices, dtypes, options, sharing, watch, .. } = &args;
        let clock = watch.clock(rank);
        let group = RankGroup { collective, sharing: sharing.clone(), clock: Arc::clone(&clock), exit };
        let load = || stages::load_follower(model, &devices[rank], *dtypes, *options, group);
        let mut follower = match catch_unwind(AssertUnwindSafe(load)) {
            Ok(Ok(follower)) => follower,
            Ok(Err(error)) => return drop(ready.send(Err(error))),
            Err(panic) => {
                let message = panic_message(&*panic);
                return drop(ready.send(Err(stages::Error::Rank { rank, message })));
            }
        };
        // Nobody waits for the answer any more when the start was given up.
        if ready.send(Ok(())).is_err() {
            return;
        }
        // Ends when the first rank is gone, and with it the sender of steps.
        for step in steps {
            let doing = Doing::begin(&clock);
            if let Err((message, is_consequence)) = follow(&mut *follower, *stage, rank, &step) {
                // Before the follower goes, and others hear of it.
                end.tell(message, is_consequence);
                return;
            }
            watch.tell(rank, doing.end(&clock, &step));
        }
    }
}

/// Takes a step; why it could not, and whether that was another rank's fault.
pub(super) fn follow(
    follower: &mut dyn Follower,
    stage: usize,
    rank: usize,
    step: &RankStep,
) -> Result<(), (String, bool)> {
    let compute = || {
        jobs::faults::rank_step(stage, rank);
        follower.follow(step)
    };
    match catch_unwind(AssertUnwindSafe(compute)) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err((with_causes(&error), error.is_of_other_rank())),
        Err(panic) => Err((format!("it panicked: {}", panic_message(&*panic)), false)),
    }
}
