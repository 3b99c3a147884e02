//! The actors that move a job through a pipeline: stages, the pipeline that feeds them, the job that feeds
//! the pipeline, and the links that carry activations.
//!
//! Every mailbox is bounded, and no send to one ever waits for room: what may be under way is bounded by
//! credits below the mailbox's size, so that a ring of full mailboxes cannot come about. Each bound shows
//! its sum where it stands.
#![forbid(unsafe_code)]

mod ahead;
mod answer;
mod child;
mod clock;
mod device_thread;
mod error;
mod guidance;
mod job;
mod link;
mod pipeline;
mod processes;
mod ranks;
#[cfg(test)]
mod simulation;
mod stage;
mod stage_set;
mod start;
mod tcp_link;
#[cfg(test)]
mod tests;
mod thread;
mod wire;

pub use answer::answer;
pub use clock::{HopTimes, PipelineClock, StageClock, StageParts, StageTimes, StepEvent, StepLoads, StepLog};
pub use error::{Error, Result};
pub use job::{JobOptions, JobOutcome, JobProgress, run_job};
pub use processes::serve_stage;
pub use ranks::{RankHome, serve_rank};
pub use start::{Limits, Pipeline, PipelineOptions, StageHome, StagePlacement, start, start_replicas};
