//! The plain backend: every operation as its formula reads, one loop after another, in f32.
//!
//! It is the oracle of the fast backends, so it knows no vectors, threads or tiles. Under
//! bf16 and narrower types it rounds where they round: weights, the inputs of matrix products, and of attention
//! the queries, keys and values. The order of sums is then different, and one thing more: attention's weights
//! stay f32 here, while a fast backend may round them as they are relative to the largest score so far.
//! Narrow weights are quantised as there; a product in integers sums each block of K exactly.

use crate::array::Array;
use crate::backend::{
    AttentionSlice, Backend, INT8_BLOCK, Int4Groups, KvDtype, LogitStats, PAGE_TOKENS, RopeTable, WeightType,
};
use crate::error::Result;
use crate::fp8;
use crate::quantize::Quantizer;
use crate::tensor_view::{TensorView, ViewDtype};
use crate::{check, view};

/// The plain backend.
#[derive(Debug, Clone, Copy)]
pub struct Reference {
    weights: WeightType,
    kv: KvDtype,
    int4: Int4Groups,
}

/// A weight matrix, rounded to the backend's type.
#[derive(Debug, Clone)]
pub struct ReferenceMatrix {
    rows: usize,
    cols: usize,
    /// Numbers, or integers where rows have scales.
    values: Vec<f32>,
    /// What a row's sums are multiplied with, `[rows, blocks of K]`; empty where nothing is.
    scales: Vec<f32>,
    /// Columns that share a scale.
    block: usize,
    /// What inputs are quantised to before they are multiplied.
    inputs: Inputs,
}

/// Whether inputs of a product are quantised too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Inputs {
    AsTheyAre,
    /// Products are then of integers.
    Int8,
    Fp8,
}

/// Input of a matrix product, rounded to the backend's type.
#[derive(Debug, Clone)]
pub struct ReferenceOperand {
    array: Array,
}

/// Keys and values `[pages, PAGE_TOKENS, kv_heads, head_dim]`, rounded to the cache's type.
#[derive(Debug, Clone)]
pub struct ReferenceKvCache {
    num_pages: usize,
    kv_heads: usize,
    head_dim: usize,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Reference {
    /// A backend whose blocks' weights are `weights`, and whose KV cache is `kv`.
    pub fn new(weights: WeightType, kv: KvDtype) -> Reference {
        Reference { weights, kv, int4: Int4Groups::Of32 }
    }

    /// The same with integers of 4 bits that share scales so.
    pub fn with_int4(self, int4: Int4Groups) -> Reference {
        Reference { int4, ..self }
    }

    fn rounded(&self, rows: usize, cols: usize, mut values: Vec<f32>) -> ReferenceMatrix {
        self.weights.operands().round(&mut values);
        ReferenceMatrix::plain(rows, cols, values)
    }
}

impl ReferenceMatrix {
    /// A matrix of numbers that are multiplied as they are.
    fn plain(rows: usize, cols: usize, values: Vec<f32>) -> Self {
        Self { rows, cols, values, scales: Vec::new(), block: cols.max(1), inputs: Inputs::AsTheyAre }
    }

    /// A matrix of integers of 8 bits with a scale for each row and block of its columns.
    fn int8(rows: usize, cols: usize, mut values: Vec<f32>, block: usize, inputs: Inputs) -> Self {
        let mut scales = Vec::new();
        for row in values.chunks_mut(cols.max(1)) {
            for block in row.chunks_mut(block) {
                let quantizer = Quantizer::int8_of(block);
                block.iter_mut().for_each(|value| *value = f32::from(quantizer.quantize(*value)));
                scales.push(quantizer.scale);
            }
        }
        Self { rows, cols, values, scales, block, inputs }
    }

    /// A matrix in E4M3 with a scale for each row; of a checkpoint that has it so already, as it is.
    fn fp8(view: &TensorView<'_>, mut values: Vec<f32>) -> Self {
        let (rows, cols, inputs) = (view.rows, view.cols, Inputs::Fp8);
        let mut scales_of_rows = Vec::with_capacity(rows);
        for row in 0..rows {
            let numbers = &mut values[row * cols..][..cols];
            if let (ViewDtype::Fp8, Some(scales)) = (view.dtype, &view.scales) {
                let codes = view.row(row).iter();
                numbers.iter_mut().zip(codes).for_each(|(number, &code)| *number = fp8::f32_of(code));
                scales_of_rows.push(scales.scale(row, 0));
            } else {
                let quantizer = Quantizer::fp8_of(numbers);
                numbers.iter_mut().for_each(|number| *number = quantizer.fp8(*number));
                scales_of_rows.push(quantizer.scale);
            }
        }
        Self { rows, cols, values, scales: scales_of_rows, block: cols.max(1), inputs }
    }

    /// A matrix of integers of 4 bits, each multiplied with the scale of its group.
    fn int4(rows: usize, cols: usize, mut values: Vec<f32>, groups: Int4Groups) -> Self {
        for row in values.chunks_mut(cols.max(1)) {
            for group in row.chunks_mut(groups.inputs()) {
                let quantizer = Quantizer::int4_of(group, groups);
                let back = |value| f32::from(quantizer.quantize(value)) * quantizer.scale;
                group.iter_mut().for_each(|value| *value = back(*value));
            }
        }
        Self::plain(rows, cols, values)
    }

    fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.cols..][..self.cols]
    }

    /// A row as numbers.
    fn copy_row(&self, row: usize, out: &mut [f32]) {
        for (col, (out, &value)) in out.iter_mut().zip(self.row(row)).enumerate() {
            *out = if self.scales.is_empty() { value } else { value * self.scales_of(row)[col / self.block] };
        }
    }

    /// A row's scales, of all blocks of columns.
    fn scales_of(&self, row: usize) -> &[f32] {
        let num_blocks = self.cols.div_ceil(self.block);
        &self.scales[row * num_blocks..][..num_blocks]
    }

    /// `x · row` in integers, block by block, from the sum of earlier blocks on.
    fn dot_of_integers(&self, before: Option<f32>, x: &[f32], row: usize) -> f32 {
        let blocks = x.chunks(self.block).zip(self.row(row).chunks(self.block)).zip(self.scales_of(row));
        let terms = blocks.map(|((x, w), scale)| {
            let quantizer = Quantizer::int8_of(x);
            let sum: i64 = x.iter().zip(w).map(|(&x, &w)| i64::from(quantizer.quantize(x)) * w as i64).sum();
            sum as f32 * (quantizer.scale * scale)
        });
        before.into_iter().chain(terms).reduce(|sum, term| sum + term).unwrap_or(0.0)
    }

    /// `x · row`, from the sum of earlier columns on where those may be parted.
    fn dot_onto(&self, sum: f32, x: &[f32], row: usize) -> f32 {
        match self.inputs {
            Inputs::Int8 => self.dot_of_integers(Some(sum), x, row),
            Inputs::AsTheyAre if self.scales.is_empty() => dot_onto(sum, x, self.row(row)),
            Inputs::AsTheyAre | Inputs::Fp8 => sum + self.dot(x, row),
        }
    }

    /// `x · row`
    fn dot(&self, x: &[f32], row: usize) -> f32 {
        if self.inputs == Inputs::Fp8 {
            let quantizer = Quantizer::fp8_of(x);
            let sum: f32 = x.iter().zip(self.row(row)).map(|(&x, &w)| quantizer.fp8(x) * w).sum();
            return sum * (quantizer.scale * self.scales[row]);
        }
        if self.inputs == Inputs::Int8 {
            return self.dot_of_integers(None, x, row);
        }
        let sum = dot(x, self.row(row));
        self.scales.get(row).map_or(sum, |scale| sum * scale)
    }
}

impl ReferenceOperand {
    /// The rounded numbers.
    pub fn array(&self) -> &Array {
        &self.array
    }
}

impl ReferenceKvCache {
    /// Where the head's entry at a position of a sequence begins.
    fn at(&self, pages: &[u32], position: usize, head: usize) -> usize {
        let slot = pages[position / PAGE_TOKENS] as usize * PAGE_TOKENS + position % PAGE_TOKENS;
        (slot * self.kv_heads + head) * self.head_dim
    }
}

impl Backend for Reference {
    type Matrix = ReferenceMatrix;
    type Vector = Vec<f32>;
    type Rope = RopeTable;
    type Array = Array;
    type Operand = ReferenceOperand;
    type KvCache = ReferenceKvCache;

    fn numeric_profile(&self) -> String {
        format!("reference {} kv {}", self.weights.name(), self.kv.name())
    }

    fn matrix(&self, view: TensorView<'_>) -> Result<ReferenceMatrix> {
        let values = view::widen("matrix", &view)?;
        let (rows, cols) = (view.rows, view.cols);
        Ok(match self.weights {
            WeightType::F32 | WeightType::Bf16 => self.rounded(rows, cols, values),
            WeightType::Fp8 => ReferenceMatrix::fp8(&view, values),
            WeightType::Int8 => ReferenceMatrix::int8(rows, cols, values, INT8_BLOCK, Inputs::Int8),
            WeightType::Int8Weight => {
                ReferenceMatrix::int8(rows, cols, values, cols.max(1), Inputs::AsTheyAre)
            }
            // Integers of a checkpoint stay what they are.
            WeightType::Int4Weight if view.dtype == ViewDtype::Int4 => {
                ReferenceMatrix::plain(rows, cols, values)
            }
            WeightType::Int4Weight => ReferenceMatrix::int4(rows, cols, values, self.int4),
        })
    }

    fn table(&self, view: TensorView<'_>) -> Result<ReferenceMatrix> {
        Ok(self.rounded(view.rows, view.cols, view::widen("table", &view)?))
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

    fn operand(&self) -> ReferenceOperand {
        ReferenceOperand { array: Array::new() }
    }

    fn kv_cache(&self, num_pages: usize, kv_heads: usize, head_dim: usize) -> Result<ReferenceKvCache> {
        let half = check::kv_cache(num_pages, kv_heads, head_dim)?;
        let (keys, values) = (vec![0.0; half], vec![0.0; half]);
        Ok(ReferenceKvCache { num_pages, kv_heads, head_dim, keys, values })
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

    fn embed(&self, table: &ReferenceMatrix, tokens: &[u32], out: &mut Array) -> Result<()> {
        check::all_below("embed", "token", tokens, table.rows)?;
        out.reshape(tokens.len(), table.cols);
        for (t, &token) in tokens.iter().enumerate() {
            table.copy_row(token as usize, out.row_mut(t));
        }
        Ok(())
    }

    fn rms_norm(&self, x: &Array, weight: &Vec<f32>, eps: f32, out: &mut ReferenceOperand) -> Result<()> {
        check::shape("rms_norm", "weight", [weight.len()], [x.cols()])?;
        out.array.reshape(x.rows(), x.cols());
        for t in 0..x.rows() {
            let row = x.row(t);
            let mean_square = row.iter().map(|x| x * x).sum::<f32>() / row.len() as f32;
            let scale = 1.0 / (mean_square + eps).sqrt();
            for ((out, x), weight) in out.array.row_mut(t).iter_mut().zip(row).zip(weight) {
                *out = x * scale * weight;
            }
        }
        self.weights.operands().round(out.array.values_mut());
        Ok(())
    }

    fn matmul(&self, x: &ReferenceOperand, w: &ReferenceMatrix, out: &mut Array) -> Result<()> {
        check::shape("matmul", "x's columns", [x.array.cols()], [w.cols])?;
        out.reshape(x.array.rows(), w.rows);
        for t in 0..x.array.rows() {
            for n in 0..w.rows {
                out.row_mut(t)[n] = w.dot(x.array.row(t), n);
            }
        }
        Ok(())
    }

    fn matmul_add(&self, x: &ReferenceOperand, w: &ReferenceMatrix, out: &mut Array) -> Result<()> {
        check::shape("matmul_add", "x's columns", [x.array.cols()], [w.cols])?;
        check::shape("matmul_add", "out", [out.rows(), out.cols()], [x.array.rows(), w.rows])?;
        for t in 0..x.array.rows() {
            for n in 0..w.rows {
                out.row_mut(t)[n] += w.dot(x.array.row(t), n);
            }
        }
        Ok(())
    }

    fn matmul_onto(&self, x: &ReferenceOperand, w: &ReferenceMatrix, sums: &mut Array) -> Result<()> {
        check::shape("matmul_onto", "x's columns", [x.array.cols()], [w.cols])?;
        check::shape("matmul_onto", "sums", [sums.rows(), sums.cols()], [x.array.rows(), w.rows])?;
        for t in 0..x.array.rows() {
            for n in 0..w.rows {
                let sum = &mut sums.row_mut(t)[n];
                *sum = w.dot_onto(*sum, x.array.row(t), n);
            }
        }
        Ok(())
    }

    fn add(&self, x: &Array, out: &mut Array) -> Result<()> {
        check::shape("add", "out", [out.rows(), out.cols()], [x.rows(), x.cols()])?;
        out.values_mut().iter_mut().zip(x.values()).for_each(|(out, x)| *out += x);
        Ok(())
    }

    fn swiglu(
        &self,
        x: &ReferenceOperand,
        gate: &ReferenceMatrix,
        up: &ReferenceMatrix,
        out: &mut ReferenceOperand,
    ) -> Result<()> {
        check::shape("swiglu", "x's columns", [x.array.cols()], [gate.cols])?;
        check::shape("swiglu", "up", [up.rows, up.cols], [gate.rows, gate.cols])?;
        out.array.reshape(x.array.rows(), gate.rows);
        for t in 0..x.array.rows() {
            for n in 0..gate.rows {
                let gate = gate.dot(x.array.row(t), n);
                let up = up.dot(x.array.row(t), n);
                out.array.row_mut(t)[n] = gate / (1.0 + (-gate).exp()) * up;
            }
        }
        self.weights.operands().round(out.array.values_mut());
        Ok(())
    }

    fn rope(&self, x: &mut Array, rope: &RopeTable, positions: &[u32]) -> Result<()> {
        let half = check::rope("rope", x, rope, positions)?;
        for (t, &position) in positions.iter().enumerate() {
            for head in x.row_mut(t).chunks_exact_mut(rope.head_dim) {
                for j in 0..half {
                    let (cos, sin) =
                        (rope.cos[position as usize * half + j], rope.sin[position as usize * half + j]);
                    let (a, b) = (head[j], head[j + half]);
                    head[j] = a * cos - b * sin;
                    head[j + half] = b * cos + a * sin;
                }
            }
        }
        Ok(())
    }

    fn kv_append(
        &self,
        cache: &mut ReferenceKvCache,
        k: &Array,
        v: &Array,
        slices: &[AttentionSlice],
    ) -> Result<()> {
        let head_dim = cache.head_dim;
        check::shape("kv_append", "k's columns", [k.cols()], [cache.kv_heads * head_dim])?;
        check::shape("kv_append", "v", [v.rows(), v.cols()], [k.rows(), k.cols()])?;
        check::slices("kv_append", slices, k.rows(), cache.num_pages)?;
        for slice in slices {
            for i in 0..slice.num_rows {
                for head in 0..cache.kv_heads {
                    let at = cache.at(&slice.pages, slice.first_position + i, head);
                    let columns = head * head_dim..(head + 1) * head_dim;
                    let row = slice.first_row + i;
                    cache.keys[at..at + head_dim].copy_from_slice(&k.row(row)[columns.clone()]);
                    cache.values[at..at + head_dim].copy_from_slice(&v.row(row)[columns]);
                    self.kv.round(&mut cache.keys[at..at + head_dim]);
                    self.kv.round(&mut cache.values[at..at + head_dim]);
                }
            }
        }
        Ok(())
    }

    fn attention(
        &self,
        q: &Array,
        cache: &ReferenceKvCache,
        slices: &[AttentionSlice],
        out: &mut ReferenceOperand,
    ) -> Result<()> {
        let head_dim = cache.head_dim;
        let group = check::heads("attention", "q's columns", q.cols(), cache.kv_heads, head_dim)?;
        check::slices("attention", slices, q.rows(), cache.num_pages)?;
        out.array.reshape(q.rows(), q.cols());
        out.array.values_mut().fill(0.0);
        for slice in slices {
            for i in 0..slice.num_rows {
                for head in 0..group * cache.kv_heads {
                    let columns = head * head_dim..(head + 1) * head_dim;
                    let mut query = q.row(slice.first_row + i)[columns.clone()].to_vec();
                    self.kv.multiplied().round(&mut query);
                    let num_keys = slice.first_position + i + 1;
                    let out = &mut out.array.row_mut(slice.first_row + i)[columns];
                    attend(&query, cache, &slice.pages, num_keys, head / group, out);
                }
            }
        }
        self.weights.operands().round(out.array.values_mut());
        Ok(())
    }

    fn gather(&self, x: &Array, rows: &[u32], out: &mut Array) -> Result<()> {
        check::all_below("gather", "row", rows, x.rows())?;
        out.reshape(rows.len(), x.cols());
        for (i, &row) in rows.iter().enumerate() {
            out.row_mut(i).copy_from_slice(x.row(row as usize));
        }
        Ok(())
    }

    fn logit_stats(&self, logits: &Array, out: &mut Vec<LogitStats>) -> Result<()> {
        check::logits(logits.cols())?;
        out.clear();
        out.extend((0..logits.rows()).map(|t| stats(logits.row(t))));
        Ok(())
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The same, from the sum of earlier terms on.
fn dot_onto(sum: f32, a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).fold(sum, |sum, (a, b)| sum + a * b)
}

/// One query against the first `num_keys` positions: softmax of the scores, then the mean of the values.
fn attend(
    query: &[f32],
    cache: &ReferenceKvCache,
    pages: &[u32],
    num_keys: usize,
    head: usize,
    out: &mut [f32],
) {
    let head_dim = query.len();
    let scale = 1.0 / (head_dim as f32).sqrt();
    let entry = |position| cache.at(pages, position, head);
    let scores: Vec<f32> = (0..num_keys)
        .map(|position| dot(query, &cache.keys[entry(position)..][..head_dim]) * scale)
        .collect();
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f32> = scores.iter().map(|score| (score - max).exp()).collect();
    let sum: f32 = weights.iter().sum();
    for (position, weight) in weights.iter().enumerate() {
        for (out, value) in out.iter_mut().zip(&cache.values[entry(position)..][..head_dim]) {
            *out += weight * value;
        }
    }
    out.iter_mut().for_each(|out| *out /= sum);
}

fn stats(logits: &[f32]) -> LogitStats {
    let mut argmax = 0;
    for (i, &logit) in logits.iter().enumerate() {
        // A NaN is taken for the largest, so that it cannot pass unseen.
        if logit > logits[argmax] || (logit.is_nan() && !logits[argmax].is_nan()) {
            argmax = i;
        }
    }
    let max = logits[argmax];
    let sum: f32 = logits.iter().map(|logit| (logit - max).exp()).sum();
    LogitStats { argmax: argmax as u32, max, log_sum_exp: sum.ln() }
}
