//! Which GPUs there are, or why there are none, and which of the libraries that they need.

use std::path::{Path, PathBuf};

use cudarc::driver::{result, sys};

use super::libraries::{CUBLASLT, DRIVER, NCCL, NVRTC};
use super::stream::Stream;
use super::{nccl, program};
use crate::error::{Error, Result};

/// The oldest CUDA whose driver has every call that is made here: `cuEventElapsedTime_v2` came last.
const OLDEST_CUDA: i32 = 12_080;

/// A GPU of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// Which one, as the driver counts them.
    pub index: usize,
    /// As NVIDIA calls it.
    pub name: String,
    /// Compute capability: 9.0 is Hopper.
    pub capability: (u32, u32),
    /// Multiprocessors, which share out a kernel's thread blocks.
    pub multiprocessors: u32,
    /// All of its memory.
    pub total_bytes: u64,
    /// Largest memory of a thread block.
    pub(crate) block_bytes: u32,
}

impl Gpu {
    /// The GPUs of this machine, looking for libraries in a folder first where one is named.
    ///
    /// # Errors
    /// No driver, one that is too old, or no device; the message says which.
    pub fn all(libraries: Option<&Path>) -> Result<Vec<Gpu>> {
        start(libraries)?;
        let count = result::device::get_count().map_err(|error| no_cuda("count devices", error))?;
        (0..count as usize).map(Gpu::get).collect()
    }

    /// One of them.
    ///
    /// # Errors
    /// As [`Gpu::all`], or there is no such one.
    pub fn nth(libraries: Option<&Path>, index: usize) -> Result<Gpu> {
        let mut all = Gpu::all(libraries)?;
        match index < all.len() {
            true => Ok(all.swap_remove(index)),
            false => Err(Error::NoCuda(format!(
                "there is no cuda:{index}, the driver counts {} devices",
                all.len()
            ))),
        }
    }

    fn get(index: usize) -> Result<Gpu> {
        use sys::CUdevice_attribute_enum as Attribute;
        let what = |error| no_cuda("ask a device", error);
        let device = result::device::get(index as i32).map_err(what)?;
        let attribute = |attribute| {
            // SAFETY: the device is one that the driver has just given.
            let value = unsafe { result::device::get_attribute(device, attribute) };
            value.map(|value| value as u32).map_err(what)
        };
        Ok(Gpu {
            index,
            name: result::device::get_name(device).map_err(what)?,
            capability: (
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            block_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            // SAFETY: as above.
            total_bytes: unsafe { result::device::total_mem(device) }.map_err(what)? as u64,
        })
    }

    /// Bytes of its memory that are free. To ask, the device is opened, which takes some of it and some tenths of a second.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn free_bytes(&self) -> Result<u64> {
        Ok(Stream::open(self.index)?.free_bytes()? as u64)
    }

    /// The architecture that kernels are compiled for. From Hopper on it is the device's own, `a`: tensor cores have
    /// instructions there that no later one need have.
    pub fn architecture(&self) -> String {
        let (major, minor) = self.capability;
        format!("sm_{major}{minor}{}", if major >= 9 { "a" } else { "" })
    }
}

/// One of CUDA's libraries beside the driver's.
#[derive(Debug)]
pub struct CudaLibrary {
    /// Such as `libnvrtc`.
    pub name: &'static str,
    /// Its file, or its bare name where the system has found it; or why it is of no use, with what it is for.
    pub found: Result<PathBuf>,
}

/// Whether the driver's library is there, looked for in a folder first where one is named.
pub fn has_cuda_driver(first: Option<&Path>) -> bool {
    DRIVER.find(first).is_ok()
}

/// CUDA's libraries, looked for in a folder first where one is named.
pub fn cuda_libraries(first: Option<&Path>) -> [CudaLibrary; 3] {
    let has_driver = start(first).is_ok();
    [NVRTC, CUBLASLT, NCCL].map(|wanted| {
        let found = wanted.find(first).map(|found| found.path);
        // Of no use to an older driver, or too old itself.
        let found = found.and_then(|path| match wanted.stem {
            stem if stem == NVRTC.stem && has_driver => program::find_compiler(first).map(|_| path),
            stem if stem == NCCL.stem => nccl::find(first).map(|_| path),
            _ => Ok(path),
        });
        CudaLibrary { name: wanted.stem, found }
    })
}

/// Loads the driver and starts it. cudarc panics where there is no driver: everything of it comes after this.
fn start(libraries: Option<&Path>) -> Result<()> {
    DRIVER.find(libraries).map_err(|error| Error::NoCuda(format!("no CUDA driver: {error}")))?;
    result::init().map_err(|error| no_cuda("start the driver", error))?;
    let version = driver_version()?;
    if version < OLDEST_CUDA {
        let (found, oldest) = (version_name(version), version_name(OLDEST_CUDA));
        return Err(Error::NoCuda(format!(
            "driver too old: it is for CUDA {found}, expected {oldest} at least\nhint: install a driver of release 570 or later"
        )));
    }
    Ok(())
}

/// The newest CUDA that the driver is for, such as 13000.
pub(crate) fn driver_version() -> Result<i32> {
    let mut version = 0;
    // SAFETY: the driver writes a number there.
    unsafe { sys::cuDriverGetVersion(&mut version) }
        .result()
        .map_err(|error| no_cuda("ask the driver", error))?;
    Ok(version)
}

/// Such as `12.8`.
pub(crate) fn version_name(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

fn no_cuda(what: &str, error: result::DriverError) -> Error {
    Error::NoCuda(format!("{what}: {:?}", error.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn architectures_are_a_devices_own_from_hopper_on() {
        let gpu = |capability| Gpu {
            index: 0,
            name: String::new(),
            capability,
            multiprocessors: 1,
            total_bytes: 0,
            block_bytes: 0,
        };
        let names =
            [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)].map(|capability| gpu(capability).architecture());
        assert_eq!(names, ["sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120a"]);
        assert_eq!(version_name(12_080), "12.8");
    }
}
