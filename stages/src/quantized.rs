//! Tensors that a checkpoint has quantised already: under which names they stand, and whether they are such as can be read.
//!
//! * compressed-tensors `pack-quantized` (what llm-compressor makes of AWQ and GPTQ): `X.weight_packed`, I32
//!   `[rows, cols / 8]`; `X.weight_scale` `[rows, groups]`; `X.weight_zero_point`, I32 `[rows / 8, groups]`, where integers are
//!   not around zero; `X.weight_g_idx`, I32 `[cols]`, each column's group, where GPTQ has put columns into groups by their
//!   activations (`actorder = "group"`), or all -1 where it has not; `X.weight_shape`.
//! * E4M3 of compressed-tensors `float-quantized` and of ModelOpt: `X.weight`, F8_E4M3 `[rows, cols]`; `X.weight_scale`, one
//!   or `[rows]`. Scales of inputs are not read: each row of inputs has its own when it is quantised.
//!
//! A matrix is taken for what its own tensors say, so that one may be plain where others are not.

use kernels::{Scales, TensorView, ViewDtype};
use safetensors::Dtype;

use crate::checkpoint::{Checkpoint, Tensor, view_dtype};

/// Endings of tensors that stand beside `X.weight`, or in its place, and are read with it or not needed.
const PARTS: [&str; 9] = [
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_g_idx",
    "weight_shape",
    "input_scale",
    "output_scale",
    "k_scale",
    "v_scale",
];

/// The name of the matrix that a tensor is a part of, `X.weight` of `X.weight_scale`.
pub(crate) fn whole_of(name: &str) -> Option<String> {
    let (base, part) = name.rsplit_once('.')?;
    PARTS.contains(&part).then(|| format!("{base}.weight"))
}

/// A tensor as a matrix, or as a single row where it has one dimension.
///
/// # Errors
/// What is missing, misshapen or not implemented of it, in words.
pub(crate) fn view<'a>(
    checkpoint: &'a Checkpoint,
    name: &str,
    shape: &[usize],
) -> Result<TensorView<'a>, String> {
    let part = |ending: &str| {
        let base = name.strip_suffix("weight")?;
        let name = format!("{base}{ending}");
        checkpoint.get(&name).map(|tensor| (name, tensor))
    };
    if let (&[rows, cols], Some((_, packed))) = (shape, part("weight_packed")) {
        let parts = Parts { checkpoint, name, part: &part };
        return parts.int4(packed, rows, cols);
    }
    let Some(tensor) = checkpoint.get(name) else {
        return Err(format!("tensor {name} is missing, expected shape {shape:?}"));
    };
    if tensor.shape != *shape {
        return Err(format!("tensor {name} has shape {:?}, expected {shape:?}", tensor.shape));
    }
    if let (&[rows, cols], Dtype::F8_E4M3) = (shape, tensor.dtype) {
        let parts = Parts { checkpoint, name, part: &part };
        return parts.fp8(tensor, rows, cols);
    }
    let Some(dtype) = view_dtype(tensor.dtype) else {
        let expected = if shape.len() == 2 { "BF16, F16, F32 or F8_E4M3" } else { "BF16, F16 or F32" };
        return Err(format!("tensor {name} is of type {:?}, expected {expected}", tensor.dtype));
    };
    let (rows, cols) = match *shape {
        [cols] => (1, cols),
        [rows, cols] => (rows, cols),
        _ => panic!("shape {shape:?} of {name} is the model's own"),
    };
    Ok(TensorView::new(dtype, rows, cols, checkpoint.bytes(tensor)))
}

/// Gives the memory of a tensor's bytes, and of its parts', back to the system.
pub(crate) fn release(checkpoint: &Checkpoint, name: &str) {
    let base = name.strip_suffix("weight").into_iter();
    let parts = base.flat_map(|base| PARTS.map(|part| format!("{base}{part}")));
    let tensors = std::iter::once(name.to_owned()).chain(parts).filter_map(|name| checkpoint.get(&name));
    tensors.for_each(|tensor| checkpoint.release(tensor));
}

/// The tensors of one matrix.
struct Parts<'a, 'b, F> {
    checkpoint: &'a Checkpoint,
    name: &'b str,
    part: &'b F,
}

impl<'a, F: Fn(&str) -> Option<(String, &'a Tensor)>> Parts<'a, '_, F> {
    fn int4(&self, packed: &Tensor, rows: usize, cols: usize) -> Result<TensorView<'a>, String> {
        let words = [rows, cols.div_ceil(8)];
        self.expect("weight_packed", packed, Dtype::I32, &words)?;
        let (scale_name, scale) = self.needed("weight_scale")?;
        let scale_dtype = self.scale_dtype(&scale_name, scale)?;
        let groups = match scale.shape[..] {
            [found, groups] if found == rows && groups > 0 && cols.is_multiple_of(groups) => groups,
            _ => {
                return Err(format!(
                    "tensor {scale_name} has shape {:?}, expected [{rows}, groups] for {cols} columns in equal groups",
                    scale.shape
                ));
            }
        };
        let zeros = (self.part)("weight_zero_point");
        if let Some((_, zeros)) = &zeros {
            self.expect("weight_zero_point", zeros, Dtype::I32, &[rows.div_ceil(8), groups])?;
        }
        let scales = Scales {
            dtype: scale_dtype,
            bytes: self.checkpoint.bytes(scale),
            stride: groups,
            group: cols / groups,
            order: self.order(cols, groups)?,
            zeros: zeros.map(|(_, zeros)| self.checkpoint.bytes(zeros)),
            first: [0, 0],
        };
        Ok(TensorView::scaled(ViewDtype::Int4, rows, cols, self.checkpoint.bytes(packed), scales))
    }

    /// The group of each column, where they are not those that lie side by side.
    fn order(&self, cols: usize, groups: usize) -> Result<Option<&'a [u8]>, String> {
        let Some((name, tensor)) = (self.part)("weight_g_idx") else { return Ok(None) };
        self.expect("weight_g_idx", tensor, Dtype::I32, &[cols])?;
        let bytes = self.checkpoint.bytes(tensor);
        let order = || bytes.as_chunks::<4>().0.iter().map(|&group| i32::from_le_bytes(group));
        // As compressed-tensors takes it: one that was never set says nothing.
        let is_unset = order().any(|group| group == -1);
        if is_unset || order().enumerate().all(|(col, group)| group as usize == col / (cols / groups)) {
            return Ok(None);
        }
        match order().find(|&group| group < 0 || group as usize >= groups) {
            Some(group) => Err(format!("tensor {name} has group {group}, expected one below {groups}")),
            None => Ok(Some(bytes)),
        }
    }

    fn fp8(&self, tensor: &Tensor, rows: usize, cols: usize) -> Result<TensorView<'a>, String> {
        if let Some((name, _)) = (self.part)("weight_scale_inv") {
            return Err(format!(
                "tensor {name} has a scale for each block of a matrix, which is not implemented"
            ));
        }
        let (scale_name, scale) = self.needed("weight_scale")?;
        let stride = match scale.shape[..] {
            [] | [1] | [1, 1] => 0,
            [found] | [found, 1] if found == rows => 1,
            _ => {
                return Err(format!(
                    "tensor {scale_name} has shape {:?}, expected one scale, or one for each of {rows} rows",
                    scale.shape
                ));
            }
        };
        let scales = Scales {
            dtype: self.scale_dtype(&scale_name, scale)?,
            bytes: self.checkpoint.bytes(scale),
            stride,
            group: cols,
            order: None,
            zeros: None,
            first: [0, 0],
        };
        Ok(TensorView::scaled(ViewDtype::Fp8, rows, cols, self.checkpoint.bytes(tensor), scales))
    }

    fn needed(&self, ending: &str) -> Result<(String, &'a Tensor), String> {
        (self.part)(ending).ok_or_else(|| {
            let base = self.name.strip_suffix("weight").unwrap_or(self.name);
            format!("tensor {base}{ending} is missing, which {} is multiplied with", self.name)
        })
    }

    fn scale_dtype(&self, name: &str, scale: &Tensor) -> Result<ViewDtype, String> {
        view_dtype(scale.dtype)
            .ok_or_else(|| format!("tensor {name} is of type {:?}, expected BF16, F16 or F32", scale.dtype))
    }

    fn expect(&self, ending: &str, tensor: &Tensor, dtype: Dtype, shape: &[usize]) -> Result<(), String> {
        let base = self.name.strip_suffix("weight").unwrap_or(self.name);
        if tensor.dtype != dtype {
            return Err(format!("tensor {base}{ending} is of type {:?}, expected {dtype:?}", tensor.dtype));
        }
        if tensor.shape != *shape {
            return Err(format!("tensor {base}{ending} has shape {:?}, expected {shape:?}", tensor.shape));
        }
        Ok(())
    }
}
