//! A rank reads its shard of the tensors and nothing else: with every page taken away that has no byte of it, ranks load all
//! the same, and give the same log-probabilities. So they do of checkpoints that are quantised already, scales and all, and where
//! weights become narrow as they are loaded.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use half::bf16;
use kernels::{KvDtype, Simd, WeightType, thread_ranks};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use scheduler::{
    MicroBatch, MicroBatchId, Request, RequestKey, Sampling, SequenceId, Slice, SliceTokens, Span,
};
use serde_json::{Value, json};

use super::SpanOptions;
use crate::block::{Attention, Ffn};
use crate::checkpoint::Tensor;
use crate::model::Model;
use crate::part::Part;
use crate::quantized;
use crate::ranks::{CollectiveClock, RankGroup, RankStep};
use crate::shard::{AttentionShard, FfnShard, RankPlace};
use crate::sharing::{AttentionSharing, BlockSharing, FfnSharing, Sharing};
use crate::stage::{Device, Dtypes, StageOutput, load, load_first_rank, load_follower};
use crate::tensors::{self, model_tensors, slot_tensor};
use crate::weights::Weights;

/// So wide that a rank's columns of a row of a down matrix are several pages.
const WIDTH: usize = 24_000;
/// As many as there are heads of queries: each rank's columns of a row of an output projection are some pages, too.
const HEADS: usize = 96;
const HEAD_DIM: usize = 128;
const HIDDEN: usize = 256;
/// Where weights are narrow, which takes its time.
const LITTLE_HIDDEN: usize = 64;
const CONTEXT: usize = 64;
/// Columns that share a scale where a checkpoint has 4 bits.
const GROUP: usize = 64;

/// What a checkpoint has the matrices of its blocks in.
#[derive(Debug, Clone, Copy)]
enum Stored {
    Bf16,
    /// Scales for each row's groups.
    Int4,
    /// A scale for each row.
    Fp8,
}

/// A tensor of a file.
struct StoredTensor {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl StoredTensor {
    fn new(name: &str, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) -> Self {
        StoredTensor { name: name.to_owned(), dtype, shape: shape.to_vec(), bytes }
    }
}

impl Stored {
    /// The tensors of a random one in bf16. Narrow numbers are the low bits of its own, with scales by which products keep their
    /// size: 4 bits have a deviation of 4.6, and codes of fp8 below 2 one of 0.6.
    fn tensors(self, name: &str, shape: &[usize], bytes: Vec<u8>) -> Vec<StoredTensor> {
        let of_block = name.strip_suffix(".weight").filter(|_| name.contains(".layers."));
        let (Some(base), [rows, cols]) = (of_block, shape) else {
            return vec![StoredTensor::new(name, Dtype::BF16, shape, bytes)];
        };
        let name = |ending: &str| format!("{base}.{ending}");
        let scales = |per_row: usize, deviation: f32| {
            let scale = bf16::from_f32(1.0 / (deviation * (*cols as f32).sqrt()));
            let scales = scale.to_le_bytes().repeat(rows * per_row);
            StoredTensor::new(&name("weight_scale"), Dtype::BF16, &[*rows, per_row], scales)
        };
        match self {
            Stored::Bf16 => vec![StoredTensor::new(&name("weight"), Dtype::BF16, shape, bytes)],
            Stored::Int4 => {
                let packed = bytes.chunks(4).map(|two| (two[0] & 15) | (two[2] << 4)).collect();
                let packed =
                    StoredTensor::new(&name("weight_packed"), Dtype::I32, &[*rows, cols / 8], packed);
                vec![packed, scales(cols / GROUP, 4.6)]
            }
            Stored::Fp8 => {
                let codes = bytes.chunks(2).map(|one| one[0] & 0xBF).collect();
                vec![StoredTensor::new(&name("weight"), Dtype::F8_E4M3, shape, codes), scales(1, 0.6)]
            }
        }
    }

    /// How much of what a rank must not read is whole pages, at least: a rank of four has 3 KB of a row of 4 bits.
    fn least_percent(self) -> usize {
        match self {
            Stored::Bf16 | Stored::Fp8 => 70,
            Stored::Int4 => 60,
        }
    }
}

fn write_model(folder: &Path, stored: Stored, hidden: usize) {
    let attention = |group: Option<usize>, linear: bool| json!({"n_heads_in_group": group, "no_op": group.is_none() && !linear, "replace_with_linear": linear});
    let ffn = |width: Option<usize>| match width {
        Some(width) => json!({"intermediate_size": width, "no_op": false, "replace_with_linear": false}),
        None => json!({"no_op": false, "replace_with_linear": true}),
    };
    let blocks = [
        (attention(Some(8), false), ffn(Some(WIDTH))),
        (attention(None, true), ffn(None)),
        // Fewer KV heads than ranks.
        (attention(Some(48), false), ffn(Some(WIDTH))),
    ];
    let blocks: Vec<Value> =
        blocks.into_iter().map(|(attention, ffn)| json!({"attention": attention, "ffn": ffn})).collect();
    let config = json!({
        "architectures": ["DeciLMForCausalLM"], "model_type": "nemotron-nas", "hidden_act": "silu",
        "hidden_size": hidden, "num_attention_heads": HEADS, "head_dim": HEAD_DIM, "num_hidden_layers": blocks.len(),
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": null, "tie_word_embeddings": false,
        "vocab_size": 4000, "max_position_embeddings": CONTEXT, "eos_token_id": [], "block_configs": blocks,
        "attention_bias": false, "mlp_bias": false,
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let (model, _) = Model::open(folder, true).unwrap();
    let tensors: Vec<StoredTensor> = (model_tensors(&model.config).into_iter())
        .flat_map(|(name, shape)| {
            let bytes = model.weights.with(&name, &shape, |view| view.bytes.to_vec());
            stored.tensors(&name, &shape, bytes)
        })
        .collect();
    let views = tensors.iter().map(|StoredTensor { name, dtype, shape, bytes }| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}

/// Rows and columns of a tensor `[rows, cols]`.
type Shard = (Range<usize>, Range<usize>);

/// What a rank has of each tensor of a part; nothing of all others.
fn shards(model: &Model, part: Part, place: RankPlace, sharing: &Sharing) -> BTreeMap<String, Shard> {
    let config = &model.config;
    let (dims, all) = (config.dims, 0..config.dims.hidden);
    let mut shards = BTreeMap::new();
    for index in part.blocks.range() {
        let (block, sharing) = (config.blocks[index], sharing.of(index));
        let is_elsewhere = |is_first_ranks: bool| is_first_ranks && place.num_ranks > 1 && place.rank > 0;
        let mut add = |name: &str, shard: Shard| shards.insert(slot_tensor(block.slot, name), shard);
        let is_gqa = matches!(block.attention, Attention::Gqa { .. });
        let is_there = !is_elsewhere(sharing.attention == AttentionSharing::FirstRank);
        if is_there && part.has_attention(index) && block.attention != Attention::None {
            add("input_layernorm", (0..1, all.clone()));
            let kv_heads = if let Attention::Gqa { kv_heads } = block.attention { kv_heads } else { 0 };
            let (query, kv) = match place.attention(block.attention, dims, sharing.attention) {
                AttentionShard::Heads { query, kv } => (query, kv),
                AttentionShard::Sequences => (0..HEADS, 0..kv_heads),
                AttentionShard::FirstRank if is_gqa => (0..HEADS, 0..kv_heads),
                AttentionShard::FirstRank => {
                    add("self_attn.linear_attn", (all.clone(), all.clone()));
                    (0..0, 0..0)
                }
                AttentionShard::Columns(rows) => {
                    add("self_attn.linear_attn", (rows, all.clone()));
                    (0..0, 0..0)
                }
                other => panic!("{other:?}"),
            };
            let numbers = |heads: &Range<usize>| heads.start * HEAD_DIM..heads.end * HEAD_DIM;
            if is_gqa {
                add("self_attn.q_proj", (numbers(&query), all.clone()));
                add("self_attn.k_proj", (numbers(&kv), all.clone()));
                add("self_attn.v_proj", (numbers(&kv), all.clone()));
                add("self_attn.o_proj", (all.clone(), numbers(&query)));
            }
        }
        if is_elsewhere(sharing.ffn == FfnSharing::FirstRank) {
            continue;
        }
        add("post_attention_layernorm", (0..1, all.clone()));
        let width = if let Ffn::SwiGlu { width } = block.ffn { width } else { 0 };
        match (block.ffn, place.ffn(block.ffn, dims, part.columns(index, width), sharing.ffn)) {
            (Ffn::SwiGlu { .. }, FfnShard::Inner(columns) | FfnShard::FirstRank(columns)) => {
                add("mlp.gate_proj", (columns.clone(), all.clone()));
                add("mlp.up_proj", (columns.clone(), all.clone()));
                add("mlp.down_proj", (all.clone(), columns));
            }
            (Ffn::Linear, FfnShard::Columns(rows) | FfnShard::FirstRank(rows)) => {
                add("mlp.linear_mlp", (rows, all.clone()));
            }
            other => panic!("{other:?}"),
        }
    }
    if part.is_first() && place.rank == 0 {
        shards.insert(tensors::EMBEDDING.to_owned(), (0..dims.vocab, all.clone()));
    }
    if part.is_last(config) {
        shards.insert(tensors::LAST_NORM.to_owned(), (0..1, all.clone()));
        let rows = place.columns(0..dims.vocab).expect("a share of the vocabulary");
        shards.insert(tensors::HEAD.to_owned(), (rows, all));
    }
    shards
}

/// The bytes of a tensor that belong to some columns of a matrix of so many, in each row: of what has fewer numbers than that in a
/// row, words and scales, each belongs to some of these columns.
fn bytes_of_row(tensor: &Tensor, cols: &Range<usize>, num_cols: usize) -> Range<usize> {
    let (numbers, size) = (tensor.shape.last().unwrap(), tensor.dtype.bitsize() / 8);
    cols.start * numbers / num_cols * size..(cols.end * numbers).div_ceil(num_cols) * size
}

/// The model with all bytes taken away that are not a rank's, as far as they are whole pages.
fn with_shards_alone(
    (folder, stored): (&Path, Stored),
    part: Part,
    place: RankPlace,
    sharing: &Sharing,
) -> Model {
    let (model, _) = Model::open(folder, false).unwrap();
    let shards = shards(&model, part, place, sharing);
    let shapes: BTreeMap<String, Vec<usize>> = model_tensors(&model.config).into_iter().collect();
    let Weights::Checkpoint(checkpoint) = &model.weights else { panic!("it has a checkpoint") };
    let (mut unwanted, mut forbidden) = (0, 0);
    for (name, tensor) in checkpoint.iter() {
        let matrix = quantized::whole_of(name).unwrap_or_else(|| name.to_owned());
        let row_bytes = tensor.shape.last().unwrap() * tensor.dtype.bitsize() / 8;
        let bytes = tensor.shape.iter().product::<usize>() * tensor.dtype.bitsize() / 8;
        let (rows, cols) = shards.get(&matrix).cloned().unwrap_or((0..0, 0..0));
        let of_row = bytes_of_row(tensor, &cols, *shapes[&matrix].last().unwrap());
        let wanted = rows.map(|row| row * row_bytes + of_row.start..row * row_bytes + of_row.end);
        let mut end = 0;
        for Range { start, end: next } in wanted.chain(std::iter::once(bytes..bytes)) {
            unwanted += start - end;
            forbidden += checkpoint.forbid(tensor, end..start);
            end = next;
        }
    }
    let least = unwanted * stored.least_percent() / 100;
    assert!(forbidden >= least, "{stored:?}: {forbidden} of {unwanted} bytes are whole pages");
    model
}

/// A sequence whose every token is scored.
fn micro_batch() -> MicroBatch {
    let sampling = Sampling { logprobs: Some(3), prompt_logprobs: true, ..Sampling::greedy(4) };
    let tokens: Vec<u32> = (0..9).map(|i| i * 397 % 4000).collect();
    let request = Request { key: RequestKey(0), prompt: vec![0], sampling: Arc::new(sampling), sample: 0 };
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
        request: Arc::new(request),
    };
    MicroBatch { id: MicroBatchId(0), slices: vec![slice] }
}

/// Log-probabilities that stages of so many ranks give, each of which has a model of its own.
fn logprobs(
    weights: WeightType,
    parts: &[Part],
    num_ranks: usize,
    sharing: &Sharing,
    open: impl Fn(Part, RankPlace) -> Model,
) -> Vec<f32> {
    let dtypes = Dtypes { weights, kv: KvDtype::Bf16 };
    let device = Device::Cpu { cores: Vec::new(), threads: 1, simd: Simd::detect() };
    let (batch, mut input) = (micro_batch(), None);
    for &part in parts {
        let options = SpanOptions { part, num_pages: num_ranks, context_tokens: CONTEXT, largest_step: None };
        let model = |rank| open(part, RankPlace { rank, num_ranks });
        let group = |collective| RankGroup {
            collective: Box::new(collective),
            sharing: sharing.clone(),
            clock: Arc::new(CollectiveClock::default()),
            exit: kernels::GroupExit::default(),
        };
        let mut ranks = thread_ranks(num_ranks, Duration::from_secs(60)).into_iter();
        let first = ranks.next().unwrap();
        let step = RankStep::of(&batch, part.is_last(&model(0).config));
        let output = std::thread::scope(|scope| {
            let (loaded, all_loaded) = channel();
            for (rank, collective) in (1..).zip(ranks) {
                let (model, group, device, step) = (model(rank), group(collective), &device, &step);
                let loaded = loaded.clone();
                scope.spawn(move || {
                    let mut follower = load_follower(&model, device, dtypes, options, group).unwrap();
                    loaded.send(()).unwrap();
                    follower.follow(step).unwrap();
                });
            }
            let mut stage = match num_ranks {
                1 => load(&model(0), &device, dtypes, options).unwrap(),
                _ => load_first_rank(&model(0), &device, dtypes, options, group(first)).unwrap(),
            };
            all_loaded.iter().take(num_ranks - 1).for_each(drop);
            stage.step(&batch, input.take()).unwrap()
        });
        match output {
            StageOutput::Activations(activations) => input = Some(activations),
            StageOutput::Tokens(output) => {
                let scored = output.slices.iter().flat_map(|slice| &slice.prompt_logprobs);
                return scored.map(|scored| scored.logprob).collect();
            }
        }
    }
    panic!("the last stage draws")
}

/// By heads and columns; by sequences; on the first rank alone; and some of each.
fn sharings() -> Vec<Sharing> {
    let of = |attention, ffn| BlockSharing { attention, ffn };
    let by_sequences = of(AttentionSharing::Sequences, FfnSharing::Columns);
    let on_first_rank = of(AttentionSharing::FirstRank, FfnSharing::FirstRank);
    let mixed = [
        of(AttentionSharing::FirstRank, FfnSharing::Columns),
        of(AttentionSharing::Heads, FfnSharing::FirstRank),
        of(AttentionSharing::Sequences, FfnSharing::FirstRank),
    ];
    vec![
        Sharing::default(),
        Sharing::uniform(0..3, by_sequences),
        Sharing::uniform(0..3, on_first_rank),
        mixed.into_iter().enumerate().collect(),
    ]
}

/// All blocks in one stage; and in two, which share the last block's FFN.
fn layouts() -> [Vec<Part>; 2] {
    let part =
        |start, first_column, end_column| Part { blocks: Span { start, end: 3 }, first_column, end_column };
    [vec![part(0, 0, None)], vec![part(0, 0, Some(8000)), part(2, 8000, None)]]
}

/// That stages of so many ranks, which have their shards alone, find what they find with everything.
#[track_caller]
fn check(
    checkpoint: (&Path, Stored),
    weights: WeightType,
    parts: &[Part],
    num_ranks: usize,
    sharing: &Sharing,
) {
    let open = |_, _| Model::open(checkpoint.0, false).unwrap().0;
    let expected = logprobs(weights, parts, num_ranks, sharing, open);
    let found = logprobs(weights, parts, num_ranks, sharing, |part, place| {
        with_shards_alone(checkpoint, part, place, sharing)
    });
    let stored = checkpoint.1;
    assert!(found.len() == 9 && found.iter().all(|logprob| logprob.is_finite()), "{found:?}");
    let stages = parts.len();
    assert!(found == expected, "{stored:?} as {weights:?}, {num_ranks} ranks, {sharing:?}, {stages} stages");
}

#[test]
fn a_rank_reads_its_shard_of_the_tensors_and_no_page_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    write_model(folder.path(), Stored::Bf16, HIDDEN);
    for parts in layouts() {
        for num_ranks in 1..=4 {
            for sharing in &sharings() {
                check((folder.path(), Stored::Bf16), WeightType::Bf16, &parts, num_ranks, sharing);
            }
        }
    }
}

/// Each way to store them with every number of ranks, which share out all halves, or some of them in other ways.
#[test]
fn a_rank_reads_its_shard_alone_of_narrow_weights_and_of_those_that_become_narrow() {
    let ([whole, cut], sharings) = (layouts(), sharings());
    for (stored, all_weights) in [
        (Stored::Bf16, &[WeightType::Int8, WeightType::Int8Weight, WeightType::Int4Weight][..]),
        (Stored::Int4, &[WeightType::Bf16, WeightType::Int4Weight][..]),
        (Stored::Fp8, &[WeightType::Bf16, WeightType::Int8Weight][..]),
    ] {
        let folder = tempfile::tempdir().unwrap();
        write_model(folder.path(), stored, LITTLE_HIDDEN);
        for (index, weights) in all_weights.iter().enumerate() {
            for num_ranks in [1 + index % 2, 3 + index % 2] {
                let parts = if num_ranks == 3 { &whole } else { &cut };
                let sharing = if num_ranks == 4 { &sharings[3] } else { &sharings[0] };
                check((folder.path(), stored), *weights, parts, num_ranks, sharing);
            }
        }
    }
}
