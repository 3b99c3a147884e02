//! Numbers of a checkpoint's tensor, widened to f32: exact for all types but those with scales, whose products are rounded.

use half::{bf16, f16};

use crate::check;
use crate::error::Result;
use crate::tensor_view::{TensorView, ViewDtype};

/// All numbers of a view, row by row.
pub(crate) fn widen(op: &'static str, view: &TensorView<'_>) -> Result<Vec<f32>> {
    check::view(op, view)?;
    let mut values = Vec::new();
    widen_into(view, &mut values);
    Ok(values)
}

/// The same of a view that has been checked; `out` is cleared first.
pub(crate) fn widen_into(view: &TensorView<'_>, out: &mut Vec<f32>) {
    out.clear();
    if view.dtype.has_scales() {
        let row = |row| (0..view.cols).map(move |col| view.narrow(row, col));
        out.extend((0..view.rows).flat_map(row));
        return;
    }
    for bytes in (0..view.rows).map(|row| view.row(row)) {
        match view.dtype {
            ViewDtype::Fp8 | ViewDtype::Int4 => unreachable!("narrow numbers have gone another way"),
            ViewDtype::F32 => out.extend(bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b))),
            ViewDtype::F16 => out.extend(bytes.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f32())),
            ViewDtype::Bf16 => {
                out.extend(bytes.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_widens_exactly_at_any_alignment() {
        let values = [1.5f32, -0.0, 3.0e-5, f32::INFINITY];
        let mut f32s = vec![0u8];
        values.iter().for_each(|value| f32s.extend(value.to_le_bytes()));
        let view = TensorView::new(ViewDtype::F32, 1, 4, &f32s[1..]);
        assert_eq!(widen("op", &view).unwrap(), values);
        let halves: Vec<u8> = values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect();
        let view = TensorView::new(ViewDtype::F16, 2, 2, &halves);
        assert_eq!(widen("op", &view).unwrap(), values.map(|value| f16::from_f32(value).to_f32()));
        let brains: Vec<u8> = values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect();
        let view = TensorView::new(ViewDtype::Bf16, 4, 1, &brains);
        assert_eq!(widen("op", &view).unwrap(), values.map(|value| bf16::from_f32(value).to_f32()));
    }

    #[test]
    fn rows_and_columns_of_a_view_are_those_of_the_tensor() {
        let numbers: Vec<u8> = (0..20u8).flat_map(|i| f32::from(i).to_le_bytes()).collect();
        let view = TensorView::new(ViewDtype::F32, 4, 5, &numbers);
        let part = view.rows(1..3).columns(2..4);
        assert_eq!((part.rows, part.cols), (2, 2));
        assert_eq!(widen("op", &part).unwrap(), [7.0, 8.0, 12.0, 13.0]);
        assert_eq!(widen("op", &view.columns(4..5)).unwrap(), [4.0, 9.0, 14.0, 19.0]);
        assert_eq!(widen("op", &view.rows(3..4)).unwrap(), [15.0, 16.0, 17.0, 18.0, 19.0]);
        for empty in [view.rows(4..4), view.columns(5..5)] {
            assert!(widen("op", &empty).unwrap().is_empty());
        }
    }
}
