//! What processes of one run say to each other, as far as several of their talks need it. All are this program: nothing here
//! outlives a run.

use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use stages::{Device, Frame, Simd};

use crate::thread::lock;

/// Says words from any thread to whoever started this process.
#[derive(Clone)]
pub(crate) struct Voice(Arc<Mutex<Box<dyn Write + Send>>>);

impl Voice {
    pub(crate) fn new(output: impl Write + Send + 'static) -> Self {
        Voice(Arc::new(Mutex::new(Box::new(output))))
    }

    /// Says a word of this kind.
    pub(crate) fn say(&self, kind: u32, body: &[u8]) {
        let frame = Frame { kind, sequence: 0, shape: [0, 0] };
        let mut output = lock(&self.0);
        // Where nobody listens any more, the input ends too.
        let _ = frame.write(&mut *output, body).and_then(|()| output.flush());
    }
}

/// A device as JSON.
pub(crate) fn device(device: &Device) -> Value {
    let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
    match device {
        Device::Reference => Value::Null,
        Device::Cpu { cores, threads, simd } => {
            json!({"cores": cores, "threads": threads, "simd": simd.name()})
        }
        Device::Cuda { index, libraries, cubins, is_deterministic, has_graphs } => json!({
            "cuda": index, "libraries": path(libraries), "cubins": path(cubins), "is_deterministic": is_deterministic,
            "has_graphs": has_graphs,
        }),
    }
}

/// The device that such JSON means.
pub(crate) fn read_device(value: &Value) -> Option<Device> {
    let size = |key: &str| usize::try_from(value[key].as_u64()?).ok();
    let path = |key: &str| value[key].as_str().map(PathBuf::from);
    let simd = || Simd::ALL.into_iter().find(|simd| Some(simd.name()) == value["simd"].as_str());
    Some(match value {
        Value::Null => Device::Reference,
        value if value.get("cuda").is_some() => Device::Cuda {
            index: size("cuda")?,
            libraries: path("libraries"),
            cubins: path("cubins"),
            is_deterministic: value["is_deterministic"].as_bool()?,
            has_graphs: value["has_graphs"].as_bool()?,
        },
        value => Device::Cpu { cores: list(&value["cores"])?, threads: size("threads")?, simd: simd()? },
    })
}

/// A list of sizes.
pub(crate) fn list(value: &Value) -> Option<Vec<usize>> {
    value.as_array()?.iter().map(|item| usize::try_from(item.as_u64()?).ok()).collect()
}

/// Numbers as words of 64 bits, lists with their lengths before them.
#[derive(Debug, Default)]
pub(crate) struct Words(Vec<u8>);

impl Words {
    /// None yet, in memory that had something else.
    pub(crate) fn in_place_of(mut bytes: Vec<u8>) -> Words {
        bytes.clear();
        Words(bytes)
    }

    pub(crate) fn add(&mut self, word: u64) {
        self.0.extend_from_slice(&word.to_le_bytes());
    }

    pub(crate) fn add_f32(&mut self, number: f32) {
        self.add(u64::from(number.to_bits()));
    }

    pub(crate) fn add_list(&mut self, items: &[u32]) {
        self.add(items.len() as u64);
        items.iter().for_each(|item| self.add(u64::from(*item)));
    }

    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

/// Reads what [`Words`] wrote; nothing where it is something else.
#[derive(Debug)]
pub(crate) struct ReadWords<'a>(&'a [u8]);

impl<'a> ReadWords<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        ReadWords(bytes)
    }

    pub(crate) fn word(&mut self) -> Option<u64> {
        let (word, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_le_bytes(*word))
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        u32::try_from(self.word()?).ok()
    }

    pub(crate) fn size(&mut self) -> Option<usize> {
        usize::try_from(self.word()?).ok()
    }

    pub(crate) fn flag(&mut self) -> Option<bool> {
        match self.word()? {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }

    pub(crate) fn f32(&mut self) -> Option<f32> {
        Some(f32::from_bits(self.u32()?))
    }

    /// So many of what `read` reads. By and by: a length alone takes no memory.
    pub(crate) fn list<T>(&mut self, mut read: impl FnMut(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let length = self.word()?;
        let mut items = Vec::new();
        for _ in 0..length {
            items.push(read(self)?);
        }
        Some(items)
    }

    /// What comes after, once all words were read.
    pub(crate) fn rest(self) -> &'a [u8] {
        self.0
    }
}

/// Numbers as bytes, after what is there.
pub(crate) fn add_values(bytes: &mut Vec<u8>, values: &[f32]) {
    let start = bytes.len();
    bytes.resize(start + size_of_val(values), 0);
    for (bytes, value) in bytes[start..].as_chunks_mut().0.iter_mut().zip(values) {
        *bytes = value.to_le_bytes();
    }
}

/// The numbers of such bytes.
pub(crate) fn values(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_come_back_as_they_were() {
        let devices = [
            Device::Reference,
            Device::Cpu { cores: vec![2, 3], threads: 4, simd: Simd::Portable },
            Device::Cuda {
                index: 1,
                libraries: None,
                cubins: Some("some where".into()),
                is_deterministic: false,
                has_graphs: true,
            },
        ];
        for one in devices {
            let back = read_device(&device(&one)).expect("a device");
            assert_eq!(format!("{back:?}"), format!("{one:?}"));
        }
        assert!(read_device(&json!({"cores": [1], "threads": 1, "simd": "abacus"})).is_none());
    }
}
