//! Matrices on their way to a device.

use std::ops::Range;

use super::arrays::{self, Chunked, CudaMatrix, Form, padded};
use super::fp8::{self, Fp8};
use super::int4::Int4;
use super::staging::{Element, Staging};
use super::stream::Memory;
use super::{Cuda, locked};
use crate::backend::WeightType;
use crate::check;
use crate::error::Result;
use crate::tensor_view::{TensorView, ViewDtype};

/// Bytes of numbers that are on the device at once before they are quantised.
const SOURCE_BYTES: usize = 64 << 20;

impl Cuda {
    /// A block's matrix.
    pub(super) fn weights(&self, op: &'static str, view: TensorView<'_>) -> Result<CudaMatrix> {
        check::view(op, &view)?;
        match self.options.weights {
            WeightType::Int4Weight => self.int4(view),
            WeightType::Fp8 => self.fp8(view),
            _ => self.packed(view, self.options.ffn_columns),
        }
    }

    /// A matrix in bf16, in chunks of so many columns at most. The view has been checked.
    pub(super) fn packed(&self, view: TensorView<'_>, chunk: usize) -> Result<CudaMatrix> {
        let (rows, cols) = (view.rows, view.cols);
        let chunks = || arrays::chunks(rows, cols, chunk);
        let numbers: usize = chunks().map(|chunk| rows * chunk.stride).sum();
        let mut memory = self.stream.allocate("weights", numbers * size_of::<u16>())?;
        for chunk in chunks() {
            let part = view.columns(chunk.first..chunk.first + chunk.cols);
            self.send::<u16>(&part, chunk.stride, &mut memory, chunk.at)?;
        }
        Ok(CudaMatrix { rows, cols, form: Form::Bf16(Chunked { chunk, memory }) })
    }

    /// A matrix of 4 bits, quantised on the device.
    fn int4(&self, view: TensorView<'_>) -> Result<CudaMatrix> {
        let kernels = self.int4.as_ref().expect("they are loaded where weights are of 4 bits");
        let (rows, cols, stride) = (view.rows, view.cols, padded(view.cols));
        let mut matrix = Int4::new(&self.stream, rows, cols)?;
        if let (ViewDtype::Int4, Some(scales)) = (view.dtype, &view.scales) {
            matrix.send_scales(&self.stream, scales)?;
            let stride = cols.div_ceil(8);
            self.in_parts(rows, stride * size_of::<u32>(), |part, source| {
                self.send::<f32>(&words(&view.rows(part.clone())), stride, source, 0)?;
                kernels.shuffle((source, stride), part, &mut matrix)
            })?;
            return Ok(CudaMatrix { rows, cols, form: Form::Int4(matrix) });
        }
        let (dtype, size) = sent_as(&view);
        self.in_parts(rows, stride * size, |part, source| {
            self.send_as(dtype, &view.rows(part.clone()), stride, source)?;
            kernels.quantize((source, dtype, stride), part, &mut matrix)
        })?;
        Ok(CudaMatrix { rows, cols, form: Form::Int4(matrix) })
    }

    /// A matrix in E4M3, quantised on the device, or as a checkpoint has it.
    fn fp8(&self, view: TensorView<'_>) -> Result<CudaMatrix> {
        let kernels = self.fp8.as_ref().expect("they are loaded where weights are in E4M3");
        let (rows, cols, chunk) = (view.rows, view.cols, self.options.ffn_columns);
        let mut matrix = Fp8::new(&self.stream, rows, cols, chunk)?;
        if let (ViewDtype::Fp8, Some(scales)) = (view.dtype, &view.scales) {
            let scales: Vec<f32> = (0..rows).map(|row| scales.scale(row, 0)).collect();
            self.stream.upload("scales", bytemuck::cast_slice(&scales), &mut matrix.scales, 0)?;
            for chunk in fp8::chunks(rows, cols, chunk) {
                let part = view.columns(chunk.first..chunk.first + chunk.cols);
                self.send::<u8>(&part, chunk.stride, &mut matrix.codes, chunk.at)?;
            }
            return Ok(CudaMatrix { rows, cols, form: Form::Fp8(matrix) });
        }
        let (dtype, size) = sent_as(&view);
        let stride = padded(cols);
        self.in_parts(rows, stride * size, |part, source| {
            self.send_as(dtype, &view.rows(part.clone()), stride, source)?;
            let (first, count) = (part.start, part.len());
            let rows_of = fp8::Rows { from: source.start(), dtype, stride, cols, first, count };
            kernels.quantize(rows_of, [&matrix.codes, &matrix.scales], rows, chunk)
        })?;
        Ok(CudaMatrix { rows, cols, form: Form::Fp8(matrix) })
    }

    fn send_as(&self, dtype: ViewDtype, view: &TensorView<'_>, stride: usize, to: &mut Memory) -> Result<()> {
        match dtype {
            ViewDtype::Bf16 => self.send::<u16>(view, stride, to, 0),
            _ => self.send::<f32>(view, stride, to, 0),
        }
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
        let mut staging = locked(&self.staging);
        if staging.is_none() {
            *staging = Some(Staging::new(&self.stream)?);
        }
        staging.as_mut().expect("it was made").send::<T>(view, stride, to, at)
    }
}

/// What numbers are sent as before they are quantised, and its bytes: what f16 holds does not fit into bf16.
fn sent_as(view: &TensorView<'_>) -> (ViewDtype, usize) {
    match view.dtype {
        ViewDtype::Bf16 => (ViewDtype::Bf16, size_of::<u16>()),
        _ => (ViewDtype::F32, size_of::<f32>()),
    }
}

/// Integers of 4 bits by their words, which are sent as numbers of 32 bits: those go unchanged.
fn words<'a>(view: &TensorView<'a>) -> TensorView<'a> {
    let (cols, stride) = (view.cols.div_ceil(8), view.stride / 8);
    TensorView { dtype: ViewDtype::F32, cols, stride, scales: None, ..*view }
}
