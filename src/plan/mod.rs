//! `spanwise plan`: which blocks go on which devices, and what to expect of it. An estimate, by rooflines.

pub(crate) mod answer;
pub(crate) mod given;
mod input;
mod lengths;
mod missing;
mod not_run;
pub(crate) mod own;
pub(crate) mod report;
pub(crate) mod setting;
pub(crate) mod spread;
pub(crate) mod table;
mod ways;

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use configs::{DeviceCatalog, JobFile, KvCacheDtype, Purpose};
use stages::cost::{Balance, Measured, NumberType, NumberTypes};
use stages::profile::{Effort, Profile, Stored};
use stages::{Model, ModelConfig};

use crate::EXIT_BAD_INPUT;
use crate::cli::{BalanceArg, Format, LengthsArg, PlanArgs, PlanDtype, SettingArgs};
use crate::plan::given::GivenStages;
use crate::plan::own::OwnDevices;
use crate::plan::setting::{MAX_TOKENS, Setting, roofline};
use crate::{gpus, layout, lower, machine, picture, placement, profile};

pub(crate) use crate::plan::input::{Work, first_rows};
pub(crate) use crate::plan::lengths::Lengths;

/// Plans a job, prints the plan, and draws it where that is asked for.
///
/// # Errors
/// A job file, model or list of devices that is wrong. A model that does not fit is no error of these: the
/// plan says what is missing, and the exit code is that of bad input.
pub(crate) fn plan(args: &PlanArgs) -> Result<ExitCode> {
    let job = crate::run::load_for(Purpose::Plan, &args.setting.job, &args.setting.sets)?.job;
    let balance = match args.cost {
        BalanceArg::Roofline | BalanceArg::Measured => Balance::Roofline,
        BalanceArg::Flops => Balance::Flops,
        BalanceArg::Weights => Balance::Weights,
    };
    let mut setting =
        setting(&args.setting, &job, balance, args.setting.lengths.unwrap_or(LengthsArg::Fixed))?;
    if args.cost == BalanceArg::Measured {
        setting.measured = Some(measured(&args.setting, &job, &setting)?);
    } else {
        point_to_profile(&args.setting, &job, &mut setting);
    }
    let given = given_stages(&job, &setting)?;
    let Some(answer) = answer::answer(&setting, given.as_ref()) else {
        let refused = refuse(&setting, args.format)?;
        if let Some(path) = &args.svg {
            bail!("no picture for {}: nothing fits, so there is no plan to draw", path.display());
        }
        return Ok(refused);
    };
    let report = report::Report::of(&setting, &answer);
    show(&setting, &report, args.format)?;
    if let (Some(path), Some(found)) = (&args.svg, &report.found) {
        let name = picture::model_name(&job.model.path);
        picture::save(path, &picture::draw_plan(&name, &setting, &answer, found))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Has an estimate say that a profile is there, if it is.
pub(crate) fn point_to_profile(args: &SettingArgs, job: &JobFile, setting: &mut Setting) {
    if setting.to_measure.is_some() && measured(args, job, setting).is_ok() {
        setting.to_measure = Some("--cost measured takes what spanwise profile has measured".to_owned());
    }
}

/// The stages that a job gives. Where it is planned for other devices, they need not be stages of these.
fn given_stages(job: &JobFile, setting: &Setting) -> Result<Option<GivenStages>> {
    match given::given_stages(setting, job) {
        Err(error) if setting.runs_on.is_none() => {
            crate::say(&format!("warning: the job's own stages are not compared: {error}"));
            Ok(None)
        }
        given => given,
    }
}

/// Says what a model that does not fit is missing, and the nearest that fits.
///
/// # Errors
/// None that a user can bring about.
pub(crate) fn refuse(setting: &Setting, format: Format) -> Result<ExitCode> {
    show(setting, &report::Report::of_missing(setting, missing::missing(setting)), format)?;
    Ok(ExitCode::from(EXIT_BAD_INPUT))
}

fn show(setting: &Setting, report: &report::Report, format: Format) -> Result<()> {
    match format {
        Format::Json => crate::print(&serde_json::to_string_pretty(report)?),
        Format::Text => table::lines(setting, report).iter().for_each(|line| crate::print(line)),
    }
    Ok(())
}

/// What is planned for a job.
///
/// # Errors
/// A model or list of devices that is wrong; lengths that are neither given nor to be had from an input.
pub(crate) fn setting(
    args: &SettingArgs,
    job: &JobFile,
    balance: Balance,
    lengths: LengthsArg,
) -> Result<Setting> {
    let plan = job.plan.clone().unwrap_or_default();
    let config = ModelConfig::read(&job.model.path).context("load model")?;
    let catalog = match &args.devices_file {
        Some(path) => DeviceCatalog::read(path)?,
        None => DeviceCatalog::shipped(),
    };
    let types = number_types(args.dtype, job, &config);
    let (mut runs_on, mut to_measure) = (None, None);
    let (devices, num_devices, catalog) = match (&args.devices, &plan.devices) {
        (Some(list), _) | (None, Some(list)) => {
            (list.clone(), list.num_devices(), catalog.with_cores_of(list))
        }
        (None, None) => {
            lower::check(&job.pipeline)?;
            let machine = machine::detect();
            let own = OwnDevices::of(&job.pipeline, &machine)?;
            let catalog = own.in_catalog(catalog, &machine);
            types.weights.stored().map_or(Ok(()), |weights| layout::check_shared(&job.pipeline, weights))?;
            runs_on = Some(layout::kind(&job.pipeline));
            let command = profile::command(&args.job, args.sets.iter().map(String::as_str));
            to_measure = Some(format!("{command} would"));
            // One that is named several times has as many stages.
            (own.list, job.pipeline.devices.len(), catalog)
        }
    };
    setting::check(&catalog, &devices, num_devices, &job.pipeline.tensor_parallel)?;
    let context_tokens = lower::context_tokens(&job.model, &config)?;
    let work = Work::of(job, &config, args.sample)?;
    let mix = work.lengths.mix(lengths).context("nothing is generated")?;
    let replicas = job.pipeline.replicas;
    let are_gpus = devices.names().all(|name| configs::cpu_of(name).is_none());
    check_tokens_in_flight(&plan, mix.kv_tokens_per_row)?;
    Ok(Setting {
        config,
        catalog: catalog.with_price(plan.price_per_hour),
        types,
        is_kv_type_given: job.pipeline.kv_cache_dtype != KvCacheDtype::Auto,
        mix,
        lengths,
        tokens_in_flight: plan.tokens_in_flight.map(|tokens| tokens as u64),
        max_sequences: job.pipeline.sequences_on(num_devices, are_gpus) as u64,
        max_tokens: MAX_TOKENS,
        rows: work.sequences(),
        work: Arc::new(work),
        replicas: if devices.group(replicas).is_some() { replicas } else { 1 },
        devices,
        runs_on,
        rooms: None,
        shared_room: None,
        context_tokens,
        kv_cache_tokens: job.pipeline.kv_cache_tokens,
        tensor_parallel: job.pipeline.tensor_parallel.clone(),
        split_blocks: job.pipeline.split_blocks,
        may_share_sequences: true,
        column_cuts: job.pipeline.column_cuts,
        virtual_stages: layout::virtual_stages(&job.pipeline),
        balance,
        measured: None,
        to_measure,
    })
}

/// Fewer tokens than a single row keeps are no question of room.
fn check_tokens_in_flight(plan: &configs::Plan, row: u64) -> Result<()> {
    match plan.tokens_in_flight {
        Some(tokens) if (tokens as u64) < row => {
            bail!("[plan] tokens_in_flight: found {tokens}, a row in the middle of its output keeps {row}")
        }
        _ => Ok(()),
    }
}

/// What was measured on the devices of this machine, which are the only ones that can be.
///
/// # Errors
/// Other devices than the job's own, or no usable profile of them.
pub(crate) fn measured(args: &SettingArgs, job: &JobFile, setting: &Setting) -> Result<Measured> {
    let own_devices = OwnDevices::of(&job.pipeline, &machine::detect())?.list;
    if setting.devices != own_devices {
        bail!(
            "no profile of {}, only of the devices of [pipeline], {own_devices}\nhint: --cost roofline plans by an estimate",
            setting.devices
        );
    }
    let own = number_types(None, job, &setting.config);
    if setting.types != own {
        bail!("--cost measured: found --dtype, expected the job's own type");
    }
    gpus::check_one_kind(&job.pipeline)?;
    let (model, _) = Model::open(&job.model.path, true).context("load model")?;
    let options = profile::options(&job.model, &job.pipeline, &model, Effort::default())?;
    let key = options.key(&model);
    let store = profile::store()?;
    let make = format!("hint: spanwise profile {} measures it", args.job.display());
    let all_reduce = roofline(setting.kinds()[0], own.weights).all_reduce;
    let costs = |profile: &Profile| {
        Measured::new(&setting.config, profile, placement::neighbours(job), own, all_reduce)
    };
    match store.load(&key) {
        Stored::Usable(profile) => costs(&profile).map_err(|lacking| anyhow!("{lacking}\n{make}")),
        Stored::Absent => bail!(
            "no profile of {} for {} weights in {}\n{make}",
            key.device,
            key.weights,
            store.folder().display()
        ),
        Stored::Stale(why) => bail!("the profile of {} is stale: {why}\n{make}", key.device),
        Stored::Damaged(why) => bail!("the profile is damaged: {why}\n{make}"),
    }
}

/// `--dtype`, or the job's own; keys and values follow narrow weights, and a checkpoint that asks for fp8, unless the job names their
/// type.
fn number_types(dtype: Option<PlanDtype>, job: &JobFile, config: &ModelConfig) -> NumberTypes {
    let own = |dtype| match dtype {
        configs::Dtype::Bf16 => NumberType::Bf16,
        configs::Dtype::F32 => NumberType::F32,
        configs::Dtype::Fp8 => NumberType::Fp8,
        configs::Dtype::Int8 => NumberType::Int8,
        configs::Dtype::Int8Weight => NumberType::Int8Weight,
        configs::Dtype::Int4Weight => NumberType::Int4Weight,
    };
    let weights = match dtype {
        Some(PlanDtype::F32) => NumberType::F32,
        Some(PlanDtype::Bf16) => NumberType::Bf16,
        Some(PlanDtype::Fp8) => NumberType::Fp8,
        Some(PlanDtype::Fp4) => NumberType::Fp4,
        Some(PlanDtype::Int8) => NumberType::Int8,
        Some(PlanDtype::Int8Weight) => NumberType::Int8Weight,
        Some(PlanDtype::Int4Weight) => NumberType::Int4Weight,
        None => own(job.model.dtype),
    };
    let kv = match job.pipeline.kv_cache_dtype {
        KvCacheDtype::F32 => NumberType::F32,
        KvCacheDtype::Bf16 => NumberType::Bf16,
        KvCacheDtype::Fp8 => NumberType::Fp8,
        KvCacheDtype::Auto if config.asks_for_fp8_kv && weights != NumberType::F32 => NumberType::Fp8,
        // What jobs run with beside fp8.
        KvCacheDtype::Auto if dtype.is_none() && weights == NumberType::Fp8 => NumberType::Bf16,
        KvCacheDtype::Auto => kv_type(weights),
    };
    NumberTypes { weights, kv }
}

/// Keys and values beside such weights, where nobody names their type.
fn kv_type(weights: NumberType) -> NumberType {
    match weights {
        NumberType::F32 => NumberType::F32,
        NumberType::Fp8 | NumberType::Fp4 => NumberType::Fp8,
        NumberType::Bf16 | NumberType::Int8 | NumberType::Int8Weight | NumberType::Int4Weight => {
            NumberType::Bf16
        }
    }
}
