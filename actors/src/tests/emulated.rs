//! A small model, and a GPU for it that an emulator plays.

use std::path::Path;

use stages::{Device, Dtypes, KvDtype, Model, PAGE_TOKENS, WeightType};
use tempfile::TempDir;

pub(crate) const DTYPES: Dtypes = Dtypes { weights: WeightType::Bf16, kv: KvDtype::Bf16 };

/// The folder of a model of one block, of which a page is the longest context.
pub(crate) fn folder() -> TempDir {
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 1, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true,
        "vocab_size": 100, "max_position_embeddings": PAGE_TOKENS, "eos_token_id": [],
    });
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    folder
}

/// That model.
pub(crate) fn model() -> Model {
    Model::open(folder().path(), true).unwrap().0
}

/// GPU 0.
pub(crate) fn gpu() -> Device {
    let libraries = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/cuda-emulator");
    assert!(libraries.join("libnccl.so.2").is_file(), "libnccl.so.2 is missing\nhint: cargo xtask emulator");
    Device::Cuda {
        index: 0,
        libraries: Some(libraries),
        cubins: None,
        is_deterministic: true,
        has_graphs: false,
    }
}
