//! The machine's GPUs, where the files that they need are, and `spanwise devices`.

use std::path::PathBuf;

use anyhow::{Result, bail};
use configs::{DeviceCatalog, DeviceKind};
use stages::{Device, Gpu, Simd};

use crate::lower::Machine;
use crate::{machine, print};

/// Names the folder in which CUDA's libraries are looked for first.
const LIBRARIES: &str = "SPANWISE_CUDA_LIBRARIES";

/// Of a GPU's memory so much is left to the driver and to what a step works in, at most.
const RESERVED_BYTES: u64 = 2 << 30;

/// As that, of small memories: one part in so many.
const RESERVED_SHARE: u64 = 8;

/// Prints the devices that a job file can name, and where there is no GPU, why.
pub(crate) fn devices() -> Result<()> {
    let Machine { cores, free_bytes, .. } = machine::detect();
    let gigabytes = |bytes: u64| format!("{:.1} GB", bytes as f64 / 1e9);
    let (cores, simd) = (cores.len(), Simd::detect().name());
    print(&format!(
        "cpu:0    {cores} cores, {simd}, {} of memory free; cpu:0, cpu:1, … share them out",
        gigabytes(free_bytes)
    ));
    match Gpu::all(libraries().as_deref()) {
        Ok(gpus) if gpus.is_empty() => print("cuda     none: the driver counts no device"),
        Ok(gpus) => gpus.iter().for_each(|gpu| {
            let (major, minor) = gpu.capability;
            print(&format!(
                "cuda:{}   {}, compute capability {major}.{minor}, {} multiprocessors, {}",
                gpu.index,
                gpu.name,
                gpu.multiprocessors,
                gigabytes(gpu.total_bytes)
            ));
        }),
        Err(why) => print(&format!("cuda     none: {why}")),
    }
    Ok(())
}

/// A GPU as a stage's device.
pub(crate) fn device(index: usize) -> Device {
    Device::Cuda { index, libraries: libraries(), cubins: cubins() }
}

/// What the named GPUs have for weights, keys and values, together.
///
/// # Errors
/// One that is not there, and why.
pub(crate) fn free_bytes(pipeline: &configs::Pipeline) -> Result<u64> {
    let mut bytes = 0;
    let mut seen = vec![];
    for device in &pipeline.devices {
        if !seen.contains(&device.index) {
            seen.push(device.index);
            let total = gpu(device.index)?.total_bytes;
            bytes += total - RESERVED_BYTES.min(total / RESERVED_SHARE);
        }
    }
    Ok(bytes)
}

/// What the catalog of devices calls a GPU; of one that it does not know, what is nearest to most.
pub(crate) fn catalog_name(index: usize) -> Result<String> {
    let name = gpu(index)?.name.to_lowercase().replace(' ', "-");
    let catalog = DeviceCatalog::shipped();
    Ok(known_name(&catalog, &name).unwrap_or_else(|| "h100-80gb".to_owned()))
}

fn known_name(catalog: &DeviceCatalog, gpu: &str) -> Option<String> {
    let family = |name: &str| name.split('-').next().unwrap_or_default().to_owned();
    catalog
        .names()
        .find(|name| gpu.contains(&family(name)) && configs::cpu_of(name).is_none())
        .map(str::to_owned)
}

/// Whether a pipeline's devices are GPUs.
///
/// # Errors
/// Devices of two kinds: their results have not the same bits.
pub(crate) fn are_meant(pipeline: &configs::Pipeline) -> Result<bool> {
    let is_gpu = |device: &configs::Device| device.kind == DeviceKind::Cuda;
    let count = pipeline.devices.iter().filter(|device| is_gpu(device)).count();
    if count != 0 && count != pipeline.devices.len() {
        bail!(
            "[pipeline] devices: found cpu and cuda devices, expected one kind: their numbers differ in the last bits"
        );
    }
    Ok(count != 0)
}

fn gpu(index: usize) -> Result<Gpu> {
    Ok(Gpu::nth(libraries().as_deref(), index)?)
}

fn libraries() -> Option<PathBuf> {
    std::env::var_os(LIBRARIES).map(PathBuf::from)
}

/// `spanwise/cubins` of the user's caches.
fn cubins() -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")));
    cache.map(|cache| cache.join("spanwise/cubins"))
}
