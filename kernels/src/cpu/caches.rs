//! How much has to be read until nothing of before is left in a cache, as the system tells it.

use std::path::Path;

/// Where the system does not say how large the last cache is: as much as a server's processors have for eight cores.
const CACHE_BYTES_IF_UNKNOWN: u64 = 32 << 20;

/// Bytes of twice the last cache: what was read so many bytes ago is in no cache of the processor any more.
pub fn cold_bytes() -> u64 {
    2 * last_cache_bytes(Path::new("/sys/devices/system/cpu/cpu0/cache")).unwrap_or(CACHE_BYTES_IF_UNKNOWN)
}

/// As many bytes, and no fewer than `least`, as far as a quarter of the free memory has room for more than that.
pub fn cold_bytes_with_room(least: usize) -> usize {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    most_with_room(least, cold_bytes(), free_bytes(&meminfo).unwrap_or(0))
}

fn most_with_room(least: usize, wanted: u64, free: u64) -> usize {
    usize::try_from(wanted.min(free / 4)).unwrap_or(usize::MAX).max(least)
}

/// The memory that new work can have, of what `/proc/meminfo` says.
fn free_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn caches_and_memory_are_read_as_linux_writes_them() {
        assert_eq!(
            [cache_bytes("32768K"), cache_bytes("4M"), cache_bytes("?")],
            [Some(32 << 20), Some(4 << 20), None]
        );
        let meminfo = "MemTotal:       24684024 kB\nMemAvailable:   23481000 kB\n";
        assert_eq!(free_bytes(meminfo), Some(23_481_000 * 1024));
        assert_eq!(free_bytes("MemTotal: 1 kB\n"), None);
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

    #[test]
    fn more_than_the_least_is_taken_of_a_quarter_of_the_free_memory() {
        assert_eq!(most_with_room(256, 960, 8000), 960);
        assert_eq!(most_with_room(256, 960, 2000), 500);
        assert_eq!(most_with_room(256, 960, 100), 256);
        assert_eq!(most_with_room(256, 16, 8000), 256);
    }
}
