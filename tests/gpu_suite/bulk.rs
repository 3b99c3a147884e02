//! How many tokens a second does a whole bulk job make, from the first prompt to the last token?
//!
//! The scheduler that runs jobs composes micro-batches of prompts and of rows that decode, as it does for one stage; no row ends
//! before it has all its tokens. The ceiling is what all of these micro-batches would take by the ceilings of the same run, one
//! after the other.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use scheduler::{Generated, Load, Request, RequestKey, Sampling, Scheduler, Span};
use stages::cost::{Balance, Estimator, NumberTypes, pieces};
use stages::profile::Ceilings;
use stages::{Dtypes, PAGE_TOKENS, Sharing, SpanOptions, Stage, StepSize};

use crate::bars;
use crate::decoding::Decoding;
use crate::items::Setting;
use crate::models::{self, Measured};

/// A job.
#[derive(Clone, Copy)]
struct Job {
    rows: usize,
    prompt_tokens: usize,
    output_tokens: usize,
    micro_batch_tokens: usize,
}

/// Steps of a kind until it is known: it is run, captured and launched.
const STEPS: usize = 3;

/// What a whole job is to reach of its ceiling.
const LEAST: f64 = 0.65;

impl Job {
    fn of(setting: &Setting) -> Job {
        match setting.is_small {
            true => Job { rows: 3, prompt_tokens: 20, output_tokens: 8, micro_batch_tokens: 32 },
            false => Job { rows: 256, prompt_tokens: 512, output_tokens: 256, micro_batch_tokens: 2048 },
        }
    }

    /// A short one with micro-batches as large.
    fn short(self) -> Job {
        Job { prompt_tokens: self.micro_batch_tokens / self.rows, output_tokens: STEPS, ..self }
    }

    /// Steps of every number of rows that captured ones are padded to, at the contexts that rows come to their end with, by which they
    /// are split where they are few: so that none is captured within the job itself.
    fn have_captured(&self, stage: &mut dyn Stage) -> Result<()> {
        let (context, pages_of_row) = (self.context_tokens(), self.pages_of_row());
        let few = [1, 2, 4].map(|rows| rows.min(self.rows));
        for rows in few.into_iter().chain((8..=self.rows).step_by(8)) {
            let batch = Decoding { rows, context, pages_of_row }.micro_batch(0, |_| 0);
            for _ in 0..STEPS {
                stage.step(&batch, None)?;
            }
        }
        Ok(())
    }

    fn context_tokens(&self) -> usize {
        self.prompt_tokens + self.output_tokens
    }

    fn pages_of_row(&self) -> usize {
        self.context_tokens().div_ceil(PAGE_TOKENS)
    }

    fn num_pages(&self) -> usize {
        self.rows * self.pages_of_row()
    }

    fn scheduler(&self) -> Scheduler {
        Scheduler::new(scheduler::Options {
            num_stages: 1,
            micro_batch_tokens: self.micro_batch_tokens,
            max_sequences: self.rows,
            num_pages: self.num_pages(),
            num_lanes: 1,
            page_tokens: PAGE_TOKENS,
            context_tokens: self.context_tokens(),
            efficient_tokens: 1,
            num_memories: 1,
            feeds_back: true,
            is_ahead: true,
        })
    }

    fn request(&self, row: usize, vocab: usize) -> Request {
        // Knuth's multiplicative hash: tokens that lie apart.
        let token = |at: usize| (((row * self.prompt_tokens + at) * 2_654_435_761) % vocab) as u32;
        Request {
            key: RequestKey(row as u128),
            prompt: (0..self.prompt_tokens).map(token).collect(),
            sampling: Arc::new(Sampling::greedy(self.output_tokens as u32)),
            sample: 0,
        }
    }

    /// Does all of it. Seconds, and what each micro-batch was.
    fn run(&self, stage: &mut dyn Stage, vocab: usize) -> Result<(f64, Vec<Load>)> {
        let mut scheduler = self.scheduler();
        for row in 0..self.rows {
            scheduler.submit(Arc::new(self.request(row, vocab)), Generated::default())?;
        }
        let (begun, mut loads, mut ended, mut in_flight) = (Instant::now(), Vec::new(), 0, 0);
        loop {
            while let Some(batch) = scheduler.next_micro_batch() {
                loads.push(batch.load());
                stage.queue(&Arc::new(batch), None)?.context("a micro-batch has no room")?;
                in_flight += 1;
            }
            if in_flight == 0 {
                break;
            }
            let output = stage.collect()?.output.context("a stage that is the whole model answers")?;
            ended += scheduler.complete(output, |_, _| false).len();
            in_flight -= 1;
        }
        let seconds = begun.elapsed().as_secs_f64();
        ensure!(ended == self.rows, "{ended} rows of {} came to their end", self.rows);
        Ok((seconds, loads))
    }
}

/// A line.
pub(crate) fn measure(measured: &Measured, setting: &Setting) -> Result<Vec<String>> {
    let (model, device, job) = (models::open(measured, setting)?, models::device(setting), Job::of(setting));
    let config = Arc::clone(&model.config);
    let dtypes = Dtypes { weights: measured.weights, kv: measured.kv };
    let part = Span { start: 0, end: config.blocks.len() }.into();
    let before = Ceilings::measure(&device, dtypes)?;
    let own_products =
        models::own_products(&setting.cuda(measured.weights, measured.kv, false)?, measured.weights);
    let context_tokens = job.context_tokens();
    let (rows, sequences) = (job.micro_batch_tokens, job.rows);
    let largest_step = Some(StepSize { rows, sequences, context_tokens, micro_batches: 2, arrivals: 0 });
    let options = SpanOptions { part, num_pages: job.num_pages(), context_tokens, largest_step };
    let mut stage = stages::load(&model, &device, dtypes, options)?;
    // Products find their algorithms, and steps are captured.
    stage.fill_pages(job.num_pages())?;
    job.short().run(&mut *stage, config.dims.vocab)?;
    job.have_captured(&mut *stage)?;
    let (seconds, loads) = job.run(&mut *stage, config.dims.vocab)?;
    drop(stage);
    let ceilings = before.max(Ceilings::measure(&device, dtypes)?);
    let types = NumberTypes { weights: dtypes.weights.into(), kv: dtypes.kv.into() };
    let roofline = ceilings.roofline();
    let estimator = Estimator { config: &config, roofline, types, balance: Balance::Roofline };
    let pieces = pieces(&config, None);
    let floor = estimator.stage_seconds(&pieces, 0..pieces.len(), 1, &Sharing::default());
    let least: f64 = loads.iter().map(|load| floor.of(*load)).sum();
    let tokens = (job.rows * job.output_tokens) as f64;
    let largest = loads.iter().map(|load| load.tokens()).reduce(f64::max).context("nothing was done")?;
    Ok(vec![format!(
        "{} rows, {} tokens in and {} out: {:.2} s, {:.0} tokens/s, {:.1} % of the ceiling of {:.0} tokens/s; {} micro-batches of up to {largest:.0} tokens; {}{}",
        job.rows,
        job.prompt_tokens,
        job.output_tokens,
        seconds,
        tokens / seconds,
        100.0 * least / seconds,
        tokens / least,
        loads.len(),
        bars::verdict(own_products.is_none() && least / seconds >= LEAST),
        models::own_ceiling(own_products.as_deref())
    )])
}
