//! Putting a span's tensors, or a rank's part of them, on a device.

use std::ops::Range;
use std::sync::Arc;

use kernels::{Backend, StepTimes, ViewDtype};

use super::attention::{AttentionOnDevice, Gqa, Linear};
use super::ffn::{Cut, FfnOnDevice, SwiGlu};
use super::queue::Queue;
use super::room::{Refusals, Room};
use super::{BlockOnDevice, SpanOptions, SpanStage, Work};
use crate::batch::Batch;
use crate::block::{Attention, Block, Ffn};
use crate::error::Result;
use crate::head::Head;
use crate::host_rows::RowPool;
use crate::model::Model;
use crate::part::Part;
use crate::ranks::Ranks;
use crate::shard::{AttentionShard, FfnShard, RankPlace};
use crate::shared_weights::{Packed, SharedWeights};
use crate::sharing::Sharing;
use crate::tensors::{self, slot_tensor};

impl<B: Backend> SpanStage<B> {
    /// Loads the tensors of a span, and no others, onto a device; of several `ranks` this one's parts alone.
    ///
    /// # Errors
    /// What the device refuses. The model's tensors were checked when it was opened.
    pub(crate) fn load(
        backend: B,
        model: &Model,
        options: SpanOptions,
        ranks: Option<Ranks<B::Array>>,
    ) -> Result<Self> {
        Self::load_beside(backend, model, options, ranks, None)
    }

    /// The same, with the weights that other stages may hold.
    ///
    /// # Errors
    /// As [`SpanStage::load`].
    pub(crate) fn load_beside(
        backend: B,
        model: &Model,
        options: SpanOptions,
        mut ranks: Option<Ranks<B::Array>>,
        shared: Option<&SharedWeights<B::Matrix>>,
    ) -> Result<Self> {
        let SpanOptions { part, num_pages, context_tokens, largest_step } = options;
        let config = &model.config;
        let place = ranks.as_ref().map_or(RankPlace::ALONE, |ranks| ranks.place);
        let sharing = ranks.as_ref().map_or_else(Sharing::default, |ranks| ranks.sharing.clone());
        let tables = SharedWeights::default();
        let loader =
            Loader { backend: &backend, model, part, place, sharing, num_pages, shared, tables: &tables };
        // First of all in the last stage and last of all in the first one: of a shared table the memory is then near the cores that
        // read all of it, and not near those that look up a few rows.
        let head = loader.head()?;
        let indices = part.blocks.range();
        let blocks: Vec<BlockOnDevice<B>> =
            indices.map(|index| loader.block(index)).collect::<Result<_>>()?;
        let embedding = loader.embedding()?;
        let rope = (blocks.iter().any(|block| block.attention.has_cache()))
            .then(|| backend.rope_table(config.rope.table(config.dims.head_dim, context_tokens)))
            .transpose()?;
        let (eps, hidden) = (config.rms_norm_eps, config.dims.hidden);
        let (mut work, batch) = (Work::new(&backend), Batch::default());
        let sharing = loader.sharing;
        let room = largest_step.map(|largest| {
            let config = Arc::clone(config);
            let (rows, refusals) = (largest.rows, Refusals::default());
            Room { config, part, place, sharing, largest, rows, is_given_back: false, refusals }
        });
        room.iter().try_for_each(|room| room.make(&backend, &mut work, ranks.as_mut()))?;
        let mut queue = Queue::default();
        if let (Some(_), Some(step)) = (&head, largest_step) {
            queue.reserve(&backend, step.rows)?;
        }
        Ok(SpanStage {
            eps,
            hidden,
            part,
            embedding,
            batch,
            blocks,
            head,
            rope,
            ranks,
            room,
            has_halved: false,
            times: StepTimes::default(),
            was_given_early: false,
            queue,
            hops: RowPool::default(),
            work,
            backend,
        })
    }
}

/// Puts a model's tensors on a device.
struct Loader<'a, B: Backend> {
    backend: &'a B,
    model: &'a Model,
    part: Part,
    place: RankPlace,
    sharing: Sharing,
    num_pages: usize,
    /// What other stages hold, too, where any do.
    shared: Option<&'a SharedWeights<B::Matrix>>,
    /// This stage's own, which its two ends share.
    tables: &'a SharedWeights<B::Matrix>,
}

/// A tensor of `[rows, cols]`, and which rows and columns of it are wanted.
struct Wanted {
    shape: [usize; 2],
    rows: Range<usize>,
    cols: Range<usize>,
}

impl Wanted {
    fn rows(rows: Range<usize>, shape: [usize; 2]) -> Self {
        Wanted { shape, rows, cols: 0..shape[1] }
    }

    fn cols(cols: Range<usize>, shape: [usize; 2]) -> Self {
        Wanted { shape, rows: 0..shape[0], cols }
    }
}

impl<B: Backend> Loader<'_, B> {
    fn is_first_rank(&self) -> bool {
        self.place.rank == 0
    }

    /// A matrix, or what is wanted of it, of whoever holds the same.
    fn matrix(&self, name: &str, wanted: Wanted) -> Result<Arc<B::Matrix>> {
        match self.shared {
            Some(shared) => {
                let what = self.packed(name, wanted.rows.clone(), wanted.cols.clone());
                shared.get_or_pack(what, || self.pack(name, wanted))
            }
            None => self.pack(name, wanted).map(Arc::new),
        }
    }

    fn packed(&self, name: &str, rows: Range<usize>, cols: Range<usize>) -> Packed {
        Packed { tensor: name.to_owned(), rows, cols, profile: self.backend.numeric_profile() }
    }

    /// Of a matrix only what is wanted is read.
    fn pack(&self, name: &str, wanted: Wanted) -> Result<B::Matrix> {
        let Wanted { shape, rows, cols } = wanted;
        if let Some(random) = self.model.weights.random(name, shape) {
            return Ok(self.backend.random_matrix(random.part(rows, cols))?);
        }
        Ok(self.model.weights.with(name, &shape, |view| {
            if view.dtype == ViewDtype::Int4 && !cols.start.is_multiple_of(8) {
                return Err(kernels::Error::Unsupported(format!(
                    "{name}: found a part from column {} on, expected a multiple of 8 where integers of 4 bits share words",
                    cols.start
                )));
            }
            self.backend.matrix(view.rows(rows).columns(cols))
        })?)
    }

    /// Rows of the embedding or of the output matrix, of whoever holds the same: of this stage's other end, at least.
    fn table(&self, name: &str, rows: Range<usize>) -> Result<Arc<B::Matrix>> {
        let what = self.packed(name, rows.clone(), 0..self.model.config.dims.hidden);
        self.shared.unwrap_or(self.tables).get_or_pack(what, || self.pack_table(name, rows))
    }

    fn pack_table(&self, name: &str, rows: Range<usize>) -> Result<B::Matrix> {
        let shape = [self.model.config.dims.vocab, self.model.config.dims.hidden];
        if let Some(random) = self.model.weights.random(name, shape) {
            return Ok(self.backend.random_table(random.part(rows, 0..shape[1]))?);
        }
        Ok(self.model.weights.with(name, &shape, |view| self.backend.table(view.rows(rows)))?)
    }

    fn vector(&self, name: &str) -> Result<B::Vector> {
        let shape = [self.model.config.dims.hidden];
        Ok(self.model.weights.with(name, &shape, |view| self.backend.vector(view))?)
    }

    /// The embedding, which the first rank looks tokens up in.
    fn embedding(&self) -> Result<Option<Arc<B::Matrix>>> {
        let is_needed = self.is_first_rank() && self.part.is_first();
        is_needed.then(|| self.table(tensors::EMBEDDING, 0..self.model.config.dims.vocab)).transpose()
    }

    /// This rank's rows of the output matrix, where ranks share it.
    fn head_rows(&self) -> Option<Range<usize>> {
        let vocab = self.model.config.dims.vocab;
        (self.place.num_ranks > 1).then(|| self.place.columns(0..vocab)).flatten()
    }

    fn head(&self) -> Result<Option<Head<B>>> {
        let config = &self.model.config;
        let (rows, vocab, hidden) = (self.head_rows(), config.dims.vocab, config.dims.hidden);
        if !self.part.is_last(config) || !(rows.is_some() || self.is_first_rank()) {
            return Ok(None);
        }
        let name = if config.tied_embeddings { tensors::EMBEDDING } else { tensors::HEAD };
        let matrix = self.table(name, rows.clone().unwrap_or(0..vocab))?;
        let first_token = rows.map(|rows| rows.start);
        Ok(Some(Head { norm: self.vector(tensors::LAST_NORM)?, matrix, vocab, hidden, first_token }))
    }

    fn block(&self, index: usize) -> Result<BlockOnDevice<B>> {
        let block = self.model.config.blocks[index];
        Ok(BlockOnDevice { attention: self.attention(index, block)?, ffn: self.ffn(index, block)? })
    }

    fn attention(&self, index: usize, block: Block) -> Result<AttentionOnDevice<B>> {
        if !self.part.has_attention(index) {
            return Ok(AttentionOnDevice::None);
        }
        let (dims, first) = (self.model.config.dims, self.is_first_rank());
        let kv_heads = match block.attention {
            Attention::Gqa { kv_heads } => kv_heads,
            Attention::Linear | Attention::None => 0,
        };
        let all = || (0..dims.heads, 0..kv_heads);
        let sharing = self.sharing.of(index).attention;
        Ok(match (block.attention, self.place.attention(block.attention, dims, sharing)) {
            (Attention::None, _) | (_, AttentionShard::None) => AttentionOnDevice::None,
            (_, AttentionShard::FirstRank) if !first => AttentionOnDevice::Elsewhere,
            (Attention::Gqa { .. }, AttentionShard::Heads { query, kv }) if self.place.num_ranks > 1 => {
                let has_heads = !query.is_empty();
                let heads = (query, kv);
                AttentionOnDevice::Heads(
                    has_heads.then(|| self.gqa(block.slot, kv_heads, heads, self.num_pages)).transpose()?,
                )
            }
            (Attention::Gqa { .. }, AttentionShard::Sequences) => {
                let own_pages = self.place.own_pages(self.num_pages);
                AttentionOnDevice::Sequences(self.gqa(block.slot, kv_heads, all(), own_pages)?)
            }
            (Attention::Gqa { .. }, _) => {
                AttentionOnDevice::Gqa(self.gqa(block.slot, kv_heads, all(), self.num_pages)?)
            }
            (Attention::Linear, shard) => {
                let (is_part, rows) = match shard {
                    AttentionShard::Columns(rows) => (self.place.num_ranks > 1, rows),
                    _ => (false, 0..dims.hidden),
                };
                let linear = self.linear(block.slot, "input_layernorm", "self_attn.linear_attn", rows)?;
                match is_part {
                    true => AttentionOnDevice::LinearColumns(linear),
                    false => AttentionOnDevice::Linear(linear),
                }
            }
        })
    }

    /// Some heads, `(query, kv)`, of an attention of `kv_heads`, with keys and values of so many pages.
    fn gqa(
        &self,
        slot: usize,
        kv_heads: usize,
        (query, kv): (Range<usize>, Range<usize>),
        num_pages: usize,
    ) -> Result<Gqa<B>> {
        let dims = self.model.config.dims;
        let of_heads = |heads: &Range<usize>| heads.start * dims.head_dim..heads.end * dims.head_dim;
        let (hidden, q_rows, kv_rows) = (dims.hidden, dims.heads * dims.head_dim, kv_heads * dims.head_dim);
        let matrix = |part: &str, wanted| self.matrix(&slot_tensor(slot, part), wanted);
        let q = of_heads(&query);
        Ok(Gqa {
            norm: self.vector(&slot_tensor(slot, "input_layernorm"))?,
            q: matrix("self_attn.q_proj", Wanted::rows(q.clone(), [q_rows, hidden]))?,
            k: matrix("self_attn.k_proj", Wanted::rows(of_heads(&kv), [kv_rows, hidden]))?,
            v: matrix("self_attn.v_proj", Wanted::rows(of_heads(&kv), [kv_rows, hidden]))?,
            o: matrix("self_attn.o_proj", Wanted::cols(q, [hidden, q_rows]))?,
            cache: self.backend.kv_cache(num_pages, kv.len(), dims.head_dim)?,
        })
    }

    fn linear(&self, slot: usize, norm: &str, part: &str, rows: Range<usize>) -> Result<Linear<B>> {
        let hidden = self.model.config.dims.hidden;
        Ok(Linear {
            norm: self.vector(&slot_tensor(slot, norm))?,
            matrix: self.matrix(&slot_tensor(slot, part), Wanted::rows(rows, [hidden, hidden]))?,
        })
    }

    fn ffn(&self, index: usize, block: Block) -> Result<FfnOnDevice<B>> {
        let width = match block.ffn {
            Ffn::SwiGlu { width } => width,
            Ffn::Linear | Ffn::None => 0,
        };
        let columns = self.part.columns(index, width);
        let cut = Cut { goes_on: columns.start > 0, is_open: columns.end < width };
        let is_shared = self.place.num_ranks > 1;
        let (dims, sharing) = (self.model.config.dims, self.sharing.of(index).ffn);
        Ok(match (block.ffn, self.place.ffn(block.ffn, dims, columns, sharing)) {
            (Ffn::None, _) | (_, FfnShard::None) => FfnOnDevice::None,
            (_, FfnShard::FirstRank(_)) if !self.is_first_rank() => FfnOnDevice::Elsewhere,
            (Ffn::SwiGlu { .. }, FfnShard::Inner(columns)) if is_shared => {
                FfnOnDevice::Inner(self.swiglu(block.slot, width, columns)?, cut)
            }
            (
                Ffn::SwiGlu { .. },
                FfnShard::Inner(columns) | FfnShard::FirstRank(columns) | FfnShard::Columns(columns),
            ) => FfnOnDevice::SwiGlu(self.swiglu(block.slot, width, columns)?, cut),
            (Ffn::Linear, FfnShard::Inner(rows) | FfnShard::FirstRank(rows) | FfnShard::Columns(rows)) => {
                let is_part = rows.len() < dims.hidden;
                let linear = self.linear(block.slot, "post_attention_layernorm", "mlp.linear_mlp", rows)?;
                match is_part {
                    true => FfnOnDevice::LinearColumns(linear),
                    false => FfnOnDevice::Linear(linear),
                }
            }
        })
    }

    fn swiglu(&self, slot: usize, width: usize, columns: Range<usize>) -> Result<SwiGlu<B>> {
        let hidden = self.model.config.dims.hidden;
        let matrix = |part: &str, wanted| self.matrix(&slot_tensor(slot, part), wanted);
        Ok(SwiGlu {
            norm: self.vector(&slot_tensor(slot, "post_attention_layernorm"))?,
            gate: matrix("mlp.gate_proj", Wanted::rows(columns.clone(), [width, hidden]))?,
            up: matrix("mlp.up_proj", Wanted::rows(columns.clone(), [width, hidden]))?,
            down: matrix("mlp.down_proj", Wanted::cols(columns, [hidden, width]))?,
        })
    }
}
