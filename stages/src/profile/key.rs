//! What a profile holds for: a device, number types, and a model's dimensions.

use serde::{Deserialize, Serialize};

use super::machine;
use crate::block::Dims;
use crate::stage::{Device, Dtypes};
use kernels::Gpu;

/// A device as far as its speed depends on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceKey {
    /// `cpu`, `cuda` or `reference`.
    pub backend: String,
    /// The processor, with its family and model: hypervisors give one name to several. Or the GPU, as NVIDIA calls it.
    pub processor: String,
    /// Level of vector instructions, or a GPU's architecture.
    pub simd: String,
    /// Threads of one device.
    pub threads: usize,
    /// Such devices that share the memory, or of GPUs that hand over to each other, this one counted.
    pub devices: usize,
    /// Of a GPU, whether a row's bits are the same in any batch, which other kernels see to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deterministic: Option<bool>,
    /// Of a GPU, whether steps of rows that decode are captured as graphs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cuda_graphs: Option<bool>,
}

/// All that a profile's figures depend on beside the shapes of its entries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProfileKey {
    /// Where.
    pub device: DeviceKey,
    /// Number type of weights.
    pub weights: String,
    /// Number type of keys and values.
    pub kv: String,
    /// Of the model.
    pub dims: Dims,
    /// Bytes of weights that a device walks through before it comes to the same ones again: twice the last
    /// cache, or a device's share of a model that is smaller.
    pub walked_bytes: u64,
}

impl DeviceKey {
    /// One of `devices` alike of this machine.
    pub fn of(device: &Device, devices: usize) -> Self {
        let (backend, simd, threads) = match device {
            Device::Reference => ("reference", "none", 1),
            Device::Cpu { threads, simd, .. } => ("cpu", simd.name(), *threads),
            Device::Cuda { index, libraries, is_deterministic, has_graphs, .. } => {
                // One that is not there is refused when it is opened.
                let gpu = Gpu::nth(libraries.as_deref(), *index);
                let (processor, simd) =
                    gpu.map_or_else(|_| Default::default(), |gpu| (gpu.name.clone(), gpu.architecture()));
                let backend = "cuda".to_owned();
                let (deterministic, cuda_graphs) = (Some(*is_deterministic), Some(*has_graphs));
                return DeviceKey {
                    backend,
                    processor,
                    simd,
                    threads: 1,
                    devices,
                    deterministic,
                    cuda_graphs,
                };
            }
        };
        DeviceKey {
            backend: backend.to_owned(),
            processor: machine::processor(),
            simd: simd.to_owned(),
            threads,
            devices,
            deterministic: None,
            cuda_graphs: None,
        }
    }
}

impl std::fmt::Display for DeviceKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let DeviceKey { backend, processor, simd, threads, devices, deterministic, .. } = self;
        if backend == "cuda" {
            write!(f, "{backend} {simd} on {processor}")?;
            if *devices > 1 {
                write!(f, ", {devices} of them")?;
            }
            return f.write_str(if *deterministic == Some(false) { ", not deterministic" } else { "" });
        }
        write!(f, "{backend} {simd} on {processor}, {devices} x {threads} threads")
    }
}

impl ProfileKey {
    /// For a model of `model_bytes` of weights on one of `devices` alike of this machine.
    pub fn of(device: &Device, devices: usize, dtypes: Dtypes, dims: Dims, model_bytes: u64) -> Self {
        ProfileKey {
            device: DeviceKey::of(device, devices),
            weights: dtypes.weights.name().to_owned(),
            kv: dtypes.kv.name().to_owned(),
            dims,
            walked_bytes: machine::cold_bytes(device).min(model_bytes.div_ceil(devices as u64)),
        }
    }

    /// Name of its file: words for people, and a hash of the whole key.
    pub fn file_name(&self) -> String {
        let json = serde_json::to_vec(self).expect("a key is JSON");
        let hash = blake3::hash(&json).to_hex();
        let DeviceKey { processor, simd, threads, devices, .. } = &self.device;
        let processor: Vec<&str> =
            processor.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty()).collect();
        let words = format!(
            "{}-{simd}-{devices}x{threads}-{}-h{}",
            processor.join("-"),
            self.weights,
            self.dims.hidden
        );
        format!("{}-{}.json", words.to_lowercase(), &hash[..12])
    }
}
