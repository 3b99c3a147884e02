//! A device as two ceilings, operations and bytes a second.

use kernels::{KvDtype, WeightType};

/// What a device reaches, efficiencies taken off.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Roofline {
    /// Operations a second of products in the weights' type.
    pub flops_per_second: f64,
    /// Operations a second in bf16: the output matrix.
    pub bf16_flops_per_second: f64,
    /// Operations a second of attention.
    pub attention_flops_per_second: f64,
    /// What attention takes for each query head of a token whatever its context.
    pub attention_head_seconds: f64,
    /// Memory bandwidth.
    pub bytes_per_second: f64,
    /// The rate at which activations are moved between operations: the memory's too, or without bound for a floor that
    /// counts weights, keys and values alone.
    pub activation_bytes_per_second: f64,
    /// To the next device in the pipeline.
    pub link: Channel,
    /// Among the devices of a stage; the rate is the bus bandwidth.
    pub all_reduce: Channel,
}

/// A way for bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Channel {
    /// Of each message.
    pub latency_seconds: f64,
    /// Its rate.
    pub bytes_per_second: f64,
}

impl Channel {
    /// Time for one message.
    pub fn seconds(self, bytes: f64) -> f64 {
        self.latency_seconds + bytes / self.bytes_per_second
    }

    /// Time to sum `bytes` over `ranks`: a ring moves 2 · (ranks − 1) / ranks of them over the bus.
    pub fn all_reduce_seconds(self, bytes: f64, ranks: usize) -> f64 {
        let share = 2.0 * (ranks as f64 - 1.0) / ranks as f64;
        if ranks > 1 { self.seconds(bytes * share) } else { 0.0 }
    }

    /// Time until each of `ranks` has all of `bytes`, of which each had a part, or one of them everything.
    pub fn all_gather_seconds(self, bytes: f64, ranks: usize) -> f64 {
        let share = (ranks as f64 - 1.0) / ranks as f64;
        if ranks > 1 { self.seconds(bytes * share) } else { 0.0 }
    }
}

impl Roofline {
    /// Time for operations and bytes that overlap perfectly: the longer of both.
    pub fn seconds(&self, flops: f64, bytes: f64) -> f64 {
        (flops / self.flops_per_second).max(bytes / self.bytes_per_second)
    }

    /// Rows whose products with weights of a type take as long as reading those, an operation each to multiply and to add.
    pub fn balanced_rows(&self, weights: NumberType) -> f64 {
        const NUMBERS: u64 = 1 << 10;
        let bytes_of_number = weights.bytes(NUMBERS) as f64 / NUMBERS as f64;
        self.flops_per_second / self.bytes_per_second * bytes_of_number / 2.0
    }

    /// The same for scores and sums of attention.
    pub fn attention_seconds(&self, flops: f64, bytes: f64) -> f64 {
        (flops / self.attention_flops_per_second).max(bytes / self.bytes_per_second)
    }

    /// The same where operations are bf16's whatever the weights' type.
    pub fn bf16_seconds(&self, flops: f64, bytes: f64) -> f64 {
        (flops / self.bf16_flops_per_second).max(bytes / self.bytes_per_second)
    }
}

/// A number type as memory sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NumberType {
    /// IEEE single precision.
    F32,
    /// bfloat16.
    Bf16,
    /// Eight bits.
    Fp8,
    /// Four bits, and eight for the scale of each 16 numbers, as NVFP4 has them.
    Fp4,
    /// Integers of eight bits, and products in integers.
    Int8,
    /// Integers of eight bits, and products in bfloat16.
    Int8Weight,
    /// Integers of four bits with a scale of 32 for each 32 numbers, and products in bfloat16.
    Int4Weight,
}

impl NumberType {
    /// Its name in options and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8",
            Self::Fp4 => "fp4",
            Self::Int8 => "int8",
            Self::Int8Weight => "int8-weight",
            Self::Int4Weight => "int4-weight",
        }
    }

    /// The type of weights that it is the type of, if stages have such.
    pub fn stored(self) -> Option<WeightType> {
        match self {
            Self::F32 => Some(WeightType::F32),
            Self::Bf16 => Some(WeightType::Bf16),
            Self::Fp8 => Some(WeightType::Fp8),
            Self::Fp4 => None,
            Self::Int8 => Some(WeightType::Int8),
            Self::Int8Weight => Some(WeightType::Int8Weight),
            Self::Int4Weight => Some(WeightType::Int4Weight),
        }
    }

    /// Bytes of so many numbers.
    pub fn bytes(self, numbers: u64) -> u64 {
        match self {
            Self::F32 => 4 * numbers,
            Self::Bf16 => 2 * numbers,
            Self::Fp8 | Self::Int8 | Self::Int8Weight => numbers,
            Self::Fp4 => (numbers * 9).div_ceil(16),
            Self::Int4Weight => (numbers * 5).div_ceil(8),
        }
    }

    /// The same of keys and values, of heads of this width: in fp8 a head has a scale of a byte, for each of both and each token.
    pub(crate) fn kv_bytes(self, numbers: u64, head_dim: usize) -> u64 {
        let scales = if self == Self::Fp8 { numbers / head_dim as u64 } else { 0 };
        self.bytes(numbers) + scales
    }

    /// The type of what stays wider where blocks are narrow: embedding, output matrix and norms.
    pub(crate) fn at_least_bf16(self) -> Self {
        match self {
            Self::F32 => Self::F32,
            _ => Self::Bf16,
        }
    }
}

impl From<WeightType> for NumberType {
    fn from(weights: WeightType) -> Self {
        match weights {
            WeightType::F32 => Self::F32,
            WeightType::Bf16 => Self::Bf16,
            WeightType::Fp8 => Self::Fp8,
            WeightType::Int8 => Self::Int8,
            WeightType::Int8Weight => Self::Int8Weight,
            WeightType::Int4Weight => Self::Int4Weight,
        }
    }
}

impl From<KvDtype> for NumberType {
    fn from(kv: KvDtype) -> Self {
        match kv {
            KvDtype::F32 => Self::F32,
            KvDtype::Bf16 => Self::Bf16,
            KvDtype::Fp8 => Self::Fp8,
        }
    }
}

/// The number types of a model in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NumberTypes {
    /// Of the blocks' matrices.
    pub weights: NumberType,
    /// Of keys and values.
    pub kv: NumberType,
}

impl NumberTypes {
    /// Of embedding, output matrix and norms.
    pub fn table(self) -> NumberType {
        self.weights.at_least_bf16()
    }
}
