//! `spanwise run`: a job from its file to its report.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use actors::{JobOptions, JobOutcome, JobProgress, Pipeline, PipelineOptions, StageTimes};
use anyhow::{Context, Result};
use configs::{JobFile, Loaded, Purpose};
use jobs::{
    Counts, FolderLock, Grader, InputRecord, Manifest, ModelRecord, ModelText, ModelTextOptions,
    NumericProfile, OutputFolder, Preparer, PromptOptions, Reader, RowOptions, SamplingOptions, Scores,
    Settings, Status, Timings, TokenTotals,
};
use serde_json::json;
use stages::{Device, Model, ModelConfig, Part};

use crate::cli::{ProgressKind, RunArgs};
use crate::first_run;
use crate::hindsight::BetterCut;
use crate::interrupt::{self, Interrupt};
use crate::layout::StageLayout;
use crate::live_trace::{LiveTrace, Prepared};
use crate::lower;
use crate::placement::{self, Occasion, Placement, Source};
use crate::progress::{self, Display, Watched};
use crate::report::{Report, StageLine};
use crate::{machine, print, profile, replace, say};

/// A job that failed and can be run again, once what stopped it is out of the way.
const EXIT_FAILED: u8 = 1;

/// A job that was stopped for its many errors.
const EXIT_TOO_MANY_ERRORS: u8 = 3;

/// Runs a job.
///
/// # Errors
/// What keeps the job from starting. A job that started ends with a report and an exit code.
pub(crate) async fn run(args: RunArgs) -> Result<ExitCode> {
    let loaded = load_for(Purpose::Run, &args.job, &args.sets)?;
    let how = How {
        job_file: Some(args.job),
        limit: args.limit,
        start: if args.fresh { Start::Fresh } else { Start::GoOn },
        accept_numerics: args.accept_numerics,
        progress: args.progress,
        trace: args.trace,
    };
    run_job(loaded, how).await
}

/// What a run does beside what its job says.
pub(crate) struct How {
    /// Where the job was read from, if it was a file.
    pub(crate) job_file: Option<PathBuf>,
    pub(crate) limit: Option<u64>,
    pub(crate) start: Start,
    pub(crate) accept_numerics: bool,
    pub(crate) progress: ProgressKind,
    /// Where to write every step to.
    pub(crate) trace: Option<PathBuf>,
}

/// What becomes of the lines that are there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    /// They stay.
    GoOn,
    /// Answers stay, and rows that failed are computed once more.
    Retry,
    /// They are thrown away.
    Fresh,
}

/// Runs a job.
///
/// # Errors
/// As [`run`].
pub(crate) async fn run_job(loaded: Loaded, how: How) -> Result<ExitCode> {
    let interrupt = Interrupt::listen()?;
    let job = &loaded.job;
    let started = Instant::now();
    jobs::check_paths(&job.job.input, &job.job.output)?;
    how.trace.as_deref().map_or(Ok(()), |path| replace::check(path, replace::TRACE))?;

    let (model, warnings) = Model::open(&job.model.path, job.model.random_weights).context("load model")?;
    warnings.0.iter().for_each(|warning| say(&format!("warning: {warning}")));
    placement::check(job, &model)?;
    let unplaced = lower::pipeline(&job.model, &job.pipeline, &model.config, &machine::detect())?;
    let Files { text, reader, folder, settings, created } =
        open_files(job, &model, unplaced.scheduler.context_tokens, &how)?;
    let has_rows = progress::has_more_rows(&job.job.input, how.limit, folder.finished_rows()?);
    let occasion = Occasion {
        has_rows,
        profile_command: profile_command(&loaded, how.job_file.as_deref()),
        first_run: folder.layout()?,
        accept_numerics: how.accept_numerics,
    };
    let placement = tokio::select! {
        placement = place(job, &model, occasion) => placement?,
        () = interrupt.clone().wait() => return Ok(ExitCode::from(interrupt::EXIT_CODE)),
    };
    placement.lines.iter().for_each(|line| say(line));
    let mut options = unplaced.with(&placement.stages);
    let numeric_profile = lower::numeric_profile(&options);
    let settings = settings.with_numerics(&numeric_profile).with_layout(first_run::shapes(&placement.stages));
    folder.check(&settings, how.accept_numerics)?;
    text.warnings().iter().for_each(|warning| say(&format!("warning: {warning}")));

    let trace = trace(how.trace.as_deref(), job, &placement.stages)?;
    options.step_log = trace.as_ref().map(Prepared::log);
    let plan = plan(job, &options, &placement);
    let limits = options.scheduler.clone();
    let pipeline = tokio::select! {
        pipeline = actors::start(&model, options) => pipeline?,
        () = interrupt.clone().wait() => return Ok(ExitCode::from(interrupt::EXIT_CODE)),
    };
    let load = started.elapsed();
    // Nothing was changed so far: what keeps a job from starting leaves all as it was.
    let (writer, earlier) = folder.begin(order(job.job.order), &settings, created, how.accept_numerics)?;
    let reader = reader.after(earlier);
    let lock = writer.lock();

    let (started_at, began) = (unix_seconds(), Instant::now());
    let trace = trace.map(|trace| trace.begin(began));
    let progress = Arc::new(JobProgress::default());
    let watched = Watched {
        progress: Arc::clone(&progress),
        clock: Arc::clone(&pipeline.clock),
        total_rows: progress::count_rows(&job.job.input, how.limit),
    };
    let display = Display::start(how.progress, watched);
    let tokenizer = text.tokenizer().cloned();
    let options = JobOptions {
        reader,
        writer,
        tokenizer,
        created,
        limits,
        max_error_rate: job.job.max_error_rate,
        checkpoint_tokens: job.job.checkpoint_tokens,
        progress: Arc::clone(&progress),
    };
    let outcome = actors::run_job(&pipeline, options, interrupt.wait()).await?;
    let stages = pipeline.stage_clocks.iter().map(|clock| clock.read()).collect();
    let running = Running { started_at, load, run: began.elapsed(), stages };
    drop(display);

    let ended = Ended {
        loaded: &loaded,
        model: &model,
        pipeline: &pipeline,
        placement,
        plan,
        numeric_profile,
        running,
        trace: trace.map(LiveTrace::end),
        outcome,
        progress,
        limit: how.limit,
        _lock: lock,
    };
    ended.report().await
}

/// Places a job's stages, on a thread of its own: a profile may have to be measured.
async fn place(job: &JobFile, model: &Model, occasion: Occasion) -> Result<Placement> {
    let (job, model) = (job.clone(), model.clone());
    let place = move || placement::place(&job, &model, &occasion);
    tokio::task::spawn_blocking(place).await.context("place the stages")?
}

/// The command that measures what a job's stages are cut by.
fn profile_command(loaded: &Loaded, job_file: Option<&Path>) -> String {
    let Some(path) = job_file else { return "spanwise profile with the job's own file".to_owned() };
    let sets: Vec<String> = loaded.overrides.iter().map(|set| format!("{}={}", set.key, set.value)).collect();
    profile::command(path, sets.iter().map(String::as_str))
}

/// The file of a run's steps, where one is wanted, with a row for each stage.
fn trace(path: Option<&Path>, job: &JobFile, stages: &[StageLayout]) -> Result<Option<Prepared>> {
    let Some(path) = path else { return Ok(None) };
    let name = |(index, stage): (usize, &StageLayout)| {
        format!("stage {index} {} blocks {}", device_names(job, stage), stage.part)
    };
    let names: Vec<String> = stages.iter().enumerate().map(name).collect();
    Prepared::create(path, &names).map(Some)
}

/// Reads a job file with what lies over it.
///
/// # Errors
/// What is wrong with them.
pub(crate) fn load_for(purpose: Purpose, path: &Path, sets: &[String]) -> Result<Loaded> {
    // A variable that is not UTF-8 is none of ours.
    let environment =
        std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)));
    let folder = std::env::current_dir().context("find the working folder")?;
    Ok(configs::load_for(purpose, path, sets, environment, &folder)?)
}

/// The files of a job, checked and open.
struct Files {
    text: Arc<ModelText>,
    reader: Reader,
    folder: OutputFolder,
    settings: Settings,
    /// When the job's first run began, in Unix seconds.
    created: u64,
}

fn open_files(job: &JobFile, model: &Model, context_tokens: usize, how: &How) -> Result<Files> {
    let folder = OutputFolder::open(&job.job.output, how.start == Start::Fresh)?;
    let folder = if how.start == Start::Retry { folder.for_retry() } else { folder };
    let began_at = folder.unix_seconds()?.unwrap_or_else(unix_seconds);
    let text = open_text(&job.model, &model.config, began_at)?;
    let options = row_options(job, model.identity.clone(), context_tokens)?;
    let preparer = Preparer::new(Arc::clone(&text), options)?;
    let settings = preparer.settings();
    let reader = Reader::open(&job.job.input, preparer, how.limit)?;
    Ok(Files { text, reader, folder, settings, created: began_at })
}

/// What a job says about all its rows.
pub(crate) fn row_options(
    job: &JobFile,
    model_identity: String,
    context_tokens: usize,
) -> Result<RowOptions> {
    let prompt = job
        .prompt
        .as_ref()
        .map(|prompt| PromptOptions { system: prompt.system.clone(), user: prompt.user.clone() });
    Ok(RowOptions {
        model_identity,
        prompt,
        grader: job.grade.as_ref().map(|grade| match grade.kind {
            configs::Grader::Boxed => Grader::Boxed,
        }),
        sampling: sampling(job),
        seed: job.job.seed,
        max_context_tokens: u32::try_from(context_tokens).context("the context is too long")?,
    })
}

/// The textual side of a model, as of a moment in Unix seconds.
pub(crate) fn open_text(
    files: &configs::Model,
    config: &ModelConfig,
    unix_seconds: u64,
) -> Result<Arc<ModelText>> {
    let options = ModelTextOptions {
        vocab_size: config.dims.vocab,
        eos_token_ids: config.eos_token_ids.clone(),
        unix_seconds,
    };
    Ok(Arc::new(ModelText::open(&files.path, &options)?))
}

fn sampling(job: &JobFile) -> SamplingOptions {
    let sampling = &job.sampling;
    SamplingOptions {
        temperature: sampling.temperature,
        top_p: sampling.top_p,
        top_k: sampling.top_k.map(i64::from),
        min_p: sampling.min_p,
        seed: sampling.seed,
        max_tokens: sampling.max_tokens,
        min_tokens: sampling.min_tokens,
        stop: sampling.stop.clone(),
        stop_token_ids: sampling.stop_token_ids.clone(),
        ignore_eos: sampling.ignore_eos,
        n: job.grade.as_ref().map(|grade| grade.runs),
    }
}

fn order(order: configs::Order) -> jobs::Order {
    match order {
        configs::Order::Input => jobs::Order::Input,
        configs::Order::Completion => jobs::Order::Completion,
    }
}

/// The devices of a stage, as the job calls them.
fn device_names(job: &JobFile, stage: &StageLayout) -> String {
    let names = job.pipeline.devices[stage.devices.clone()].iter().map(ToString::to_string);
    names.collect::<Vec<_>>().join("+")
}

/// Bytes that a stage has handed on for so many tokens: the residual stream in f32, and the sums of an FFN that is cut.
fn hop_bytes(part: Part, tokens: u64, config: &ModelConfig) -> u64 {
    let arrays = match (part.is_last(config), part.end_column) {
        (true, _) => 0,
        (false, None) => 1,
        (false, Some(_)) => 2,
    };
    arrays * tokens * (config.dims.hidden * size_of::<f32>()) as u64
}

/// Which blocks run where, how much each holds, and what was expected of it, for the manifest.
fn plan(job: &JobFile, options: &PipelineOptions, placement: &Placement) -> serde_json::Value {
    let stages: Vec<_> = (options.stages.iter().zip(&placement.stages))
        .zip(&placement.seconds)
        .map(|((stage, layout), seconds)| {
            let threads = match &stage.devices[0] {
                Device::Cpu { threads, .. } => *threads,
                Device::Reference | Device::Cuda { .. } => 1,
            };
            let Part { blocks, first_column, end_column } = stage.part;
            json!({
                "device": device_names(job, layout),
                "blocks": [blocks.start, blocks.end],
                "first_column": first_column,
                "end_column": end_column,
                "ranks": stage.devices.len(),
                "threads": threads,
                "predicted_seconds": seconds,
            })
        })
        .collect();
    let load = placement.load;
    json!({
        "stages": stages,
        "cost": placement.source.name(),
        "micro_batch": {
            "decode_tokens": load.decode_tokens,
            "decode_context": load.decode_context,
            "prefill_tokens": load.prefill_tokens,
            "prefill_context": load.prefill_context,
        },
        "context_tokens": options.scheduler.context_tokens,
        "kv_cache_tokens": options.scheduler.cache_tokens(),
    })
}

/// When a run began, and where its time went.
struct Running {
    started_at: u64,
    load: Duration,
    run: Duration,
    stages: Vec<StageTimes>,
}

/// A run that has come to its end, one way or another.
struct Ended<'a> {
    loaded: &'a Loaded,
    model: &'a Model,
    pipeline: &'a Pipeline,
    placement: Placement,
    plan: serde_json::Value,
    numeric_profile: NumericProfile,
    running: Running,
    /// What became of the trace, where one was wanted.
    trace: Option<String>,
    outcome: JobOutcome,
    progress: Arc<JobProgress>,
    limit: Option<u64>,
    /// Until the manifest is there.
    _lock: FolderLock,
}

impl Ended<'_> {
    /// Writes the manifest, prints the report and chooses the exit code.
    async fn report(self) -> Result<ExitCode> {
        let (stages, better, costs) = self.stages();
        let scores = self.scores()?;
        let manifest = self.manifest(&stages, scores);
        let folder = &self.loaded.job.job.output;
        let has_manifest = manifest.write(folder);
        let report = self.figures(&manifest, stages, better, costs).await;
        report.lines().iter().for_each(|line| print(line));
        if let Some(failure) = &self.outcome.failure {
            // What keeps the manifest from being written is mostly what stopped the job.
            say(&format!("error: the job stopped: {failure}"));
            say("hint: what is done is kept; the same command goes on from there");
            return Ok(ExitCode::from(match failure {
                actors::Error::TooManyErrors { .. } => EXIT_TOO_MANY_ERRORS,
                _ => EXIT_FAILED,
            }));
        }
        has_manifest?;
        match self.outcome.was_interrupted {
            true => Ok(ExitCode::from(interrupt::EXIT_CODE)),
            false => Ok(ExitCode::SUCCESS),
        }
    }

    /// How well the rows were answered, once all are.
    fn scores(&self) -> Result<Option<Scores>> {
        let JobFile { job, grade, .. } = &self.loaded.job;
        let is_complete = self.outcome.failure.is_none() && !self.outcome.was_interrupted;
        match grade {
            Some(_) if is_complete => Ok(Some(Scores::read(&job.output)?)),
            _ => Ok(None),
        }
    }

    /// What each stage has done and should have, and the cut that would have been faster.
    fn stages(&self) -> (Vec<StageLine>, Option<BetterCut>, Source) {
        let Running { stages, .. } = &self.running;
        let (hindsight, costs) = self.placement.judge(stages);
        let lines = (stages.iter().zip(&self.placement.stages).enumerate())
            .map(|(index, (times, layout))| StageLine {
                device: device_names(&self.loaded.job, layout),
                part: layout.part,
                ranks: layout.devices.len(),
                collectives: self.pipeline.collective_clocks.get(index).map(|clock| clock.read()),
                hop_bytes: hop_bytes(layout.part, times.tokens, &self.model.config),
                times: times.clone(),
                predicted: hindsight.predicted[index],
            })
            .collect();
        (lines, hindsight.better, costs)
    }

    fn manifest(&self, stages: &[StageLine], scores: Option<Scores>) -> Manifest {
        let JobFile { model, job, .. } = &self.loaded.job;
        let written = self.outcome.written;
        let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let unread = || InputRecord { path: job.input.clone(), blake3: String::new(), bytes: 0, rows: 0 };
        let input = self.outcome.input.clone().unwrap_or_else(unread);
        Manifest {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            status: match (&self.outcome.failure, self.outcome.was_interrupted) {
                (Some(_), _) => Status::Failed,
                (None, true) => Status::Interrupted,
                (None, false) => Status::Complete,
            },
            model: ModelRecord { path: model.path.clone(), identity: self.model.identity.clone() },
            counts: Counts {
                total: input.rows.max(written.output_lines + written.error_lines),
                completed: written.output_lines,
                failed: written.error_lines,
                resumed: count(&self.progress.resumed),
                stale: written.stale_lines,
            },
            input,
            limit: self.limit,
            config: self.config(),
            plan: self.plan.clone(),
            stages: stages.iter().map(StageLine::record).collect(),
            numeric_profile: self.numeric_profile.clone(),
            tokens: TokenTotals { prompt: written.prompt_tokens, generated: written.generated_tokens },
            scores,
            timings: Timings {
                started_at: self.running.started_at,
                finished_at: unix_seconds(),
                load_seconds: self.running.load.as_secs_f64(),
                run_seconds: self.running.run.as_secs_f64(),
                scheduling_seconds: self.pipeline.clock.handling().as_secs_f64(),
                reader_cpu_seconds: count(&self.progress.reader_cpu_ns) as f64 / 1e9,
                writer_cpu_seconds: count(&self.progress.writer_cpu_ns) as f64 / 1e9,
            },
        }
    }

    /// The job file as it took effect, and what was set from outside of it.
    fn config(&self) -> serde_json::Value {
        let mut config = json!(self.loaded.job);
        config["overrides"] = json!(self.loaded.overrides);
        config
    }

    async fn figures(
        &self,
        manifest: &Manifest,
        stages: Vec<StageLine>,
        better: Option<BetterCut>,
        costs: Source,
    ) -> Report {
        Report {
            scores: manifest.scores.clone(),
            rows_completed: manifest.counts.completed,
            rows_failed: manifest.counts.failed,
            rows_resumed: manifest.counts.resumed,
            stale_lines: manifest.counts.stale,
            prompt_tokens: self.progress.prompt_tokens.load(Ordering::Relaxed),
            generated_tokens: self.progress.generated_tokens.load(Ordering::Relaxed),
            load: self.running.load,
            run: self.running.run,
            handling: self.pipeline.clock.handling(),
            reader_cpu: Duration::from_nanos(self.progress.reader_cpu_ns.load(Ordering::Relaxed)),
            writer_cpu: Duration::from_nanos(self.progress.writer_cpu_ns.load(Ordering::Relaxed)),
            stages,
            costs,
            better,
            trace: self.trace.clone(),
            scheduler: self.pipeline.scheduler_stats().await,
            peak_bytes: machine::peak_bytes(),
            overrides: (self.loaded.overrides.iter())
                .map(|set| format!("{} = {} ({})", set.key, set.value, set.source))
                .collect(),
            output: self.loaded.job.job.output.display().to_string(),
        }
    }
}

/// Now.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
