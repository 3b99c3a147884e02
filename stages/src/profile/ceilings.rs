//! What a device can do at most, measured.

use kernels::{Cpu, CpuOptions, KvDtype, Simd, WeightType};
use serde::Serialize;

use crate::cost::{Channel, Roofline};
use crate::error::Result;
use crate::stage::{self, Device, Dtypes};

/// The ceilings of one device. Clocks and neighbours change, so they hold for about the moment when they were measured.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Ceilings {
    /// Operations a second of products with the blocks' weights.
    pub product_flops_per_second: f64,
    /// The same with what is not narrowed: keys and values, and the output matrix.
    pub wide_product_flops_per_second: f64,
    /// Bytes a second read from memory.
    pub read_bytes_per_second: f64,
}

impl Ceilings {
    /// Measures them, with the device's own threads; the calling thread becomes one of them. The plain loops have those of
    /// one thread of portable code.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn measure(device: &Device, dtypes: Dtypes) -> Result<Self> {
        if matches!(device, Device::Cuda { .. }) {
            return Self::of_gpu(device, dtypes.weights);
        }
        let product =
            ceilings_of(device, dtypes, |ceilings| (ceilings.product_flops(), ceilings.read_bandwidth()))?;
        let wide = Dtypes { weights: dtypes.weights.operands().into(), ..dtypes };
        let wide_product_flops_per_second = match wide == dtypes {
            true => product.0,
            false => ceilings_of(device, wide, |ceilings| ceilings.product_flops())?,
        };
        Ok(Ceilings {
            product_flops_per_second: product.0,
            wide_product_flops_per_second,
            read_bytes_per_second: product.1,
        })
    }

    /// Those of a GPU, whatever is asked of its bits. Products are in bf16, also of integers, but those of E4M3, which are in that.
    /// A copy reads and writes, and its bytes a second are those of both.
    fn of_gpu(device: &Device, weights: WeightType) -> Result<Self> {
        let mut fastest = device.clone();
        if let Device::Cuda { is_deterministic, .. } = &mut fastest {
            *is_deterministic = false;
        }
        let open = |weights| stage::cuda(&fastest, Dtypes { weights, kv: KvDtype::Bf16 });
        let gpu = open(WeightType::Bf16)?;
        let wide = gpu.product_flops()?;
        let narrow = match weights {
            WeightType::Fp8 => open(weights)?.product_flops()?,
            _ => wide,
        };
        Ok(Ceilings {
            product_flops_per_second: narrow,
            wide_product_flops_per_second: wide,
            read_bytes_per_second: gpu.copy_bandwidth()?,
        })
    }

    /// The higher of each: what was measured before and after something else.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Ceilings {
            product_flops_per_second: self.product_flops_per_second.max(other.product_flops_per_second),
            wide_product_flops_per_second: (self.wide_product_flops_per_second)
                .max(other.wide_product_flops_per_second),
            read_bytes_per_second: self.read_bytes_per_second.max(other.read_bytes_per_second),
        }
    }

    /// A floor for steps: products, and reading weights, keys and values. Activations stay in caches and cost nothing.
    pub fn roofline(self) -> Roofline {
        let nowhere = Channel { latency_seconds: 0.0, bytes_per_second: f64::INFINITY };
        Roofline {
            flops_per_second: self.product_flops_per_second,
            bf16_flops_per_second: self.wide_product_flops_per_second,
            attention_flops_per_second: self.wide_product_flops_per_second,
            attention_head_seconds: 0.0,
            bytes_per_second: self.read_bytes_per_second,
            activation_bytes_per_second: f64::INFINITY,
            link: nowhere,
            all_reduce: nowhere,
        }
    }
}

fn ceilings_of<T>(
    device: &Device,
    dtypes: Dtypes,
    read: impl FnOnce(&kernels::Ceilings<'_>) -> T,
) -> Result<T> {
    let cpu = match device {
        Device::Cpu { .. } => stage::cpu(device, dtypes)?,
        Device::Cuda { .. } => unreachable!("a GPU has ceilings of its own"),
        Device::Reference => {
            let Dtypes { weights, kv } = dtypes;
            Cpu::new(CpuOptions { cores: vec![], threads: 1, simd: Simd::Portable, weights, kv })?
        }
    };
    Ok(read(&kernels::Ceilings::new(&cpu)?))
}
