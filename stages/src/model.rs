//! A model directory: its configuration, its weights, and who it is.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use crate::checkpoint::{Checkpoint, Tensor};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::tensors;
use crate::weights::Weights;

/// A model that has been checked and can be loaded, span by span. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Model {
    /// Its folder.
    pub directory: PathBuf,
    /// Its shape.
    pub config: Arc<ModelConfig>,
    /// Its tensors.
    pub weights: Weights,
    /// Hash of all that decides its answers, never of its path; see [`Model::open`].
    pub identity: String,
}

/// What opening a model found worth a word.
#[derive(Debug, Clone, Default)]
pub struct Warnings(pub Vec<String>);

/// The text files of a model directory that are part of its identity.
const TEXT_FILES: [&str; 5] = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
];

/// Which special tokens there are, where `tokenizer_config.json` does not say it. Only where it tells such a token is it part of the
/// identity, which most models' copies of the same leave as it was.
const TOKENS_MAP: &str = "special_tokens_map.json";

/// Bytes hashed at the start, in the middle and at the end of each tensor.
const SAMPLE_BYTES: usize = 1024;

impl Model {
    /// Opens a Hugging Face directory and checks it, before any weight is read: the configuration, every
    /// shard's header and length, every tensor's name, shape and type.
    ///
    /// The identity is a BLAKE3 hash of the configuration, tokenizer and template files, the safetensors
    /// headers, and sampled bytes of every tensor.
    ///
    /// # Errors
    /// One error that names the file and the key, tensor or shape.
    pub fn open(directory: &Path, random_weights: bool) -> Result<(Self, Warnings)> {
        let config = ModelConfig::read(directory)?;
        let mut hash = blake3::Hasher::new();
        hash_texts(&mut hash, directory)?;
        let mut warnings = Warnings::default();
        let weights = if random_weights {
            hash_part(&mut hash, "weights", b"random");
            Weights::Random
        } else {
            let checkpoint = Checkpoint::open(directory)?;
            let surplus = tensors::check(&config, &checkpoint)?;
            if !surplus.is_empty() {
                let names = tensors::name_list(&surplus);
                warnings.0.push(format!("{}: nothing reads the tensors {names}", directory.display()));
            }
            hash_checkpoint(&mut hash, &checkpoint);
            Weights::Checkpoint(Arc::new(checkpoint))
        };
        let identity = hash.finalize().to_hex()[..32].to_owned();
        let directory = directory.to_owned();
        Ok((Model { directory, config: Arc::new(config), weights, identity }, warnings))
    }
}

/// What a checkpoint's matrices are stored in, where that is narrower than bf16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Narrow {
    /// Integers of 4 bits.
    Int4,
    /// Such in groups of inputs that need not lie side by side.
    OrderedInt4,
    /// E4M3.
    Fp8,
}

impl Model {
    /// What matrices of the checkpoint are stored in, where some are narrower than bf16.
    pub fn narrow(&self) -> Option<Narrow> {
        let Weights::Checkpoint(checkpoint) = &self.weights else { return None };
        let has = |ending: &str| checkpoint.iter().any(|(name, _)| name.ends_with(ending));
        if has(".weight_packed") {
            return Some(if has(".weight_g_idx") { Narrow::OrderedInt4 } else { Narrow::Int4 });
        }
        let is_fp8 = |tensor: &Tensor| tensor.dtype == safetensors::Dtype::F8_E4M3;
        checkpoint.iter().any(|(_, tensor)| is_fp8(tensor)).then_some(Narrow::Fp8)
    }
}

fn hash_texts(hash: &mut blake3::Hasher, directory: &Path) -> Result<()> {
    for name in TEXT_FILES {
        if let Some(bytes) = read_text(directory, name)? {
            hash_part(hash, name, &bytes);
        }
    }
    let config = read_text(directory, "tokenizer_config.json")?.unwrap_or_default();
    if let Some(map) = read_text(directory, TOKENS_MAP)?
        && tells_more(&map, &config)
    {
        hash_part(hash, TOKENS_MAP, &map);
    }
    Ok(())
}

fn read_text(directory: &Path, name: &str) -> Result<Option<Vec<u8>>> {
    let path = directory.join(name);
    let read = || std::fs::read(&path).map_err(|source| Error::Read { path: path.clone(), source });
    path.is_file().then(read).transpose()
}

/// Whether a map of special tokens tells one that the tokenizer's configuration is silent about. What is no JSON is said by those who
/// read it for its content.
fn tells_more(map: &[u8], config: &[u8]) -> bool {
    let parsed = |bytes| serde_json::from_slice::<Value>(bytes).unwrap_or_default();
    let (map, config) = (parsed(map), parsed(config));
    let is_told = |value: &Value| value.is_string() || value["content"].is_string();
    map.as_object()
        .is_some_and(|map| map.iter().any(|(name, token)| is_told(token) && !is_told(&config[name])))
}

fn hash_part(hash: &mut blake3::Hasher, name: &str, bytes: &[u8]) {
    hash.update(name.as_bytes());
    hash.update(&(bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}

fn hash_checkpoint(hash: &mut blake3::Hasher, checkpoint: &Checkpoint) {
    for header in checkpoint.headers() {
        hash_part(hash, "header", header);
    }
    for (name, tensor) in checkpoint.iter() {
        let bytes = checkpoint.bytes(tensor);
        let size = SAMPLE_BYTES.min(bytes.len());
        let middle = (bytes.len() - size) / 2;
        for start in [0, middle, bytes.len() - size] {
            hash_part(hash, name, &bytes[start..start + size]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The identity of a model of one shape, whose files of tokens are these.
    fn identity(config: &str, map: Option<&str>) -> String {
        let shape = "../configs/models/Llama-3_3-Nemotron-Super-49B-v1/config.json";
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join(shape), path("config.json")).unwrap();
        std::fs::write(path("tokenizer_config.json"), config).unwrap();
        if let Some(map) = map {
            std::fs::write(path(TOKENS_MAP), map).unwrap();
        }
        Model::open(folder.path(), true).unwrap().0.identity
    }

    #[test]
    fn a_map_of_special_tokens_is_part_of_who_a_model_is_where_it_tells_one() {
        let (silent, told) = (r#"{"bos_token": null}"#, r#"{"bos_token": {"content": "<s>"}}"#);
        let maps = [r#"{"bos_token": "<s>"}"#, r#"{"bos_token": {"content": "<t>"}}"#];
        let [one, other] = maps.map(|map| identity(silent, Some(map)));
        assert!(one != other && one != identity(silent, None));
        for map in maps.into_iter().chain([r#"{"additional_special_tokens": ["<u>"]}"#, "no map"]) {
            assert_eq!(identity(told, Some(map)), identity(told, None), "{map}");
        }
    }
}
