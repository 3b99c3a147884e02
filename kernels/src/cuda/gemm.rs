//! Matrix products by our own tensor-core kernel (`cu/gemm.cu`; what it shares with others: `cu/gemm.cuh`).
//!
//! A number's sum runs over K in one order whatever the tile is, so that a row has the same bits in any batch.

use super::gpu::Gpu;
use super::stream::{Argument, Grid, Kernel, Module, Stream};
use crate::error::Result;
use std::sync::Arc;

/// K of a step: STEP of the kernel.
const STEP: usize = 64;
const THREADS: usize = 256;

/// Rows and columns of a product that a block takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tile {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

/// Those that there are, largest first.
const TILES: [Tile; 4] = [
    Tile { rows: TILE_ROWS, cols: 128 },
    Tile { rows: 64, cols: 128 },
    Tile { rows: 64, cols: 32 },
    Tile { rows: 16, cols: 128 },
];

/// Rows of the largest one.
pub(crate) const TILE_ROWS: usize = 128;

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

/// A product's kernel for each tile that a block has the memory for.
#[derive(Debug)]
pub(crate) struct TiledKernel {
    kernels: Vec<(Tile, Kernel)>,
    /// Bytes of a block's memory that a tile takes.
    block_bytes: fn(Tile) -> usize,
    multiprocessors: usize,
}

/// The kernel.
#[derive(Debug)]
pub(crate) struct Gemm(TiledKernel);

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

impl Tile {
    /// Steps under way at once: steps_at_once of the kernel.
    pub(crate) fn steps_at_once(self) -> usize {
        if self.cols < 128 { 6 } else { 3 }
    }

    /// Blocks down and across a product of so many rows and columns.
    fn blocks(self, rows: usize, cols: usize) -> [usize; 3] {
        [rows.div_ceil(self.rows), cols.div_ceil(self.cols), 1]
    }

    /// The tile for a product of so many rows and columns, among those that `is_there` says: the largest that its rows fill, or a smaller
    /// one where that makes no more blocks than there are multiprocessors, which would stand idle else.
    fn of(rows: usize, cols: usize, multiprocessors: usize, is_there: impl Fn(&Tile) -> bool) -> Tile {
        let fitting = match rows {
            0..=16 => &TILES[3..],
            17..=64 => &TILES[1..3],
            _ => &TILES[..3],
        };
        let fitting = || fitting.iter().copied().filter(&is_there);
        let is_at_once = |tile: &Tile| tile.blocks(rows, cols).iter().product::<usize>() <= multiprocessors;
        let tile = fitting().take_while(is_at_once).last().or_else(|| fitting().next());
        tile.expect("the smallest tiles fit every GPU")
    }
}

impl TiledKernel {
    /// Loads those tiles that a block of the GPU has the memory for.
    pub(crate) fn load(
        module: Module,
        name: &str,
        block_bytes: fn(Tile) -> usize,
        gpu: &Gpu,
    ) -> Result<TiledKernel> {
        let module = Arc::new(module);
        let fitting = TILES.into_iter().filter(|&tile| block_bytes(tile) <= gpu.block_bytes as usize);
        let load = |tile: Tile| {
            let kernel = module.kernel(&format!("{name}_{}x{}", tile.rows, tile.cols), block_bytes(tile))?;
            Ok((tile, kernel))
        };
        let kernels = fitting.map(load).collect::<Result<_>>()?;
        Ok(TiledKernel { kernels, block_bytes, multiprocessors: gpu.multiprocessors as usize })
    }

    /// The kernel for a product of so many rows and columns, and its grid.
    pub(crate) fn of(&self, rows: usize, cols: usize) -> (&Kernel, Grid) {
        let find = |tile: &Tile| self.kernels.iter().find(|(other, _)| other == tile);
        let tile = Tile::of(rows, cols, self.multiprocessors, |tile| find(tile).is_some());
        let (_, kernel) = find(&tile).expect("it is one of those that are there");
        let blocks = tile.blocks(rows, cols);
        (kernel, Grid { blocks, threads: THREADS, block_bytes: (self.block_bytes)(tile) })
    }
}

impl Gemm {
    /// Loads those tiles that a block has the memory for.
    pub(crate) fn load(stream: &Arc<Stream>, name: &str, cubin: &[u8], gpu: &Gpu) -> Result<Gemm> {
        Ok(Gemm(TiledKernel::load(stream.module(cubin)?, name, block_bytes, gpu)?))
    }

    /// Queues a product.
    pub(crate) fn run(&self, stream: &Stream, op: &'static str, product: Product, onto: Onto) -> Result<()> {
        let Product { x, w, out, rows, cols, depth, x_stride, w_stride, out_stride, scales } = product;
        let (kernel, grid) = self.0.of(rows, cols);
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

fn block_bytes(tile: Tile) -> usize {
    tile.steps_at_once() * (step_bytes(tile.rows) + step_bytes(tile.cols))
}

/// Bytes of a block's memory for a step of so many rows.
pub(crate) fn step_bytes(rows: usize) -> usize {
    rows * (STEP + 8) * size_of::<u16>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_are_small_where_large_ones_would_leave_multiprocessors_idle() {
        let of = |rows, cols| {
            let Tile { rows, cols } = Tile::of(rows, cols, 132, |_| true);
            [rows, cols]
        };
        // k and v of Ultra and of Super.
        assert_eq!([of(64, 2048), of(128, 2048), of(128, 1024)], [[64, 32]; 3]);
        // More rows, or more columns, are enough blocks of larger ones.
        assert_eq!([of(256, 2048), of(512, 2048), of(40, 16_384)], [[64, 128]; 3]);
        assert_eq!([of(128, 16_384), of(1024, 2048), of(65, 425_984)], [[128, 128]; 3]);
        assert_eq!([of(1, 64), of(16, 2048)], [[16, 128]; 2]);
    }

    #[test]
    fn a_gpu_has_room_for_a_tile_of_any_number_of_rows() {
        // An RTX 4090 gives a block 99 KB.
        for rows in [1, 17, 65] {
            let tile = Tile::of(rows, 1 << 20, 128, |&tile| block_bytes(tile) <= 99 << 10);
            assert!(tile.rows <= 64, "{tile:?}");
        }
        assert!(TILES.map(block_bytes).iter().all(|&bytes| bytes <= 163 << 10), "an A100 has all");
    }
}
