//! Checkpoints that others have quantised, from one end to the other.

use std::path::Path;

use half::bf16;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::json;

use crate::harness::{Done, Job, fixture, levels, read_json};
use crate::logits::BF16_BOUND;

/// Inputs that share a scale and a zero, as AWQ's have them.
const GROUP: usize = 128;

/// A tensor of a file to be.
type Tensor = (String, Dtype, Vec<usize>, Vec<u8>);

/// A model's folder twice: quantised as AWQ does, with zeros of their own, and with the numbers that those stand for.
fn twins(model: &str) -> [tempfile::TempDir; 2] {
    let (from, folders) = (fixture(model), [(); 2].map(|()| tempfile::tempdir().unwrap()));
    let bytes = std::fs::read(from.join("model.safetensors")).unwrap();
    let (mut quantised, mut plain) = (Vec::<Tensor>::new(), Vec::<Tensor>::new());
    for (name, view) in SafeTensors::deserialize(&bytes).unwrap().iter() {
        let is_matrix = name.starts_with("model.layers.") && view.shape().len() == 2;
        match name.strip_suffix(".weight").filter(|_| is_matrix) {
            Some(base) => {
                let (tensors, values) = awq(base, view.shape(), &numbers(view.data()));
                quantised.extend(tensors);
                let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                plain.push((name.to_owned(), Dtype::F32, view.shape().to_vec(), bytes));
            }
            None => {
                let tensor = (name.to_owned(), view.dtype(), view.shape().to_vec(), view.data().to_vec());
                quantised.push(tensor.clone());
                plain.push(tensor);
            }
        }
    }
    let config = read_json(&from.join("config.json"));
    let mut with_groups = config.clone();
    with_groups["quantization_config"] = json!({
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
            "num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": false, "dynamic": false}}},
    });
    for (folder, tensors, config) in [(&folders[0], quantised, with_groups), (&folders[1], plain, config)] {
        for file in ["generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
            std::fs::copy(from.join(file), folder.path().join(file)).unwrap();
        }
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        write(folder.path(), &tensors);
    }
    folders
}

fn write(folder: &Path, tensors: &[Tensor]) {
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}

/// Numbers in bf16.
fn numbers(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|&number| bf16::from_le_bytes(number).to_f32()).collect()
}

/// The tensors of a matrix, each group of whose inputs reaches from 0 to 15 from its least number to its largest, and the numbers that it
/// stands for then.
fn awq(base: &str, shape: &[usize], values: &[f32]) -> (Vec<Tensor>, Vec<f32>) {
    let [rows, cols] = shape.try_into().unwrap();
    let groups = cols / GROUP;
    assert!(cols.is_multiple_of(GROUP) && rows.is_multiple_of(8), "{base} is [{rows}, {cols}]");
    let (mut words, mut zero_words) = (vec![0u32; rows * cols / 8], vec![0u32; rows / 8 * groups]);
    let (mut scales, mut found) = (Vec::new(), Vec::new());
    for (at, group) in values.chunks(GROUP).enumerate() {
        let (row, col) = (at / groups, at % groups);
        let least = group.iter().copied().fold(0.0, f32::min);
        let most = group.iter().copied().fold(0.0, f32::max);
        let scale = bf16::from_f32((most - least) / 15.0);
        let zero = (-least / scale.to_f32()).round().clamp(0.0, 15.0);
        zero_words[row / 8 * groups + col] |= (zero as u32) << (row % 8 * 4);
        scales.extend(scale.to_le_bytes());
        for (i, value) in group.iter().enumerate() {
            let integer = (value / scale.to_f32() + zero).round().clamp(0.0, 15.0);
            words[(at * GROUP + i) / 8] |= (integer as u32) << (i % 8 * 4);
            found.push((integer - zero) * scale.to_f32());
        }
    }
    let bytes = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let size: Vec<u8> = shape.iter().flat_map(|&count| (count as i64).to_le_bytes()).collect();
    let tensors = [
        ("weight_packed", Dtype::I32, vec![rows, cols / 8], bytes(&words)),
        ("weight_scale", Dtype::BF16, vec![rows, groups], scales),
        ("weight_zero_point", Dtype::I32, vec![rows / 8, groups], bytes(&zero_words)),
        ("weight_shape", Dtype::I64, vec![2], size),
    ];
    let named = |(ending, dtype, shape, bytes)| (format!("{base}.{ending}"), dtype, shape, bytes);
    (tensors.map(named).into(), found)
}

fn job(model: &Path, dtype: &str, level: &str) -> Job {
    let prompt: Vec<usize> = (0..60).map(|k| 5 + (k * 37) % 700).collect();
    let scored = json!({"prompt": prompt, "max_tokens": 0, "echo": true, "logprobs": 1});
    let likeliest = json!({"prompt": prompt[..7], "max_tokens": 12, "temperature": 0, "ignore_eos": true});
    Job::on_model(model)
        .completion("scored", scored)
        .completion("likeliest", likeliest)
        .set(format!("model.dtype={dtype}"))
        .set(format!("pipeline.simd={level}"))
}

fn logprobs(done: &Done) -> Vec<f64> {
    let logprobs = &done.choice("scored")["logprobs"]["token_logprobs"];
    logprobs.as_array().unwrap()[1..].iter().map(|logprob| logprob.as_f64().unwrap()).collect()
}

/// What it is turned back to, and what is kept of it: the integers of 4 bits, so that nothing is rounded but inputs.
#[test]
fn an_awq_checkpoint_answers_as_the_numbers_that_it_stands_for() {
    let [awq, plain] = twins("hetero-0-bf16");
    let expected = job(plain.path(), "f32", "auto").run().ok();
    let widened = job(awq.path(), "f32", "auto").run().ok();
    for row in ["scored", "likeliest"] {
        assert_eq!(widened.choice(row), expected.choice(row));
    }
    assert!(widened.stderr.contains("\"int4-weight\" keeps them as they are"), "{}", widened.stderr);
    let expected = logprobs(&expected);
    assert_eq!(expected.len(), 59);
    for level in levels() {
        let found = logprobs(&job(awq.path(), "int4-weight", level).run().ok());
        let off = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(off <= BF16_BOUND, "{level}: off by {off:.2e}");
    }
    let again = logprobs(&job(plain.path(), "int4-weight", "auto").run().ok());
    let off = again.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(off > BF16_BOUND, "numbers that are quantised again are off by {off:.2e}");
}
