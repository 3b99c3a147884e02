//! The fast CPU backend: vectorised, threaded, tiled.
//!
//! It refuses a SIMD level that the processor lacks, and knows nothing of NUMA: a device is a group of
//! cores that share their memory. Every operation first checks shapes, then shares its rows, tiles or heads
//! out to the pool; which thread takes which never shows in the result.

mod attention;
pub(crate) mod caches;
mod exp;
mod gemm;
mod kv_cache;
mod lanes;
mod logit_stats;
pub(crate) mod pool;
mod rms_norm;
mod rope;
mod rows;
pub(crate) mod simd;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::sync::Arc;

use crate::array::Array;
use crate::backend::{AttentionSlice, Backend, KvDtype, Largest, LogitStats, RopeTable, WeightType};
use crate::error::{Error, Result};
use crate::tensor_view::TensorView;
use crate::{check, view};
use attention::NewRows;
pub use gemm::{Ceilings, Rung};
use gemm::{Operand, PackedMatrix, RowBest};
use kv_cache::KeyLayout;
pub use kv_cache::KvCache;
use pool::ThreadPool;
use rope::Angles;
use simd::Simd;

thread_local! {
    /// The caller's list of rows' largest entries, kept for the next call.
    static BEST: RefCell<Vec<RowBest>> = const { RefCell::new(Vec::new()) };
}

/// What a CPU device is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuOptions {
    /// Cores that threads are pinned to, in turn; without any they run where the system puts them.
    pub cores: Vec<usize>,
    /// Threads that work on an operation, the caller counted.
    pub threads: usize,
    /// Instructions to use.
    pub simd: Simd,
    /// What the weights of blocks are kept in; it also says what matmul inputs and tables are.
    pub weights: WeightType,
    /// Number type of keys and values.
    pub kv: KvDtype,
}

/// The fast CPU backend.
#[derive(Debug)]
pub struct Cpu {
    pool: Arc<ThreadPool>,
    simd: Simd,
    weights: WeightType,
    kv: KvDtype,
}

/// A weight matrix, packed into panels.
pub struct CpuMatrix(PackedMatrix);

/// Input of a matrix product.
pub struct CpuOperand(Operand);

impl Cpu {
    /// A device of the given cores; starts its threads.
    pub fn new(options: CpuOptions) -> Result<Cpu> {
        let CpuOptions { cores, threads, simd, weights, kv } = options;
        if !simd.is_available() {
            let (name, features, best) = (simd.name(), simd.features(), Simd::detect().name());
            let what = format!("simd level {name} needs {features}, which this processor lacks");
            return Err(Error::Unsupported(format!("{what}: its best level is {best}")));
        }
        if weights == WeightType::Fp8 {
            let hint = "hint: [model] dtype = \"int8\" takes as much, and simd = \"reference\" has fp8 in plain loops";
            return Err(Error::Unsupported(format!(
                "a cpu device has no weights in fp8, which are for GPUs\n{hint}"
            )));
        }
        if threads == 0 {
            return Err(Error::Unsupported("a cpu device needs at least 1 thread, got 0".to_owned()));
        }
        Ok(Cpu { pool: ThreadPool::of_device(&cores, threads), simd, weights, kv })
    }

    /// Pins the calling thread to the device's first core: for the thread that runs its operations.
    pub fn pin_caller(&self) {
        self.pool.pin_caller();
    }

    /// Threads that work on an operation, the caller counted.
    pub fn num_threads(&self) -> usize {
        self.pool.num_threads()
    }

    /// x and some matrices, each with its name, are what a product of this device reads.
    fn check_operands<const N: usize>(
        &self,
        op: &'static str,
        x: &CpuOperand,
        weights: [(&'static str, &CpuMatrix); N],
    ) -> Result<()> {
        gemm::check_operands(op, self.simd, &x.0, weights.map(|(name, w)| (name, &w.0)))
    }

    /// A cache is one of this device's.
    fn check_cache(&self, op: &'static str, cache: &KvCache) -> Result<()> {
        check::kind(op, ("cache", "type"), [cache.kv(), self.kv], KvDtype::name)?;
        let layouts = [cache.layout(), KeyLayout::of(self.simd, self.kv)];
        check::kind(op, ("cache", "layout of keys"), layouts, KeyLayout::name)
    }
}

impl CpuMatrix {
    /// Memory that the packed matrix takes.
    pub fn bytes(&self) -> usize {
        self.0.bytes()
    }

    /// Memory that a matrix of so many rows and columns takes, in bytes.
    pub fn bytes_of(weights: WeightType, rows: usize, cols: usize) -> usize {
        gemm::packed_bytes(weights, rows, cols)
    }

    /// Reads a row as f32: a narrow type's integers times their scales; `out: [cols]`.
    pub fn copy_row(&self, row: usize, out: &mut [f32]) {
        self.0.copy_row(row, out);
    }
}

impl CpuOperand {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.0.rows()
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.0.cols()
    }

    /// Reads a row as f32, exactly; `out: [cols]`.
    pub fn copy_row(&self, row: usize, out: &mut [f32]) {
        self.0.copy_row(row, out);
    }
}

impl Backend for Cpu {
    type Matrix = CpuMatrix;
    type Vector = Vec<f32>;
    type Rope = RopeTable;
    type Array = Array;
    type Operand = CpuOperand;
    type KvCache = KvCache;

    fn numeric_profile(&self) -> String {
        format!("cpu {} {} kv {}", self.simd.numerics(), self.weights.name(), self.kv.name())
    }

    fn matrix(&self, view: TensorView<'_>) -> Result<CpuMatrix> {
        check::view("matrix", &view)?;
        Ok(CpuMatrix(PackedMatrix::pack(self.simd, view, self.weights, &self.pool)?))
    }

    fn table(&self, view: TensorView<'_>) -> Result<CpuMatrix> {
        check::view("table", &view)?;
        Ok(CpuMatrix(PackedMatrix::pack(self.simd, view, self.weights.operands().into(), &self.pool)?))
    }

    fn vector(&self, view: TensorView<'_>) -> Result<Vec<f32>> {
        view::widen("vector", &view)
    }

    fn rope_table(&self, table: RopeTable) -> Result<RopeTable> {
        check::rope_table(&table)?;
        Ok(table)
    }

    fn array(&self) -> Array {
        Array::new()
    }

    fn operand(&self) -> CpuOperand {
        CpuOperand(Operand::beside(self.simd, self.weights))
    }

    fn kv_cache(&self, num_pages: usize, kv_heads: usize, head_dim: usize) -> Result<KvCache> {
        KvCache::new(self.kv, KeyLayout::of(self.simd, self.kv), num_pages, kv_heads, head_dim)
    }

    fn upload(&self, values: &[f32], rows: usize, cols: usize, out: &mut Array) -> Result<()> {
        out.assign(values, rows, cols)
    }

    fn zeros(&self, rows: usize, cols: usize, out: &mut Array) -> Result<()> {
        out.reshape(rows, cols);
        out.values_mut().fill(0.0);
        Ok(())
    }

    fn download(&self, x: &Array, out: &mut Vec<f32>) -> Result<()> {
        out.clear();
        out.extend_from_slice(x.values());
        Ok(())
    }

    fn embed(&self, table: &CpuMatrix, tokens: &[u32], out: &mut Array) -> Result<()> {
        check::all_below("embed", "token", tokens, table.0.rows())?;
        out.reshape(tokens.len(), table.0.cols());
        rows::for_each_row(&self.pool, out, |t, row| table.0.copy_row(tokens[t] as usize, row));
        Ok(())
    }

    fn rms_norm(&self, x: &Array, weight: &Vec<f32>, eps: f32, out: &mut CpuOperand) -> Result<()> {
        rms_norm::rms_norm(self.simd, &self.pool, x, weight, eps, &mut out.0)
    }

    fn matmul(&self, x: &CpuOperand, w: &CpuMatrix, out: &mut Array) -> Result<()> {
        self.check_operands("matmul", x, [("w", w)])?;
        out.reshape(x.0.rows(), w.0.rows());
        gemm::matmul(self.simd, &self.pool, &x.0, &w.0, out.values_mut(), false);
        Ok(())
    }

    fn matmul_each<const N: usize>(
        &self,
        x: &CpuOperand,
        w: [&CpuMatrix; N],
        mut out: [&mut Array; N],
    ) -> Result<()> {
        self.check_operands("matmul", x, w.map(|w| ("w", w)))?;
        w.iter().zip(&mut out).for_each(|(w, out)| out.reshape(x.0.rows(), w.0.rows()));
        let (w, out) = (w.map(|w| &w.0), out.map(Array::values_mut));
        gemm::matmul_each(self.simd, &self.pool, &x.0, w, out);
        Ok(())
    }

    fn matmul_add(&self, x: &CpuOperand, w: &CpuMatrix, out: &mut Array) -> Result<()> {
        self.check_operands("matmul_add", x, [("w", w)])?;
        check::shape("matmul_add", "out", [out.rows(), out.cols()], [x.0.rows(), w.0.rows()])?;
        gemm::matmul(self.simd, &self.pool, &x.0, &w.0, out.values_mut(), true);
        Ok(())
    }

    fn matmul_onto(&self, x: &CpuOperand, w: &CpuMatrix, sums: &mut Array) -> Result<()> {
        self.check_operands("matmul_onto", x, [("w", w)])?;
        check::shape("matmul_onto", "sums", [sums.rows(), sums.cols()], [x.0.rows(), w.0.rows()])?;
        gemm::matmul_onto(self.simd, &self.pool, &x.0, &w.0, sums.values_mut());
        Ok(())
    }

    fn add(&self, x: &Array, out: &mut Array) -> Result<()> {
        check::shape("add", "out", [out.rows(), out.cols()], [x.rows(), x.cols()])?;
        rows::for_each_row(&self.pool, out, |t, row| {
            row.iter_mut().zip(x.row(t)).for_each(|(out, x)| *out += x);
        });
        Ok(())
    }

    fn swiglu(&self, x: &CpuOperand, gate: &CpuMatrix, up: &CpuMatrix, out: &mut CpuOperand) -> Result<()> {
        check::shape("swiglu", "up", [up.0.rows(), up.0.cols()], [gate.0.rows(), gate.0.cols()])?;
        self.check_operands("swiglu", x, [("gate", gate), ("up", up)])?;
        gemm::check_gated("swiglu", self.simd, gate.0.kind(), &out.0)?;
        gemm::swiglu(self.simd, &self.pool, &x.0, &gate.0, &up.0, &mut out.0);
        Ok(())
    }

    fn rope(&self, x: &mut Array, rope: &RopeTable, positions: &[u32]) -> Result<()> {
        rope::rope(self.simd, &self.pool, x, rope, positions)
    }

    fn kv_append(&self, cache: &mut KvCache, k: &Array, v: &Array, slices: &[AttentionSlice]) -> Result<()> {
        self.check_cache("kv_append", cache)?;
        kv_cache::append(self.simd, &self.pool, cache, k, v, slices)
    }

    fn attention(
        &self,
        q: &Array,
        cache: &KvCache,
        slices: &[AttentionSlice],
        out: &mut CpuOperand,
    ) -> Result<()> {
        self.check_cache("attention", cache)?;
        attention::attention(self.simd, &self.pool, q, cache, slices, &mut out.0)
    }

    fn attend(
        &self,
        [q, k]: [&mut Array; 2],
        v: &Array,
        (rope, positions): (&RopeTable, &[u32]),
        cache: &mut KvCache,
        slices: &[AttentionSlice],
        out: &mut CpuOperand,
    ) -> Result<()> {
        self.check_cache("attend", cache)?;
        let new = NewRows { q, k, v, angles: Angles { table: rope, positions } };
        attention::attend_new(self.simd, &self.pool, new, cache, slices, &mut out.0)
    }

    fn gather(&self, x: &Array, rows: &[u32], out: &mut Array) -> Result<()> {
        check::all_below("gather", "row", rows, x.rows())?;
        out.reshape(rows.len(), x.cols());
        rows::for_each_row(&self.pool, out, |i, row| row.copy_from_slice(x.row(rows[i] as usize)));
        Ok(())
    }

    fn matmul_argmax(
        &self,
        x: &CpuOperand,
        w: &CpuMatrix,
        _scratch: &mut Array,
        out: &mut Vec<Largest>,
    ) -> Result<()> {
        self.check_operands("matmul_argmax", x, [("w", w)])?;
        check::logits(w.0.rows())?;
        BEST.with_borrow_mut(|best| {
            best.clear();
            best.resize_with(x.0.rows(), RowBest::default);
            gemm::argmax(self.simd, &self.pool, &x.0, &w.0, best);
            out.clear();
            out.extend(best.iter().map(RowBest::largest));
        });
        Ok(())
    }

    fn logit_stats(&self, logits: &Array, out: &mut Vec<LogitStats>) -> Result<()> {
        logit_stats::logit_stats(self.simd, &self.pool, logits, out)
    }
}
