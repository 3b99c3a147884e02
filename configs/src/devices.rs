//! Devices as a plan knows them: `devices.toml`, and lists such as `4xh100-80gb,2xh200`.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::Deserialize;
use serde::ser::{Serialize, Serializer};

use crate::error::Error;
use crate::keys;

/// The file that is shipped, compiled in so that plans need no folder.
const SHIPPED: &str = include_str!("../devices.toml");

/// What a device's maker or a measurement says of it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceSpec {
    /// Memory, in MiB, as its driver reports it.
    pub memory_mib: f64,
    /// Memory bandwidth, in 1e9 bytes a second.
    pub bandwidth_gb_per_s: f64,
    /// Dense bf16 products, in 1e12 operations a second.
    pub bf16_tflops: f64,
    /// Dense fp8 products; bf16's rate holds where it has none.
    pub fp8_tflops: Option<f64>,
    /// Dense fp4 products; fp8's rate holds where it has none.
    pub fp4_tflops: Option<f64>,
    /// To a neighbour, in one direction, in 1e9 bytes a second.
    pub link_gb_per_s: f64,
    /// Of each message to a neighbour, in microseconds.
    pub link_latency_us: f64,
    /// Bus bandwidth of an all-reduce, in 1e9 bytes a second.
    pub all_reduce_gb_per_s: f64,
    /// Of each all-reduce, in microseconds.
    pub all_reduce_latency_us: f64,
    /// The share of `bf16_tflops` that products reach.
    #[serde(default = "bf16_efficiency")]
    pub bf16_efficiency: f64,
    /// The share of `bf16_tflops` that attention reaches; that of products where it is not given.
    pub attention_efficiency: Option<f64>,
    /// What attention takes for each query head of a token whatever its context, in nanoseconds.
    #[serde(default)]
    pub attention_head_ns: f64,
    /// The share of `fp8_tflops` that products reach.
    #[serde(default = "fp8_efficiency")]
    pub fp8_efficiency: f64,
    /// The share of `fp4_tflops` that products reach.
    #[serde(default = "fp4_efficiency")]
    pub fp4_efficiency: f64,
    /// The share of the bandwidth that streaming reaches.
    #[serde(default = "bandwidth_efficiency")]
    pub bandwidth_efficiency: f64,
    /// Memory that neither weights nor keys and values get, in 1e9 bytes.
    #[serde(default = "reserved_gb")]
    pub reserved_gb: f64,
    /// What an hour costs, in the user's currency.
    pub price_per_hour: Option<f64>,
}

// Where each comes from stands at the top of `devices.toml`.

fn bf16_efficiency() -> f64 {
    0.80
}

fn fp8_efficiency() -> f64 {
    0.70
}

fn fp4_efficiency() -> f64 {
    0.60
}

fn bandwidth_efficiency() -> f64 {
    0.90
}

fn reserved_gb() -> f64 {
    4.0
}

/// Every device there is, by name.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceCatalog(BTreeMap<String, DeviceSpec>);

impl DeviceCatalog {
    /// The devices we ship.
    pub fn shipped() -> Self {
        Self::parse(SHIPPED).unwrap_or_else(|error| panic!("devices.toml: {error}"))
    }

    /// Reads a file in the place of the shipped one.
    ///
    /// # Errors
    /// A file that cannot be read, a key that is not known, a value out of its range.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path)
            .map_err(|cause| Error::new(format!("devices file {} can't be read: {cause}", path.display())))?;
        Self::parse(&text).map_err(|error| error.in_file(path))
    }

    fn parse(text: &str) -> Result<Self, Error> {
        let devices: BTreeMap<String, DeviceSpec> =
            toml::from_str(text).map_err(|cause| Error::new(cause.to_string().trim_end()))?;
        for (name, device) in &devices {
            device.check().map_err(|what| Error::new(format!("[{name}] {what}")))?;
        }
        Ok(Self(devices))
    }

    /// The same with one price for all devices, if there is one.
    #[must_use]
    pub fn with_price(mut self, price_per_hour: Option<f64>) -> Self {
        if price_per_hour.is_some() {
            self.0.values_mut().for_each(|device| device.price_per_hour = price_per_hour);
        }
        self
    }

    /// The same with several cores of a CPU as one device, for each name such as `cpu-8-cores` in a list: so many times one
    /// of its cores.
    #[must_use]
    pub fn with_cores_of(mut self, devices: &DeviceList) -> Self {
        for (_, name) in devices.runs() {
            let Some((kind, cores)) = cpu_of(name) else { continue };
            if let Some(core) = self.0.get(&cpu_name(kind, 1)) {
                let cpu = core.times(cores as f64);
                self.0.entry(name.clone()).or_insert(cpu);
            }
        }
        self
    }

    /// The same where the device of this name, if there is one, has other memory.
    #[must_use]
    pub fn with_memory(mut self, name: &str, memory_mib: f64) -> Self {
        if let Some(device) = self.0.get_mut(name) {
            device.memory_mib = memory_mib;
        }
        self
    }

    /// The device of this name.
    ///
    /// # Errors
    /// There is none; the message names those that begin so, or the nearest.
    pub fn get(&self, name: &str) -> Result<&DeviceSpec, Error> {
        self.0.get(name).ok_or_else(|| {
            let longer: Vec<&str> =
                self.names().filter(|known| known.starts_with(&format!("{name}-"))).collect();
            let hint = match (&longer[..], keys::nearest(name, self.names())) {
                ([], None) => format!("there are {}", self.names().collect::<Vec<_>>().join(", ")),
                ([], Some(near)) => format!("did you mean {near}?"),
                (longer, _) => format!("did you mean {}?", longer.join(" or ")),
            };
            Error::new(format!("unknown device {name:?}")).hint(hint)
        })
    }

    /// All names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}

/// The kinds of cores that plans know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cpu {
    /// Multiplies in vectors of 512 bits.
    Vectors,
    /// Multiplies in vectors of 256 bits, or of fewer.
    Avx2,
    /// Multiplies in AMX tiles.
    Amx,
}

impl Cpu {
    const ALL: [Cpu; 3] = [Cpu::Vectors, Cpu::Avx2, Cpu::Amx];

    fn prefix(self) -> &'static str {
        match self {
            Self::Vectors => "cpu",
            Self::Avx2 => "avx2",
            Self::Amx => "amx",
        }
    }
}

/// What so many cores are called as one device, in `devices.toml` and in lists.
pub fn cpu_name(kind: Cpu, cores: usize) -> String {
    match cores {
        1 => format!("{}-core", kind.prefix()),
        cores => format!("{}-{cores}-cores", kind.prefix()),
    }
}

/// The kind and the number of cores of a device that is called so.
pub fn cpu_of(name: &str) -> Option<(Cpu, usize)> {
    Cpu::ALL.into_iter().find_map(|kind| {
        let rest = name.strip_prefix(kind.prefix())?.strip_prefix('-')?;
        let count = || rest.strip_suffix("-cores")?.parse().ok();
        let cores = if rest == "core" { Some(1) } else { count() };
        cores.filter(|cores| cpu_name(kind, *cores) == name).map(|cores| (kind, cores))
    })
}

impl DeviceSpec {
    /// So many alike that work as one.
    fn times(&self, count: f64) -> Self {
        DeviceSpec {
            memory_mib: self.memory_mib * count,
            bandwidth_gb_per_s: self.bandwidth_gb_per_s * count,
            bf16_tflops: self.bf16_tflops * count,
            attention_head_ns: self.attention_head_ns / count,
            fp8_tflops: self.fp8_tflops.map(|rate| rate * count),
            fp4_tflops: self.fp4_tflops.map(|rate| rate * count),
            reserved_gb: self.reserved_gb * count,
            price_per_hour: self.price_per_hour.map(|price| price * count),
            ..self.clone()
        }
    }

    fn check(&self) -> Result<(), String> {
        let positive = [
            ("memory_mib", Some(self.memory_mib)),
            ("bandwidth_gb_per_s", Some(self.bandwidth_gb_per_s)),
            ("bf16_tflops", Some(self.bf16_tflops)),
            ("fp8_tflops", self.fp8_tflops),
            ("fp4_tflops", self.fp4_tflops),
            ("link_gb_per_s", Some(self.link_gb_per_s)),
            ("all_reduce_gb_per_s", Some(self.all_reduce_gb_per_s)),
        ];
        let shares = [
            ("bf16_efficiency", self.bf16_efficiency),
            ("attention_efficiency", self.attention_efficiency.unwrap_or(1.0)),
            ("fp8_efficiency", self.fp8_efficiency),
            ("fp4_efficiency", self.fp4_efficiency),
            ("bandwidth_efficiency", self.bandwidth_efficiency),
        ];
        let amounts = [
            ("link_latency_us", Some(self.link_latency_us)),
            ("all_reduce_latency_us", Some(self.all_reduce_latency_us)),
            ("attention_head_ns", Some(self.attention_head_ns)),
            ("reserved_gb", Some(self.reserved_gb)),
            ("price_per_hour", self.price_per_hour),
        ];
        let wrong =
            |key: &str, expected: &str, found: f64| Err(format!("{key}: expected {expected}, found {found}"));
        for (key, value) in positive {
            match value {
                Some(value) if !(value > 0.0 && value.is_finite()) => {
                    return wrong(key, "a number above 0", value);
                }
                _ => {}
            }
        }
        for (key, value) in shares {
            if !(value > 0.0 && value <= 1.0) {
                return wrong(key, "a number above 0 and up to 1", value);
            }
        }
        for (key, value) in amounts {
            match value {
                Some(value) if !(value >= 0.0 && value.is_finite()) => {
                    return wrong(key, "a number of at least 0", value);
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Devices in the order of the pipeline, written `4xh100-80gb,2xh200`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceList(Vec<(usize, String)>);

/// Beyond this many devices the text is a typing error.
const MAX_DEVICES: usize = 1024;

impl DeviceList {
    /// So many of one kind after so many of another.
    pub fn runs(&self) -> &[(usize, String)] {
        &self.0
    }

    /// How many devices.
    pub fn num_devices(&self) -> usize {
        self.0.iter().map(|(count, _)| count).sum()
    }

    /// One device of the last kind more.
    #[must_use]
    pub fn with_more(&self, more: usize) -> Self {
        let mut runs = self.0.clone();
        runs.last_mut().expect("a list names a device").0 += more;
        Self(runs)
    }

    /// The first of `count` groups, where the list is made of so many that are alike, one after the other.
    pub fn group(&self, count: usize) -> Option<Self> {
        let names: Vec<&str> = self.names().collect();
        let size = names.len() / count;
        let is_alike =
            names.len().is_multiple_of(count) && (size..names.len()).all(|i| names[i] == names[i - size]);
        is_alike.then(|| Self::of(&names[..size]))
    }

    /// Devices of these names, one after the other.
    pub fn of(names: &[&str]) -> Self {
        let runs = names.chunk_by(|one, next| one == next);
        Self(runs.map(|run| (run.len(), run[0].to_owned())).collect())
    }

    /// The name of each device.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().flat_map(|(count, name)| std::iter::repeat_n(name.as_str(), *count))
    }
}

impl FromStr for DeviceList {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let form = || {
            Error::new(format!(
                "expected devices such as \"8xh200\" or \"4xh100-80gb,2xh200\", found {text:?}"
            ))
        };
        let run = |part: &str| {
            let part = part.trim();
            let (count, name) = match part.split_once('x') {
                Some((count, name)) if !count.is_empty() && count.bytes().all(|b| b.is_ascii_digit()) => {
                    (count.parse().ok()?, name)
                }
                _ => (1, part),
            };
            let is_name = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
            (count > 0 && !name.is_empty() && name.bytes().all(is_name)).then(|| (count, name.to_lowercase()))
        };
        let runs: Option<Vec<(usize, String)>> = text.split(',').map(run).collect();
        let list = Self(runs.ok_or_else(form)?);
        let num_devices = list.0.iter().fold(0_usize, |sum, (count, _)| sum.saturating_add(*count));
        if num_devices > MAX_DEVICES {
            return Err(Error::new(format!("expected at most {MAX_DEVICES} devices, found {num_devices}")));
        }
        Ok(list)
    }
}

impl Serialize for DeviceList {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl fmt::Display for DeviceList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (idx, (count, name)) in self.0.iter().enumerate() {
            write!(f, "{}{count}x{name}", if idx > 0 { "," } else { "" })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_devices_are_there() {
        let catalog = DeviceCatalog::shipped();
        let names: Vec<&str> = catalog.names().collect();
        for name in
            ["h100-80gb", "h200", "gh200", "b100", "b200", "a100-40gb", "a100-80gb", "l40s", "rtx-4090"]
        {
            assert!(names.contains(&name), "{names:?}");
        }
        assert_eq!(catalog.get("h200").unwrap().bandwidth_gb_per_s, 4800.0);
        let error = |name| catalog.get(name).unwrap_err().to_string();
        assert_eq!(error("h100-80g"), "unknown device \"h100-80g\"\nhint: did you mean h100-80gb?");
        assert_eq!(error("a100"), "unknown device \"a100\"\nhint: did you mean a100-40gb or a100-80gb?");
    }

    #[test]
    fn lists_of_devices_are_read() {
        let list: DeviceList = "4xh100-80gb, 2xH200,l40s".parse().unwrap();
        assert_eq!((list.num_devices(), list.to_string()), (7, "4xh100-80gb,2xh200,1xl40s".to_owned()));
        assert_eq!(list.with_more(2).to_string(), "4xh100-80gb,2xh200,3xl40s");
        for wrong in ["", "8 h200", "0xh200", "8x", "h200,,h200", "2000xh200", "99999999999999999999xh200"] {
            assert!(wrong.parse::<DeviceList>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn cores_of_a_cpu_are_one_device() {
        let list: DeviceList =
            "cpu-core,2xcpu-8-cores,cpu-1-cores,cpu-x-cores,amx-2-cores,avx2-2-cores".parse().unwrap();
        let catalog = DeviceCatalog::shipped().with_cores_of(&list);
        let (one, eight) = (catalog.get("cpu-core").unwrap(), catalog.get("cpu-8-cores").unwrap());
        assert_eq!(eight.bf16_tflops, 8.0 * one.bf16_tflops);
        for (kind, one, two) in
            [(Cpu::Amx, "amx-core", "amx-2-cores"), (Cpu::Avx2, "avx2-core", "avx2-2-cores")]
        {
            assert_eq!([cpu_of(one), cpu_of(two)], [Some((kind, 1)), Some((kind, 2))]);
            let [one, two] = [one, two].map(|name| catalog.get(name).unwrap().bf16_tflops);
            assert_eq!(two, 2.0 * one);
        }
        assert_eq!(eight.link_gb_per_s, one.link_gb_per_s);
        assert!(catalog.get("cpu-1-cores").is_err() && catalog.get("cpu-x-cores").is_err());
        assert_eq!(catalog.with_memory("cpu-core", 7.0).get("cpu-core").unwrap().memory_mib, 7.0);
    }

    #[test]
    fn groups_are_alike_and_in_order() {
        let group = |list: &str, count| {
            list.parse::<DeviceList>().unwrap().group(count).map(|group| group.to_string())
        };
        assert_eq!(group("8xh200", 4).unwrap(), "2xh200");
        assert_eq!(group("2xh200,1xl40s,2xh200,1xl40s", 2).unwrap(), "2xh200,1xl40s");
        assert_eq!(group("2xh200,2xh200", 4).unwrap(), "1xh200");
        assert_eq!(group("4xh200,2xl40s", 1).unwrap(), "4xh200,2xl40s");
        assert_eq!(group("4xh200,4xl40s", 2), None);
        assert_eq!(group("8xh200", 3), None);
    }

    #[test]
    fn a_devices_file_is_read_strictly() {
        let good = SHIPPED.split("\n# H200").next().unwrap();
        assert!(DeviceCatalog::parse(good).is_ok());
        let error = |text: &str| DeviceCatalog::parse(text).unwrap_err().to_string();
        assert!(error(&format!("{good}\nmemory_gb = 1")).contains("unknown field"));
        assert!(
            error(&good.replace("81_559", "0")).contains("memory_mib: expected a number above 0, found 0")
        );
        assert!(error(&format!("{good}\nfp8_efficiency = 1.5")).contains("up to 1, found 1.5"));
        assert!(error(&format!("{good}\nprice_per_hour = -1")).contains("at least 0, found -1"));
        assert!(error("[x]\nmemory_mib = 1").contains("missing field"));
    }
}
