//! That a plan and a run take a way of sharing blocks that fits wherever there is one, and of these the fastest.

use std::process::Output;

use serde_json::{Value, json};

use crate::disturbed::{assert_done, assert_refused, stderr};
use crate::harness::{Job, read_json, spanwise};
use crate::layouts::all_lines;
use crate::plan::{SUPER, ULTRA, fitting, number, plan};

/// Where attention is shared by sequences from some number of rows on each device has all of its weights, which is more than some of
/// these have room for, and where halves stay on the first rank it has all of theirs.
#[test]
fn plans_fit_where_all_halves_shared_would_and_are_no_slower() {
    for (model, devices, lengths) in [
        (ULTRA, "8xh100-80gb", [128, 128]),
        (ULTRA, "8xh100-80gb", [64, 64]),
        (ULTRA, "8xh100-80gb", [512, 128]),
        (ULTRA, "4xh200", [128, 256]),
        (ULTRA, "8xa100-80gb", [16, 1024]),
        (SUPER, "2xh100-80gb", [128, 128]),
        (SUPER, "4xl40s", [128, 512]),
        (SUPER, "8xrtx-4090", [64, 64]),
    ] {
        let [prompt, output] = lengths;
        let args = format!(
            "--devices {devices} --set plan.prompt_tokens={prompt} --set plan.output_tokens={output}"
        );
        let (all, _) = plan(model, &format!("{args} --set pipeline.split_blocks=all"));
        assert_eq!(all["fits"], true, "{args}");
        // What it says of memory adds up.
        let auto = fitting(model, &args);
        let [auto, all] = [auto, all].map(|plan| number(&plan, "tokens_per_second"));
        assert!(auto >= all * (1.0 - 1e-9), "{args}: {auto} {all}");
    }
}

/// A job on two GPUs that share its blocks, of which by an estimate some halves are best left to the first of them.
fn job() -> Job {
    let sets = [
        "pipeline.devices=[\"cuda:0\", \"cuda:1\"]",
        "pipeline.tensor_parallel=[2]",
        "pipeline.micro_batch_tokens=1024",
        "model.max_context_tokens=64",
        "pipeline.max_sequences=128",
    ];
    let job = sets.iter().fold(Job::on("hetero-0-bf16").emulated_gpus(2), |job, set| job.set(*set));
    (0..4).fold(job, |job, i| {
        let body = json!({"prompt": [5, 6, 7 + i], "max_tokens": 3, "temperature": i % 2, "seed": i, "ignore_eos": true});
        job.completion(&format!("row-{i}"), body)
    })
}

/// With so much memory on each GPU.
fn run_with(job: &Job, bytes: &str, args: &[&str]) -> Output {
    job.command().env("EMULATED_BYTES", bytes).args(args).output().unwrap()
}

/// The ranks of a job's stages, and whether some half stays on the first of them.
fn shared(job: &Job) -> (Vec<u64>, bool) {
    let manifest = read_json(&job.out().join("manifest.json"));
    let stages = manifest["plan"]["stages"].as_array().expect("stages").clone();
    let stays = |stage: &Value| {
        ["attention_on_first_rank", "ffn_on_first_rank"].iter().any(|half| stage[half] != json!([]))
    };
    (stages.iter().map(|stage| stage["ranks"].as_u64().unwrap()).collect(), stages.iter().any(stays))
}

const ROOMY: &str = "2000000000";
/// Enough for half of the model beside what a step works in, and not for all of it.
const TIGHT: &str = "36000000";

#[test]
fn halves_stay_on_the_first_gpu_only_where_it_has_room_for_them() {
    let roomy = job();
    assert_done(&run_with(&roomy, ROOMY, &["--limit", "2"]));
    assert_eq!(shared(&roomy), (vec![2], true));
    let (tight, all) = (job(), job().set("pipeline.split_blocks=all"));
    for job in [&tight, &all] {
        assert_done(&run_with(job, TIGHT, &[]));
        assert_eq!(shared(job), (vec![2], false));
    }
    assert!(all_lines(&tight) == all_lines(&all));

    // A job goes on as it was begun, or is told what it may do.
    let cure = "hint: devices share blocks as in the job's first run: free memory, or pass --accept-numerics with \
                split_blocks = \"all\"";
    assert_refused(&run_with(&roomy, TIGHT, &[]), &["blocks [0, 11) on cuda:0 take ", cure]);
    let cured = ["--accept-numerics", "--set", "pipeline.split_blocks=all"];
    assert_done(&run_with(&roomy, TIGHT, &cured));
    assert_eq!(shared(&roomy), (vec![2], false));
}

#[test]
fn gpus_do_not_share_what_cpus_did_in_the_job_s_first_run() {
    let on_gpus = job().set("pipeline.tensor_parallel=auto");
    let on_cpus = ["--limit", "2", "--set", "pipeline.devices=[\"cpu:0\", \"cpu:1\"]"];
    let on_cpus = [&on_cpus[..], &["--set", "pipeline.tensor_parallel=[2]"]].concat();
    assert_done(&run_with(&on_gpus, ROOMY, &on_cpus));
    assert_eq!(shared(&on_gpus).0, [2]);
    assert_refused(&run_with(&on_gpus, ROOMY, &[]), &["backend: was \"cpu\", is \"cuda\""]);
    let output = run_with(&on_gpus, ROOMY, &["--accept-numerics"]);
    assert_done(&output);
    let (ranks, _) = shared(&on_gpus);
    assert!(ranks.iter().all(|ranks| *ranks == 1), "{ranks:?}: {}", stderr(&output));
}

/// A run keeps to the job's own number, which a plan does not.
#[test]
fn a_plan_says_how_many_rows_a_run_must_be_allowed_to_have_in_flight() {
    let devices = "--devices 8xh200 --set plan.prompt_tokens=128";
    let plan = fitting(ULTRA, devices);
    let num = |key: &str| plan[key].as_u64().unwrap();
    let num_stages = plan["stages"].as_array().unwrap().len() as u64;
    let wanted = num("micro_batch_rows") * (num_stages + 1) * num("replicas");
    assert_eq!(num("max_sequences"), wanted);
    let said = |max_sequences: u64| {
        let set = format!("pipeline.max_sequences={max_sequences}");
        let args = devices.split(' ').chain(["--set", &set]);
        let output = spanwise().args(["plan", ULTRA]).args(args).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().find(|line| line.starts_with("set ")).map(str::to_owned)
    };
    let setting = format!("max_sequences = {wanted} under [pipeline]");
    assert!(said(wanted - 1).is_some_and(|line| line.contains(&setting)), "{setting}");
    assert_eq!(said(wanted), None);
}

/// No more rows are in flight than there are.
#[test]
fn a_plan_of_few_rows_needs_no_more_in_flight() {
    let plan = fitting(SUPER, "--devices 2xh200 --set pipeline.tensor_parallel=off --set plan.rows=5");
    assert_eq!(plan["max_sequences"], 5);
}
