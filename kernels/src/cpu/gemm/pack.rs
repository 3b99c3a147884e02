//! Weights, packed once at load into the layout that every kernel reads straight.
//!
//! A matrix `[n, k]` is cut into panels of [`NR`] rows (output columns). A panel is contiguous and holds
//! its numbers in the order of K, so that a product streams through it:
//! * f32: `[k][NR]`,
//! * bf16: `[k / 2][NR][2]`, pairs of neighbouring k as `VDPBF16PS` takes them; the other levels get the
//!   even k of a pair as `word << 16` and the odd one as `word & 0xffff0000`;
//! * the narrow types as `quantized` says, with their scales behind the numbers.
//!
//! Either way a panel is made of groups of 256 bytes: a word of 32 bits for each column. K is padded with zeros
//! to what fills whole cache lines of x, and the last panel with zero columns; both add nothing to any sum.
//!
//! For AMX a panel is two strips of 32 columns, one behind the other, each made of such groups of 128 bytes: the
//! columns that are multiplied at once then fill a cache evenly. What lies behind the numbers is as ever.

use super::arena::Piece;
use super::operand::LINE_BYTES;
use super::plan::tile_bytes;
use super::quantized::{self, pack_quantized};
use super::round::bf16_to_f32;
use super::tile::{GROUP_BYTES, Geometry, NR};
use super::zeros;
use crate::backend::{Dtype, WeightType};
use crate::check;
use crate::cpu::pool::ThreadPool;
use crate::cpu::simd::Simd;
use crate::dtype::bf16_bits;
use crate::error::{Error, Result};
use crate::tensor_view::{TensorView, ViewDtype};
use crate::view as numbers;

/// A weight matrix `[n, k]` in panels.
pub(crate) struct PackedMatrix {
    rows: usize,
    cols: usize,
    kind: WeightType,
    strip: usize,
    /// Words of a panel's zeros, none where integers are around 8 or are none.
    zero_words: usize,
    /// The panels, and behind them their zeros.
    panels: Piece,
}

/// What a panel is made of, in groups.
#[derive(Debug, Clone, Copy)]
pub(super) struct PanelLayout {
    /// Numbers.
    pub(super) numbers: usize,
    /// Scales, one for each column.
    pub(super) scales: usize,
    /// Integers that sums start from, one for each column.
    pub(super) biases: usize,
}

impl PanelLayout {
    /// The panels of a matrix of `cols` columns.
    pub(super) fn new(kind: WeightType, cols: usize) -> Self {
        let numbers = padded_terms(kind, cols) / terms_per_word(kind);
        let (scales, biases) = match kind {
            WeightType::F32 | WeightType::Bf16 => (0, 0),
            WeightType::Int8 => (quantized::num_blocks(cols), quantized::num_blocks(cols)),
            WeightType::Fp8 | WeightType::Int8Weight => (1, 0),
            WeightType::Int4Weight => (quantized::num_groups(cols), 0),
        };
        Self { numbers, scales, biases }
    }

    /// Bytes of a panel.
    pub(super) fn bytes(self) -> usize {
        (self.numbers + self.scales + self.biases) * GROUP_BYTES
    }

    /// The numbers in strips of so many columns.
    pub(super) fn strips(self, strip: usize) -> Strips {
        Strips { numbers: self.numbers, strip }
    }
}

/// Where a panel's numbers lie.
#[derive(Debug, Clone, Copy)]
pub(super) struct Strips {
    numbers: usize,
    strip: usize,
}

/// Where a column's words lie in a panel: the first one, and words from one to the next.
pub(super) struct ColumnPlace {
    pub(super) start: usize,
    pub(super) step: usize,
}

impl Strips {
    /// The place of a panel's column.
    pub(super) fn column(self, column: usize) -> ColumnPlace {
        let Self { numbers, strip } = self;
        ColumnPlace { start: column / strip * numbers * strip + column % strip, step: strip }
    }
}

/// Numbers in a word of 32 bits.
pub(super) const fn terms_per_word(kind: WeightType) -> usize {
    match kind {
        WeightType::F32 => 1,
        WeightType::Bf16 => 2,
        WeightType::Fp8 | WeightType::Int8 | WeightType::Int8Weight => 4,
        WeightType::Int4Weight => 8,
    }
}

/// K with its padding.
pub(super) const fn padded_terms(kind: WeightType, cols: usize) -> usize {
    cols.next_multiple_of(LINE_BYTES / tile_bytes(kind))
}

/// A name for panels in strips of so many columns.
pub(super) const fn packing_name(strip: usize) -> &'static str {
    if strip == NR { "whole panels" } else { "strips for amx" }
}

/// Memory that a packed matrix takes, in bytes.
pub(crate) fn packed_bytes(kind: WeightType, rows: usize, cols: usize) -> usize {
    rows.div_ceil(NR) * PanelLayout::new(kind, cols).bytes()
}

impl PackedMatrix {
    /// Pack a checkpoint's tensor for products at a level, rounding to nearest even where `kind` is narrower.
    pub(crate) fn pack(
        simd: Simd,
        view: TensorView<'_>,
        kind: WeightType,
        pool: &ThreadPool,
    ) -> Result<Self> {
        check::view("matrix", &view)?;
        quantized::check(&view, kind)?;
        let (layout, strip) = (PanelLayout::new(kind, view.cols), Geometry::new(simd, kind).strip);
        let (num_panels, panel_bytes) = (view.rows.div_ceil(NR), layout.bytes());
        let zero_words = zeros::panel_words(&view, kind);
        let bytes = num_panels * (panel_bytes + zero_words * WORD_BYTES);
        let mut panels = Piece::new(bytes)
            .map_err(|e| Error::Unsupported(format!("allocate {bytes} bytes for a weight matrix: {e}")))?;
        if bytes > 0 {
            let base = Panels(panels.as_mut_ptr());
            pool.for_each(num_panels, |panel| {
                // SAFETY: every panel is one task's alone, lies inside the mapping, is aligned to its
                // groups of 256 bytes, and any bytes are valid numbers.
                let out = unsafe { base.words(panel * panel_bytes, panel_bytes / WORD_BYTES) };
                match kind {
                    WeightType::F32 | WeightType::Bf16 if view.dtype.has_scales() => {
                        pack_narrow(view, kind.operands(), panel * NR, layout.strips(strip), out);
                    }
                    WeightType::F32 => pack_panel(view, Dtype::F32, panel * NR, layout.strips(strip), out),
                    WeightType::Bf16 => pack_panel(view, Dtype::Bf16, panel * NR, layout.strips(strip), out),
                    _ => pack_quantized(view, kind, panel * NR, layout.strips(strip), out),
                }
                if zero_words > 0 {
                    let first = num_panels * panel_bytes + panel * zero_words * WORD_BYTES;
                    // SAFETY: as of the panel.
                    zeros::pack_zeros(&view, panel * NR, unsafe { base.words(first, zero_words) });
                }
            });
        }
        Ok(Self { rows: view.rows, cols: view.cols, kind, strip, zero_words, panels })
    }

    /// Rows of the matrix, n: the features that a product writes.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of the matrix, k: the features that a product sums over.
    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// What it is kept in.
    pub(crate) fn kind(&self) -> WeightType {
        self.kind
    }

    /// Columns that lie side by side.
    pub(super) fn strip(&self) -> usize {
        self.strip
    }

    /// Memory it takes.
    pub(crate) fn bytes(&self) -> usize {
        self.panels.len()
    }

    /// A row's weights as f32, exactly but for the product of integer and scale; `out: [cols]`.
    pub(crate) fn copy_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.cols, "row {row} of {} in {}", out.len(), self.rows);
        let layout = self.layout();
        let panel = &self.panels.bytes()[row / NR * layout.bytes()..][..layout.bytes()];
        let word = |i: usize| u32::from_ne_bytes(panel.as_chunks().0[i]);
        let place = layout.strips(self.strip).column(row % NR);
        let numbers = (0..layout.numbers).map(|i| word(place.start + i * place.step));
        match self.kind {
            WeightType::F32 => {
                out.iter_mut().zip(numbers).for_each(|(out, word)| *out = f32::from_bits(word))
            }
            WeightType::Bf16 => out.chunks_mut(2).zip(numbers).for_each(|(out, word)| {
                out[0] = bf16_to_f32(word as u16);
                if let Some(odd) = out.get_mut(1) {
                    *odd = bf16_to_f32((word >> 16) as u16);
                }
            }),
            _ => {
                let numbers: Vec<u32> = numbers.collect();
                let scale = |i| f32::from_bits(word((layout.numbers + i) * NR + row % NR));
                let scales: Vec<f32> = (0..layout.scales).map(scale).collect();
                let panel = self.panel_zeros(row / NR);
                let zero = |group| panel.map_or(0.0, |panel| zeros::zero(panel, row % NR, group));
                quantized::copy_row(self.kind, &numbers, &scales, zero, out);
            }
        }
    }

    /// First byte of the first panel.
    pub(super) fn as_ptr(&self) -> *const u8 {
        self.panels.as_ptr()
    }

    /// All panels, one after the other.
    pub(super) fn panels(&self) -> &[u8] {
        &self.panels.bytes()[..packed_bytes(self.kind, self.rows, self.cols)]
    }

    /// Whether its integers have zeros of their own.
    pub(super) fn has_zeros(&self) -> bool {
        self.zero_words > 0
    }

    /// A panel's zeros, where its integers have some of their own.
    pub(super) fn panel_zeros(&self, panel: usize) -> Option<&[u32]> {
        let first = self.rows.div_ceil(NR) * self.layout().bytes() + panel * self.zero_words * WORD_BYTES;
        let bytes = || &self.panels.bytes()[first..][..self.zero_words * WORD_BYTES];
        self.has_zeros().then(|| bytemuck::cast_slice(bytes()))
    }

    /// How its panels are made.
    pub(super) fn layout(&self) -> PanelLayout {
        PanelLayout::new(self.kind, self.cols)
    }
}

/// The mapping's address, for the threads that fill it.
#[derive(Clone, Copy)]
struct Panels(*mut u8);

// SAFETY: the threads take disjoint panels of it, inside the borrow of `pack`.
unsafe impl Sync for Panels {}

impl Panels {
    /// So many words from a byte on.
    ///
    /// # Safety
    /// They lie inside of the mapping, and nobody else uses them.
    unsafe fn words<'a>(&self, first: usize, count: usize) -> &'a mut [u32] {
        // SAFETY: the caller's; the mapping and all that lies in it are aligned to words, any bits of which are valid.
        unsafe { std::slice::from_raw_parts_mut(self.0.wrapping_add(first).cast::<u32>(), count) }
    }
}

/// Bytes of a word.
const WORD_BYTES: usize = size_of::<u32>();

/// Fill one panel with the rows from `first_row` on; `out` is zero where nothing is written.
fn pack_panel(view: TensorView<'_>, dtype: Dtype, first_row: usize, strips: Strips, out: &mut [u32]) {
    use half::f16;
    match (view.dtype, dtype) {
        (ViewDtype::F32, Dtype::F32) => pack_f32(view, first_row, strips, out, f32::from_le_bytes),
        (ViewDtype::F16, Dtype::F32) => {
            pack_f32(view, first_row, strips, out, |b| f16::from_le_bytes(b).to_f32())
        }
        (ViewDtype::Bf16, Dtype::F32) => {
            pack_f32(view, first_row, strips, out, |b| bf16_to_f32(u16::from_le_bytes(b)))
        }
        (ViewDtype::F32, Dtype::Bf16) => {
            pack_bf16(view, first_row, strips, out, |b| bf16_bits(f32::from_le_bytes(b)))
        }
        (ViewDtype::F16, Dtype::Bf16) => {
            pack_bf16(view, first_row, strips, out, |b| bf16_bits(f16::from_le_bytes(b).to_f32()))
        }
        (ViewDtype::Bf16, Dtype::Bf16) => pack_bf16(view, first_row, strips, out, u16::from_le_bytes),
        (ViewDtype::Fp8 | ViewDtype::Int4, _) => unreachable!("narrow numbers are widened first"),
    }
}

/// The same of numbers that have scales.
fn pack_narrow(view: TensorView<'_>, dtype: Dtype, first_row: usize, strips: Strips, out: &mut [u32]) {
    let view = view.rows(first_row..view.rows.min(first_row + NR));
    let mut values = Vec::new();
    numbers::widen_into(&view, &mut values);
    let bytes = bytemuck::cast_slice(&values);
    pack_panel(TensorView::new(ViewDtype::F32, view.rows, view.cols, bytes), dtype, 0, strips, out);
}

/// Columns packed of one row before the next: 128 groups of 256 bytes, written once per row, stay in L1.
const BLOCK: usize = 128;

fn pack_f32<const B: usize>(
    view: TensorView<'_>,
    first_row: usize,
    strips: Strips,
    out: &mut [u32],
    read: impl Fn([u8; B]) -> f32,
) {
    for_each_strip(view, first_row, BLOCK, |column, first_col, bytes| {
        let place = strips.column(column);
        let words = out[place.start + first_col * place.step..].iter_mut().step_by(place.step);
        for (word, &bytes) in words.zip(bytes.as_chunks().0) {
            *word = read(bytes).to_bits();
        }
    });
}

fn pack_bf16<const B: usize>(
    view: TensorView<'_>,
    first_row: usize,
    strips: Strips,
    out: &mut [u32],
    read: impl Fn([u8; B]) -> u16,
) {
    for_each_strip(view, first_row, 2 * BLOCK, |column, first_col, bytes| {
        let place = strips.column(column);
        let words = out[place.start + first_col / 2 * place.step..].iter_mut().step_by(place.step);
        let (numbers, _) = bytes.as_chunks();
        for (word, pair) in words.zip(numbers.chunks(2)) {
            let odd = pair.get(1).map_or(0, |&bytes| read(bytes));
            *word = u32::from(read(pair[0])) | u32::from(odd) << 16;
        }
    });
}

/// Call `each(column of the panel, first column of the matrix, bytes)` for strips of `block` columns of the
/// panel's rows.
fn for_each_strip(
    view: TensorView<'_>,
    first_row: usize,
    block: usize,
    mut each: impl FnMut(usize, usize, &[u8]),
) {
    let width = view.dtype.bytes_of(1);
    let rows = first_row..view.rows.min(first_row + NR);
    for first_col in (0..view.cols).step_by(block) {
        let cols = block.min(view.cols - first_col);
        for row in rows.clone() {
            each(row - first_row, first_col, &view.row(row)[first_col * width..][..cols * width]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    /// One byte before the others: an allocation starts at an even address, so they start at an odd one.
    fn unaligned(bytes: impl Iterator<Item = u8>) -> Vec<u8> {
        std::iter::once(0).chain(bytes).collect()
    }

    #[test]
    fn every_row_comes_back_from_every_number_type() {
        let pool = ThreadPool::new(&[], 2);
        for (rows, cols) in [(1, 1), (3, 2), (64, 8), (65, 9), (130, 257), (7, 300)] {
            let values: Vec<f32> = (0..rows * cols).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
            let views = [
                (ViewDtype::F32, unaligned(values.iter().flat_map(|v| v.to_le_bytes()))),
                (ViewDtype::F16, unaligned(values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()))),
                (ViewDtype::Bf16, unaligned(values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()))),
            ];
            for (view_dtype, bytes) in &views {
                for (dtype, simd) in [Dtype::F32, Dtype::Bf16]
                    .into_iter()
                    .flat_map(|dtype| Simd::ALL.map(|simd| (dtype, simd)))
                {
                    let view = TensorView::new(*view_dtype, rows, cols, &bytes[1..]);
                    let packed = PackedMatrix::pack(simd, view, dtype.into(), &pool).unwrap();
                    assert_eq!((packed.rows(), packed.cols(), packed.kind()), (rows, cols, dtype.into()));
                    assert_eq!(packed.bytes(), packed_bytes(dtype.into(), rows, cols));
                    let mut found = vec![0.0; cols];
                    for row in 0..rows {
                        packed.copy_row(row, &mut found);
                        for (found, &value) in found.iter().zip(&values[row * cols..]) {
                            let read = match view_dtype {
                                ViewDtype::F32 => value,
                                ViewDtype::F16 => f16::from_f32(value).to_f32(),
                                _ => bf16::from_f32(value).to_f32(),
                            };
                            let expected = match dtype {
                                Dtype::F32 => read,
                                Dtype::Bf16 => bf16::from_f32(read).to_f32(),
                            };
                            assert_eq!(found.to_bits(), expected.to_bits());
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_view_of_the_wrong_length_is_refused() {
        let pool = ThreadPool::new(&[], 1);
        let view = TensorView::new(ViewDtype::F32, 2, 3, &[0; 23]);
        let packed = PackedMatrix::pack(Simd::Portable, view, WeightType::Bf16, &pool);
        assert!(matches!(packed, Err(Error::Shape { .. })));
    }
}
