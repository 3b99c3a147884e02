//! Links carry a micro-batch and its activations from one stage to the next.
//!
//! The one seam between stages in one process and stages in several: who pushes does not know which it is.

use std::sync::Arc;
use std::time::Instant;

use kameo::error::SendError;
use scheduler::MicroBatch;
use stages::Activations;

use crate::clock::HopClock;
use crate::stage::Step;
use crate::stage_set::Seat;

/// The way to the next stage. A send never waits: the pipeline keeps fewer micro-batches in flight than
/// any stage's mailbox holds.
pub(crate) trait Link: Send {
    /// Pushes a micro-batch on. Where the next stage is gone it is lost, and whoever starts that stage
    /// again knows. Where there was no way to it yet, the stage that pushes fails.
    fn push(&self, batch: Arc<MicroBatch>, activations: Option<Activations>);
}

/// The next stage lives in this process: activations move without a copy.
pub(crate) struct InProcess {
    pub(crate) seat: Seat,
    /// Where hops are counted, if they are hops between stages.
    pub(crate) hops: Option<Arc<HopClock>>,
}

impl Link for InProcess {
    fn push(&self, batch: Arc<MicroBatch>, input: Option<Activations>) {
        let (began, bytes) = (Instant::now(), input.as_ref().map_or(0, |input| hop_bytes(&batch, input)));
        let step = Step { batch, input, credit: None };
        is_delivered(self.seat.incumbent().actor.tell(step).try_send());
        if let Some(hops) = &self.hops {
            hops.add(bytes, began.elapsed());
        }
    }
}

/// Bytes of a micro-batch's activations, wherever they are.
pub(crate) fn hop_bytes(batch: &MicroBatch, Activations { sums, hidden, .. }: &Activations) -> u64 {
    let arrays = 1 + usize::from(sums.is_some());
    (arrays * batch.num_tokens() * hidden * size_of::<f32>()) as u64
}

/// Whether a message arrived; false when its receiver is gone.
///
/// # Panics
/// When its receiver's mailbox is full: every mailbox is larger than what can be under way to it.
pub(crate) fn is_delivered<M>(sent: Result<(), SendError<M>>) -> bool {
    assert!(
        !matches!(sent, Err(SendError::MailboxFull(_))),
        "a mailbox is smaller than what is under way to it"
    );
    sent.is_ok()
}
