//! A rank reads its shard of the tensors and nothing else: with every page taken away that has no byte of it, ranks load all
//! the same, and give the same log-probabilities.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use kernels::{KvDtype, Simd, WeightType, thread_ranks};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use scheduler::{
    MicroBatch, MicroBatchId, Request, RequestKey, Sampling, SequenceId, Slice, SliceTokens, Span,
};
use serde_json::{Value, json};

use super::SpanOptions;
use crate::block::{Attention, Ffn};
use crate::model::Model;
use crate::part::Part;
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
const CONTEXT: usize = 64;

fn write_model(folder: &Path) {
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
        "hidden_size": HIDDEN, "num_attention_heads": HEADS, "head_dim": HEAD_DIM, "num_hidden_layers": blocks.len(),
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": null, "tie_word_embeddings": false,
        "vocab_size": 4000, "max_position_embeddings": CONTEXT, "eos_token_id": [], "block_configs": blocks,
        "attention_bias": false, "mlp_bias": false,
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let (model, _) = Model::open(folder, true).unwrap();
    let stored: Vec<_> = (model_tensors(&model.config).into_iter())
        .map(|(name, shape)| {
            let bytes = model.weights.with(&name, &shape, |view| view.bytes.to_vec());
            (name, shape, bytes)
        })
        .collect();
    let views = (stored.iter())
        .map(|(name, shape, bytes)| (name, TensorView::new(Dtype::BF16, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}

/// Rows and columns of a tensor `[rows, cols]`.
type Shard = (Range<usize>, Range<usize>);

/// What a rank has of each tensor of a part; nothing of all others.
fn shards(model: &Model, part: Part, place: RankPlace, sharing: &Sharing) -> BTreeMap<String, Shard> {
    let config = &model.config;
    let (dims, all) = (config.dims, 0..HIDDEN);
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

/// The model with all bytes taken away that are not a rank's, as far as they are whole pages.
fn with_shards_alone(folder: &Path, part: Part, place: RankPlace, sharing: &Sharing) -> Model {
    let (model, _) = Model::open(folder, false).unwrap();
    let shards = shards(&model, part, place, sharing);
    let Weights::Checkpoint(checkpoint) = &model.weights else { panic!("it has a checkpoint") };
    let (mut unwanted, mut forbidden) = (0, 0);
    for (name, tensor) in checkpoint.iter() {
        let row_bytes = 2 * tensor.shape.last().unwrap();
        let bytes = 2 * tensor.shape.iter().product::<usize>();
        let (rows, cols) = shards.get(name).cloned().unwrap_or((0..0, 0..0));
        let wanted = rows.map(|row| row * row_bytes + 2 * cols.start..row * row_bytes + 2 * cols.end);
        let mut end = 0;
        for Range { start, end: next } in wanted.chain(std::iter::once(bytes..bytes)) {
            unwanted += start - end;
            forbidden += checkpoint.forbid(tensor, end..start);
            end = next;
        }
    }
    assert!(forbidden * 10 >= unwanted * 7, "{forbidden} of {unwanted} bytes are whole pages");
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
    parts: &[Part],
    num_ranks: usize,
    sharing: &Sharing,
    open: impl Fn(Part, RankPlace) -> Model,
) -> Vec<u32> {
    const DTYPES: Dtypes = Dtypes { weights: WeightType::Bf16, kv: KvDtype::Bf16 };
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
                    let mut follower = load_follower(&model, device, DTYPES, options, group).unwrap();
                    loaded.send(()).unwrap();
                    follower.follow(step).unwrap();
                });
            }
            let mut stage = match num_ranks {
                1 => load(&model(0), &device, DTYPES, options).unwrap(),
                _ => load_first_rank(&model(0), &device, DTYPES, options, group(first)).unwrap(),
            };
            all_loaded.iter().take(num_ranks - 1).for_each(drop);
            stage.step(&batch, input.take()).unwrap()
        });
        match output {
            StageOutput::Activations(activations) => input = Some(activations),
            StageOutput::Tokens(output) => {
                let scored = output.slices.iter().flat_map(|slice| &slice.prompt_logprobs);
                return scored.map(|scored| scored.logprob.to_bits()).collect();
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

#[test]
fn a_rank_reads_its_shard_of_the_tensors_and_no_page_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    write_model(folder.path());
    let whole: Part = Span { start: 0, end: 3 }.into();
    // And where the last block's FFN is shared by two stages.
    let cut = [
        Part { blocks: Span { start: 0, end: 3 }, first_column: 0, end_column: Some(8000) },
        Part { blocks: Span { start: 2, end: 3 }, first_column: 8000, end_column: None },
    ];
    for parts in [&[whole][..], &cut] {
        for num_ranks in 1..=4 {
            for sharing in &sharings() {
                let open = |_, _| Model::open(folder.path(), false).unwrap().0;
                let expected = logprobs(parts, num_ranks, sharing, open);
                let found = logprobs(parts, num_ranks, sharing, |part, place| {
                    with_shards_alone(folder.path(), part, place, sharing)
                });
                assert_eq!(found.len(), 9);
                assert!(found == expected, "{num_ranks} ranks, {sharing:?}, {} stages", parts.len());
            }
        }
    }
}
