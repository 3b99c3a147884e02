//! Steps as they are done, told to whoever draws the timeline of a run: without ever waiting for them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam::channel::{Sender, TrySendError, bounded};

/// One micro-batch through one stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepEvent {
    /// Index of the stage.
    pub stage: usize,
    /// Where it is the part that one of several ranks has of it: which, and its time in collectives.
    pub rank: Option<(usize, Duration)>,
    /// The micro-batch's id.
    pub micro_batch: u64,
    /// When the stage began with it.
    pub start: Instant,
    /// When it was computed.
    pub end: Instant,
    /// All its tokens.
    pub tokens: usize,
    /// Those of sequences that decode.
    pub decode_tokens: usize,
    /// Bytes of activations that went to the next stage.
    pub hop_bytes: u64,
}

/// Where device threads tell their steps.
#[derive(Debug, Clone)]
pub struct StepLog {
    /// Nothing is the end.
    events: Sender<Option<StepEvent>>,
    num_left_out: Arc<AtomicU64>,
}

impl StepLog {
    /// A log, and what is told to it until its end. Of more than `size` steps that nobody has taken yet the
    /// later ones are left out.
    pub fn new(size: usize) -> (Self, impl Iterator<Item = StepEvent> + Send + use<>) {
        let (events, told) = bounded(size);
        let log = StepLog { events, num_left_out: Arc::default() };
        (log, told.into_iter().map_while(|event| event))
    }

    pub(crate) fn tell(&self, event: StepEvent) {
        // Where nobody listens any more, nobody wants it.
        if let Err(TrySendError::Full(_)) = self.events.try_send(Some(event)) {
            self.num_left_out.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Ends it: what is told from now on is not listened to. Waits for room.
    pub fn end(&self) {
        // Who listened may have gone before.
        let _ = self.events.send(None);
    }

    /// Steps for which there was no room.
    pub fn num_left_out(&self) -> u64 {
        self.num_left_out.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(micro_batch: u64) -> StepEvent {
        let now = Instant::now();
        StepEvent {
            stage: 0,
            rank: None,
            micro_batch,
            start: now,
            end: now,
            tokens: 2,
            decode_tokens: 1,
            hop_bytes: 0,
        }
    }

    #[test]
    fn steps_that_find_no_room_are_counted_and_the_others_come_in_order() {
        let (log, told) = StepLog::new(3);
        (0..5).for_each(|micro_batch| log.tell(step(micro_batch)));
        let reader = std::thread::spawn(move || told.map(|step| step.micro_batch).collect::<Vec<_>>());
        log.end();
        assert_eq!((reader.join().unwrap(), log.num_left_out()), (vec![0, 1, 2], 2));
        log.tell(step(5));
        assert_eq!(log.num_left_out(), 2, "nobody listens any more");
    }
}
