//! Plans for the rows of an input, read as a run would read them.

use std::path::{Path, PathBuf};
use std::process::Output;

use serde_json::{Value, json};

use crate::harness::{batch_line, root, spanwise};

/// A job over some lines, in a folder of its own.
struct Planned {
    folder: tempfile::TempDir,
    model: PathBuf,
    sections: &'static str,
}

impl Planned {
    fn over(lines: &[String]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        std::fs::write(folder.path().join("input.jsonl"), text).unwrap();
        Planned { folder, model: root().join("models/abacus"), sections: "" }
    }

    fn output(&self, args: &str) -> Output {
        let toml = format!(
            "[model]\npath = {:?}\n[job]\ninput = \"input.jsonl\"\noutput = \"out\"\n{}",
            self.model, self.sections
        );
        let job = self.folder.path().join("job.toml");
        std::fs::write(&job, toml).unwrap();
        spanwise().arg("plan").arg(job).args(args.split_whitespace()).output().expect("start spanwise")
    }

    #[track_caller]
    fn json(&self, args: &str) -> Value {
        let output = self.output(&format!("--format json {args}"));
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// What it says when it refuses.
    #[track_caller]
    fn refusal(&self, args: &str) -> String {
        let output = self.output(args);
        assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0));
        String::from_utf8(output.stderr).unwrap()
    }
}

fn row(idx: usize, prompt: usize, more: Value) -> String {
    let mut body = json!({"prompt": vec![5; prompt]});
    body.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap_or_default());
    batch_line(&format!("row-{idx}"), "/v1/completions", &body)
}

/// Prompts of 1 to 100 tokens, each with so many tokens of answer.
fn hundred(max_tokens: usize) -> Vec<String> {
    (1..=100).map(|prompt| row(prompt, prompt, json!({"max_tokens": max_tokens}))).collect()
}

#[test]
fn lengths_are_those_of_the_rows() {
    let plan = Planned::over(&hundred(20)).json("");
    let job = &plan["job"];
    assert_eq!(job["prompt_tokens"], json!({"mean": 50.5, "p50": 50, "p95": 95, "max": 100}));
    assert_eq!(job["tokens"], json!({"prompt": 5050, "output": 2000}));
    assert_eq!((&job["output_lengths"], &job["output_tokens"]), (&json!("max_tokens"), &json!(20.0)));
    assert_eq!((&job["rows"], &job["rows_refused"]), (&json!(100), &json!(0)));
    let hours = 2000.0 / plan["tokens_per_second"].as_f64().unwrap() / 3600.0;
    assert!((job["hours"].as_f64().unwrap() / hours - 1.0).abs() < 1e-9, "{job}");
}

/// All rows alike are what the same lengths in `[plan]` are.
#[test]
fn rows_that_are_alike_are_planned_as_their_lengths() {
    let rows: Vec<String> = (0..50).map(|idx| row(idx, 40, json!({"max_tokens": 24}))).collect();
    let mut job = Planned::over(&rows);
    let of_rows = job.json("");
    job.sections = "[plan]\nprompt_tokens = 40\noutput_tokens = 24\nrows = 50\n";
    let mut of_lengths = job.json("");
    assert_eq!(of_lengths["job"]["output_lengths"], "plan");
    for key in ["output_lengths", "rows_refused", "rows_that_cannot_fit", "rows_looked_at"] {
        of_lengths["job"][key] = of_rows["job"][key].clone();
    }
    assert_eq!(of_rows, of_lengths);
}

#[test]
fn what_the_plan_section_says_wins() {
    let mut job = Planned::over(&hundred(20));
    job.sections = "[plan]\noutput_tokens = 6\n";
    let plan = job.json("");
    assert_eq!(
        (&plan["job"]["output_lengths"], &plan["job"]["tokens"]),
        (&json!("plan"), &json!({"prompt": 5050, "output": 600}))
    );
    // No row generates more than it may.
    job.sections = "[plan]\noutput_tokens = 200\n";
    assert_eq!(job.json("")["job"]["output_tokens"], 20.0);
    job.sections = "[plan]\nprompt_tokens = 10\nrows = 1000\n";
    let plan = job.json("");
    assert_eq!(
        (&plan["job"]["rows"], &plan["job"]["tokens"]),
        (&json!(1000), &json!({"prompt": 10_000, "output": 20_000}))
    );
}

#[test]
fn rows_with_templates_limits_and_choices_are_read_as_a_run_reads_them() {
    let mut lines = hundred(20);
    lines.push("{\"custom_id\": \"broken\"".to_owned());
    lines.push(row(1, 5, json!({"max_tokens": 20}))); // Its name was used before.
    lines.push(row(200, 100_000, json!({})));
    lines.push(String::new());
    let mut job = Planned::over(&lines);
    job.sections = "[sampling]\nmax_tokens = 7\n";
    let plan = job.json("");
    let part = &plan["job"];
    assert_eq!((&part["rows"], &part["rows_refused"]), (&json!(103), &json!(2)));
    assert_eq!((&part["rows_that_cannot_fit"], &part["tokens"]["output"]), (&json!(1), &json!(2000)));

    let quickstart = spanwise()
        .args(["plan", "configs/quickstart.toml", "--format", "json", "--set", "grade.runs=3"])
        .output()
        .unwrap();
    let plan: Value = serde_json::from_slice(&quickstart.stdout).unwrap();
    let part = &plan["job"];
    assert_eq!((&part["rows"], &part["rows_refused"]), (&json!(1000), &json!(0)), "{part}");
    let mean = part["prompt_tokens"]["mean"].as_f64().unwrap();
    assert_eq!(part["tokens"]["prompt"].as_f64().unwrap(), (mean * 3000.0).round());
}

#[test]
fn a_sample_stands_for_all_rows() {
    let mut lines = hundred(20);
    lines[4] = "{".to_owned();
    lines[5] = "{".to_owned();
    let plan = Planned::over(&lines).json("--sample 4");
    let job = &plan["job"];
    assert_eq!(
        (&job["rows"], &job["rows_looked_at"], &job["rows_refused"]),
        (&json!(100), &json!(25), &json!(4))
    );
    // 24 of the 25 prompts of 1, 5, 9, ... 97 tokens.
    assert_eq!(job["tokens"], json!({"prompt": 96 * (25 * 49 - 5) / 24, "output": 96 * 20}));
}

#[test]
fn rows_that_no_stage_has_room_for_are_counted() {
    // 2,000 short rows, and three that are longer than what a device of 7 MB has room for beside 6.2 MB of weights.
    let mut lines: Vec<String> = (0..2000).map(|idx| row(idx, 4, json!({"max_tokens": 4}))).collect();
    lines.extend((0..3).map(|idx| row(9000 + idx, 400, json!({"max_tokens": 100}))));
    let job = Planned::over(&lines);
    let spec = std::fs::read_to_string(root().join("configs/devices.toml")).unwrap();
    let spec = spec
        .replace("memory_mib = 4_096", "memory_mib = 6.7")
        .replace("reserved_gb = 0.2", "reserved_gb = 0");
    let devices = job.folder.path().join("devices.toml");
    std::fs::write(&devices, spec).unwrap();
    let plan = job.json(&format!("--devices 1xcpu-core --devices-file {}", devices.display()));
    let stages = plan["stages"].as_array().unwrap();
    let room = stages.iter().filter_map(|stage| stage["kv_tokens"].as_u64()).min().unwrap();
    assert!((50..499).contains(&room), "{room}");
    assert_eq!(plan["job"]["rows_that_cannot_fit"], 3);
}

#[test]
fn an_input_that_no_plan_can_be_made_of_is_refused_in_words() {
    let says = |lines: &[String], words: &str| {
        let error = Planned::over(lines).refusal("");
        assert!(error.contains(words), "{error}");
    };
    says(&[], "has no rows");
    says(&[String::new(), "  ".to_owned()], "has no rows");
    says(&["{".to_owned()], "none of the 1 rows");
    says(&[row(1, 100_000, json!({}))], "longer than the context");
    says(&[row(1, 5, json!({"max_tokens": 0}))], "no row of");

    let mut job = Planned::over(&hundred(5));
    let error = job.refusal("--devices 8xh20");
    assert!(error.contains("did you mean h200?"), "{error}");
    std::fs::remove_file(job.folder.path().join("input.jsonl")).unwrap();
    let error = job.refusal("");
    assert!(error.contains("read ") && error.contains("input.jsonl"), "{error}");

    let chat =
        batch_line("a", "/v1/chat/completions", &json!({"messages": [{"role": "user", "content": "1+1"}]}));
    job = Planned::over(&[chat]);
    job.model = job.folder.path().join("model");
    without_tokenizer(&job.model);
    let error = job.refusal("");
    assert!(error.contains("no chat template") || error.contains("tokenizer.json"), "{error}");
    job.sections = "[prompt]\nuser = \"{{ question }}\"\n";
    let error = job.refusal("");
    assert!(error.contains("a tokenizer.json"), "{error}");
}

fn without_tokenizer(folder: &Path) {
    std::fs::create_dir(folder).unwrap();
    std::fs::copy(root().join("models/abacus/config.json"), folder.join("config.json")).unwrap();
}
