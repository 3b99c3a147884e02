//! What lives on a device: activations, weights, tables, keys and values.

use std::sync::{Arc, Mutex, PoisonError};

use super::attention::AttentionKernels;
use super::fp8::{Codes, Fp8, Rows};
use super::int4::Int4;
use super::stream::{Argument, Memory, Stream};
use crate::backend::{KvDtype, WeightType};
use crate::error::Result;
use crate::tensor_view::ViewDtype;

/// Numbers in 16 bytes of bf16, to which rows are padded with zeros: CHUNK of `cu/num.cuh`.
const CHUNK: usize = 8;

/// Columns with what pads them.
pub(crate) fn padded(cols: usize) -> usize {
    cols.next_multiple_of(CHUNK)
}

/// f32 activations `[rows, cols]` on a GPU. Keeps its memory when it shrinks.
#[derive(Debug)]
pub struct CudaArray {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) memory: Memory,
}

/// Input of a matrix product on a GPU: bf16 `[rows, cols]`, each row padded with zeros to 16 bytes.
#[derive(Debug)]
pub struct CudaOperand {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) memory: Memory,
    /// The same in E4M3, where products are of those.
    pub(crate) codes: Mutex<Codes>,
}

/// A weight matrix `[rows, cols]` on a GPU.
#[derive(Debug)]
pub struct CudaMatrix {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) form: Form,
}

/// How a matrix lies.
#[derive(Debug)]
pub(crate) enum Form {
    /// In bf16.
    Bf16(Chunked),
    /// In integers of 4 bits.
    Int4(Int4),
    /// In E4M3.
    Fp8(Fp8),
}

/// Chunks of columns one after the other, each `[rows, chunk]` with rows padded with zeros to 16 bytes. So no product has more
/// to count than 32 bits hold.
#[derive(Debug)]
pub(crate) struct Chunked {
    /// Columns of every chunk but the last one, a multiple of 64.
    pub(crate) chunk: usize,
    pub(crate) memory: Memory,
}

/// Columns of a matrix, or as many numbers of every row of an operand, and where those of the first row begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Chunk {
    /// The first column.
    pub(crate) first: usize,
    /// How many.
    pub(crate) cols: usize,
    /// Numbers from row to row of the matrix.
    pub(crate) stride: usize,
    /// Numbers before them in the matrix.
    pub(crate) at: usize,
}

/// The chunks of a matrix; one of no columns has one.
pub(crate) fn chunks(rows: usize, cols: usize, chunk: usize) -> impl Iterator<Item = Chunk> {
    let count = cols.div_ceil(chunk).max(1);
    (0..count).map(move |index| {
        let first = index * chunk;
        let cols = chunk.min(cols - first);
        Chunk { first, cols, stride: padded(cols), at: rows * first }
    })
}

/// An f32 vector on a GPU.
#[derive(Debug)]
pub struct CudaVector {
    pub(crate) len: usize,
    pub(crate) memory: Memory,
}

/// Rotary angles on a GPU.
#[derive(Debug)]
pub struct CudaRope {
    pub(crate) head_dim: usize,
    pub(crate) positions: usize,
    pub(crate) cos: Memory,
    pub(crate) sin: Memory,
}

/// Keys and values of one attention block on a GPU: bf16 `[pages, kv_heads, 2, PAGE_TOKENS, padded head_dim]`, or E4M3, of which
/// a page and head has powers of two `[2, PAGE_TOKENS]` behind its codes.
#[derive(Debug)]
pub struct CudaKvCache {
    pub(crate) num_pages: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) memory: Memory,
    pub(crate) kernels: Arc<AttentionKernels>,
}

impl CudaArray {
    pub(crate) fn new(stream: &Arc<Stream>) -> CudaArray {
        CudaArray { rows: 0, cols: 0, memory: Memory::none(stream) }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Numbers for which it has memory.
    pub(crate) fn room(&self) -> usize {
        self.memory.bytes() / size_of::<f32>()
    }

    /// Gives it a shape; its numbers are then of no meaning.
    pub(crate) fn reshape(&mut self, rows: usize, cols: usize) -> Result<()> {
        (self.rows, self.cols) = (rows, cols);
        self.reserve(rows, cols)
    }

    /// Makes room; what was there may be lost.
    pub(crate) fn reserve(&mut self, rows: usize, cols: usize) -> Result<()> {
        self.memory.reserve("activations", rows * cols * size_of::<f32>())
    }
}

impl CudaOperand {
    pub(crate) fn new(stream: &Arc<Stream>) -> CudaOperand {
        let codes = Mutex::new(Codes::none(stream));
        CudaOperand { rows: 0, cols: 0, memory: Memory::none(stream), codes }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// All numbers as f32, exactly, row by row.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn values(&self) -> Result<Vec<f32>> {
        let mut numbers = vec![0u16; self.rows * self.stride()];
        self.memory.download("read", &mut numbers)?;
        let rows = numbers.chunks_exact(self.stride().max(1)).map(|row| &row[..self.cols]);
        Ok(rows.flatten().map(|&bits| f32::from_bits(u32::from(bits) << 16)).collect())
    }

    /// Numbers from row to row.
    pub(crate) fn stride(&self) -> usize {
        padded(self.cols)
    }

    /// All of it, to be quantised.
    pub(crate) fn source(&self) -> Rows {
        let (from, dtype, stride) = (self.memory.start(), ViewDtype::Bf16, self.stride());
        Rows { from, dtype, stride, cols: self.cols, first: 0, count: self.rows }
    }

    /// Room for its codes, which whoever writes its numbers makes as well.
    pub(crate) fn codes_with_room(&mut self) -> Result<[Argument; 2]> {
        let codes = self.codes.get_mut().unwrap_or_else(PoisonError::into_inner);
        Ok(codes.make_room(self.rows, self.cols)?.map(Memory::start))
    }

    /// Gives it a shape; its numbers are then of no meaning.
    pub(crate) fn reshape(&mut self, rows: usize, cols: usize) -> Result<()> {
        (self.rows, self.cols) = (rows, cols);
        self.codes.get_mut().unwrap_or_else(PoisonError::into_inner).is_current = false;
        self.memory.reserve("activations", rows * padded(cols) * size_of::<u16>())
    }

    /// Makes room, also for codes where `has_codes`; what was there may be lost.
    pub(crate) fn reserve(&mut self, rows: usize, cols: usize, has_codes: bool) -> Result<()> {
        if has_codes {
            self.codes.get_mut().unwrap_or_else(PoisonError::into_inner).reserve(rows, cols)?;
        }
        self.memory.reserve("activations", rows * padded(cols) * size_of::<u16>())
    }
}

impl CudaMatrix {
    /// A table's numbers, and numbers from row to row.
    pub(crate) fn table(&self) -> (&Memory, usize) {
        match &self.form {
            Form::Bf16(Chunked { chunk, memory }) if self.cols <= *chunk => (memory, padded(self.cols)),
            _ => unreachable!("tables are in bf16 and in one piece"),
        }
    }

    /// Memory that a block's matrix takes in such weights, in bytes.
    pub fn bytes_in(weights: WeightType, rows: usize, cols: usize) -> u64 {
        match weights {
            WeightType::Int4Weight => Int4::bytes_of(rows, cols),
            WeightType::Fp8 => Fp8::bytes_of(rows, cols),
            _ => CudaMatrix::bytes_of(rows, cols),
        }
    }

    /// Memory that a matrix of so many rows and columns takes in bf16, as every table is, in bytes.
    pub fn bytes_of(rows: usize, cols: usize) -> u64 {
        rows as u64 * padded(cols) as u64 * size_of::<u16>() as u64
    }
}

impl CudaKvCache {
    /// Memory that a page takes, in bytes.
    pub fn page_bytes(kv: KvDtype, kv_heads: usize, head_dim: usize) -> usize {
        kv_heads * 2 * crate::PAGE_TOKENS * kv.head_bytes(AttentionKernels::padded(head_dim))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_follow_each_other_and_the_last_is_padded() {
        let chunk = |first, cols, stride, at| Chunk { first, cols, stride, at };
        let found: Vec<Chunk> = chunks(3, 150, 64).collect();
        assert_eq!(found, [chunk(0, 64, 64, 0), chunk(64, 64, 64, 192), chunk(128, 22, 24, 384)]);
        assert_eq!(chunks(3, 64, 64).collect::<Vec<_>>(), [chunk(0, 64, 64, 0)]);
        assert_eq!(chunks(3, 0, 64).collect::<Vec<_>>(), [chunk(0, 0, 0, 0)]);
        // Ultra's widest FFN: as much memory as without chunks.
        let last = chunks(16_384, 425_984, 53_248).last().unwrap();
        assert_eq!(last.at + 16_384 * last.stride, 16_384 * 425_984);
    }
}
