//! Pure decisions about a pipeline: requests into micro-batches, KV pages, blocks into spans.
//!
//! This crate knows requests and no numbers. It does no I/O, reads no clock, starts no thread and
//! draws no random number: it takes events and returns decisions, so that the same code runs the
//! real pipeline, a simulator and the tests.
#![forbid(unsafe_code)]

mod backlog;
mod counts;
mod error;
mod load;
mod mask;
mod micro_batch;
mod options;
mod pages;
mod plan;
mod request;
mod running;
mod scheduler;
mod sequence;
mod share;
mod simulate;
mod trials;

pub use counts::TokenCount;
pub use error::Error;
pub use load::Load;
pub use mask::TokenMask;
pub use micro_batch::{
    Failure, FedBack, MicroBatch, MicroBatchId, MicroBatchOutput, PageIdx, Slice, SliceOutput, SliceTokens,
    TokenLogprobs,
};
pub use options::Options;
pub use plan::{
    Case, Choice, Costs, Extra, Held, KvTokens, Piece, PlannedStage, Problem, RankCosts, Span, StageDevice,
    best_layout, faster_layout, faster_looped, in_flight, least_bottleneck, least_bottleneck_on_each,
    least_bottleneck_on_seats, least_bottleneck_within,
};
pub use request::{
    Completion, FinishReason, Generated, Guide, Request, RequestKey, Sampling, SequenceId, TokenId,
};
pub use scheduler::{Flow, Scheduler, Stats};
pub use simulate::{Lengths, Share, Simulated, Simulation, Step, Timeline, VirtualStage, Waits};
pub use trials::LONE_DEATHS;
