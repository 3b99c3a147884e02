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
use configs::{JobFile, Purpose};
use scheduler::{Lengths, PlannedStage, Simulated, Simulation, Step};
use stages::cost::{Balance, PieceShape};

use crate::cli::{Format, LengthsArg, SimulateArgs, TimesArg};
use crate::picture;
use crate::plan::answer::{self, Layout};
use crate::plan::given::{given_stages, lacking};
use crate::plan::report::device_names;
use crate::plan::setting::Setting;
use crate::replace;
use crate::simulate::lengths::{Kind, LengthDraw};
use crate::simulate::report::{Played, Report};
use crate::trace::{TraceWriter, TracedStep};

/// Rows are played this many times those in flight where nobody says how many: enough to see a beginning, a
/// middle and an end.
const DEFAULT_ROUNDS: u64 = 4;

/// Plays a job, prints how it went, and draws it where that is asked for.
///
/// # Errors
/// A job file, model or list of devices that is wrong, or a trace or picture that cannot be written. A model that does not fit is
/// no error of these: what is missing is said as a plan says it, and the exit code is that of bad input.
pub(crate) fn simulate(args: &SimulateArgs) -> Result<ExitCode> {
    let job = crate::run::load_for(Purpose::Plan, &args.setting.job, &args.setting.sets)?.job;
    let lengths = args.setting.lengths.unwrap_or(LengthsArg::Exponential);
    let mut setting = crate::plan::setting(&args.setting, &job, Balance::Roofline, lengths)?;
    if args.cost == TimesArg::Measured {
        setting.measured = Some(crate::plan::measured(&args.setting, &job, &setting)?);
    } else {
        crate::plan::point_to_profile(&args.setting, &job, &mut setting);
    }
    let Some((pieces, replicas, layout)) = layout(&setting, &job)? else {
        let refused = crate::plan::refuse(&setting, args.format)?;
        if let Some(path) = &args.svg {
            bail!("no picture for {}: nothing fits, so there is no job to play", path.display());
        }
        return Ok(refused);
    };
    let kinds = kinds(&setting)?;
    let (options, max_tokens) = pipeline::options(&pieces, &layout, &kinds)?;
    let most = setting.context_tokens.min(options.lane_tokens() + 1);
    let in_flight = (options.max_sequences * replicas) as u64;
    let rows = args.rows.or(setting.rows).unwrap_or(DEFAULT_ROUNDS * in_flight);
    let kinds = kinds.into_iter().filter(|kind| (kind.prompt_tokens as usize) < most).collect();
    let draw = LengthDraw { distribution: lengths, seed: args.seed, kinds };
    let simulation = pipeline::simulation(&pieces, &layout, options, max_tokens);
    let names = stage_names(&setting, &pieces, &layout, replicas);
    let simulated = play(
        &simulation,
        replicas,
        |replica| draw.rows(replica, replicas, rows),
        args.trace.as_deref(),
        &names,
    )?;
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

/// A layout, the model in pieces as it has them, and how often it is there.
type InPieces = (Vec<PieceShape>, usize, Layout);

/// The job's own stages where it names any, else those of its plan; none where no plan fits.
fn layout(setting: &Setting, job: &JobFile) -> Result<Option<InPieces>> {
    let Some(given) = given_stages(setting, job)? else {
        let pieces = setting.pieces();
        let planned = answer::plan(setting, &pieces);
        return Ok(planned.map(|(replicas, layout)| (pieces, replicas, layout)));
    };
    match answer::given(setting, &given) {
        Some(layout) => Ok(Some((given.pieces, setting.replicas, layout))),
        None => bail!("{}", lacking(&setting.given_replica(), &given)),
    }
}

/// The job's rows, those that are alike together.
fn kinds(setting: &Setting) -> Result<Vec<Kind>> {
    let tokens =
        |tokens: u64| u32::try_from(tokens.max(1)).context("a row has more tokens than can be counted");
    let mut rows_so_far = 0;
    (setting.work.lengths.kinds())
        .map(|kind| {
            rows_so_far += kind.rows;
            let max_tokens = u32::try_from(kind.limit.max(1)).unwrap_or(u32::MAX);
            let (prompt_tokens, output_tokens) = (tokens(kind.prompt)?, tokens(kind.output)?);
            Ok(Kind { prompt_tokens, output_tokens, max_tokens, rows_so_far })
        })
        .collect()
}

/// What the stages of all replicas are called in a trace.
fn stage_names(setting: &Setting, pieces: &[PieceShape], layout: &Layout, replicas: usize) -> Vec<String> {
    let num_devices = setting.devices.num_devices() / replicas;
    let name = |replica: usize, (index, stage): (usize, &PlannedStage)| {
        let (first, last) = (&pieces[stage.pieces.start], &pieces[stage.pieces.end - 1]);
        let devices = stage.devices.start + replica * num_devices..stage.devices.end + replica * num_devices;
        let devices = device_names(setting, devices).join(" ");
        let of_replica = if replicas > 1 { format!("replica {replica} ") } else { String::new() };
        format!("{of_replica}stage {index} {devices} blocks [{}, {})", first.block, last.block + 1)
    };
    let of_replica = |replica| layout.stages.iter().enumerate().map(move |stage| name(replica, stage));
    (0..replicas).flat_map(of_replica).collect()
}

/// Plays each replica with rows of its own.
fn play<R: Iterator<Item = Lengths>>(
    simulation: &Simulation<'_>,
    replicas: usize,
    rows: impl Fn(usize) -> R,
    trace: Option<&Path>,
    names: &[String],
) -> Result<Vec<Simulated>> {
    let each = |observe: &mut dyn FnMut(usize, Step)| -> Result<Vec<Simulated>> {
        let one = |replica| Ok(simulation.run(rows(replica), &mut |step| observe(replica, step))?);
        (0..replicas).map(one).collect()
    };
    let Some(path) = trace else { return each(&mut |_, _| ()) };
    let context = || format!("write trace {}", path.display());
    replace::check(path, replace::TRACE)?;
    let mut writer = TraceWriter::create(path, names).with_context(context)?;
    let mut written = Ok(());
    let num_stages = simulation.stages.len();
    let simulated = each(&mut |replica, step| {
        if written.is_ok() {
            written = write_step(&mut writer, replica * num_stages + step.stage, step);
        }
    })?;
    written.and_then(|()| writer.finish()).with_context(context)?;
    Ok(simulated)
}

fn write_step(writer: &mut TraceWriter, row: usize, step: Step) -> std::io::Result<()> {
    let Step { stage: _, micro_batch, start, end, tokens, decode_tokens } = step;
    let (start_s, end_s) = (start.as_secs_f64(), end.as_secs_f64());
    writer.step(&TracedStep {
        row,
        start_s,
        end_s,
        micro_batch,
        tokens,
        decode_tokens,
        hop_bytes: None,
        collectives_s: None,
    })
}
