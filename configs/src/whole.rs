//! What can only be judged once all layers are joined: keys that are missing, keys that contradict each
//! other, and the folder where a relative path starts.

use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::file::File;
use crate::layers::{Joined, Origin};
use crate::schema::JobFile;
use crate::types::{Stages, TensorParallel};

/// The keys without a default, each with an example.
pub(crate) const REQUIRED: [(&str, &str, &str); 5] = [
    ("model", "path", "path = \"../models/smollm2-135m\""),
    ("job", "input", "input = \"questions.jsonl\""),
    ("job", "output", "output = \"out\""),
    ("prompt", "user", "user = \"Summarise: {{ text }}\""),
    ("grade", "kind", "kind = \"boxed\""),
];

/// The sections that a job may lack.
pub(crate) const OPTIONAL: [&str; 3] = ["prompt", "grade", "plan"];

/// The layers of one job, for finding whom to blame.
pub(crate) struct Whole<'a> {
    pub(crate) file: &'a File,
    pub(crate) joined: &'a Joined,
    pub(crate) purpose: Purpose,
}

/// What a job file is read for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To run the job.
    Run,
    /// To plan it, for which it may lack its `[job]`.
    Plan,
}

impl Whole<'_> {
    /// Reads the joined layers, strictly once more, and checks what they say together.
    pub(crate) fn read(&self) -> Result<JobFile, Error> {
        self.check_required()?;
        let job: JobFile = serde_path_to_error::deserialize(self.joined.to_toml())
            .map_err(|error| Error::new(format!("{}: {}", error.path(), error.inner().message())))?;
        self.check_replicas(&job)?;
        self.check_widths(&job)?;
        self.check_stages(&job)?;
        self.check_token_limits(&job)?;
        self.check_grade(&job)?;
        Ok(job)
    }

    /// Makes the paths absolute: those of the file start at its folder, those of overrides at the
    /// working folder.
    pub(crate) fn resolve_paths(&self, job: &mut JobFile, job_folder: &Path, working_folder: &Path) {
        let paths = [
            ("model", "path", &mut job.model.path),
            ("job", "input", &mut job.job.input),
            ("job", "output", &mut job.job.output),
        ];
        for (section, name, path) in paths {
            let start = match self.joined.origin(section, name) {
                Origin::Override(_) => working_folder,
                Origin::File | Origin::Default => job_folder,
            };
            if !path.as_os_str().is_empty() {
                *path = resolve(start, path);
            }
        }
    }

    fn check_required(&self) -> Result<(), Error> {
        for (section, name, example) in REQUIRED {
            let may_lack = OPTIONAL.contains(&section) || (section == "job" && self.purpose == Purpose::Plan);
            let is_optional = may_lack && !self.joined.has_section(section);
            if !is_optional && self.joined.origin(section, name) == Origin::Default {
                let error = Error::new(format!("missing key `{name}` in [{section}]"));
                return Err(self.file.error_at(
                    section,
                    name,
                    error.hint(format!("add a line such as {example} under [{section}]")),
                ));
            }
        }
        Ok(())
    }

    fn check_replicas(&self, job: &JobFile) -> Result<(), Error> {
        let (replicas, num_devices) = (job.pipeline.replicas, job.pipeline.devices.len());
        // A plan may be for devices that the file does not name.
        if num_devices.is_multiple_of(replicas) || self.purpose == Purpose::Plan {
            return Ok(());
        }
        let message = format!(
            "{} in pipeline.devices for {}, expected as many devices for each replica",
            count(num_devices, "device"),
            count(replicas, "replica")
        );
        let hint = "pipeline.devices lists those of one replica after the other".to_owned();
        Err(self.blame("pipeline", ["replicas", "devices"], Error::new(message).hint(hint)))
    }

    fn check_widths(&self, job: &JobFile) -> Result<(), Error> {
        let TensorParallel::Widths(widths) = &job.pipeline.tensor_parallel else { return Ok(()) };
        let (wanted, num_devices) = (widths.iter().sum::<usize>(), job.pipeline.devices_per_replica());
        // A plan may be for devices that the file does not name.
        if wanted == num_devices || self.purpose == Purpose::Plan {
            return Ok(());
        }
        let message = format!(
            "pipeline.tensor_parallel {widths:?} takes {} for {} in pipeline.devices{}, expected as many",
            count(wanted, "device"),
            count(num_devices, "device"),
            of_each(job)
        );
        let hint = "each stage takes as many of the devices, in their order, as its width says".to_owned();
        Err(self.blame("pipeline", ["tensor_parallel", "devices"], Error::new(message).hint(hint)))
    }

    fn check_stages(&self, job: &JobFile) -> Result<(), Error> {
        let Stages::Blocks(ranges) = &job.pipeline.stages else { return Ok(()) };
        let num_devices = job.pipeline.devices_per_replica();
        // A plan may be for devices that the file does not name.
        if self.purpose == Purpose::Plan {
            return Ok(());
        }
        if let TensorParallel::Widths(widths) = &job.pipeline.tensor_parallel {
            if ranges.len() == widths.len() {
                return Ok(());
            }
            let message = format!(
                "{} in pipeline.stages for {} in pipeline.tensor_parallel, expected one range per stage",
                count(ranges.len(), "block range"),
                count(widths.len(), "width")
            );
            return Err(self.blame("pipeline", ["stages", "tensor_parallel"], Error::new(message)));
        }
        if ranges.len() == num_devices {
            return Ok(());
        }
        let message = format!(
            "{} in pipeline.stages for {} in pipeline.devices{}, expected one range per device",
            count(ranges.len(), "block range"),
            count(num_devices, "device"),
            of_each(job)
        );
        let error = Error::new(message).hint("stages = \"auto\" fits any devices".to_owned());
        Err(self.blame("pipeline", ["stages", "devices"], error))
    }

    fn check_token_limits(&self, job: &JobFile) -> Result<(), Error> {
        match (job.sampling.min_tokens, job.sampling.max_tokens) {
            (Some(min), Some(max)) if min > max => {
                let message =
                    format!("sampling.min_tokens is {min}, more than the {max} of sampling.max_tokens");
                Err(self.blame("sampling", ["min_tokens", "max_tokens"], Error::new(message)))
            }
            _ => Ok(()),
        }
    }

    fn check_grade(&self, job: &JobFile) -> Result<(), Error> {
        if job.grade.is_none() || job.prompt.is_some() {
            return Ok(());
        }
        let error = Error::new("[grade] needs plain rows, and a [prompt] that asks them".to_owned());
        let hint = "answers stand in plain rows: {\"question\": \"2 + 2?\", \"answer\": \"4\"}".to_owned();
        Err(self.blame("grade", ["kind", "runs"], error.hint(hint)))
    }

    /// Puts an error about two keys at the one that was given last; the first, if the file has both.
    fn blame(&self, section: &str, names: [&str; 2], error: Error) -> Error {
        let origins = names.map(|name| self.joined.origin(section, name));
        let is_set =
            |origin: &Origin<'_>| matches!(origin, Origin::Override(label) if label.starts_with("--set"));
        let is_override = |origin: &Origin<'_>| matches!(origin, Origin::Override(_));
        match origins
            .iter()
            .find(|origin| is_set(origin))
            .or(origins.iter().find(|origin| is_override(origin)))
        {
            Some(Origin::Override(label)) => error.in_override(label),
            _ => self.file.error_at(section, names[0], error),
        }
    }
}

/// Whose devices are counted, where there are several pipelines.
fn of_each(job: &JobFile) -> &'static str {
    if job.pipeline.replicas > 1 { " for each replica" } else { "" }
}

fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// `path` from `start`, absolute. The `..` it begins with are taken off the real folder, where no symbolic
/// link is left; later ones stay, as only the file system knows what they lead out of.
fn resolve(start: &Path, path: &Path) -> PathBuf {
    use std::path::Component::{CurDir, ParentDir};

    let absolute = || std::path::absolute(start).unwrap_or_else(|_| start.to_owned());
    let mut resolved = start.canonicalize().unwrap_or_else(|_| absolute());
    let mut rest = path.components();
    loop {
        let here = rest.clone();
        match rest.next() {
            Some(CurDir) => {}
            Some(ParentDir) => {
                resolved.pop();
            }
            _ => return resolved.join(here.as_path()),
        }
    }
}
