//! The devices under test, and the way in and out of them.

use kernels::{Backend, Cpu, CpuOptions, Dtype, Reference, Simd, TensorView, ViewDtype};

/// Half a unit in the last place of a bf16, relative: 8 significant bits.
pub(crate) const BF16_UNIT: f64 = 1.0 / 256.0;
/// The same of an f32: 24 significant bits.
pub(crate) const F32_UNIT: f64 = 1.0 / (1u64 << 24) as f64;

pub(crate) const DTYPES: [Dtype; 2] = [Dtype::F32, Dtype::Bf16];

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
    pub(crate) weights: Dtype,
    pub(crate) kv: Dtype,
}

/// A check that any backend can run.
pub(crate) trait Check {
    fn check<B: Readable>(&self, device: &Device<B>);
}

/// Runs a check on the reference and on every level of the CPU, with weights and cache in `dtypes`.
pub(crate) fn every_device(check: &impl Check) {
    for weights in DTYPES {
        for kv in DTYPES {
            check.check(&Device { backend: Reference::new(weights, kv), weights, kv });
            for simd in levels() {
                check.check(&Device { backend: cpu(simd, 2, weights, kv), weights, kv });
            }
        }
    }
}

/// The same for operations that know no cache.
pub(crate) fn every_weight_device(check: &impl Check) {
    for weights in DTYPES {
        let kv = weights;
        check.check(&Device { backend: Reference::new(weights, kv), weights, kv });
        for simd in levels() {
            check.check(&Device { backend: cpu(simd, 2, weights, kv), weights, kv });
        }
    }
}

pub(crate) fn levels() -> impl Iterator<Item = Simd> {
    Simd::ALL.into_iter().filter(|simd| simd.is_available())
}

pub(crate) fn cpu(simd: Simd, threads: usize, weights: Dtype, kv: Dtype) -> Cpu {
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

impl<B: Readable> Device<B> {
    pub(crate) fn name(&self) -> String {
        self.backend.numeric_profile()
    }

    pub(crate) fn matrix(&self, values: &[f32], rows: usize, cols: usize) -> B::Matrix {
        let bytes = bytes(values);
        self.backend.matrix(TensorView { dtype: ViewDtype::F32, rows, cols, bytes: &bytes }).unwrap()
    }

    pub(crate) fn vector(&self, values: &[f32]) -> B::Vector {
        let bytes = bytes(values);
        let view = TensorView { dtype: ViewDtype::F32, rows: 1, cols: values.len(), bytes: &bytes };
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
