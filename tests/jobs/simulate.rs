//! Jobs played under a virtual clock, on devices that need not be there.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Output;

use serde_json::Value;

use crate::harness::spanwise;

const ULTRA: &str = "configs/ultra-253b-8xh100.toml";
const SUPER: &str = "configs/super-49b-1xh200.toml";
/// A pipeline of eight and few rows, to be quick without optimisation.
const SMALL: &str =
    "--devices 8xh200 --set plan.rows=400 --set plan.prompt_tokens=128 --set plan.output_tokens=64";

fn simulate(job: &str, args: &str) -> Output {
    let job = Path::new(env!("CARGO_MANIFEST_DIR")).join(job);
    spanwise().arg("simulate").arg(job).args(args.split_whitespace()).output().expect("start spanwise")
}

fn json(job: &str, args: &str) -> Value {
    let output = simulate(job, &format!("--format json {args}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    let report: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {stderr}"));
    check(&report);
    report
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("{key} is no number in {value}"))
}

fn whole(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or_else(|| panic!("{key} is no whole number in {value}"))
}

fn list<'a>(value: &'a Value, key: &str) -> &'a Vec<Value> {
    value[key].as_array().unwrap_or_else(|| panic!("{key} is no list in {value}"))
}

/// What holds for every simulation.
fn check(report: &Value) {
    assert_eq!(report["estimate"], true);
    let wall_ns = whole(report, "wall_ns");
    for stage in list(report, "stages") {
        let parts = ["busy_ns", "starved_ns", "kv_limited_ns", "tail_ns", "idle_ns"];
        assert_eq!(parts.iter().map(|part| whole(stage, part)).sum::<u64>(), wall_ns, "{stage}");
    }
    let timeline = &report["timeline"];
    let num_bins = list(timeline, "tokens").len();
    assert!(num_bins <= 256 && list(timeline, "kv").len() == num_bins);
    assert_eq!(list(timeline, "stages").len(), list(report, "stages").len());
    for stage in list(timeline, "stages") {
        assert_eq!(stage.as_array().unwrap().len(), num_bins);
    }
    let speed = number(report, "generated_tokens") / number(report, "wall_seconds");
    assert!((number(report, "tokens_per_second") / speed - 1.0).abs() < 1e-9);
    assert!(number(&report["kv"], "most") <= 1.0);
}

#[test]
fn the_same_seed_gives_the_same_bytes_and_another_one_others() {
    let args = format!("--format json {SMALL} --seed 5");
    let first = simulate(ULTRA, &args);
    assert_eq!(first.status.code(), Some(0), "{}", String::from_utf8_lossy(&first.stderr));
    assert_eq!(first.stdout, simulate(ULTRA, &args).stdout);
    assert_ne!(first.stdout, simulate(ULTRA, &format!("--format json {SMALL} --seed 6")).stdout);
}

#[test]
fn lengths_are_those_of_the_distribution() {
    let tokens = |lengths: &str| {
        let report = json(ULTRA, &format!("{SMALL} --lengths {lengths}"));
        assert_eq!((whole(&report, "rows"), whole(&report, "prompt_tokens")), (400, 400 * 128));
        assert_eq!(report["lengths"]["distribution"], lengths);
        number(&report, "generated_tokens") / 400.0
    };
    assert_eq!(tokens("fixed"), 64.0);
    // Four standard deviations of the mean of 400 draws.
    assert!((tokens("exponential") - 64.0).abs() < 4.0 * 64.0 / 20.0);
    assert!((tokens("lognormal") - 64.0).abs() < 4.0 * 64.0 * 1.32 / 20.0);
}

/// Rows of one length in a job that is long beside its beginning and its end are what a plan thinks of.
#[test]
fn rows_are_like_those_of_the_input_where_the_job_says_no_lengths() {
    let sets = "--set plan.output_tokens=50 --lengths fixed --rows 300";
    let report = json("configs/quickstart.toml", sets);
    let plan = planned("configs/quickstart.toml", "--set plan.output_tokens=50");
    let mean = number(&plan["job"]["prompt_tokens"], "mean");
    assert!((number(&report["lengths"], "prompt_tokens") - mean).abs() < 1e-9);
    let played = number(&report, "prompt_tokens") / number(&report, "rows");
    assert!((played / mean - 1.0).abs() < 0.05 && played != mean, "{played} and {mean}");
    assert_eq!(number(&report, "generated_tokens"), 300.0 * 50.0);
}

fn planned(job: &str, args: &str) -> Value {
    let job = Path::new(env!("CARGO_MANIFEST_DIR")).join(job);
    let mut plan = spanwise();
    let output = plan.arg("plan").arg(job).args(["--format", "json"]).args(args.split_whitespace()).output();
    serde_json::from_slice(&output.expect("start spanwise").stdout).expect("a plan")
}

#[test]
fn a_long_job_of_equal_rows_comes_near_to_its_plan() {
    let lengths = "--set plan.prompt_tokens=16 --set plan.output_tokens=32 --lengths fixed";
    let report = json(SUPER, &format!("{lengths} --set plan.tokens_in_flight=16000 --rows 6000"));
    let ratio = number(&report["plan"], "ratio");
    assert!((0.8..1.1).contains(&ratio), "{ratio}");
    let stage = &list(&report, "stages")[0];
    assert_eq!(whole(stage, "busy_ns"), whole(&report, "wall_ns"), "a lone stage with no hop never waits");
}

#[test]
fn the_job_s_own_stages_are_played_or_refused_in_words() {
    let cut = |blocks: &str| format!("{SMALL} --set pipeline.stages={blocks}");
    let four = cut("[[0,30],[30,55],[55,68],[68,81]]");
    let report = json(ULTRA, &format!("{four} --set pipeline.tensor_parallel=[2,2,2,2]"));
    let blocks: Vec<String> =
        list(&report, "stages").iter().map(|stage| stage["blocks"].to_string()).collect();
    assert_eq!(blocks, ["[0,30]", "[30,55]", "[55,68]", "[68,81]"]);
    for (blocks, words) in [
        ("[[0,40],[40,80]]", "the last one ends at block 80, the model has 81 blocks (162 slots"),
        ("[[0,40],[40,81]]", "stage 0 lacks"),
        ("[[0,9],[9,18],[18,27],[27,36],[36,45],[45,54],[54,63],[63,72],[72,81]]", "beyond the 8 devices"),
    ] {
        let output = simulate(ULTRA, &cut(blocks));
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && stderr.contains(words), "{stderr}");
    }
}

/// The example of docs/job_file.md, and others: pieces of a plan have 3,328 columns there, or 4,096.
#[test]
fn stages_are_played_wherever_the_job_cuts_an_ffn() {
    let args = |place: &str, args: &str| {
        let stages = format!("[[0,\"{place}\"],[\"{place}\",81]]");
        format!("{SMALL} --set pipeline.stages={stages} --set pipeline.tensor_parallel=[4,4] {args}")
    };
    for (place, more) in [
        ("67:6400", ""),
        ("67:6400", "--set pipeline.column_cuts=off"),
        ("67:64", ""),
        ("67:8192", "--dtype int8"),
        ("67:3328", ""),
    ] {
        let report = json(ULTRA, &args(place, more));
        let blocks: Vec<&Value> = list(&report, "stages").iter().map(|stage| &stage["blocks"]).collect();
        assert_eq!(blocks, [&serde_json::json!([0, 68]), &serde_json::json!([67, 81])], "{place} {more}");
    }
    for (place, more, words) in [
        ("67:6401", "", "found column 6401, expected a multiple of 64"),
        ("67:6400", "--dtype int8", "expected a multiple of 4096, as that many share a scale in int8"),
        ("67:4000000", "", "the FFN of block 67 has 425984 columns"),
    ] {
        let output = simulate(ULTRA, &args(place, more));
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && stderr.contains(words), "{stderr}");
    }
}

#[test]
fn a_model_that_does_not_fit_is_refused_as_a_plan_refuses_it() {
    let args = ["--devices", "4xh100-80gb", "--format", "json", "--lengths", "fixed"];
    let played = simulate(ULTRA, &args.join(" "));
    let planned = spanwise().args(["plan", ULTRA]).args(args).output().unwrap();
    assert_eq!((played.status.code(), &played.stdout), (Some(2), &planned.stdout));
    let report: Value = serde_json::from_slice(&played.stdout).unwrap();
    assert_eq!(report["fits"], false);
}

#[test]
fn a_trace_has_every_step_once_and_none_overlaps_another_of_its_stage() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace.json");
    let report = json(ULTRA, &format!("{SMALL} --rows 200 --trace {}", path.display()));
    let events: Vec<Value> = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let mut rows: BTreeMap<u64, Vec<(u64, u64)>> = BTreeMap::new();
    // Microseconds with three digits after the point are whole nanoseconds.
    let ns = |event: &Value, key: &str| (number(event, key) * 1e3).round() as u64;
    for event in events.iter().filter(|event| event["ph"] == "X") {
        let step = (ns(event, "ts"), ns(event, "dur"));
        rows.entry(whole(event, "tid")).or_default().push(step);
    }
    let stages = list(&report, "stages");
    assert_eq!(rows.len(), stages.len());
    for (row, stage) in rows.values().zip(stages) {
        assert_eq!(row.len() as u64, whole(&report, "micro_batches"));
        assert_eq!(row.iter().map(|(_, ns)| ns).sum::<u64>(), whole(stage, "busy_ns"));
        assert!(row.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "steps overlap");
    }
    let unwritable = simulate(ULTRA, &format!("{SMALL} --trace {}", folder.path().display()));
    assert_eq!(unwritable.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&unwritable.stderr).contains("write trace"));
}

#[test]
fn a_simulation_in_words_says_that_it_is_an_estimate() {
    let output = simulate(ULTRA, &format!("{SMALL} --lengths lognormal"));
    let text = String::from_utf8_lossy(&output.stdout);
    for words in
        ["estimate", "starved", "of the plan's", "lognormal with sigma 1", "after the last row was admitted"]
    {
        assert!(text.contains(words), "{words}: {text}");
    }
}
