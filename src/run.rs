//! `spanwise run`: a job from its file to its report.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use actors::{JobOptions, JobProgress, PipelineOptions};
use anyhow::{Context, Result, bail};
use configs::{JobFile, Loaded, Purpose};
use jobs::{
    Grader, ModelText, ModelTextOptions, OutputFolder, Preparer, PromptOptions, Reader, RowOptions,
    SamplingOptions, Settings,
};
use serde_json::json;
use stages::{Device, Model, ModelConfig, Part};

use crate::cli::{ProgressKind, RunArgs};
use crate::ended::{self, Ended, Running};
use crate::first_run;
use crate::interrupt::{self, Interrupt};
use crate::kv_pages::KvPages;
use crate::layout::{StageLayout, device_names, of_replica};
use crate::live_trace::{LiveTrace, Prepared, TracedStage};
use crate::lower;
use crate::placement::{self, Occasion, Placement};
use crate::progress::{self, Display, Watched};
use crate::{cores, machine, profile, replace, say};

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
    let widened = lower::widened(model.narrow(), &job.model, &job.pipeline)?;
    widened.iter().for_each(|warning| say(&format!("warning: {warning}")));
    let kv = lower::kv_of_checkpoint(&job.model, &job.pipeline, &model.config);
    kv.iter().for_each(|note| say(&format!("note: {note}")));
    placement::check(job, &model)?;
    let machine = machine::detect();
    let crowded = cores::crowded(&job.pipeline, machine.cores.len());
    crowded.iter().for_each(|warning| say(&format!("warning: {warning}")));
    let unplaced = lower::pipeline(&job.model, &job.pipeline, &model.config, &machine)?;
    let Files { text, reader, folder, settings, created } =
        open_files(job, &model, unplaced.context_tokens, &how)?;
    let has_rows = progress::has_more_rows(&job.job.input, how.limit, folder.finished_rows()?);
    let occasion = Occasion {
        text: Arc::clone(&text),
        has_rows,
        profile_command: profile_command(&loaded, how.job_file.as_deref()),
        first_run: first_run::stages_on(&job.pipeline, folder.settings()?),
        accept_numerics: how.accept_numerics,
    };
    let placement = tokio::select! {
        placement = place(job, &model, occasion, unplaced.pages.clone()) => placement?,
        () = interrupt.clone().wait() => return Ok(ExitCode::from(interrupt::EXIT_CODE)),
    };
    placement.lines.iter().for_each(|line| say(line));
    let unplaced = unplaced.in_micro_batches_of(placement.micro_batch_tokens);
    let mut replicas = unplaced.with(&placement.stages)?;
    let numeric_profile = lower::numeric_profile(&replicas[0])?;
    let settings = settings.with_numerics(&numeric_profile).with_layout(first_run::shapes(&placement.stages));
    folder.check(&settings, how.accept_numerics)?;
    text.warnings().iter().for_each(|warning| say(&format!("warning: {warning}")));

    let trace = trace(how.trace.as_deref(), job, &placement)?;
    replicas.iter_mut().for_each(|replica| replica.step_log = trace.as_ref().map(Prepared::log));
    let plan = plan(job, &replicas, &placement);
    let limits = replicas[0].scheduler.clone();
    let pipelines = tokio::select! {
        pipelines = actors::start_replicas(&model, replicas) => pipelines?,
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
        clocks: pipelines.iter().map(|pipeline| Arc::clone(&pipeline.clock)).collect(),
        total_rows: progress::count_rows(&job.job.input, how.limit),
    };
    let display = Display::start(how.progress, watched);
    let tokenizer = text.tokenizer().cloned();
    let options = JobOptions {
        reader,
        writer,
        tokenizer,
        guides: text.guides().cloned(),
        created,
        limits,
        max_error_rate: job.job.max_error_rate,
        checkpoint_tokens: job.job.checkpoint_tokens,
        progress: Arc::clone(&progress),
    };
    let outcome = actors::run_job(&pipelines, options, interrupt.wait()).await;
    let clocks = pipelines.iter().flat_map(|pipeline| &pipeline.stage_clocks);
    let stages = clocks.map(|clock| clock.read()).collect();
    let running = Running { started_at, load, run: began.elapsed(), stages };
    drop(display);
    let outcome = match outcome {
        Ok(outcome) => outcome,
        Err(error) => return Ok(ended::stopped(error)),
    };

    let ended = Ended {
        loaded: &loaded,
        model: &model,
        pipelines: &pipelines,
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
async fn place(job: &JobFile, model: &Model, occasion: Occasion, pages: KvPages) -> Result<Placement> {
    let (job, model) = (job.clone(), model.clone());
    let place = move || placement::place(&job, &model, &occasion, pages);
    tokio::task::spawn_blocking(place).await.context("place the stages")?
}

/// The command that measures what a job's stages are cut by.
fn profile_command(loaded: &Loaded, job_file: Option<&Path>) -> String {
    let Some(path) = job_file else { return "spanwise profile with the job's own file".to_owned() };
    let sets: Vec<String> = loaded.overrides.iter().map(|set| format!("{}={}", set.key, set.value)).collect();
    profile::command(path, sets.iter().map(String::as_str))
}

/// The file of a run's steps, where one is wanted, with a row for each stage and for each rank where there are several.
fn trace(path: Option<&Path>, job: &JobFile, placement: &Placement) -> Result<Option<Prepared>> {
    let Some(path) = path else { return Ok(None) };
    let traced = |(index, (replica, stage)): (usize, (usize, &StageLayout))| {
        let (of, devices) = (of_replica(&job.pipeline, replica), device_names(&job.pipeline, replica, stage));
        let name = format!("{of}stage {index} {devices} blocks {}", stage.part);
        let ranks = match stage.devices.len() {
            1 => Vec::new(),
            _ => (devices.split('+').enumerate())
                .map(|(rank, device)| format!("{of}stage {index} rank {rank} {device}"))
                .collect(),
        };
        TracedStage { name, ranks }
    };
    let stages: Vec<TracedStage> = placement.numbered().enumerate().map(traced).collect();
    Prepared::create(path, &stages).map(Some)
}

/// Reads a job file with what lies over it.
///
/// # Errors
/// What is wrong with them.
pub(crate) fn load_for(purpose: Purpose, path: &Path, sets: &[String]) -> Result<Loaded> {
    if path.is_dir() {
        bail!(
            "{} is a folder, expected a job file, such as configs/quickstart.toml\n\
             hint: `spanwise generate MODEL_DIR PROMPT` needs no job file",
            path.display()
        );
    }
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
        repetition_penalty: sampling.repetition_penalty,
        frequency_penalty: sampling.frequency_penalty,
        presence_penalty: sampling.presence_penalty,
        logit_bias: None,
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

/// Which blocks run where, how much each holds, and what was expected of it, for the manifest.
fn plan(job: &JobFile, replicas: &[PipelineOptions], placement: &Placement) -> serde_json::Value {
    let seconds = placement.seconds.iter().cycle(); // The same in all replicas.
    let options = &replicas[0];
    let stages: Vec<_> = (replicas.iter().flat_map(|replica| &replica.stages))
        .zip(placement.numbered())
        .zip(seconds)
        .map(|((stage, (replica, layout)), seconds)| {
            let threads = match &stage.devices[0] {
                Device::Cpu { threads, .. } => *threads,
                Device::Reference | Device::Cuda { .. } => 1,
            };
            let Part { blocks, first_column, end_column } = stage.part;
            let exceptions = layout.sharing.exceptions();
            json!({
                "replica": replica,
                "device": device_names(&job.pipeline, replica, layout),
                "blocks": [blocks.start, blocks.end],
                "first_column": first_column,
                "end_column": end_column,
                "ranks": stage.devices.len(),
                "attention_by_sequences": exceptions.attention_by_sequences,
                "attention_on_first_rank": exceptions.attention_on_first_rank,
                "ffn_on_first_rank": exceptions.ffn_on_first_rank,
                "threads": threads,
                "predicted_seconds": seconds,
            })
        })
        .collect();
    let load = placement.load;
    json!({
        "replicas": replicas.len(),
        "stages": stages,
        "cost": placement.source.name(),
        "micro_batch": {
            "decode_tokens": load.decode_tokens,
            "decode_context": load.decode_context,
            "prefill_tokens": load.prefill_tokens,
            "prefill_context": load.prefill_context,
        },
        "micro_batch_tokens": options.scheduler.micro_batch_tokens,
        "context_tokens": options.scheduler.context_tokens,
        "kv_cache_tokens": options.scheduler.cache_tokens(),
    })
}

/// Now.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
