//! Which halves of blocks ranks share, by estimates: what sharing saves against what ranks tell each other.

use std::path::Path;

use scheduler::Span;
use stages::cost::{Balance, Channel, CostModel, Estimator, Load, NumberType, NumberTypes, Roofline, pieces};
use stages::{
    AttentionSharing, BlockSharing, Dtypes, GpuMemory, KvDtype, ModelConfig, PAGE_TOKENS, Part, RankPlace,
    SUM_CUT, Sharing, StepSize, WeightType,
};

/// A wide FFN, a narrow one, one that is a single unit of columns, and a linear one; no block has attention.
const FFNS: &str = r#"{
    "architectures": ["DeciLMForCausalLM"], "hidden_size": 1024, "num_attention_heads": 8, "vocab_size": 96,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "num_hidden_layers": 4, "block_configs": [
        {"attention": {"no_op": true}, "ffn": {"intermediate_size": 16384}},
        {"attention": {"no_op": true}, "ffn": {"intermediate_size": 128}},
        {"attention": {"no_op": true}, "ffn": {"intermediate_size": 64}},
        {"attention": {"no_op": true}, "ffn": {"replace_with_linear": true}}]}"#;

fn config() -> ModelConfig {
    ModelConfig::parse(Path::new("config.json"), FFNS).unwrap()
}

/// Weights come at 10 GB/s, and whatever ranks tell each other at so many bytes a second.
fn estimator(config: &ModelConfig, told_per_second: f64, balance: Balance) -> Estimator<'_> {
    let told = Channel { latency_seconds: 0.0, bytes_per_second: told_per_second };
    let roofline = Roofline {
        flops_per_second: 1e12,
        bf16_flops_per_second: 1e12,
        attention_flops_per_second: 1e12,
        attention_head_seconds: 0.0,
        bytes_per_second: 10e9,
        activation_bytes_per_second: 1e12,
        link: told,
        all_reduce: told,
    };
    let types = NumberTypes { weights: NumberType::Bf16, kv: NumberType::Bf16 };
    Estimator { config, roofline, types, balance }
}

fn decode(rows: f64) -> Load {
    Load { decode_tokens: rows, decode_context: 100.0, logit_rows: rows, ..Load::default() }
}

/// FFNs that are left to the first of two ranks.
fn on_first_rank(costs: &impl CostModel, config: &ModelConfig, column_cut: Option<usize>) -> Vec<usize> {
    costs.sharing(&pieces(config, column_cut), 2, decode(64.0)).exceptions().ffn_on_first_rank
}

#[test]
fn a_narrow_ffn_stays_on_the_first_rank_where_all_reduces_are_slow_and_a_wide_one_is_shared() {
    let config = config();
    // 64 rows of f32 are 262 KB: at 100 MB/s a sum takes 2.6 ms and a copy half of that. The wide FFN has 100 MB, which take
    // 10 ms; the narrow one 0.8 MB.
    let (slow, fast) = (0.1e9, 100e9);
    for column_cut in [None, Some(SUM_CUT)] {
        let ffns = |told| on_first_rank(&estimator(&config, told, Balance::Roofline), &config, column_cut);
        // Too narrow for two is what the third has. What a linear one gives is put side by side, which is no slower than a copy.
        assert_eq!(ffns(slow), [1, 2], "{column_cut:?}");
        assert_eq!(ffns(fast), [2], "{column_cut:?}");
    }
}

#[test]
fn what_the_first_rank_has_alone_is_charged_with_all_of_it_and_a_broadcast() {
    let config = config();
    let costs = estimator(&config, 0.1e9, Balance::Roofline);
    let (pieces, load) = (pieces(&config, None), decode(64.0));
    let of_ranks = |ranks: usize, sharing: &Sharing| {
        let costs = costs.shared_costs(&pieces, ranks, sharing, load).without_extras();
        (costs.seconds(1..2), costs.weight_bytes(1..2))
    };
    let (alone, shared) = (of_ranks(1, &Sharing::default()), of_ranks(2, &costs.sharing(&pieces, 2, load)));
    let broadcast = 64.0 * 1024.0 * 4.0 / 2.0 / 0.1e9;
    assert!((shared.0 - alone.0 - broadcast).abs() < 1e-9, "{shared:?} beside {alone:?}");
    assert_eq!(shared.1, alone.1);
    assert!(of_ranks(2, &Sharing::default()).0 > shared.0);
}

/// Nothing is told where a plan balances weights alone.
#[test]
fn by_weights_all_is_shared_that_can_be() {
    let config = config();
    for balance in [Balance::Weights, Balance::Flops] {
        assert_eq!(on_first_rank(&estimator(&config, 1.0, balance), &config, None), [2], "{balance:?}");
    }
}

#[test]
fn nothing_is_shared_by_a_single_rank() {
    let config = config();
    let costs = estimator(&config, 0.1e9, Balance::Roofline);
    assert_eq!(costs.sharing(&pieces(&config, None), 1, decode(64.0)), Sharing::default());
}

/// What a plan counts for a token is what a page takes of the fullest rank's memory: by heads, by sequences, and with both in one
/// stage.
#[test]
fn a_plan_counts_as_many_bytes_of_a_token_as_the_fullest_rank_keeps() {
    let ultra = Path::new("../configs/models/Llama-3_1-Nemotron-Ultra-253B-v1");
    let config = ModelConfig::read(ultra).unwrap();
    let part: Part = Span { start: 16, end: 40 }.into();
    let costs = estimator(&config, 1e9, Balance::Roofline);
    let by_sequences = BlockSharing { attention: AttentionSharing::Sequences, ..Default::default() };
    let dtypes = Dtypes { weights: WeightType::Bf16, kv: KvDtype::Bf16 };
    let step = StepSize { rows: 512, sequences: 256, context_tokens: 4096, micro_batches: 3, arrivals: 0 };
    for ranks in 1..=4 {
        let [none, some, all] = [0..0, 16..28, 16..40].map(|blocks| {
            let sharing = Sharing::uniform(blocks, by_sequences);
            let planned = costs.shared_costs(&pieces(&config, None), ranks, &sharing, decode(1.0));
            let of_rank = |rank| {
                let place = RankPlace { rank, num_ranks: ranks };
                GpuMemory::of(&config, part, (place, &sharing), dtypes, (step, None)).page_bytes
            };
            let fullest = (0..ranks).map(of_rank).max().unwrap();
            assert_eq!(
                fullest,
                planned.kv_bytes_per_token(16..40) * PAGE_TOKENS as u64,
                "{ranks}: {sharing:?}"
            );
            fullest
        });
        // Eight KV heads are shared out evenly by sequences alone where ranks are three.
        assert!(all <= some && some <= none && (all < none) == (ranks == 3), "{all} {some} {none}");
    }
}
