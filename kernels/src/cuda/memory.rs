//! What things take of a GPU's memory, to be known before anything is put there; and what a step works in, made before the first.

use super::attention::{AttentionKernels, Plan};
use super::choices::ChoiceWork;
use super::cublaslt::WORKSPACE_BYTES;
use super::draws::CudaDraws;
use super::graphs;
use super::operations::swiglu_columns;
use super::stream::Memory;
use super::tables::Tables;
use super::{Cuda, Workspace, locked};
use crate::backend::WorkSize;
use crate::error::Result;

/// Memory as the driver hands it out. Small pieces share a block of 2 MiB, larger ones are whole blocks. NVIDIA
/// promises neither; it is what every driver for 8.0 and later does.
pub fn cuda_allocated_bytes(bytes: u64) -> u64 {
    let granule = if bytes < SMALL_BYTES { PIECE_BYTES } else { BLOCK_BYTES };
    bytes.max(1).next_multiple_of(granule)
}

/// Memory that operations keep for themselves, for steps of up to this size. Where bits may depend on the batch, contexts are
/// split over a GPU's multiprocessors, of which there are so many, and cuBLASLt has a workspace.
pub fn cuda_work_bytes(size: &WorkSize, multiprocessors: Option<usize>) -> u64 {
    let Bytes { gate, product, stats, draws, choices, tables, partials, parcel } =
        Bytes::of(size, Cuda::FFN_COLUMNS, multiprocessors);
    let pieces =
        [gate, gate, product, stats, draws, draws].into_iter().chain(choices).chain(tables).chain(partials);
    let parcels = std::iter::repeat_n(parcel, size.parcels + size.arrivals);
    let library = multiprocessors.map(|_| WORKSPACE_BYTES);
    pieces
        .chain(parcels)
        .chain(library)
        .filter(|&bytes| bytes > 0)
        .map(|bytes| cuda_allocated_bytes(bytes as u64))
        .sum()
}

const PIECE_BYTES: u64 = 512;
const SMALL_BYTES: u64 = 1 << 20;
const BLOCK_BYTES: u64 = 2 << 20;

/// Bytes of each piece that operations keep.
struct Bytes {
    /// A product of a SwiGLU, of which there are two.
    gate: usize,
    /// A product that is summed apart.
    product: usize,
    stats: usize,
    /// Tokens that a step draws, which are kept for two of them.
    draws: usize,
    choices: [usize; 4],
    tables: [usize; 7],
    /// Of parts of contexts the sums of weights times values, the largest scores, and the sums of weights.
    partials: [usize; 3],
    /// An array that waits for the next stage.
    parcel: usize,
}

impl Bytes {
    fn of(size: &WorkSize, ffn_columns: usize, multiprocessors: Option<usize>) -> Bytes {
        let WorkSize { rows, hidden, ffn, logit_rows, choice_rows, vocab, .. } = *size;
        let split = multiprocessors.filter(|_| size.kv_heads > 0);
        // Those that decode, as a graph pads them.
        let alone = graphs::padded(rows.min(size.sequences)).min(rows);
        let partials = split.map_or(0, |over| Plan::most_partials(alone, size.kv_heads, over));
        // With more rows at once fewer columns are, by whole 64: the most is not always that of the most rows.
        let gate = |rows: usize| rows * swiglu_columns(rows, ffn, ffn_columns);
        Bytes {
            gate: (1..=rows).map(gate).max().unwrap_or(0) * size_of::<f32>(),
            product: if ffn > ffn_columns { rows * hidden * size_of::<f32>() } else { 0 },
            stats: logit_rows * size_of::<[u32; 3]>(),
            // A scored prompt asks for all of its rows.
            draws: if logit_rows > 0 { CudaDraws::bytes(rows) } else { 0 },
            choices: ChoiceWork::bytes(choice_rows, vocab),
            tables: Tables::words(size).map(|words| words * size_of::<u32>()),
            partials: [AttentionKernels::padded(size.head_dim), 1, 1]
                .map(|numbers| partials * numbers * size_of::<f32>()),
            parcel: rows * hidden * size_of::<f32>(),
        }
    }
}

impl Cuda {
    /// Makes the memory that operations keep, for steps of up to this size, and frees what was for loading alone.
    pub(super) fn make_room(&self, size: &WorkSize) -> Result<()> {
        const OP: &str = "work of a step";
        *locked(&self.staging) = None;
        *locked(&self.source) = Memory::none(&self.stream);
        let may_split = !self.options.is_deterministic;
        let multiprocessors = may_split.then_some(self.gpu.multiprocessors as usize);
        let Bytes { gate, product, stats: stat_bytes, partials, parcel, .. } =
            Bytes::of(size, self.options.ffn_columns, multiprocessors);
        let mut workspace = locked(&self.workspace);
        let Workspace { gate: gates, up, partial, maxima, sums, stats, choices, .. } = &mut *workspace;
        gates.reserve(OP, gate)?;
        up.reserve(OP, gate)?;
        stats.reserve(OP, stat_bytes)?;
        choices.reserve(size.choice_rows, size.vocab)?;
        if self.library.is_none() {
            locked(&self.product).reserve(OP, product)?;
        }
        [partial, maxima, sums]
            .into_iter()
            .zip(partials)
            .try_for_each(|(memory, bytes)| memory.reserve(OP, bytes))?;
        let sent = ChoiceWork::sent_bytes(size.logit_rows, size.choice_rows, size.vocab);
        locked(&self.tables).reserve(&self.stream, size, sent)?;
        self.parcels.reserve(&self.stream, size.parcels, parcel)?;
        self.arrived.reserve(&self.arrivals, size.arrivals, parcel)?;
        locked(&self.graphs).begin(if self.options.has_graphs { size.rows } else { 0 });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::attention::PlanShape;
    use super::*;
    use crate::backend::AttentionSlice;

    #[test]
    fn large_pieces_are_whole_blocks() {
        assert_eq!([0, 1, 513, 1 << 20].map(cuda_allocated_bytes), [512, 512, 1024, 2 << 20]);
        assert_eq!(cuda_allocated_bytes((2 << 20) + 1), 4 << 20);
    }

    #[test]
    fn a_swiglu_takes_most_where_its_columns_are_just_not_cut() {
        let gate = |rows, ffn| {
            Bytes::of(&WorkSize { rows, ffn, ..WorkSize::default() }, Cuda::FFN_COLUMNS, None).gate
        };
        // 512 rows of Ultra's widest FFN: products of 53,248 columns, 52 blocks each.
        assert_eq!(gate(512, 425_984), 52 * (2 << 20));
        // 630 rows have all 53,248 columns at once, and 3,000 have 11,136, which is less in all.
        assert_eq!(gate(630, 425_984), 630 * 53_248 * 4);
        assert!(gate(3000, 425_984) >= gate(630, 425_984));
        assert!(3000 * swiglu_columns(3000, 425_984, Cuda::FFN_COLUMNS) * 4 < gate(630, 425_984));
        assert_eq!(gate(3000, 0), 0);
    }

    #[test]
    fn parts_of_contexts_have_room_for_the_rows_that_pad_a_step() {
        let (rows, kv_heads) = (512, 8);
        let pages: Vec<u32> = (0..300).collect();
        for sequences in 57..=64 {
            let size = WorkSize { rows, sequences, kv_heads, head_dim: 128, ..WorkSize::default() };
            let slice = |first_row| AttentionSlice {
                first_row,
                num_rows: 1,
                first_position: 64 * 300 - 1,
                pages: pages.clone(),
            };
            let slices: Vec<AttentionSlice> = (0..sequences).map(slice).collect();
            let shape = PlanShape { group: 16, kv_heads, multiprocessors: Some(132) };
            let plan = Plan::new(&slices, graphs::padded(sequences) - sequences, shape);
            let [_, maxima, _] = Bytes::of(&size, Cuda::FFN_COLUMNS, Some(132)).partials;
            assert!(plan.num_partials(kv_heads) * size_of::<f32>() <= maxima, "{sequences} sequences");
        }
    }

    #[test]
    fn parts_of_contexts_take_memory_where_they_are_split() {
        let size = WorkSize {
            rows: 512,
            sequences: 256,
            context_tokens: 4096,
            kv_heads: 8,
            head_dim: 128,
            ..WorkSize::default()
        };
        // 132 multiprocessors have 528 parts beside one for each of 256 rows' 8 heads, of 16 query heads and 128 numbers each.
        let found = cuda_work_bytes(&size, Some(132)) - cuda_work_bytes(&size, None);
        let parts = (528 + 256 * 8) * 16 * 4;
        let partials: u64 = [128 * parts, parts, parts].map(cuda_allocated_bytes).iter().sum();
        assert_eq!(found, partials + WORKSPACE_BYTES as u64);
        assert_eq!(Bytes::of(&size, Cuda::FFN_COLUMNS, None).partials, [0; 3]);
    }
}
