//! Tokens a second by batch size: what is told of them, and what is refused. How fast it is, no test asks.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::harness::{fixture, spanwise};

const ABACUS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/abacus");

/// Measures Abacus, quickly and badly.
fn bench(args: &[&str]) -> Command {
    let mut command = bench_for("0.001");
    command.args(args);
    command
}

fn bench_for(seconds: &str) -> Command {
    let mut command = spanwise();
    command.args(["bench", ABACUS, "--point-seconds", seconds]);
    command
}

#[track_caller]
fn report(args: &[&str]) -> Value {
    let output = bench(args).args(["--format", "json"]).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    for words in ["measuring", "model loaded", "KV cache filled"] {
        assert!(stderr.contains(words), "{words} is not in\n{stderr}");
    }
    serde_json::from_slice(&output.stdout).unwrap()
}

#[track_caller]
fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("no {key} in {value}"))
}

#[test]
fn figures_of_a_batch_agree_with_each_other() {
    let args =
        ["--threads", "1", "--batches", "1,3,32", "--context-tokens", "40", "--micro-batch-tokens", "64"];
    let report = report(&args);
    assert_eq!(report["device"]["threads"], 1);
    assert_eq!((&report["weights"], &report["kv"]), (&json!("bf16"), &json!("bf16")));
    assert_eq!((&report["context_tokens"], &report["micro_batch_tokens"]), (&json!(40), &json!(64)));
    let batches = report["batches"].as_array().unwrap();
    let rows: Vec<u64> = batches.iter().map(|batch| batch["batch"].as_u64().unwrap()).collect();
    assert_eq!(rows, [1, 3, 32]);
    for (batch, rows) in batches.iter().zip(rows) {
        assert_eq!(batch["prefill"]["tokens"], rows * 40);
        assert_eq!(batch["decode"]["tokens"], rows);
        let peak = number(&batch["ceilings"], "product_flops_per_second");
        let bandwidth = number(&batch["ceilings"], "read_bytes_per_second");
        assert!(peak > 1e7 && bandwidth > 1e7, "{batch}");
        for pass in [&batch["prefill"], &batch["decode"]] {
            let (tokens, seconds) = (number(pass, "tokens"), number(&pass["seconds"], "median"));
            assert!((number(pass, "tokens_per_second") / (tokens / seconds) - 1.0).abs() < 1e-9, "{pass}");
            let share = number(pass, "roofline_seconds") / seconds;
            assert!(share > 0.0 && (number(pass, "roofline_share") / share - 1.0).abs() < 1e-9, "{pass}");
            assert!(number(&pass["seconds"], "lower") <= seconds, "{pass}");
            // All matrices are read once, and each token is multiplied with those of the blocks.
            let params = 2.0e6;
            let least = (params * 2.0 / bandwidth).max(2.0 * tokens * params / peak);
            assert!(number(pass, "roofline_seconds") > least, "{pass}");
        }
    }
}

#[test]
fn integers_and_single_precision_have_ceilings_of_their_own() {
    for (dtype, kv) in [("f32", "f32"), ("int8", "bf16"), ("int4-weight", "bf16")] {
        let report = report(&["--dtype", dtype, "--batches", "2", "--context-tokens", "8"]);
        assert_eq!((&report["weights"], &report["kv"]), (&json!(dtype), &json!(kv)));
        let ceilings = &report["batches"][0]["ceilings"];
        assert!(number(ceilings, "wide_product_flops_per_second") > 1e7, "{ceilings}");
    }
}

#[test]
fn a_table_is_written_batch_by_batch_and_ends_with_the_ceilings() {
    let output = bench(&["--batches", "1,2", "--context-tokens", "8"]).output().unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<&str> = stdout.lines().collect();
    assert!(output.status.success() && lines.len() == 8, "{stdout}");
    assert!(lines[0].contains("parameters, bf16 weights, bf16 KV"), "{stdout}");
    for (line, rows) in lines[5..7].iter().zip(["1", "2"]) {
        let words: Vec<&str> = line.split_whitespace().collect();
        assert!(words.len() == 7 && words[0] == rows, "{line}");
    }
    assert!(lines[7].starts_with("ceilings   products "), "{stdout}");
}

#[test]
fn a_config_alone_and_a_job_file_can_be_measured() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("config.json");
    std::fs::copy(format!("{ABACUS}/config.json"), &config).unwrap();
    let job = folder.path().join("job.toml");
    std::fs::write(&job, format!("[model]\npath = {ABACUS:?}\nmax_context_tokens = 16\n")).unwrap();
    for target in [&config, &job] {
        let mut command = spanwise();
        command.arg("bench").arg(target).args(["--point-seconds", "0.001", "--batches", "2"]);
        if target == &job {
            command.args(["--set", "pipeline.simd=portable", "--set", "pipeline.threads=1"]);
        }
        let output = command.args(["--format", "json"]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        if target == &job {
            // The job's longest context is shorter than what is measured otherwise.
            assert_eq!(report["context_tokens"], 16);
            assert_eq!(
                (&report["device"]["simd"], &report["device"]["threads"]),
                (&json!("portable"), &json!(1))
            );
        }
    }
}

/// What was measured until then has been printed.
#[test]
#[cfg(unix)]
fn an_interrupt_ends_it_at_once() {
    let mut child = bench_for("30").stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let stderr = BufReader::new(child.stderr.take().unwrap());
    let loaded = stderr.lines().map_while(Result::ok).any(|line| line.contains("KV cache filled"));
    assert!(loaded, "it ended before anybody interrupted it");
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    let status = child.wait().unwrap();
    assert!(!status.success(), "{status}");
}

#[test]
fn what_cannot_be_measured_is_refused_in_words() {
    let model = fixture("hetero-0-bf16");
    let model = model.to_str().unwrap();
    for (args, words) in [
        (vec!["no/such/model"], "no/such/model/config.json"),
        (vec![model, "--device", "gpu:0"], "unknown device kind"),
        (vec![model, "--threads", "0"], "expected a whole number above 0"),
        (vec![model, "--context-tokens", "0"], "expected a whole number above 0"),
        (vec![model, "--batches", "1,0"], "expected a whole number above 0"),
        (vec![model, "--batches", "65537"], "[pipeline] max_sequences: found 65537, expected at most 65536"),
        (vec![model, "--micro-batch-tokens", "9999999"], "[pipeline] micro_batch_tokens: found 9999999"),
        (vec![model, "--point-seconds", "nan"], "expected a number of seconds above 0"),
        (vec![model, "--device", "cpu:900"], "cores"),
        (vec![model, "--set", "pipeline.simd=avx2"], "expected a job file"),
        (vec!["configs/smollm2.toml", "--threads", "1"], "expected --set"),
        (
            vec![model, "--context-tokens", "99999999"],
            "[model] max_context_tokens: found 99999999, the model's max_position_embeddings is",
        ),
        (vec!["configs/models/Llama-3_1-Nemotron-Ultra-253B-v1/config.json"], "the weights take 50"),
    ] {
        let output = spanwise().arg("bench").args(&args).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && stderr.contains(words), "{args:?}: {stderr}");
    }
}
