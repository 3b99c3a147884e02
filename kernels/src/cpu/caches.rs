//! How large the processor's caches are, as the system tells it: those of a core, by which products are cut, and how much has
//! to be read until nothing of before is left in the last one.

use crate::cpu::simd::Simd;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

/// Where the system does not say how large the last cache is: as much as a server's processors have for eight cores.
const CACHE_BYTES_IF_UNKNOWN: u64 = 32 << 20;

/// L1 caches that cores have, or their part of one. What is told beyond that is a hypervisor's invention.
const L1_BYTES: RangeInclusive<u64> = 16 << 10..=256 << 10;

/// The same of L2; a larger one is shared with cores of which the system does not tell, or with others' than the pool's, or invented.
const L2_BYTES: RangeInclusive<u64> = 128 << 10..=3 << 20;

/// A core's share of its caches, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CoreCaches {
    /// That for data.
    pub(crate) l1: usize,
    pub(crate) l2: usize,
}

impl CoreCaches {
    /// Those of the cores of a pool, by the system's numbers, as the first one has them; what it does not tell is as usual. Where
    /// threads run on any cores, core 0 stands for all, and its caches are taken whole. Hyperthreads share what their core has.
    pub(crate) fn of(cores: &[usize]) -> Self {
        let first = cores.first().copied().unwrap_or(0);
        Self::told(&data_caches(&folder_of(first)), cores, Self::usual(Simd::detect()))
    }

    /// What processors of a level have: all with AMX that there are, and those of the smaller kind of the others.
    fn usual(simd: Simd) -> Self {
        match simd {
            Simd::Amx => Self { l1: 48 << 10, l2: 2 << 20 },
            _ => Self { l1: 32 << 10, l2: 1 << 20 },
        }
    }

    /// A core's share of what is told, as far as that can be true, among those of some cores.
    fn told(caches: &[Cache], cores: &[usize], usual: Self) -> Self {
        let of_level = |level, possible: RangeInclusive<u64>, usual| {
            let told = caches.iter().find(|cache| cache.level == level);
            let told = told.filter(|cache| cache.bytes >= *possible.start());
            let share = told.map(|cache| cache.share(cores)).filter(|bytes| bytes <= possible.end());
            // Products are not cut for less.
            share.map_or(usual, |bytes| bytes.max(*possible.start()) as usize)
        };
        Self { l1: of_level(1, L1_BYTES, usual.l1), l2: of_level(2, L2_BYTES, usual.l2) }
    }
}

/// Bytes of twice the last cache: what was read so many bytes ago is in no cache of the processor any more.
pub fn cold_bytes() -> u64 {
    2 * last_cache_bytes(&data_caches(&folder_of(0))).unwrap_or(CACHE_BYTES_IF_UNKNOWN)
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

/// A cache that data goes through.
struct Cache {
    /// 1 for the one next to the core.
    level: u32,
    bytes: u64,
    /// Those that share it, by the system's numbers.
    cores: Vec<RangeInclusive<usize>>,
}

impl Cache {
    /// What each of some cores has of it, where some of these share it.
    fn share(&self, cores: &[usize]) -> u64 {
        let is_sharing = |core: &&usize| self.cores.iter().any(|cores| cores.contains(core));
        let num_sharing = cores.iter().filter(is_sharing).count();
        self.bytes / num_sharing.max(1) as u64
    }
}

/// Where Linux describes a core's caches.
fn folder_of(core: usize) -> PathBuf {
    PathBuf::from(format!("/sys/devices/system/cpu/cpu{core}/cache"))
}

/// The caches that a folder of the system's describes, in no order; none where there is no such folder.
fn data_caches(folder: &Path) -> Vec<Cache> {
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    entries.filter_map(|entry| data_cache(&entry.ok()?.path())).collect()
}

fn data_cache(folder: &Path) -> Option<Cache> {
    let field = |name| std::fs::read_to_string(folder.join(name)).ok();
    if field("type")?.trim() == "Instruction" {
        return None;
    }
    Some(Cache {
        level: field("level")?.trim().parse().ok()?,
        bytes: cache_bytes(field("size")?.trim())?,
        cores: field("shared_cpu_list").and_then(|list| listed(list.trim())).unwrap_or_default(),
    })
}

/// Reads `0-3,8`.
fn listed(list: &str) -> Option<Vec<RangeInclusive<usize>>> {
    let cores = list.split(',').map(|cores| {
        let (first, last) = cores.split_once('-').unwrap_or((cores, cores));
        Some(first.parse().ok()?..=last.parse().ok()?)
    });
    cores.collect()
}

/// The largest of some caches.
fn last_cache_bytes(caches: &[Cache]) -> Option<u64> {
    caches.iter().map(|cache| cache.bytes).max()
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

    /// What is told of a folder with caches of `(level, type, size)`, each of a core's own.
    fn caches_of(told: &[(&str, &str, &str)]) -> Vec<Cache> {
        caches_of_cores(&told.iter().map(|&(level, kind, size)| (level, kind, size, "0")).collect::<Vec<_>>())
    }

    /// The same of caches of `(level, type, size, cores)`; of cores nothing is told where there are none.
    fn caches_of_cores(told: &[(&str, &str, &str, &str)]) -> Vec<Cache> {
        let folder = tempfile::tempdir().unwrap();
        for (index, (level, kind, size, cores)) in told.iter().enumerate() {
            let cache = folder.path().join(format!("index{index}"));
            std::fs::create_dir(&cache).unwrap();
            for (name, field) in
                [("level", level), ("type", kind), ("size", size), ("shared_cpu_list", cores)]
            {
                if !field.is_empty() {
                    std::fs::write(cache.join(name), format!("{field}\n")).unwrap();
                }
            }
        }
        std::fs::write(folder.path().join("uevent"), "").unwrap();
        data_caches(folder.path())
    }

    #[test]
    fn caches_of_data_are_told_apart() {
        let caches = caches_of(&[
            ("1", "Instruction", "64K"),
            ("1", "Data", "32K"),
            ("3", "Unified", "32768K"),
            ("2", "Unified", "512K"),
        ]);
        assert_eq!(last_cache_bytes(&caches), Some(32 << 20));
        let usual = CoreCaches::usual(Simd::Amx);
        assert_eq!(CoreCaches::told(&caches, &[0], usual), CoreCaches { l1: 32 << 10, l2: 512 << 10 });
    }

    #[test]
    fn what_is_not_told_or_cannot_be_true_is_as_usual() {
        let usual = CoreCaches::usual(Simd::Avx2);
        assert_eq!(CoreCaches::told(&data_caches(Path::new("/nowhere")), &[0], usual), usual);
        assert_eq!(last_cache_bytes(&[]), None);
        let caches = caches_of(&[("1", "Data", "0K"), ("2", "Unified", "16M"), ("3", "Unified", "?")]);
        assert_eq!(CoreCaches::told(&caches, &[0], usual), usual);
        let caches = caches_of(&[("2", "Unified", "2048K")]);
        assert_eq!(CoreCaches::told(&caches, &[0], usual), CoreCaches { l1: 32 << 10, l2: 2 << 20 });
    }

    #[test]
    fn cores_of_a_pool_share_what_their_hyperthreads_do() {
        let usual = CoreCaches::usual(Simd::Avx2);
        let share = |[l1, l2]: [&str; 2], shared: &str, cores: &[usize]| {
            let caches = caches_of_cores(&[("1", "Data", l1, shared), ("2", "Unified", l2, shared)]);
            let CoreCaches { l1, l2 } = CoreCaches::told(&caches, cores, usual);
            [l1 >> 10, l2 >> 10]
        };
        let usual_size = ["48K", "2048K"];
        assert_eq!(share(usual_size, "0-1", &[0, 1]), [24, 1024]);
        assert_eq!(share(usual_size, "0,4", &[0, 1, 4]), [24, 1024]);
        // The other hyperthread is nobody's or another pool's, or there is none.
        assert_eq!(share(usual_size, "0,4", &[0, 1]), [48, 2048]);
        assert_eq!(share(usual_size, "0", &[0, 1]), [48, 2048]);
        assert_eq!(share(usual_size, "", &[0, 1]), [48, 2048]);
        assert_eq!(share(usual_size, "?", &[0, 1]), [48, 2048]);
        assert_eq!(share(usual_size, "0-1", &[]), [48, 2048]);
        // An L2 of several cores, and no less than products are cut for.
        assert_eq!(share(["32K", "4096K"], "0-3", &[0, 1, 2, 3]), [16, 1024]);
    }

    #[test]
    fn more_than_the_least_is_taken_of_a_quarter_of_the_free_memory() {
        assert_eq!(most_with_room(256, 960, 8000), 960);
        assert_eq!(most_with_room(256, 960, 2000), 500);
        assert_eq!(most_with_room(256, 960, 100), 256);
        assert_eq!(most_with_room(256, 16, 8000), 256);
    }
}
