//! Lines on disk.

use std::path::Path;

use jobs::{
    Counts, InputRecord, Line, LineFile, Manifest, ModelRecord, NumericProfile, Order, OutputFolder,
    Settings, Status, Timings, TokenTotals, Unread, Writer, Written,
};
use scheduler::RequestKey;
use tempfile::TempDir;

fn line(row: u64, file: LineFile) -> Line {
    let json = format!("{{\"row\":{row},\"text\":\"{}\"}}", "x".repeat(row as usize % 50));
    let key = RequestKey(row.into());
    Line { row, key, file, is_refusal: false, prompt_tokens: 2, generated_tokens: 3, json }
}

fn open(folder: &Path, order: Order, fresh: bool) -> jobs::Result<Writer> {
    let folder = OutputFolder::open(folder, fresh)?;
    folder.begin(order, &Settings::default(), 0, false).map(|(writer, _)| writer)
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
    let mut writer = open(folder, order, false).unwrap();
    let shuffled: Vec<u64> = (0..1000).map(|step| step * 617 % 1000).collect();
    for &row in &shuffled {
        writer.write(&line(row, if row % 10 == 0 { LineFile::Errors } else { LineFile::Output })).unwrap();
    }
    (shuffled, writer.finish(Unread::HasLeft).unwrap())
}

#[test]
fn lines_end_in_the_order_of_the_input() {
    let folder = TempDir::new().unwrap();
    let (_, written) = write(folder.path(), Order::Input);
    let lines = Written { output_lines: 900, error_lines: 100, ..Written::default() };
    assert_eq!(written, Written { prompt_tokens: 2000, generated_tokens: 3000, ..lines });
    assert_eq!(
        rows(folder.path(), "output.jsonl"),
        (0..1000).filter(|row| row % 10 != 0).collect::<Vec<_>>()
    );
    assert_eq!(rows(folder.path(), "errors.jsonl"), (0..1000).step_by(10).collect::<Vec<_>>());
    assert_eq!(names(folder.path()), ["errors.jsonl", "job.lock", "journal.sqlite", "output.jsonl"]);
}

#[test]
fn lines_may_stay_in_the_order_of_completion() {
    let folder = TempDir::new().unwrap();
    let (shuffled, _) = write(folder.path(), Order::Completion);
    let output: Vec<u64> = shuffled.into_iter().filter(|row| row % 10 != 0).collect();
    assert_eq!(rows(folder.path(), "output.jsonl"), output);
}

#[test]
fn what_was_committed_is_there_for_others_to_read() {
    let folder = TempDir::new().unwrap();
    let mut writer = open(folder.path(), Order::Input, false).unwrap();
    writer.write(&line(5, LineFile::Output)).unwrap();
    writer.write(&line(2, LineFile::Output)).unwrap();
    writer.commit().unwrap();
    assert_eq!(rows(folder.path(), "output.jsonl"), [5, 2]);
    drop(writer);
}

#[test]
fn a_fresh_start_throws_away_what_a_job_has_left_and_nothing_else() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("deep/out");
    write(&out, Order::Input);
    std::fs::write(out.join("manifest.json"), "{}").unwrap();
    std::fs::write(out.join("notes.txt"), "mine").unwrap();
    let writer = open(&out, Order::Input, false).unwrap();
    assert_eq!(rows(&out, "output.jsonl").len(), 900, "a run that goes on keeps what is there");
    assert_eq!(writer.pause().unwrap().output_lines, 900);

    open(&out, Order::Input, true).unwrap().finish(Unread::HasLeft).unwrap();
    assert_eq!(names(&out), ["errors.jsonl", "job.lock", "journal.sqlite", "notes.txt", "output.jsonl"]);
    assert!(rows(&out, "output.jsonl").is_empty());
}

#[test]
fn lines_without_a_journal_are_refused() {
    for name in ["output.jsonl", "errors.jsonl"] {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, "{}\n").unwrap();
        let error = open(folder.path(), Order::Input, false).err().unwrap().to_string();
        let expected = format!(
            "{} exists, and no journal beside it says whose lines it holds; \
             pass --fresh to start over, or name another folder in [job] output",
            path.display()
        );
        assert_eq!(error, expected);
        assert_eq!(std::fs::read_to_string(path).unwrap(), "{}\n");
    }
}

#[test]
fn lines_that_the_journal_vouches_for_and_that_are_gone_are_missed() {
    let folder = TempDir::new().unwrap();
    write(folder.path(), Order::Input);
    let path = folder.path().join("output.jsonl");
    let whole = std::fs::read(&path).unwrap();
    for cut in [whole.len() - 1, 0] {
        std::fs::write(&path, &whole[..cut]).unwrap();
        let error = open(folder.path(), Order::Input, false).err().unwrap().to_string();
        let words = format!("output.jsonl has {cut} bytes, and the journal vouches for {}", whole.len());
        assert!(error.contains(&words), "{error}");
    }
    std::fs::remove_file(&path).unwrap();
    let error = open(folder.path(), Order::Input, false).err().unwrap().to_string();
    assert!(error.contains("output.jsonl has 0 bytes"), "{error}");
}

#[test]
fn a_folder_that_cannot_be_is_named() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = open(&file.join("out"), Order::Input, false).err().unwrap();
    assert_eq!(error.to_string(), format!("cannot create the output folder {}", file.join("out").display()));
}

#[test]
fn a_manifest_is_replaced_whole() {
    let folder = TempDir::new().unwrap();
    let mut manifest = Manifest {
        failed_replicas: vec![],
        version: "0.1.0".into(),
        status: Status::Interrupted,
        model: ModelRecord { path: "models/tiny".into(), identity: "abc".into() },
        input: InputRecord { path: "in.jsonl".into(), blake3: "00".into(), bytes: 10, rows: 2 },
        config: serde_json::json!({"job": {"seed": 0}}),
        plan: serde_json::json!([{"device": "cpu:0", "blocks": [0, 3]}]),
        stages: Vec::new(),
        numeric_profile: NumericProfile {
            backend: "cpu".into(),
            simd: "avx512".into(),
            dtype: "bf16".into(),
            kv_cache_dtype: "bf16".into(),
            tensor_parallel: 1,
            tensor_parallel_stages: None,
            deterministic: true,
        },
        counts: Counts { total: 2, completed: 1, failed: 1, resumed: 0, stale: 0 },
        tokens: TokenTotals { prompt: 5, generated: 7 },
        scores: None,
        limit: None,
        timings: Timings {
            started_at: 1,
            finished_at: 2,
            load_seconds: 0.5,
            run_seconds: 0.25,
            scheduling_seconds: 0.0,
            reader_cpu_seconds: 0.125,
            writer_cpu_seconds: 0.0625,
        },
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
