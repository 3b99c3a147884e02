//! Lines on disk.

use std::path::Path;

use jobs::{
    Counts, InputRecord, Line, LineFile, Manifest, ModelRecord, NumericProfile, Order, Status, Timings,
    TokenTotals, Writer, Written,
};
use tempfile::TempDir;

fn line(row: u64, file: LineFile) -> Line {
    Line { row, file, json: format!("{{\"row\":{row},\"text\":\"{}\"}}", "x".repeat(row as usize % 50)) }
}

fn rows(folder: &Path, file: &str) -> Vec<u64> {
    let text = std::fs::read_to_string(folder.join(file)).unwrap();
    assert!(text.is_empty() || text.ends_with('\n'));
    text.lines()
        .map(|text| {
            let row = serde_json::from_str::<serde_json::Value>(text).unwrap()["row"].as_u64().unwrap();
            assert_eq!(text, line(row, LineFile::Output).json);
            row
        })
        .collect()
}

fn names(folder: &Path) -> Vec<String> {
    let names =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

/// Rows in the order of their completion: 0 to 999 shuffled, every tenth an error.
fn write(folder: &Path, order: Order) -> (Vec<u64>, Written) {
    let mut writer = Writer::create(folder, order, false).unwrap();
    let shuffled: Vec<u64> = (0..1000).map(|step| step * 617 % 1000).collect();
    for &row in &shuffled {
        writer.write(&line(row, if row % 10 == 0 { LineFile::Errors } else { LineFile::Output })).unwrap();
    }
    (shuffled, writer.finish().unwrap())
}

#[test]
fn lines_end_in_the_order_of_the_input() {
    let folder = TempDir::new().unwrap();
    let (_, written) = write(folder.path(), Order::Input);
    assert_eq!(written, Written { output_lines: 900, error_lines: 100 });
    assert_eq!(
        rows(folder.path(), "output.jsonl"),
        (0..1000).filter(|row| row % 10 != 0).collect::<Vec<_>>()
    );
    assert_eq!(rows(folder.path(), "errors.jsonl"), (0..1000).step_by(10).collect::<Vec<_>>());
    assert_eq!(names(folder.path()), ["errors.jsonl", "output.jsonl"]);
}

#[test]
fn lines_may_stay_in_the_order_of_completion() {
    let folder = TempDir::new().unwrap();
    let (shuffled, _) = write(folder.path(), Order::Completion);
    let output: Vec<u64> = shuffled.into_iter().filter(|row| row % 10 != 0).collect();
    assert_eq!(rows(folder.path(), "output.jsonl"), output);
}

#[test]
fn what_was_flushed_is_there_for_others_to_read() {
    let folder = TempDir::new().unwrap();
    let mut writer = Writer::create(folder.path(), Order::Input, false).unwrap();
    writer.write(&line(5, LineFile::Output)).unwrap();
    writer.write(&line(2, LineFile::Output)).unwrap();
    writer.flush().unwrap();
    assert_eq!(rows(folder.path(), "output.jsonl"), [5, 2]);
    drop(writer);
}

#[test]
fn a_folder_in_use_is_refused_unless_the_job_starts_afresh() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("deep/out");
    write(&out, Order::Input);
    std::fs::write(out.join("manifest.json"), "{}").unwrap();
    let error = Writer::create(&out, Order::Input, false).err().unwrap().to_string();
    let path = out.join("output.jsonl");
    assert_eq!(
        error,
        format!(
            "{} exists; pass --fresh to start over, or name another folder in [job] output",
            path.display()
        )
    );
    assert_eq!(rows(&out, "output.jsonl").len(), 900);
    std::fs::write(out.join("notes.txt"), "mine").unwrap();

    Writer::create(&out, Order::Input, true).unwrap().finish().unwrap();
    assert_eq!(names(&out), ["errors.jsonl", "notes.txt", "output.jsonl"]);
    assert!(rows(&out, "output.jsonl").is_empty());
}

#[test]
fn an_errors_file_alone_is_an_earlier_run_too() {
    let folder = TempDir::new().unwrap();
    std::fs::write(folder.path().join("errors.jsonl"), "").unwrap();
    let error = Writer::create(folder.path(), Order::Input, false).err().unwrap().to_string();
    assert!(error.contains("errors.jsonl exists"), "{error}");
    assert_eq!(names(folder.path()), ["errors.jsonl"]);
}

#[test]
fn a_folder_that_cannot_be_is_named() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = Writer::create(&file.join("out"), Order::Input, false).err().unwrap();
    assert_eq!(error.to_string(), format!("write {}", file.join("out").display()));
}

#[test]
fn a_manifest_is_replaced_whole() {
    let folder = TempDir::new().unwrap();
    let mut manifest = Manifest {
        version: "0.1.0".into(),
        status: Status::Interrupted,
        model: ModelRecord { path: "models/tiny".into(), identity: "abc".into() },
        input: InputRecord { path: "in.jsonl".into(), blake3: "00".into(), bytes: 10, rows: 2 },
        config: serde_json::json!({"job": {"seed": 0}}),
        plan: serde_json::json!([{"device": "cpu:0", "blocks": [0, 3]}]),
        numeric_profile: NumericProfile {
            backend: "cpu".into(),
            simd: "avx512".into(),
            dtype: "bf16".into(),
            kv_cache_dtype: "bf16".into(),
            tensor_parallel: 1,
        },
        counts: Counts { total: 2, completed: 1, failed: 1 },
        tokens: TokenTotals { prompt: 5, generated: 7 },
        timings: Timings { started_at: 1, finished_at: 2, load_seconds: 0.5, run_seconds: 0.25 },
    };
    manifest.write(folder.path()).unwrap();
    assert_eq!(Manifest::read(folder.path()).unwrap(), manifest);
    manifest.status = Status::Complete;
    manifest.write(folder.path()).unwrap();
    assert_eq!(Manifest::read(folder.path()).unwrap(), manifest);
    assert_eq!(names(folder.path()), ["manifest.json"]);
    let text = std::fs::read_to_string(folder.path().join("manifest.json")).unwrap();
    assert!(text.contains("\"status\": \"complete\""), "{text}");
}
