//! What was measured, as programs read it.

use serde::Serialize;
use stages::ModelConfig;
use stages::profile::{DeviceKey, Throughput, ThroughputOptions};

/// A model on a device. Stable: programs read it.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// The version that measured.
    pub(super) program: &'static str,
    /// Parameters, embedding and output matrix counted.
    pub(super) params: u64,
    pub(super) device: DeviceKey,
    /// Number type of weights.
    pub(super) weights: &'static str,
    /// Number type of keys and values.
    pub(super) kv: &'static str,
    pub(super) context_tokens: usize,
    pub(super) micro_batch_tokens: usize,
    pub(super) batches: Vec<Throughput>,
    /// The same batches on a GPU whose bits may depend on them, where they may not in the others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) not_deterministic: Option<Vec<Throughput>>,
}

impl Report {
    pub(super) fn new(config: &ModelConfig, options: &ThroughputOptions, device: DeviceKey) -> Self {
        Report {
            program: env!("CARGO_PKG_VERSION"),
            params: config.params(),
            device,
            weights: options.dtypes.weights.name(),
            kv: options.dtypes.kv.name(),
            context_tokens: options.context_tokens,
            micro_batch_tokens: options.micro_batch_tokens,
            batches: Vec::new(),
            not_deterministic: None,
        }
    }
}
