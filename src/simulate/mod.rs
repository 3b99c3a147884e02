//! `spanwise simulate`: a whole job on a plan's pipeline under a virtual clock. An estimate, by rooflines.
//!
//! The scheduler is the one that runs jobs; only the stages and their devices are not there. Nothing is measured, and
//! the same command gives the same bytes.

mod lengths;
mod pipeline;
pub(crate) mod report;
mod table;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use configs::{JobFile, Stages};
use scheduler::{Lengths, Simulated, Simulation, Step};
use stages::cost::{Balance, PieceShape};

use crate::cli::{Format, SimulateArgs, TimesArg};
use crate::picture;
use crate::plan::answer::{self, Layout};
use crate::plan::report::device_names;
use crate::plan::setting::Setting;
use crate::replace;
use crate::simulate::lengths::{Kind, LengthDraw};
use crate::simulate::report::{Played, Report};
use crate::trace::TraceWriter;

/// Rows are played this many times those in flight where nobody says how many: enough to see a beginning, a
/// middle and an end.
const DEFAULT_ROUNDS: u64 = 4;

/// Plays a job, prints how it went, and draws it where that is asked for.
///
/// # Errors
/// A job file, model or list of devices that is wrong, or a trace or picture that cannot be written. A model that does not fit is
/// no error of these: what is missing is said as a plan says it, and the exit code is that of bad input.
pub(crate) fn simulate(args: &SimulateArgs) -> Result<ExitCode> {
    let job = crate::plan::load(&args.setting)?;
    let mut setting = crate::plan::setting(&args.setting, &job, Balance::Roofline)?;
    if args.cost == TimesArg::Measured {
        setting.measured = Some(crate::plan::measured(&args.setting, &job, &setting)?);
    }
    let pieces = setting.pieces();
    let Some(layout) = layout(&setting, &job, &pieces)? else {
        let refused = crate::plan::refuse(&setting, args.format)?;
        if let Some(path) = &args.svg {
            bail!("no picture for {}: nothing fits, so there is no job to play", path.display());
        }
        return Ok(refused);
    };
    let context_tokens = job.model.max_context_tokens.unwrap_or(setting.config.max_position_embeddings);
    let kinds = kinds(&setting)?;
    let (options, max_tokens) = pipeline::options(&setting, &pieces, &layout, context_tokens, &kinds)?;
    let most = context_tokens.min(options.cache_tokens() + 1);
    let rows = args.rows.or(setting.rows).unwrap_or(DEFAULT_ROUNDS * options.max_sequences as u64);
    let kinds = kinds.into_iter().filter(|kind| (kind.prompt_tokens as usize) < most).collect();
    let draw = LengthDraw { distribution: args.lengths, seed: args.seed, kinds };
    let simulation = pipeline::simulation(&setting, &pieces, &layout, options, max_tokens);
    let names = stage_names(&setting, &pieces, &layout);
    let simulated = play(&simulation, draw.rows(rows), args.trace.as_deref(), &names)?;
    let report = Report::of(Played {
        setting: &setting,
        pieces: &pieces,
        layout: &layout,
        options: &simulation.options,
        window: simulation.window,
        max_tokens,
        draw,
        simulated,
    });
    match args.format {
        Format::Json => crate::print(&serde_json::to_string_pretty(&report)?),
        Format::Text => table::lines(&report).iter().for_each(|line| crate::print(line)),
    }
    if let Some(path) = &args.svg {
        let name = picture::model_name(&job.model.path);
        picture::save(path, &picture::draw_timeline(&name, &report))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The job's own stages where it names any, else those of its plan; none where no plan fits.
fn layout(setting: &Setting, job: &JobFile, pieces: &[PieceShape]) -> Result<Option<Layout>> {
    let Stages::Blocks(blocks) = &job.pipeline.stages else {
        return Ok(answer::one_pipeline(setting, pieces));
    };
    let stages = pipeline::given_stages(setting, pieces, blocks)?;
    match answer::given(setting, pieces, stages.clone()) {
        Some(layout) => Ok(Some(layout)),
        None => bail!("{}", pipeline::lacking(setting, pieces, &stages)),
    }
}

/// The job's rows, those that are alike together.
fn kinds(setting: &Setting) -> Result<Vec<Kind>> {
    let tokens =
        |tokens: u64| u32::try_from(tokens.max(1)).context("a row has more tokens than can be counted");
    // Where the job does not say how long outputs are, they are taken to be as long as they may.
    let is_limit = setting.work.read.is_some_and(|read| !read.is_output_given);
    let mut rows_so_far = 0;
    (setting.work.lengths.pairs())
        .map(|(prompt, output, rows)| {
            rows_so_far += rows;
            let (prompt_tokens, output_tokens) = (tokens(prompt)?, tokens(output)?);
            let max_tokens = if is_limit { output_tokens } else { u32::MAX };
            Ok(Kind { prompt_tokens, output_tokens, max_tokens, rows_so_far })
        })
        .collect()
}

/// What a stage is called in a trace.
fn stage_names(setting: &Setting, pieces: &[PieceShape], layout: &Layout) -> Vec<String> {
    (layout.stages.iter().enumerate())
        .map(|(index, stage)| {
            let (first, last) = (&pieces[stage.pieces.start], &pieces[stage.pieces.end - 1]);
            let devices = device_names(setting, stage.devices.clone()).join(" ");
            format!("stage {index} {devices} blocks [{}, {})", first.block, last.block + 1)
        })
        .collect()
}

fn play(
    simulation: &Simulation<'_>,
    rows: impl Iterator<Item = Lengths>,
    trace: Option<&Path>,
    names: &[String],
) -> Result<Simulated> {
    let Some(path) = trace else { return Ok(simulation.run(rows, &mut |_| ())?) };
    let context = || format!("write trace {}", path.display());
    replace::check(path, replace::TRACE)?;
    let mut writer = TraceWriter::create(path, names).with_context(context)?;
    let mut written = Ok(());
    let simulated = simulation.run(rows, &mut |step| {
        if written.is_ok() {
            written = write_step(&mut writer, step);
        }
    })?;
    written.and_then(|()| writer.finish()).with_context(context)?;
    Ok(simulated)
}

fn write_step(writer: &mut TraceWriter, step: Step) -> std::io::Result<()> {
    let Step { stage, micro_batch, start, end, tokens, decode_tokens } = step;
    writer.step(stage, start.as_secs_f64(), end.as_secs_f64(), micro_batch, tokens, decode_tokens)
}
