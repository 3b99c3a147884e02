//! What `plan` and `simulate` say of stages that a run takes, or refuses: devices that share them, FFNs that they cut.

use serde_json::{Value, json};

use crate::disturbed::{MODEL, stderr, stdout};
use crate::harness::{Job, fixture};
use crate::ranks::{cut_at, layout, rows, widest};

/// Exit code, stdout and stderr of `plan` or `simulate`.
fn ask(job: &Job, what: &str) -> (Option<i32>, String, String) {
    let lengths = ["--set", "plan.prompt_tokens=8", "--set", "plan.output_tokens=8"];
    let output = job.question(what).args(lengths).args(["--format", "json"]).output().unwrap();
    (output.status.code(), stdout(&output), stderr(&output))
}

/// What is printed where a question has an answer.
fn answer(job: &Job, what: &str) -> Value {
    let (code, stdout, stderr) = ask(job, what);
    assert_eq!(code, Some(0), "{what}: {stderr}");
    serde_json::from_str(&stdout).unwrap()
}

fn num_blocks() -> usize {
    stages::ModelConfig::read(&fixture(MODEL)).unwrap().blocks.len()
}

/// As the devices of a machine are whose cores their number does not divide.
#[test]
fn unlike_devices_share_a_stage_at_the_pace_of_the_slower() {
    let num_blocks = num_blocks();
    let given = format!("[[0, {num_blocks}]]");
    let ask = |what: &str, devices: &str, stages: &str| {
        let job = layout(Job::on(MODEL).lines(rows(1)), &[2]).set(format!("pipeline.stages={stages}"));
        answer(&job.set(format!("plan.devices={devices}")), what)
    };
    // Of the plan, and of the job's own stages beside it.
    let speeds = |devices: &str| {
        let plan = ask("plan", devices, &given);
        [&plan, &plan["given_stages"]].map(|part| part["tokens_per_second"].as_f64().expect("it fits"))
    };
    let busy = |devices: &str| {
        let report = ask("simulate", devices, &given);
        report["stages"][0]["busy_ns"].as_u64().expect("it is played")
    };
    let [slow, fast] = ["2xcpu-core", "2xcpu-2-cores"].map(|alike| (speeds(alike), busy(alike)));
    assert!(fast.0[0] > slow.0[0] && fast.0[1] > slow.0[1] && fast.1 < slow.1, "{fast:?} {slow:?}");
    for unlike in ["1xcpu-core,1xcpu-2-cores", "1xcpu-2-cores,1xcpu-core"] {
        assert_eq!((speeds(unlike), busy(unlike)), slow, "{unlike}");
        let planned = ask("plan", unlike, "auto");
        assert_eq!(planned["stages"][0]["tensor_parallel"], 2, "{planned}");
    }
}

#[test]
fn widths_are_taken_and_refused_by_plans_as_by_runs() {
    let num_blocks = num_blocks();
    let twice = |widths: &str| {
        Job::on(MODEL)
            .lines(rows(3))
            .set("pipeline.devices=[\"cpu:0\", \"cpu:0\"]")
            .set(format!("pipeline.tensor_parallel={widths}"))
    };
    let alone = twice("[1, 1]").set(format!("pipeline.stages=[[0, 1], [1, {num_blocks}]]"));
    assert_eq!(answer(&alone, "plan")["given_stages"]["fits"], true);
    assert_eq!(answer(&alone, "simulate")["stages"][1]["blocks"], json!([1, num_blocks]));
    alone.run().ok();
    let too_few = layout(Job::on(MODEL).lines(rows(1)), &[1, 2]);
    for (job, words) in [
        (twice("[2]"), "cpu:0 named twice, expected devices that are named once"),
        (too_few.set(format!("pipeline.stages=[[0, {num_blocks}]]")), "expected one"),
    ] {
        for what in ["plan", "simulate", "run"] {
            let (code, _, stderr) = match what {
                "run" => {
                    let done = job.anew().run();
                    (done.code, done.stdout, done.stderr)
                }
                _ => ask(&job, what),
            };
            assert!(code == Some(2) && stderr.contains(words), "{what}: {stderr}");
        }
    }
}

/// What is asked of a job's own devices is answered for all stages that a run takes, and refused in the same words.
#[test]
fn what_runs_with_an_ffn_cut_at_any_column_is_planned_and_simulated() {
    let num_blocks = num_blocks();
    let (block, width) = widest(MODEL);
    let cut = |column: usize, dtype: &str| {
        let job = Job::on(MODEL).lines(rows(1)).set(format!("model.dtype={dtype}"));
        cut_at(job, block, column, num_blocks)
    };
    let last = (width - 1) / 64 * 64;
    for (column, dtype) in [(64, "bf16"), (128, "int4-weight"), (last, "f32")] {
        let plan = answer(&cut(column, dtype), "plan");
        assert_eq!(plan["given_stages"]["fits"], true, "{plan}");
        let report = answer(&cut(column, dtype), "simulate");
        assert_eq!(report["stages"][0]["blocks"], json!([0, block + 1]), "{report}");
    }
    for (column, dtype, words) in [
        (65, "bf16", "found column 65, expected a multiple of 64"),
        (64, "int8-weight", "int8-weight sums over columns cannot be parted"),
    ] {
        for what in ["plan", "simulate"] {
            let (code, _, stderr) = ask(&cut(column, dtype), what);
            assert!(code == Some(2) && stderr.contains(words), "{what}: {stderr}");
        }
    }
}
