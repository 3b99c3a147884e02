//! One span's forward pass: the loop over its blocks, on any backend.
//!
//! Joins what the scheduler says (micro-batches) with what kernels can do (operations on arrays). A stage
//! with the first block embeds tokens; a stage with the last one applies the norm and the output matrix to
//! the rows that need logits, and draws. Between them only the f32 residual stream travels.

use std::sync::Arc;

use kernels::Backend;
use scheduler::{MicroBatch, Span};

use crate::batch::Batch;
use crate::block::{Attention, Block, Ffn};
use crate::error::Result;
use crate::head::{Head, HeadWork};
use crate::model::Model;
use crate::stage::{Activations, Stage, StageOutput};
use crate::tensors::{self, slot_tensor};

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

/// Arrays that every micro-batch reuses.
struct Work<B: Backend> {
    batch: Batch,
    /// The residual stream, `[tokens, hidden]`.
    x: B::Array,
    /// Its norm, what a half's matrices read.
    normed: B::Operand,
    q: B::Array,
    k: B::Array,
    v: B::Array,
    /// A half's inner result: attention's output or SwiGLU's product.
    inner: B::Operand,
    head: HeadWork<B>,
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
            batch: Batch::default(),
            x: backend.array(),
            normed: backend.operand(),
            q: backend.array(),
            k: backend.array(),
            v: backend.array(),
            inner: backend.operand(),
            head: HeadWork::new(&backend),
        };
        let embedding = embedding.filter(|_| is_first);
        Ok(SpanStage { eps: config.rms_norm_eps, embedding, blocks, head, rope, work, backend })
    }

    fn run_blocks(&mut self) -> Result<()> {
        for block in &mut self.blocks {
            let (backend, rope, work) = (&self.backend, self.rope.as_ref(), &mut self.work);
            block.attention.run(backend, rope, self.eps, work)?;
            block.ffn.run(backend, self.eps, work)?;
        }
        Ok(())
    }
}

impl<B: Backend> Stage for SpanStage<B> {
    fn step(&mut self, batch: &MicroBatch, input: Option<Activations>) -> Result<StageOutput> {
        self.work.batch.assign(batch);
        match (&self.embedding, input) {
            (Some(table), None) => {
                self.backend.embed(table, self.work.batch.tokens(), &mut self.work.x)?;
            }
            (None, Some(input)) => {
                let Activations { values, hidden } = input;
                self.backend.upload(&values, values.len() / hidden, hidden, &mut self.work.x)?;
            }
            (Some(_), Some(_)) => panic!("the first stage was given activations"),
            (None, None) => panic!("a later stage was given no activations"),
        }
        self.run_blocks()?;
        match &self.head {
            Some(head) => {
                let Work { x, head: work, .. } = &mut self.work;
                Ok(StageOutput::Tokens(head.run(&self.backend, self.eps, batch, x, work)?))
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
    fn run(&mut self, backend: &B, rope: Option<&B::Rope>, eps: f32, work: &mut Work<B>) -> Result<()> {
        let Work { batch, x, normed, q, k, v, inner, .. } = work;
        match self {
            AttentionOnDevice::Gqa { norm, q: wq, k: wk, v: wv, o: wo, cache } => {
                let rope = rope.expect("a span with attention has rotary angles");
                backend.rms_norm(x, norm, eps, normed)?;
                backend.matmul(normed, wq, q)?;
                backend.matmul(normed, wk, k)?;
                backend.matmul(normed, wv, v)?;
                backend.rope(q, rope, batch.positions())?;
                backend.rope(k, rope, batch.positions())?;
                backend.kv_append(cache, k, v, batch.slices())?;
                backend.attention(q, cache, batch.slices(), inner)?;
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
