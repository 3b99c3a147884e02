//! How the machine's cores are shared out to CPU devices.

use std::collections::BTreeSet;
use std::ops::Range;

use configs::{Device, DeviceKind, Pipeline};

/// Groups of cores that there are: as many as the highest device named needs.
pub(crate) fn num_groups(pipeline: &Pipeline) -> usize {
    pipeline.devices.iter().map(|device| device.index + 1).max().unwrap_or(1)
}

/// The `index`-th of `num_groups` equal groups of cores. Where there are more groups than cores,
/// neighbours share one.
pub(crate) fn core_group(num_cores: usize, num_groups: usize, index: usize) -> Range<usize> {
    let start = index * num_cores / num_groups;
    let end = ((index + 1) * num_cores / num_groups).max(start + 1);
    start..end
}

/// What the user should know whose devices are on the same core.
pub(crate) fn crowded(pipeline: &Pipeline, num_cores: usize) -> Option<String> {
    let num_groups = num_groups(pipeline);
    let is_cpu = |device: &&Device| device.kind == DeviceKind::Cpu;
    let named: BTreeSet<usize> = pipeline.devices.iter().filter(is_cpu).map(|device| device.index).collect();
    let named: Vec<usize> = named.into_iter().collect();
    let core = |index| core_group(num_cores, num_groups, index).start;
    // Only where there are more groups than cores do two of them begin with the same one.
    let [one, other] = *named.windows(2).find(|pair| core(pair[0]) == core(pair[1]))? else { return None };
    Some(format!(
        "[pipeline] devices: cpu:{one} and cpu:{other} share a core, since {num_groups} groups are made of this machine's \
         {num_cores} cores; name no device beyond cpu:{}",
        num_cores - 1
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn core_groups_are_equal_and_cover_the_machine() {
        let groups = |cores, groups| (0..groups).map(|i| core_group(cores, groups, i)).collect::<Vec<_>>();
        assert_eq!(core_group(2, 1, 0), 0..2);
        assert_eq!(groups(2, 2), [0..1, 1..2]);
        assert_eq!(groups(8, 3), [0..2, 2..5, 5..8]);
        assert_eq!(groups(2, 4), [0..1, 0..1, 1..2, 1..2]);
        assert_eq!(groups(1, 3), [0..1, 0..1, 0..1]);
    }

    #[test]
    fn whoever_names_two_devices_on_one_core_is_told_which() {
        let told = |devices: &[usize], cores| {
            let devices = devices.iter().map(|index| Device::cpu(*index)).collect();
            crowded(&Pipeline { devices, ..Pipeline::default() }, cores)
        };
        assert_eq!(
            told(&[0, 1, 2], 2).unwrap(),
            "[pipeline] devices: cpu:0 and cpu:1 share a core, since 3 groups are made of this machine's 2 cores; name no \
             device beyond cpu:1"
        );
        // Others than the first ones, and a device that is named twice.
        assert!(told(&[0, 3, 2, 3], 2).unwrap().contains("cpu:2 and cpu:3 share"));
        assert_eq!(told(&[0, 5], 2), None);
        assert_eq!(told(&[0, 1, 0, 1], 2), None);
        let gpus = vec![Device { kind: DeviceKind::Cuda, index: 0 }; 2];
        assert_eq!(crowded(&Pipeline { devices: gpus, ..Pipeline::default() }, 1), None);
    }
}
