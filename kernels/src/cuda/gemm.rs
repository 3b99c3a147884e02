//! Matrix products by our own tensor-core kernel (`cu/gemm.cu`; what it shares with others: `cu/gemm.cuh`).
//!
//! A number's sum runs over K in one order whatever the tile is, so that a row has the same bits in any batch.

use super::stream::{Argument, Grid, Kernel, Stream};
use crate::error::Result;
use std::sync::Arc;

/// Columns of a block's tile, K of a step, tiles under way: COLS, STEP and STAGES of the kernel.
pub(crate) const COLS: usize = 128;
const STEP: usize = 64;
pub(crate) const STAGES: usize = 3;
pub(crate) const THREADS: usize = 256;

/// Rows of the tiles that there are, largest first.
pub(crate) const TILES: [usize; 3] = [128, 64, 16];

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

impl Onto {
    /// As kernels are told.
    pub(crate) fn mode(self) -> Argument {
        Argument::U32(match self {
            Onto::Nothing => 0,
            Onto::Product => 1,
            Onto::Sums => 2,
        })
    }
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
    /// Of E4M3: scales of the rows of x, and of those of w. Strides and depth then count pairs of numbers.
    pub(crate) scales: Option<[Argument; 2]>,
}

impl Gemm {
    /// Loads those tiles that a block has the memory for.
    pub(crate) fn load(stream: &Arc<Stream>, name: &str, cubin: &[u8], most_bytes: usize) -> Result<Gemm> {
        let module = Arc::new(stream.module(cubin)?);
        let tiles = TILES.into_iter().filter(|&rows| block_bytes(rows) <= most_bytes);
        let tiles =
            tiles.map(|rows| Ok((rows, module.kernel(&format!("{name}_{rows}"), block_bytes(rows))?)));
        Ok(Gemm { tiles: tiles.collect::<Result<_>>()? })
    }

    /// Queues a product.
    pub(crate) fn run(&self, stream: &Stream, op: &'static str, product: Product, onto: Onto) -> Result<()> {
        let Product { x, w, out, rows, cols, depth, x_stride, w_stride, out_stride, scales } = product;
        let wanted = tile_rows(rows);
        let (tile_rows, kernel) =
            self.tiles.iter().find(|(rows, _)| *rows <= wanted).expect("the smallest tile fits every GPU");
        let blocks = [rows.div_ceil(*tile_rows), cols.div_ceil(COLS), 1];
        let grid = Grid { blocks, threads: THREADS, block_bytes: block_bytes(*tile_rows) };
        let u32_of = |value: usize| Argument::U32(value as u32);
        let mut arguments = vec![
            out,
            x,
            w,
            u32_of(rows),
            u32_of(cols),
            u32_of(x_stride),
            u32_of(w_stride),
            u32_of(depth),
            u32_of(out_stride),
            onto.mode(),
        ];
        arguments.extend(scales.into_iter().flatten());
        // SAFETY: x and w have `rows` and `cols` rows of their strides, each at least `depth` wide and padded with zeros to
        // chunks, and out has `rows` of `out_stride`: their shapes have been checked.
        unsafe { stream.launch(op, kernel, grid, &arguments) }
    }
}

/// Rows of the tile that wastes least.
pub(crate) fn tile_rows(rows: usize) -> usize {
    match rows {
        0..=16 => 16,
        17..=64 => 64,
        _ => 128,
    }
}

fn block_bytes(tile_rows: usize) -> usize {
    STAGES * (x_tile_bytes(tile_rows) + x_tile_bytes(COLS))
}

/// Bytes of a block's memory for a step of so many rows.
pub(crate) fn x_tile_bytes(rows: usize) -> usize {
    rows * (STEP + 8) * size_of::<u16>()
}
