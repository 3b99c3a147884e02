//! The time of one stage, each moment of it in one part: no lock, no thread, no clock of its own.

use std::time::{Duration, Instant};

use super::flow::{Flow, FlowTimes};

/// Where a stage's wall time went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StageParts {
    /// In micro-batches that came to something.
    pub busy: Duration,
    /// Waiting while other stages were at work, or a micro-batch was between two of them.
    pub starved: Duration,
    /// Handing on what was computed.
    pub blocked: Duration,
    /// Waiting while less was in flight than the pipeline wants, for want of KV pages.
    pub kv_limited: Duration,
    /// Waiting while less was in flight than the pipeline wants, and no row was left to admit.
    pub tail: Duration,
    /// Nothing was in flight, or the stage was not there; also what it computed in vain before it ended.
    pub idle: Duration,
}

impl StageParts {
    /// All parts together: the time between two readings.
    pub fn wall(&self) -> Duration {
        self.busy + self.starved + self.blocked + self.kv_limited + self.tail + self.idle
    }

    fn add_wait(&mut self, times: &FlowTimes) {
        self.idle += times.of(Flow::Idle);
        self.starved += times.of(Flow::Flowing);
        self.kv_limited += times.of(Flow::KvLimited);
        self.tail += times.of(Flow::Tail);
    }
}

/// What a stage can be at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Activity {
    /// Not there: being loaded, or ended.
    Away,
    /// For a micro-batch, since the pipeline's states had these times.
    Waiting(FlowTimes),
    Computing,
    HandingOn,
}

/// What a stage is at, and how long it was at what before.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ledger {
    activity: Activity,
    since: Instant,
    parts: StageParts,
}

impl Ledger {
    /// A stage that is not there yet.
    pub(super) fn new(now: Instant) -> Self {
        Ledger { activity: Activity::Away, since: now, parts: StageParts::default() }
    }

    /// Turns to something else; `times` are those of the pipeline's states up to `now`.
    pub(super) fn turn_to(&mut self, activity: Activity, now: Instant, times: &FlowTimes) {
        self.parts = self.parts_at(now, times);
        self.activity = activity;
        self.since = now;
    }

    /// What it computes had not come in for so long after it turned to it.
    pub(super) fn began_late(&mut self, waited: Duration) {
        if self.activity == Activity::Computing {
            self.parts.starved += waited;
            self.since += waited;
        }
    }

    /// What it computes will come to nothing: that time is as good as if it had not been there.
    pub(super) fn compute_in_vain(&mut self) {
        if self.activity == Activity::Computing {
            self.activity = Activity::Away;
        }
    }

    /// Counts from now on; what it is at goes on.
    pub(super) fn begin(&mut self, now: Instant, times: &FlowTimes) {
        let activity = match self.activity {
            Activity::Waiting(_) => Activity::Waiting(*times),
            other => other,
        };
        *self = Ledger { activity, since: now, parts: StageParts::default() };
    }

    /// All time since it began, what it is at included.
    pub(super) fn parts_at(&self, now: Instant, times: &FlowTimes) -> StageParts {
        let mut parts = self.parts;
        let spent = now - self.since;
        match &self.activity {
            Activity::Away => parts.idle += spent,
            Activity::Waiting(before) => parts.add_wait(&times.since(before)),
            Activity::Computing => parts.busy += spent,
            Activity::HandingOn => parts.blocked += spent,
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// A ledger and the pipeline's states beside it, moved by hand.
    struct World {
        now: Instant,
        times: FlowTimes,
        ledger: Ledger,
    }

    impl World {
        fn new() -> Self {
            let now = Instant::now();
            World { now, times: FlowTimes::default(), ledger: Ledger::new(now) }
        }

        fn pass(&mut self, flow: Flow, ms: u32) -> &mut Self {
            self.now += MS * ms;
            self.times.add(flow, MS * ms);
            self
        }

        fn turn_to(&mut self, activity: Activity) -> &mut Self {
            self.ledger.turn_to(activity, self.now, &self.times);
            self
        }

        fn wait(&mut self) -> &mut Self {
            self.turn_to(Activity::Waiting(self.times))
        }

        fn parts(&self) -> StageParts {
            self.ledger.parts_at(self.now, &self.times)
        }
    }

    #[test]
    fn a_wait_is_split_by_what_the_pipeline_was_in() {
        let mut world = World::new();
        world.pass(Flow::Idle, 1).wait();
        world.pass(Flow::Idle, 2).pass(Flow::Flowing, 3).pass(Flow::KvLimited, 5).pass(Flow::Flowing, 7);
        world.turn_to(Activity::Computing).pass(Flow::Tail, 11).turn_to(Activity::HandingOn);
        world.pass(Flow::Tail, 13).wait().pass(Flow::Tail, 17);
        let expected = StageParts {
            busy: MS * 11,
            starved: MS * 10,
            blocked: MS * 13,
            kv_limited: MS * 5,
            tail: MS * 17,
            idle: MS * 3,
        };
        assert_eq!((world.parts(), world.parts().wall()), (expected, MS * 59));
    }

    #[test]
    fn what_was_computed_in_vain_is_idle_and_so_is_the_time_until_the_stage_is_back() {
        let mut world = World::new();
        world.wait().pass(Flow::Flowing, 1).turn_to(Activity::Computing).pass(Flow::Flowing, 20);
        world.ledger.compute_in_vain();
        world.turn_to(Activity::Away).pass(Flow::Idle, 30).wait().pass(Flow::Flowing, 2);
        let expected = StageParts { starved: MS * 3, idle: MS * 50, ..StageParts::default() };
        assert_eq!(world.parts(), expected);
    }

    #[test]
    fn a_device_that_waits_for_what_comes_in_is_starved() {
        let mut world = World::new();
        world.wait().pass(Flow::Flowing, 1).turn_to(Activity::Computing).pass(Flow::Flowing, 20);
        world.ledger.began_late(MS * 15);
        world.turn_to(Activity::HandingOn).pass(Flow::Flowing, 2);
        let expected =
            StageParts { busy: MS * 5, starved: MS * 16, blocked: MS * 2, ..StageParts::default() };
        assert_eq!((world.parts(), world.parts().wall()), (expected, MS * 23));
    }

    #[test]
    fn nothing_before_the_begin_counts() {
        let mut world = World::new();
        world.wait().pass(Flow::Flowing, 9);
        world.ledger.begin(world.now, &world.times);
        assert_eq!(world.parts(), StageParts::default());
        world.pass(Flow::Tail, 4);
        assert_eq!(world.parts(), StageParts { tail: MS * 4, ..StageParts::default() });
    }
}
