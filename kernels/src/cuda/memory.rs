//! What things take of a GPU's memory, to be known before anything is put there; and what a step works in, made before the first.

use super::attention::{AttentionKernels, Plan};
use super::choices::ChoiceWork;
use super::draws::CudaDraws;
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

/// Memory that operations keep for themselves, for steps of up to this size. Parts of contexts that are split, where
/// bits may depend on the batch, come on top: for 256 rows of 8 KV heads of 128 on 132 multiprocessors 21 MB.
pub fn cuda_work_bytes(size: &WorkSize) -> u64 {
    let Bytes { gate, product, stats, draws, choices, tables, parcel } = Bytes::of(size, Cuda::FFN_COLUMNS);
    let pieces = [gate, gate, product, stats, draws, draws].into_iter().chain(choices).chain(tables);
    let parcels = std::iter::repeat_n(parcel, size.parcels + size.arrivals);
    pieces.chain(parcels).filter(|&bytes| bytes > 0).map(|bytes| cuda_allocated_bytes(bytes as u64)).sum()
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
    choices: [usize; 2],
    tables: [usize; 7],
    /// An array that waits for the next stage.
    parcel: usize,
}

impl Bytes {
    fn of(size: &WorkSize, ffn_columns: usize) -> Bytes {
        let WorkSize { rows, hidden, ffn, logit_rows, choice_rows, .. } = *size;
        // With more rows at once fewer columns are, by whole 64: the most is not always that of the most rows.
        let gate = |rows: usize| rows * swiglu_columns(rows, ffn, ffn_columns);
        Bytes {
            gate: (1..=rows).map(gate).max().unwrap_or(0) * size_of::<f32>(),
            product: if ffn > ffn_columns { rows * hidden * size_of::<f32>() } else { 0 },
            stats: logit_rows * size_of::<[u32; 3]>(),
            draws: CudaDraws::bytes(logit_rows),
            choices: ChoiceWork::bytes(choice_rows),
            tables: Tables::words(size).map(|words| words * size_of::<u32>()),
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
        let Bytes { gate, product, stats: stat_bytes, parcel, .. } =
            Bytes::of(size, self.options.ffn_columns);
        let mut workspace = locked(&self.workspace);
        let Workspace { gate: gates, up, partial, maxima, sums, stats, choices, .. } = &mut *workspace;
        gates.reserve(OP, gate)?;
        up.reserve(OP, gate)?;
        stats.reserve(OP, stat_bytes)?;
        choices.reserve(size.choice_rows)?;
        if self.library.is_none() {
            locked(&self.product).reserve(OP, product)?;
        }
        if !self.options.is_deterministic && size.kv_heads > 0 {
            let rows = size.rows.min(size.sequences);
            let multiprocessors = self.gpu.multiprocessors as usize;
            let partials = Plan::most_partials(rows, size.kv_heads, multiprocessors);
            let padded = AttentionKernels::padded(size.head_dim);
            partial.reserve(OP, partials * padded * size_of::<f32>())?;
            maxima.reserve(OP, partials * size_of::<f32>())?;
            sums.reserve(OP, partials * size_of::<f32>())?;
        }
        let [asked, _] = ChoiceWork::bytes(size.logit_rows);
        locked(&self.tables).reserve(&self.stream, size, asked)?;
        self.parcels.reserve(&self.stream, size.parcels, parcel)?;
        self.arrived.reserve(&self.arrivals, size.arrivals, parcel)?;
        locked(&self.graphs).begin(if self.options.has_graphs { size.rows } else { 0 });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_pieces_are_whole_blocks() {
        assert_eq!([0, 1, 513, 1 << 20].map(cuda_allocated_bytes), [512, 512, 1024, 2 << 20]);
        assert_eq!(cuda_allocated_bytes((2 << 20) + 1), 4 << 20);
    }

    #[test]
    fn a_swiglu_takes_most_where_its_columns_are_just_not_cut() {
        let gate =
            |rows, ffn| Bytes::of(&WorkSize { rows, ffn, ..WorkSize::default() }, Cuda::FFN_COLUMNS).gate;
        // 512 rows of Ultra's widest FFN: products of 53,248 columns, 52 blocks each.
        assert_eq!(gate(512, 425_984), 52 * (2 << 20));
        // 630 rows have all 53,248 columns at once, and 3,000 have 11,136, which is less in all.
        assert_eq!(gate(630, 425_984), 630 * 53_248 * 4);
        assert!(gate(3000, 425_984) >= gate(630, 425_984));
        assert!(3000 * swiglu_columns(3000, 425_984, Cuda::FFN_COLUMNS) * 4 < gate(630, 425_984));
        assert_eq!(gate(3000, 0), 0);
    }
}
