//! What the machine has, as the system tells it.

use crate::lower::Machine;

/// Used where the system does not say how much memory is free: little enough for any machine.
const FREE_BYTES_IF_UNKNOWN: u64 = 2 << 30;

/// The cores and the memory of this machine.
pub(crate) fn detect() -> Machine {
    let free_bytes = proc_kilobytes("/proc/meminfo", "MemAvailable:").unwrap_or(FREE_BYTES_IF_UNKNOWN);
    let total_bytes = proc_kilobytes("/proc/meminfo", "MemTotal:").unwrap_or(free_bytes);
    Machine { cores: stages::available_cores(), free_bytes, total_bytes }
}

/// The most memory that this process has held at once, in bytes, where the system says.
pub(crate) fn peak_bytes() -> Option<u64> {
    proc_kilobytes("/proc/self/status", "VmHWM:")
}

/// Reads a line such as `VmHWM:   123 kB`.
fn proc_kilobytes(file: &str, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    let kilobytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kilobytes * 1024)
}
