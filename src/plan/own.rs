//! The devices of `[pipeline]` as plans know them: so many cores of this machine each.

use anyhow::Result;
use configs::{Cpu, DeviceCatalog, DeviceList, Pipeline, cpu_name};
use stages::{Device, Simd};

use crate::gpus;
use crate::lower::{self, Machine};

/// A job's own devices, each of them once. One that the job names several times has several stages.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct OwnDevices {
    /// In the order in which the job first names them.
    pub(crate) list: DeviceList,
    /// What the job calls each.
    pub(crate) names: Vec<String>,
    /// For each stage, the place of its device in the list.
    pub(crate) seats: Vec<usize>,
}

impl OwnDevices {
    /// Those of a job on a machine.
    ///
    /// # Errors
    /// Vector instructions that the machine lacks.
    pub(crate) fn of(pipeline: &Pipeline, machine: &Machine) -> Result<Self> {
        let groups = lower::device_groups(pipeline, machine)?;
        let mut distinct: Vec<configs::Device> = vec![];
        let mut seats = vec![];
        for device in &pipeline.devices {
            let seat = distinct.iter().position(|other| other == device).unwrap_or(distinct.len());
            if seat == distinct.len() {
                distinct.push(*device);
            }
            seats.push(seat);
        }
        let name = |device: &configs::Device| match device.kind {
            configs::DeviceKind::Cpu => Ok(name(&groups[device.index])),
            configs::DeviceKind::Cuda => gpus::catalog_name(device.index),
        };
        let kinds = distinct.iter().map(name).collect::<Result<Vec<String>>>()?;
        let list = DeviceList::of(&kinds.iter().map(String::as_str).collect::<Vec<_>>());
        Ok(OwnDevices { list, names: distinct.iter().map(ToString::to_string).collect(), seats })
    }

    /// The devices of the first of so many replicas, each of them once.
    pub(crate) fn first_of(&self, replicas: usize) -> DeviceList {
        let seats = &self.seats[..self.seats.len() / replicas];
        let num_devices = seats.iter().map(|seat| seat + 1).max().unwrap_or(0);
        DeviceList::of(&self.list.names().take(num_devices).collect::<Vec<_>>())
    }

    /// Whether there is a GPU among them.
    pub(crate) fn has_gpus(&self) -> bool {
        self.list.runs().iter().any(|(_, name)| configs::cpu_of(name).is_none())
    }

    /// A catalog that knows them, with this machine's memory shared out to their cores.
    pub(crate) fn in_catalog(&self, catalog: DeviceCatalog, machine: &Machine) -> DeviceCatalog {
        let core_mib = machine.total_bytes as f64 / f64::from(1 << 20) / machine.cores.len().max(1) as f64;
        let mut catalog = catalog.with_cores_of(&self.list);
        for (_, name) in self.list.runs() {
            let Some((_, cores)) = configs::cpu_of(name) else { continue }; // A GPU has its own.
            let cores = cores.min(machine.cores.len());
            catalog = catalog.with_memory(name, core_mib * cores as f64);
        }
        catalog
    }
}

/// The kind of core whose figures are nearest to those of a level.
fn kind(simd: Simd) -> Cpu {
    match simd {
        Simd::Amx => Cpu::Amx,
        Simd::Avx512 => Cpu::Vectors,
        Simd::Avx2 | Simd::Portable => Cpu::Avx2,
    }
}

fn name(device: &Device) -> String {
    match device {
        Device::Cpu { threads, simd, .. } => cpu_name(kind(*simd), *threads),
        Device::Reference | Device::Cuda { .. } => cpu_name(Cpu::Vectors, 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(devices: &[usize], cores: usize) -> OwnDevices {
        let devices = devices.iter().map(|index| configs::Device::cpu(*index)).collect();
        let pipeline = Pipeline { devices, simd: configs::Simd::Portable, ..Pipeline::default() };
        let machine = Machine { cores: (0..cores).collect(), free_bytes: 1 << 30, total_bytes: 8 << 30 };
        OwnDevices::of(&pipeline, &machine).unwrap()
    }

    #[test]
    fn a_device_has_its_share_of_the_cores_and_is_there_once() {
        let one = own(&[0], 8);
        assert_eq!((one.list.to_string(), one.seats), ("1xavx2-8-cores".to_owned(), vec![0]));
        let twice = own(&[1, 0, 1, 0], 2);
        assert_eq!((twice.list.to_string(), twice.seats), ("2xavx2-core".to_owned(), vec![0, 1, 0, 1]));
        assert_eq!(twice.names, ["cpu:1", "cpu:0"]);
        assert_eq!(own(&[1, 0, 1, 0], 2).first_of(2).to_string(), "2xavx2-core");
        let apart = own(&[0, 1], 3);
        assert_eq!(apart.first_of(2).to_string(), "1xavx2-core");
        let unlike = own(&[0, 1], 3);
        assert_eq!(unlike.list.to_string(), "1xavx2-core,1xavx2-2-cores");
    }

    #[test]
    fn the_machine_s_memory_is_shared_out() {
        let machine = Machine { cores: (0..4).collect(), free_bytes: 0, total_bytes: 8 << 30 };
        let own = own(&[0, 1], 4);
        let catalog = own.in_catalog(DeviceCatalog::shipped(), &machine);
        assert_eq!(catalog.get("avx2-2-cores").unwrap().memory_mib, 4096.0);
    }
}
