//! A stage of a GPU of the emulator that has lost its room captures steps again, and one that has refused a step goes on as before.

use std::path::Path;
use std::sync::Arc;

use kernels::{Backend, Cuda, KvDtype, PAGE_TOKENS, WeightType};
use scheduler::{MicroBatch, MicroBatchId, Request, RequestKey, Sampling, SequenceId, Slice, Span};
use serde_json::json;

use super::{SpanOptions, SpanStage};
use crate::memory::StepSize;
use crate::model::Model;
use crate::stage::{Device, Dtypes, Stage, cuda};

const SEQUENCES: usize = 16;
const VOCABULARY: u32 = 100;
const LARGEST: StepSize = StepSize {
    rows: SEQUENCES / 2,
    sequences: SEQUENCES / 2,
    context_tokens: PAGE_TOKENS,
    micro_batches: 1,
    arrivals: 1,
};

/// One of its GPUs.
pub(super) fn device(index: usize) -> Device {
    let libraries = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/cuda-emulator");
    assert!(libraries.join("libcuda.so").is_file(), "no emulator\nhint: cargo xtask emulator");
    let (libraries, cubins) = (Some(libraries), None);
    Device::Cuda { index, libraries, cubins, is_deterministic: true, has_graphs: true }
}

fn gpu() -> Cuda {
    cuda(&device(0), Dtypes { weights: WeightType::Bf16, kv: KvDtype::Bf16 }).unwrap()
}

/// A block of attention and an FFN.
pub(super) fn model(folder: &Path) -> Model {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 64,
        "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true, "vocab_size": VOCABULARY,
        "max_position_embeddings": PAGE_TOKENS, "eos_token_id": [],
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    Model::open(folder, true).unwrap().0
}

fn stage(folder: &Path) -> SpanStage<Cuda> {
    let options = SpanOptions {
        part: Span { start: 0, end: 1 }.into(),
        num_pages: SEQUENCES,
        context_tokens: PAGE_TOKENS,
        largest_step: Some(LARGEST),
    };
    SpanStage::load(gpu(), &model(folder), options, None).unwrap()
}

/// So many sequences' next tokens, all of them this one.
fn batch(rows: usize, position: u32, token: u32) -> MicroBatch {
    let request =
        Request { key: RequestKey(0), prompt: vec![0], sampling: Arc::new(Sampling::greedy(4)), sample: 0 };
    let request = Arc::new(request);
    let slice = |sequence: usize| Slice {
        sequence: SequenceId(sequence as u64),
        first_position: position,
        tokens: [token].into_iter().collect(),
        pages: Arc::new(vec![sequence as u32]),
        sample: true,
        bars_stops: false,
        score: Vec::new(),
        counts: None,
        mask: None,
        fed_back: None,
        request: Arc::clone(&request),
    };
    MicroBatch { id: MicroBatchId(u64::from(position)), slices: (0..rows).map(slice).collect() }
}

fn decode(stage: &mut SpanStage<Cuda>, rows: usize, position: u32) {
    stage.step(&batch(rows, position, 7), None).unwrap();
    stage.finish().unwrap();
}

#[test]
fn a_stage_captures_steps_again_after_one_that_went_in_halves() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = stage(folder.path());
    (0..4).for_each(|position| decode(&mut stage, SEQUENCES / 2, position));
    assert_eq!(stage.backend.launched_graphs(), 3, "all but the first are launched as a graph");
    // Another program takes what is left, so that twice the rows have no room.
    let (other, mut taken) = (gpu(), gpu().array());
    other.reserve(&mut taken, 1, other.free_bytes().unwrap() as usize / size_of::<f32>()).unwrap();
    decode(&mut stage, SEQUENCES, 4);
    assert!(stage.has_halved);
    let rows = |stage: &SpanStage<Cuda>| stage.room.as_ref().unwrap().rows;
    assert_eq!(rows(&stage), 0, "the next step may have to go in halves too");
    decode(&mut stage, 7, 5);
    assert_eq!(rows(&stage), 8, "what 7 rows are padded to");
    [5, 6, 7, 8].into_iter().zip(6..).for_each(|(rows, position)| decode(&mut stage, rows, position));
    assert_eq!(stage.backend.launched_graphs(), 3, "all but the first are of one kind since");
}

/// Its place for answers is kept: to make it anew would take memory, and all graphs with it.
#[test]
fn a_step_that_is_refused_costs_the_next_one_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = stage(folder.path());
    (0..2).for_each(|position| decode(&mut stage, SEQUENCES / 2, position));
    let free = stage.backend.free_bytes().unwrap();
    stage.step(&batch(SEQUENCES / 2, 2, VOCABULARY), None).unwrap_err();
    assert_eq!(stage.backend.free_bytes().unwrap(), free);
    decode(&mut stage, SEQUENCES / 2, 2);
    assert_eq!(stage.backend.launched_graphs(), 2, "it is launched as those before");
}
