//! Profiles as files of a folder, one for each key.

use std::path::{Path, PathBuf};

use super::key::ProfileKey;
use super::{FORMAT, Profile, SharedEntry};
use crate::error::{Error, Result};

/// Where profiles are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Store {
    folder: PathBuf,
}

/// What a store has for a key.
#[derive(Debug, Clone, PartialEq)]
pub enum Stored {
    /// Nothing.
    Absent,
    /// A file that cannot be read, and why.
    Damaged(String),
    /// Figures of another version of the program, and which.
    Stale(String),
    /// A profile, which may lack entries.
    Usable(Box<Profile>),
}

impl Store {
    /// The folder that the environment names: `SPANWISE_PROFILES`, or `spanwise/profiles` of the caches. None where
    /// nobody has a home.
    pub fn of_environment(variable: impl Fn(&str) -> Option<PathBuf>) -> Option<Self> {
        let set = |name: &str| variable(name).filter(|path| !path.as_os_str().is_empty());
        let of_user = || {
            let caches = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")))?;
            Some(caches.join("spanwise/profiles"))
        };
        set("SPANWISE_PROFILES").or_else(of_user).map(Self::at)
    }

    /// A folder, which need not be there yet.
    pub fn at(folder: PathBuf) -> Self {
        Store { folder }
    }

    /// The file of a key.
    pub fn path(&self, key: &ProfileKey) -> PathBuf {
        self.folder.join(key.file_name())
    }

    /// Looks for the profile of a key.
    pub fn load(&self, key: &ProfileKey) -> Stored {
        let path = self.path(key);
        let damaged = |why: String| Stored::Damaged(format!("{}: {why}", path.display()));
        match std::fs::read_to_string(&path) {
            Ok(text) => judge(key, &text).unwrap_or_else(damaged),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Stored::Absent,
            Err(error) => damaged(error.to_string()),
        }
    }

    /// Keeps a profile, whole or not at all, and says where.
    ///
    /// # Errors
    /// The system's word.
    pub fn save(&self, profile: &Profile) -> Result<PathBuf> {
        let path = self.path(&profile.key);
        let write = || -> std::io::Result<()> {
            std::fs::create_dir_all(&self.folder)?;
            let unfinished = path.with_extension(format!("{}.unfinished", std::process::id()));
            std::fs::write(&unfinished, serde_json::to_vec_pretty(profile)?)?;
            std::fs::rename(&unfinished, &path)
        };
        write().map_err(|source| Error::Write { path: path.clone(), source })?;
        Ok(path)
    }

    /// Its folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

/// What a file's text is worth for a key, or what is wrong with it.
fn judge(key: &ProfileKey, text: &str) -> std::result::Result<Stored, String> {
    let value: serde_json::Value =
        serde_json::from_str(text).map_err(|error| format!("not JSON: {error}"))?;
    let format = value["format"].as_u64().ok_or("no profile: it has no format")?;
    if format != u64::from(FORMAT) {
        return Ok(Stored::Stale(format!("format {format}, this program's is {FORMAT}")));
    }
    let profile: Profile = serde_json::from_value(value).map_err(|error| error.to_string())?;
    if profile.key != *key {
        return Err(format!("a profile of {}, expected one of {}", profile.key.device, key.device));
    }
    check(&profile)?;
    let own = env!("CARGO_PKG_VERSION");
    match profile.program == own {
        true => Ok(Stored::Usable(Box::new(profile))),
        false => Ok(Stored::Stale(format!("measured by version {}, this is {own}", profile.program))),
    }
}

/// Curves that can be read: points in order, and no time that no clock shows.
fn check(profile: &Profile) -> std::result::Result<(), String> {
    let extras = [&profile.hop, &profile.embedding, &profile.head];
    let of_blocks = profile.blocks.iter().map(|entry| &entry.points);
    let curves =
        extras.into_iter().chain(of_blocks).chain(profile.shared.iter().flat_map(SharedEntry::curves));
    let meetings = profile.shared.iter().flat_map(SharedEntry::meetings);
    for points in curves.flat_map(|curve| [&curve.alone, &curve.busy]).chain(meetings) {
        let are_in_order = points.is_sorted_by(|a, b| a.tokens < b.tokens) && !points.is_empty();
        let are_times = points.iter().all(|p| p.seconds.median.is_finite() && p.seconds.median >= 0.0);
        if !(are_in_order && are_times && points[0].tokens > 0) {
            return Err("times by tokens that are not in order, or no times".to_owned());
        }
    }
    for curve in profile.attention.iter().flat_map(|entry| [&entry.decode, &entry.prefill]) {
        for points in [&curve.alone, &curve.busy] {
            let are_in_order = points.is_sorted_by(|a, b| a.context < b.context);
            if !(are_in_order && points.iter().all(|point| point.seconds.median.is_finite())) {
                return Err("times by context that are not in order, or no times".to_owned());
            }
        }
    }
    Ok(())
}
