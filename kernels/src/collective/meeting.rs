//! A barrier that ends when somebody does not come.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Looks at the clock of rounds before a rank lies down: some 10 µs, a few times what ranks of equal parts are apart.
const SPIN_PAUSES: u32 = 400;

/// Where the ranks of a group wait for each other.
#[derive(Debug)]
pub(super) struct Meeting {
    state: Mutex<State>,
    changed: Condvar,
    /// The number of rounds that are over, for those who have not lain down.
    round: AtomicU64,
    patience: Duration,
}

#[derive(Debug)]
struct State {
    is_here: Vec<bool>,
    round: u64,
    /// Why nobody comes any more.
    end: Option<String>,
}

impl Meeting {
    /// For so many ranks, none of which waits longer than `patience`.
    pub(super) fn new(num_ranks: usize, patience: Duration) -> Self {
        let state = State { is_here: vec![false; num_ranks], round: 0, end: None };
        Meeting { state: Mutex::new(state), changed: Condvar::new(), round: AtomicU64::new(0), patience }
    }

    /// Waits for all others. What they wrote before they came is then seen.
    ///
    /// # Errors
    /// Why the meeting has ended: for good, and for all.
    pub(super) fn meet(&self, rank: usize) -> Result<(), String> {
        let mut state = self.lock();
        if let Some(end) = &state.end {
            return Err(end.clone());
        }
        state.is_here[rank] = true;
        let round = state.round;
        if state.is_here.iter().all(|is_here| *is_here) {
            state.is_here.fill(false);
            state.round += 1;
            self.round.store(state.round, Ordering::Release);
            self.changed.notify_all();
            return Ok(());
        }
        drop(state);
        for _ in 0..SPIN_PAUSES {
            if self.round.load(Ordering::Acquire) != round {
                return Ok(());
            }
            std::hint::spin_loop();
        }
        self.sleep(round)
    }

    fn sleep(&self, round: u64) -> Result<(), String> {
        let begun = Instant::now();
        let mut state = self.lock();
        loop {
            if state.round != round {
                return Ok(());
            }
            if let Some(end) = &state.end {
                return Err(end.clone());
            }
            let Some(left) = self.patience.checked_sub(begun.elapsed()) else {
                let missing = state.is_here.iter().position(|is_here| !is_here).unwrap_or(0);
                let end = format!("rank {missing} did not come within {:?}", self.patience);
                state.end = Some(end.clone());
                self.changed.notify_all();
                return Err(end);
            };
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Ends it, unless it has ended before.
    pub(super) fn end(&self, why: String) {
        self.lock().end.get_or_insert(why);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
