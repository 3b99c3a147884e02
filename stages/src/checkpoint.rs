//! Safetensors shards: where each tensor's bytes are.
//!
//! Shards are mapped, never read whole: a tensor's pages are touched when it is packed, so a stage reads
//! the tensors of its span and no others. Headers are checked against the files' lengths on opening, so
//! that a truncated shard is found before any work.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kernels::{MappedFile, ViewDtype};
use safetensors::tensor::Metadata;
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use serde_json::Value;

use crate::error::{Error, Result};

/// The tensors of a model directory.
#[derive(Debug)]
pub struct Checkpoint {
    directory: PathBuf,
    tensors: BTreeMap<String, Tensor>,
    shards: Vec<Shard>,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    file: MappedFile,
    header_bytes: usize,
}

/// One tensor: its type, its shape and its place.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// Number type as the file names it.
    pub dtype: Dtype,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
    shard: usize,
    bytes: std::ops::Range<usize>,
}

impl Checkpoint {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// A missing or damaged shard, a tensor that the index places in a shard which lacks it.
    pub fn open(directory: &Path) -> Result<Self> {
        let single = directory.join("model.safetensors");
        let index = directory.join("model.safetensors.index.json");
        let mut checkpoint =
            Checkpoint { directory: directory.to_owned(), tensors: BTreeMap::new(), shards: Vec::new() };
        if single.is_file() {
            checkpoint.add_shard(&single)?;
        } else if index.is_file() {
            let placed = read_index(&index)?;
            let mut files: Vec<&String> = placed.values().collect();
            files.sort();
            files.dedup();
            for file in files {
                checkpoint.add_shard(&directory.join(file))?;
            }
            checkpoint.check_index(&index, &placed)?;
        } else {
            return Err(Error::NoWeights { path: directory.to_owned() });
        }
        Ok(checkpoint)
    }

    /// The model directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// A tensor by name.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// All names with their tensors, in the order of names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// The bytes of a tensor. Nothing is read until they are.
    pub fn bytes(&self, tensor: &Tensor) -> &[u8] {
        &self.shards[tensor.shard].file.bytes()[tensor.bytes.clone()]
    }

    /// Gives the memory that a tensor's bytes take back to the system; they can be read again.
    pub fn release(&self, tensor: &Tensor) {
        self.shards[tensor.shard].file.release(tensor.bytes.clone());
    }

    /// Takes bytes of a tensor away; see [`MappedFile::forbid`].
    #[cfg(test)]
    pub(crate) fn forbid(&self, tensor: &Tensor, range: std::ops::Range<usize>) -> usize {
        let start = tensor.bytes.start;
        self.shards[tensor.shard].file.forbid(start + range.start..start + range.end).unwrap()
    }

    /// The raw headers of all shards, in the order of file names.
    pub fn headers(&self) -> impl Iterator<Item = &[u8]> {
        self.shards.iter().map(|shard| &shard.file.bytes()[..shard.header_bytes])
    }

    fn add_shard(&mut self, path: &Path) -> Result<()> {
        let damaged = |message: String| Error::Shard { path: path.to_owned(), message };
        if !path.is_file() {
            return Err(damaged("the shard is missing".into()));
        }
        let file = MappedFile::open(path)?;
        let bytes = file.bytes();
        let (header, metadata) =
            SafeTensors::read_metadata(bytes).map_err(|e| damaged(header_error(e, bytes)))?;
        let start = header + size_of::<u64>();
        for (name, info) in metadata.tensors() {
            let (from, to) = info.data_offsets;
            let tensor = Tensor {
                dtype: info.dtype,
                shape: info.shape.clone(),
                shard: self.shards.len(),
                bytes: start + from..start + to,
            };
            if let Some(other) = self.tensors.insert(name.clone(), tensor) {
                let first = self.shards[other.shard].path.display().to_string();
                return Err(damaged(format!("tensor {name} stands in {first} too")));
            }
        }
        self.shards.push(Shard { path: path.to_owned(), file, header_bytes: start });
        Ok(())
    }

    fn check_index(&self, index: &Path, placed: &BTreeMap<String, String>) -> Result<()> {
        for (name, file) in placed {
            let found = self.tensors.get(name).map(|tensor| self.shards[tensor.shard].path.as_path());
            if found != Some(self.directory.join(file).as_path()) {
                let message = format!("places tensor {name} in {file}, which does not hold it");
                return Err(Error::Shard { path: index.to_owned(), message });
            }
        }
        Ok(())
    }
}

/// The number types of a checkpoint that stand for themselves.
pub(crate) fn view_dtype(dtype: Dtype) -> Option<ViewDtype> {
    match dtype {
        Dtype::F32 => Some(ViewDtype::F32),
        Dtype::F16 => Some(ViewDtype::F16),
        Dtype::BF16 => Some(ViewDtype::Bf16),
        _ => None,
    }
}

/// What is wrong with a file whose header could not be read, or whose length the header contradicts.
fn header_error(error: SafeTensorError, bytes: &[u8]) -> String {
    let found = bytes.len();
    let Some(header) = bytes.first_chunk().map(|length| u64::from_le_bytes(*length)) else {
        return format!("truncated: found {found} bytes, the length of a header alone takes 8");
    };
    let start = header.saturating_add(size_of::<u64>() as u64);
    if start > found as u64 {
        return format!(
            "truncated, or no safetensors file: found {found} bytes, the header should end at {start}"
        );
    }
    if !matches!(error, SafeTensorError::MetadataIncompleteBuffer) {
        return format!("damaged header: {error}");
    }
    match serde_json::from_slice::<Metadata>(&bytes[size_of::<u64>()..start as usize]) {
        Ok(metadata) => {
            let expected = start as usize + metadata.data_len();
            let kind = if found < expected { "truncated" } else { "too long" };
            format!("{kind}: found {found} bytes, the header says {expected}")
        }
        Err(error) => format!("damaged header: {error}"),
    }
}

/// Tensor name to shard file name. Only plain file names are followed.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    let json = |message: String| Error::Json { path: path.to_owned(), message };
    let text =
        std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    let value: Value = serde_json::from_str(&text).map_err(|e| json(format!("not JSON: {e}")))?;
    let Some(Value::Object(map)) = value.get("weight_map") else {
        return Err(json("weight_map: found no object of tensor names and files".into()));
    };
    (map.iter())
        .map(|(name, file)| match file.as_str() {
            Some(file) if Path::new(file).file_name() == Some(file.as_ref()) => {
                Ok((name.clone(), file.to_owned()))
            }
            _ => Err(json(format!("weight_map: {name}: found {file}, expected a file name"))),
        })
        .collect()
}
