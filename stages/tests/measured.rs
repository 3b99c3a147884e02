//! Profiles as a store keeps them, and costs made of them.

use std::path::{Path, PathBuf};

use scheduler::RankCosts;
use stages::cost::{Basis, Channel, CostModel, Load, Measured, NumberType, NumberTypes, PieceShape, pieces};
use stages::profile::{
    AttentionEntry, BlockEntry, BlockShape, Both, ContextPoint, Effort, FORMAT, Half, HalfEntry,
    MeasureOptions, Missing, Neighbours, Profile, ProfileKey, Seconds, SharedEntry, SharedHalf, Store,
    Stored, TokenPoint, measure,
};
use stages::{
    AttentionSharing, BlockSharing, Device, Dtypes, Exceptions, FfnSharing, KvDtype, Model, ModelConfig,
    SUM_CUT, Sharing, Simd, WeightType, available_cores,
};

const TYPES: NumberTypes = NumberTypes { weights: NumberType::Bf16, kv: NumberType::Bf16 };
const DTYPES: Dtypes = Dtypes { weights: WeightType::Bf16, kv: KvDtype::Bf16 };
const NO_TIME: Channel = Channel { latency_seconds: 0.0, bytes_per_second: 1e30 };

/// Three blocks: two alike, and one without attention.
const CONFIG: &str = r#"{
    "architectures": ["DeciLMForCausalLM"], "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 96,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "num_hidden_layers": 3, "block_configs": [
        {"attention": {"n_heads_in_group": 2}, "ffn": {"intermediate_size": 128}},
        {"attention": {"no_op": true}, "ffn": {"intermediate_size": 256}},
        {"attention": {"n_heads_in_group": 2}, "ffn": {"intermediate_size": 128}}]}"#;

fn config() -> ModelConfig {
    ModelConfig::parse(Path::new("config.json"), CONFIG).unwrap()
}

fn seconds(median: f64) -> Seconds {
    Seconds { median, lower: median, upper: median, repeats: 5 }
}

fn curve(points: &[(usize, f64)]) -> Both<Vec<TokenPoint>> {
    let point = |factor: f64, &(tokens, median): &(usize, f64)| TokenPoint {
        tokens,
        seconds: seconds(factor * median),
        flops_per_second: 0.0,
        bytes_per_second: 0.0,
    };
    Both {
        alone: points.iter().map(|p| point(1.0, p)).collect(),
        busy: points.iter().map(|p| point(2.0, p)).collect(),
    }
}

fn by_context(points: &[(f64, f64)]) -> Both<Vec<ContextPoint>> {
    let point =
        |&(context, median)| ContextPoint { context, seconds: seconds(median), bytes_per_second: 0.0 };
    let points: Vec<ContextPoint> = points.iter().map(point).collect();
    Both { alone: points.clone(), busy: points }
}

fn key() -> ProfileKey {
    ProfileKey::of(&Device::Reference, 2, DTYPES, config().dims, 1000)
}

fn profile() -> Profile {
    let shapes = Missing::all_of(&config(), &[]).blocks;
    let entry = |shape: &BlockShape| BlockEntry {
        shape: *shape,
        weight_bytes: 1,
        copies: 1,
        points: curve(&[(1, 0.5), (2, 1.0), (8, 4.0)]),
    };
    Profile {
        format: FORMAT,
        program: env!("CARGO_PKG_VERSION").to_owned(),
        measured_at: 0,
        key: key(),
        hop: curve(&[(1, 0.125)]),
        embedding: curve(&[(1, 0.25), (8, 0.25)]),
        head: curve(&[(1, 1.0), (8, 8.0)]),
        blocks: shapes.iter().map(entry).collect(),
        attention: vec![AttentionEntry {
            kv_heads: 2,
            decode: by_context(&[(64.0, 0.5), (256.0, 2.0)]),
            prefill: by_context(&[(64.0, -0.25), (256.0, 1.0)]),
        }],
        shared: vec![],
        too_large: vec![],
    }
}

/// The same with stages of two devices: halves of blocks, and what ranks tell each other.
fn shared_profile() -> Profile {
    let points = |points: &[(usize, f64)]| curve(points).alone;
    let half = |half: &SharedHalf| HalfEntry {
        half: half.half,
        weight_bytes: 1,
        copies: 1,
        points: curve(&match half.half {
            Half::Attention(_) => [(1, 0.5), (2, 0.5), (8, 1.0)],
            Half::AttentionBySequences(_) => [(1, 0.25), (2, 0.25), (8, 4.0)],
            Half::Ffn(_) => [(1, 0.5), (2, 1.0), (8, 2.0)],
        }),
    };
    let entry = SharedEntry {
        ranks: 2,
        all_reduce: points(&[(1, 0.0625), (8, 0.5)]),
        all_gather: points(&[(1, 0.015625), (8, 0.125)]),
        broadcast: points(&[(1, 0.03125), (8, 0.25)]),
        head: curve(&[(1, 0.75), (8, 5.0)]),
        halves: Missing::all_of(&config(), &[2]).halves.iter().map(half).collect(),
    };
    Profile { shared: vec![entry], ..profile() }
}

fn measured(profile: &Profile) -> Measured {
    Measured::new(&config(), profile, Neighbours::Idle, TYPES, NO_TIME).unwrap()
}

fn decode(rows: f64, context: f64) -> Load {
    Load { decode_tokens: rows, decode_context: context, logit_rows: rows, ..Load::default() }
}

#[test]
fn costs_are_the_measured_ones_where_there_are_any() {
    let (costs, pieces) = (measured(&profile()), pieces(&config(), None));
    let load = decode(2.0, 64.0);
    let rank = costs.rank_costs(&pieces, 1, load);
    // 1.0 for two tokens, and twice 0.5 for their context; none of it without attention.
    assert_eq!(rank.without_extras().seconds(0..1), 2.0);
    assert_eq!(rank.without_extras().seconds(1..2), 1.0);
    assert_eq!(rank.seconds(0..3), 0.25 + 2.0 + 1.0 + 2.0 + 2.0);
    assert_eq!(rank.weight_bytes(0..3), 2 * config().params());
    assert_eq!(costs.basis(&pieces, 1, &Sharing::default(), decode(1.0, 64.0)), Basis::Measured);
    assert_eq!(costs.basis(&pieces, 1, &Sharing::default(), decode(8.0, 256.0)), Basis::Measured);
}

#[test]
fn costs_say_where_they_go_beyond_what_was_measured() {
    let (costs, whole) = (measured(&profile()), pieces(&config(), None));
    for (load, basis) in [
        (decode(4.0, 64.0), Basis::Interpolated),
        (decode(8.0, 100.0), Basis::Interpolated),
        (decode(16.0, 64.0), Basis::Extrapolated),
        (decode(8.0, 512.0), Basis::Extrapolated),
    ] {
        assert_eq!(costs.basis(&whole, 1, &Sharing::default(), load), basis, "{load:?}");
    }
    assert_eq!(costs.basis(&whole, 2, &Sharing::default(), decode(8.0, 64.0)), Basis::Scaled);
    let halves = costs.rank_costs(&whole, 2, decode(8.0, 64.0));
    let alone = costs.rank_costs(&whole, 1, decode(8.0, 64.0));
    let ratio = halves.without_extras().seconds(0..3) / alone.without_extras().seconds(0..3);
    assert!((0.49..0.51).contains(&ratio), "{ratio}");
    // The first rank looks tokens up by itself.
    let embedding = |costs: &RankCosts| costs.seconds(0..1) - costs.without_extras().seconds(0..1);
    assert_eq!(embedding(&halves), embedding(&alone));
    // Some columns of an FFN take their share, and all of them together what the block does.
    let columns = pieces(&config(), Some(SUM_CUT));
    let cut = costs.rank_costs(&columns, 1, decode(8.0, 64.0));
    assert!((cut.seconds(0..columns.len()) / alone.seconds(0..3) - 1.0).abs() < 1e-9);
}

#[test]
fn a_stage_of_two_devices_takes_what_its_halves_were_measured_to_take() {
    let config = config();
    let costs = measured(&shared_profile());
    let (whole, load) = (pieces(&config, None), decode(8.0, 64.0));
    // By sequences it would take four times as long, and twice where each rank has half of eight rows.
    assert_eq!(costs.sharing(&whole, 2, load), Sharing::default());
    assert_eq!(costs.basis(&whole, 2, &Sharing::default(), load), Basis::Measured);
    let rank = costs.rank_costs(&whole, 2, load);
    let alone = rank.without_extras();
    // 1.0 and 2.0 of the halves with what ranks tell each other, and half of eight times 0.5 for the context.
    assert_eq!(alone.seconds(0..1), 3.0 + 2.0);
    assert_eq!(alone.seconds(1..2), 2.0);
    // Beside them the broadcast with which the stage begins, the look-up, and the head on two devices.
    assert_eq!(rank.seconds(0..3), 2.0 * 5.0 + 2.0 + 0.25 + 0.25 + 5.0);
    assert_eq!(rank.entry_seconds(), 0.25);
    // Columns have their share of an FFN without its sum, which comes with the last, or with a stage that ends before.
    let columns = pieces(&config, Some(64));
    assert_eq!(columns.len(), 3, "the units of pieces are wider than these FFNs");
    let parted = |at: usize| {
        [0..at, at..256].map(|columns| PieceShape {
            block: 1,
            ends_block: columns.end == 256,
            columns: Some(columns),
        })
    };
    let halved = costs.rank_costs(&parted(128), 2, load);
    assert_eq!(halved.without_extras().seconds(0..1), 0.5 * 1.5);
    assert_eq!(halved.without_extras().seconds(1..2), 0.5 * 1.5 + 0.5);
    assert_eq!((halved.cut_seconds(1), halved.cut_seconds(2)), (0.5, 0.0));
    // One unit is the first rank's, which takes its share of the block alone, and tells nothing at the cut.
    let sliver = costs.rank_costs(&parted(64), 2, load);
    assert_eq!(sliver.without_extras().seconds(0..1), 0.25 * 4.0);
    assert_eq!(sliver.without_extras().seconds(1..2), 0.75 * 1.5 + 0.5);
    assert_eq!(sliver.cut_seconds(1), 0.0);
    // As where all of the FFN is left to it.
    let on_first = BlockSharing { ffn: FfnSharing::FirstRank, ..BlockSharing::default() };
    let on_first = costs.shared_costs(&parted(128), 2, &Sharing::uniform([1], on_first), load);
    assert_eq!(on_first.cut_seconds(1), 0.0);
}

/// Columns of linear matrices, whose half was not measured: their share of the block, and what puts them side by side.
#[test]
fn a_linear_half_that_was_not_measured_is_charged_with_an_all_gather() {
    let text = CONFIG
        .replace(r#""hidden_size": 64"#, r#""hidden_size": 128"#)
        .replace(r#"{"intermediate_size": 256}"#, r#"{"replace_with_linear": true}"#);
    let config = ModelConfig::parse(Path::new("config.json"), &text).unwrap();
    let mut profile = shared_profile();
    let shape = BlockShape::from(config.blocks[1]);
    profile.blocks.push(BlockEntry { shape, ..profile.blocks[0].clone() });
    let costs = Measured::new(&config, &profile, Neighbours::Idle, TYPES, NO_TIME).unwrap();
    let load = decode(8.0, 64.0);
    let seconds =
        |ranks| costs.rank_costs(&pieces(&config, None), ranks, load).without_extras().seconds(1..2);
    assert_eq!((seconds(1), seconds(2)), (4.0, 2.0 + 0.125));
}

#[test]
fn a_job_keeps_its_sharing_of_attention_where_another_would_be_faster() {
    // A block takes as long for a token as for eight, so that nothing is left to the first rank.
    let mut profile = shared_profile();
    profile.blocks.iter_mut().for_each(|entry| entry.points = curve(&[(1, 4.0), (8, 4.0)]));
    let costs = measured(&profile);
    let pieces = pieces(&config(), None);
    let (one, many) = (decode(1.0, 4.5), decode(8.0, 4.5));
    let of_one = costs.sharing(&pieces, 2, one);
    assert_eq!(
        (of_one.exceptions().attention_by_sequences, costs.sharing(&pieces, 2, many)),
        (vec![0, 2], Sharing::default())
    );
    assert_eq!(costs.sharing_in(&AttentionSharing::OF_ANY_PAGE, &pieces, 2, one), Sharing::default());
    let seconds = |sharing: &Sharing| costs.shared_costs(&pieces, 2, sharing, many).seconds(0..3);
    assert!(seconds(&of_one) > seconds(&Sharing::default()));
    assert_eq!(costs.rank_costs(&pieces, 2, many).seconds(0..3), seconds(&Sharing::default()));
}

/// Of one token, what ranks tell each other is most of what halves take.
#[test]
fn halves_are_left_to_the_first_rank_where_that_was_measured_to_be_faster() {
    let costs = measured(&shared_profile());
    let (pieces, load) = (pieces(&config(), None), decode(1.0, 4.5));
    let sharing = costs.sharing(&pieces, 2, load);
    let expected = Exceptions {
        attention_on_first_rank: vec![0, 2],
        ffn_on_first_rank: vec![0, 2],
        ..Exceptions::default()
    };
    assert_eq!(sharing.exceptions(), expected);
    // Two halves that make up a block, and a broadcast after each; and an FFN that is as fast on two ranks.
    let seconds = costs.shared_costs(&pieces, 2, &sharing, load);
    let seconds = |piece: usize| seconds.without_extras().seconds(piece..piece + 1);
    assert!((seconds(0) - (0.5 + 2.0 * 0.03125)).abs() < 1e-12, "{}", seconds(0));
    assert_eq!(seconds(1), 0.5);
    assert_eq!(costs.basis(&pieces, 2, &sharing, load), Basis::Scaled);
    // All weights of these halves are on the first rank, and all keys and values.
    let bytes = |ranks, sharing: &Sharing| {
        let costs = costs.shared_costs(&pieces, ranks, sharing, load);
        (costs.without_extras().weight_bytes(0..1), costs.kv_bytes_per_token(0..1))
    };
    assert_eq!(bytes(2, &sharing), bytes(1, &Sharing::default()));
}

/// Of two devices that share the memory the other one waits, where both are in the stage; of three the third does not.
#[test]
fn what_the_first_rank_has_alone_takes_what_it_does_while_others_wait() {
    let on_first = BlockSharing { ffn: FfnSharing::FirstRank, ..BlockSharing::default() };
    let seconds = |devices| {
        let profile = Profile {
            key: ProfileKey::of(&Device::Reference, devices, DTYPES, config().dims, 1000),
            ..profile()
        };
        let costs = Measured::new(&config(), &profile, Neighbours::Busy, TYPES, NO_TIME).unwrap();
        let pieces = pieces(&config(), None);
        let costs = costs.shared_costs(&pieces, 2, &Sharing::uniform([1], on_first), decode(8.0, 64.0));
        costs.without_extras().seconds(1..2)
    };
    // The block of an FFN alone takes 4.0, and beside others twice as long.
    assert_eq!((seconds(2), seconds(3)), (4.0, 8.0));
}

/// A half that makes up its block was measured with it.
#[test]
fn a_whole_block_on_the_first_rank_is_as_sure_as_on_one_device() {
    let costs = measured(&shared_profile());
    let pieces = pieces(&config(), None);
    let ffn = BlockSharing { ffn: FfnSharing::FirstRank, ..BlockSharing::default() };
    let basis = |block: usize| {
        let sharing = Sharing::uniform([block], ffn);
        costs.basis(&pieces[block..block + 1], 2, &sharing, decode(8.0, 64.0))
    };
    assert_eq!((basis(0), basis(1)), (Basis::Scaled, Basis::Measured));
}

#[test]
fn more_tokens_and_longer_contexts_never_take_less() {
    let (costs, pieces) = (measured(&profile()), pieces(&config(), None));
    let at = |rows, context| costs.rank_costs(&pieces, 1, decode(rows, context)).seconds(0..3);
    let rows: Vec<f64> = (1..40).map(|rows| at(f64::from(rows), 100.0)).collect();
    let contexts: Vec<f64> = (1..100).map(|context| at(4.0, f64::from(context * 5))).collect();
    assert!(rows.is_sorted() && contexts.is_sorted(), "{rows:?} {contexts:?}");
}

#[test]
fn a_stage_takes_its_blocks_its_ends_and_its_parts_of_hops() {
    let (costs, pieces) = (measured(&profile()), pieces(&config(), None));
    let load = decode(1.0, 4.5);
    assert_eq!(costs.step_seconds(&pieces, 0..1, 1, &Sharing::default(), load), 0.25 + 0.5 + 0.0625);
    assert_eq!(costs.step_seconds(&pieces, 1..2, 1, &Sharing::default(), load), 0.5 + 0.125);
    assert_eq!(costs.step_seconds(&pieces, 2..3, 1, &Sharing::default(), load), 0.5 + 1.0 + 0.0625);
    assert_eq!(costs.step_seconds(&pieces, 0..3, 1, &Sharing::default(), load), 0.25 + 1.5 + 1.0);
}

#[test]
fn a_profile_without_a_block_of_the_model_makes_no_costs() {
    let mut lacking = profile();
    lacking.blocks.pop();
    let error = Measured::new(&config(), &lacking, Neighbours::Busy, TYPES, NO_TIME).unwrap_err();
    assert_eq!(error.to_string(), "the profile lacks 1 of the model's blocks: none, swiglu 256");
    let whole = lacking.with_entries_of(profile());
    assert!(whole.missing(&config(), &[]).is_empty() && whole.blocks.len() == 2);
}

#[test]
fn a_store_gives_back_what_it_was_given() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::at(folder.path().join("not/yet/there"));
    assert_eq!(store.load(&key()), Stored::Absent);
    let path = store.save(&profile()).unwrap();
    assert_eq!(store.load(&key()), Stored::Usable(Box::new(profile())));
    let files = std::fs::read_dir(path.parent().unwrap()).unwrap().count();
    assert_eq!(files, 1, "something unfinished is left");
}

#[test]
fn profiles_of_other_versions_are_stale_and_what_is_no_profile_is_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::at(folder.path().to_owned());
    let path = store.save(&profile()).unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    let after = |edit: &dyn Fn(&str) -> String| {
        std::fs::write(&path, edit(&text)).unwrap();
        store.load(&key())
    };
    let own = format!("\"program\": {:?}", env!("CARGO_PKG_VERSION"));
    let stale = after(&|text| text.replace(&own, "\"program\": \"0.0.1\""));
    assert!(matches!(&stale, Stored::Stale(why) if why.contains("0.0.1")), "{stale:?}");
    // The one before had no all-gathers.
    for other in [2, 99] {
        let [present, other] = [FORMAT, other].map(|format| format!("\"format\": {format}"));
        let stale = after(&|text| text.replace(&present, &other));
        assert!(
            matches!(&stale, Stored::Stale(why) if why.contains(&other.replace("\"format\":", "format"))),
            "{stale:?}"
        );
    }
    for (edit, words) in [
        ((|text: &str| text[..text.len() / 2].to_owned()) as fn(&str) -> String, "not JSON"),
        (|_| "[]".to_owned(), "no format"),
        (|text| text.replace("\"devices\": 2", "\"devices\": 3"), "a profile of reference none"),
        (|text| text.replace("\"tokens\": 8", "\"tokens\": 1"), "not in order"),
        (|text| text.replace("\"median\": 0.5", "\"median\": -0.5"), "not in order, or no times"),
    ] {
        let damaged = after(&edit);
        assert!(matches!(&damaged, Stored::Damaged(why) if why.contains(words)), "{words}: {damaged:?}");
    }
}

#[test]
fn a_key_tells_devices_types_and_dimensions_apart() {
    let dims = config().dims;
    let file = |device: &Device, devices, dtypes, dims, bytes| {
        ProfileKey::of(device, devices, dtypes, dims, bytes).file_name()
    };
    let cpu = |threads| Device::Cpu { cores: vec![0], threads, simd: Simd::Portable };
    let f32s = Dtypes { weights: WeightType::F32, ..DTYPES };
    let names = [
        file(&cpu(1), 2, DTYPES, dims, 1000),
        file(&cpu(2), 2, DTYPES, dims, 1000),
        file(&cpu(1), 1, DTYPES, dims, 1000),
        file(&Device::Reference, 2, DTYPES, dims, 1000),
        file(&cpu(1), 2, f32s, dims, 1000),
        file(&cpu(1), 2, DTYPES, stages::Dims { vocab: 97, ..dims }, 1000),
        file(&cpu(1), 2, DTYPES, dims, 4000),
    ];
    let distinct: std::collections::BTreeSet<&String> = names.iter().collect();
    assert_eq!(distinct.len(), names.len(), "{names:?}");
    assert_eq!(names[0], file(&cpu(1), 2, DTYPES, dims, 1000));
    // What is larger than twice the last cache is as cold as it gets.
    assert_eq!(file(&cpu(1), 2, DTYPES, dims, 1 << 50), file(&cpu(1), 2, DTYPES, dims, 1 << 51));
}

#[test]
fn the_environment_says_where_profiles_are() {
    let store = |set: &[(&str, &str)]| {
        let find = |name: &str| set.iter().find(|(n, _)| *n == name).map(|(_, value)| PathBuf::from(value));
        Store::of_environment(find).map(|store| store.folder().to_owned())
    };
    let all = [("SPANWISE_PROFILES", "/p"), ("XDG_CACHE_HOME", "/c"), ("HOME", "/h")];
    assert_eq!(store(&all), Some("/p".into()));
    assert_eq!(store(&all[1..]), Some("/c/spanwise/profiles".into()));
    assert_eq!(store(&all[2..]), Some("/h/.cache/spanwise/profiles".into()));
    assert_eq!(store(&[("SPANWISE_PROFILES", ""), ("HOME", "")]), None);
}

#[test]
fn every_distinct_block_is_measured_alone_and_beside_others() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), CONFIG).unwrap();
    let (model, _) = Model::open(folder.path(), true).unwrap();
    let device = Device::Cpu { cores: available_cores(), threads: 1, simd: Simd::detect() };
    let options = MeasureOptions {
        devices: vec![device; 2],
        dtypes: DTYPES,
        context_tokens: 200,
        micro_batch_tokens: 6,
        widths: vec![2],
        free_bytes: 1 << 30,
        effort: Effort { point_seconds: 1e-4, least_repeats: 2 },
    };
    let mut lines = vec![];
    let wanted = Missing::all_of(&model.config, &options.widths);
    let profile = measure(&model, &options, &wanted, &mut |line| lines.push(line.to_owned())).unwrap();
    // Four halves on two devices: attention by heads and by sequences, and two FFNs.
    assert_eq!((profile.blocks.len(), profile.attention.len(), lines.len()), (2, 1, 8));
    assert!(profile.missing(&model.config, &[2]).is_empty());
    let shared = profile.shared(2).unwrap();
    assert_eq!(shared.halves.len(), 4);
    let curves = shared.halves.iter().map(|half| &half.points.busy);
    let meetings = [&shared.all_reduce, &shared.all_gather, &shared.broadcast];
    for points in curves.chain(meetings).chain([&shared.head.busy]) {
        let tokens: Vec<usize> = points.iter().map(|point| point.tokens).collect();
        assert_eq!(tokens, [1, 2, 4, 6]);
        assert!(points.iter().all(|point| point.seconds.median > 0.0 && point.seconds.repeats >= 2));
    }
    for points in [&profile.blocks[0].points, &profile.head, &profile.embedding, &profile.hop] {
        let tokens: Vec<usize> = points.busy.iter().map(|point| point.tokens).collect();
        assert_eq!(tokens, [1, 2, 4, 6]);
        assert!(points.alone.iter().all(|point| point.seconds.median > 0.0 && point.seconds.repeats >= 2));
    }
    let contexts: Vec<f64> = profile.attention[0].decode.alone.iter().map(|point| point.context).collect();
    assert_eq!(contexts, [64.0, 200.0]);
    // What was measured can be stored and planned with.
    let store = Store::at(folder.path().to_owned());
    store.save(&profile).unwrap();
    let stored = store.load(&options.key(&model));
    assert!(matches!(stored, Stored::Usable(stored) if stored.missing(&model.config, &[2]).is_empty()));
    Measured::new(&model.config, &profile, Neighbours::Busy, TYPES, NO_TIME).unwrap();

    // Where the memory has no room for a block, the rest is measured.
    let little = MeasureOptions { free_bytes: 1 << 16, ..options };
    let rest = measure(&model, &little, &wanted, &mut |line| lines.push(line.to_owned())).unwrap();
    assert!(rest.blocks.is_empty() && rest.attention.is_empty());
    assert!(lines.iter().filter(|line| line.contains("is left out")).count() == 6, "{lines:?}");
    // Half of an attention has room where all of it has none.
    assert_eq!(rest.shared(2).unwrap().halves.len(), 1);
}
