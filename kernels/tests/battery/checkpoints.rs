//! Matrices that a checkpoint has quantised already.

use half::{bf16, f16};
use kernels::{RandomTensor, Scales, TensorView, ViewDtype, WeightType};

use crate::battery::device::{
    Check, Device, Readable, bits, every_weight_device, reference_with_long_groups,
};
use crate::battery::exact::{assert_within, dot};
use crate::battery::random::Random;

/// `[rows, in, out]`: groups of 128 that are whole, that are not, and one for all.
const SHAPES: [[usize; 3]; 4] = [[1, 128, 16], [3, 200, 19], [20, 513, 40], [70, 64, 130]];

/// A quantised matrix of a checkpoint.
struct Stored {
    dtype: ViewDtype,
    rows: usize,
    cols: usize,
    bytes: Vec<u8>,
    scale_dtype: ViewDtype,
    scales: Vec<u8>,
    scales_stride: usize,
    group: usize,
    order: Option<Vec<u8>>,
    zeros: Option<Vec<u8>>,
    /// What it stands for.
    values: Vec<f32>,
}

impl Stored {
    /// Integers of 4 bits as `pack-quantized` has them; with zeros of their own where `is_skew`.
    fn int4(
        random: &mut Random,
        [rows, cols]: [usize; 2],
        group: usize,
        scale_dtype: ViewDtype,
        is_skew: bool,
    ) -> Stored {
        let groups = cols.div_ceil(group);
        let (words_in_row, zero_rows) = (cols.div_ceil(8), rows.div_ceil(8));
        let (mut words, mut zero_words) = (vec![0u32; rows * words_in_row], vec![0u32; zero_rows * groups]);
        let scales: Vec<f32> =
            random.values(rows * groups).into_iter().map(|value| short(scale_dtype, value / 64.0)).collect();
        let zeros: Vec<usize> =
            (0..rows * groups).map(|_| if is_skew { random.below(16) } else { 8 }).collect();
        let mut values = Vec::new();
        for row in 0..rows {
            for col in 0..cols {
                let (number, place) = (random.below(16), row * groups + col / group);
                words[row * words_in_row + col / 8] |= (number as u32) << (col % 8 * 4);
                values.push((number as f32 - zeros[place] as f32) * scales[place]);
            }
            for (at, &zero) in zeros[row * groups..][..groups].iter().enumerate() {
                zero_words[row / 8 * groups + at] |= (zero as u32) << (row % 8 * 4);
            }
        }
        let bytes = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
        Stored {
            dtype: ViewDtype::Int4,
            rows,
            cols,
            bytes: bytes(&words),
            scale_dtype,
            scales: scale_bytes(scale_dtype, &scales),
            scales_stride: groups,
            group,
            order: None,
            zeros: is_skew.then(|| bytes(&zero_words)),
            values,
        }
    }

    /// E4M3 with a scale for each output, or one for all.
    fn fp8(random: &mut Random, [rows, cols]: [usize; 2], has_one_scale: bool) -> Stored {
        let count = if has_one_scale { 1 } else { rows };
        let scales: Vec<f32> = random.values(count).into_iter().map(|value| value / 256.0).collect();
        // All codes but those of NaN.
        let bytes: Vec<u8> = (0..rows * cols)
            .map(|_| {
                let code = random.below(254) as u8;
                if code < 0x7f { code } else { code + 1 }
            })
            .collect();
        let scale = |place: usize| scales[if has_one_scale { 0 } else { place / cols }];
        let values = bytes.iter().enumerate().map(|(place, &code)| number(code) * scale(place)).collect();
        Stored {
            dtype: ViewDtype::Fp8,
            rows,
            cols,
            bytes,
            scale_dtype: ViewDtype::F32,
            scales: scale_bytes(ViewDtype::F32, &scales),
            scales_stride: usize::from(!has_one_scale),
            group: cols,
            order: None,
            zeros: None,
            values,
        }
    }

    /// The same integers with columns in groups in another order, as GPTQ puts them by their activations.
    fn in_order(mut self, random: &mut Random, groups: usize) -> Stored {
        let order: Vec<u32> = (0..self.cols).map(|_| random.below(groups) as u32).collect();
        self.order = Some(order.iter().flat_map(|group| group.to_le_bytes()).collect());
        let view = self.view();
        let scales: Vec<f32> =
            self.scales.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
        let number = |row: usize, col: usize| {
            let word = &view.row(row)[col / 8 * 4..][..4];
            let number = u32::from_le_bytes(word.try_into().unwrap()) >> (col % 8 * 4) & 15;
            (number as f32 - 8.0) * scales[row * groups + order[col] as usize]
        };
        self.values = (0..self.rows)
            .flat_map(|row| (0..self.cols).map(move |col| (row, col)))
            .map(|(row, col)| number(row, col))
            .collect();
        self
    }

    fn view(&self) -> TensorView<'_> {
        let scales = Scales {
            dtype: self.scale_dtype,
            bytes: &self.scales,
            stride: self.scales_stride,
            group: self.group,
            order: self.order.as_deref(),
            zeros: self.zeros.as_deref(),
            first: [0, 0],
        };
        TensorView::scaled(self.dtype, self.rows, self.cols, &self.bytes, scales)
    }
}

/// E4M3 by its definition.
fn number(code: u8) -> f32 {
    let (exponent, fraction) = (i32::from(code >> 3 & 15), f32::from(code & 7) / 8.0);
    let magnitude = match exponent {
        0 => fraction * (-6f32).exp2(),
        _ => (1.0 + fraction) * ((exponent - 7) as f32).exp2(),
    };
    if code < 0x80 { magnitude } else { -magnitude }
}

fn short(dtype: ViewDtype, value: f32) -> f32 {
    match dtype {
        ViewDtype::F16 => f16::from_f32(value).to_f32(),
        ViewDtype::Bf16 => bf16::from_f32(value).to_f32(),
        _ => value,
    }
}

fn scale_bytes(dtype: ViewDtype, scales: &[f32]) -> Vec<u8> {
    let bytes = |scale: &f32| match dtype {
        ViewDtype::F16 => f16::from_f32(*scale).to_le_bytes().to_vec(),
        ViewDtype::Bf16 => bf16::from_f32(*scale).to_le_bytes().to_vec(),
        _ => scale.to_le_bytes().to_vec(),
    };
    scales.iter().flat_map(bytes).collect()
}

fn check_stored<B: Readable>(device: &Device<B>, random: &mut Random, rows: usize, stored: &Stored) {
    let (x, x_values) = device.operand(&random.values(rows * stored.cols), stored.cols);
    let x_values = device.multiplied(&x_values, stored.cols);
    // What the device keeps is exact; all else is quantised as any numbers are.
    let is_kept = matches!(
        (stored.dtype, device.weights),
        (ViewDtype::Int4, WeightType::Int4Weight) | (ViewDtype::Fp8, WeightType::Fp8)
    );
    let w: Vec<f64> = match is_kept {
        true => stored.values.iter().map(|&value| f64::from(value)).collect(),
        false => device.kept(&stored.values, stored.cols),
    };
    let mut out = device.backend.array();
    device.backend.matmul(&x, &device.backend.matrix(stored.view()).unwrap(), &mut out).unwrap();
    let rows = x_values.chunks_exact(stored.cols);
    let expected: Vec<_> = rows.flat_map(|x| w.chunks_exact(stored.cols).map(move |w| dot(x, w))).collect();
    let what = format!("{} {:?} [{}, {}]", device.name(), stored.dtype, stored.rows, stored.cols);
    assert_within(&what, &device.values(&out), &expected);
}

/// Integers around zero, and numbers of 8 bits.
pub(crate) struct Quantized;

impl Check for Quantized {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let mut random = Random::new(11);
        for [rows, inputs, outputs] in SHAPES {
            for dtype in [ViewDtype::Bf16, ViewDtype::F16] {
                for group in [128, 256, inputs.next_multiple_of(128)] {
                    let stored = Stored::int4(&mut random, [outputs, inputs], group, dtype, false);
                    check_stored(device, &mut random, rows, &stored);
                }
            }
            for has_one_scale in [false, true] {
                let stored = Stored::fp8(&mut random, [outputs, inputs], has_one_scale);
                check_stored(device, &mut random, rows, &stored);
            }
        }
    }
}

/// Integers with zeros of their own.
pub(crate) struct Skew;

impl Check for Skew {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let mut random = Random::new(12);
        for [rows, inputs, outputs] in SHAPES {
            for group in [128, inputs.next_multiple_of(128)] {
                let stored = Stored::int4(&mut random, [outputs, inputs], group, ViewDtype::Bf16, true);
                check_stored(device, &mut random, rows, &stored);
            }
        }
    }
}

/// Columns that are in groups in another order: read where weights are of another type, and refused where groups are kept, but by the
/// plain loops.
pub(crate) struct Ordered;

impl Check for Ordered {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let mut random = Random::new(16);
        for [rows, inputs, outputs] in SHAPES {
            let stored = Stored::int4(&mut random, [outputs, inputs], 128, ViewDtype::F32, false)
                .in_order(&mut random, inputs.div_ceil(128));
            if device.weights != WeightType::Int4Weight || device.name().starts_with("reference") {
                check_stored(device, &mut random, rows, &stored);
                continue;
            }
            let error = device.backend.matrix(stored.view()).err().unwrap().to_string();
            assert!(
                error.starts_with(
                    "weights of 4 bits: found groups of inputs that do not lie side by side, expected"
                ),
                "{error}"
            );
        }
    }
}

#[test]
fn what_a_checkpoint_has_quantised_is_multiplied_as_it_is() {
    every_weight_device(&Ordered);
    every_weight_device(&Quantized);
    every_weight_device(&Skew);
    Quantized.check(&reference_with_long_groups());
    Skew.check(&reference_with_long_groups());
}

struct Refused;

impl Check for Refused {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let is_cpu = device.name().starts_with("cpu");
        if device.weights != WeightType::Int4Weight || !is_cpu {
            return;
        }
        let mut random = Random::new(13);
        let refusal = |stored: &Stored| device.backend.matrix(stored.view()).err().unwrap().to_string();
        for has_zeros in [false, true] {
            let short = Stored::int4(&mut random, [5, 256], 16, ViewDtype::Bf16, has_zeros);
            let error = refusal(&short);
            assert!(
                error.starts_with("weights of 4 bits: found groups of 16, expected groups of whole 32"),
                "{error}"
            );
        }
    }
}

#[test]
fn integers_that_a_processor_cannot_keep_are_refused() {
    every_weight_device(&Refused);
}

/// On a GPU groups are of 128.
pub(crate) fn refuses_short_groups<B: Readable>(device: &Device<B>) {
    let mut random = Random::new(14);
    let refusal = |stored: &Stored| device.backend.matrix(stored.view()).err().unwrap().to_string();
    let short = Stored::int4(&mut random, [5, 256], 32, ViewDtype::Bf16, false);
    let error = refusal(&short);
    assert!(
        error.starts_with("weights of 4 bits: found groups of 32, expected groups of whole 128"),
        "{error}"
    );
    let wide = Stored::int4(&mut random, [5, 256], 128, ViewDtype::F32, false);
    let error = refusal(&wide);
    assert!(error.starts_with("weights of 4 bits: found scales in f32, expected bf16 or f16"), "{error}");
}

/// Matrices that are made from a seed have the numbers that a host makes, in every type.
pub(crate) struct Seeded;

impl Check for Seeded {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let backend = &device.backend;
        let (mut found, mut expected) = (backend.array(), backend.array());
        let whole = RandomTensor::new(0xfeed_beef_0123_4567, 0.25, 150, 300);
        for part in [whole, whole.part(7..80, 64..277), whole.part(0..1, 0..1)] {
            let values = part.values();
            let view = TensorView::new(ViewDtype::Bf16, part.rows, part.cols, bytemuck::cast_slice(&values));
            let mut random = Random::new(15);
            let (x, _) = device.operand(&random.values(5 * part.cols), part.cols);
            backend.matmul(&x, &backend.random_matrix(part).unwrap(), &mut found).unwrap();
            backend.matmul(&x, &backend.matrix(view).unwrap(), &mut expected).unwrap();
            assert_eq!(bits(&device.values(&found)), bits(&device.values(&expected)), "{}", device.name());
            let tokens = [part.rows as u32 - 1, 0];
            backend.embed(&backend.random_table(part).unwrap(), &tokens, &mut found).unwrap();
            backend.embed(&backend.table(view).unwrap(), &tokens, &mut expected).unwrap();
            assert_eq!(bits(&device.values(&found)), bits(&device.values(&expected)), "{}", device.name());
        }
    }
}

#[test]
fn random_matrices_are_the_host_s() {
    every_weight_device(&Seeded);
}
