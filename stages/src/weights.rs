//! Where a stage's tensors come from: a checkpoint, or a seed.

use std::sync::Arc;

use half::bf16;
use kernels::{TensorView, ViewDtype};

use crate::checkpoint::Checkpoint;
use crate::quantized;

/// The source of a model's tensors.
#[derive(Debug, Clone)]
pub enum Weights {
    /// Mapped safetensors files, checked against the configuration.
    Checkpoint(Arc<Checkpoint>),
    /// Numbers made from the tensors' names: shapes too large to ship can be run and measured.
    Random,
}

impl Weights {
    /// Whether they are made from names.
    pub fn is_random(&self) -> bool {
        matches!(self, Weights::Random)
    }

    /// Hands a tensor to `load`. A checkpoint's tensor is a range of a mapped file, which takes no memory any more when it
    /// is loaded; a random one is made for the call and dropped after it.
    pub fn with<T>(&self, name: &str, shape: &[usize], load: impl FnOnce(TensorView<'_>) -> T) -> T {
        match self {
            Weights::Checkpoint(checkpoint) => {
                let view = quantized::view(checkpoint, name, shape);
                let loaded = load(view.unwrap_or_else(|problem| panic!("{problem}, which was checked")));
                quantized::release(checkpoint, name);
                loaded
            }
            Weights::Random => {
                let (rows, cols) = match *shape {
                    [cols] => (1, cols),
                    [rows, cols] => (rows, cols),
                    _ => panic!("tensor {name} has shape {shape:?}"),
                };
                let values = random_tensor(name, rows, cols, shape.len() == 1);
                load(TensorView::new(ViewDtype::Bf16, rows, cols, bytemuck::cast_slice(&values)))
            }
        }
    }
}

/// Uniform numbers of variance `1 / cols`, so that activations keep their size through any number of
/// products; variance 1 for the embedding, ones for norms.
fn random_tensor(name: &str, rows: usize, cols: usize, is_norm: bool) -> Vec<bf16> {
    if is_norm {
        return vec![bf16::ONE; cols];
    }
    let variance = if name == crate::tensors::EMBEDDING { 1.0 } else { 1.0 / cols as f32 };
    let half_width = (3.0 * variance).sqrt(); // A uniform on [-a, a] has variance a² / 3.
    // FNV-1a: a tensor's numbers depend on its name, so spans of one model agree on them.
    let seed = (name.bytes())
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    (0..(rows * cols) as u64)
        .map(|i| {
            let unit = (split_mix(seed.wrapping_add(i)) >> 40) as f32 / (1u64 << 24) as f32;
            bf16::from_f32((2.0 * unit - 1.0) * half_width)
        })
        .collect()
}

/// The finaliser of SplitMix64 (Steele et al. 2014) over a counter in steps of its odd constant.
fn split_mix(counter: u64) -> u64 {
    let mut z = counter.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
