//! What a part of a model takes of a GPU's memory: arithmetic of shapes alone, so that it is known before anything is loaded.

use kernels::{
    CudaKvCache, CudaMatrix, KvDtype, PAGE_TOKENS, WeightType, cuda_allocated_bytes, cuda_sum_bytes,
    cuda_work_bytes,
};

use crate::block::{Attention, Block, Dims, Ffn};
use crate::config::ModelConfig;
use crate::head::LOGIT_ROWS;
use crate::part::Part;
use crate::shard::{AttentionShard, FfnShard, RankPlace};
use crate::sharing::Sharing;
use crate::stage::Dtypes;
use crate::work_shapes::WorkShapes;

/// The largest step that a stage must be ready for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepSize {
    /// Tokens of a micro-batch.
    pub rows: usize,
    /// Sequences of one, each of which may draw a token.
    pub sequences: usize,
    /// Positions of a sequence.
    pub context_tokens: usize,
    /// Micro-batches in flight, all of which may wait for the next stage.
    pub micro_batches: usize,
    /// Micro-batches that may wait for this stage on its own device: all in flight where stages are processes; else the next
    /// one, which comes from another GPU while one is computed, and none behind a stage of the same GPU.
    pub arrivals: usize,
}

impl StepSize {
    /// Rows of logits: all greedy rows at once, the others by and by; a scored prompt has more rows than sequences.
    pub(crate) fn drawn_rows(&self) -> usize {
        self.sequences.min(self.rows).max(LOGIT_ROWS.min(self.rows))
    }
}

/// What a stage takes of a GPU, or several stages together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GpuMemory {
    /// Weights and tables.
    pub weight_bytes: u64,
    /// What a step works in.
    pub work_bytes: u64,
    /// A page of keys and values, in all attention together; where ranks share out sequences this one's part of that, as of as many
    /// pages as there are ranks it has one.
    pub page_bytes: u64,
    /// Attention blocks, each with a cache of its own.
    pub num_caches: u64,
}

impl GpuMemory {
    /// That of a part, or of a rank's shard of it. Where bits may depend on the batch, contexts are split over the GPU's
    /// multiprocessors, of which there are so many.
    pub fn of(
        config: &ModelConfig,
        part: Part,
        (place, sharing): (RankPlace, &Sharing),
        Dtypes { weights, kv }: Dtypes,
        (step, multiprocessors): (StepSize, Option<usize>),
    ) -> GpuMemory {
        let dims = config.dims;
        let mut memory = GpuMemory::default();
        for index in part.blocks.range() {
            let (block, sharing) = (config.blocks[index], sharing.of(index));
            if part.has_attention(index) {
                let shard = place.attention(block.attention, dims, sharing.attention);
                memory.add_attention(block, dims, (place, shard), (weights, kv));
            }
            let width = match block.ffn {
                Ffn::SwiGlu { width } => width,
                Ffn::Linear | Ffn::None => 0,
            };
            let shard = place.ffn(block.ffn, dims, part.columns(index, width), sharing.ffn);
            memory.add_ffn(block, dims, (place, shard), weights);
        }
        let is_first = place.rank == 0;
        if part.is_first() && is_first {
            memory.weight_bytes += matrix(dims.vocab, dims.hidden);
        }
        if part.is_last(config) {
            // Where ranks share the output matrix, each has rows of its own, also of a table that is tied.
            let rows = if place.num_ranks > 1 { place.columns(0..dims.vocab) } else { None };
            let is_there = rows.is_none() && config.tied_embeddings && part.is_first();
            let rows = rows.map_or(if is_first && !is_there { dims.vocab } else { 0 }, |rows| rows.len());
            memory.weight_bytes += numbers(1, dims.hidden) + matrix(rows, dims.hidden);
        }
        if memory.num_caches > 0 {
            memory.weight_bytes += 2 * numbers(step.context_tokens, dims.head_dim / 2);
        }
        let shapes = WorkShapes::of(config, part, (place, sharing), step);
        memory.work_bytes = work_bytes(&shapes, weights, multiprocessors);
        if shapes.told > 0 {
            memory.work_bytes += cuda_sum_bytes(shapes.told, place.num_ranks);
        }
        memory
    }

    fn add_attention(
        &mut self,
        block: Block,
        dims: Dims,
        (place, shard): (RankPlace, AttentionShard),
        (weights, kv_dtype): (WeightType, KvDtype),
    ) {
        let matrix = |rows, cols| cuda_allocated_bytes(CudaMatrix::bytes_in(weights, rows, cols));
        let Dims { hidden, heads, head_dim, .. } = dims;
        let by_sequences = shard == AttentionShard::Sequences;
        self.weight_bytes += match (block.attention, shard) {
            (Attention::None, _) | (_, AttentionShard::None) => 0,
            (_, AttentionShard::FirstRank) if place.rank > 0 => 0,
            (Attention::Gqa { kv_heads }, shard) => {
                let (heads, kv_heads) = match shard {
                    AttentionShard::Heads { query, kv } => (query.len(), kv.len()),
                    _ => (heads, kv_heads),
                };
                let (query, kv) = (heads * head_dim, kv_heads * head_dim);
                let page_bytes = CudaKvCache::page_bytes(kv_dtype, kv_heads, head_dim) as u64;
                self.page_bytes += match by_sequences {
                    // Rounded up for each token, as a plan's costs are.
                    true => {
                        PAGE_TOKENS as u64
                            * (page_bytes / PAGE_TOKENS as u64).div_ceil(place.num_ranks as u64)
                    }
                    false => page_bytes,
                };
                self.num_caches += 1;
                numbers(1, hidden) + matrix(query, hidden) + 2 * matrix(kv, hidden) + matrix(hidden, query)
            }
            (Attention::Linear, AttentionShard::Columns(rows)) => {
                numbers(1, hidden) + matrix(rows.len(), hidden)
            }
            (Attention::Linear, _) => numbers(1, hidden) + matrix(hidden, hidden),
        };
    }

    fn add_ffn(
        &mut self,
        block: Block,
        dims: Dims,
        (place, shard): (RankPlace, FfnShard),
        weights: WeightType,
    ) {
        let matrix = |rows, cols| cuda_allocated_bytes(CudaMatrix::bytes_in(weights, rows, cols));
        let hidden = dims.hidden;
        let columns = match shard {
            FfnShard::FirstRank(_) if place.rank > 0 => return,
            FfnShard::Inner(columns) | FfnShard::Columns(columns) | FfnShard::FirstRank(columns) => {
                columns.len()
            }
            FfnShard::None => return,
        };
        self.weight_bytes += match block.ffn {
            Ffn::SwiGlu { .. } => numbers(1, hidden) + 2 * matrix(columns, hidden) + matrix(hidden, columns),
            Ffn::Linear => numbers(1, hidden) + matrix(columns, hidden),
            Ffn::None => 0,
        };
    }

    /// All of it with so many pages.
    pub fn with_pages(&self, num_pages: usize) -> u64 {
        // A cache is one piece of memory, which is rounded up.
        let rounding = self.num_caches * cuda_allocated_bytes(ROUNDED_UP);
        let pages = self.page_bytes.saturating_mul(num_pages as u64).saturating_add(rounding);
        (self.weight_bytes + self.work_bytes).saturating_add(pages)
    }

    /// Pages that so many bytes have room for beside all else; without attention as many as there may be.
    pub fn pages_in(&self, free_bytes: u64) -> usize {
        let left = free_bytes.saturating_sub(self.with_pages(0));
        left.checked_div(self.page_bytes).map_or(usize::MAX, |pages| pages as usize)
    }
}

/// What is so large is handed out in whole blocks, of which it leaves less than one empty.
const ROUNDED_UP: u64 = 1 << 20;

impl std::ops::AddAssign for GpuMemory {
    fn add_assign(&mut self, other: GpuMemory) {
        self.weight_bytes += other.weight_bytes;
        self.work_bytes += other.work_bytes;
        self.page_bytes += other.page_bytes;
        self.num_caches += other.num_caches;
    }
}

/// The arrays of `span::Work` and `head::HeadWork`, and what operations keep.
fn work_bytes(shapes: &WorkShapes, weights: WeightType, multiprocessors: Option<usize>) -> u64 {
    let numbers = |[rows, cols]: [usize; 2]| if rows * cols == 0 { 0 } else { numbers(rows, cols) };
    let operand = |[rows, cols]: [usize; 2]| {
        if rows * cols == 0 { 0 } else { matrix(rows, cols) + codes(weights, rows, cols) }
    };
    let WorkShapes { x, normed, q, kv, inner, added, gathered, own_rows, sums, .. } = *shapes;
    let WorkShapes { head_rows, head_normed, logits, logit_part, .. } = *shapes;
    let mut sum = 0;
    sum += [x, q, kv, kv, added, gathered, own_rows, sums].map(numbers).iter().sum::<u64>();
    sum += [head_rows, logits, logit_part].map(numbers).iter().sum::<u64>();
    sum += [normed, inner, head_normed].map(operand).iter().sum::<u64>();
    sum + cuda_work_bytes(&shapes.kept, multiprocessors)
}

/// f32 numbers of some rows and columns.
fn numbers(rows: usize, cols: usize) -> u64 {
    cuda_allocated_bytes((rows * cols * size_of::<f32>()) as u64)
}

/// What an operand has beside its bf16, where products are of narrower numbers: the same in those, and scales.
fn codes(weights: WeightType, rows: usize, cols: usize) -> u64 {
    match weights {
        WeightType::Fp8 => cuda_allocated_bytes(CudaMatrix::bytes_in(weights, rows, cols)),
        _ => 0,
    }
}

/// A matrix, or an operand, of bf16.
fn matrix(rows: usize, cols: usize) -> u64 {
    cuda_allocated_bytes(CudaMatrix::bytes_of(rows, cols))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use scheduler::Span;

    use super::*;

    const STEP: StepSize =
        StepSize { rows: 512, sequences: 256, context_tokens: 4096, micro_batches: 3, arrivals: 0 };

    fn config(name: &str) -> ModelConfig {
        ModelConfig::read(&Path::new("../configs/models").join(name)).unwrap()
    }

    const BF16: Dtypes = Dtypes { weights: WeightType::Bf16, kv: KvDtype::Bf16 };

    fn of_rank(config: &ModelConfig, start: usize, end: usize, place: RankPlace) -> GpuMemory {
        let part = Span { start, end }.into();
        GpuMemory::of(config, part, (place, &Sharing::default()), BF16, (STEP, None))
    }

    fn of(config: &ModelConfig, start: usize, end: usize) -> GpuMemory {
        of_rank(config, start, end, RankPlace::ALONE)
    }

    #[test]
    fn an_eighth_of_ultra_takes_what_its_blocks_say() {
        let config = config("Llama-3_1-Nemotron-Ultra-253B-v1");
        let memory = of(&config, 0, 16);
        let dims = config.dims;
        let params: u64 = config.blocks[..16].iter().map(|block| block.params(dims)).sum();
        let bytes = 2 * (params + (dims.vocab * dims.hidden) as u64);
        // Rounding takes half a block for each of a block's seven matrices, and f32 norms and angles are few.
        assert!((bytes..bytes + 16 * 7 * (2 << 20)).contains(&memory.weight_bytes), "{memory:?}");
        let caches =
            config.blocks[..16].iter().filter(|block| matches!(block.attention, Attention::Gqa { .. }));
        assert_eq!(memory.num_caches, caches.count() as u64);
        // Keys and values of 8 heads of 128 in bf16.
        assert_eq!(memory.page_bytes, memory.num_caches * 64 * 2 * 8 * 128 * 2);
    }

    #[test]
    fn stages_take_together_what_the_whole_takes_and_the_sums_between_them() {
        let config = config("Llama-3_3-Nemotron-Super-49B-v1");
        let whole = of(&config, 0, config.blocks.len());
        let (front, back) = (of(&config, 0, 30), of(&config, 30, config.blocks.len()));
        let angles = 2 * numbers(STEP.context_tokens, config.dims.head_dim / 2);
        assert_eq!(front.weight_bytes + back.weight_bytes, whole.weight_bytes + angles);
        assert_eq!(front.page_bytes + back.page_bytes, whole.page_bytes);
        assert!(front.work_bytes < whole.work_bytes && back.work_bytes <= whole.work_bytes);
    }

    #[test]
    fn stages_in_processes_have_room_for_what_comes_in() {
        let config = config("Llama-3_3-Nemotron-Super-49B-v1");
        let apart = StepSize { arrivals: STEP.micro_batches, ..STEP };
        let work = |start, end, place: RankPlace, step| {
            let part = Span { start, end }.into();
            GpuMemory::of(&config, part, (place, &Sharing::default()), BF16, (step, None)).work_bytes
        };
        let array = numbers(STEP.rows, config.dims.hidden);
        for (start, end, place, arrivals) in [
            (0, 30, RankPlace::ALONE, 0),
            (30, 40, RankPlace::ALONE, 3),
            (30, 40, RankPlace { rank: 0, num_ranks: 2 }, 3),
            (30, 40, RankPlace { rank: 1, num_ranks: 2 }, 0),
        ] {
            let more = work(start, end, place, apart) - work(start, end, place, STEP);
            assert_eq!(more, arrivals * array, "[{start}, {end}) {place:?}");
        }
    }

    #[test]
    fn ranks_share_weights_and_pages_out() {
        let config = config("Llama-3_1-Nemotron-Ultra-253B-v1");
        let whole = of(&config, 16, 40);
        let ranks: Vec<GpuMemory> =
            (0..2).map(|rank| of_rank(&config, 16, 40, RankPlace { rank, num_ranks: 2 })).collect();
        // Norms and angles are on both, and there are twice as many matrices to round.
        let weights: u64 = ranks.iter().map(|rank| rank.weight_bytes).sum();
        assert!(
            (whole.weight_bytes..whole.weight_bytes + 24 * 9 * (2 << 20)).contains(&weights),
            "{ranks:?}"
        );
        assert_eq!(ranks.iter().map(|rank| rank.page_bytes).sum::<u64>(), whole.page_bytes);
    }

    #[test]
    fn a_gpu_has_room_for_twice_the_tokens_in_fp8() {
        let config = config("Llama-3_3-Nemotron-Super-49B-v1");
        let part: Part = Span { start: 0, end: config.blocks.len() }.into();
        let pages = |kv| {
            let place = (RankPlace::ALONE, &Sharing::default());
            GpuMemory::of(&config, part, place, Dtypes { kv, ..BF16 }, (STEP, None)).pages_in(140 << 30)
        };
        let (bf16, fp8) = (pages(KvDtype::Bf16), pages(KvDtype::Fp8));
        // A byte for each head of 128 beside its 128.
        assert_eq!(fp8, bf16 * 256 / 129 + 1, "{bf16} pages in bf16");
    }

    #[test]
    fn pages_take_what_is_left() {
        let memory = GpuMemory { weight_bytes: 1000, work_bytes: 500, page_bytes: 64, num_caches: 1 };
        let free = memory.with_pages(7);
        assert_eq!([free - 1, free, free + 63, free + 64].map(|free| memory.pages_in(free)), [6, 7, 7, 8]);
        assert_eq!(memory.pages_in(0), 0);
        let without = GpuMemory { page_bytes: 0, num_caches: 0, ..memory };
        assert_eq!((without.with_pages(1 << 40), without.pages_in(1500)), (1500, usize::MAX));
    }
}
