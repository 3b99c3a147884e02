//! What is known of processors, and of the caches of all devices.

use std::path::Path;

use crate::stage::Device;

/// Where the system does not say how large the last cache is: as much as a server's processors have for eight cores.
const CACHE_BYTES_IF_UNKNOWN: u64 = 32 << 20;

/// The largest L2 cache of a GPU that we know, a B200's.
const GPU_CACHE_BYTES: u64 = 126_000_000;

/// Weights that were walked through twice the last cache ago are in no cache any more.
pub(super) fn cold_bytes(device: &Device) -> u64 {
    2 * match device {
        Device::Cuda { .. } => GPU_CACHE_BYTES,
        Device::Cpu { .. } | Device::Reference => {
            last_cache_bytes(Path::new("/sys/devices/system/cpu/cpu0/cache"))
                .unwrap_or(CACHE_BYTES_IF_UNKNOWN)
        }
    }
}

/// The largest of the caches that a folder of the system's describes.
fn last_cache_bytes(folder: &Path) -> Option<u64> {
    let entries = std::fs::read_dir(folder).ok()?;
    let sizes = entries.filter_map(|entry| std::fs::read_to_string(entry.ok()?.path().join("size")).ok());
    sizes.filter_map(|size| cache_bytes(size.trim())).max()
}

/// Reads `32768K` and `4M`.
fn cache_bytes(size: &str) -> Option<u64> {
    let (number, shift) = match size.strip_suffix('M') {
        Some(number) => (number, 20),
        None => (size.strip_suffix('K')?, 10),
    };
    number.parse::<u64>().ok()?.checked_shl(shift)
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
    fn caches_and_processors_are_read_as_linux_writes_them() {
        assert_eq!(
            [cache_bytes("32768K"), cache_bytes("4M"), cache_bytes("?")],
            [Some(32 << 20), Some(4 << 20), None]
        );
        let cpuinfo = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n";
        assert_eq!(processor_of(cpuinfo).unwrap(), "AMD EPYC (family 25, model 17)");
        assert_eq!(processor_of("model name : Cortex"), Some("Cortex".to_owned()));
    }

    #[test]
    fn of_several_caches_the_largest_counts() {
        let folder = tempfile::tempdir().unwrap();
        for (index, size) in [("index0", "48K\n"), ("index3", "32768K\n"), ("index2", "1024K\n")] {
            std::fs::create_dir(folder.path().join(index)).unwrap();
            std::fs::write(folder.path().join(index).join("size"), size).unwrap();
        }
        assert_eq!(last_cache_bytes(folder.path()), Some(32 << 20));
        assert_eq!(last_cache_bytes(&folder.path().join("none")), None);
    }
}
