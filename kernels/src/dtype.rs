//! What a device keeps of an f32.

use half::bf16;

use crate::backend::Dtype;

impl Dtype {
    /// The type's name in options and numeric profiles.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "f32",
            Dtype::Bf16 => "bf16",
        }
    }

    /// Replaces every number by the one that the type can hold.
    pub(crate) fn round(self, values: &mut [f32]) {
        match self {
            Dtype::F32 => {}
            Dtype::Bf16 => values.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32()),
        }
    }
}
