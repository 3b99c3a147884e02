//! One span's forward pass: the loop over its blocks, on any backend.
//!
//! Joins what the scheduler says (micro-batches) with what kernels can do (operations on arrays). A stage
//! with the first block embeds tokens; a stage with the last one applies the norm and the output matrix to
//! the rows that need logits, and draws. Between them only the f32 residual stream travels.

use std::sync::Arc;

use kernels::{AttentionSlice, Backend, LogitStats};
use scheduler::{
    Failure, MicroBatch, MicroBatchOutput, PageIdx, Request, Slice, SliceOutput, Span, TokenId, TokenLogprobs,
};

use crate::block::{Attention, Block, Ffn};
use crate::error::Result;
use crate::model::Model;
use crate::random::Stream;
use crate::sampling;
use crate::stage::{Activations, Stage, StageOutput};
use crate::tensors::{self, slot_tensor};

/// Rows of logits that are made at a time: 64 rows of a vocabulary of 128,256 are 33 MB, which the draws
/// then walk, and 64 rows are enough for a matrix product at full speed.
const LOGIT_ROWS: usize = 64;

/// How much of a model a stage holds, and how much it must be ready for.
#[derive(Debug, Clone, Copy)]
pub struct SpanOptions {
    /// Blocks `[start, end)`.
    pub span: Span,
    /// KV pages, the same number in every stage.
    pub num_pages: usize,
    /// Longest sequence.
    pub context_tokens: usize,
}

/// The weights and the caches of a span of blocks on one device.
pub(crate) struct SpanStage<B: Backend> {
    backend: B,
    eps: f32,
    embedding: Option<Arc<B::Matrix>>,
    blocks: Vec<BlockOnDevice<B>>,
    head: Option<Head<B>>,
    rope: Option<B::Rope>,
    work: Work<B>,
}

struct BlockOnDevice<B: Backend> {
    attention: AttentionOnDevice<B>,
    ffn: FfnOnDevice<B>,
}

enum AttentionOnDevice<B: Backend> {
    Gqa { norm: B::Vector, q: B::Matrix, k: B::Matrix, v: B::Matrix, o: B::Matrix, cache: B::KvCache },
    Linear { norm: B::Vector, matrix: B::Matrix },
    None,
}

enum FfnOnDevice<B: Backend> {
    SwiGlu { norm: B::Vector, gate: B::Matrix, up: B::Matrix, down: B::Matrix },
    Linear { norm: B::Vector, matrix: B::Matrix },
    None,
}

struct Head<B: Backend> {
    norm: B::Vector,
    matrix: Arc<B::Matrix>,
}

/// Arrays that every micro-batch reuses.
struct Work<B: Backend> {
    /// The residual stream, `[tokens, hidden]`.
    x: B::Array,
    /// Its norm, what a half's matrices read.
    normed: B::Operand,
    q: B::Array,
    k: B::Array,
    v: B::Array,
    /// A half's inner result: attention's output or SwiGLU's product.
    inner: B::Operand,
    /// Rows that need logits, and the logits.
    rows: B::Array,
    logits: B::Array,
    host_logits: Vec<f32>,
    stats: Vec<LogitStats>,
    draws: sampling::Scratch,
}

impl<B: Backend> SpanStage<B> {
    /// Loads the tensors of a span, and no others, onto a device.
    ///
    /// # Errors
    /// What the device refuses. The model's tensors were checked when it was opened.
    pub(crate) fn load(backend: B, model: &Model, options: SpanOptions) -> Result<Self> {
        let config = &model.config;
        let SpanOptions { span, num_pages, context_tokens } = options;
        let loader = Loader { backend: &backend, model };
        let is_first = span.start == 0;
        let is_last = span.end == config.blocks.len();
        let table = [config.dims.vocab, config.dims.hidden];
        let embedding = (is_first || (is_last && config.tied_embeddings))
            .then(|| loader.table(tensors::EMBEDDING, table).map(Arc::new))
            .transpose()?;
        let head = is_last
            .then(|| -> Result<Head<B>> {
                let matrix = match &embedding {
                    Some(embedding) if config.tied_embeddings => Arc::clone(embedding),
                    _ => Arc::new(loader.table(tensors::HEAD, table)?),
                };
                Ok(Head { norm: loader.vector(tensors::LAST_NORM)?, matrix })
            })
            .transpose()?;
        let blocks = &config.blocks[span.start..span.end];
        let has_attention = blocks.iter().any(|block| matches!(block.attention, Attention::Gqa { .. }));
        let rope = has_attention
            .then(|| backend.rope_table(config.rope.table(config.dims.head_dim, context_tokens)))
            .transpose()?;
        let blocks =
            blocks.iter().map(|&block| loader.block(block, num_pages)).collect::<Result<Vec<_>>>()?;
        let work = Work {
            x: backend.array(),
            normed: backend.operand(),
            q: backend.array(),
            k: backend.array(),
            v: backend.array(),
            inner: backend.operand(),
            rows: backend.array(),
            logits: backend.array(),
            host_logits: Vec::new(),
            stats: Vec::new(),
            draws: sampling::Scratch::default(),
        };
        let embedding = embedding.filter(|_| is_first);
        Ok(SpanStage { eps: config.rms_norm_eps, embedding, blocks, head, rope, work, backend })
    }

    fn run_blocks(&mut self, batch: &MicroBatch) -> Result<()> {
        let slices = attention_slices(batch);
        let positions = positions(batch);
        for block in &mut self.blocks {
            let (backend, rope, work) = (&self.backend, self.rope.as_ref(), &mut self.work);
            block.attention.run(backend, rope, self.eps, &slices, &positions, work)?;
            block.ffn.run(backend, self.eps, work)?;
        }
        Ok(())
    }
}

impl<B: Backend> Stage for SpanStage<B> {
    fn step(&mut self, batch: &MicroBatch, input: Option<Activations>) -> Result<StageOutput> {
        match (&self.embedding, input) {
            (Some(table), None) => {
                let tokens: Vec<TokenId> =
                    batch.slices.iter().flat_map(|s| s.tokens.iter().copied()).collect();
                self.backend.embed(table, &tokens, &mut self.work.x)?;
            }
            (None, Some(input)) => {
                let Activations { values, hidden } = input;
                self.backend.upload(&values, values.len() / hidden, hidden, &mut self.work.x)?;
            }
            (Some(_), Some(_)) => panic!("the first stage was given activations"),
            (None, None) => panic!("a later stage was given no activations"),
        }
        self.run_blocks(batch)?;
        match &self.head {
            Some(head) => {
                Ok(StageOutput::Tokens(head.run(&self.backend, self.eps, batch, &mut self.work)?))
            }
            None => {
                let mut values = Vec::new();
                self.backend.download(&self.work.x, &mut values)?;
                let hidden = values.len() / batch.num_tokens();
                Ok(StageOutput::Activations(Activations { values, hidden }))
            }
        }
    }
}

impl<B: Backend> AttentionOnDevice<B> {
    fn run(
        &mut self,
        backend: &B,
        rope: Option<&B::Rope>,
        eps: f32,
        slices: &[AttentionSlice],
        positions: &[u32],
        work: &mut Work<B>,
    ) -> Result<()> {
        let Work { x, normed, q, k, v, inner, .. } = work;
        match self {
            AttentionOnDevice::Gqa { norm, q: wq, k: wk, v: wv, o: wo, cache } => {
                let rope = rope.expect("a span with attention has rotary angles");
                backend.rms_norm(x, norm, eps, normed)?;
                backend.matmul(normed, wq, q)?;
                backend.matmul(normed, wk, k)?;
                backend.matmul(normed, wv, v)?;
                backend.rope(q, rope, positions)?;
                backend.rope(k, rope, positions)?;
                backend.kv_append(cache, k, v, slices)?;
                backend.attention(q, cache, slices, inner)?;
                backend.matmul_add(inner, wo, x)?;
            }
            AttentionOnDevice::Linear { norm, matrix } => {
                backend.rms_norm(x, norm, eps, normed)?;
                backend.matmul_add(normed, matrix, x)?;
            }
            AttentionOnDevice::None => {}
        }
        Ok(())
    }
}

impl<B: Backend> FfnOnDevice<B> {
    fn run(&self, backend: &B, eps: f32, work: &mut Work<B>) -> Result<()> {
        let Work { x, normed, inner, .. } = work;
        match self {
            FfnOnDevice::SwiGlu { norm, gate, up, down } => {
                backend.rms_norm(x, norm, eps, normed)?;
                backend.swiglu(normed, gate, up, inner)?;
                backend.matmul_add(inner, down, x)?;
            }
            FfnOnDevice::Linear { norm, matrix } => {
                backend.rms_norm(x, norm, eps, normed)?;
                backend.matmul_add(normed, matrix, x)?;
            }
            FfnOnDevice::None => {}
        }
        Ok(())
    }
}

/// A row of a micro-batch whose logits somebody wants.
struct WantedRow {
    row: u32,
    slice: usize,
    /// Position of the token whose successor is asked for.
    position: u32,
    want: Want,
}

enum Want {
    /// The log-probability of the prompt token that follows.
    Score(TokenId),
    /// A draw of the token that follows.
    Draw,
}

impl<B: Backend> Head<B> {
    fn run(&self, backend: &B, eps: f32, batch: &MicroBatch, work: &mut Work<B>) -> Result<MicroBatchOutput> {
        let mut outputs: Vec<SliceOutput> = (batch.slices.iter())
            .map(|slice| SliceOutput {
                sequence: slice.sequence,
                token: None,
                logprobs: None,
                prompt_logprobs: Vec::with_capacity(slice.score.len()),
                failure: None,
            })
            .collect();
        for wanted in wanted_rows(batch).chunks(LOGIT_ROWS) {
            let rows: Vec<u32> = wanted.iter().map(|wanted| wanted.row).collect();
            backend.gather(&work.x, &rows, &mut work.rows)?;
            backend.rms_norm(&work.rows, &self.norm, eps, &mut work.normed)?;
            backend.matmul(&work.normed, &self.matrix, &mut work.logits)?;
            backend.logit_stats(&work.logits, &mut work.stats)?;
            let reads_logits = |wanted: &WantedRow| wanted.reads_logits(&batch.slices[wanted.slice]);
            if wanted.iter().any(reads_logits) {
                backend.download(&work.logits, &mut work.host_logits)?;
            }
            for (i, wanted) in wanted.iter().enumerate() {
                let slice = &batch.slices[wanted.slice];
                let logits = match wanted.reads_logits(slice) {
                    true => {
                        let vocab = work.host_logits.len() / rows.len();
                        &mut work.host_logits[i * vocab..][..vocab]
                    }
                    false => &mut [],
                };
                wanted.answer(slice, logits, work.stats[i], &mut work.draws, &mut outputs[wanted.slice]);
            }
        }
        Ok(MicroBatchOutput { id: batch.id, slices: outputs })
    }
}

fn wanted_rows(batch: &MicroBatch) -> Vec<WantedRow> {
    let mut wanted = Vec::new();
    let mut first_row = 0;
    for (index, slice) in batch.slices.iter().enumerate() {
        let mut want = |offset: u32, want| {
            let (row, position) = (first_row + offset, slice.first_position + offset);
            wanted.push(WantedRow { row, slice: index, position, want });
        };
        for (offset, &token) in slice.score.iter().enumerate() {
            want(offset as u32, Want::Score(token));
        }
        let num_rows = slice.tokens.len() as u32;
        if slice.sample {
            want(num_rows - 1, Want::Draw);
        }
        first_row += num_rows;
    }
    wanted
}

impl WantedRow {
    /// Whether the answer needs more of the row than its statistics.
    fn reads_logits(&self, slice: &Slice) -> bool {
        let sampling = &slice.request.sampling;
        match self.want {
            Want::Score(_) => true,
            Want::Draw => {
                sampling.temperature != 0.0 || sampling.logprobs.is_some() || bars_stop_tokens(slice)
            }
        }
    }

    fn answer(
        &self,
        slice: &Slice,
        logits: &mut [f32],
        stats: LogitStats,
        draws: &mut sampling::Scratch,
        output: &mut SliceOutput,
    ) {
        if !(stats.max.is_finite() && stats.log_sum_exp.is_finite()) {
            output.failure.get_or_insert(Failure::NonFiniteLogits { position: self.position });
            return;
        }
        let sampling = &slice.request.sampling;
        let top = sampling.logprobs.unwrap_or(0);
        match self.want {
            Want::Score(token) => {
                output.prompt_logprobs.push(sampling::token_logprobs(logits, stats, token, top));
            }
            Want::Draw => {
                let (token, logprobs) = draw(slice, logits, stats, draws);
                output.token = Some(token);
                output.logprobs = logprobs;
            }
        }
    }
}

/// Whether the slice's request must not end yet.
fn bars_stop_tokens(slice: &Slice) -> bool {
    let sampling = &slice.request.sampling;
    !sampling.stop_token_ids.is_empty() && num_generated(slice) < sampling.min_tokens
}

/// Tokens generated before the one that the slice asks for.
fn num_generated(slice: &Slice) -> u32 {
    next_position(slice) - slice.request.prompt.len() as u32
}

fn next_position(slice: &Slice) -> u32 {
    slice.first_position + slice.tokens.len() as u32
}

fn draw(
    slice: &Slice,
    logits: &mut [f32],
    mut stats: LogitStats,
    draws: &mut sampling::Scratch,
) -> (TokenId, Option<TokenLogprobs>) {
    let Request { key, sampling, sample, .. } = &*slice.request;
    let reported =
        sampling.logprobs.map(|top| (top, stats, bars_stop_tokens(slice).then(|| logits.to_vec())));
    if bars_stop_tokens(slice) {
        for &token in &sampling.stop_token_ids {
            logits[token as usize] = f32::NEG_INFINITY;
        }
        stats = sampling::stats(logits);
    }
    let uniform = Stream::new(sampling.seed, key.0).uniform(*sample, next_position(slice));
    let token = sampling::draw(logits, stats, sampling, uniform, draws);
    // Log-probabilities are the model's own, before anything was barred.
    let logprobs = reported.map(|(top, stats, unbarred)| {
        sampling::token_logprobs(unbarred.as_deref().unwrap_or(logits), stats, token, top)
    });
    (token, logprobs)
}

fn attention_slices(batch: &MicroBatch) -> Vec<AttentionSlice> {
    let mut first_row = 0;
    (batch.slices.iter())
        .map(|slice| {
            let num_rows = slice.tokens.len();
            let first_position = slice.first_position as usize;
            let pages: Vec<PageIdx> = slice.pages.to_vec();
            let out = AttentionSlice { first_row, num_rows, first_position, pages };
            first_row += num_rows;
            out
        })
        .collect()
}

fn positions(batch: &MicroBatch) -> Vec<u32> {
    (batch.slices.iter())
        .flat_map(|slice| slice.first_position..slice.first_position + slice.tokens.len() as u32)
        .collect()
}

/// Puts a model's tensors on a device.
struct Loader<'a, B: Backend> {
    backend: &'a B,
    model: &'a Model,
}

impl<B: Backend> Loader<'_, B> {
    fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<B::Matrix> {
        Ok(self.model.weights.with(name, &shape, |view| self.backend.matrix(view))?)
    }

    fn table(&self, name: &str, shape: [usize; 2]) -> Result<B::Matrix> {
        Ok(self.model.weights.with(name, &shape, |view| self.backend.table(view))?)
    }

    fn vector(&self, name: &str) -> Result<B::Vector> {
        let shape = [self.model.config.dims.hidden];
        Ok(self.model.weights.with(name, &shape, |view| self.backend.vector(view))?)
    }

    fn block(&self, block: Block, num_pages: usize) -> Result<BlockOnDevice<B>> {
        let dims = self.model.config.dims;
        let hidden = dims.hidden;
        let norm = |part: &str| self.vector(&slot_tensor(block.slot, part));
        let matrix = |part: &str, shape: [usize; 2]| self.matrix(&slot_tensor(block.slot, part), shape);
        let attention = match block.attention {
            Attention::Gqa { kv_heads } => {
                let (q_rows, kv_rows) = (dims.heads * dims.head_dim, kv_heads * dims.head_dim);
                AttentionOnDevice::Gqa {
                    norm: norm("input_layernorm")?,
                    q: matrix("self_attn.q_proj", [q_rows, hidden])?,
                    k: matrix("self_attn.k_proj", [kv_rows, hidden])?,
                    v: matrix("self_attn.v_proj", [kv_rows, hidden])?,
                    o: matrix("self_attn.o_proj", [hidden, q_rows])?,
                    cache: self.backend.kv_cache(num_pages, kv_heads, dims.head_dim)?,
                }
            }
            Attention::Linear => AttentionOnDevice::Linear {
                norm: norm("input_layernorm")?,
                matrix: matrix("self_attn.linear_attn", [hidden, hidden])?,
            },
            Attention::None => AttentionOnDevice::None,
        };
        let ffn = match block.ffn {
            Ffn::SwiGlu { width } => FfnOnDevice::SwiGlu {
                norm: norm("post_attention_layernorm")?,
                gate: matrix("mlp.gate_proj", [width, hidden])?,
                up: matrix("mlp.up_proj", [width, hidden])?,
                down: matrix("mlp.down_proj", [hidden, width])?,
            },
            Ffn::Linear => FfnOnDevice::Linear {
                norm: norm("post_attention_layernorm")?,
                matrix: matrix("mlp.linear_mlp", [hidden, hidden])?,
            },
            Ffn::None => FfnOnDevice::None,
        };
        Ok(BlockOnDevice { attention, ffn })
    }
}
