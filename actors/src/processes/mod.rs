//! Stages that are processes of their own: this program again, which is told by its standard input what to do.
//!
//! To its actor such a stage is a [`Keeper`]: a thread that starts the process, hands it orders, and tells clocks and watchdog what
//! it says by its standard output. Micro-batches do not pass there: the pipeline pushes them to the first stage's process, and each
//! process to the next one's, over a [`crate::tcp_link`]. What comes out of the last goes back by its standard output.
//!
//! A process ends with whoever started it, whatever it is at; one that ends by itself, or is not heard of for as long as a step may
//! take, fails its stage as a thread does, and is started again while the others keep their weights.

mod keeper;
mod serve;
mod wire;

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use kameo::actor::WeakRecipient;

pub(crate) use self::keeper::Keeper;
pub use self::serve::serve_stage;
use crate::clock::HopClock;
use crate::device_thread::Tokens;
use crate::ranks::RanksArgs;

/// What a stage's process is made from.
pub(crate) struct ProcessArgs {
    pub(crate) num_stages: usize,
    /// Its ranks; those beside the first run where it runs, or in processes of their own.
    pub(crate) ranks: RanksArgs,
}

/// What a stage's process is joined to.
pub(crate) struct ProcessEnds {
    /// Where its hops to the next stage are counted.
    pub(crate) hops: Arc<HopClock>,
    /// Where the last stage's results go.
    pub(crate) tokens: WeakRecipient<Tokens>,
    /// Is set to where it takes micro-batches.
    pub(crate) address: Arc<OnceLock<SocketAddr>>,
    /// Whether its micro-batches come from the pipeline.
    pub(crate) is_first: bool,
}
