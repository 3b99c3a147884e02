//! A barrier that ends when somebody does not come.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a rank looks out for the others before it lies down. Halves of blocks on cores that share a memory are apart by
/// some 10 to 100 µs, and a virtual core that has lain down takes as long to stand up again.
const SPIN: Duration = Duration::from_millis(1);

/// Pauses of 10 to 40 ns between two looks at the clock, and offers of the core to whoever else wants it.
const PAUSES_A_LOOK: u32 = 64;

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
    /// Ranks that have lain down.
    num_asleep: usize,
    /// Why nobody comes any more.
    end: Option<String>,
}

impl Meeting {
    /// For so many ranks, none of which waits longer than `patience`.
    pub(super) fn new(num_ranks: usize, patience: Duration) -> Self {
        let state = State { is_here: vec![false; num_ranks], round: 0, num_asleep: 0, end: None };
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
            if state.num_asleep > 0 {
                self.changed.notify_all();
            }
            return Ok(());
        }
        drop(state);
        if self.is_over_soon(round) { Ok(()) } else { self.sleep(round) }
    }

    /// Looks out for the end of a round, as long as that is worth it.
    fn is_over_soon(&self, round: u64) -> bool {
        let begun = Instant::now();
        loop {
            for _ in 0..PAUSES_A_LOOK {
                if self.round.load(Ordering::Acquire) != round {
                    return true;
                }
                std::hint::spin_loop();
            }
            if begun.elapsed() > SPIN {
                return false;
            }
            std::thread::yield_now();
        }
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
            state.num_asleep += 1;
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            state.num_asleep -= 1;
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
