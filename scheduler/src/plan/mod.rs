//! Which blocks each stage owns, and on how many devices.
//!
//! [`least_bottleneck_on_seats`] gives each of a list of devices a stage of whole blocks, and is what `run` uses; a device
//! may be in the list several times. [`least_bottleneck_on_each`] does it for devices that are there once. [`best_layout`] weighs
//! the layouts of unlike devices by rows per second: micro-batch size, number of stages, tensor-parallel
//! width of each, and where to cut, down to columns of an FFN, each stage within its memory. [`faster_looped`] does the
//! same for pipelines that go through their devices twice.
//!
//! Nothing here knows what a block is. Costs are plain numbers, seconds and bytes for each piece on each
//! kind of device; whether they were measured or estimated is the caller's affair. The invariant: a
//! layout that is returned is within every stage's memory, and no other is faster.

mod each;
mod even;
mod furthest;
mod looped;
mod problem;
mod search;
mod seats;
mod span;

pub use each::least_bottleneck_on_each;
pub use looped::faster_looped;
pub use problem::{Costs, Extra, Held, Piece, PlannedStage, Problem, RankCosts, StageDevice};
pub use search::{Case, Choice, KvTokens, best_layout, faster_layout, in_flight, least_bottleneck};
pub use seats::{least_bottleneck_on_seats, least_bottleneck_within};
pub use span::Span;
