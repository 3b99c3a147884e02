//! Matrix products: cut where they are wide, and given to cuBLASLt or to our own kernel.
//!
//! The columns of a matrix lie in chunks, whose products are summed up in f32 one after the other. Our own kernel goes on
//! with a chunk's sums in the order of K, so that chunks change no bit.

use std::ops::Range;

use super::arrays::{self, CudaArray, CudaMatrix, CudaOperand, Form};
use super::cublaslt::{self, Kind};
use super::fp8::{self, Fp8};
use super::gemm::{Onto, Product};
use super::stream::{Argument, Grid, Memory};
use super::{Cuda, flat_grid, locked};
use crate::error::Result;

impl Cuda {
    /// Queues `x · wᵀ` as a whole. The shapes have been checked.
    pub(super) fn multiply_all(
        &self,
        op: &'static str,
        x: &CudaOperand,
        w: &CudaMatrix,
        out: &CudaArray,
        onto: Onto,
    ) -> Result<()> {
        self.multiply(op, (x, 0..x.rows), (w, 0..w.rows), &out.memory, onto)
    }

    /// The same of some rows of `x`, to the same rows of `out`. Of our own kernels, they have the bits of the whole.
    pub(super) fn multiply_rows(
        &self,
        op: &'static str,
        x: &CudaOperand,
        rows: Range<usize>,
        w: &CudaMatrix,
        out: &CudaArray,
    ) -> Result<()> {
        self.multiply(op, (x, rows), (w, 0..w.rows), &out.memory, Onto::Nothing)
    }

    /// Queues a product of some rows of `x` with some of `w`, to the same rows of an array of as many columns.
    pub(super) fn multiply(
        &self,
        op: &'static str,
        (x, rows): (&CudaOperand, Range<usize>),
        (w, cols): (&CudaMatrix, Range<usize>),
        out: &Memory,
        onto: Onto,
    ) -> Result<()> {
        let chunked = match &w.form {
            Form::Bf16(chunked) => chunked,
            Form::Fp8(fp8) => return self.multiply_fp8(op, (x, rows), (w, fp8, cols), out, onto),
            Form::Int4(int4) => {
                let kernels = self.int4.as_ref().expect("the matrix was made by them");
                let first = x.memory.at(rows.start * x.stride() * size_of::<u16>());
                let out = out.at(rows.start * cols.len() * size_of::<f32>());
                return kernels.multiply(op, (first, rows.len(), x.stride()), int4, cols, out, onto);
            }
        };
        let chunks = || arrays::chunks(w.rows, w.cols, chunked.chunk);
        let num_chunks = chunks().count();
        if onto == Onto::Product && num_chunks > 1 && self.library.is_none() {
            return self.multiply_apart(op, (x, rows), (w, cols), out);
        }
        for (index, chunk) in chunks().enumerate() {
            let product = Product {
                x: x.memory.at(chunk.first * size_of::<u16>()),
                w: chunked.memory.at((chunk.at + cols.start * chunk.stride) * size_of::<u16>()),
                out: out.start(),
                rows: x.rows,
                cols: cols.len(),
                depth: chunk.cols,
                x_stride: x.stride(),
                w_stride: chunk.stride,
                out_stride: cols.len(),
                scales: None,
            };
            let product = product.part(rows.clone(), 0..cols.len());
            self.multiply_chunk(op, &product, if index == 0 { onto } else { Onto::Sums })?;
        }
        Ok(())
    }

    /// Seconds of `x · wᵀ` by the fastest algorithm that cuBLASLt names at any of several sizes of workspace, and how many were
    /// timed: what [`crate::Backend::matmul`] is held against. Weights of one shape take turns: those of all of them come from memory where
    /// no cache holds them together. Nothing without the library, and where they are not one piece of bf16 each.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// If there are no weights, if they differ in shape, or if x has not as many columns.
    pub fn fastest_product(&self, x: &CudaOperand, weights: &[CudaMatrix]) -> Result<Option<(f64, usize)>> {
        let w = weights.first().expect("there are weights");
        assert_eq!(x.cols, w.cols, "columns of x and of w");
        let Some(library) = &self.library else { return Ok(None) };
        let mut out = Memory::none(&self.stream);
        out.reserve("time a product", x.rows * w.rows * size_of::<f32>())?;
        let product = |own: &CudaMatrix| {
            assert_eq!((own.rows, own.cols), (w.rows, w.cols), "shapes of weights that take turns");
            let Form::Bf16(chunked) = &own.form else { return None };
            let mut chunks = arrays::chunks(own.rows, own.cols, chunked.chunk);
            let (Some(chunk), None) = (chunks.next(), chunks.next()) else { return None };
            Some(Product {
                x: x.memory.start(),
                w: chunked.memory.start(),
                out: out.start(),
                rows: x.rows,
                cols: own.rows,
                depth: chunk.cols,
                x_stride: x.stride(),
                w_stride: chunk.stride,
                out_stride: own.rows,
                scales: None,
            })
        };
        let Some(products) = weights.iter().map(product).collect::<Option<Vec<_>>>() else { return Ok(None) };
        // SAFETY: x and weights have as many rows and columns as they say, and out was made for the products.
        let found = unsafe { library.survey(&products) }?;
        Ok(found.map(|(microseconds, count)| (microseconds / 1e6, count)))
    }

    /// The same of E4M3, of pairs of numbers; x is quantised where it has not been.
    fn multiply_fp8(
        &self,
        op: &'static str,
        (x, rows): (&CudaOperand, Range<usize>),
        (w, weights, cols): (&CudaMatrix, &Fp8, Range<usize>),
        out: &Memory,
        onto: Onto,
    ) -> Result<()> {
        let kernels = self.fp8.as_ref().expect("the matrix was made by them");
        let mut codes = locked(&x.codes);
        let [x_codes, x_scales] = codes.of(kernels, x.source())?;
        for (index, chunk) in fp8::chunks(w.rows, w.cols, weights.chunk).enumerate() {
            let product = Product {
                x: x_codes.at(chunk.first),
                w: weights.codes.at(chunk.at + cols.start * chunk.stride),
                out: out.start(),
                rows: x.rows,
                cols: cols.len(),
                depth: chunk.stride / 2,
                x_stride: fp8::padded(x.cols) / 2,
                w_stride: chunk.stride / 2,
                out_stride: cols.len(),
                scales: Some([x_scales.start(), weights.scales.at(cols.start * size_of::<f32>())]),
            };
            let product = product.part(rows.clone(), 0..cols.len());
            self.multiply_chunk(op, &product, if index == 0 { onto } else { Onto::Sums })?;
        }
        Ok(())
    }

    /// A product of several chunks that is summed first, then added.
    fn multiply_apart(
        &self,
        op: &'static str,
        (x, rows): (&CudaOperand, Range<usize>),
        (w, cols): (&CudaMatrix, Range<usize>),
        out: &Memory,
    ) -> Result<()> {
        let (first, count) = (rows.start * cols.len() * size_of::<f32>(), rows.len() * cols.len());
        let mut scratch = locked(&self.product);
        scratch.reserve(op, x.rows * cols.len() * size_of::<f32>())?;
        self.multiply(op, (x, rows), (w, cols), &scratch, Onto::Nothing)?;
        let grid: Grid = flat_grid(count);
        let arguments = [out.at(first), scratch.at(first), Argument::U64(count as u64)];
        // SAFETY: both have as many numbers.
        unsafe { self.stream.launch(op, &self.kernels.add, grid, &arguments) }
    }

    fn multiply_chunk(&self, op: &'static str, product: &Product, onto: Onto) -> Result<()> {
        let (kind, own) = match (product.scales, &self.fp8) {
            (Some(_), Some(kernels)) => (Kind::Fp8, &kernels.gemm),
            _ => (Kind::Bf16, &self.kernels.gemm),
        };
        let Some(library) = &self.library else { return own.run(&self.stream, op, *product, onto) };
        for rows in cublaslt::cuts(product.rows, product.x_stride.max(product.out_stride)) {
            for cols in cublaslt::cuts(product.cols, product.w_stride) {
                let part = product.part(rows.clone(), cols);
                // SAFETY: x and w have `rows` and `cols` rows of their strides, each at least `depth` wide, and out has `rows`
                // of `out_stride`: their shapes have been checked.
                let is_done = unsafe { library.run(op, kind, &part, onto != Onto::Nothing) }?;
                if !is_done {
                    own.run(&self.stream, op, part, onto)?;
                }
            }
        }
        Ok(())
    }
}

impl Product {
    /// Some rows of x with some of w.
    fn part(&self, rows: Range<usize>, cols: Range<usize>) -> Product {
        let moved = |argument: Argument, bytes: usize| match argument {
            Argument::Pointer(address) => Argument::Pointer(address + bytes as u64),
            other => unreachable!("{other:?} is no pointer"),
        };
        Product {
            x: moved(self.x, rows.start * self.x_stride * size_of::<u16>()),
            w: moved(self.w, cols.start * self.w_stride * size_of::<u16>()),
            out: moved(self.out, (rows.start * self.out_stride + cols.start) * size_of::<f32>()),
            rows: rows.len(),
            cols: cols.len(),
            scales: self.scales.map(|[x, w]| {
                [moved(x, rows.start * size_of::<f32>()), moved(w, cols.start * size_of::<f32>())]
            }),
            ..*self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_begins_at_its_first_row_and_column() {
        let at = Argument::Pointer;
        let (rows, cols) = (10, 20);
        let (x_stride, w_stride, out_stride) = (64, 32, 24);
        let scales = Some([at(4000), at(5000)]);
        let whole = Product {
            scales,
            x: at(1000),
            w: at(2000),
            out: at(3000),
            rows,
            cols,
            depth: 30,
            x_stride,
            w_stride,
            out_stride,
        };
        let part = whole.part(2..5, 4..20);
        let address = |argument| match argument {
            Argument::Pointer(address) => address,
            other => panic!("{other:?}"),
        };
        assert_eq!([part.x, part.w, part.out].map(address), [1000 + 256, 2000 + 256, 3000 + (48 + 4) * 4]);
        assert_eq!(part.scales.unwrap().map(address), [4000 + 8, 5000 + 16]);
        assert_eq!((part.rows, part.cols, part.depth), (3, 16, 30));
    }
}
