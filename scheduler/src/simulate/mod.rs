//! A whole job under a virtual clock: the real [`Scheduler`](crate::Scheduler), and stages that only take time.
//!
//! It says what a pipeline would deliver, and where its stages would wait, from what each stage takes for a
//! [`Load`]. It knows no model, reads no clock and draws nothing: costs and lengths are handed in, and the same
//! input gives the same result to the last bit. Time is counted in whole nanoseconds, so that what a stage does
//! and how it waits sum up to the wall time exactly.
//!
//! Stages take micro-batches in the order of issue, and so do the answers come back: there is nothing to
//! choose between events, and none are kept in a heap. Memory does not grow with the number of requests.

mod draw;
mod line;
mod play;
mod timeline;
mod waits;

use std::fmt;
use std::time::Duration;

use crate::error::Error;
use crate::load::Load;
use crate::options::Options;
use crate::scheduler::Stats;

pub use timeline::{Share, Timeline};
pub use waits::Waits;

/// What one stage takes for a micro-batch.
pub struct VirtualStage<'a> {
    /// A number that all stages of one device have: they share its time.
    pub device: usize,
    /// Seconds that it computes.
    pub seconds: Box<dyn Fn(Load) -> f64 + 'a>,
    /// Seconds from then until the next stage has the activations, or the scheduler the tokens. The stage
    /// computes the next micro-batch meanwhile.
    pub hop_seconds: Box<dyn Fn(Load) -> f64 + 'a>,
}

impl fmt::Debug for VirtualStage<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtualStage").finish_non_exhaustive()
    }
}

/// One request as a simulation knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lengths {
    /// Tokens of its prompt, at least 1.
    pub prompt_tokens: u32,
    /// Tokens after which it draws its stop token, that one included: at least one is drawn. The scheduler does not
    /// know of it beforehand.
    pub output_tokens: u32,
}

/// A pipeline to play a job on.
#[derive(Debug)]
pub struct Simulation<'a> {
    /// The scheduler's.
    pub options: Options,
    /// In the order of the pipeline, as many as the options say.
    pub stages: Vec<VirtualStage<'a>>,
    /// Requests that are submitted and have not ended, as long as there are more.
    pub window: usize,
    /// The job's limit: a request that would go on ends here, or where the context or all pages are full. At least 1.
    pub max_tokens: u32,
}

/// One micro-batch through one stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Which stage.
    pub stage: usize,
    /// Number of the micro-batch, in the order of issue.
    pub micro_batch: u64,
    /// From the job's begin.
    pub start: Duration,
    /// From the job's begin.
    pub end: Duration,
    /// All its tokens.
    pub tokens: usize,
    /// Those of rows that decode.
    pub decode_tokens: usize,
}

/// How a job went.
#[derive(Debug, Clone, PartialEq)]
pub struct Simulated {
    /// From the first submission to the last completion.
    pub wall: Duration,
    /// Requests that ended: all of them.
    pub rows: u64,
    /// Tokens of their prompts, each counted once.
    pub prompt_tokens: u64,
    /// Tokens that were drawn, stop tokens included.
    pub generated_tokens: u64,
    /// Micro-batches that were issued.
    pub micro_batches: u64,
    /// What the scheduler did.
    pub stats: Stats,
    /// From the moment after which no request ever waits to the end.
    pub tail: Duration,
    /// What each stage did with its time.
    pub stages: Vec<Waits>,
    /// Mean share of the KV pages in use.
    pub kv: f64,
    /// The largest share of the KV pages in use after any event.
    pub kv_most: f64,
    /// All of it over time.
    pub timeline: Timeline,
}

impl Simulated {
    /// Generated tokens a second, 0 for a job of no time.
    pub fn tokens_per_second(&self) -> f64 {
        per_second(self.generated_tokens, self.wall)
    }
}

impl Simulation<'_> {
    /// Plays a job to its end, and shows every step to `observe`: by micro-batch in the order of issue, and
    /// each from stage to stage.
    ///
    /// # Errors
    /// A request that the pipeline can never serve: see [`Options::check`].
    ///
    /// # Panics
    /// Where the stages are not as many as the options say, `window` or `max_tokens` is 0, or a cost is negative
    /// or no number.
    pub fn run(
        &self,
        requests: impl IntoIterator<Item = Lengths>,
        observe: &mut dyn FnMut(Step),
    ) -> Result<Simulated, Error> {
        play::play(self, requests.into_iter(), observe)
    }
}

fn per_second(count: u64, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { count as f64 / time.as_secs_f64() }
}
