//! Weights and inputs in E4M3: how they lie, how they are made (`cu/quantize_fp8.cu`), and products of them by our own kernel
//! (`cu/gemm_fp8.cu`).

use std::sync::Arc;

use super::arrays::{self, Chunk};
use super::gemm::Gemm;
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

    /// Codes and scales of some rows, which are made of them where they are not there.
    pub(crate) fn of(&mut self, kernels: &Fp8Kernels, rows: Rows) -> Result<[&Memory; 2]> {
        if !self.is_current {
            self.codes.reserve("inputs", rows.count * padded(rows.cols))?;
            self.scales.reserve("inputs", rows.count * size_of::<f32>())?;
            kernels.quantize(rows, [&self.codes, &self.scales], rows.count, padded(rows.cols))?;
            self.is_current = true;
        }
        Ok([&self.codes, &self.scales])
    }
}

impl Fp8Kernels {
    /// Loads those that a block has the memory for.
    pub(crate) fn load(
        stream: &Arc<Stream>,
        cubin: impl Fn(Source) -> Result<Vec<u8>>,
        most_bytes: usize,
    ) -> Result<Fp8Kernels> {
        let quantize = Arc::new(stream.module(&cubin(program::QUANTIZE_FP8)?)?);
        Ok(Fp8Kernels {
            quantize_bf16: quantize.kernel("quantize_fp8_bf16", 0)?,
            quantize_f32: quantize.kernel("quantize_fp8_f32", 0)?,
            gemm: Gemm::load(stream, "gemm_fp8", &cubin(program::GEMM_FP8)?, most_bytes)?,
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
