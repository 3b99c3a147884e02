//! `spanwise profile`: measures what a model's blocks cost on a device of this machine, and keeps it.

mod table;

use anyhow::{Context, Result, bail};
use configs::{Device, JobFile, Pipeline, Purpose};
use stages::profile::{Effort, MeasureOptions, Missing, Profile, Store, Stored, measure};
use stages::{Error, Model};

use crate::cli::{Format, ProfileArgs};
use crate::{lower, machine, print, say};

/// Measures, stores and prints.
///
/// # Errors
/// A model or job file that cannot be read, a device that is not there, a folder that cannot be written.
pub(crate) fn profile(args: &ProfileArgs) -> Result<()> {
    let (files, pipeline) = subject(args)?;
    let model = open_model(&files)?;
    let options = options(&files, &pipeline, &model, args.effort())?;
    let store = store()?;
    let key = options.key(&model);
    say(&format!("measuring {} on {}", files.path.display(), key.device));
    let mut profile = measure(&model, &options, &Missing::all_of(&model.config), &mut |line| say(line))?;
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
    let machine = machine::detect();
    let mut devices = lower::device_groups(pipeline, &machine)?;
    // The first is the one that is measured alone.
    devices.rotate_left(pipeline.devices.first().map_or(0, |device| device.index));
    Ok(MeasureOptions {
        devices,
        dtypes: lower::dtypes(files, pipeline),
        context_tokens: lower::context_tokens(files, &model.config)?,
        micro_batch_tokens: pipeline.micro_batch_tokens,
        free_bytes: machine.free_bytes,
        effort,
    })
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
        Some(profile) => profile.missing(&model.config),
        None => Missing::all_of(&model.config),
    };
    let fresh = measure(model, options, &wanted, &mut |line| tracing::info!("{line}"))?;
    let profile = match earlier {
        Some(earlier) => fresh.with_entries_of(earlier),
        None => fresh,
    };
    store.save(&profile)?;
    Ok(profile)
}

/// `[model]` and `[pipeline]`: those of a job file, or what the options say of a model.
fn subject(args: &ProfileArgs) -> Result<(configs::Model, Pipeline)> {
    if args.target.extension().is_some_and(|extension| extension == "toml") {
        if args.has_model_options() {
            bail!(
                "{}: a job file says itself what is measured, expected --set in the place of other options",
                args.target.display()
            );
        }
        let JobFile { model, pipeline, .. } =
            crate::run::load_for(Purpose::Plan, &args.target, &args.sets)?.job;
        return Ok((model, pipeline));
    }
    if !args.sets.is_empty() {
        bail!("--set: found {:?}, expected a job file to set keys of", args.sets[0]);
    }
    let files = configs::Model {
        path: args.target.clone(),
        dtype: args.dtype.map_or_else(configs::Dtype::default, Into::into),
        max_context_tokens: args.max_context_tokens,
        ..configs::Model::default()
    };
    let mut pipeline = Pipeline { threads: args.threads, devices: devices(args)?, ..Pipeline::default() };
    pipeline.micro_batch_tokens = args.micro_batch_tokens.unwrap_or(pipeline.micro_batch_tokens);
    Ok((files, pipeline))
}

/// The device that was asked for, and as many others as the cores have room for.
fn devices(args: &ProfileArgs) -> Result<Vec<Device>> {
    let first = args.device.unwrap_or(Device::cpu(0));
    let num_cores = machine::detect().cores.len();
    let num_devices = match args.threads {
        Some(0) => bail!("--threads: found 0, expected at least 1"),
        Some(threads) => (num_cores / threads).max(first.index + 1),
        None => first.index + 1,
    };
    if num_devices > num_cores {
        bail!("--device: found {first}, expected one of the machine's {num_cores} cores at most");
    }
    let others = (0..num_devices).filter(|index| *index != first.index).map(Device::cpu);
    Ok(std::iter::once(first).chain(others).collect())
}

/// The model with its own weights, or with random ones where it has none.
fn open_model(files: &configs::Model) -> Result<Model> {
    let is_config_alone = files.path.is_file();
    let opened = Model::open(&files.path, files.random_weights || is_config_alone);
    let opened = match opened {
        Err(Error::NoWeights { .. }) => {
            say("no weights there: random ones of the same shapes are measured");
            Model::open(&files.path, true)
        }
        opened => opened,
    };
    let (model, warnings) = opened.context("load model")?;
    warnings.0.iter().for_each(|warning| say(&format!("warning: {warning}")));
    Ok(model)
}

impl ProfileArgs {
    fn effort(&self) -> Effort {
        let usual = Effort::default();
        Effort { point_seconds: self.point_seconds.unwrap_or(usual.point_seconds), ..usual }
    }

    fn has_model_options(&self) -> bool {
        self.device.is_some()
            || self.threads.is_some()
            || self.dtype.is_some()
            || self.max_context_tokens.is_some()
            || self.micro_batch_tokens.is_some()
    }
}
