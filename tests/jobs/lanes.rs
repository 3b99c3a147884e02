//! Jobs whose devices share out sequences, so that a row has pages in one lane of the cache alone.

use serde_json::{Value, json};

use crate::disturbed::{assert_done, assert_refused, stdout};
use crate::harness::{Job, batch_line, fixture, read_json};
use crate::layouts::{all_lines, done, price_attention, price_shared};
use crate::profile::World;

/// A world where attention is shared by sequences, as that is next to free.
fn by_sequences(sets: &[&'static str]) -> World {
    let world = World::with(sets);
    world.measure();
    price_shared(&world, "attention_by_sequences", 1e-9);
    world
}

/// How many ranks each stage of a job's last run had, and which blocks it has shared by sequences, of which there must be some.
#[track_caller]
fn shared_by_sequences(job: &Job) -> Vec<(u64, Vec<Value>)> {
    let manifest = read_json(&job.out().join("manifest.json"));
    let of_stage = |stage: &Value| {
        let blocks = stage["attention_by_sequences"].as_array().expect("blocks").clone();
        assert!(!blocks.is_empty(), "no block of {stage}");
        (stage["ranks"].as_u64().expect("a number"), blocks)
    };
    manifest["plan"]["stages"].as_array().expect("stages").iter().map(of_stage).collect()
}

fn kv_tokens(job: &Job) -> u64 {
    read_json(&job.out().join("manifest.json"))["plan"]["kv_cache_tokens"].as_u64().expect("a number")
}

/// A row of two pages, whose content is decided by its number.
fn row(i: usize) -> String {
    let body =
        json!({"prompt": format!("hello {i}"), "max_tokens": 70 + i % 5 * 10, "seed": i, "ignore_eos": true});
    batch_line(&format!("row-{i}"), "/v1/completions", &body)
}

/// Two lanes, in each of which a row may have two pages.
#[test]
fn a_job_goes_on_by_sequences_only_with_a_cache_whose_lanes_have_room_for_its_rows() {
    let sets = [
        "pipeline.devices=[\"cpu:0\", \"cpu:1\"]",
        "pipeline.tensor_parallel=[2]",
        "pipeline.micro_batch_tokens=256",
        "model.max_context_tokens=128",
    ];
    let world = by_sequences(&sets);
    let job = world.job.anew().over((0..12).map(row));
    let undisturbed = job.anew();
    done(world.run_job(&undisturbed, &[]));
    for goes_on in [
        &["--set", "pipeline.kv_cache_tokens=256"][..],
        // By heads rows share all pages, in turn.
        &["--set", "pipeline.kv_cache_tokens=128", "--set", "pipeline.split_blocks=all", "--accept-numerics"],
    ] {
        let job = job.anew();
        done(world.run_job(&job, &["--limit", "4"]));
        let (shared, written) = (shared_by_sequences(&job), all_lines(&job));
        let refused = world.run_job(&job, &["--set", "pipeline.kv_cache_tokens=128"]);
        let words = [
            "[pipeline] kv_cache_tokens: found 128, expected at least 256",
            "as in the job's first run",
            "hint: set kv_cache_tokens to 256 or \"auto\", or pass --accept-numerics with split_blocks = \"all\"",
        ];
        assert_refused(&refused, &words);
        assert!(all_lines(&job) == written, "what is refused changes nothing");
        done(world.run_job(&job, goes_on));
        let [found, expected] = [&job, &undisturbed].map(all_lines);
        assert_eq!(found.each_ref().map(Vec::len), expected.each_ref().map(Vec::len), "{goes_on:?}");
        if !goes_on.contains(&"--accept-numerics") {
            assert_eq!(shared_by_sequences(&job), shared);
            assert!(found == expected, "as if nothing had been refused");
        }
    }
}

/// Of two ranks and of three: six lanes, each of which has room for a row.
#[test]
fn rows_are_in_the_lanes_of_stages_of_unlike_widths_whichever_rank_ends() {
    let sets = [
        "pipeline.devices=[\"cpu:0\", \"cpu:1\", \"cpu:2\", \"cpu:3\", \"cpu:4\"]",
        "pipeline.tensor_parallel=[2, 3]",
        "pipeline.micro_batch_tokens=256",
        "model.max_context_tokens=128",
    ];
    let world = by_sequences(&sets);
    let undisturbed = world.job.anew().over((0..12).map(row));
    done(world.run_job(&undisturbed, &[]));
    for (home, fault) in
        [("threads", "stage1.2@20:panic"), ("threads", "stage0@90:panic"), ("processes", "stage0.1@90:kill")]
    {
        let job = undisturbed.anew().set("pipeline.kv_cache_tokens=768");
        let job = job.set(format!("pipeline.ranks={home}"));
        let output = world.run_job_with_faults(&job, fault);
        assert_done(&output);
        assert!(stdout(&output).contains("started again"), "{home} {fault}:\n{}", stdout(&output));
        let widths: Vec<u64> = shared_by_sequences(&job).iter().map(|(ranks, _)| *ranks).collect();
        assert_eq!(widths, [2, 3]);
        assert!(all_lines(&job) == all_lines(&undisturbed), "{home} {fault}");
    }
}

/// Two blocks of the small model, the second of which has one KV head: by heads both of two ranks read all of its keys.
fn small_model() -> tempfile::TempDir {
    let (from, to) = (fixture("small"), tempfile::tempdir().unwrap());
    for file in ["generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(from.join(file), to.path().join(file)).unwrap();
    }
    let mut config = read_json(&from.join("config.json"));
    config["block_configs"] = [0, 3].map(|slot| config["block_configs"][slot].clone()).to_vec().into();
    config["num_hidden_layers"] = json!(2);
    std::fs::write(to.path().join("config.json"), config.to_string()).unwrap();
    to
}

/// On an emulator: two rows for each of two lanes that have room for one, so that a row waits for another's pages.
#[test]
fn gpus_share_out_sequences_and_write_the_same_bytes_where_rows_wait_for_pages() {
    let sets = [
        "pipeline.devices=[\"cuda:0\", \"cuda:1\"]",
        "pipeline.tensor_parallel=[2]",
        "pipeline.micro_batch_tokens=8",
        "model.max_context_tokens=128",
        "model.random_weights=true",
    ];
    let model = small_model();
    let world = World::of(Job::on_model(model.path()).emulated_gpus(2), &sets);
    world.measure();
    price_attention(&world, true);
    let prompt = |i: usize| (0..60 + i).map(|k| 5 + (k * 7 + i * 31) % 200).collect::<Vec<_>>();
    let row = |i: usize| {
        let body = json!({"prompt": prompt(i), "max_tokens": 6, "temperature": i % 2, "seed": i, "ignore_eos": true});
        batch_line(&format!("row-{i}"), "/v1/completions", &body)
    };
    let roomy = world.job.anew().over((0..4).map(row));
    done(world.run_job(&roomy, &[]));
    let shared = shared_by_sequences(&roomy);
    for home in ["threads", "processes"] {
        let tight = roomy.anew().set("pipeline.kv_cache_tokens=256").set(format!("pipeline.ranks={home}"));
        done(world.run_job(&tight, &[]));
        assert_eq!(shared_by_sequences(&tight), shared);
        assert!(kv_tokens(&tight) == 256 && kv_tokens(&roomy) > 256, "{home}");
        assert!(all_lines(&tight) == all_lines(&roomy), "{home}");
    }
}
