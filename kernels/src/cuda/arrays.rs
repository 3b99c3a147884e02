//! What lives on a device: activations, weights, tables, keys and values.

use std::sync::Arc;

use super::attention::AttentionKernels;
use super::stream::{Memory, Stream};
use crate::error::Result;

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
}

/// A weight matrix on a GPU: bf16 `[rows, cols]`, each row padded with zeros to 16 bytes.
#[derive(Debug)]
pub struct CudaMatrix {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) memory: Memory,
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

/// Keys and values of one attention block on a GPU: bf16 `[pages, kv_heads, 2, PAGE_TOKENS, padded head_dim]`.
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

    /// Gives it a shape; its numbers are then of no meaning.
    pub(crate) fn reshape(&mut self, rows: usize, cols: usize) -> Result<()> {
        (self.rows, self.cols) = (rows, cols);
        self.memory.reserve("activations", rows * cols * size_of::<f32>())
    }
}

impl CudaOperand {
    pub(crate) fn new(stream: &Arc<Stream>) -> CudaOperand {
        CudaOperand { rows: 0, cols: 0, memory: Memory::none(stream) }
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

    /// Gives it a shape; its numbers are then of no meaning.
    pub(crate) fn reshape(&mut self, rows: usize, cols: usize) -> Result<()> {
        (self.rows, self.cols) = (rows, cols);
        self.memory.reserve("activations", rows * padded(cols) * size_of::<u16>())
    }
}

impl CudaMatrix {
    /// Numbers from row to row.
    pub(crate) fn stride(&self) -> usize {
        padded(self.cols)
    }

    /// Memory that a matrix of so many rows and columns takes, in bytes.
    pub fn bytes_of(rows: usize, cols: usize) -> u64 {
        rows as u64 * padded(cols) as u64 * size_of::<u16>() as u64
    }
}

impl CudaKvCache {
    /// Memory that a page takes, in bytes.
    pub fn page_bytes(kv_heads: usize, head_dim: usize) -> usize {
        kv_heads * 2 * crate::PAGE_TOKENS * AttentionKernels::padded(head_dim) * size_of::<u16>()
    }
}
