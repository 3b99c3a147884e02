//! Job files: which keys there are, what they may say, what they are when nobody says.
//!
//! A job is described by one TOML file. [`load`] reads it strictly, lays the environment
//! (`SPANWISE__SECTION__KEY`) and `--set section.key=value` over it, checks the whole, and returns a
//! [`JobFile`] in which every default is filled in and every path is absolute. The reference of all keys
//! is `docs/job_file.md`.
//!
//! This crate alone knows TOML, and knows nothing else of ours: it does not open the model, so whether
//! the last stage ends at the model's last block is checked where blocks are known.
//!
//! The invariant: nothing is coerced and nothing is overlooked. A key that is not known, a value of
//! another type or out of range, a variable of our prefix that names no key: each is an [`Error`] that
//! says where it stands and what was expected, before any work is done.
#![forbid(unsafe_code)]

mod devices;
mod error;
mod file;
mod keys;
mod layers;
mod overrides;
mod print;
mod read;
mod schema;
mod types;
mod whole;

use std::path::Path;

pub use devices::{Cpu, DeviceCatalog, DeviceList, DeviceSpec, cpu_name, cpu_of};
pub use error::Error;
pub use overrides::{ENVIRONMENT_PREFIX, Override, OverrideSource};
pub use schema::{
    CPU_SEQUENCES, Grade, Job, JobFile, MICRO_BATCH_TOKENS, MOST_SEQUENCES, Model, Pipeline, Plan, Prompt,
    Sampling,
};
pub use types::{
    AutoCount, ColumnCuts, Device, DeviceError, DeviceKind, Dtype, Grader, KvCacheDtype, Order, Place,
    Profile, Ranks, Simd, SplitBlocks, Stages, StagesRunIn, TENSOR_PARALLEL_WIDTHS, TensorParallel,
    VirtualStages,
};
pub use whole::Purpose;

/// A job file with the overrides that went into it.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// What holds.
    pub job: JobFile,
    /// The keys that have their value from outside of the file, environment first. One that another has
    /// overridden is left out.
    pub overrides: Vec<Override>,
}

/// Reads the job file at `path` and lays `env` and then `sets` over it.
///
/// `sets` are the arguments of `--set`, each `section.key=value`; of `env` only the variables that begin
/// with [`ENVIRONMENT_PREFIX`] count. Relative paths in the file start at its folder; `path` itself and
/// relative paths in `sets` and `env` start at `working_folder`. (For `env`, take `std::env::vars_os` and keep
/// what is UTF-8: `std::env::vars` panics at a variable of another program that is not.)
pub fn load(
    path: &Path,
    sets: &[String],
    env: impl Iterator<Item = (String, String)>,
    working_folder: &Path,
) -> Result<Loaded, Error> {
    load_for(Purpose::Run, path, sets, env, working_folder)
}

/// The same for another purpose than to run the job.
pub fn load_for(
    purpose: Purpose,
    path: &Path,
    sets: &[String],
    env: impl Iterator<Item = (String, String)>,
    working_folder: &Path,
) -> Result<Loaded, Error> {
    let file = file::File::read(path, working_folder)?;
    let table = file.check()?;
    let mut overrides = overrides::from_environment(env)?;
    overrides.extend(overrides::from_sets(sets)?);

    let joined = layers::Joined::join(&table, &overrides)
        .map_err(|cause| Error::new(format!("the layers of {} can't be joined: {cause}", path.display())))?;
    let whole = whole::Whole { file: &file, joined: &joined, purpose };
    let mut job = whole.read()?;
    whole.resolve_paths(&mut job, file.folder(), working_folder);
    Ok(Loaded { job, overrides: overrides::effective(overrides) })
}
