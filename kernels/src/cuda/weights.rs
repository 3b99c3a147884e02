//! Matrices on their way to a device, or made there.

use std::ops::Range;

use super::arrays::{self, Chunked, CudaMatrix, Form, padded};
use super::fp8::{self, Fp8};
use super::int4::Int4;
use super::staging::{Element, Staging};
use super::stream::{Argument, Memory};
use super::{Cuda, locked, row_grid, u32_of};
use crate::backend::WeightType;
use crate::error::Result;
use crate::random_tensor::RandomTensor;
use crate::tensor_view::{TensorView, ViewDtype};

/// Bytes of numbers that are on the device at once before they are quantised.
const SOURCE_BYTES: usize = 64 << 20;

/// Where a matrix comes from.
#[derive(Clone, Copy)]
pub(super) enum Origin<'a> {
    /// A checkpoint; the view has been checked.
    Host(TensorView<'a>),
    /// A seed.
    Random(RandomTensor),
}

impl Origin<'_> {
    fn shape(&self) -> (usize, usize) {
        match self {
            Origin::Host(view) => (view.rows, view.cols),
            Origin::Random(random) => (random.rows, random.cols),
        }
    }

    fn part(&self, rows: Range<usize>, cols: Range<usize>) -> Self {
        match self {
            Origin::Host(view) => Origin::Host(view.rows(rows).columns(cols)),
            Origin::Random(random) => Origin::Random(random.part(rows, cols)),
        }
    }

    /// What numbers are sent as before they are quantised, and its bytes: what f16 holds does not fit into bf16.
    fn sent_as(&self) -> (ViewDtype, usize) {
        match self {
            Origin::Host(view) if view.dtype != ViewDtype::Bf16 => (ViewDtype::F32, size_of::<f32>()),
            _ => (ViewDtype::Bf16, size_of::<u16>()),
        }
    }
}

impl Cuda {
    /// A block's matrix.
    pub(super) fn weights(&self, origin: Origin<'_>) -> Result<CudaMatrix> {
        match self.options.weights {
            WeightType::Int4Weight => self.int4(origin),
            WeightType::Fp8 => self.fp8(origin),
            _ => self.packed(origin, self.options.ffn_columns),
        }
    }

    /// An embedding or output matrix: its rows are read one by one, and so it is one chunk.
    pub(super) fn plain_table(&self, origin: Origin<'_>) -> Result<CudaMatrix> {
        self.packed(origin, origin.shape().1.max(1))
    }

    /// A matrix in bf16, in chunks of so many columns at most.
    fn packed(&self, origin: Origin<'_>, chunk: usize) -> Result<CudaMatrix> {
        let (rows, cols) = origin.shape();
        let chunks = || arrays::chunks(rows, cols, chunk);
        let numbers: usize = chunks().map(|chunk| rows * chunk.stride).sum();
        let mut memory = self.stream.allocate("weights", numbers * size_of::<u16>())?;
        for chunk in chunks() {
            let part = origin.part(0..rows, chunk.first..chunk.first + chunk.cols);
            self.put(part, ViewDtype::Bf16, chunk.stride, &mut memory, chunk.at)?;
        }
        Ok(CudaMatrix { rows, cols, form: Form::Bf16(Chunked { chunk, memory }) })
    }

    /// A matrix of 4 bits, quantised on the device.
    fn int4(&self, origin: Origin<'_>) -> Result<CudaMatrix> {
        let kernels = self.int4.as_ref().expect("they are loaded where weights are of 4 bits");
        let (rows, cols) = origin.shape();
        let stride = padded(cols);
        let mut matrix = Int4::new(&self.stream, rows, cols)?;
        if let Origin::Host(view @ TensorView { dtype: ViewDtype::Int4, scales: Some(scales), .. }) = &origin
        {
            self.staged(|staging| matrix.send_scales(&self.stream, staging, scales))?;
            let stride = cols.div_ceil(8);
            self.in_parts(rows, stride * size_of::<u32>(), |part, source| {
                self.send::<f32>(&words(&view.rows(part.clone())), stride, source, 0)?;
                kernels.shuffle((source, stride), part, &mut matrix)
            })?;
            return Ok(CudaMatrix { rows, cols, form: Form::Int4(matrix) });
        }
        let (dtype, size) = origin.sent_as();
        self.in_parts(rows, stride * size, |part, source| {
            self.put(origin.part(part.clone(), 0..cols), dtype, stride, source, 0)?;
            kernels.quantize((source, dtype, stride), part, &mut matrix)
        })?;
        Ok(CudaMatrix { rows, cols, form: Form::Int4(matrix) })
    }

    /// A matrix in E4M3, quantised on the device, or as a checkpoint has it.
    fn fp8(&self, origin: Origin<'_>) -> Result<CudaMatrix> {
        let kernels = self.fp8.as_ref().expect("they are loaded where weights are in E4M3");
        let (rows, cols) = origin.shape();
        let chunk = self.options.ffn_columns;
        let mut matrix = Fp8::new(&self.stream, rows, cols, chunk)?;
        if let Origin::Host(view @ TensorView { dtype: ViewDtype::Fp8, scales: Some(scales), .. }) = &origin {
            let scales: Vec<f32> = (0..rows).map(|row| scales.scale(row, 0)).collect();
            self.stream.upload("scales", bytemuck::cast_slice(&scales), &mut matrix.scales, 0)?;
            for chunk in fp8::chunks(rows, cols, chunk) {
                let part = view.columns(chunk.first..chunk.first + chunk.cols);
                self.send::<u8>(&part, chunk.stride, &mut matrix.codes, chunk.at)?;
            }
            return Ok(CudaMatrix { rows, cols, form: Form::Fp8(matrix) });
        }
        let (dtype, size) = origin.sent_as();
        let stride = padded(cols);
        self.in_parts(rows, stride * size, |part, source| {
            self.put(origin.part(part.clone(), 0..cols), dtype, stride, source, 0)?;
            let (first, count) = (part.start, part.len());
            let rows_of = fp8::Rows { from: source.start(), dtype, stride, cols, first, count };
            kernels.quantize(rows_of, [&matrix.codes, &matrix.scales], rows, chunk)
        })?;
        Ok(CudaMatrix { rows, cols, form: Form::Fp8(matrix) })
    }

    /// Queues the sending, or the making, of numbers, rows padded with zeros to `stride`, behind `at` of them.
    fn put(
        &self,
        origin: Origin<'_>,
        dtype: ViewDtype,
        stride: usize,
        to: &mut Memory,
        at: usize,
    ) -> Result<()> {
        let random = match origin {
            Origin::Host(view) if dtype == ViewDtype::Bf16 => return self.send::<u16>(&view, stride, to, at),
            Origin::Host(view) => return self.send::<f32>(&view, stride, to, at),
            Origin::Random(random) => random,
        };
        let arguments = [
            to.at(at * size_of::<u16>()),
            Argument::U64(random.seed),
            Argument::F32(random.half_width),
            Argument::U64(random.first),
            Argument::U64(random.stride as u64),
            u32_of(random.cols),
            u32_of(stride),
        ];
        let grid = row_grid(if stride == 0 { 0 } else { random.rows }, 256);
        // SAFETY: there is room for all rows.
        unsafe { self.stream.launch("random weights", &self.kernels.random_uniform, grid, &arguments) }
    }

    /// Calls `each` with parts of rows, of so many bytes each, and with room for a part. Each begins at a multiple of 16.
    fn in_parts(
        &self,
        rows: usize,
        row_bytes: usize,
        mut each: impl FnMut(Range<usize>, &mut Memory) -> Result<()>,
    ) -> Result<()> {
        let at_once = (SOURCE_BYTES / row_bytes.max(1) / 16 * 16).max(16);
        let mut source = locked(&self.source);
        for first in (0..rows).step_by(at_once) {
            let part = first..(first + at_once).min(rows);
            source.reserve("weights", part.len() * row_bytes)?;
            each(part, &mut source)?;
        }
        Ok(())
    }

    fn send<T: Element>(
        &self,
        view: &TensorView<'_>,
        stride: usize,
        to: &mut Memory,
        at: usize,
    ) -> Result<()> {
        self.staged(|staging| staging.send::<T>(view, stride, to, at))
    }

    /// Sends something by pinned buffers, which are made at the first time.
    fn staged(&self, send: impl FnOnce(&mut Staging) -> Result<()>) -> Result<()> {
        let mut staging = locked(&self.staging);
        if staging.is_none() {
            *staging = Some(Staging::new(&self.stream)?);
        }
        send(staging.as_mut().expect("it was made"))
    }
}

/// Integers of 4 bits by their words, which are sent as numbers of 32 bits: those go unchanged.
fn words<'a>(view: &TensorView<'a>) -> TensorView<'a> {
    let (cols, stride) = (view.cols.div_ceil(8), view.stride / 8);
    TensorView { dtype: ViewDtype::F32, cols, stride, scales: None, ..*view }
}
