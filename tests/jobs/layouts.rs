//! Layouts that the plan chooses: which devices share what, and that a job keeps what it began with.

use std::process::Output;

use serde_json::{Value, json};

use crate::disturbed::{MODEL, SMALL, assert_done, assert_refused, lines, row, stderr};
use crate::harness::{Job, fixture, read_json};
use crate::logits::{Scores, asking};
use crate::profile::{World, even_costs, set_points};
use crate::ranks::Expected;

/// Micro-batches have room for all rows.
pub(crate) const SETS: [&str; 3] = [
    "pipeline.devices=[\"cpu:0\", \"cpu:1\"]",
    "pipeline.micro_batch_tokens=256",
    "model.max_context_tokens=64",
];

/// Four devices that share all blocks.
pub(crate) const FOUR: [&str; 2] =
    ["pipeline.devices=[\"cpu:0\", \"cpu:1\", \"cpu:2\", \"cpu:3\"]", "pipeline.tensor_parallel=[4]"];

/// A job of so many rows of a model that lets the plan choose, and what has been measured of its devices.
fn world(model: &str, count: usize) -> (World, Job) {
    let world = World::on(model, &SETS);
    let job = world.job.anew().over((0..count).map(row));
    (world, job)
}

/// What makes sharing fast: every block takes as long for many tokens as for one, so that micro-batches of all rows, of
/// which one stage needs only one in flight, come off best.
fn measure_what_favours_sharing(world: &World) {
    world.measure();
    world.edit(|profile| even_costs(profile, None));
}

fn ranks(job: &Job) -> Vec<u64> {
    let manifest = read_json(&job.out().join("manifest.json"));
    let stages = manifest["plan"]["stages"].as_array().expect("stages").clone();
    stages.iter().map(|stage| stage["ranks"].as_u64().expect("a number")).collect()
}

pub(crate) fn all_lines(job: &Job) -> [Vec<String>; 2] {
    ["output.jsonl", "errors.jsonl"].map(|file| lines(&job.out(), file))
}

#[track_caller]
pub(crate) fn done(output: Output) -> String {
    assert_done(&output);
    stderr(&output)
}

#[test]
fn a_new_job_takes_what_the_plan_finds_and_off_keeps_its_stages_apart() {
    let (world, job) = world(MODEL, 20);
    done(world.run_job(&job, &[]));
    assert_eq!(ranks(&job), [1, 1], "by the estimate of so small a model");
    measure_what_favours_sharing(&world);
    let shared = job.anew();
    let said = done(world.run_job(&shared, &[]));
    assert_eq!(ranks(&shared), [2]);
    assert!(said.contains("with tensor_parallel = [2], by"), "{said}");
    let given = job.anew().set("pipeline.tensor_parallel=[2]");
    done(world.run_job(&given, &[]));
    assert!(all_lines(&shared) == all_lines(&given), "the same as where the file says so");
    let apart = job.anew().set("pipeline.tensor_parallel=off");
    done(world.run_job(&apart, &[]));
    assert_eq!(ranks(&apart), [1, 1]);
}

#[test]
fn what_is_measured_between_two_runs_of_a_job_changes_none_of_its_answers() {
    // Begun with a device for each stage, and then sharing is found to be faster; and the other way round.
    let (world, of_rows) = world(SMALL, 20);
    world.measure();
    for begins_shared in [false, true] {
        let [job, undisturbed] = [of_rows.anew(), of_rows.anew()];
        let favour = |is_shared: bool| {
            world.edit(|profile| even_costs(profile, None));
            if !is_shared {
                // Sums over ranks never are free, and now nothing else takes any time.
                world.edit(|profile| {
                    let blocks = profile["blocks"].as_array_mut().unwrap().iter_mut();
                    blocks.for_each(|entry| set_points(&mut entry["points"], |_| 1e-9));
                });
            }
        };
        favour(begins_shared);
        let expected: &[u64] = if begins_shared { &[2] } else { &[1, 1] };
        done(world.run_job(&undisturbed, &[]));
        done(world.run_job(&job, &["--limit", "8"]));
        favour(!begins_shared);
        let other = job.anew();
        done(world.run_job(&other, &[]));
        assert_ne!(ranks(&other), expected, "a new job is laid out otherwise");
        let said = done(world.run_job(&job, &[]));
        assert_eq!(said.contains("as in the job's first run"), begins_shared, "{said}");
        // Nor is a layout proposed that the job would refuse.
        assert_eq!(said.contains("tensor_parallel"), begins_shared, "{said}");
        for run in [&undisturbed, &job] {
            assert_eq!(ranks(run), expected);
        }
        assert!(all_lines(&job) == all_lines(&undisturbed), "begun shared: {begins_shared}");
    }
}

#[test]
fn a_layout_that_the_devices_no_longer_fit_is_named_with_the_cure() {
    let (world, job) = world(SMALL, 20);
    measure_what_favours_sharing(&world);
    done(world.run_job(&job, &["--limit", "8"]));
    let three = ["--set", "pipeline.devices=[\"cpu:0\", \"cpu:1\", \"cpu:2\"]"];
    let words = ["found 3", "took 2", "tensor_parallel = [2]", "hint: name 2 devices", "--accept-numerics"];
    assert_refused(&world.run_job(&job, &three), &words);
    let accepted = [&three[..], &["--accept-numerics"]].concat();
    done(world.run_job(&job, &accepted));
    // What the job was begun with is no longer what it goes on with.
    done(world.run_job(&job, &three));
}

/// Makes attention over keys dear, or free, beside everything else.
pub(crate) fn price_attention(world: &World, is_dear: bool) {
    world.edit(|profile| {
        even_costs(profile, None);
        let price = if is_dear { 1.0 } else { 0.0 };
        for entry in profile["attention"].as_array_mut().unwrap() {
            for points in ["decode", "prefill"] {
                set_points(&mut entry[points], |_| price);
            }
        }
    });
}

/// Ranks beyond the KV heads would read copies of the same keys.
#[test]
fn attention_is_shared_by_sequences_where_that_is_faster_and_stays_so() {
    let world = World::with(&[FOUR[0], SETS[1], SETS[2], FOUR[1]]);
    let job = world.job.anew().over((0..20).map(row));
    let blocks = |job: &Job| {
        let manifest = read_json(&job.out().join("manifest.json"));
        let numerics = manifest["numeric_profile"]["tensor_parallel_stages"].clone();
        (manifest["plan"]["stages"][0]["attention_by_sequences"].clone(), numerics.to_string())
    };
    world.measure();
    price_attention(&world, true);
    let undisturbed = job.anew();
    let output = world.run_job(&undisturbed, &[]);
    assert_done(&output);
    let (shared, numerics) = blocks(&undisturbed);
    assert!(!shared.as_array().unwrap().is_empty(), "no block is shared by sequences");
    assert!(numerics.contains("by sequences"), "{numerics}");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains("ranks (attention of ") && said.contains(" by sequences"), "{said}");
    let processes = job.anew().set("pipeline.ranks=processes");
    done(world.run_job(&processes, &[]));
    assert!(all_lines(&processes) == all_lines(&undisturbed), "processes as threads");
    let all = job.anew().set("pipeline.split_blocks=all");
    done(world.run_job(&all, &[]));
    assert_eq!(blocks(&all).0, json!([]), "where the job says that all is split");
    // Each of four devices has as many pages; the longest row has all that it needs on one of them, or heads are shared.
    for (context, tokens, pages, is_by_sequences) in
        [(64, 300, 8, true), (64, 128, 4, true), (128, 257, 8, true), (128, 256, 4, false)]
    {
        let sets =
            [format!("model.max_context_tokens={context}"), format!("pipeline.kv_cache_tokens={tokens}")];
        let few = sets.iter().fold(job.anew(), |job, set| job.set(set));
        done(world.run_job(&few, &[]));
        assert_eq!(blocks(&few).0 != json!([]), is_by_sequences, "{sets:?}");
        let manifest = read_json(&few.out().join("manifest.json"));
        assert_eq!(manifest["plan"]["kv_cache_tokens"], pages * 64);
        assert!(!is_by_sequences || all_lines(&few) == all_lines(&undisturbed), "rows give way to others");
        // A plan names what the run does, and a simulation plays it: rows of 8 tokens end with their lane, or with the context.
        let asked = |what| {
            let sets = sets.iter().flat_map(|set| ["--set", set]);
            let output = world.ask(what, &["--format", "json"].into_iter().chain(sets).collect::<Vec<_>>());
            serde_json::from_slice::<Value>(&output.stdout).expect("JSON")
        };
        assert_eq!(asked("plan")["stages"][0]["attention_by_sequences"], blocks(&few).0, "{sets:?}");
        let simulated = asked("simulate");
        assert_eq!(simulated["pipeline"]["num_pages"], pages, "{sets:?}");
        let lane_tokens = if is_by_sequences { pages * 64 / 4 } else { pages * 64 };
        assert_eq!(simulated["lengths"]["max_tokens"], (context - 8).min(lane_tokens - 8 + 1), "{sets:?}");
    }
    done(world.run_job(&job, &["--limit", "8"]));

    price_attention(&world, false);
    let by_heads = job.anew();
    done(world.run_job(&by_heads, &[]));
    assert_eq!(blocks(&by_heads).0, json!([]), "a new job");
    done(world.run_job(&job, &[]));
    assert_eq!(blocks(&job).0, shared, "the job that was begun");
    assert!(all_lines(&job) == all_lines(&undisturbed));
}

/// Of three ranks and of four, which each have room for the longest row where the other stage does not part it further. What the
/// first ranks have stays theirs.
#[test]
fn heads_are_shared_out_where_the_lanes_of_all_stages_together_are_too_short() {
    let seven =
        "pipeline.devices=[\"cpu:0\", \"cpu:1\", \"cpu:2\", \"cpu:3\", \"cpu:4\", \"cpu:5\", \"cpu:6\"]";
    let world = World::on(MODEL, &[seven, SETS[1], SETS[2], "pipeline.tensor_parallel=[3, 4]"]);
    world.measure();
    price_shared(&world, "attention_by_sequences", 1e-9);
    price_halves(&world, "ffn", 1.0);
    let job = world.job.anew().over((0..20).map(row)).set("model.max_context_tokens=128");
    for (tokens, is_by_sequences) in [(12 * 65, true), (12 * 64, false)] {
        let job = job.anew().set(format!("pipeline.kv_cache_tokens={tokens}"));
        done(world.run_job(&job, &[]));
        let manifest = read_json(&job.out().join("manifest.json"));
        for stage in manifest["plan"]["stages"].as_array().expect("stages") {
            assert_eq!(stage["attention_by_sequences"] != json!([]), is_by_sequences, "{tokens}: {stage}");
            assert_ne!(stage["ffn_on_first_rank"], json!([]), "{tokens}: {stage}");
        }
    }
}

/// Prices halves that ranks share, attention or FFNs, where one device has them for next to nothing.
pub(crate) fn price_shared(world: &World, halves: &str, seconds: f64) {
    world.edit(|profile| even_costs(profile, None));
    price_halves(world, halves, seconds);
}

/// The same beside whatever else is priced.
fn price_halves(world: &World, halves: &str, seconds: f64) {
    world.edit(|profile| {
        let shared = profile["shared"].as_array_mut().unwrap().iter_mut();
        for half in shared.flat_map(|entry| entry["halves"].as_array_mut().unwrap()) {
            // By heads or by sequences.
            if half["half"].as_object().unwrap().keys().any(|key| key.starts_with(halves)) {
                set_points(&mut half["points"], |_| seconds);
            }
        }
    });
}

/// That halves, `attention` or `ffn`, stay on the first rank where that is faster, and for the whole job. How many there are, and
/// what the report calls them.
#[track_caller]
fn stay_on_the_first_rank(halves: &str, count: usize, words: &str) {
    let world = World::on(MODEL, &[SETS[0], SETS[1], SETS[2], "pipeline.tensor_parallel=[2]"]);
    let job = world.job.anew().over((0..20).map(row));
    let plan = |job: &Job| {
        let manifest = read_json(&job.out().join("manifest.json"));
        let numerics = manifest["numeric_profile"]["tensor_parallel_stages"].to_string();
        (manifest["plan"]["stages"][0][format!("{halves}_on_first_rank")].clone(), numerics)
    };
    world.measure();
    price_shared(&world, halves, 1.0);
    let undisturbed = job.anew();
    let output = world.run_job(&undisturbed, &[]);
    assert_done(&output);
    let (first_ranks, numerics) = plan(&undisturbed);
    assert_eq!(first_ranks.as_array().map(Vec::len), Some(count), "{first_ranks}");
    assert!(
        numerics.contains(&format!("{words} of [")) && numerics.contains("] on the first rank"),
        "{numerics}"
    );
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains(&format!("{words} of {count} blocks on the first rank")), "{said}");
    let processes = job.anew().set("pipeline.ranks=processes");
    done(world.run_job(&processes, &[]));
    assert!(all_lines(&processes) == all_lines(&undisturbed), "processes as threads");
    done(world.run_job(&job, &["--limit", "8"]));

    let all = world.run_job(&job, &["--set", "pipeline.split_blocks=all"]);
    assert_refused(&all, &["tensor parallel stages", "on the first rank", "--accept-numerics"]);

    price_shared(&world, halves, 1e-9);
    let shared = job.anew();
    done(world.run_job(&shared, &[]));
    assert_eq!(plan(&shared).0, json!([]), "a new job");
    done(world.run_job(&job, &[]));
    assert_eq!(plan(&job).0, first_ranks, "the job that was begun");
    assert!(all_lines(&job) == all_lines(&undisturbed));
}

#[test]
fn ffns_stay_on_the_first_rank_where_that_is_faster_and_for_the_whole_job() {
    let ffns = config(MODEL).blocks.iter().filter(|block| block.ffn != stages::Ffn::None).count();
    stay_on_the_first_rank("ffn", ffns, "FFN");
}

#[test]
fn attention_stays_on_the_first_rank_where_that_is_faster_and_for_the_whole_job() {
    let count =
        config(MODEL).blocks.iter().filter(|block| block.attention != stages::Attention::None).count();
    stay_on_the_first_rank("attention", count, "attention");
}

/// They are exceptions that only a plan makes.
#[test]
fn what_is_shared_by_sequences_or_stays_on_the_first_rank_agrees_with_the_reference() {
    let [two, four] = [[SETS[0], "pipeline.tensor_parallel=[2]"], FOUR].map(|[devices, widths]| {
        // Room for the reference's prompts, and little to measure.
        let room = ["model.max_context_tokens=256", "pipeline.micro_batch_tokens=64"];
        let world = World::on(MODEL, &[&[devices, widths, "model.dtype=f32"][..], &room].concat());
        world.measure();
        world
    });
    type Price = fn(&World);
    let cases: [(&str, &World, Price); 3] = [
        ("attention_by_sequences", &four, |world| price_attention(world, true)),
        ("attention_on_first_rank", &two, |world| price_shared(world, "attention", 1.0)),
        ("ffn_on_first_rank", &two, |world| price_shared(world, "ffn", 1.0)),
    ];
    let expected = Expected::of(MODEL, 3);
    for (exception, world, price) in cases {
        price(world);
        let job = asking(world.job.anew().over([]), &expected.reference);
        let output = world.run_job(&job, &[]);
        let manifest = read_json(&job.out().join("manifest.json"));
        let blocks = manifest["plan"]["stages"][0][exception].as_array().expect("blocks");
        assert!(!blocks.is_empty(), "{exception}: no block");
        let found = Scores::of_done(&job.after(output).ok(), &expected.reference);
        expected.check(&found, exception);
    }
}

#[test]
fn plans_name_the_halves_that_stay_on_the_first_device() {
    let world = World::with(&[SETS[0], SETS[1], SETS[2], "pipeline.tensor_parallel=[2]"]);
    world.measure();
    price_shared(&world, "ffn", 1.0);
    let planned = |args: &[&str]| {
        let output = world.ask("plan", &[&["--format", "json"], args].concat());
        let plan: Value = serde_json::from_slice(&output.stdout).expect("a plan");
        plan["stages"][0].clone()
    };
    let stage = planned(&[]);
    let ffns = (config(SMALL).blocks.iter().enumerate())
        .filter(|(_, block)| block.ffn != stages::Ffn::None)
        .map(|(index, _)| index)
        .collect::<Vec<_>>();
    assert_eq!(stage["ffn_on_first_rank"], json!(ffns));
    let table = world.ask("plan", &[]).stdout;
    let line = format!("FFN of blocks {ffns:?} on the first rank");
    assert!(String::from_utf8_lossy(&table).contains(&line), "{}", String::from_utf8_lossy(&table));
    // The first of them has all of their weights.
    let all = planned(&["--set", "pipeline.split_blocks=all"]);
    assert_eq!(all["ffn_on_first_rank"], json!([]));
    let weights = |stage: &Value| stage["memory"]["weights"].as_u64().unwrap();
    assert!(weights(&stage) > weights(&all), "{stage} {all}");
}

fn config(model: &str) -> stages::ModelConfig {
    stages::ModelConfig::read(&fixture(model)).unwrap()
}

/// A stage for each width, or none of them: a device that a list names is not left idle in silence. The cures are those of the hint.
#[test]
fn widths_of_more_stages_than_the_fastest_cut_has_are_refused() {
    let devices = |count: usize| {
        let names: Vec<String> = (0..count).map(|index| format!("\"cpu:{index}\"")).collect();
        format!("pipeline.devices=[{}]", names.join(", "))
    };
    let job = Job::on("llama").completion("row", json!({"prompt": [5, 6, 7], "max_tokens": 2}));
    let idle = job.anew().set(devices(6)).set("pipeline.tensor_parallel=[1,1,1,1,2]");
    let words = [
        "[pipeline] tensor_parallel: found [1, 1, 1, 1, 2], of which the fastest cut leaves the last 1 stages without work",
        "hint: tensor_parallel = [1, 1, 1, 1] with 4 devices, or stages that say which blocks each has",
    ];
    assert_refused(&idle.run_once(&[]), &words);
    job.anew().set(devices(4)).set("pipeline.tensor_parallel=[1,1,1,1]").run().ok();
    idle.set("pipeline.stages=[[0,1],[1,2],[2,3],[3,\"3:128\"],[\"3:128\",4]]").run().ok();
}
