//! A stage that several devices share, each rank a thread.

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use kernels::GroupExit;
use scheduler::MicroBatch;

use super::subject::Subject;
use crate::error::{Error, Result};
use crate::ranks::{RankGroup, RankStep, RankSteps, rank_steps};
use crate::stage::{self, Activations, Device, Dtypes, Stage, StageOutput};

/// Longer than any rank takes for its part of a step.
const PATIENCE: Duration = Duration::from_secs(600);

/// The first rank, and the way to the others, which end with it.
pub(super) struct Team {
    first: Box<dyn Stage>,
    others: Vec<Sender<Arc<RankStep>>>,
    draws: bool,
}

impl Team {
    /// Loads a subject on as many ranks as there are devices; the calling thread becomes the first one's.
    ///
    /// # Errors
    /// What a device refuses.
    pub(super) fn load(subject: &Subject, devices: &[Device], dtypes: Dtypes) -> Result<Self> {
        let Subject { model, options, sharing } = subject;
        let group = |rank| RankGroup {
            collective: Box::new(rank),
            sharing: sharing.clone(),
            clock: Arc::default(),
            exit: GroupExit::default(),
        };
        let mut ranks = kernels::thread_ranks(devices.len(), PATIENCE).into_iter();
        let first = group(ranks.next().expect("a stage has a rank"));
        let mut others = Vec::new();
        let mut loading = Vec::new();
        for (rank, device) in ranks.zip(&devices[1..]) {
            let (sender, steps) = rank_steps();
            let (say, loaded) = channel();
            let (subject, device, group) = (subject.clone(), device.clone(), group(rank));
            let follow = move || {
                let loaded = stage::load_follower(&subject.model, &device, dtypes, subject.options, group);
                let mut follower = match loaded {
                    Ok(follower) => follower,
                    Err(error) => return drop(say.send(Err(error))),
                };
                // Where the first rank has failed, there are no steps either.
                let _ = say.send(Ok(()));
                follow_all(&mut *follower, steps);
            };
            std::thread::Builder::new()
                .name("profile-rank".to_owned())
                .spawn(follow)
                .expect("the system starts a thread");
            others.push(sender);
            loading.push(loaded);
        }
        let first = stage::load_first_rank(model, &devices[0], dtypes, *options, first)?;
        for (rank, loaded) in (1..).zip(loading) {
            let gone = || Error::Rank { rank, message: "its thread ended while it loaded".to_owned() };
            loaded.recv().map_err(|_| gone())??;
        }
        Ok(Team { first, others, draws: options.part.is_last(&model.config) })
    }
}

/// Follows until there are no more steps. A step that fails ends the group, and with it the first rank's.
fn follow_all(follower: &mut dyn stage::Follower, steps: RankSteps) {
    for step in steps {
        if follower.follow(&step).is_err() {
            return;
        }
    }
}

impl Stage for Team {
    fn step(&mut self, batch: &MicroBatch, input: Option<Activations>) -> Result<StageOutput> {
        let step = Arc::new(RankStep::of(batch, self.draws));
        // One that is gone is found in a collective.
        self.others.iter().for_each(|other| drop(other.send(Arc::clone(&step))));
        self.first.step(batch, input)
    }

    fn finish(&mut self) -> Result<Option<Duration>> {
        self.first.finish()
    }
}
