//! Seconds and bytes of every piece on one rank of a stage, by a device's roofline.
//!
//! Left out, each within a few percent at the sizes that plans choose: launches (graphs hide them), tile
//! quantisation of small products, and reading the keys of earlier chunks during prefill.

use std::ops::Range;

use scheduler::{Extra, Load, Piece, RankCosts};

use super::CostModel;
use super::pieces::PieceShape;
use super::rank::{self, Meeting, Parts, Rank};
use super::roofline::{NumberTypes, Roofline};
use crate::block::{Dims, Ffn};
use crate::config::ModelConfig;
use crate::sharing::{AttentionSharing, Sharing};

/// What a plan balances.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Balance {
    /// Time by the roofline.
    Roofline,
    /// Operations of one decode token at the micro-batch's context.
    Flops,
    /// Bytes of weights.
    Weights,
}

/// Estimates for one model on one kind of device.
#[derive(Debug, Clone, Copy)]
pub struct Estimator<'a> {
    /// The model.
    pub config: &'a ModelConfig,
    /// The device.
    pub roofline: Roofline,
    /// Its number types.
    pub types: NumberTypes,
    /// What is balanced.
    pub balance: Balance,
}

/// Passes over the logits that a draw takes: the largest, the sum, the choice.
const SAMPLING_PASSES: f64 = 3.0;
/// Bytes of a logit, and of a number of the residual stream.
const F32_BYTES: f64 = 4.0;
/// Bytes of what enters and leaves products.
const ACTIVATION_BYTES: f64 = 2.0;
/// Numbers of the hidden width that an attention half reads and writes beside its products: norm and residual 4,
/// rotation and append 1.5.
const ATTENTION_PASSES: f64 = 5.5;
/// The same of an FFN half: norm and residual.
const FFN_PASSES: f64 = 4.0;
/// Numbers of the FFN's width: SwiGLU reads two and writes one.
const SWIGLU_PASSES: f64 = 3.0;
/// A wide FFN is computed in chunks of at most this many columns, Llama-3.1-405B's whole FFN.
const FFN_CHUNK: usize = 53_248;

/// Bytes that a micro-batch of `tokens` takes from one stage to the next: the residual stream in f32.
pub fn hop_bytes(dims: Dims, tokens: f64) -> f64 {
    tokens * dims.hidden as f64 * F32_BYTES
}

/// Bytes of activations that a micro-batch of `tokens` needs on a device beside weights and KV.
pub fn activation_bytes(config: &ModelConfig, tokens: f64) -> u64 {
    let widths = config.blocks.iter().map(|block| match block.ffn {
        Ffn::SwiGlu { width } => width.min(FFN_CHUNK),
        Ffn::Linear | Ffn::None => 0,
    });
    let mut per_token = 0.0;
    per_token += 3.0 * config.dims.hidden as f64 * F32_BYTES; // Residual: coming, here, going.
    per_token += 2.0 * config.dims.hidden as f64 * ACTIVATION_BYTES; // Norm's output, queries.
    per_token += SWIGLU_PASSES * widths.max().unwrap_or(0) as f64 * ACTIVATION_BYTES;
    (tokens * per_token) as u64
}

impl CostModel for Estimator<'_> {
    fn shared_costs(&self, pieces: &[PieceShape], ranks: usize, sharing: &Sharing, load: Load) -> RankCosts {
        let costs = pieces.iter().map(|shape| self.piece(shape, ranks, sharing, load));
        let shared = rank::shared_bytes(self.config, self.types, ranks);
        RankCosts::new(costs, self.embedding(load), self.head(ranks, load))
            .with_shared(shared)
            .with_cuts(pieces.iter().map(|shape| self.cut_seconds(shape, ranks, sharing, load)))
            .with_entry(self.stage_meeting_seconds(Meeting::Copy, ranks, load))
    }

    fn sharing_in(
        &self,
        ways: &[AttentionSharing],
        pieces: &[PieceShape],
        ranks: usize,
        load: Load,
    ) -> Sharing {
        let seconds = |_: &PieceShape, parts| self.piece_seconds(parts, ranks, load);
        Parts::sharing(self.config, ways, pieces, ranks, seconds)
    }

    fn hop_seconds(&self, load: Load) -> f64 {
        match self.balance {
            Balance::Roofline => self.roofline.link.seconds(hop_bytes(self.config.dims, load.tokens())),
            Balance::Flops | Balance::Weights => 0.0,
        }
    }
}

impl<'a> Estimator<'a> {
    /// Operations of one decode token, for what a plan by FLOPs balances.
    fn decode_flops(&self, matrix_params: u64, attention_flops: f64) -> f64 {
        (2.0 * matrix_params as f64 + attention_flops) / self.roofline.flops_per_second
    }

    /// One stage's time under any load, for whoever asks it for thousands of micro-batches. Its ranks share blocks in one
    /// way for all of them.
    pub fn stage_seconds(
        &self,
        pieces: &[PieceShape],
        stage: Range<usize>,
        ranks: usize,
        sharing: &Sharing,
    ) -> StageSeconds<'a> {
        let mut kinds: Vec<(Parts, f64)> = vec![];
        for shape in &pieces[stage.clone()] {
            let parts = Parts::of(self.config, shape, ranks, sharing.of(shape.block));
            match kinds.iter_mut().find(|(kind, _)| *kind == parts) {
                Some((_, count)) => *count += 1.0,
                None => kinds.push((parts, 1.0)),
            }
        }
        let (is_first, is_last) = (stage.start == 0, stage.end == pieces.len());
        let last = pieces[stage].last();
        let at_end = last.map_or(Meeting::None, |shape| {
            Parts::of(self.config, shape, ranks, sharing.of(shape.block)).meeting_at_cut()
        });
        StageSeconds { estimator: *self, ranks, kinds, is_first, is_last, at_end }
    }

    fn piece(&self, shape: &PieceShape, ranks: usize, sharing: &Sharing, load: Load) -> Piece {
        let parts = Parts::of(self.config, shape, ranks, sharing.of(shape.block));
        let bytes = parts.weight_bytes(self.types);
        let kv_bytes_per_token = parts.kv_bytes_per_token(self.types, self.config.dims, ranks);
        Piece { seconds: self.piece_seconds(parts, ranks, load), weight_bytes: bytes, kv_bytes_per_token }
    }

    /// What a stage takes more that ends with this piece and cuts a block.
    fn cut_seconds(&self, shape: &PieceShape, ranks: usize, sharing: &Sharing, load: Load) -> f64 {
        let parts = Parts::of(self.config, shape, ranks, sharing.of(shape.block));
        self.stage_meeting_seconds(parts.meeting_at_cut(), ranks, load)
    }

    fn piece_seconds(&self, parts: Parts, ranks: usize, load: Load) -> f64 {
        let Parts { attention, ffn, ends_block } = parts;
        match self.balance {
            Balance::Weights => parts.weight_bytes(self.types) as f64 / self.roofline.bytes_per_second,
            Balance::Flops => {
                let attended = attention.flops_per_context_token * load.decode_context;
                self.decode_flops(attention.matrix_params + ffn.matrix_params, attended)
            }
            Balance::Roofline => {
                let mut sum = self.attention_seconds(attention, ranks, load);
                sum += self.ffn_seconds(ffn, ranks, load, ends_block);
                sum
            }
        }
    }

    fn product_seconds(&self, matrix_params: u64, tokens: f64) -> f64 {
        let bytes = self.types.weights.bytes(matrix_params) as f64;
        self.roofline.seconds(2.0 * tokens * matrix_params as f64, bytes)
    }

    fn meeting_seconds(&self, meeting: Meeting, ranks: usize, load: Load) -> f64 {
        meeting.seconds(self.roofline.all_reduce, hop_bytes(self.config.dims, load.tokens()), ranks)
    }

    /// A meeting that a stage has beside those of its blocks.
    fn stage_meeting_seconds(&self, meeting: Meeting, ranks: usize, load: Load) -> f64 {
        match self.balance {
            Balance::Roofline if ranks > 1 => self.meeting_seconds(meeting, ranks, load),
            Balance::Roofline | Balance::Flops | Balance::Weights => 0.0,
        }
    }

    /// Time to move so many numbers of activations for each token.
    fn pass_seconds(&self, numbers: f64, load: Load) -> f64 {
        load.tokens() * numbers * ACTIVATION_BYTES / self.roofline.activation_bytes_per_second
    }

    fn attention_seconds(&self, rank: Rank, ranks: usize, load: Load) -> f64 {
        if rank.matrix_params == 0 {
            return 0.0;
        }
        let meeting = self.meeting_seconds(rank.meeting, ranks, load);
        let load = rank.load(load, ranks);
        let hidden = self.config.dims.hidden as f64;
        let attended = |tokens: f64, context: f64| tokens * context * rank.flops_per_context_token;
        let kept = self.types.kv.kv_bytes(rank.kv_values, self.config.dims.head_dim) as f64;
        let kv_bytes = load.decode_tokens * load.decode_context * kept;
        let mut sum = self.product_seconds(rank.matrix_params, load.tokens());
        sum += self.roofline.attention_seconds(attended(load.decode_tokens, load.decode_context), kv_bytes);
        sum += self.roofline.attention_seconds(attended(load.prefill_tokens, load.prefill_context), 0.0);
        // Of linear halves the operations for each position are none, and so are heads.
        let heads = rank.flops_per_context_token / (4 * self.config.dims.head_dim) as f64;
        sum += load.tokens() * heads * self.roofline.attention_head_seconds;
        sum += self.pass_seconds(ATTENTION_PASSES * hidden, load);
        sum + meeting
    }

    /// The norm is charged with the first columns and the all-reduce with the last ones; a stage whose
    /// end cuts the FFN is charged with one of its own.
    fn ffn_seconds(&self, rank: Rank, ranks: usize, load: Load, is_last: bool) -> f64 {
        if rank.matrix_params == 0 {
            return 0.0;
        }
        let hidden = self.config.dims.hidden;
        let width = rank.matrix_params as f64 / (3 * hidden) as f64;
        let mut sum = self.product_seconds(rank.matrix_params, load.tokens());
        sum += self.pass_seconds(SWIGLU_PASSES * width, load);
        sum += if rank.norm_params > 0 { self.pass_seconds(FFN_PASSES * hidden as f64, load) } else { 0.0 };
        sum += if is_last { self.meeting_seconds(rank.meeting, ranks, load) } else { 0.0 };
        sum
    }

    /// The embedding: a look-up for each token, on the first rank.
    fn embedding(&self, load: Load) -> Extra {
        let bytes = rank::embedding_bytes(self.config, self.types);
        let seconds = match self.balance {
            Balance::Weights => bytes as f64 / self.roofline.bytes_per_second,
            Balance::Flops => 0.0,
            Balance::Roofline => {
                let moved = ACTIVATION_BYTES + F32_BYTES;
                let bytes = load.tokens() * self.config.dims.hidden as f64 * moved;
                bytes / self.roofline.activation_bytes_per_second
            }
        };
        Extra { seconds, bytes }
    }

    /// Last norm, output matrix and sampling, for the rows that need logits.
    fn head(&self, ranks: usize, load: Load) -> Extra {
        let params = rank::table_params(self.config, ranks);
        let bytes = rank::head_bytes(self.config, self.types, ranks);
        let table_bytes = self.types.table().bytes(params) as f64;
        let rows = load.logit_rows;
        let seconds = match self.balance {
            Balance::Weights => bytes as f64 / self.roofline.bytes_per_second,
            Balance::Flops => self.decode_flops(params, 0.0),
            Balance::Roofline if rows == 0.0 => 0.0,
            Balance::Roofline => {
                let logits = rows * self.config.dims.vocab as f64 * F32_BYTES;
                let mut sum = self.roofline.bf16_seconds(2.0 * rows * params as f64, table_bytes);
                sum += SAMPLING_PASSES * logits / self.roofline.activation_bytes_per_second;
                sum
            }
        };
        Extra { seconds, bytes }
    }
}

/// The time of one stage: what [`Estimator::rank_costs`] says, with equal pieces computed once.
#[derive(Debug, Clone)]
pub struct StageSeconds<'a> {
    estimator: Estimator<'a>,
    ranks: usize,
    /// Distinct pieces, and how often each is there.
    kinds: Vec<(Parts, f64)>,
    is_first: bool,
    is_last: bool,
    /// Of its ranks, where its end cuts a block.
    at_end: Meeting,
}

impl StageSeconds<'_> {
    /// Seconds for a micro-batch, what its ranks tell each other at its ends included, without the hop.
    pub fn of(&self, load: Load) -> f64 {
        let Self { estimator, ranks, .. } = self;
        let mut sum = estimator.stage_meeting_seconds(Meeting::Copy, *ranks, load);
        for (parts, count) in &self.kinds {
            sum += count * estimator.piece_seconds(*parts, *ranks, load);
        }
        sum += if self.is_first { estimator.embedding(load).seconds } else { 0.0 };
        sum += if self.is_last { estimator.head(*ranks, load).seconds } else { 0.0 };
        sum + estimator.stage_meeting_seconds(self.at_end, *ranks, load)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use kernels::{SUM_CUT, WeightType};
    use scheduler::{Problem, StageDevice, least_bottleneck};

    use super::*;
    use crate::cost::{Channel, NumberType, pieces};

    const BF16: NumberTypes = NumberTypes { weights: NumberType::Bf16, kv: NumberType::Bf16 };

    fn ultra() -> ModelConfig {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/models");
        ModelConfig::read(&folder.join("Llama-3_1-Nemotron-Ultra-253B-v1")).unwrap()
    }

    /// One H200, by what was measured on it.
    fn h200() -> Roofline {
        let link = Channel { latency_seconds: 0.0, bytes_per_second: 450e9 };
        Roofline {
            flops_per_second: 790e12,
            bf16_flops_per_second: 790e12,
            attention_flops_per_second: 790e12,
            attention_head_seconds: 0.0,
            bytes_per_second: 4.3e12,
            activation_bytes_per_second: 4.3e12,
            link,
            all_reduce: Channel { latency_seconds: 8e-6, bytes_per_second: 480e9 },
        }
    }

    fn estimator(config: &ModelConfig, balance: Balance) -> Estimator<'_> {
        Estimator { config, roofline: h200(), types: BF16, balance }
    }

    fn decode(rows: f64, context: f64) -> Load {
        Load { decode_tokens: rows, decode_context: context, logit_rows: rows, ..Load::default() }
    }

    #[test]
    fn pieces_weigh_together_what_their_model_weighs() {
        let config = ultra();
        for column_cut in [None, Some(SUM_CUT), WeightType::Int8.sum_cut()] {
            let pieces = pieces(&config, column_cut);
            let costs = estimator(&config, Balance::Roofline).rank_costs(&pieces, 1, decode(1.0, 1.0));
            assert_eq!(costs.weight_bytes(0..pieces.len()), 2 * config.params());
            assert_eq!(costs.kv_bytes_per_token(0..pieces.len()), 262_144);
            assert_eq!(pieces.iter().filter(|piece| piece.ends_block).count(), config.blocks.len());
        }
    }

    /// As `KvDtype::head_bytes` counts what a cache has.
    #[test]
    fn keys_and_values_in_fp8_have_a_scale_for_each_head_of_each_token() {
        let config = ultra();
        let pieces = pieces(&config, None);
        for kv in [kernels::KvDtype::F32, kernels::KvDtype::Bf16, kernels::KvDtype::Fp8] {
            let types = NumberTypes { kv: kv.into(), ..BF16 };
            let estimator = Estimator { types, ..estimator(&config, Balance::Roofline) };
            let costs = estimator.rank_costs(&pieces, 1, decode(1.0, 1.0));
            // 64 blocks with keys and values of 8 heads.
            let heads = 64 * 2 * 8;
            let expected = heads * kv.head_bytes(config.dims.head_dim) as u64;
            assert_eq!(costs.kv_bytes_per_token(0..pieces.len()), expected, "{kv:?}");
        }
    }

    /// The table counts once among the parameters, and is held by each end of a pipeline.
    #[test]
    fn a_tied_table_is_held_once_by_each_stage_that_needs_it() {
        let config = ModelConfig { tied_embeddings: true, ..ultra() };
        let table = (config.dims.vocab * config.dims.hidden) as u64;
        assert_eq!(config.params(), ultra().params() - table);
        let pieces = pieces(&config, None);
        let costs = estimator(&config, Balance::Roofline).rank_costs(&pieces, 1, decode(1.0, 1.0));
        let bytes = |start, end| costs.weight_bytes(start..end);
        assert_eq!(bytes(0, pieces.len()), 2 * config.params());
        assert_eq!(bytes(0, 40) + bytes(40, pieces.len()), 2 * (config.params() + table));
    }

    #[test]
    fn ranks_beyond_the_kv_heads_keep_copies() {
        let config = ultra();
        let pieces = pieces(&config, None);
        let kv = |ranks| {
            let costs = estimator(&config, Balance::Roofline).rank_costs(&pieces, ranks, decode(1.0, 1.0));
            costs.kv_bytes_per_token(0..pieces.len())
        };
        assert_eq!((kv(8), kv(16)), (262_144 / 8, 262_144 / 8));
    }

    /// 24.7 ms for 256 rows at a context of 2,048 on an eighth of the model, head and draws shared out: the
    /// arithmetic of an independent script.
    #[test]
    fn a_decode_step_of_ultra_takes_what_was_computed_elsewhere() {
        let config = ultra();
        let pieces = pieces(&config, None);
        let costs = estimator(&config, Balance::Roofline).rank_costs(&pieces, 1, decode(256.0, 2048.0));
        let eighth_ms = costs.seconds(0..pieces.len()) / 8.0 * 1e3;
        assert!((eighth_ms / 24.7 - 1.0).abs() < 0.02, "{eighth_ms}");
    }

    #[test]
    fn a_stage_takes_what_its_pieces_take_together() {
        let config = ultra();
        let mixed = Load { prefill_tokens: 96.0, prefill_context: 500.0, ..decode(64.0, 1500.0) };
        for (column_cut, ranks) in [(None, 1), (Some(SUM_CUT), 1), (Some(SUM_CUT), 8)] {
            let pieces = pieces(&config, column_cut);
            let estimator = estimator(&config, Balance::Roofline);
            let middle = pieces.len() / 3..pieces.len() / 2;
            for stage in [0..pieces.len(), 0..7, middle, pieces.len() - 1..pieces.len()] {
                // As a job has it that was planned for one of the loads.
                let sharing = estimator.sharing(&pieces, ranks, mixed);
                let seconds = estimator.stage_seconds(&pieces, stage.clone(), ranks, &sharing);
                assert!(seconds.kinds.len() <= 40, "{} kinds of pieces", seconds.kinds.len());
                for load in [mixed, mixed.prefill_only(), decode(1.0, 3.0), decode(1024.0, 9000.0)] {
                    let costs = estimator.shared_costs(&pieces, ranks, &sharing, load);
                    let mut direct = costs.seconds(stage.clone());
                    if !pieces[stage.end - 1].ends_block {
                        direct += estimator.stage_meeting_seconds(Meeting::Sum, ranks, load);
                    }
                    let quick = seconds.of(load);
                    assert!((quick / direct - 1.0).abs() < 1e-9, "{stage:?}: {quick} and {direct}");
                }
            }
        }
    }

    /// At a context of 128 K a cut by weights has 1.61 times the mean where the right one has 1.04.
    #[test]
    fn a_cut_by_weights_is_wrong_for_long_contexts() {
        let config = ultra();
        let pieces = pieces(&config, None);
        let costs = |balance| {
            let costs = estimator(&config, balance).rank_costs(&pieces, 1, decode(1.0, 131_072.0));
            [vec![(1, costs.without_extras())]]
        };
        let device = StageDevice { kind: 0, memory_bytes: u64::MAX, hop_seconds: 0.0, cut_hop_seconds: 0.0 };
        let ends: Vec<bool> = pieces.iter().map(|piece| piece.ends_block).collect();
        let devices = [device; 8];
        let (weights, flops) = (costs(Balance::Weights), costs(Balance::Flops));
        let problem = |costs| Problem::new(&devices, &ends, costs);
        let cut = |costs| least_bottleneck(&problem(costs), 0, 8).unwrap();
        let by_flops = problem(&flops).bottleneck_over_mean(&cut(&flops));
        let by_weights = problem(&flops).bottleneck_over_mean(&cut(&weights));
        assert!(by_flops <= 1.041 && by_weights > 1.5, "{by_flops} {by_weights}");
    }
}
