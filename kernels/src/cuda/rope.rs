//! Queries and keys that are turned, and keys and values that are written to their pages: each alone, or all in one launch.

use super::arrays::{CudaArray, CudaKvCache, CudaRope};
use super::attention::AttentionKernels;
use super::stream::{Argument, Grid};
use super::{Cuda, flat_grid, locked, u32_of};
use crate::backend::AttentionSlice;
use crate::check;
use crate::error::Result;

/// Threads of a block that appends.
const THREADS: usize = 128;
/// Pairs of a row's queries that a block turns: QUERY_PAIRS of kv_append.cu.
const QUERY_PAIRS: usize = 4 * THREADS;

impl Cuda {
    /// [`crate::Backend::rope`].
    pub(super) fn turn(&self, x: &mut CudaArray, rope: &CudaRope, positions: &[u32]) -> Result<()> {
        const OP: &str = "rope";
        let positions_at = self.positions(OP, x, rope, positions)?;
        let half = rope.head_dim / 2;
        let num_pairs = x.rows * x.cols / 2;
        let arguments = [
            x.memory.start(),
            rope.cos.start(),
            rope.sin.start(),
            positions_at,
            u32_of(x.cols / rope.head_dim),
            u32_of(half),
            Argument::U64(num_pairs as u64),
        ];
        // SAFETY: rows are whole heads, and every position has its angles.
        unsafe { self.stream.launch(OP, &self.kernels.rope, flat_grid(num_pairs), &arguments) }
    }

    /// [`crate::Backend::kv_append`].
    pub(super) fn append(
        &self,
        cache: &mut CudaKvCache,
        k: &CudaArray,
        v: &CudaArray,
        slices: &[AttentionSlice],
    ) -> Result<()> {
        const OP: &str = "kv_append";
        let places_at = self.places(OP, cache, [k, v], slices)?;
        let CudaKvCache { kv_heads, head_dim, .. } = *cache;
        let arguments = [
            cache.memory.start(),
            k.memory.start(),
            v.memory.start(),
            places_at,
            u32_of(kv_heads),
            u32_of(head_dim),
            u32_of(AttentionKernels::padded(head_dim)),
        ];
        let grid = Grid { blocks: [k.rows, kv_heads, 1], threads: THREADS, block_bytes: 0 };
        // SAFETY: every row has a place, on a page of the cache or nowhere; keys and values have the cache's heads.
        unsafe { self.stream.launch(OP, &self.kernels.kv_append, grid, &arguments) }
    }

    /// [`Cuda::turn`] of q and of k and then [`Cuda::append`], to the bit, in one launch; k stays as it was.
    pub(super) fn turn_and_append(
        &self,
        [q, k]: [&mut CudaArray; 2],
        v: &CudaArray,
        (rope, positions): (&CudaRope, &[u32]),
        cache: &mut CudaKvCache,
        slices: &[AttentionSlice],
    ) -> Result<()> {
        const OP: &str = "attend";
        let CudaKvCache { kv_heads, head_dim, .. } = *cache;
        check::shape(OP, "angles' head_dim", [rope.head_dim], [head_dim])?;
        check::shape(OP, "k's rows", [k.rows], [q.rows])?;
        let positions_at = self.positions(OP, q, rope, positions)?;
        let places_at = self.places(OP, cache, [k, v], slices)?;
        let arguments = [
            cache.memory.start(),
            q.memory.start(),
            k.memory.start(),
            v.memory.start(),
            places_at,
            rope.cos.start(),
            rope.sin.start(),
            positions_at,
            u32_of(q.cols / 2),
            u32_of(kv_heads),
            u32_of(head_dim),
            u32_of(AttentionKernels::padded(head_dim)),
        ];
        let blocks = [q.rows, kv_heads + (q.cols / 2).div_ceil(QUERY_PAIRS), 1];
        let grid = Grid { blocks, threads: THREADS, block_bytes: 0 };
        // SAFETY: as of `turn` and of `append`; q has as many rows as k and v, and heads as wide as the cache's.
        unsafe { self.stream.launch(OP, &self.kernels.rope_append, grid, &arguments) }
    }

    /// The table of positions of x's rows, which are whole heads.
    fn positions(
        &self,
        op: &'static str,
        x: &CudaArray,
        rope: &CudaRope,
        positions: &[u32],
    ) -> Result<Argument> {
        let padding = self.padding();
        check::rope_shapes(op, [x.rows - padding, x.cols], rope.head_dim, rope.positions, positions)?;
        locked(&self.tables).put_positions(&self.stream, op, positions, padding)
    }

    /// The table of places of keys and values, which have the cache's heads.
    fn places(
        &self,
        op: &'static str,
        cache: &CudaKvCache,
        [k, v]: [&CudaArray; 2],
        slices: &[AttentionSlice],
    ) -> Result<Argument> {
        check::shape(op, "k's columns", [k.cols], [cache.kv_heads * cache.head_dim])?;
        check::shape(op, "v", [v.rows, v.cols], [k.rows, k.cols])?;
        let padding = self.padding();
        check::slices(op, slices, k.rows - padding, cache.num_pages)?;
        locked(&self.tables).put_places(&self.stream, op, slices, padding)
    }
}
