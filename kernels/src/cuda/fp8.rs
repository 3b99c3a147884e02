//! Weights and inputs in E4M3: how they lie, how they are made (`cu/quantize_fp8.cu`), and products of them by our own kernel
//! (`cu/gemm_fp8.cu`). Norms make the codes of what they write themselves, and so does SwiGLU, but for FFNs that are
//! computed some columns at a time: a scale belongs to all of them.

use std::sync::Arc;

use super::arrays::{self, Chunk};
use super::gemm::Gemm;
use super::gpu::Gpu;
use super::program::{self, Source};
use super::stream::{Argument, Kernel, Memory, Stream};
use super::{row_grid, u32_of};
use crate::error::Result;
use crate::tensor_view::ViewDtype;

/// Numbers to which rows are padded with zeros: 16 bytes.
const CHUNK: usize = 16;

/// A matrix in E4M3, in chunks of columns as one in bf16 is, with a scale in f32 for each row.
#[derive(Debug)]
pub(crate) struct Fp8 {
    /// Columns of every chunk but the last one, a multiple of 64.
    pub(crate) chunk: usize,
    pub(crate) codes: Memory,
    pub(crate) scales: Memory,
}

/// An operand in E4M3, which is made when it is first multiplied so.
#[derive(Debug)]
pub(crate) struct Codes {
    pub(crate) is_current: bool,
    codes: Memory,
    scales: Memory,
}

/// The kernels.
#[derive(Debug)]
pub(crate) struct Fp8Kernels {
    quantize_bf16: Kernel,
    quantize_f32: Kernel,
    pub(crate) rms_norm: Kernel,
    pub(crate) swiglu: Kernel,
    pub(crate) gemm: Gemm,
    stream: Arc<Stream>,
}

/// Rows to be quantised: where they begin, their type, and numbers from one to the next.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows {
    pub(crate) from: Argument,
    pub(crate) dtype: ViewDtype,
    pub(crate) stride: usize,
    pub(crate) cols: usize,
    /// Which they are of the matrix.
    pub(crate) first: usize,
    pub(crate) count: usize,
}

/// Columns with what pads them.
pub(crate) fn padded(cols: usize) -> usize {
    cols.next_multiple_of(CHUNK)
}

/// The chunks of a matrix.
pub(crate) fn chunks(rows: usize, cols: usize, chunk: usize) -> impl Iterator<Item = Chunk> {
    arrays::chunks(rows, cols, chunk).map(|chunk| Chunk { stride: padded(chunk.cols), ..chunk })
}

impl Fp8 {
    /// Memory that a matrix of so many rows and columns takes, in bytes.
    pub(crate) fn bytes_of(rows: usize, cols: usize) -> u64 {
        rows as u64 * (padded(cols) + size_of::<f32>()) as u64
    }

    /// Room for a matrix.
    pub(crate) fn new(stream: &Arc<Stream>, rows: usize, cols: usize, chunk: usize) -> Result<Fp8> {
        let codes = stream.allocate("weights", rows * padded(cols))?;
        Ok(Fp8 { chunk, codes, scales: stream.allocate("scales", rows * size_of::<f32>())? })
    }
}

impl Codes {
    pub(crate) fn none(stream: &Arc<Stream>) -> Codes {
        Codes { is_current: false, codes: Memory::none(stream), scales: Memory::none(stream) }
    }

    /// Makes room for so many rows and columns.
    pub(crate) fn reserve(&mut self, rows: usize, cols: usize) -> Result<()> {
        self.codes.reserve("inputs", rows * padded(cols))?;
        self.scales.reserve("inputs", rows * size_of::<f32>())
    }

    /// Room for codes and scales of so many rows, which the caller makes.
    pub(crate) fn make_room(&mut self, rows: usize, cols: usize) -> Result<[&Memory; 2]> {
        self.reserve(rows, cols)?;
        self.is_current = true;
        Ok([&self.codes, &self.scales])
    }

    /// Codes and scales of some rows, which are made of them where they are not there.
    pub(crate) fn of(&mut self, kernels: &Fp8Kernels, rows: Rows) -> Result<[&Memory; 2]> {
        if !self.is_current {
            let made = self.make_room(rows.count, rows.cols)?;
            kernels.quantize(rows, made, rows.count, padded(rows.cols))?;
        }
        Ok([&self.codes, &self.scales])
    }
}

impl Fp8Kernels {
    /// Loads those that a block of the GPU has the memory for.
    pub(crate) fn load(
        stream: &Arc<Stream>,
        cubin: impl Fn(Source) -> Result<Vec<u8>>,
        gpu: &Gpu,
    ) -> Result<Fp8Kernels> {
        let quantize = Arc::new(stream.module(&cubin(program::QUANTIZE_FP8)?)?);
        let load = |source, name| Arc::new(stream.module(&cubin(source)?)?).kernel(name, 0);
        Ok(Fp8Kernels {
            quantize_bf16: quantize.kernel("quantize_fp8_bf16", 0)?,
            quantize_f32: quantize.kernel("quantize_fp8_f32", 0)?,
            rms_norm: load(program::RMS_NORM, "rms_norm_fp8")?,
            swiglu: load(program::SWIGLU, "swiglu_fp8")?,
            gemm: Gemm::load(stream, "gemm_fp8", &cubin(program::GEMM_FP8)?, gpu)?,
            stream: Arc::clone(stream),
        })
    }

    /// Queues the quantising of some rows of a matrix of `all_rows`, to codes in chunks of so many columns and to scales.
    pub(crate) fn quantize(
        &self,
        rows: Rows,
        [codes, scales]: [&Memory; 2],
        all_rows: usize,
        chunk: usize,
    ) -> Result<()> {
        assert!(rows.first + rows.count <= all_rows, "{} rows from {} of {all_rows}", rows.count, rows.first);
        let arguments = [
            codes.start(),
            scales.start(),
            rows.from,
            u32_of(rows.first),
            Argument::U64(all_rows as u64),
            u32_of(rows.cols),
            u32_of(rows.stride),
            u32_of(chunk.max(CHUNK)),
        ];
        let kernel = match rows.dtype {
            ViewDtype::Bf16 => &self.quantize_bf16,
            _ => &self.quantize_f32,
        };
        // SAFETY: the source has these rows, and the matrix room for all of its own.
        unsafe { self.stream.launch("quantize", kernel, row_grid(rows.count, 256), &arguments) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::emulated;
    use super::super::{Cuda, CudaArray, CudaOperand, locked};
    use super::*;
    use crate::backend::{Backend, WeightType};
    use crate::tensor_view::TensorView;

    /// Numbers of many sizes.
    fn values(len: usize) -> Vec<f32> {
        let value = |i: usize| ((i * 7919 % 1013) as f32 - 500.0) * 10f32.powi((i * 31 % 7) as i32 - 5);
        (0..len).map(value).collect()
    }

    fn array(cuda: &Cuda, values: &[f32], cols: usize) -> CudaArray {
        let mut array = cuda.array();
        cuda.upload(values, values.len() / cols, cols, &mut array).unwrap();
        array
    }

    /// The operand's codes and scales' bits, as they are or made anew by the pass that does nothing else.
    fn codes(cuda: &Cuda, x: &CudaOperand, anew: bool) -> (Vec<u8>, Vec<u32>) {
        let mut codes = locked(&x.codes);
        assert!(codes.is_current || anew, "whoever wrote the operand made its codes");
        codes.is_current = !anew;
        let [bytes, scales] = codes.of(cuda.fp8.as_ref().unwrap(), x.source()).unwrap();
        let mut found = (vec![0xa5; x.rows * padded(x.cols)], vec![0; x.rows]);
        bytes.download("read", &mut found.0).unwrap();
        scales.download("read", &mut found.1).unwrap();
        found
    }

    fn assert_alike(cuda: &Cuda, x: &CudaOperand, what: &str) {
        let fused = codes(cuda, x, false);
        assert!(fused.0.iter().any(|&code| code != 0) || x.rows == 0, "{what}: all codes are zero");
        assert!(fused == codes(cuda, x, true), "{what}");
    }

    #[test]
    fn norms_and_swiglu_write_the_codes_that_a_pass_of_its_own_makes() {
        let cuda = emulated(WeightType::Fp8);
        let (mut normed, mut inner) = (cuda.operand(), cuda.operand());
        for (rows, cols, width) in [(1, 5, 1), (3, 16, 64), (2, 1030, 33), (5, 40, 58)] {
            let mut numbers = values(rows * cols);
            let weight: Vec<u8> = values(cols).iter().flat_map(|value| value.to_le_bytes()).collect();
            let weight = cuda.vector(TensorView::new(ViewDtype::F32, 1, cols, &weight)).unwrap();
            // Of a row that is none the scale says so.
            numbers[(rows - 1) * cols] = if rows > 2 { f32::NAN } else { 0.5 };
            cuda.rms_norm(&array(&cuda, &numbers, cols), &weight, 1e-5, &mut normed).unwrap();
            assert_alike(&cuda, &normed, &format!("a norm of [{rows}, {cols}]"));
            let matrix = |first: usize| {
                let values: Vec<u8> = values(first + width * cols)[first..]
                    .iter()
                    .flat_map(|value| (value * 1e-3).to_le_bytes())
                    .collect();
                cuda.matrix(TensorView::new(ViewDtype::F32, width, cols, &values)).unwrap()
            };
            cuda.swiglu(&normed, &matrix(0), &matrix(5), &mut inner).unwrap();
            assert_alike(&cuda, &inner, &format!("SwiGLU of [{rows}, {width}]"));
        }
    }
}
