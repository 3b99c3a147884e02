//! `spanwise devices`: what a job file can name, where there is no GPU, why, and which of CUDA's libraries are there.

use anyhow::Result;
use serde::Serialize;
use stages::{CudaLibrary, Gpu, Simd};

use crate::cli::Format;
use crate::lower::Machine;
use crate::{gpus, machine, print, text};

/// What the machine has.
#[derive(Debug, Serialize)]
struct Devices {
    cpu: Cpu,
    cuda: Vec<Cuda>,
    /// Whether there is libcuda.
    #[serde(skip)]
    has_driver: bool,
    /// Why there is no GPU, where there is none.
    no_cuda: Option<String>,
    /// CUDA's, beside the driver's.
    libraries: Vec<Library>,
}

#[derive(Debug, Serialize)]
struct Cpu {
    /// What a job calls all of it.
    device: &'static str,
    cores: usize,
    simd: &'static str,
    free_bytes: u64,
    total_bytes: u64,
}

#[derive(Debug, Serialize)]
struct Cuda {
    /// What a job calls it.
    device: String,
    name: String,
    /// Such as `9.0`.
    compute_capability: String,
    architecture: String,
    multiprocessors: u32,
    total_bytes: u64,
}

#[derive(Debug, Serialize)]
struct Library {
    name: &'static str,
    /// Its file, or its bare name where the system has found it; nothing where it is of no use.
    path: Option<String>,
    /// What is wrong with it, and what it is for; nothing where it is there.
    error: Option<String>,
}

/// Prints them.
pub(crate) fn devices(format: Format) -> Result<()> {
    let devices = Devices::found();
    match format {
        Format::Text => devices.lines().iter().for_each(|line| print(line)),
        Format::Json => print(&serde_json::to_string_pretty(&devices)?),
    }
    Ok(())
}

impl Devices {
    fn found() -> Devices {
        let Machine { cores, free_bytes, total_bytes } = machine::detect();
        let simd = Simd::detect().name();
        let (cuda, no_cuda) = match gpus::all() {
            Ok(gpus) if gpus.is_empty() => (vec![], Some("the driver counts no device".to_owned())),
            Ok(gpus) => (gpus.into_iter().map(Cuda::from).collect(), None),
            Err(why) => (vec![], Some(why.to_string())),
        };
        Devices {
            cpu: Cpu { device: "cpu:0", cores: cores.len(), simd, free_bytes, total_bytes },
            cuda,
            has_driver: gpus::have_driver(),
            no_cuda,
            libraries: gpus::cuda_libraries().into_iter().map(Library::from).collect(),
        }
    }

    fn lines(&self) -> Vec<String> {
        let Cpu { device, cores, simd, free_bytes, .. } = &self.cpu;
        let free = text::bytes(*free_bytes);
        let mut lines = vec![format!(
            "{device}    {cores} cores, {simd}, {free} of memory free; cpu:0, cpu:1, … share them out"
        )];
        lines.extend(self.cuda.iter().map(|gpu| {
            format!(
                "{}   {}, compute capability {}, {} multiprocessors, {}",
                gpu.device,
                gpu.name,
                gpu.compute_capability,
                gpu.multiprocessors,
                text::bytes(gpu.total_bytes)
            )
        }));
        lines.extend(self.no_cuda.iter().map(|why| format!("cuda     none: {why}")));
        // Without the driver none of them is of any use.
        let libraries = self.libraries.iter().filter(|_| self.has_driver);
        lines.extend(libraries.map(|library| match (&library.path, &library.error) {
            (Some(path), _) => format!("cuda     {}: {path}", library.name),
            (None, error) => format!("cuda     {}", error.as_deref().unwrap_or_default()),
        }));
        lines
    }
}

impl From<CudaLibrary> for Library {
    fn from(CudaLibrary { name, found }: CudaLibrary) -> Library {
        match found {
            Ok(path) => Library { name, path: Some(path.display().to_string()), error: None },
            Err(error) => Library { name, path: None, error: Some(error.to_string()) },
        }
    }
}

impl From<Gpu> for Cuda {
    fn from(gpu: Gpu) -> Cuda {
        let (major, minor) = gpu.capability;
        Cuda {
            device: format!("cuda:{}", gpu.index),
            compute_capability: format!("{major}.{minor}"),
            architecture: gpu.architecture(),
            multiprocessors: gpu.multiprocessors,
            total_bytes: gpu.total_bytes,
            name: gpu.name,
        }
    }
}
