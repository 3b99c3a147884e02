//! Whole jobs through the binary, as a user runs them.
//!
//! The models are made by `cargo fixtures`, with their reference figures beside them; a test that finds
//! none says so and fails.
#![forbid(unsafe_code)]

mod abacus;
mod afterwards;
mod asked_layouts;
mod bench;
mod commands;
mod crashes;
mod cuda;
mod cuts;
mod disturbed;
mod fits;
mod gpu_processes;
mod gpus;
mod guided;
mod harness;
mod kept;
mod lanes;
mod layouts;
mod logits;
#[cfg(target_os = "linux")]
mod memory;
mod perplexity;
mod pictures;
mod plan;
mod plan_input;
mod processes;
mod profile;
mod quantised;
mod ranks;
#[path = "../reading/mod.rs"]
mod reading;
mod refusals;
mod replicas;
mod results;
mod resume;
mod sameness;
mod sampling;
mod simulate;
mod smollm2;
mod twice;
