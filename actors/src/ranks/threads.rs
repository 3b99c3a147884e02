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
use crate::thread::spawn;

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

impl ThreadRank {
    /// Starts a rank's thread, which ends with what it does. It has freed by then all that it had.
    fn start(
        name: String,
        patience: Duration,
        end: RankEnd,
        run: impl FnOnce(RankSteps) + Send + 'static,
    ) -> ThreadRank {
        let (steps, received) = rank_steps();
        let (lives, thread) = bounded(0);
        let run = move || {
            let _lives: Sender<()> = lives;
            run(received);
        };
        spawn(name, run);
        ThreadRank { steps, end, _departure: Departure { thread, patience } }
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
        let (ready, loaded) = bounded(1);
        let end = RankEnd::default();
        let exit = exits[rank].clone();
        let thread = Thread { args: args.clone(), rank, end: end.clone(), exit };
        let name = format!("stage-{}.{rank}", args.stage);
        let run = move |steps: RankSteps| thread.run(steps, Box::new(collective), &ready);
        others.push(Box::new(ThreadRank::start(name, args.patience, end, run)));
        loading.push(loaded);
    }
    let (sharing, clock) = (args.sharing.clone(), args.watch.clock(0));
    let group = RankGroup { collective: first, sharing, clock, exit: exits[0].clone() };
    let first = stages::load_first_rank(&args.model, &args.devices[0], args.dtypes, args.options, group);
    // The others may wait for it in their group, longer than it takes them to hear that it is gone.
    let first = first.inspect_err(|_| exits.iter().for_each(GroupExit::leave))?;
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
    end: RankEnd,
    exit: GroupExit,
}

impl Thread {
    fn run(
        self,
        steps: RankSteps,
        collective: Box<dyn Collective<stages::Array>>,
        ready: &Sender<stages::Result<()>>,
    ) {
        let Thread { args, rank, end, exit } = self;
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Instant;

    use scheduler::MicroBatch;
    use stages::{Activations, StageOutput};

    use super::super::tests::{Careless, batch, stage};
    use super::*;

    /// Longer than any machine keeps a thread waiting.
    const LONG: Duration = Duration::from_secs(10);

    /// A first rank that fails when others have begun.
    struct Failing {
        is_panic: bool,
    }

    impl Stage for Failing {
        fn step(&mut self, _: &MicroBatch, _: Option<Activations>) -> stages::Result<StageOutput> {
            assert!(!self.is_panic, "a planted panic");
            Err(stages::Error::Rank { rank: 0, message: "a planted failure".to_owned() })
        }
    }

    /// A rank that does this; and whether it has come to its end.
    fn rank(run: impl FnOnce(RankSteps) + Send + 'static) -> (Box<dyn RankLink>, Arc<AtomicBool>) {
        let has_freed = Arc::new(AtomicBool::new(false));
        let freed = Arc::clone(&has_freed);
        let rank = ThreadRank::start("rank".to_owned(), LONG, RankEnd::default(), move |steps| {
            run(steps);
            freed.store(true, Ordering::SeqCst);
        });
        (Box::new(rank), has_freed)
    }

    #[test]
    fn a_stage_that_is_dropped_waits_until_its_ranks_have_freed_their_devices() {
        let (rank, has_freed) = rank(|steps| {
            steps.for_each(drop);
            std::thread::sleep(Duration::from_millis(100));
        });
        drop(stage(Box::new(Careless), vec![rank], Vec::new()));
        assert!(has_freed.load(Ordering::SeqCst), "another may find no room beside it");
    }

    #[test]
    fn ranks_that_wait_for_a_first_one_that_has_failed_are_let_out_and_its_error_is_told() {
        for is_panic in [false, true] {
            let exits = vec![GroupExit::default(), GroupExit::default()];
            let exit = exits[1].clone();
            let (rank, has_freed) = rank(move |mut steps| {
                steps.next();
                let begun = Instant::now();
                while !exit.has_left() && begun.elapsed() < 2 * LONG {
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
            let mut stage = stage(Box::new(Failing { is_panic }), vec![rank], exits);
            match catch_unwind(AssertUnwindSafe(|| stage.step(&batch(), None))) {
                Ok(told) => assert_eq!(told.unwrap_err().to_string(), "rank 0: a planted failure"),
                Err(panic) => assert!(is_panic, "{}", panic_message(&*panic)),
            }
            drop(stage);
            assert!(has_freed.load(Ordering::SeqCst), "the watchdog has to find it, and calls it a hang");
        }
    }
}
