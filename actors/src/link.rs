//! Links carry a micro-batch and its activations from one stage to the next.

use std::sync::Arc;

use kameo::error::SendError;
use scheduler::MicroBatch;
use stages::Activations;

use crate::stage::Step;
use crate::stage_set::Seat;

/// The way to the next stage. A send never waits: the pipeline keeps fewer micro-batches in flight than
/// any stage's mailbox holds.
pub(crate) trait Link: Send {
    /// Pushes a micro-batch on. Where the next stage is gone it is lost, and whoever starts that stage
    /// again knows.
    fn push(&self, batch: Arc<MicroBatch>, activations: Option<Activations>);
}

/// The next stage lives in this process: activations move without a copy.
pub(crate) struct InProcess(pub(crate) Seat);

impl Link for InProcess {
    fn push(&self, batch: Arc<MicroBatch>, input: Option<Activations>) {
        is_delivered(self.0.incumbent().actor.tell(Step { batch, input }).try_send());
    }
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
