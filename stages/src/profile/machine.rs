//! What is known of processors, and of the caches of all devices.

use crate::stage::Device;

/// The largest L2 cache of a GPU that we know, a B200's.
const GPU_CACHE_BYTES: u64 = 126_000_000;

/// Weights that were walked through twice the last cache ago are in no cache any more.
pub(super) fn cold_bytes(device: &Device) -> u64 {
    match device {
        Device::Cuda { .. } => 2 * GPU_CACHE_BYTES,
        Device::Cpu { .. } | Device::Reference => kernels::cold_bytes(),
    }
}

/// The processor's name with its family and model, as far as the system says.
pub(super) fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    processor_of(&text).unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

fn processor_of(cpuinfo: &str) -> Option<String> {
    let field = |name: &str| {
        cpuinfo.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            (key.trim() == name).then(|| value.trim())
        })
    };
    let name = field("model name")?;
    match (field("cpu family"), field("model")) {
        (Some(family), Some(model)) => Some(format!("{name} (family {family}, model {model})")),
        _ => Some(name.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_read_as_linux_writes_them() {
        let cpuinfo = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n";
        assert_eq!(processor_of(cpuinfo).unwrap(), "AMD EPYC (family 25, model 17)");
        assert_eq!(processor_of("model name : Cortex"), Some("Cortex".to_owned()));
    }
}
