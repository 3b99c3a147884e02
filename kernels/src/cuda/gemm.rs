//! Matrix products by our own tensor-core kernel (`cu/gemm.cu`).
//!
//! A number's sum runs over K in one order whatever the tile is, so that a row has the same bits in any batch.

use super::program::{self, Source};
use super::stream::{Argument, Grid, Kernel, Stream};
use crate::error::Result;
use std::sync::Arc;

/// Columns of a block's tile, K of a step, tiles under way: COLS, STEP and STAGES of the kernel.
const COLS: usize = 128;
const STEP: usize = 64;
const STAGES: usize = 3;
const THREADS: usize = 256;

/// What becomes of what out held before: the modes of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Onto {
    /// It is replaced.
    Nothing,
    /// The product is summed first, then added.
    Product,
    /// Sums begin with it.
    Sums,
}

/// The kernel in tiles of so many rows, largest first.
#[derive(Debug)]
pub(crate) struct Gemm {
    tiles: Vec<(usize, Kernel)>,
}

/// Rows of x and w, where they begin, and where their product goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Product {
    pub(crate) x: Argument,
    pub(crate) w: Argument,
    pub(crate) out: Argument,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) depth: usize,
    pub(crate) x_stride: usize,
    pub(crate) w_stride: usize,
    pub(crate) out_stride: usize,
}

impl Gemm {
    /// Loads those tiles that a block has the memory for.
    pub(crate) fn load(
        stream: &Arc<Stream>,
        cubin: impl Fn(Source) -> Result<Vec<u8>>,
        most_bytes: usize,
    ) -> Result<Gemm> {
        let module = Arc::new(stream.module(&cubin(program::GEMM)?)?);
        let tiles = [(128, "gemm_128"), (64, "gemm_64"), (16, "gemm_16")];
        let tiles = tiles.into_iter().filter(|&(rows, _)| block_bytes(rows) <= most_bytes);
        let tiles = tiles.map(|(rows, name)| Ok((rows, module.kernel(name, block_bytes(rows))?)));
        Ok(Gemm { tiles: tiles.collect::<Result<_>>()? })
    }

    /// Queues a product.
    pub(crate) fn run(&self, stream: &Stream, op: &'static str, product: Product, onto: Onto) -> Result<()> {
        let Product { x, w, out, rows, cols, depth, x_stride, w_stride, out_stride } = product;
        let wanted = tile_rows(rows);
        let (tile_rows, kernel) =
            self.tiles.iter().find(|(rows, _)| *rows <= wanted).expect("the smallest tile fits every GPU");
        let blocks = [rows.div_ceil(*tile_rows), cols.div_ceil(COLS), 1];
        let grid = Grid { blocks, threads: THREADS, block_bytes: block_bytes(*tile_rows) };
        let u32_of = |value: usize| Argument::U32(value as u32);
        let mode = match onto {
            Onto::Nothing => 0,
            Onto::Product => 1,
            Onto::Sums => 2,
        };
        let arguments = [
            out,
            x,
            w,
            u32_of(rows),
            u32_of(cols),
            u32_of(x_stride),
            u32_of(w_stride),
            u32_of(depth),
            u32_of(out_stride),
            Argument::U32(mode),
        ];
        // SAFETY: x and w have `rows` and `cols` rows of their strides, each at least `depth` wide and padded with zeros to
        // chunks, and out has `rows` of `out_stride`: their shapes have been checked.
        unsafe { stream.launch(op, kernel, grid, &arguments) }
    }
}

/// Rows of the tile that wastes least.
fn tile_rows(rows: usize) -> usize {
    match rows {
        0..=16 => 16,
        17..=64 => 64,
        _ => 128,
    }
}

fn block_bytes(tile_rows: usize) -> usize {
    STAGES * (tile_rows + COLS) * (STEP + 8) * size_of::<u16>()
}
