//! Numbers of a checkpoint's tensor, widened to f32 (exact for all its types).

use half::{bf16, f16};

use crate::backend::{TensorView, ViewDtype};
use crate::check;
use crate::error::Result;

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
    match view.dtype {
        ViewDtype::F32 => out.extend(view.bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b))),
        ViewDtype::F16 => {
            out.extend(view.bytes.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f32()))
        }
        ViewDtype::Bf16 => {
            out.extend(view.bytes.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32()));
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
        let view = TensorView { dtype: ViewDtype::F32, rows: 1, cols: 4, bytes: &f32s[1..] };
        assert_eq!(widen("op", &view).unwrap(), values);
        let halves: Vec<u8> = values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect();
        let view = TensorView { dtype: ViewDtype::F16, rows: 2, cols: 2, bytes: &halves };
        assert_eq!(widen("op", &view).unwrap(), values.map(|value| f16::from_f32(value).to_f32()));
        let brains: Vec<u8> = values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect();
        let view = TensorView { dtype: ViewDtype::Bf16, rows: 4, cols: 1, bytes: &brains };
        assert_eq!(widen("op", &view).unwrap(), values.map(|value| bf16::from_f32(value).to_f32()));
    }
}
