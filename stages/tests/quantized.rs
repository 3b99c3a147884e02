//! Checkpoints that are quantised already: they answer as the same numbers do in f32.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use half::bf16;
use safetensors::Dtype as Stored;
use safetensors::tensor::TensorView;
use scheduler::{
    MicroBatch, MicroBatchId, Request, RequestKey, Sampling, SequenceId, Slice, SliceTokens, Span,
};
use serde_json::json;
use stages::{Device, Dtypes, KvDtype, Model, Narrow, Simd, SpanOptions, StageOutput, WeightType, load};

const HIDDEN: usize = 128;
const WIDTH: usize = 256;
const VOCAB: usize = 96;
const GROUP: usize = 64;

/// A tensor of a file to be.
type Tensor = (Stored, Vec<usize>, Vec<u8>);

/// A checkpoint twice: quantised, and as the f32 that it stands for.
#[derive(Default)]
struct Twins {
    quantised: BTreeMap<String, Tensor>,
    plain: BTreeMap<String, Tensor>,
    seed: u64,
}

/// How the blocks' matrices are quantised.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Int4,
    SkewInt4,
    /// In groups of columns that do not lie side by side.
    OrderedInt4,
    Fp8Rows,
    Fp8Tensor,
}

impl Twins {
    fn random(&mut self) -> u64 {
        self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.seed >> 33
    }

    fn add_plain(&mut self, name: &str, shape: &[usize], value: impl Fn(u64) -> f32) {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| value(self.random())).collect();
        let tensor =
            (Stored::F32, shape.to_vec(), values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>());
        self.quantised.insert(name.to_owned(), tensor.clone());
        self.plain.insert(name.to_owned(), tensor);
    }

    fn add(&mut self, kind: Kind, base: &str, rows: usize, cols: usize) {
        let part = |ending: &str| format!("{base}.{ending}");
        let mut values = vec![0.0f32; rows * cols];
        match kind {
            Kind::Int4 | Kind::SkewInt4 | Kind::OrderedInt4 => {
                let groups = cols / GROUP;
                let (mut words, mut zero_words) =
                    (vec![0u32; rows * cols / 8], vec![0u32; rows / 8 * groups]);
                let mut scales = Vec::new();
                for row in 0..rows {
                    for group in 0..groups {
                        let zero = if kind != Kind::SkewInt4 { 8 } else { self.random() as u32 % 16 };
                        let scale = bf16::from_f32((1 + self.random() % 7) as f32 / 512.0);
                        zero_words[row / 8 * groups + group] |= zero << (row % 8 * 4);
                        scales.push(scale);
                        for col in (0..cols).filter(|&col| group_of(kind, col, groups) == group) {
                            let number = self.random() as u32 % 16;
                            words[(row * cols + col) / 8] |= number << (col % 8 * 4);
                            values[row * cols + col] = (number as f32 - zero as f32) * scale.to_f32();
                        }
                    }
                }
                let bytes =
                    |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
                let scales: Vec<u8> = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
                let shape: Vec<u8> = [rows, cols].iter().flat_map(|&n| (n as i64).to_le_bytes()).collect();
                self.quantised
                    .insert(part("weight_packed"), (Stored::I32, vec![rows, cols / 8], bytes(&words)));
                self.quantised.insert(part("weight_scale"), (Stored::BF16, vec![rows, groups], scales));
                self.quantised.insert(part("weight_shape"), (Stored::I64, vec![2], shape));
                if kind == Kind::OrderedInt4 {
                    let order: Vec<u32> = (0..cols).map(|col| group_of(kind, col, groups) as u32).collect();
                    self.quantised.insert(part("weight_g_idx"), (Stored::I32, vec![cols], bytes(&order)));
                }
                if kind == Kind::SkewInt4 {
                    let zeros = (Stored::I32, vec![rows / 8, groups], bytes(&zero_words));
                    self.quantised.insert(part("weight_zero_point"), zeros);
                }
            }
            Kind::Fp8Rows | Kind::Fp8Tensor => {
                let count = if kind == Kind::Fp8Rows { rows } else { 1 };
                let scales: Vec<f32> = (0..count).map(|_| (1 + self.random() % 7) as f32 / 2048.0).collect();
                // Codes of whole numbers of eighths from 1 to 2, of either sign.
                let codes: Vec<u8> = (0..rows * cols)
                    .map(|_| 0x38 + (self.random() % 8) as u8 + (self.random() % 2) as u8 * 0x80)
                    .collect();
                for (place, value) in values.iter_mut().enumerate() {
                    let magnitude = 1.0 + f32::from(codes[place] & 7) / 8.0;
                    let scale = scales[if count == 1 { 0 } else { place / cols }];
                    *value = if codes[place] < 0x80 { magnitude } else { -magnitude } * scale;
                }
                let shape = if count == 1 { vec![] } else { vec![rows, 1] };
                let scales: Vec<u8> = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
                self.quantised.insert(part("weight"), (Stored::F8_E4M3, vec![rows, cols], codes));
                self.quantised.insert(part("weight_scale"), (Stored::F32, shape, scales));
                let unread = (Stored::F32, vec![], 1.0f32.to_le_bytes().to_vec());
                self.quantised.insert(part("input_scale"), unread);
            }
        }
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.plain.insert(part("weight"), (Stored::F32, vec![rows, cols], bytes));
    }

    /// A Llama of two blocks.
    fn of(kind: Kind) -> Twins {
        let mut twins = Twins { seed: 7, ..Twins::default() };
        let unit = |random: u64| (random % 2001) as f32 / 1000.0 - 1.0;
        twins.add_plain("model.embed_tokens.weight", &[VOCAB, HIDDEN], unit);
        twins.add_plain("lm_head.weight", &[VOCAB, HIDDEN], |random| unit(random) / 8.0);
        twins.add_plain("model.norm.weight", &[HIDDEN], |_| 1.0);
        for slot in 0..2 {
            let name = |part: &str| format!("model.layers.{slot}.{part}");
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                twins.add_plain(&name(&format!("{norm}.weight")), &[HIDDEN], |_| 1.0);
            }
            for (part, rows, cols) in [
                ("self_attn.q_proj", HIDDEN, HIDDEN),
                ("self_attn.k_proj", HIDDEN / 2, HIDDEN),
                ("self_attn.v_proj", HIDDEN / 2, HIDDEN),
                ("self_attn.o_proj", HIDDEN, HIDDEN),
                ("mlp.gate_proj", WIDTH, HIDDEN),
                ("mlp.up_proj", WIDTH, HIDDEN),
                ("mlp.down_proj", HIDDEN, WIDTH),
            ] {
                twins.add(kind, &name(part), rows, cols);
            }
        }
        twins
    }
}

/// The group of a column.
fn group_of(kind: Kind, col: usize, groups: usize) -> usize {
    if kind == Kind::OrderedInt4 { col * 5 % groups } else { col / GROUP }
}

fn config(kind: Kind) -> serde_json::Value {
    match kind {
        Kind::Int4 | Kind::SkewInt4 | Kind::OrderedInt4 => json!({
            "quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
                "num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP,
                "symmetric": kind != Kind::SkewInt4, "dynamic": false,
                "actorder": if kind == Kind::OrderedInt4 { "group" } else { "weight" }}}},
            "ignore": ["lm_head"], "kv_cache_scheme": null,
        }),
        Kind::Fp8Rows => json!({
            "quant_method": "compressed-tensors", "format": "float-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}},
        }),
        Kind::Fp8Tensor => json!({"quant_method": "modelopt", "quant_algo": "FP8"}),
    }
}

fn write(folder: &Path, tensors: &BTreeMap<String, Tensor>, quantization: serde_json::Value) {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": WIDTH, "num_hidden_layers": 2, "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 128, "hidden_act": "silu",
        "tie_word_embeddings": false, "quantization_config": quantization,
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let views = (tensors.iter())
        .map(|(name, (dtype, shape, bytes))| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}

/// Log-probabilities of the most likely tokens after each of some tokens.
fn run(folder: &Path, device: &Device, weights: WeightType) -> Vec<f32> {
    let (model, warnings) = Model::open(folder, false).unwrap();
    assert!(warnings.0.is_empty(), "{:?}", warnings.0);
    let dtypes =
        Dtypes { weights, kv: if weights == WeightType::F32 { KvDtype::F32 } else { KvDtype::Bf16 } };
    let part = Span { start: 0, end: model.config.blocks.len() }.into();
    let options = SpanOptions { part, num_pages: 2, context_tokens: 128, largest_step: None };
    let mut stage = load(&model, device, dtypes, options).unwrap();
    let sampling = Sampling { logprobs: Some(5), prompt_logprobs: true, ..Sampling::greedy(4) };
    let tokens: Vec<u32> = (0..20).map(|i| i * 37 % VOCAB as u32).collect();
    let slice = Slice {
        sequence: SequenceId(0),
        first_position: 0,
        tokens: tokens.iter().copied().collect::<SliceTokens>(),
        pages: Arc::new(vec![0]),
        sample: false,
        bars_stops: false,
        score: tokens,
        counts: None,
        mask: None,
        fed_back: None,
        request: Arc::new(Request {
            key: RequestKey(0),
            prompt: vec![0],
            sampling: Arc::new(sampling),
            sample: 0,
        }),
    };
    let batch = MicroBatch { id: MicroBatchId(0), slices: vec![slice] };
    let StageOutput::Tokens(output) = stage.step(&batch, None).unwrap() else {
        panic!("the stage is the last")
    };
    let scored = output.slices.iter().flat_map(|slice| &slice.prompt_logprobs);
    scored.flat_map(|scored| scored.top.iter().map(|(_, logprob)| *logprob)).collect()
}

fn twins(kind: Kind) -> [tempfile::TempDir; 2] {
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let twins = Twins::of(kind);
    write(folders[0].path(), &twins.quantised, config(kind));
    write(folders[1].path(), &twins.plain, serde_json::Value::Null);
    folders
}

#[test]
fn a_quantised_checkpoint_answers_as_the_numbers_that_it_stands_for() {
    let simd = Device::Cpu { cores: Vec::new(), threads: 1, simd: Simd::detect() };
    for kind in [Kind::Int4, Kind::SkewInt4, Kind::OrderedInt4, Kind::Fp8Rows, Kind::Fp8Tensor] {
        let [quantised, plain] = twins(kind);
        for device in [&simd, &Device::Reference] {
            for weights in [WeightType::F32, WeightType::Bf16, WeightType::Int8Weight] {
                let found = run(quantised.path(), device, weights);
                let expected = run(plain.path(), device, weights);
                assert_eq!(found.len(), 100);
                assert!(found == expected, "{device:?} {weights:?}");
            }
        }
    }
}

#[test]
fn a_model_says_what_its_checkpoint_is_stored_in() {
    let narrow = |kind: Kind| {
        let [quantised, plain] = twins(kind);
        let [narrow, wide] =
            [&quantised, &plain].map(|folder| Model::open(folder.path(), false).unwrap().0.narrow());
        assert_eq!(wide, None);
        narrow
    };
    assert_eq!([Kind::Int4, Kind::SkewInt4].map(narrow), [Some(Narrow::Int4); 2]);
    assert_eq!(narrow(Kind::OrderedInt4), Some(Narrow::OrderedInt4));
    assert_eq!([Kind::Fp8Rows, Kind::Fp8Tensor].map(narrow), [Some(Narrow::Fp8); 2]);
}

#[test]
fn integers_of_four_bits_are_kept_as_they_are() {
    let levels = Simd::ALL.into_iter().filter(|simd| simd.is_available());
    let simd = levels.map(|simd| Device::Cpu { cores: Vec::new(), threads: 1, simd });
    let devices: Vec<Device> = simd.chain([Device::Reference]).collect();
    for kind in [Kind::Int4, Kind::SkewInt4] {
        let [quantised, plain] = twins(kind);
        for device in &devices {
            let found = run(quantised.path(), device, WeightType::Int4Weight);
            let off =
                |expected: &[f32]| found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            // Inputs are rounded to bf16, weights are not: some hundredths. Quantised again they would be off by more.
            let kept = off(&run(plain.path(), device, WeightType::F32));
            let again = off(&run(plain.path(), device, WeightType::Int4Weight));
            assert!(
                kept < 0.03 && again > 2.0 * kept,
                "{device:?}: off by {kept}, quantised again by {again}"
            );
        }
    }
}

/// What was never set, and what says no more than that groups lie side by side.
#[test]
fn an_order_of_groups_that_says_nothing_changes_nothing() {
    let (plain, mut folders) = (Twins::of(Kind::Int4).quantised, Vec::new());
    for group in [|_: usize| -1, |col: usize| (col / GROUP) as i32] {
        let mut tensors = plain.clone();
        for name in plain.keys().filter_map(|name| name.strip_suffix("weight_packed")) {
            let cols = plain[&format!("{name}weight_packed")].1[1] * 8;
            let bytes = (0..cols).flat_map(|col| group(col).to_le_bytes()).collect();
            tensors.insert(format!("{name}weight_g_idx"), (Stored::I32, vec![cols], bytes));
        }
        folders.push(tempfile::tempdir().unwrap());
        write(folders.last().unwrap().path(), &tensors, config(Kind::Int4));
    }
    let expected = run(twins(Kind::Int4)[0].path(), &Device::Reference, WeightType::Int4Weight);
    let device = Device::Cpu { cores: Vec::new(), threads: 1, simd: Simd::Portable };
    let kept = run(twins(Kind::Int4)[0].path(), &device, WeightType::Int4Weight);
    for folder in &folders {
        assert_eq!(run(folder.path(), &Device::Reference, WeightType::Int4Weight), expected);
        assert_eq!(run(folder.path(), &device, WeightType::Int4Weight), kept);
    }
}

#[test]
fn what_is_wrong_with_quantised_tensors_is_said_by_name() {
    let problem = |kind: Kind, change: &dyn Fn(&mut BTreeMap<String, Tensor>)| {
        let folder = tempfile::tempdir().unwrap();
        let mut tensors = Twins::of(kind).quantised;
        change(&mut tensors);
        write(folder.path(), &tensors, config(kind));
        let error = Model::open(folder.path(), false).unwrap_err().to_string();
        error.split_once(": ").unwrap().1.to_owned()
    };
    let q = |ending: &str| format!("model.layers.0.self_attn.q_proj.{ending}");
    assert_eq!(
        problem(Kind::Int4, &|tensors| drop(tensors.remove(&q("weight_scale")))),
        "tensor model.layers.0.self_attn.q_proj.weight_scale is missing, which model.layers.0.self_attn.q_proj.weight is multiplied with"
    );
    assert_eq!(
        problem(Kind::Int4, &|tensors| tensors.get_mut(&q("weight_packed")).unwrap().1 = vec![64, 32]),
        "tensor model.layers.0.self_attn.q_proj.weight_packed has shape [64, 32], expected [128, 16]"
    );
    assert_eq!(
        problem(Kind::Int4, &|tensors| tensors.get_mut(&q("weight_scale")).unwrap().1 = vec![2, 128]),
        "tensor model.layers.0.self_attn.q_proj.weight_scale has shape [2, 128], expected [128, groups] for 128 columns in equal groups"
    );
    let order = |group: i32| {
        let bytes = [group; 128].iter().flat_map(|group| group.to_le_bytes()).collect();
        (Stored::I32, vec![128], bytes)
    };
    assert_eq!(
        problem(Kind::Int4, &|tensors| drop(tensors.insert(q("weight_g_idx"), order(2)))),
        "tensor model.layers.0.self_attn.q_proj.weight_g_idx has group 2, expected one below 2"
    );
    assert_eq!(
        problem(Kind::Fp8Rows, &|tensors| tensors.get_mut(&q("weight_scale")).unwrap().1 = vec![2, 64]),
        "tensor model.layers.0.self_attn.q_proj.weight_scale has shape [2, 64], expected one scale, or one for each of 128 rows"
    );
    assert_eq!(
        problem(Kind::Fp8Tensor, &|tensors| drop(tensors.remove(&q("weight")))),
        "tensor model.layers.0.self_attn.q_proj.weight is missing, expected shape [128, 128]"
    );
}

#[test]
fn a_checkpoint_says_whether_its_keys_and_values_are_meant_to_be_in_fp8() {
    let folder = tempfile::tempdir().unwrap();
    let asks = |kind: Kind, key: &str, value: serde_json::Value| {
        let mut quantization = config(kind);
        quantization[key] = value;
        write(folder.path(), &BTreeMap::new(), quantization);
        stages::ModelConfig::read(folder.path()).unwrap().asks_for_fp8_kv
    };
    let scheme = |num_bits: u32, kind: &str| json!({"num_bits": num_bits, "type": kind, "dynamic": false});
    assert!(asks(Kind::Fp8Rows, "kv_cache_scheme", scheme(8, "float")));
    assert!(asks(Kind::Fp8Tensor, "kv_cache_scheme", scheme(8, "float")));
    assert!(asks(Kind::Fp8Tensor, "kv_cache_quant_algo", json!("FP8")));
    assert!(!asks(Kind::Fp8Rows, "kv_cache_scheme", scheme(8, "int")));
    assert!(!asks(Kind::Fp8Rows, "kv_cache_scheme", scheme(4, "float")));
    assert!(!asks(Kind::Fp8Tensor, "kv_cache_quant_algo", json!(null)));
    assert!(!asks(Kind::Int4, "kv_cache_scheme", json!(null)));
}
