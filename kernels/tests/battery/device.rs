//! The devices under test, and the way in and out of them.

use kernels::{
    Backend, Cpu, CpuOptions, Dtype, INT8_BLOCK, Int4Groups, KvDtype, Reference, Simd, TensorView, ViewDtype,
    WeightType,
};

/// Half a unit in the last place of a bf16, relative: 8 significant bits.
pub(crate) const BF16_UNIT: f64 = 1.0 / 256.0;
/// The same of an f32: 24 significant bits.
pub(crate) const F32_UNIT: f64 = 1.0 / (1u64 << 24) as f64;

pub(crate) const DTYPES: [Dtype; 2] = [Dtype::F32, Dtype::Bf16];
/// What a processor can keep weights in.
pub(crate) const WEIGHT_TYPES: [WeightType; 5] =
    [WeightType::F32, WeightType::Bf16, WeightType::Int8, WeightType::Int8Weight, WeightType::Int4Weight];

/// A backend whose matmul inputs can be looked at.
pub(crate) trait Readable: Backend {
    fn read(operand: &Self::Operand) -> Vec<f32>;
}

impl Readable for Reference {
    fn read(operand: &Self::Operand) -> Vec<f32> {
        operand.array().values().to_vec()
    }
}

impl Readable for Cpu {
    fn read(operand: &Self::Operand) -> Vec<f32> {
        let mut values = vec![0.0; operand.rows() * operand.cols()];
        if operand.cols() > 0 {
            let rows = values.chunks_exact_mut(operand.cols()).enumerate();
            rows.for_each(|(row, values)| operand.copy_row(row, values));
        }
        values
    }
}

/// A backend, and what it rounds to.
pub(crate) struct Device<B> {
    pub(crate) backend: B,
    pub(crate) weights: WeightType,
    pub(crate) kv: KvDtype,
    pub(crate) int4: Int4Groups,
}

/// A check that any backend can run.
pub(crate) trait Check {
    fn check<B: Readable>(&self, device: &Device<B>);
}

/// Runs a check on the reference and on every level of the CPU, with every type of matmul inputs and of the
/// cache. Narrow weights concern neither: [`every_weight_device`] has them.
pub(crate) fn every_device(check: &impl Check) {
    for weights in DTYPES.map(WeightType::from) {
        for kv in KvDtype::ALL {
            check.check(&Device::new(Reference::new(weights, kv), weights, kv));
            for simd in levels() {
                check.check(&Device::new(cpu(simd, 2, weights, kv), weights, kv));
            }
        }
    }
}

/// The same for operations that know no cache. Numbers of 8 bits are for GPUs, and the reference is their twin.
pub(crate) fn every_weight_device(check: &impl Check) {
    check.check(&Device::new(Reference::new(WeightType::Fp8, KvDtype::Bf16), WeightType::Fp8, KvDtype::Bf16));
    for weights in WEIGHT_TYPES {
        let kv = weights.operands().into();
        check.check(&Device::new(Reference::new(weights, kv), weights, kv));
        for simd in levels() {
            check.check(&Device::new(cpu(simd, 2, weights, kv), weights, kv));
        }
    }
}

/// The twin of a GPU with weights of 4 bits.
pub(crate) fn reference_with_long_groups() -> Device<Reference> {
    let (weights, kv, int4) = (WeightType::Int4Weight, KvDtype::Bf16, Int4Groups::Of128);
    Device { int4, ..Device::new(Reference::new(weights, kv).with_int4(int4), weights, kv) }
}

pub(crate) fn levels() -> impl Iterator<Item = Simd> {
    Simd::ALL.into_iter().filter(|simd| simd.is_available())
}

pub(crate) fn cpu(simd: Simd, threads: usize, weights: WeightType, kv: KvDtype) -> Cpu {
    // Unpinned: tests share the machine with each other.
    Cpu::new(CpuOptions { cores: Vec::new(), threads, simd, weights, kv }).unwrap()
}

/// What `dtype` keeps of a number.
pub(crate) fn rounded(dtype: Dtype, value: f32) -> f32 {
    match dtype {
        Dtype::F32 => value,
        Dtype::Bf16 => half::bf16::from_f32(value).to_f32(),
    }
}

pub(crate) fn all_rounded(dtype: Dtype, values: &[f32]) -> Vec<f32> {
    values.iter().map(|&value| rounded(dtype, value)).collect()
}

/// How numbers are quantised.
#[derive(Clone, Copy)]
struct Kept {
    group: usize,
    levels: f32,
    most: f32,
    /// Whether scales are rounded to bf16 first.
    has_short_scales: bool,
}

const INT8: Kept = Kept { group: 1, levels: 127.0, most: 127.0, has_short_scales: false };

/// Rows quantised in groups: the number of the largest magnitude becomes `levels`, others at most `most`, and what
/// would make the scale denormal is zero.
fn quantized(values: &[f32], cols: usize, kept: Kept) -> Vec<f64> {
    let Kept { group, levels, most, has_short_scales } = kept;
    let mut out = Vec::with_capacity(values.len());
    for group in values.chunks(cols.max(1)).flat_map(|row| row.chunks(group.max(1))) {
        let largest = group.iter().fold(0.0f32, |l, &value| if value.abs() > l.abs() { value } else { l });
        let largest = if levels > 0.0 { largest.abs() } else { largest };
        let (scale, inverse) = match (largest / levels).abs() < f32::MIN_POSITIVE {
            true => (0.0, 0.0),
            false if has_short_scales => {
                let scale = rounded(Dtype::Bf16, largest / levels);
                (scale, 1.0 / scale)
            }
            false => (largest / levels, levels / largest),
        };
        let integer = |value: f32| (value * inverse).min(most).round_ties_even();
        out.extend(group.iter().map(|&value| f64::from(integer(value)) * f64::from(scale)));
    }
    out
}

/// Rows in E4M3, whose number of the largest magnitude becomes 448.
fn in_fp8(values: &[f32], cols: usize) -> Vec<f64> {
    let mut out = Vec::with_capacity(values.len());
    for row in values.chunks(cols.max(1)) {
        let largest = row.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        let (scale, inverse) = match largest < 448.0 * f32::MIN_POSITIVE {
            true => (0.0, 0.0),
            false => (largest / 448.0, 448.0 / largest),
        };
        out.extend(row.iter().map(|&value| e4m3(f64::from(value * inverse)) * f64::from(scale)));
    }
    out
}

/// The nearest number of E4M3: three bits of fraction, down to 2^-9.
fn e4m3(value: f64) -> f64 {
    let step = (value.abs().log2().floor().max(-6.0) - 3.0).exp2();
    (value / step).round_ties_even() * step
}

/// What a cache keeps of keys or values with heads of such a width.
pub(crate) fn cached(kv: KvDtype, values: &[f32], head_dim: usize) -> Vec<f32> {
    if kv != KvDtype::Fp8 {
        return all_rounded(kv.multiplied(), values);
    }
    let mut out = Vec::with_capacity(values.len());
    for head in values.chunks_exact(head_dim) {
        let largest = head.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        // The least power of two with which the largest is 448 or less.
        let power = (f64::from(largest) / 448.0).log2().ceil().max(-111.0).exp2();
        out.extend(head.iter().map(|&value| (e4m3(f64::from(value) / power) * power) as f32));
    }
    out
}

pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// The relative error that storing in `dtype` adds.
pub(crate) fn unit(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 => F32_UNIT,
        Dtype::Bf16 => BF16_UNIT,
    }
}

/// The relative error that keeping a number in a cache adds; half of a step of E4M3's three bits of fraction.
pub(crate) fn kv_unit(kv: KvDtype) -> f64 {
    match kv {
        KvDtype::F32 | KvDtype::Bf16 => unit(kv.multiplied()),
        KvDtype::Fp8 => 1.0 / 16.0,
    }
}

impl<B: Readable> Device<B> {
    pub(crate) fn new(backend: B, weights: WeightType, kv: KvDtype) -> Device<B> {
        Device { backend, weights, kv, int4: Int4Groups::Of32 }
    }

    pub(crate) fn name(&self) -> String {
        self.backend.numeric_profile()
    }

    pub(crate) fn matrix(&self, values: &[f32], rows: usize, cols: usize) -> B::Matrix {
        let bytes = bytes(values);
        self.backend.matrix(TensorView::new(ViewDtype::F32, rows, cols, &bytes)).unwrap()
    }

    pub(crate) fn table(&self, values: &[f32], rows: usize, cols: usize) -> B::Matrix {
        let bytes = bytes(values);
        self.backend.table(TensorView::new(ViewDtype::F32, rows, cols, &bytes)).unwrap()
    }

    /// What is left of a matrix of so many columns when it is packed.
    pub(crate) fn kept(&self, values: &[f32], cols: usize) -> Vec<f64> {
        match self.weights {
            WeightType::F32 | WeightType::Bf16 => {
                all_rounded(self.weights.operands(), values).into_iter().map(f64::from).collect()
            }
            WeightType::Fp8 => in_fp8(values, cols),
            WeightType::Int8 => quantized(values, cols, Kept { group: INT8_BLOCK, ..INT8 }),
            WeightType::Int8Weight => quantized(values, cols, Kept { group: cols, ..INT8 }),
            WeightType::Int4Weight => quantized(
                values,
                cols,
                Kept {
                    group: self.int4.inputs(),
                    levels: -8.0,
                    most: 7.0,
                    has_short_scales: self.int4 == Int4Groups::Of128,
                },
            ),
        }
    }

    /// What is left of a matmul's input, already rounded, when it is multiplied.
    pub(crate) fn multiplied(&self, values: &[f32], cols: usize) -> Vec<f64> {
        match self.weights {
            WeightType::Fp8 => in_fp8(values, cols),
            WeightType::Int8 => quantized(values, cols, Kept { group: INT8_BLOCK, ..INT8 }),
            _ => values.iter().map(|&value| f64::from(value)).collect(),
        }
    }

    pub(crate) fn vector(&self, values: &[f32]) -> B::Vector {
        let bytes = bytes(values);
        let view = TensorView::new(ViewDtype::F32, 1, values.len(), &bytes);
        self.backend.vector(view).unwrap()
    }

    pub(crate) fn array(&self, values: &[f32], cols: usize) -> B::Array {
        let mut array = self.backend.array();
        self.backend.upload(values, values.len() / cols.max(1), cols, &mut array).unwrap();
        array
    }

    pub(crate) fn values(&self, array: &B::Array) -> Vec<f32> {
        let mut values = vec![f32::NAN; 3];
        self.backend.download(array, &mut values).unwrap();
        values
    }

    /// Some matmul input `[rows, cols]`, and the numbers it holds. A norm makes it: of the operations that write
    /// matmul inputs it is the one that takes any width.
    pub(crate) fn operand(&self, x: &[f32], cols: usize) -> (B::Operand, Vec<f32>) {
        let mut operand = self.backend.operand();
        let weight = self.vector(&vec![1.0; cols]);
        // With eps = 1, rows of small numbers stay small, and rows of large ones come out near one.
        self.backend.rms_norm(&self.array(x, cols), &weight, 1.0, &mut operand).unwrap();
        let values = B::read(&operand);
        (operand, values)
    }
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
