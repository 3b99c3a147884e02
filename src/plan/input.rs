//! The rows that a job is planned for: those of its input, read and tokenized as a run would, or what `[plan]` says in
//! their place.
//!
//! Of the input only counts stay. How long answers will be is not known before: each is taken to be as long as
//! it may, or as `[plan] output_tokens` says.

use std::num::NonZeroU64;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use configs::JobFile;
use indicatif::{ProgressBar, ProgressStyle};
use jobs::{ModelText, PreparedRow, Preparer, Reader, RejectedRow, Row};
use stages::ModelConfig;

use crate::cli::LengthsArg;
use crate::plan::lengths::Lengths;
use crate::text::grouped;
use crate::{lower, run};

/// The rows of a job, by their lengths.
#[derive(Debug, Clone, Default)]
pub(crate) struct Work {
    /// Of the rows that were looked at and are right.
    pub(crate) lengths: Lengths,
    /// All rows of the job, those that have no answer included; none where nobody has said.
    pub(crate) rows: Option<u64>,
    /// What was read of the input, if it was.
    pub(crate) read: Option<Read>,
}

/// What the input's rows were found to be.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Read {
    /// Rows of the file.
    pub(crate) rows: u64,
    /// Rows of these that were looked at.
    pub(crate) looked_at: u64,
    /// Of those: prompts that leave no room in the context.
    pub(crate) too_long: u64,
    /// Of those: lines that are no request.
    pub(crate) refused: u64,
    /// Whether `[plan]` says how long prompts are, and outputs.
    pub(crate) is_prompt_given: bool,
    pub(crate) is_output_given: bool,
}

impl Work {
    /// What `[plan]` says, and where it is silent what the input has; each `every`-th row of it is looked at.
    ///
    /// # Errors
    /// Lengths beyond the context; an input that cannot be read, or has no row that could be run.
    pub(crate) fn of(job: &JobFile, config: &ModelConfig, every: NonZeroU64) -> Result<Self> {
        let context = lower::context_tokens(&job.model, config)?;
        let plan = job.plan.clone().unwrap_or_default();
        let tokens = [plan.prompt_tokens, plan.output_tokens].map(Option::unwrap_or_default);
        let together = tokens[0].saturating_add(tokens[1]);
        if together > context {
            bail!(
                "[plan] prompt_tokens and output_tokens: found {together} together, the context is {context}"
            );
        }
        let rows = plan.rows.map(|rows| rows as u64);
        let given = Given {
            prompt: plan.prompt_tokens.map(|n| n as u64),
            output: plan.output_tokens.map(|n| n as u64),
        };
        if let Given { prompt: Some(prompt), output: Some(output) } = given {
            let lengths = Lengths::alike(prompt, output, context as u64 - prompt);
            return Ok(Work { lengths, rows, read: None });
        }
        if job.job.input.as_os_str().is_empty() {
            bail!(
                "no lengths to plan for: the job has neither [plan] prompt_tokens and output_tokens nor a [job] input\n\
                 hint: add one or the other"
            );
        }
        let reader = open(job, config, context)?.sampled(every);
        let work = given.read(reader, &job.job.input, context as u64)?;
        Ok(Work { rows: rows.or(work.rows), ..work })
    }

    /// Sequences of the whole job: those that were counted stand for the rows that were not looked at.
    pub(crate) fn sequences(&self) -> Option<u64> {
        let looked_at = self.read.map_or(1, |read| read.looked_at);
        let share = self.lengths.sequences() as f64 / looked_at as f64;
        self.rows.map(|rows| ((rows as f64 * share).round() as u64).max(1))
    }

    /// So many of the rows that were looked at, in rows of the whole job.
    pub(crate) fn of_all(&self, looked_at: u64) -> Option<u64> {
        let read = self.read?;
        self.rows.map(|rows| (rows as f64 * looked_at as f64 / read.looked_at as f64).round() as u64)
    }
}

/// The first `rows` rows of a job's input, as `text` makes prompts of them. Where `[plan]` does not say how long answers are,
/// each has `output` tokens, as far as its own `max_tokens` allow.
///
/// # Errors
/// An input that cannot be read, or that begins with no row that could be run.
pub(crate) fn first_rows(
    job: &JobFile,
    text: &Arc<ModelText>,
    context: usize,
    rows: u64,
    output: u64,
) -> Result<Lengths> {
    let plan = job.plan.clone().unwrap_or_default();
    let given = Given {
        prompt: plan.prompt_tokens.map(|n| n as u64),
        output: Some(plan.output_tokens.map_or(output, |n| n as u64)),
    };
    let reader = reader(job, Arc::clone(text), context, Some(rows))?;
    Ok(given.read(reader, &job.job.input, context as u64)?.lengths)
}

fn open(job: &JobFile, config: &ModelConfig, context: usize) -> Result<Reader> {
    let text = run::open_text(&job.model, config, run::unix_seconds())?;
    text.warnings().iter().for_each(|warning| crate::say(&format!("warning: {warning}")));
    reader(job, text, context, None)
}

fn reader(job: &JobFile, text: Arc<ModelText>, context: usize, limit: Option<u64>) -> Result<Reader> {
    // Identity and numbers decide draws, and no lengths.
    let options = run::row_options(job, String::new(), context)?;
    Ok(Reader::open(&job.job.input, Preparer::new(text, options)?, limit)?)
}

/// Lengths that `[plan]` says.
#[derive(Debug, Clone, Copy)]
struct Given {
    prompt: Option<u64>,
    output: Option<u64>,
}

impl Given {
    /// Counts all rows of an input.
    fn read(self, mut reader: Reader, input: &Path, context: u64) -> Result<Work> {
        let mut lengths = Lengths::default();
        let mut read = Read {
            is_prompt_given: self.prompt.is_some(),
            is_output_given: self.output.is_some(),
            ..Read::default()
        };
        let mut first_refused = None;
        let mut watch = Watch::start(input);
        while let Some(row) = reader.next() {
            read.looked_at += 1;
            match row? {
                Row::Request(row) => {
                    let RowLengths { prompt, output, limit } = self.of_row(&row, context);
                    lengths.add(prompt, output, limit, row.reply.choices.into());
                }
                Row::Rejected(row) if row.error.code == "context_length_exceeded" => read.too_long += 1,
                Row::Rejected(row) => {
                    read.refused += 1;
                    first_refused.get_or_insert(row);
                }
                Row::Finished(_) => unreachable!("a plan knows of no earlier run"),
            }
            watch.look(reader.position());
        }
        drop(watch);
        (read.rows, _) = reader.position();
        check(input, &lengths, &read, first_refused)?;
        Ok(Work { lengths, rows: Some(read.rows), read: Some(read) })
    }

    /// Tokens of a row: none generates more than it may.
    fn of_row(self, row: &PreparedRow, context: u64) -> RowLengths {
        let own = u64::from(row.request.sampling.max_tokens);
        let prompt = self.prompt.unwrap_or(row.request.prompt.len() as u64);
        let limit = own.min(context - prompt);
        RowLengths { prompt, output: self.output.unwrap_or(own).min(limit), limit }
    }
}

/// Tokens of a row's prompt and output, and the most that its output may have.
struct RowLengths {
    prompt: u64,
    output: u64,
    limit: u64,
}

fn check(input: &Path, lengths: &Lengths, read: &Read, refused: Option<RejectedRow>) -> Result<()> {
    let (path, rows) = (input.display(), read.looked_at);
    if rows == 0 {
        bail!(
            "{path} has no rows, there is nothing to plan\nhint: give [plan] prompt_tokens and output_tokens to plan without it"
        );
    }
    if let (0, Some(row)) = (lengths.rows(), refused) {
        bail!("none of the {rows} rows of {path} is right: line {}: {}", row.line, row.error.message);
    }
    if lengths.rows() == 0 {
        bail!("each of the {rows} prompts of {path} is longer than the context");
    }
    if lengths.mix(LengthsArg::Fixed).is_none() {
        bail!("no row of {path} generates a token, and plans are for generated tokens");
    }
    Ok(())
}

/// Between two lines about the reading, where there is no terminal.
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);

/// Rows between two looks at the clock.
const ROWS_A_LOOK: u64 = 64;

/// Says how far the reading is: a bar on a terminal, plain lines elsewhere.
struct Watch {
    bar: ProgressBar,
    bytes: u64,
    rows: u64,
    said: Instant,
}

impl Watch {
    fn start(input: &Path) -> Self {
        let bytes = input.metadata().map_or(0, |metadata| metadata.len());
        let style = ProgressStyle::with_template("{bar:30} {percent} % of the input  {msg}")
            .expect("the template is right");
        Watch { bar: ProgressBar::new(bytes).with_style(style), bytes, rows: 0, said: Instant::now() }
    }

    fn look(&mut self, (rows, bytes): (u64, u64)) {
        self.rows += 1;
        if !self.rows.is_multiple_of(ROWS_A_LOOK) {
            return;
        }
        self.bar.set_position(bytes);
        if self.bar.is_hidden() && self.said.elapsed() > PLAIN_INTERVAL {
            self.said = Instant::now();
            let share = bytes as f64 / self.bytes.max(1) as f64 * 100.0;
            crate::say(&format!("{} rows of the input read, {share:.0} %", grouped(rows)));
        }
        self.bar.set_message(format!("{} rows", grouped(rows)));
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
