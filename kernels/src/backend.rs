//! The contract of a device: arrays that live on it, and the operations of a decoder block.
//!
//! Everything above this crate is written against [`Backend`] and does not know which one runs.
//!
//! Three invariants hold for every backend, and the battery in `tests/` checks them:
//! * **Rows are independent, to the bit.** What an operation writes for a row depends on that row (and,
//!   for attention, on its sequence) alone: not on how many rows stand beside it, on where it stands, on
//!   chunk bounds or on the number of threads. Sums run in an order that depends on the summed dimension
//!   alone; attention walks keys in tiles of [`PAGE_TOKENS`] at absolute positions.
//! * **Accumulation is f32**, whatever the weights are. The residual stream is f32.
//! * **Shapes are checked** before any memory is touched; a mismatch is [`crate::Error::Shape`].

use std::ops::Range;

use crate::choice::{Choice, ChoiceScratch, Chosen, Edits};
use crate::cuda::{Gate, Parcel, StepTimes};
use crate::draws::{Arrival, Drawn, Draws, FedTokens};
use crate::error::{Error, Result};
use crate::random_tensor::RandomTensor;
use crate::tensor_view::{TensorView, ViewDtype};

/// Positions in one KV page, and the tile in which attention walks keys.
///
/// 64 keys fill four 512-bit registers of scores, enough independent sums to hide the latency of a dot
/// product for a single query row, and are the page size of the CUDA kernels.
pub const PAGE_TOKENS: usize = 64;

/// Sums over the columns of a matrix may be parted at multiples of this without a change of bits, in most number types; see
/// [`WeightType::sum_cut`]. It is a panel's width, and a multiple of what any product takes at once: pairs of bf16,
/// groups of 32 that share a scale, tiles of 32 columns.
pub const SUM_CUT: usize = 64;

/// Inputs of products in integers that share scales, see [`WeightType::Int8`].
///
/// Integers are summed exactly within such a block, and every block costs a pass over the sums: for the widths of small
/// models there is one. It is as much of K as the CPU backend sweeps over at once.
pub const INT8_BLOCK: usize = 4096;

/// Number type of activations on the device: matmul inputs, and tables that are read row by row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// bfloat16: the upper half of an f32, rounded to nearest even.
    Bf16,
}

/// Number type of keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvDtype {
    /// IEEE single precision.
    F32,
    /// bfloat16.
    Bf16,
    /// E4M3 with a power of two for each head of each token, which takes as much of a page as one number more: the least with
    /// which the head's largest number is 448 or less. It does not depend on any other token, so that neither do answers, and
    /// no number is too large. A number is off by 1/16 of itself at most, or by 2⁻¹⁷ of its head's largest one where that is
    /// more. Where a number of a head is NaN, infinite or beyond 1.75 · 2¹²⁷, all of the head's are NaN. Attention multiplies in bfloat16, which
    /// holds these numbers exactly.
    Fp8,
}

/// What the matrices of a model's blocks are kept in.
///
/// The narrow types are quantised at load, with zero at zero and rounded to nearest even. Where all numbers that
/// share a scale are so small that it would be denormal, they are taken for zeros; where one is NaN or infinite
/// the scale is NaN, so that it cannot pass unseen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightType {
    /// IEEE single precision, as matmul inputs are then.
    F32,
    /// bfloat16; with this and all types below, matmul inputs are bfloat16.
    Bf16,
    /// E4M3 with a scale for each output that takes its largest number to 448, and products of E4M3: each row of a matmul input
    /// is quantised as well, with a scale of its own. For GPUs; the CPU backend has it not.
    Fp8,
    /// Integers of 8 bits with a scale for each output and [`INT8_BLOCK`] of inputs, and products in integers: each row
    /// of a matmul input is quantised as well, with scales of its own for the same blocks.
    Int8,
    /// Integers of 8 bits with a scale for each output, and products in bfloat16, which holds them exactly.
    Int8Weight,
    /// Integers of 4 bits, -8 for the largest of a group, with a scale for each output and group of inputs, see
    /// [`Int4Groups`], and products in bfloat16, which holds them exactly.
    Int4Weight,
}

impl WeightType {
    /// The multiple of columns at which sums over a matrix's columns may be parted without a change of bits on the CPU, see
    /// [`Backend::matmul_onto`]; nothing where scales belong to all columns.
    pub const fn sum_cut(self) -> Option<usize> {
        match self {
            WeightType::F32 | WeightType::Bf16 | WeightType::Int4Weight => Some(SUM_CUT),
            WeightType::Int8 => Some(INT8_BLOCK),
            WeightType::Fp8 | WeightType::Int8Weight => None,
        }
    }
}

/// How integers of 4 bits share scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Int4Groups {
    /// 32 inputs, with a scale in f32: the CPU's.
    Of32,
    /// 128 inputs, with a scale that is rounded to bf16 before numbers are divided by it: a GPU's.
    Of128,
}

/// Rotary angles for every position: `cos` and `sin` are `[positions, head_dim / 2]`, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeTable {
    /// Width of a head; dimension `j` turns together with `j + head_dim / 2` (the "rotate half" layout).
    pub head_dim: usize,
    /// Cosines.
    pub cos: Vec<f32>,
    /// Sines.
    pub sin: Vec<f32>,
}

/// The rows of one sequence in a batch, and where its keys and values are.
#[derive(Debug, Clone)]
pub struct AttentionSlice {
    /// Index of its first row in the batch's arrays.
    pub first_row: usize,
    /// Number of its rows, consecutive positions.
    pub num_rows: usize,
    /// Position of its first row; row `i` attends to positions `0 ..= first_position + i`.
    pub first_position: usize,
    /// Page `i` holds positions `i * PAGE_TOKENS ..`; covers every position attended to.
    pub pages: Vec<u32>,
}

/// A step in which every row is a sequence of its own, with a slice each.
#[derive(Debug, Clone, Copy)]
pub struct DecodeStep<'a> {
    /// Rows of its arrays: as many as there are positions, or those that [`Backend::padded_rows`] makes of them.
    pub rows: usize,
    /// The rows' positions.
    pub positions: &'a [u32],
    /// Their slices, of a row each.
    pub slices: &'a [AttentionSlice],
}

/// What sampling needs to know of a whole row of logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogitStats {
    /// Index of the largest logit, the lowest index where several are equal.
    pub argmax: u32,
    /// The largest logit; NaN where the row holds a NaN.
    pub max: f32,
    /// `ln Σ exp(logit - max)`: a token's log-probability is `logit - max - log_sum_exp`.
    pub log_sum_exp: f32,
}

/// The largest logit of a row, which is all that greedy sampling needs of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Largest {
    /// Its index, the lowest where several are equal.
    pub index: u32,
    /// The logit; NaN where the row holds a NaN.
    pub value: f32,
}

/// The most that a step asks of a device, so that it can make its own memory for that before the first one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WorkSize {
    /// Rows, a token each.
    pub rows: usize,
    /// Sequences that these belong to.
    pub sequences: usize,
    /// Positions of a sequence.
    pub context_tokens: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Columns of the widest FFN, 0 where there is none.
    pub ffn: usize,
    /// KV heads of the widest attention, 0 where there is none.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Rows of logits, 0 where there are none.
    pub logit_rows: usize,
    /// Of these, rows that are chosen from at once.
    pub choice_rows: usize,
    /// Columns of logits.
    pub vocab: usize,
    /// Arrays of all rows that wait for the next stage at once.
    pub parcels: usize,
    /// Arrays of all rows that have come from a stage on another device and wait for this one at once.
    pub arrivals: usize,
}

/// A device: its arrays and the operations of a decoder block.
///
/// Matrices are weights `[out_features, in_features]` as a checkpoint has them, and a matmul computes
/// `x · Wᵀ`. An [`Backend::Array`] is f32 `[rows, cols]`; an [`Backend::Operand`] is the same in the
/// number type that matmuls read. Both keep their memory when they shrink, so that a caller who reuses
/// them allocates nothing in the steady state; an operation sets the shape of what it only writes.
pub trait Backend: Send + Sync + 'static {
    /// A weight matrix in the backend's own layout.
    type Matrix: Send + Sync;
    /// An f32 vector, such as a norm's weight.
    type Vector: Send + Sync;
    /// Rotary angles on the device.
    type Rope: Send + Sync;
    /// f32 activations `[rows, cols]`.
    type Array: Send;
    /// Matmul input `[rows, cols]`.
    type Operand: Send;
    /// Keys and values of one attention block, in pages.
    type KvCache: Send;

    /// Names all that decides the bits of a result, such as `cpu avx512 bf16`; equal profiles give equal bits.
    fn numeric_profile(&self) -> String;

    // ---- Making things on the device.

    /// Pack a block's weight matrix into the backend's layout and [`WeightType`].
    fn matrix(&self, view: TensorView<'_>) -> Result<Self::Matrix>;
    /// Pack an embedding or output matrix: as [`Backend::matrix`], but in the number type of matmul inputs where
    /// that is wider.
    fn table(&self, view: TensorView<'_>) -> Result<Self::Matrix>;
    /// As [`Backend::matrix`], of numbers that are made from a seed: where a device can, on the device.
    fn random_matrix(&self, random: RandomTensor) -> Result<Self::Matrix> {
        let values = random.values();
        self.matrix(TensorView::new(ViewDtype::Bf16, random.rows, random.cols, bytemuck::cast_slice(&values)))
    }
    /// As [`Backend::table`], of numbers that are made from a seed.
    fn random_table(&self, random: RandomTensor) -> Result<Self::Matrix> {
        let values = random.values();
        self.table(TensorView::new(ViewDtype::Bf16, random.rows, random.cols, bytemuck::cast_slice(&values)))
    }
    /// Upload a vector.
    fn vector(&self, view: TensorView<'_>) -> Result<Self::Vector>;
    /// Upload rotary angles.
    fn rope_table(&self, table: RopeTable) -> Result<Self::Rope>;
    /// An empty array.
    fn array(&self) -> Self::Array;
    /// An empty operand.
    fn operand(&self) -> Self::Operand;
    /// A cache of `num_pages` pages for `kv_heads` heads of `head_dim`. Memory is touched on first use.
    fn kv_cache(&self, num_pages: usize, kv_heads: usize, head_dim: usize) -> Result<Self::KvCache>;

    // ---- Making room before the first step, where a device's memory is slow to give.

    /// Makes room in an array for so many rows and columns; its shape stays.
    fn reserve(&self, _array: &mut Self::Array, _rows: usize, _cols: usize) -> Result<()> {
        Ok(())
    }

    /// As [`Backend::reserve`].
    fn reserve_operand(&self, _operand: &mut Self::Operand, _rows: usize, _cols: usize) -> Result<()> {
        Ok(())
    }

    /// Makes room for what operations keep for themselves, once all weights are there: steps of up to this size then allocate
    /// nothing on the device.
    fn reserve_work(&self, _size: &WorkSize) -> Result<()> {
        Ok(())
    }

    // ---- Between host and device.

    /// Replace an array by host values `[rows, cols]`.
    fn upload(&self, values: &[f32], rows: usize, cols: usize, out: &mut Self::Array) -> Result<()>;
    /// Replace an array by zeros `[rows, cols]`.
    fn zeros(&self, rows: usize, cols: usize, out: &mut Self::Array) -> Result<()>;
    /// Copy an array to the host; `out` is cleared first.
    fn download(&self, x: &Self::Array, out: &mut Vec<f32>) -> Result<()>;

    /// A copy of an array that another stage of this process takes over on its own device, maybe before it is computed; or nothing
    /// where arrays go through the host.
    fn hand_over(&self, _x: &Self::Array) -> Result<Option<Parcel>> {
        Ok(None)
    }

    /// Replaces an array by what a stage has handed over.
    fn take_over(&self, parcel: &Parcel, out: &mut Self::Array) -> Result<()> {
        let (rows, cols) = parcel.shape();
        self.upload(&parcel.values()?, rows, cols, out)
    }

    /// The device's way to those of other processes, where it has one that is not through the host.
    fn gate(&self) -> Option<Gate> {
        None
    }

    /// Rows that the arrays of a step of so many rows shall have for [`Backend::repeat`].
    fn padded_rows(&self, rows: usize) -> usize {
        rows
    }

    /// What so many rows are padded to where there is room for as many.
    fn padding_of(&self, rows: usize) -> usize {
        rows
    }

    /// Gives an array that has room for it another shape; rows that it has before and after keep their numbers where rows are as long.
    /// Of use only where [`Backend::padded_rows`] says another number of rows.
    fn resize(&self, _array: &mut Self::Array, _rows: usize, _cols: usize) -> Result<()> {
        Ok(())
    }

    /// Does a step's work, which has the same operations on the same arrays whenever it is called with as many rows: a device may
    /// repeat what they have queued once, and leave the shapes of arrays as they are then. Operations may be given fewer positions and
    /// slices than their arrays have rows; what comes of rows beyond these is of no meaning.
    fn repeat<E: From<Error>>(
        &self,
        _step: &DecodeStep<'_>,
        mut work: impl FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        work()
    }

    /// Whether operations are queued, and the device does them beside the host.
    fn works_beside_host(&self) -> bool {
        false
    }

    /// Marks where a step begins, behind what it was given by another device.
    fn begin_step(&self) -> Result<StepTimes> {
        Ok(StepTimes::default())
    }

    /// Marks where it ends.
    fn end_step(&self, _times: &StepTimes) -> Result<()> {
        Ok(())
    }

    /// Frees memory that operations keep for themselves from call to call, where there is too little of it.
    fn free_workspace(&self) {}

    // ---- Operations. T is the number of rows (tokens) of a batch.

    /// `out[t] = table[tokens[t]]`; `table: [vocab, hidden]`, `out: [T, hidden]`.
    fn embed(&self, table: &Self::Matrix, tokens: &[u32], out: &mut Self::Array) -> Result<()>;

    /// `out[t] = x[t] / sqrt(mean(x[t]²) + eps) ∘ weight` (Zhang & Sennrich 2019, eq. 4).
    fn rms_norm(
        &self,
        x: &Self::Array,
        weight: &Self::Vector,
        eps: f32,
        out: &mut Self::Operand,
    ) -> Result<()>;

    /// `out = x · wᵀ`; `x: [T, in]`, `w: [n, in]`, `out: [T, n]`.
    fn matmul(&self, x: &Self::Operand, w: &Self::Matrix, out: &mut Self::Array) -> Result<()>;

    /// [`Backend::matmul`] of rows in `pieces`, which follow each other from the first row to the last. `told` hears of each in order, when
    /// it is computed or queued: what a device that works beside the host is then given to do with it may run before the next ones.
    fn matmul_in_pieces<E: From<Error>>(
        &self,
        x: &Self::Operand,
        w: &Self::Matrix,
        out: &mut Self::Array,
        pieces: &[Range<usize>],
        mut told: impl FnMut(&Self::Array, Range<usize>) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        self.matmul(x, w, out)?;
        pieces.iter().try_for_each(|piece| told(out, piece.clone()))
    }

    /// [`Backend::matmul`] by each of some matrices of [`Backend::matrix`]: q, k and v of the same rows.
    fn matmul_each<const N: usize>(
        &self,
        x: &Self::Operand,
        w: [&Self::Matrix; N],
        out: [&mut Self::Array; N],
    ) -> Result<()> {
        w.into_iter().zip(out).try_for_each(|(w, out)| self.matmul(x, w, out))
    }

    /// `out += x · wᵀ`: the residual add of a block's half. The product is summed first, then added.
    fn matmul_add(&self, x: &Self::Operand, w: &Self::Matrix, out: &mut Self::Array) -> Result<()>;

    /// Goes on with the sums of a product: `sums` holds what columns of the matrix before those of `w` have come to,
    /// `x: [T, in]`, `w: [n, in]`, `sums: [T, n]`.
    ///
    /// On the CPU with a number of columns before that is a multiple of [`WeightType::sum_cut`], `sums` then has the bits
    /// of one product over all columns. Where there is none the product is summed first, then added: scales
    /// belong to all columns.
    fn matmul_onto(&self, x: &Self::Operand, w: &Self::Matrix, sums: &mut Self::Array) -> Result<()>;

    /// `out += x`, both `[T, cols]`.
    fn add(&self, x: &Self::Array, out: &mut Self::Array) -> Result<()>;

    /// `out = silu(x · gateᵀ) ∘ (x · upᵀ)` (Shazeer 2020, SwiGLU); `gate, up: [width, in]`.
    fn swiglu(
        &self,
        x: &Self::Operand,
        gate: &Self::Matrix,
        up: &Self::Matrix,
        out: &mut Self::Operand,
    ) -> Result<()>;

    /// Turn the heads of `x: [T, heads * head_dim]` in place by the angles of `positions[t]`.
    fn rope(&self, x: &mut Self::Array, rope: &Self::Rope, positions: &[u32]) -> Result<()>;

    /// Write keys and values `[T, kv_heads * head_dim]` of every slice's rows into their pages.
    fn kv_append(
        &self,
        cache: &mut Self::KvCache,
        k: &Self::Array,
        v: &Self::Array,
        slices: &[AttentionSlice],
    ) -> Result<()>;

    /// Causal attention over the pages, with scale `1 / sqrt(head_dim)`: `q: [T, heads * head_dim]`,
    /// `out` alike. Query heads `g * group .. (g + 1) * group` read KV head `g`, `group = heads / kv_heads`.
    fn attention(
        &self,
        q: &Self::Array,
        cache: &Self::KvCache,
        slices: &[AttentionSlice],
        out: &mut Self::Operand,
    ) -> Result<()>;

    /// All of a block's attention before its last matrix, for rows that are new: as [`Backend::rope`] of q and of k,
    /// [`Backend::kv_append`] and then [`Backend::attention`], to the bit. What q and k hold afterwards is of no meaning.
    ///
    /// `v: [T, kv_heads * head_dim]`, `[q, k]` as there; a backend can save passes over all of them.
    fn attend(
        &self,
        [q, k]: [&mut Self::Array; 2],
        v: &Self::Array,
        (rope, positions): (&Self::Rope, &[u32]),
        cache: &mut Self::KvCache,
        slices: &[AttentionSlice],
        out: &mut Self::Operand,
    ) -> Result<()> {
        self.rope(q, rope, positions)?;
        self.rope(k, rope, positions)?;
        self.kv_append(cache, k, v, slices)?;
        self.attention(q, cache, slices, out)
    }

    /// `out[i] = x[rows[i]]`.
    fn gather(&self, x: &Self::Array, rows: &[u32], out: &mut Self::Array) -> Result<()>;

    /// Largest entry and log-sum-exp of every row; `out` is cleared first.
    fn logit_stats(&self, logits: &Self::Array, out: &mut Vec<LogitStats>) -> Result<()>;

    /// Chooses a token from every row of logits, as [`crate::choose_row`] does: the same one for equal logits, whatever the
    /// backend. `out` is cleared first; `edits` are of as many rows, or of none.
    ///
    /// A device that can do so leaves the logits where they are, and may edit them there: afterwards they are of no meaning.
    fn choose(
        &self,
        logits: &mut Self::Array,
        choices: &[Choice],
        edits: &Edits,
        scratch: &mut ChoiceScratch,
        out: &mut Vec<Chosen>,
    ) -> Result<()> {
        let (mut stats, mut host) = (std::mem::take(&mut scratch.stats), std::mem::take(&mut scratch.logits));
        self.logit_stats(logits, &mut stats)?;
        self.download(logits, &mut host)?;
        let vocabulary = host.len() / stats.len().max(1);
        crate::check::choices(choices, edits, stats.len(), vocabulary)?;
        out.clear();
        let rows = host.chunks_exact(vocabulary.max(1)).zip(&stats).zip(choices).enumerate();
        out.extend(rows.map(|(i, ((row, &stats), choice))| {
            crate::choice::choose_row(row, stats, choice, edits.row(i), scratch)
        }));
        (scratch.stats, scratch.logits) = (stats, host);
        Ok(())
    }

    /// The largest entry of every row of `x · wᵀ`; `x: [T, in]`, `w: [n, in]`, `out` is cleared first.
    ///
    /// As [`Backend::logit_stats`] of [`Backend::matmul`] finds it, but the product need not be stored anywhere.
    /// A backend may use `scratch`, whose contents are of no meaning before and after.
    fn matmul_argmax(
        &self,
        x: &Self::Operand,
        w: &Self::Matrix,
        scratch: &mut Self::Array,
        out: &mut Vec<Largest>,
    ) -> Result<()> {
        let mut stats = Vec::new();
        self.matmul(x, w, scratch)?;
        self.logit_stats(scratch, &mut stats)?;
        out.clear();
        out.extend(stats.iter().map(|stats| Largest { index: stats.argmax, value: stats.max }));
        Ok(())
    }

    // ---- Answers that the host may wait for later. In the order of `open_draws`, any of the three that follow, and `close_draws`.

    /// What a step draws, for up to so many rows.
    fn draws(&self, _rows: usize) -> Result<Draws> {
        Ok(Draws::default())
    }

    /// Forgets what was drawn before, and makes room for so many rows.
    fn open_draws(&self, draws: &mut Draws, _rows: usize) -> Result<()> {
        draws.drawn.clear();
        Ok(())
    }

    /// As [`Backend::choose`], whose answers go behind those of `draws`.
    fn choose_into(
        &self,
        logits: &mut Self::Array,
        choices: &[Choice],
        edits: &Edits,
        scratch: &mut ChoiceScratch,
        draws: &mut Draws,
    ) -> Result<()> {
        self.choose(logits, choices, edits, scratch, &mut draws.chosen)?;
        draws.drawn.extend(draws.chosen.drain(..).map(Drawn::Chosen));
        Ok(())
    }

    /// As [`Backend::matmul_argmax`], whose answers go behind those of `draws`.
    fn matmul_argmax_into(
        &self,
        x: &Self::Operand,
        w: &Self::Matrix,
        scratch: &mut Self::Array,
        draws: &mut Draws,
    ) -> Result<()> {
        self.matmul_argmax(x, w, scratch, &mut draws.largest)?;
        draws.drawn.extend(draws.largest.drain(..).map(Drawn::Largest));
        Ok(())
    }

    /// The step asks for no more; when its answers are there.
    fn close_draws(&self, _draws: &mut Draws) -> Result<Arrival> {
        Ok(Arrival::default())
    }

    /// All answers in the order of asking; waits for them where they are not there yet.
    fn read_draws<'a>(&self, draws: &'a mut Draws) -> Result<&'a [Drawn]> {
        Ok(&draws.drawn)
    }

    /// As [`Backend::embed`] of tokens some of which another step has drawn, whose answers need not be there: this step is queued behind
    /// it.
    fn embed_fed(&self, table: &Self::Matrix, fed: FedTokens<'_>, out: &mut Self::Array) -> Result<()> {
        let FedTokens { tokens, fed, draws } = fed;
        let mut tokens = tokens.to_vec();
        for &(row, place) in fed {
            tokens[row as usize] = draws.drawn[place as usize].token().unwrap_or(0);
        }
        self.embed(table, &tokens, out)
    }
}
