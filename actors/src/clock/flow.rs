//! Why a stage would wait: the state of the whole pipeline, and how long it has been in each.
//!
//! The pipeline actor sets the state after each event. A device thread reads the times of all states when it
//! begins to wait and when it ends, and the difference says what it has waited for.

use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::thread::lock;

/// What a stage that has nothing to compute waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Flow {
    /// Nothing is in flight: rows are not read yet, results are being written, a stage is started again.
    #[default]
    Idle,
    /// Other stages, or the way between them: as much is in flight as the pipeline wants, or nothing but
    /// time keeps more from coming.
    Flowing,
    /// Fewer micro-batches are in flight than the pipeline wants, for want of pages.
    KvLimited,
    /// Fewer micro-batches are in flight than the pipeline wants, and no row is left to admit.
    Tail,
}

impl Flow {
    /// What a stage waits for that waits now, where a micro-batch is in flight.
    pub(crate) fn of(scheduler: scheduler::Flow, is_input_read: bool) -> Self {
        match scheduler {
            scheduler::Flow::ShortOfPages => Flow::KvLimited,
            scheduler::Flow::NothingWaits if is_input_read => Flow::Tail,
            // Rows come as fast as they are read, and what is in flight comes back first.
            scheduler::Flow::NothingWaits | scheduler::Flow::Steady => Flow::Flowing,
        }
    }
}

/// Time spent in each state, in the order of [`Flow`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct FlowTimes([Duration; 4]);

impl FlowTimes {
    pub(crate) fn of(&self, flow: Flow) -> Duration {
        self.0[flow as usize]
    }

    #[cfg(test)]
    pub(crate) fn add(&mut self, flow: Flow, time: Duration) {
        self.0[flow as usize] += time;
    }

    /// What has come since an earlier reading.
    pub(crate) fn since(&self, earlier: &Self) -> Self {
        FlowTimes(std::array::from_fn(|flow| self.0[flow] - earlier.0[flow]))
    }
}

/// The present state, and the times of those before.
#[derive(Debug)]
struct State {
    flow: Flow,
    since: Instant,
    past: FlowTimes,
}

impl State {
    fn times(&self, now: Instant) -> FlowTimes {
        let mut times = self.past;
        times.0[self.flow as usize] += now - self.since;
        times
    }
}

/// The pipeline's state over time; the pipeline actor writes, stages read.
#[derive(Debug)]
pub(crate) struct FlowClock(Mutex<State>);

impl Default for FlowClock {
    fn default() -> Self {
        let now = Instant::now();
        FlowClock(Mutex::new(State { flow: Flow::Idle, since: now, past: FlowTimes::default() }))
    }
}

impl FlowClock {
    pub(crate) fn set(&self, flow: Flow) {
        let mut state = self.lock();
        if state.flow != flow {
            // The moment is taken under the lock, so that no reading is of a later one.
            let now = Instant::now();
            *state = State { flow, since: now, past: state.times(now) };
        }
    }

    /// Now, and the times of all states up to now.
    pub(crate) fn read(&self) -> (Instant, FlowTimes) {
        let state = self.lock();
        let now = Instant::now();
        (now, state.times(now))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_row_left_to_admit_is_the_tail_once_no_row_will_come() {
        use scheduler::Flow::{NothingWaits, ShortOfPages, Steady};
        assert_eq!([false, true].map(|is_read| Flow::of(NothingWaits, is_read)), [Flow::Flowing, Flow::Tail]);
        assert_eq!([false, true].map(|is_read| Flow::of(ShortOfPages, is_read)), [Flow::KvLimited; 2]);
        assert_eq!([false, true].map(|is_read| Flow::of(Steady, is_read)), [Flow::Flowing; 2]);
    }

    #[test]
    fn each_moment_belongs_to_one_state() {
        let clock = FlowClock::default();
        let (began, first) = clock.read();
        for flow in [Flow::Flowing, Flow::Tail, Flow::Tail, Flow::KvLimited, Flow::Idle] {
            clock.set(flow);
            std::thread::sleep(Duration::from_millis(2));
        }
        let (ended, last) = clock.read();
        let spent = last.since(&first);
        let states = [Flow::Idle, Flow::Flowing, Flow::KvLimited, Flow::Tail];
        assert!(states.iter().all(|&flow| spent.of(flow) >= Duration::from_millis(2)), "{spent:?}");
        assert_eq!(states.iter().map(|&flow| spent.of(flow)).sum::<Duration>(), ended - began);
    }
}
