//! What a device keeps of an f32.

use crate::backend::{Dtype, Int4Groups, KvDtype, WeightType};
use crate::fp8::Exponent;

impl WeightType {
    /// Every type.
    pub const ALL: [WeightType; 6] = [
        WeightType::F32,
        WeightType::Bf16,
        WeightType::Fp8,
        WeightType::Int8,
        WeightType::Int8Weight,
        WeightType::Int4Weight,
    ];

    /// The type's name in options and numeric profiles.
    pub fn name(self) -> &'static str {
        match self {
            WeightType::F32 => "f32",
            WeightType::Bf16 => "bf16",
            WeightType::Fp8 => "fp8",
            WeightType::Int8 => "int8",
            WeightType::Int8Weight => "int8-weight",
            WeightType::Int4Weight => "int4-weight",
        }
    }

    /// The type of matmul inputs beside such weights, and of tables.
    pub fn operands(self) -> Dtype {
        match self {
            WeightType::F32 => Dtype::F32,
            _ => Dtype::Bf16,
        }
    }
}

impl Int4Groups {
    /// Inputs that share a scale.
    pub const fn inputs(self) -> usize {
        match self {
            Int4Groups::Of32 => 32,
            Int4Groups::Of128 => 128,
        }
    }
}

impl From<Dtype> for WeightType {
    fn from(dtype: Dtype) -> WeightType {
        match dtype {
            Dtype::F32 => WeightType::F32,
            Dtype::Bf16 => WeightType::Bf16,
        }
    }
}

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
            Dtype::Bf16 => values
                .iter_mut()
                .for_each(|value| *value = f32::from_bits(u32::from(bf16_bits(*value)) << 16)),
        }
    }
}

impl KvDtype {
    /// Every type.
    pub const ALL: [KvDtype; 3] = [KvDtype::F32, KvDtype::Bf16, KvDtype::Fp8];

    /// The type's name in options and numeric profiles.
    pub fn name(self) -> &'static str {
        match self {
            KvDtype::F32 => "f32",
            KvDtype::Bf16 => "bf16",
            KvDtype::Fp8 => "fp8",
        }
    }

    /// The type in which attention multiplies them: that of queries and weights.
    pub const fn multiplied(self) -> Dtype {
        match self {
            KvDtype::F32 => Dtype::F32,
            KvDtype::Bf16 | KvDtype::Fp8 => Dtype::Bf16,
        }
    }

    /// Bytes of a head's numbers, of keys or of values, of one token.
    pub const fn head_bytes(self, head_dim: usize) -> usize {
        match self {
            KvDtype::F32 => 4 * head_dim,
            KvDtype::Bf16 => 2 * head_dim,
            KvDtype::Fp8 => head_dim + 1,
        }
    }

    /// Replaces a head's numbers, of keys or of values, by those that are kept of them.
    pub(crate) fn round(self, head: &mut [f32]) {
        match self {
            KvDtype::F32 | KvDtype::Bf16 => self.multiplied().round(head),
            KvDtype::Fp8 => {
                let exponent = Exponent::of(head);
                head.iter_mut().for_each(|value| *value = exponent.value(exponent.code(*value)));
            }
        }
    }
}

impl From<Dtype> for KvDtype {
    fn from(dtype: Dtype) -> KvDtype {
        match dtype {
            Dtype::F32 => KvDtype::F32,
            Dtype::Bf16 => KvDtype::Bf16,
        }
    }
}

/// A number as bf16, rounded to nearest even, as `half::bf16::from_f32` does, but without a branch, so that
/// loops over it are vectorised.
#[inline(always)]
pub(crate) fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    // A NaN could round to infinity, or lose its last bit: it is made a quiet one instead.
    let is_nan = bits & 0x7fff_ffff > 0x7f80_0000;
    ((if is_nan { bits | 0x0040_0000 } else { rounded }) >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_that_of_the_half_crate() {
        // Steps through all exponents, and the halves of every bf16.
        let values = (0..u32::MAX / 9973).map(|i| i * 9973).chain((0..65536).map(|i| i << 16 | 0x8000));
        for bits in values {
            let value = f32::from_bits(bits);
            assert_eq!(bf16_bits(value), half::bf16::from_f32(value).to_bits(), "{bits:#x}");
        }
    }
}
