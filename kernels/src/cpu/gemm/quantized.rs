//! Panels of integers, quantised from a checkpoint's numbers.
//!
//! A word holds the terms of one column, lowest first:
//! * 8 bits: `[k / 4][NR][4]`, as `VPDPBUSD` takes them; then a scale for each column; for products in integers
//!   scales for every [`BLOCK`] of K, and then what each column's sums over it start from, see `integers`;
//! * 4 bits: `[k / 8][NR][2][4]`, the even k in the lower half of a word and the odd ones in the upper half, so
//!   that a table look-up makes pairs of bf16 of all columns at once; then a scale for each group of K and column. Zeros other
//!   than 8 of a checkpoint's integers lie elsewhere, see `zeros`.

use super::pack::{ColumnPlace, PanelLayout, Strips};
use super::tile::NR;
use crate::backend::{INT8_BLOCK, Int4Groups, WeightType};
use crate::error::{Error, Result};
use crate::quantize::Quantizer;
use crate::tensor_view::{TensorView, ViewDtype};
use crate::view;

/// Terms that share a scale, and whose products are summed in integers, exactly; the sums of blocks are added in f32.
///
/// 4,096 products of at most 255 · 128 are below 2²⁷, far from the end of i32; a block of weights is as much as
/// `plan` sweeps over at once.
pub(super) const BLOCK: usize = INT8_BLOCK;

/// Terms of 4 bits that share a scale.
pub(super) const GROUP: usize = Int4Groups::Of32.inputs();

/// What x's integers are stored above themselves, because `VPDPBUSD` takes them without a sign.
pub(super) const OFFSET: u8 = 128;

/// Blocks of K, at least one.
pub(super) fn num_blocks(cols: usize) -> usize {
    cols.div_ceil(BLOCK).max(1)
}

/// Groups of K, at least one.
pub(super) fn num_groups(cols: usize) -> usize {
    cols.div_ceil(GROUP).max(1)
}

/// Terms of a column that share a scale.
const fn terms_per_scale(kind: WeightType, cols: usize) -> usize {
    match kind {
        WeightType::Int4Weight => GROUP,
        WeightType::Int8 => BLOCK,
        _ if cols == 0 => 1,
        _ => cols,
    }
}

/// Integers of 4 bits of a checkpoint are kept as they are, so they must be such as are kept here.
///
/// # Errors
/// Groups that are no multiple of ours or begin elsewhere.
pub(super) fn check(view: &TensorView<'_>, kind: WeightType) -> Result<()> {
    let (ViewDtype::Int4, WeightType::Int4Weight, Some(scales)) = (view.dtype, kind, &view.scales) else {
        return Ok(());
    };
    let what = if scales.order.is_some() {
        "groups of inputs that do not lie side by side".to_owned()
    } else if scales.group < view.cols && !scales.group.is_multiple_of(GROUP) {
        format!("groups of {}", scales.group)
    } else if !scales.first[1].is_multiple_of(GROUP) {
        format!("columns from {} on", scales.first[1])
    } else {
        return Ok(());
    };
    Err(Error::Unsupported(format!(
        "weights of 4 bits: found {what}, expected groups of whole {GROUP} inputs\n\
         hint: [model] dtype = \"bf16\" or \"int8-weight\" takes them"
    )))
}

/// Integers and scales of a row as a checkpoint has them.
fn take_row(view: &TensorView<'_>, row: usize, integers: &mut [i8], mut put_scale: impl FnMut(usize, f32)) {
    let scales = view.scales.as_ref().expect("integers have scales");
    for (col, integer) in integers.iter_mut().enumerate() {
        *integer = view.nibble(row * view.stride + col).cast_signed() - 8;
        if col.is_multiple_of(GROUP) {
            put_scale(col / GROUP, scales.scale(row, col));
        }
    }
}

/// Fill one panel with the rows from `first_row` on; `out` is zero where nothing is written.
pub(super) fn pack_quantized(
    view: TensorView<'_>,
    kind: WeightType,
    first_row: usize,
    strips: Strips,
    out: &mut [u32],
) {
    let layout = PanelLayout::new(kind, view.cols);
    let (numbers, rest) = out.split_at_mut(layout.numbers * NR);
    let (scales, biases) = rest.split_at_mut(layout.scales * NR);
    let (mut values, mut integers) = (Vec::new(), vec![0i8; view.cols]);
    for row in first_row..view.rows.min(first_row + NR) {
        let column = row - first_row;
        if kind == WeightType::Int4Weight && view.dtype == ViewDtype::Int4 {
            take_row(&view, row, &mut integers, |group, scale| scales[group * NR + column] = scale.to_bits());
            put_words(kind, &integers, strips.column(column), numbers);
            continue;
        }
        view::widen_into(&view.rows(row..row + 1), &mut values);
        let per_scale = terms_per_scale(kind, view.cols);
        for (i, (values, integers)) in
            values.chunks(per_scale).zip(integers.chunks_mut(per_scale)).enumerate()
        {
            let quantizer = match kind {
                WeightType::Int4Weight => Quantizer::int4_of(values, Int4Groups::Of32),
                _ => Quantizer::int8_of(values),
            };
            scales[i * NR + column] = quantizer.scale.to_bits();
            integers
                .iter_mut()
                .zip(values)
                .for_each(|(integer, &value)| *integer = quantizer.quantize(value));
        }
        put_words(kind, &integers, strips.column(column), numbers);
        for (bias, block) in biases.chunks_mut(NR).zip(integers.chunks(BLOCK)) {
            let sum: i32 = block.iter().map(|&integer| i32::from(integer)).sum();
            bias[column] = (-i32::from(OFFSET) * sum).cast_unsigned();
        }
    }
}

/// Put a column's integers down in their words.
fn put_words(kind: WeightType, integers: &[i8], place: ColumnPlace, numbers: &mut [u32]) {
    let words = numbers.iter_mut().skip(place.start).step_by(place.step);
    if kind == WeightType::Int4Weight {
        for (word, integers) in words.zip(integers.chunks(8)) {
            *word = integers.iter().enumerate().fold(0, |word, (i, &integer)| {
                word | u32::from(integer.cast_unsigned() & 0xf) << nibble_shift(i)
            });
        }
    } else {
        for (word, integers) in words.zip(integers.chunks(4)) {
            let mut bytes = [0; 4];
            bytes.iter_mut().zip(integers).for_each(|(byte, &integer)| *byte = integer.cast_unsigned());
            *word = u32::from_le_bytes(bytes);
        }
    }
}

/// Where the `i`-th of a word's eight integers lies: even ones in the lower half.
const fn nibble_shift(i: usize) -> usize {
    i % 2 * 16 + i / 2 * 4
}

/// A column's numbers, integer times scale, from its words and scales, and what is taken off the integers of each group of 4 bits.
pub(super) fn copy_row(
    kind: WeightType,
    words: &[u32],
    scales: &[f32],
    zero: impl Fn(usize) -> f32,
    out: &mut [f32],
) {
    if kind == WeightType::Int4Weight {
        for (i, out) in out.iter_mut().enumerate() {
            let integer = (words[i / 8] << (28 - nibble_shift(i % 8))).cast_signed() >> 28;
            *out = (integer as f32 - zero(i / GROUP)) * scales[i / GROUP];
        }
    } else {
        let per_scale = terms_per_scale(kind, out.len());
        for (i, out) in out.iter_mut().enumerate() {
            let integer = words[i / 4].to_le_bytes()[i % 4].cast_signed();
            *out = f32::from(integer) * scales[i / per_scale];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::gemm::PackedMatrix;
    use crate::cpu::pool::ThreadPool;
    use crate::cpu::simd::Simd;

    const KINDS: [WeightType; 3] = [WeightType::Int8, WeightType::Int8Weight, WeightType::Int4Weight];

    fn packed(values: &[f32], rows: usize, cols: usize, kind: WeightType) -> PackedMatrix {
        let view = TensorView::new(ViewDtype::F32, rows, cols, bytemuck::cast_slice(values));
        PackedMatrix::pack(Simd::detect(), view, kind, &ThreadPool::new(&[], 2)).unwrap()
    }

    #[test]
    fn every_number_comes_back_within_a_step_of_its_scale() {
        for kind in KINDS {
            for (rows, cols) in [(1, 1), (3, 2), (64, 8), (65, 65), (130, 257), (2, 9000)] {
                let values: Vec<f32> = (0..rows * cols).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
                let packed = packed(&values, rows, cols, kind);
                let mut found = vec![0.0; cols];
                for row in 0..rows {
                    packed.copy_row(row, &mut found);
                    let values = &values[row * cols..][..cols];
                    // In 4 bits, 7 stands for 8 as well.
                    let (levels, most) = match kind {
                        WeightType::Int4Weight => (8.0, 1.001),
                        _ => (127.0, 0.501),
                    };
                    let per_scale = terms_per_scale(kind, cols);
                    for (found, values) in found.chunks(per_scale).zip(values.chunks(per_scale)) {
                        let step = values.iter().fold(0f32, |most, value| most.max(value.abs())) / levels;
                        let is_near = |(f, v): (&f32, &f32)| (f - v).abs() <= most * step;
                        assert!(found.iter().zip(values).all(is_near), "{kind:?} [{rows}, {cols}]");
                    }
                }
            }
        }
    }

    #[test]
    fn narrow_types_take_the_memory_of_their_bits() {
        let bits =
            |kind| packed(&vec![0.5; 256 * 2048], 256, 2048, kind).bytes() as f64 * 8.0 / (256.0 * 2048.0);
        assert!((8.0..8.1).contains(&bits(WeightType::Int8)));
        assert!((8.0..8.1).contains(&bits(WeightType::Int8Weight)));
        assert_eq!(bits(WeightType::Int4Weight), 5.0);
    }

    #[test]
    fn a_number_that_is_not_finite_spoils_its_own_scale_alone() {
        let mut values = vec![1.0; 3 * 200];
        values[200] = f32::NAN;
        for kind in KINDS {
            let packed = packed(&values, 3, 200, kind);
            let mut row = vec![0.0; 200];
            packed.copy_row(1, &mut row);
            assert!(row[..GROUP].iter().all(|value| value.is_nan()), "{kind:?}");
            assert_eq!(row[199].is_nan(), kind != WeightType::Int4Weight);
            packed.copy_row(2, &mut row);
            assert!(row.iter().all(|&value| (value - 1.0).abs() < 1e-6), "{kind:?}");
        }
    }
}
