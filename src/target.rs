//! What `spanwise profile` and `spanwise bench` measure: a model's folder with options, or a job file.

use anyhow::{Context, Result, bail};
use configs::{AutoCount, Device, DeviceKind, JobFile, Pipeline, Purpose};
use stages::profile::Effort;
use stages::{Error, Model};

use crate::cli::TargetArgs;
use crate::{machine, say};

/// `[model]` and `[pipeline]`: those of a job file, or what the options say of a model.
pub(crate) struct Target {
    pub(crate) files: configs::Model,
    pub(crate) pipeline: Pipeline,
}

impl Target {
    /// # Errors
    /// A job file that cannot be read, options that do not go together, a device that is not there.
    pub(crate) fn read(args: &TargetArgs) -> Result<Self> {
        if args.is_job_file() {
            if args.has_model_options() {
                args.refuse_job_file()?;
            }
            let JobFile { model: files, pipeline, .. } =
                crate::run::load_for(Purpose::Plan, &args.path, &args.sets)?.job;
            return Ok(Target { files, pipeline });
        }
        if !args.sets.is_empty() {
            bail!("--set: found {:?}, expected a job file to set keys of", args.sets[0]);
        }
        let files = configs::Model {
            path: args.path.clone(),
            dtype: args.dtype.map_or_else(configs::Dtype::default, Into::into),
            ..configs::Model::default()
        };
        let mut pipeline = Pipeline { threads: args.threads, devices: devices(args)?, ..Pipeline::default() };
        pipeline.micro_batch_tokens = args.micro_batch_tokens.map_or(AutoCount::Auto, AutoCount::Given);
        Ok(Target { files, pipeline })
    }

    /// The model with its own weights, or with random ones where it has none.
    ///
    /// # Errors
    /// A model that cannot be read.
    pub(crate) fn open_model(&self) -> Result<Model> {
        let files = &self.files;
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
}

/// The device that was asked for, and as many others as the cores have room for.
fn devices(args: &TargetArgs) -> Result<Vec<Device>> {
    let first = args.device.unwrap_or(Device::cpu(0));
    if first.kind == DeviceKind::Cuda {
        return Ok(vec![first]);
    }
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

/// How long to look at a point.
pub(crate) fn effort(point_seconds: Option<f64>) -> Effort {
    let usual = Effort::default();
    Effort { point_seconds: point_seconds.unwrap_or(usual.point_seconds), ..usual }
}

impl TargetArgs {
    /// Refuses a job file beside options that it has keys for.
    ///
    /// # Errors
    /// It is one.
    pub(crate) fn refuse_job_file(&self) -> Result<()> {
        match self.is_job_file() {
            true => bail!(
                "{}: a job file says itself what is measured, expected --set in the place of other options",
                self.path.display()
            ),
            false => Ok(()),
        }
    }

    /// Whether a job file or an option says how large a micro-batch may be.
    pub(crate) fn says_micro_batch(&self) -> bool {
        self.is_job_file() || self.micro_batch_tokens.is_some()
    }

    fn is_job_file(&self) -> bool {
        self.path.extension().is_some_and(|extension| extension == "toml")
    }

    fn has_model_options(&self) -> bool {
        self.device.is_some()
            || self.threads.is_some()
            || self.dtype.is_some()
            || self.micro_batch_tokens.is_some()
    }
}
