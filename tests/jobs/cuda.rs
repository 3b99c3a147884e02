//! Whole jobs on a GPU that is an emulator: the same device code as on a real one, and no other path through the program.

use std::process::Output;

use serde_json::{Value, json};

use crate::harness::{Job, read_json, root};
use crate::logits::{BF16_BOUND, largest_difference_of};

/// Where `cargo xtask emulator` puts it.
pub(crate) fn emulator() -> std::path::PathBuf {
    let folder = root().join("target/cuda-emulator");
    assert!(
        folder.join("libcuda.so").is_file(),
        "{} is missing: run `cargo xtask emulator` first",
        folder.display()
    );
    folder
}

/// Every kind of block and width of heads; and two stages on one GPU.
#[test]
fn models_on_a_gpu_stay_within_the_bf16_bound() {
    let one = "pipeline.devices=[\"cuda:0\"]";
    let two = "pipeline.devices=[\"cuda:0\",\"cuda:0\"]";
    let models =
        [("deci-7b", one), ("odd-shapes", one), ("no-attention-anywhere", one), ("hetero-0-bf16", two)];
    for (model, devices) in models {
        let reference = read_json(&crate::harness::fixture(model).join("reference.json"));
        let difference = largest_difference_of(Job::on(model).set(devices).emulated(), &reference);
        assert!(difference <= BF16_BOUND, "{model} with {devices}: off by {difference:.2e}");
    }
}

/// Drawn rows and greedy ones, with micro-batches and stages of any size.
#[test]
fn answers_of_a_gpu_do_not_depend_on_how_the_job_is_run() {
    let lines = |sets: &[&str]| {
        let mut job = Job::on("hetero-0-bf16").set("pipeline.max_sequences=3").emulated();
        for set in sets {
            job = job.set(*set);
        }
        for i in 0..4 {
            let prompt: Vec<usize> = (0..4 + 25 * i).map(|k| 5 + (k * 7 + i * 31) % 200).collect();
            let temperature = if i % 2 == 0 { 0.0 } else { 1.0 };
            let body = json!({"prompt": prompt, "max_tokens": 4, "temperature": temperature, "seed": i, "ignore_eos": true});
            job = job.completion(&format!("row-{i}"), body);
        }
        job.run().ok().sorted_lines()
    };
    let one = lines(&["pipeline.devices=[\"cuda:0\"]"]);
    assert_eq!(one, lines(&["pipeline.devices=[\"cuda:0\",\"cuda:0\"]"]));
    assert_eq!(one, lines(&["pipeline.devices=[\"cuda:0\"]", "pipeline.micro_batch_tokens=9"]));
    // And with keys and values in fp8, which are other answers.
    let kv = "pipeline.kv_cache_dtype=fp8";
    let narrow = lines(&["pipeline.devices=[\"cuda:0\"]", kv]);
    assert_ne!(narrow, one);
    assert_eq!(
        narrow,
        lines(&["pipeline.devices=[\"cuda:0\",\"cuda:0\"]", kv, "pipeline.micro_batch_tokens=9"])
    );
}

/// Rows that end by a stop token or by their length, at steps of their own; and the same with one that must know its tokens among them.
#[test]
fn answers_of_a_gpu_are_the_same_where_its_tokens_are_fed_back() {
    let lines = |feeds_back: bool, penalty: f64| {
        let mut job = Job::on("hetero-0-bf16")
            .set("pipeline.devices=[\"cuda:0\"]")
            .set("pipeline.max_sequences=4")
            .set(format!("pipeline.token_feedback={feeds_back}"))
            .emulated();
        for i in 0..5 {
            let prompt: Vec<usize> = (0..4 + 9 * i).map(|k| 5 + (k * 7 + i * 31) % 200).collect();
            let stops: Vec<usize> = (0..200).filter(|token| (token + i) % 6 == 0).collect();
            let body = json!({
                "prompt": prompt, "max_tokens": 6, "temperature": i % 2, "seed": i, "ignore_eos": true,
                "stop_token_ids": stops, "presence_penalty": if i == 3 { penalty } else { 0.0 },
            });
            job = job.completion(&format!("row-{i}"), body);
        }
        job.run().ok().sorted_lines()
    };
    assert_eq!(lines(true, 0.0), lines(false, 0.0));
    assert_eq!(lines(true, 0.5), lines(false, 0.5));
}

/// The host is a step behind: a micro-batch waits for the device while another one is computed, unless that is not wanted.
#[test]
fn a_lone_gpu_has_a_step_behind_the_one_that_it_computes() {
    for feeds_back in [true, false] {
        let body = json!({"prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, "ignore_eos": true});
        let job = Job::on("hetero-0-bf16")
            .set("pipeline.devices=[\"cuda:0\"]")
            .set(format!("pipeline.token_feedback={feeds_back}"))
            .emulated()
            .completion("row", body);
        let output = job.command().env("SPANWISE_LOG", "actors=debug").env("NO_COLOR", "1").output().unwrap();
        let (_, stderr) = text(&output);
        assert_eq!(output.status.code(), Some(0), "{stderr}");
        let num_behind = stderr.lines().filter(|line| line.contains("behind=1")).count();
        assert_eq!(num_behind > 0, feeds_back, "{stderr}");
    }
}

fn text(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

#[test]
fn kinds_of_devices_are_not_mixed() {
    let output = Job::on("tied").line("{}").set("pipeline.devices=[\"cpu:0\",\"cuda:0\"]").run_once(&[]);
    let (_, stderr) = text(&output);
    assert!(stderr.contains("[pipeline] devices: found cpu and cuda devices, expected one kind"), "{stderr}");
    assert_eq!(output.status.code(), Some(2));
}

/// GPUs that share a stage, joined by NCCL: by heads and columns, alone and beside a stage of one.
#[test]
fn models_on_gpus_that_share_a_stage_stay_within_the_bf16_bound() {
    let two = (2, "[\"cuda:0\",\"cuda:1\"]", "[2]", "auto");
    let four = (4, "[\"cuda:0\",\"cuda:1\",\"cuda:2\",\"cuda:3\"]", "[1,3]", "[[0,1],[1,4]]");
    for (model, (num_gpus, devices, widths, stages)) in
        [("hetero-0-bf16", two), ("tied", two), ("odd-shapes", four)]
    {
        let reference = read_json(&crate::harness::fixture(model).join("reference.json"));
        let job = Job::on(model)
            .emulated_gpus(num_gpus)
            .set(format!("pipeline.devices={devices}"))
            .set(format!("pipeline.tensor_parallel={widths}"))
            .set(format!("pipeline.stages={stages}"))
            .set("pipeline.split_blocks=all");
        let difference = largest_difference_of(job, &reference);
        assert!(difference <= BF16_BOUND, "{model} on {widths}: off by {difference:.2e}");
    }
}

#[test]
fn gpus_that_share_a_stage_write_the_same_bytes_every_time() {
    let lines = |devices: &str, is_interrupted: bool| {
        let mut job = Job::on("hetero-0-bf16")
            .emulated_gpus(2)
            .set(format!("pipeline.devices={devices}"))
            .set("pipeline.tensor_parallel=[2]")
            .set("pipeline.split_blocks=all");
        for i in 0..4 {
            let prompt: Vec<usize> = (0..4 + 25 * i).map(|k| 5 + (k * 7 + i * 31) % 200).collect();
            let body = json!({"prompt": prompt, "max_tokens": 4, "temperature": i % 2, "seed": i, "ignore_eos": true});
            job = job.completion(&format!("row-{i}"), body);
        }
        if is_interrupted {
            let output = job.run_once(&["--limit", "2"]);
            assert!(output.status.success(), "{}", text(&output).1);
        }
        let done = job.run().ok();
        assert!(done.stdout.contains("2 ranks"), "{}", done.stdout);
        done.sorted_lines()
    };
    let one = lines("[\"cuda:0\",\"cuda:1\"]", false);
    assert_eq!(one, lines("[\"cuda:0\",\"cuda:1\"]", true), "the second run goes on as the first did");
    assert_eq!(one, lines("[\"cuda:1\",\"cuda:0\"]", false), "whichever GPU is which rank");
}

#[test]
fn gpus_do_not_share_narrow_weights() {
    for dtype in ["int4-weight", "fp8"] {
        let job = Job::on("tied")
            .line("{}")
            .set("pipeline.devices=[\"cuda:0\",\"cuda:1\"]")
            .set("pipeline.tensor_parallel=[2]")
            .set(format!("model.dtype={dtype}"));
        let output = job.emulated().run_once(&[]);
        let (_, stderr) = text(&output);
        let found = format!(
            "[pipeline] tensor_parallel: found [2] with weights in {dtype} on cuda:0, expected \"off\" or weights in bf16"
        );
        assert!(stderr.contains(&found), "{stderr}");
        assert_eq!(output.status.code(), Some(2));
    }
}

/// Ultra, of which a plan for as many GPUs that are not there shares stages and cuts FFNs.
#[test]
fn plans_for_gpus_of_the_job_are_of_what_runs_on_them() {
    let ultra = root().join("configs/models/Llama-3_1-Nemotron-Ultra-253B-v1");
    let job = |num_gpus: usize, dtype: &str| {
        let devices: Vec<String> = (0..num_gpus).map(|index| format!("cuda:{index}")).collect();
        (Job::on_model(&ultra).line("{}").emulated_gpus(num_gpus))
            .set(format!("pipeline.devices={devices:?}"))
            .set(format!("model.dtype={dtype}"))
            .set("plan.prompt_tokens=1024")
            .set("plan.output_tokens=1024")
    };
    let plan = |job: &Job, args: &[&str]| -> Value {
        let output = job.question("plan").args(["--format", "json"]).args(args).output().unwrap();
        let (stdout, stderr) = text(&output);
        serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{error}: {stderr}"))
    };
    let is_shared = |stage: &Value| stage["tensor_parallel"] != 1;
    let is_cut = |stage: &Value| !stage["columns"].as_array().unwrap().is_empty();
    let any =
        |plan: &Value, what: &dyn Fn(&Value) -> bool| plan["stages"].as_array().unwrap().iter().any(what);
    for dtype in ["fp8", "int4-weight"] {
        let job = job(8, dtype);
        let own = plan(&job, &[]);
        assert!(own["not_run"].is_null() && !any(&own, &is_shared) && !any(&own, &is_cut), "{own}");
        let elsewhere = plan(&job, &["--devices", "8xh100-80gb"]);
        assert!(elsewhere["not_run"].is_string(), "{elsewhere}");
        let found = format!("found [8] with weights in {dtype} on cuda:0");
        for what in ["plan", "simulate"] {
            let output = job.question(what).args(["--set", "pipeline.tensor_parallel=[8]"]).output().unwrap();
            let (_, stderr) = text(&output);
            assert!(output.status.code() == Some(2) && stderr.contains(&found), "{stderr}");
        }
    }
    let own = plan(&job(8, "bf16"), &[]);
    assert!(own["not_run"].is_null() && (any(&own, &is_shared) || any(&own, &is_cut)), "{own}");
    // Half of 253 GB in fp8 would fit in fp4, which no run has.
    let missing = plan(&job(3, "bf16"), &[]);
    let nearest = missing["missing"]["nearest"].to_string();
    assert!(nearest.contains("int4-weight") && !nearest.contains("fp4"), "{missing}");
}

#[test]
fn types_that_a_gpu_lacks_are_refused_by_name() {
    let job =
        Job::on("tied").line("{}").set("pipeline.devices=[\"cuda:0\"]").set("model.dtype=int8").emulated();
    let (_, stderr) = text(&job.run_once(&[]));
    assert!(
        stderr.contains("cuda:0: found weights of int8 with keys and values of bf16, expected bf16, fp8 or int4-weight, and bf16 or fp8"),
        "{stderr}"
    );
}
