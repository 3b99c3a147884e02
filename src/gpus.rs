//! The machine's GPUs, and where the files that they need are.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use anyhow::{Result, bail};
use configs::{DeviceCatalog, DeviceKind};
use stages::{CudaLibrary, Device, Gpu};

/// Names the folder in which CUDA's libraries are looked for first.
const LIBRARIES: &str = "SPANWISE_CUDA_LIBRARIES";

/// A GPU as a stage's device.
pub(crate) fn device(index: usize, pipeline: &configs::Pipeline) -> Device {
    let (is_deterministic, has_graphs) = (pipeline.deterministic, pipeline.cuda_graphs);
    Device::Cuda { index, libraries: libraries(), cubins: cubins(), is_deterministic, has_graphs }
}

/// Bytes that are free on each GPU that a pipeline names, by its index.
///
/// # Errors
/// One that is not there, and why.
pub(crate) fn free_bytes(pipeline: &configs::Pipeline) -> Result<BTreeMap<usize, u64>> {
    let named: BTreeSet<usize> = pipeline.devices.iter().map(|device| device.index).collect();
    named.into_iter().map(|index| Ok((index, gpu(index)?.free_bytes()?))).collect()
}

/// Multiprocessors of a pipeline's largest GPU.
///
/// # Errors
/// One that is not there, and why.
pub(crate) fn multiprocessors(pipeline: &configs::Pipeline) -> Result<usize> {
    let each = pipeline.devices.iter().map(|device| Ok(gpu(device.index)?.multiprocessors as usize));
    each.collect::<Result<Vec<_>>>().map(|each| each.into_iter().max().unwrap_or(0))
}

/// The GPUs that a pipeline names, each of them once, as the devices of stages.
pub(crate) fn distinct(pipeline: &configs::Pipeline) -> Vec<Device> {
    let mut named: Vec<usize> = Vec::new();
    for configs::Device { index, .. } in &pipeline.devices {
        if !named.contains(index) {
            named.push(*index);
        }
    }
    named.into_iter().map(|index| device(index, pipeline)).collect()
}

/// Refuses to measure GPUs of several kinds: a profile is of devices that are alike.
///
/// # Errors
/// Two that are unlike, by name, or one that is not there, and why.
pub(crate) fn check_one_kind(pipeline: &configs::Pipeline) -> Result<()> {
    if !are_meant(pipeline)? {
        return Ok(());
    }
    let first = gpu(pipeline.devices[0].index)?;
    for device in &pipeline.devices {
        let other = gpu(device.index)?;
        if other.name != first.name {
            bail!(
                "[pipeline] devices: found cuda:{} ({}) and cuda:{} ({}), expected GPUs of one kind: a profile is of devices \
                 that are alike",
                first.index,
                first.name,
                other.index,
                other.name
            );
        }
    }
    Ok(())
}

/// The architecture of a GPU, such as `sm_90a`.
///
/// # Errors
/// It is not there, and why.
pub(crate) fn architecture(index: usize) -> Result<String> {
    Ok(gpu(index)?.architecture())
}

/// Refuses GPUs of unlike architectures where a row's bits must not depend on which blocks are where.
///
/// # Errors
/// Two that are unlike, by name, or one that is not there, and why.
pub(crate) fn check_alike(pipeline: &configs::Pipeline) -> Result<()> {
    let Some(first) = pipeline.devices.first().filter(|_| pipeline.deterministic) else { return Ok(()) };
    let first = gpu(first.index)?;
    for device in &pipeline.devices {
        let other = gpu(device.index)?;
        if other.architecture() != first.architecture() {
            bail!(
                "[pipeline] devices: found cuda:{} ({}, {}) and cuda:{} ({}, {}), expected GPUs of one architecture: \
                 their tensor cores round unlike\nhint: [pipeline] deterministic = false lets answers depend on which has which blocks",
                first.index,
                first.name,
                first.architecture(),
                other.index,
                other.name,
                other.architecture()
            );
        }
    }
    Ok(())
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

/// All GPUs of the machine.
///
/// # Errors
/// Why there are none.
pub(crate) fn all() -> Result<Vec<Gpu>> {
    Ok(Gpu::all(libraries().as_deref())?)
}

fn gpu(index: usize) -> Result<Gpu> {
    Ok(Gpu::nth(libraries().as_deref(), index)?)
}

/// Whether the driver's library is there, with a GPU or without.
pub(crate) fn have_driver() -> bool {
    stages::has_cuda_driver(libraries().as_deref())
}

/// CUDA's libraries beside the driver's, and whether they are there.
pub(crate) fn cuda_libraries() -> [CudaLibrary; 3] {
    stages::cuda_libraries(libraries().as_deref())
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
