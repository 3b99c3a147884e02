//! Weights of 4 bits: how they lie (`cu/int4.cuh`), how they are made (`cu/quantize_int4.cu`), and products with them
//! (`cu/gemm_int4.cu`).

use std::ops::Range;
use std::sync::Arc;

use super::gemm::{self, Onto, Tile, TiledKernel};
use super::gpu::Gpu;
use super::program::{self, Source};
use super::staging::Staging;
use super::stream::{Argument, Grid, Kernel, Memory, Stream};
use super::u32_of;
use crate::backend::Int4Groups;
use crate::error::{Error, Result};
use crate::tensor_view::{Scales, ViewDtype};

/// K that shares a scale: GROUP of the kernels.
const GROUP: usize = Int4Groups::Of128.inputs();
/// Columns of out and K of a tile, and its words: TILE_COLS, TILE_K and TILE_WORDS of the kernels.
const TILE_COLS: usize = 16;
const TILE_K: usize = 64;
const TILE_WORDS: usize = 128;

/// A matrix `[rows, cols]` of 4 bits with a scale for each row and [`GROUP`] columns.
#[derive(Debug)]
pub(crate) struct Int4 {
    shape: Shape,
    words: Memory,
    scales: Memory,
    zeros: Option<Memory>,
    has_f16_scales: bool,
}

/// What a matrix takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    rows: usize,
    cols: usize,
}

/// The kernels.
#[derive(Debug)]
pub(crate) struct Int4Kernels {
    quantize_bf16: Kernel,
    quantize_f32: Kernel,
    shuffle: Kernel,
    gemm: TiledKernel,
    stream: Arc<Stream>,
}

impl Shape {
    /// Tiles of the same rows.
    fn k_tiles(self) -> usize {
        self.cols.div_ceil(TILE_K)
    }

    /// Scales of the same group: rows padded to whole tiles.
    fn stride(self) -> usize {
        self.rows.next_multiple_of(TILE_COLS)
    }

    fn word_bytes(self) -> usize {
        self.stride() / TILE_COLS * self.k_tiles() * TILE_WORDS * size_of::<u32>()
    }

    fn scale_bytes(self) -> usize {
        self.cols.div_ceil(GROUP) * self.stride() * size_of::<u16>()
    }
}

impl Int4 {
    /// Memory that a matrix of so many rows and columns takes, in bytes.
    pub(crate) fn bytes_of(rows: usize, cols: usize) -> u64 {
        let shape = Shape { rows, cols };
        (shape.word_bytes() + shape.scale_bytes()) as u64
    }

    /// Room for a matrix.
    pub(crate) fn new(stream: &Arc<Stream>, rows: usize, cols: usize) -> Result<Int4> {
        let shape = Shape { rows, cols };
        let words = stream.allocate("weights", shape.word_bytes())?;
        let scales = stream.allocate("scales", shape.scale_bytes())?;
        Ok(Int4 { shape, words, scales, zeros: None, has_f16_scales: false })
    }

    /// Queues the scales of a checkpoint, and its zeros where it has some.
    ///
    /// # Errors
    /// Groups that are no multiple of ours or begin elsewhere, scales that are not of 16 bits.
    pub(crate) fn send_scales(
        &mut self,
        stream: &Arc<Stream>,
        staging: &mut Staging,
        scales: &Scales<'_>,
    ) -> Result<()> {
        let Shape { rows, cols } = self.shape;
        check_scales(scales, cols)?;
        let shape = [cols.div_ceil(GROUP), self.shape.stride()];
        staging.send_rows(shape, &mut self.scales, 0, of_groups(rows, |row, col| scales.bits(row, col)))?;
        self.has_f16_scales = scales.dtype == ViewDtype::F16;
        if scales.zeros.is_some() {
            let mut zeros = stream.allocate("zeros", self.shape.scale_bytes())?;
            // 128 and the integer in bf16.
            let of = |row, col| 0x4300 | u16::from(scales.zero(row, col));
            staging.send_rows(shape, &mut zeros, 0, of_groups(rows, of))?;
            self.zeros = Some(zeros);
        }
        Ok(())
    }
}

/// What fills a row for each group with what `of` gives for each of so many rows of the matrix, at the group's first column, and with
/// zeros behind them.
fn of_groups(
    num_rows: usize,
    of: impl Fn(usize, usize) -> u16 + Sync,
) -> impl Fn(usize, Range<usize>, &mut [u16]) + Sync {
    move |group, rows, out| {
        for (row, out) in rows.zip(out) {
            *out = if row < num_rows { of(row, group * GROUP) } else { 0 };
        }
    }
}

/// Whether scales of a matrix of so many columns can be kept as they are.
fn check_scales(scales: &Scales<'_>, cols: usize) -> Result<()> {
    let problem = match scales.dtype {
        _ if scales.order.is_some() => Some(format!(
            "found groups of inputs that do not lie side by side, expected groups of whole {GROUP} inputs"
        )),
        _ if scales.group < cols && !scales.group.is_multiple_of(GROUP) => {
            Some(format!("found groups of {}, expected groups of whole {GROUP} inputs", scales.group))
        }
        _ if !scales.first[1].is_multiple_of(GROUP) => {
            Some(format!("found columns from {} on, expected a multiple of {GROUP}", scales.first[1]))
        }
        ViewDtype::Bf16 | ViewDtype::F16 => None,
        _ => Some("found scales in f32, expected bf16 or f16".to_owned()),
    };
    match problem {
        None => Ok(()),
        Some(problem) => Err(Error::Unsupported(format!(
            "weights of 4 bits: {problem}\nhint: [model] dtype = \"bf16\" takes them"
        ))),
    }
}

impl Int4Kernels {
    /// Loads those that a block of the GPU has the memory for.
    pub(crate) fn load(
        stream: &Arc<Stream>,
        cubin: impl Fn(Source) -> Result<Vec<u8>>,
        gpu: &Gpu,
    ) -> Result<Int4Kernels> {
        let quantize = Arc::new(stream.module(&cubin(program::QUANTIZE_INT4)?)?);
        let products = stream.module(&cubin(program::GEMM_INT4)?)?;
        Ok(Int4Kernels {
            quantize_bf16: quantize.kernel("quantize_int4_bf16", 0)?,
            quantize_f32: quantize.kernel("quantize_int4_f32", 0)?,
            shuffle: Arc::new(stream.module(&cubin(program::SHUFFLE_INT4)?)?).kernel("shuffle_int4", 0)?,
            gemm: TiledKernel::load(products, "gemm_int4", block_bytes, gpu)?,
            stream: Arc::clone(stream),
        })
    }

    /// Queues the quantising of some rows, which lie on the device in bf16 or f32, `stride` numbers from one to the next.
    /// The first is a multiple of 16.
    pub(crate) fn quantize(
        &self,
        from: (&Memory, ViewDtype, usize),
        rows: Range<usize>,
        to: &mut Int4,
    ) -> Result<()> {
        const OP: &str = "quantize";
        let (source, dtype, stride) = from;
        let Int4 { shape, words, scales, .. } = to;
        assert!(rows.start.is_multiple_of(TILE_COLS) && rows.end <= shape.rows, "{rows:?} of {shape:?}");
        let tile_bytes = shape.k_tiles() * TILE_WORDS * size_of::<u32>();
        let arguments = [
            words.at(rows.start / TILE_COLS * tile_bytes),
            scales.at(rows.start * size_of::<u16>()),
            source.start(),
            u32_of(rows.len()),
            u32_of(shape.cols),
            u32_of(stride),
            u32_of(shape.k_tiles()),
            u32_of(shape.stride()),
        ];
        let blocks = [shape.cols.div_ceil(GROUP), rows.len().div_ceil(TILE_COLS), 1];
        let kernel = match dtype {
            ViewDtype::Bf16 => &self.quantize_bf16,
            _ => &self.quantize_f32,
        };
        // SAFETY: the source has these rows, and the matrix room for them.
        unsafe { self.stream.launch(OP, kernel, Grid { blocks, threads: 256, block_bytes: 0 }, &arguments) }
    }

    /// Queues the putting into tiles of some rows' integers, which lie on the device as a checkpoint has them, `stride` words
    /// from one row to the next. The first row is a multiple of 16.
    pub(crate) fn shuffle(
        &self,
        (source, stride): (&Memory, usize),
        rows: Range<usize>,
        to: &mut Int4,
    ) -> Result<()> {
        const OP: &str = "shuffle";
        let Int4 { shape, words, .. } = to;
        assert!(rows.start.is_multiple_of(TILE_COLS) && rows.end <= shape.rows, "{rows:?} of {shape:?}");
        let tile_bytes = shape.k_tiles() * TILE_WORDS * size_of::<u32>();
        let arguments = [
            words.at(rows.start / TILE_COLS * tile_bytes),
            source.start(),
            u32_of(rows.len()),
            u32_of(shape.cols),
            u32_of(stride),
            u32_of(shape.k_tiles()),
        ];
        let blocks = [shape.k_tiles(), rows.len().div_ceil(TILE_COLS), 1];
        let grid = Grid { blocks, threads: TILE_WORDS, block_bytes: 0 };
        // SAFETY: the source has these rows, and the matrix room for them.
        unsafe { self.stream.launch(OP, &self.shuffle, grid, &arguments) }
    }

    /// Queues a product of x, `rows` rows of `x_stride` numbers, with `cols` rows of a matrix from `first` on, a multiple of 16.
    pub(crate) fn multiply(
        &self,
        op: &'static str,
        (x, rows, x_stride): (Argument, usize, usize),
        w: &Int4,
        columns: Range<usize>,
        out: Argument,
        onto: Onto,
    ) -> Result<()> {
        let Int4 { shape, words, scales, zeros, has_f16_scales } = w;
        let first = columns.start;
        assert!(first.is_multiple_of(TILE_COLS) && columns.end <= shape.rows, "{columns:?} of {shape:?}");
        let (kernel, grid) = self.gemm.of(rows, columns.len());
        let tile_bytes = shape.k_tiles() * TILE_WORDS * size_of::<u32>();
        let arguments = [
            out,
            x,
            words.at(first / TILE_COLS * tile_bytes),
            scales.at(first * size_of::<u16>()),
            zeros.as_ref().map_or(Argument::Pointer(0), |zeros| zeros.at(first * size_of::<u16>())),
            Argument::U32(u32::from(*has_f16_scales)),
            u32_of(rows),
            u32_of(columns.len()),
            u32_of(x_stride),
            u32_of(shape.k_tiles()),
            u32_of(shape.stride()),
            u32_of(shape.cols),
            u32_of(columns.len()),
            onto.mode(),
        ];
        // SAFETY: x has `rows` rows of its stride, padded with zeros to chunks, w these rows, and out `rows` of as many columns:
        // their shapes have been checked.
        unsafe { self.stream.launch(op, kernel, grid, &arguments) }
    }
}

fn block_bytes(tile: Tile) -> usize {
    let w_bytes = tile.cols / TILE_COLS * TILE_WORDS * size_of::<u32>();
    tile.steps_at_once() * (gemm::step_bytes(tile.rows) + w_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_of_ultra_takes_an_eighth_more_than_four_bits() {
        // A matrix of its widest FFN.
        let bytes = Int4::bytes_of(425_984, 16_384);
        assert_eq!(bytes, 425_984 * 16_384 / 2 + 425_984 * 16_384 / 128 * 2);
        // Rows are padded to tiles of 16, columns to tiles of 64 and groups of 128.
        assert_eq!(Int4::bytes_of(17, 65), 32 * 128 / 2 + 32 * 2);
    }
}
