//! Where CUDA's libraries are, and that they are loaded before anybody calls them.
//!
//! cudarc looks a library up by its bare name at the first call, and panics where it finds none. So each is loaded here
//! first: from a folder that the user names, by the system's own search, or from the usual places of CUDA and of Python's
//! `nvidia-*` packages. One that is loaded already is found by its name from then on, and so each is looked for once.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use libloading::Library;

use super::locked;
use crate::error::{Error, Result};

/// A library, as a message and a search have it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    /// Such as `libnvrtc`.
    pub(crate) stem: &'static str,
    /// What it is for, as the end of a sentence.
    purpose: &'static str,
    /// Endings in the order of preference: cudarc tries the same ones.
    endings: &'static [&'static str],
    /// Begins the names of libraries in the same folder that this one looks for by itself, and may not find.
    companions: Option<&'static str>,
}

/// The driver's, which comes with it and from nowhere else.
pub(crate) const DRIVER: Wanted = Wanted {
    stem: "libcuda",
    purpose: "which comes with NVIDIA's driver",
    endings: &[".so", ".so.1"],
    companions: None,
};
/// The run-time compiler's.
pub(crate) const NVRTC: Wanted = Wanted {
    stem: "libnvrtc",
    purpose: "which compiles kernels",
    endings: &[".so", ".so.13", ".so.12"],
    companions: Some("libnvrtc-builtins.so"),
};

/// The library of matrix products.
pub(crate) const CUBLASLT: Wanted = Wanted {
    stem: "libcublasLt",
    purpose: "which is used with deterministic = false; otherwise the built-in GEMM kernels are used",
    endings: &[".so", ".so.13", ".so.12"],
    companions: None,
};

/// The library that moves numbers between GPUs. Packages have it under its second name alone, which cudarc does not try.
pub(crate) const NCCL: Wanted = Wanted {
    stem: "libnccl",
    purpose: "which only GPUs that share a stage cannot do without",
    endings: &[".so.2", ".so"],
    companions: None,
};

/// A library that is loaded, for good: anybody may look it up by name, to the end of the program.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) library: &'static Library,
    /// Its file, or its bare name where the system has found it.
    pub(crate) path: PathBuf,
}

/// What came of looking for a library.
struct Probe {
    stem: &'static str,
    /// The folder that was named.
    first: Option<PathBuf>,
    outcome: std::result::Result<Found, String>,
}

/// All searches so far, one for each library that was found, and one more for each folder in which it was not.
static PROBES: Mutex<Vec<Probe>> = Mutex::new(Vec::new());

impl Wanted {
    fn names(&self) -> impl Iterator<Item = String> {
        self.endings.iter().map(|ending| format!("{}{ending}", self.stem))
    }

    /// Loads it and keeps it loaded, or tells what came of that before.
    ///
    /// # Errors
    /// It is nowhere; the message says what was tried.
    pub(crate) fn find(&self, first: Option<&Path>) -> Result<Found> {
        let mut probes = locked(&PROBES);
        let known = probes.iter().find(|probe| {
            probe.stem == self.stem && (probe.outcome.is_ok() || probe.first.as_deref() == first)
        });
        let outcome = known.map(|probe| probe.outcome.clone()).unwrap_or_else(|| {
            let outcome = self.search(first);
            let first = first.map(Path::to_owned);
            probes.push(Probe { stem: self.stem, first, outcome: outcome.clone() });
            outcome
        });
        outcome.map_err(Error::NoCuda)
    }

    fn search(&self, first: Option<&Path>) -> std::result::Result<Found, String> {
        let folders = usual_folders(|name| env::var_os(name));
        let bare = self.names().map(PathBuf::from);
        let candidates = (first.into_iter().flat_map(|folder| self.in_folder(folder)))
            .chain(bare)
            .chain(folders.iter().flat_map(|folder| self.in_folder(folder)));
        let mut broken = String::new();
        for path in candidates {
            match self.try_load(&path) {
                Ok(library) => return Ok(Found { library, path }),
                // It is there, and the loader says what it lacks.
                Err(libloading::Error::DlOpen { source }) if path.components().count() > 1 => {
                    broken = format!("{broken}; {source}");
                }
                Err(_) => {} // The system says the same of all that it does not find.
            }
        }
        let tried: Vec<String> = (first.into_iter())
            .chain(folders.iter().map(PathBuf::as_path))
            .map(|folder| folder.display().to_string())
            .collect();
        let names: Vec<String> = self.names().collect();
        Err(format!(
            "library missing: {}, {}: tried {} by the system's own search{}{}{broken}",
            self.stem,
            self.purpose,
            names.join(", "),
            if tried.is_empty() { "" } else { " and in " },
            tried.join(", ")
        ))
    }

    fn in_folder(&self, folder: &Path) -> Vec<PathBuf> {
        self.names().map(|name| folder.join(name)).filter(|path| path.is_file()).collect()
    }

    fn try_load(&self, path: &Path) -> std::result::Result<&'static Library, libloading::Error> {
        if let (Some(start), Some(folder)) = (self.companions, path.parent()) {
            let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
            entries
                .map(|entry| entry.path())
                .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(start)))
                .for_each(|path| {
                    let _ = keep(&path); // Without it the library itself may still find its own.
                });
        }
        keep(path)
    }
}

fn keep(path: &Path) -> std::result::Result<&'static Library, libloading::Error> {
    // SAFETY: what NVIDIA's libraries do when they are loaded is what every program that uses CUDA relies on.
    let library = unsafe { Library::new(path) }?;
    Ok(Box::leak(Box::new(library)))
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

    const NOBODY: Wanted = Wanted {
        stem: "libnobody",
        purpose: "which nobody needs",
        endings: &[".so", ".so.7"],
        companions: None,
    };

    #[test]
    fn a_library_that_is_nowhere_is_named_with_what_was_tried_and_what_is_broken() {
        let root = tempfile::tempdir().unwrap();
        let broken = root.path().join("libnobody.so.7");
        std::fs::write(&broken, "no library").unwrap();
        let error = NOBODY.find(Some(root.path())).unwrap_err().to_string();
        let start = format!(
            "library missing: libnobody, which nobody needs: tried libnobody.so, libnobody.so.7 by the system's own search and in {}",
            root.path().display()
        );
        assert!(error.starts_with(&start), "{error}");
        assert!(error.contains(&format!("; {}: ", broken.display())), "{error}");
    }

    /// The C library stands for one of CUDA's that is there.
    #[test]
    fn a_library_is_looked_for_once_and_again_in_another_folder_while_it_is_missing() {
        let wanted = |stem| Wanted { stem, endings: &[".so.6"], ..NOBODY };
        let probes = |stem| locked(&PROBES).iter().filter(|probe| probe.stem == stem).count();
        let [one, other] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        for folder in [one.path(), one.path(), other.path(), other.path()] {
            assert!(wanted("libnowhere").find(Some(folder)).is_err());
            assert_eq!(wanted("libc").find(Some(folder)).unwrap().path, Path::new("libc.so.6"));
        }
        assert_eq!((probes("libnowhere"), probes("libc")), (2, 1));
    }
}
