//! Where a stage's tensors come from: a checkpoint, or a seed.

use std::sync::Arc;

use half::bf16;
use kernels::{RandomTensor, TensorView, ViewDtype};

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

    /// A matrix that is made from its name, where all are: a device may make it itself.
    pub(crate) fn random(&self, name: &str, [rows, cols]: [usize; 2]) -> Option<RandomTensor> {
        self.is_random().then(|| random_tensor(name, rows, cols))
    }

    /// Hands a tensor to `load`. A checkpoint's tensor is a range of a mapped file, which takes no memory any more when it
    /// is loaded; a random one is made for the call and dropped after it; random norms are ones.
    pub fn with<T>(&self, name: &str, shape: &[usize], load: impl FnOnce(TensorView<'_>) -> T) -> T {
        match self {
            Weights::Checkpoint(checkpoint) => {
                let view = quantized::view(checkpoint, name, shape);
                let loaded = load(view.unwrap_or_else(|problem| panic!("{problem}, which was checked")));
                quantized::release(checkpoint, name);
                loaded
            }
            Weights::Random => {
                let (rows, cols, values) = match *shape {
                    [cols] => (1, cols, vec![bf16::ONE; cols]),
                    [rows, cols] => (rows, cols, random_tensor(name, rows, cols).values()),
                    _ => panic!("tensor {name} has shape {shape:?}"),
                };
                load(TensorView::new(ViewDtype::Bf16, rows, cols, bytemuck::cast_slice(&values)))
            }
        }
    }
}

/// Uniform numbers of variance `1 / cols`, so that activations keep their size through any number of
/// products; variance 1 for the embedding.
fn random_tensor(name: &str, rows: usize, cols: usize) -> RandomTensor {
    let variance = if name == crate::tensors::EMBEDDING { 1.0 } else { 1.0 / cols as f32 };
    let half_width = (3.0 * variance).sqrt(); // A uniform on [-a, a] has variance a² / 3.
    // FNV-1a: a tensor's numbers depend on its name, so spans of one model agree on them.
    let seed = (name.bytes())
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    RandomTensor::new(seed, half_width, rows, cols)
}
