//! Where CUDA's libraries are, and that they are loaded before anybody calls them.
//!
//! cudarc looks a library up by its bare name at the first call, and panics where it finds none. So each is loaded here
//! first: from a folder that the user names, by the system's own search, or from the usual places of CUDA and of Python's
//! `nvidia-*` packages. One that is loaded already is found by its name from then on.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use libloading::Library;

use crate::error::{Error, Result};

/// A library, as a message and a search have it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    /// Such as `libnvrtc`.
    stem: &'static str,
    /// Endings in the order of preference: cudarc tries the same ones.
    endings: &'static [&'static str],
    /// Begins the names of libraries in the same folder that this one looks for by itself, and may not find.
    companions: Option<&'static str>,
}

/// The driver's, which comes with it and from nowhere else.
pub(crate) const DRIVER: Wanted = Wanted { stem: "libcuda", endings: &[".so", ".so.1"], companions: None };
/// The run-time compiler's.
pub(crate) const NVRTC: Wanted = Wanted {
    stem: "libnvrtc",
    endings: &[".so", ".so.13", ".so.12"],
    companions: Some("libnvrtc-builtins.so"),
};

/// The library of matrix products.
pub(crate) const CUBLASLT: Wanted =
    Wanted { stem: "libcublasLt", endings: &[".so", ".so.13", ".so.12"], companions: None };

/// The library that moves numbers between GPUs. Packages have it under its second name alone, which cudarc does not try.
pub(crate) const NCCL: Wanted = Wanted { stem: "libnccl", endings: &[".so.2", ".so"], companions: None };

impl Wanted {
    fn names(&self) -> impl Iterator<Item = String> {
        self.endings.iter().map(|ending| format!("{}{ending}", self.stem))
    }

    /// Loads it and keeps it loaded.
    ///
    /// # Errors
    /// It is nowhere; the message says what was tried.
    pub(crate) fn load(&self, first: Option<&Path>) -> Result<&'static Library> {
        let folders = usual_folders(|name| env::var_os(name));
        let bare = self.names().map(PathBuf::from);
        let candidates: Vec<PathBuf> = (first.into_iter().flat_map(|folder| self.in_folder(folder)))
            .chain(bare)
            .chain(folders.iter().flat_map(|folder| self.in_folder(folder)))
            .collect();
        if let Some(library) = candidates.iter().find_map(|candidate| self.try_load(candidate)) {
            return Ok(library);
        }
        let tried: Vec<String> = (first.into_iter())
            .chain(folders.iter().map(PathBuf::as_path))
            .map(|folder| folder.display().to_string())
            .collect();
        let names: Vec<String> = self.names().collect();
        Err(Error::NoCuda(format!(
            "{} is missing: tried {} by the system's own search{}{}",
            self.stem,
            names.join(", "),
            if tried.is_empty() { "" } else { " and in " },
            tried.join(", ")
        )))
    }

    fn in_folder(&self, folder: &Path) -> Vec<PathBuf> {
        self.names().map(|name| folder.join(name)).filter(|path| path.is_file()).collect()
    }

    fn try_load(&self, path: &Path) -> Option<&'static Library> {
        if let (Some(start), Some(folder)) = (self.companions, path.parent()) {
            let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
            entries
                .map(|entry| entry.path())
                .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(start)))
                .for_each(|path| {
                    keep(&path); // Without it the library itself may still find its own.
                });
        }
        keep(path)
    }
}

/// Loads a library for good: anybody may look it up by name, to the end of the program.
fn keep(path: &Path) -> Option<&'static Library> {
    // SAFETY: what NVIDIA's libraries do when they are loaded is what every program that uses CUDA relies on.
    let library = unsafe { Library::new(path) }.ok()?;
    Some(Box::leak(Box::new(library)))
}

/// Folders that are there and may hold CUDA's libraries: of CUDA itself, then of Python's packages.
fn usual_folders(variable: impl Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = ["CUDA_HOME", "CUDA_PATH"]
        .into_iter()
        .filter_map(&variable)
        .map(|home| PathBuf::from(home).join("lib64"))
        .collect();
    folders.extend(
        ["/usr/local/cuda/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib/wsl/lib"].map(PathBuf::from),
    );
    let mut prefixes: Vec<PathBuf> =
        ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(&variable).map(PathBuf::from).collect();
    let path = variable("PATH").unwrap_or_default();
    prefixes.extend(env::split_paths(&path).filter_map(|bin| bin.parent().map(Path::to_path_buf)));
    prefixes.extend(variable("HOME").map(|home| PathBuf::from(home).join(".local")));
    for prefix in prefixes {
        for python in subfolders(&prefix.join("lib"), "python3") {
            for packages in ["site-packages", "dist-packages"] {
                let nvidia = python.join(packages).join("nvidia");
                folders.extend(subfolders(&nvidia, "").into_iter().map(|package| package.join("lib")));
            }
        }
    }
    folders.retain(|folder| folder.is_dir());
    let mut seen = std::collections::HashSet::new();
    folders.retain(|folder| seen.insert(folder.clone()));
    folders
}

/// Subfolders whose names begin so, in order.
fn subfolders(folder: &Path, start: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(start)))
        .collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_of_python_packages_are_looked_for_where_python_is() {
        let root = tempfile::tempdir().unwrap();
        let lib = root.path().join("venv/lib/python3.11/site-packages/nvidia/cu13/lib");
        std::fs::create_dir_all(&lib).unwrap();
        let bin = root.path().join("venv/bin");
        for (name, value) in [("VIRTUAL_ENV", root.path().join("venv")), ("PATH", bin)] {
            let folders = usual_folders(|asked| (asked == name).then(|| value.clone().into_os_string()));
            assert_eq!(folders.iter().filter(|folder| **folder == lib).count(), 1, "{name}: {folders:?}");
        }
    }

    #[test]
    fn a_library_that_is_nowhere_is_named_with_what_was_tried() {
        let root = tempfile::tempdir().unwrap();
        let wanted = Wanted { stem: "libnobody", endings: &[".so", ".so.7"], companions: None };
        let error = wanted.load(Some(root.path())).unwrap_err().to_string();
        let start = format!(
            "libnobody is missing: tried libnobody.so, libnobody.so.7 by the system's own search and in {}",
            root.path().display()
        );
        assert!(error.starts_with(&start), "{error}");
    }
}
