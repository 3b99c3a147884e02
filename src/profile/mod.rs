//! `spanwise profile`: measures what a model's blocks cost on a device of this machine, and keeps it.

mod table;

use std::path::Path;

use anyhow::{Context, Result};
use configs::{AutoCount, DeviceKind, Pipeline, TENSOR_PARALLEL_WIDTHS, TensorParallel};
use stages::profile::{Effort, MeasureOptions, Missing, Profile, Store, Stored, measure};
use stages::{Device, Model, ModelConfig};

use crate::cli::{Format, ProfileArgs};
use crate::target::{self, Target};
use crate::{gpus, lower, machine, print, say};

/// Largest micro-batch that is measured on a GPU where nobody says: products are at their ceiling at some hundred rows, and
/// prompts come in chunks of thousands.
const GPU_MICRO_BATCH_TOKENS: usize = 4096;

/// Measures, stores and prints.
///
/// # Errors
/// A model or job file that cannot be read, a device that is not there, a folder that cannot be written.
pub(crate) fn profile(args: &ProfileArgs) -> Result<()> {
    let target = args.target()?;
    let model = target.open_model()?;
    let Target { files, pipeline } = target;
    gpus::check_one_kind(&pipeline)?;
    let options = options(&files, &pipeline, &model, target::effort(args.point_seconds))?;
    let store = store()?;
    let key = options.key(&model);
    say(&format!("measuring {} on {}", files.path.display(), key.device));
    let wanted = Missing::all_of(&model.config, &options.widths);
    let mut profile = measure(&model, &options, &wanted, &mut |line| say(line))?;
    if let Stored::Usable(earlier) = store.load(&key) {
        // Another model of the same dimensions may have blocks of its own.
        profile = profile.with_entries_of(*earlier);
    }
    let path = store.save(&profile)?;
    match args.format {
        Format::Json => print(&serde_json::to_string_pretty(&profile)?),
        Format::Text => {
            table::lines(&model.config, &profile).iter().for_each(|line| print(line));
            print(&format!("stored     {}", path.display()));
        }
    }
    Ok(())
}

/// Where profiles are kept.
///
/// # Errors
/// Nobody says where.
pub(crate) fn store() -> Result<Store> {
    let store = Store::of_environment(|name| std::env::var_os(name).map(Into::into));
    store.context("find a folder for profiles\nhint: set SPANWISE_PROFILES, XDG_CACHE_HOME or HOME")
}

/// The command that measures a job's devices, with what of its overrides they depend on.
pub(crate) fn command<'a>(job: &Path, sets: impl Iterator<Item = &'a str>) -> String {
    let decides = |set: &&str| set.starts_with("model.") || set.starts_with("pipeline.");
    let sets: String = sets.filter(decides).map(|set| format!(" --set '{set}'")).collect();
    format!("spanwise profile {}{sets}", job.display())
}

/// How a job's devices are measured: as `run` lays them over the machine.
///
/// # Errors
/// Devices or sizes that are wrong.
pub(crate) fn options(
    files: &configs::Model,
    pipeline: &Pipeline,
    model: &Model,
    effort: Effort,
) -> Result<MeasureOptions> {
    lower::check(pipeline)?;
    let (devices, free_bytes) = devices(pipeline)?;
    Ok(MeasureOptions {
        widths: widths(pipeline, &model.config, devices.len()),
        devices,
        dtypes: lower::dtypes(files, pipeline, &model.config),
        context_tokens: lower::context_tokens(files, &model.config)?,
        micro_batch_tokens: pipeline.most_micro_batch_tokens(),
        free_bytes,
        effort,
    })
}

/// Numbers of devices that a plan for a job may have share a stage: as many as are profiled, of CPUs.
fn widths(pipeline: &Pipeline, config: &ModelConfig, num_devices: usize) -> Vec<usize> {
    let given: &[usize] = match &pipeline.tensor_parallel {
        TensorParallel::Widths(widths) => widths,
        TensorParallel::Auto | TensorParallel::Off => &[],
    };
    let is_meant = |width: &usize| match pipeline.tensor_parallel {
        TensorParallel::Off => false,
        TensorParallel::Auto => config.dims.heads.is_multiple_of(*width),
        TensorParallel::Widths(_) => given.contains(width),
    };
    let are_cpus = pipeline.devices.iter().all(|device| device.kind != DeviceKind::Cuda);
    (TENSOR_PARALLEL_WIDTHS.into_iter())
        .filter(|width| are_cpus && (2..=num_devices).contains(width) && is_meant(width))
        .collect()
}

/// Devices that are measured together, the first of them also alone, and the memory that they have together.
fn devices(pipeline: &Pipeline) -> Result<(Vec<Device>, u64)> {
    if gpus::are_meant(pipeline)? {
        let devices = gpus::distinct(pipeline);
        let least = gpus::free_bytes(pipeline)?.into_values().min().unwrap_or(0);
        return Ok((devices.clone(), least * devices.len() as u64));
    }
    let machine = machine::detect();
    let mut devices = lower::device_groups(pipeline, &machine)?;
    devices.rotate_left(pipeline.devices.first().map_or(0, |device| device.index));
    Ok((devices, machine.free_bytes))
}

/// Measures what `store` lacks of a model, or all where what it has is stale, and keeps it.
///
/// # Errors
/// As [`measure`], and what keeps it from being stored.
pub(crate) fn refresh(
    model: &Model,
    options: &MeasureOptions,
    store: &Store,
    earlier: Option<Profile>,
) -> Result<Profile> {
    let wanted = match &earlier {
        Some(profile) => {
            profile.measurable(profile.missing(&model.config, &options.widths), options.room_bytes())
        }
        None => Missing::all_of(&model.config, &options.widths),
    };
    let fresh = measure(model, options, &wanted, &mut |line| tracing::info!("{line}"))?;
    let profile = match earlier {
        Some(earlier) => fresh.with_entries_of(earlier),
        None => fresh,
    };
    store.save(&profile)?;
    Ok(profile)
}

impl ProfileArgs {
    fn target(&self) -> Result<Target> {
        if self.max_context_tokens.is_some() {
            self.target.refuse_job_file()?;
        }
        let mut target = Target::read(&self.target)?;
        if gpus::are_meant(&target.pipeline)? && !self.target.says_micro_batch() {
            target.pipeline.micro_batch_tokens = AutoCount::Given(GPU_MICRO_BATCH_TOKENS);
        }
        target.files.max_context_tokens = self.max_context_tokens.or(target.files.max_context_tokens);
        Ok(target)
    }
}
