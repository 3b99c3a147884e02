//! The operations of the contract: what each checks, and which kernels it queues.

use std::ops::Range;

use super::arrays::{CudaArray, CudaKvCache, CudaMatrix, CudaOperand, CudaRope, CudaVector};
use super::attention::{AttentionKernels, DECODE_GROUP, Plan, PlanShape, TILE_QUERIES};
use super::choices::NO_TOKENS;
use super::fp8::Fp8Kernels;
use super::gemm::Onto;
use super::graphs::{Graphs, padded};
use super::nccl::Gate;
use super::parcels::Parcel;
use super::step_times::StepTimes;
use super::stream::{Argument, Grid, Memory};
use super::weights::Origin;
use super::{Cuda, CudaOptions, Workspace, flat_grid, locked, row_grid, u32_of};
use crate::backend::{AttentionSlice, Backend, DecodeStep, LogitStats, PAGE_TOKENS, RopeTable, WorkSize};
use crate::choice::{Choice, ChoiceScratch, Chosen, Edits};
use crate::draws::{Arrival, Drawn, Draws, FedTokens};
use crate::error::{Error, Result};
use crate::random_tensor::RandomTensor;
use crate::tensor_view::TensorView;
use crate::{check, view};

/// Bytes that the two products of a SwiGLU may take: fewer columns are computed at once where there are many rows.
const SWIGLU_BYTES: usize = 256 << 20;

impl Backend for Cuda {
    type Matrix = CudaMatrix;
    type Vector = CudaVector;
    type Rope = CudaRope;
    type Array = CudaArray;
    type Operand = CudaOperand;
    type KvCache = CudaKvCache;

    fn numeric_profile(&self) -> String {
        let CudaOptions { weights, kv, is_deterministic, .. } = &self.options;
        let architecture = self.gpu.architecture();
        let fixed = if *is_deterministic { " deterministic" } else { "" };
        let library = self.library.as_ref().map_or(String::new(), |library| format!(" {}", library.name()));
        format!("cuda {architecture} {} kv {}{fixed}{library}", weights.name(), kv.name())
    }

    fn matrix(&self, view: TensorView<'_>) -> Result<CudaMatrix> {
        check::view("matrix", &view)?;
        self.weights(Origin::Host(view))
    }

    fn random_matrix(&self, random: RandomTensor) -> Result<CudaMatrix> {
        self.weights(Origin::Random(random))
    }

    fn random_table(&self, random: RandomTensor) -> Result<CudaMatrix> {
        self.plain_table(Origin::Random(random))
    }

    fn table(&self, view: TensorView<'_>) -> Result<CudaMatrix> {
        check::view("table", &view)?;
        self.plain_table(Origin::Host(view))
    }

    fn vector(&self, view: TensorView<'_>) -> Result<CudaVector> {
        let values = view::widen("vector", &view)?;
        Ok(CudaVector { len: values.len(), memory: self.numbers("vector", &values)? })
    }

    fn rope_table(&self, table: RopeTable) -> Result<CudaRope> {
        check::rope_table(&table)?;
        let RopeTable { head_dim, cos, sin } = table;
        let positions = cos.len() / (head_dim / 2);
        let [cos, sin] = [cos, sin].map(|angles| self.numbers("rope_table", &angles));
        Ok(CudaRope { head_dim, positions, cos: cos?, sin: sin? })
    }

    fn array(&self) -> CudaArray {
        CudaArray::new(&self.stream)
    }

    fn operand(&self) -> CudaOperand {
        CudaOperand::new(&self.stream)
    }

    fn kv_cache(&self, num_pages: usize, kv_heads: usize, head_dim: usize) -> Result<CudaKvCache> {
        check::kv_cache(num_pages, kv_heads, head_dim)?;
        let overflow = || {
            Error::Unsupported(format!(
                "kv_cache: {num_pages} pages of {kv_heads} heads of {head_dim} overflow"
            ))
        };
        // Places in the cache are counted in 32 bits.
        let places = num_pages.checked_mul(PAGE_TOKENS).filter(|&places| places <= u32::MAX as usize);
        let bytes = places.and_then(|_| {
            num_pages.checked_mul(CudaKvCache::page_bytes(self.options.kv, kv_heads, head_dim))
        });
        let memory = self.stream.allocate("kv_cache", bytes.ok_or_else(overflow)?)?;
        Ok(CudaKvCache { num_pages, kv_heads, head_dim, memory, kernels: self.attention_kernels(head_dim)? })
    }

    fn upload(&self, values: &[f32], rows: usize, cols: usize, out: &mut CudaArray) -> Result<()> {
        check::shape("upload", "values", [values.len()], [rows * cols])?;
        out.reshape(rows, cols)?;
        self.stream.upload("upload", bytemuck::cast_slice(values), &mut out.memory, 0)
    }

    fn zeros(&self, rows: usize, cols: usize, out: &mut CudaArray) -> Result<()> {
        out.reshape(rows, cols)?;
        self.stream.clear("zeros", &mut out.memory)
    }

    fn download(&self, x: &CudaArray, out: &mut Vec<f32>) -> Result<()> {
        out.resize(x.rows * x.cols, 0.0);
        self.stream.download("download", &x.memory, out)
    }

    fn reserve(&self, array: &mut CudaArray, rows: usize, cols: usize) -> Result<()> {
        array.reserve(rows, cols)
    }

    fn reserve_operand(&self, operand: &mut CudaOperand, rows: usize, cols: usize) -> Result<()> {
        operand.reserve(rows, cols, self.fp8.is_some())
    }

    fn reserve_work(&self, size: &WorkSize) -> Result<()> {
        self.make_room(size)
    }

    fn free_workspace(&self) {
        *locked(&self.workspace) = Workspace::new(&self.stream);
        *locked(&self.product) = Memory::none(&self.stream);
        *locked(&self.source) = Memory::none(&self.stream);
        self.parcels.clear();
        // Arrays have no room beyond their rows any more.
        *locked(&self.graphs) = Graphs::default();
    }

    fn hand_over(&self, x: &CudaArray) -> Result<Option<Parcel>> {
        self.pack(x).map(Some)
    }

    fn take_over(&self, parcel: &Parcel, out: &mut CudaArray) -> Result<()> {
        self.unpack(parcel, out)
    }

    fn gate(&self) -> Option<Gate> {
        Some(self.open_gate())
    }

    fn padded_rows(&self, rows: usize) -> usize {
        locked(&self.graphs).padded_rows(rows)
    }

    fn padding_of(&self, rows: usize) -> usize {
        if self.options.has_graphs { padded(rows) } else { rows }
    }

    fn resize(&self, array: &mut CudaArray, rows: usize, cols: usize) -> Result<()> {
        array.reshape(rows, cols)
    }

    fn repeat<E: From<Error>>(
        &self,
        step: &DecodeStep<'_>,
        work: impl FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        self.repeat_step(step, work)
    }

    fn works_beside_host(&self) -> bool {
        true
    }

    fn begin_step(&self) -> Result<StepTimes> {
        StepTimes::begin(&self.stream)
    }

    fn end_step(&self, times: &StepTimes) -> Result<()> {
        times.end()
    }

    fn embed(&self, table: &CudaMatrix, tokens: &[u32], out: &mut CudaArray) -> Result<()> {
        const OP: &str = "embed";
        check::all_below(OP, "token", tokens, table.rows)?;
        self.embed_words(table, tokens, NO_TOKENS, out)
    }

    fn embed_fed(&self, table: &CudaMatrix, fed: FedTokens<'_>, out: &mut CudaArray) -> Result<()> {
        self.embed_with(table, fed, out)
    }

    fn rms_norm(&self, x: &CudaArray, weight: &CudaVector, eps: f32, out: &mut CudaOperand) -> Result<()> {
        const OP: &str = "rms_norm";
        check::shape(OP, "weight", [weight.len], [x.cols])?;
        out.reshape(x.rows, x.cols)?;
        let arguments = [
            out.memory.start(),
            x.memory.start(),
            weight.memory.start(),
            Argument::F32(eps),
            u32_of(x.cols),
            u32_of(out.stride()),
        ];
        let grid = row_grid(x.rows, 256);
        let Some(Fp8Kernels { rms_norm, .. }) = &self.fp8 else {
            // SAFETY: the weight is as long as rows are wide, and out has as many rows, padded.
            return unsafe { self.stream.launch(OP, &self.kernels.rms_norm, grid, &arguments) };
        };
        let arguments = [&arguments[..], &out.codes_with_room()?].concat();
        // SAFETY: as above, and there is room for the codes.
        unsafe { self.stream.launch(OP, rms_norm, grid, &arguments) }
    }

    fn matmul(&self, x: &CudaOperand, w: &CudaMatrix, out: &mut CudaArray) -> Result<()> {
        check::shape("matmul", "x's columns", [x.cols], [w.cols])?;
        out.reshape(x.rows, w.rows)?;
        self.multiply_all("matmul", x, w, out, Onto::Nothing)
    }

    fn matmul_in_pieces<E: From<Error>>(
        &self,
        x: &CudaOperand,
        w: &CudaMatrix,
        out: &mut CudaArray,
        pieces: &[Range<usize>],
        mut told: impl FnMut(&CudaArray, Range<usize>) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        const OP: &str = "matmul";
        check::shape(OP, "x's columns", [x.cols], [w.cols])?;
        let end = pieces.iter().try_fold(0, |end, piece| (piece.start == end).then_some(piece.end));
        assert_eq!(end, Some(x.rows), "{pieces:?} follow each other over all rows");
        out.reshape(x.rows, w.rows)?;
        for piece in pieces {
            self.multiply_rows(OP, x, piece.clone(), w, out)?;
            told(out, piece.clone())?;
        }
        Ok(())
    }

    fn matmul_add(&self, x: &CudaOperand, w: &CudaMatrix, out: &mut CudaArray) -> Result<()> {
        check::shape("matmul_add", "x's columns", [x.cols], [w.cols])?;
        check::shape("matmul_add", "out", [out.rows, out.cols], [x.rows, w.rows])?;
        self.multiply_all("matmul_add", x, w, out, Onto::Product)
    }

    fn matmul_onto(&self, x: &CudaOperand, w: &CudaMatrix, sums: &mut CudaArray) -> Result<()> {
        check::shape("matmul_onto", "x's columns", [x.cols], [w.cols])?;
        check::shape("matmul_onto", "sums", [sums.rows, sums.cols], [x.rows, w.rows])?;
        self.multiply_all("matmul_onto", x, w, sums, Onto::Sums)
    }

    fn add(&self, x: &CudaArray, out: &mut CudaArray) -> Result<()> {
        check::shape("add", "out", [out.rows, out.cols], [x.rows, x.cols])?;
        let count = x.rows * x.cols;
        let arguments = [out.memory.start(), x.memory.start(), Argument::U64(count as u64)];
        // SAFETY: both have as many numbers.
        unsafe { self.stream.launch("add", &self.kernels.add, flat_grid(count), &arguments) }
    }

    fn swiglu(
        &self,
        x: &CudaOperand,
        gate: &CudaMatrix,
        up: &CudaMatrix,
        out: &mut CudaOperand,
    ) -> Result<()> {
        const OP: &str = "swiglu";
        check::shape(OP, "x's columns", [x.cols], [gate.cols])?;
        check::shape(OP, "up", [up.rows, up.cols], [gate.rows, gate.cols])?;
        out.reshape(x.rows, gate.rows)?;
        let columns = swiglu_columns(x.rows, gate.rows, self.options.ffn_columns);
        let mut workspace = locked(&self.workspace);
        let Workspace { gate: gates, up: ups, .. } = &mut *workspace;
        for first in (0..gate.rows).step_by(columns.max(1)) {
            let width = columns.min(gate.rows - first);
            for (matrix, product) in [(gate, &mut *gates), (up, &mut *ups)] {
                product.reserve(OP, x.rows * width * size_of::<f32>())?;
                self.multiply(OP, (x, 0..x.rows), (matrix, first..first + width), product, Onto::Nothing)?;
            }
            if let (Some(Fp8Kernels { swiglu, .. }), true) = (&self.fp8, width == gate.rows) {
                let [codes, scales] = out.codes_with_room()?;
                let (to, stride) = (out.memory.start(), u32_of(out.stride()));
                let arguments = [to, gates.start(), ups.start(), u32_of(width), stride, codes, scales];
                // SAFETY: both products are `[rows, width]`, and out and its codes have as many rows, padded.
                unsafe { self.stream.launch(OP, swiglu, row_grid(x.rows, 512), &arguments) }?;
                continue;
            }
            // What pads a row belongs to its last columns.
            let padded = if first + width == gate.rows { out.stride() - first } else { width };
            let arguments = [
                out.memory.at(first * size_of::<u16>()),
                gates.start(),
                ups.start(),
                u32_of(width),
                u32_of(padded),
                u32_of(out.stride()),
            ];
            // Blocks in y are 65,535 at most.
            assert!(x.rows < 1 << 16, "{} rows of a micro-batch", x.rows);
            let grid = Grid { blocks: [padded.div_ceil(256), x.rows, 1], threads: 256, block_bytes: 0 };
            // SAFETY: both products are `[rows, width]`, and out's rows have room from the first column on.
            unsafe { self.stream.launch(OP, &self.kernels.swiglu, grid, &arguments) }?;
        }
        Ok(())
    }

    fn rope(&self, x: &mut CudaArray, rope: &CudaRope, positions: &[u32]) -> Result<()> {
        self.turn(x, rope, positions)
    }

    fn kv_append(
        &self,
        cache: &mut CudaKvCache,
        k: &CudaArray,
        v: &CudaArray,
        slices: &[AttentionSlice],
    ) -> Result<()> {
        self.append(cache, k, v, slices)
    }

    fn attend(
        &self,
        [q, k]: [&mut CudaArray; 2],
        v: &CudaArray,
        angles: (&CudaRope, &[u32]),
        cache: &mut CudaKvCache,
        slices: &[AttentionSlice],
        out: &mut CudaOperand,
    ) -> Result<()> {
        self.turn_and_append([q, k], v, angles, cache, slices)?;
        self.attention(q, cache, slices, out)
    }

    fn attention(
        &self,
        q: &CudaArray,
        cache: &CudaKvCache,
        slices: &[AttentionSlice],
        out: &mut CudaOperand,
    ) -> Result<()> {
        const OP: &str = "attention";
        let CudaKvCache { kv_heads, head_dim, .. } = *cache;
        let group = check::heads(OP, "q's columns", q.cols, kv_heads, head_dim)?;
        let padding = self.padding();
        check::slices(OP, slices, q.rows - padding, cache.num_pages)?;
        if group > TILE_QUERIES {
            return Err(Error::Unsupported(format!(
                "{OP}: a KV head has {group} query heads, expected {TILE_QUERIES} at most"
            )));
        }
        out.reshape(q.rows, q.cols)?;
        if out.stride() != out.cols {
            self.stream.clear(OP, &mut out.memory)?; // What pads rows.
        }
        let may_split = !self.options.is_deterministic && cache.kernels.decode.is_some();
        let multiprocessors = may_split.then_some(self.gpu.multiprocessors as usize);
        let shape = PlanShape { group, kv_heads, multiprocessors };
        locked(&self.graphs).saw(shape);
        let plan = Plan::new(slices, padding, shape);
        let [pages_at, tiles_at, rows_at] = locked(&self.tables).put_plan(&self.stream, OP, &plan)?;
        let heads = u32_of(q.cols / head_dim);
        let (kv_heads_at, head_dim_at) = (u32_of(kv_heads), u32_of(head_dim));
        let scale = Argument::F32(std::f32::consts::LOG2_E / (head_dim as f32).sqrt());
        let arguments = [
            out.memory.start(),
            q.memory.start(),
            cache.memory.start(),
            pages_at,
            tiles_at,
            heads,
            kv_heads_at,
            head_dim_at,
            u32_of(out.stride()),
            scale,
        ];
        let grid = plan.prefill_grid(kv_heads, &cache.kernels);
        // SAFETY: slices and pages have been checked; tiles are made of them, and no wider than 64 queries.
        unsafe { self.stream.launch(OP, &cache.kernels.prefill, grid, &arguments) }?;
        let Some(decode) = &cache.kernels.decode else { return Ok(()) };
        if plan.rows.is_empty() {
            return Ok(());
        }
        let mut workspace = locked(&self.workspace);
        let Workspace { partial, maxima, sums, .. } = &mut *workspace;
        let num_partials = plan.num_partials(kv_heads);
        let padded = AttentionKernels::padded(head_dim);
        partial.reserve(OP, num_partials * padded * size_of::<f32>())?;
        maxima.reserve(OP, num_partials * size_of::<f32>())?;
        sums.reserve(OP, num_partials * size_of::<f32>())?;
        let arguments = [
            partial.start(),
            maxima.start(),
            sums.start(),
            q.memory.start(),
            cache.memory.start(),
            pages_at,
            rows_at,
            heads,
            kv_heads_at,
            head_dim_at,
            u32_of(plan.part_pages),
            scale,
        ];
        // SAFETY: as above; a group is no wider than 16, and each part of a row has its place.
        unsafe { self.stream.launch(OP, decode, plan.decode_grid(kv_heads, &cache.kernels), &arguments) }?;
        let arguments = [
            out.memory.start(),
            partial.start(),
            maxima.start(),
            sums.start(),
            rows_at,
            heads,
            kv_heads_at,
            head_dim_at,
            u32_of(padded),
            u32_of(plan.num_parts),
            u32_of(out.stride()),
        ];
        let grid = Grid { blocks: [plan.num_rows(), q.cols / head_dim, 1], threads: 128, block_bytes: 0 };
        debug_assert!(group <= DECODE_GROUP, "rows are split for groups of {DECODE_GROUP} at most");
        // SAFETY: the parts that it reads have been queued before it.
        unsafe { self.stream.launch(OP, &self.kernels.attention_merge, grid, &arguments) }
    }

    fn gather(&self, x: &CudaArray, rows: &[u32], out: &mut CudaArray) -> Result<()> {
        const OP: &str = "gather";
        check::all_below(OP, "row", rows, x.rows)?;
        out.reshape(rows.len(), x.cols)?;
        let rows_at = locked(&self.tables).put_gathered(&self.stream, OP, rows)?;
        let arguments = [out.memory.start(), x.memory.start(), rows_at, u32_of(x.cols)];
        // SAFETY: every row is one of x, and out has a row for each.
        unsafe { self.stream.launch(OP, &self.kernels.gather, row_grid(rows.len(), 256), &arguments) }
    }

    fn logit_stats(&self, logits: &CudaArray, out: &mut Vec<LogitStats>) -> Result<()> {
        const OP: &str = "logit_stats";
        self.ask_stats(OP, logits, NO_TOKENS)?;
        let mut workspace = locked(&self.workspace);
        let Workspace { stats, host_stats, .. } = &mut *workspace;
        host_stats.resize(logits.rows, [0; 3]);
        self.stream.download(OP, stats, host_stats)?;
        out.clear();
        out.extend(host_stats.iter().map(|&[argmax, max, log_sum_exp]| LogitStats {
            argmax,
            max: f32::from_bits(max),
            log_sum_exp: f32::from_bits(log_sum_exp),
        }));
        Ok(())
    }

    fn choose(
        &self,
        logits: &mut CudaArray,
        choices: &[Choice],
        edits: &Edits,
        _scratch: &mut ChoiceScratch,
        out: &mut Vec<Chosen>,
    ) -> Result<()> {
        self.choose_rows(logits, choices, edits, out)
    }

    fn draws(&self, rows: usize) -> Result<Draws> {
        self.new_draws(rows)
    }

    fn open_draws(&self, draws: &mut Draws, rows: usize) -> Result<()> {
        self.begin_draws(draws, rows)
    }

    fn choose_into(
        &self,
        logits: &mut CudaArray,
        choices: &[Choice],
        edits: &Edits,
        _scratch: &mut ChoiceScratch,
        draws: &mut Draws,
    ) -> Result<()> {
        self.choose_rows_into(logits, choices, edits, draws)
    }

    fn matmul_argmax_into(
        &self,
        x: &CudaOperand,
        w: &CudaMatrix,
        scratch: &mut CudaArray,
        draws: &mut Draws,
    ) -> Result<()> {
        self.largest_into(x, w, scratch, draws)
    }

    fn close_draws(&self, draws: &mut Draws) -> Result<Arrival> {
        self.end_draws(draws)
    }

    fn read_draws<'a>(&self, draws: &'a mut Draws) -> Result<&'a [Drawn]> {
        self.drawn(draws)
    }
}

impl Cuda {
    /// Queues `out[t]`, row by row, of tokens that have been checked; those that are fed back are places at `fed`.
    pub(super) fn embed_words(
        &self,
        table: &CudaMatrix,
        words: &[u32],
        fed: Argument,
        out: &mut CudaArray,
    ) -> Result<()> {
        const OP: &str = "embed";
        out.reshape(words.len(), table.cols)?;
        let tokens_at = locked(&self.tables).put_tokens(&self.stream, OP, words)?;
        let (numbers, stride) = table.table();
        let (cols, stride) = (u32_of(table.cols), u32_of(stride));
        let arguments = [out.memory.start(), numbers.start(), tokens_at, fed, cols, stride];
        // SAFETY: every token is a row of the table, as what draws gives no other, and out has a row for each.
        unsafe { self.stream.launch(OP, &self.kernels.embed, row_grid(words.len(), 256), &arguments) }
    }

    /// Queues the statistics of rows into the workspace, and the tokens of the largest logits to `tokens`, where that is anywhere.
    pub(super) fn ask_stats(&self, op: &'static str, logits: &CudaArray, tokens: Argument) -> Result<()> {
        check::logits(logits.cols)?;
        let stats = &mut locked(&self.workspace).stats;
        stats.reserve(op, logits.rows * size_of::<[u32; 3]>())?;
        let arguments = [stats.start(), logits.memory.start(), u32_of(logits.cols), tokens];
        // SAFETY: there is room for the statistics of each row, and for its token where these go anywhere.
        unsafe { self.stream.launch(op, &self.kernels.logit_stats, row_grid(logits.rows, 512), &arguments) }
    }

    /// Rows of the step that runs beyond those that were asked for.
    pub(super) fn padding(&self) -> usize {
        locked(&self.graphs).padding()
    }
}

/// Columns of an FFN of so many that are computed at once for so many rows, `most` at most: multiples of 64, so that each part
/// begins at 16 bytes.
pub(super) fn swiglu_columns(rows: usize, width: usize, most: usize) -> usize {
    let fitting = SWIGLU_BYTES / (rows.max(1) * 2 * size_of::<f32>());
    (fitting / 64 * 64).clamp(64, most).min(width)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_widest_ffn_is_computed_in_chunks_that_fit() {
        let most = Cuda::FFN_COLUMNS;
        assert_eq!(swiglu_columns(512, 425_984, most), 53_248);
        assert_eq!(swiglu_columns(8192, 425_984, most), 4096);
        assert_eq!(swiglu_columns(1, 130, most), 130);
        assert_eq!(swiglu_columns(1 << 30, 425_984, most), 64);
    }
}
