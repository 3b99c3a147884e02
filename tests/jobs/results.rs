//! What one can ask of an output folder: how far the job is, whether its result is complete, and the rows
//! that failed once more.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::{Job, batch_line, fixture, read_json, spanwise};

const MODEL: &str = "hetero-0-bf16";

/// Rows of which one in ten is refused.
fn rows(count: usize) -> Vec<String> {
    (0..count)
        .map(|i| {
            let mut body = json!({"prompt": format!("hello {i}"), "max_tokens": 4, "ignore_eos": true});
            if i % 10 == 3 {
                body["top_p"] = json!(7);
            }
            batch_line(&format!("row-{i}"), "/v1/completions", &body)
        })
        .collect()
}

/// A job of so many rows that has run to its end.
fn done(count: usize) -> Job {
    let job = Job::on(MODEL).lines(rows(count));
    let output = job.run_once(&[]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    job
}

/// Runs a command on the output folder of a job.
fn ask(job: &Job, command: &str, args: &[&str]) -> Output {
    spanwise().arg(command).arg(job.out()).args(args).output().expect("start spanwise")
}

#[track_caller]
fn ask_json(job: &Job, command: &str, code: i32) -> Value {
    let output = ask(job, command, &["--format", "json"]);
    assert_eq!(output.status.code(), Some(code), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A job at work, which ends with the test.
struct Running(Child);

impl Running {
    fn end(&mut self, signal: &str) {
        let kill = Command::new("kill").args([signal, &self.0.id().to_string()]).status();
        assert!(kill.expect("start kill").success());
        self.0.wait().expect("wait for spanwise");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill().and_then(|()| self.0.wait());
    }
}

/// Starts a job of minutes, and waits until a commit speaks of its first lines.
fn start_long() -> (Job, Running, Value) {
    let row = |i| {
        let body = json!({"prompt": format!("hello {i}"), "max_tokens": 100, "ignore_eos": true});
        batch_line(&format!("row-{i}"), "/v1/completions", &body)
    };
    let job = Job::on(MODEL).set("pipeline.max_sequences=4").lines((0..3000).map(row));
    let mut command = job.command();
    let running = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().map(Running);
    let running = running.expect("start spanwise");
    let began = Instant::now();
    loop {
        assert!(began.elapsed() < Duration::from_secs(60), "no line in a minute");
        std::thread::sleep(Duration::from_millis(100));
        let output = ask(&job, "status", &["--format", "json"]);
        if !output.status.success() {
            continue; // There is no journal yet.
        }
        let status: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        if status["completed"].as_u64() > Some(0) && status["lines_per_second"].as_f64() > Some(0.0) {
            return (job, running, status);
        }
    }
}

#[test]
fn status_tells_from_another_terminal_how_far_a_running_job_is() {
    let (job, mut running, status) = start_long();
    assert_eq!(status["state"], "running");
    let holder = status["holder"].as_str().expect("a holder");
    assert!(holder.starts_with(&format!("process {}", running.0.id())), "{holder}");
    let share = status["share_read"].as_f64().expect("a share");
    assert!(0.0 < share && share < 1.0, "{status}");
    let rows = status["rows"].as_u64().expect("rows");
    assert!((2500..3500).contains(&rows), "{status}");
    assert!(status["tokens_per_second"].as_f64() > Some(0.0), "{status}");
    assert!(status["seconds_left"].as_f64() > Some(0.0), "{status}");
    let shown = text(&ask(&job, "status", &[]).stdout);
    for word in ["running: process", "done, 0 failed, of about", "% read", "rows/s", "left "] {
        assert!(shown.contains(word), "{word:?} is not in\n{shown}");
    }
    // What runs cannot be proved complete.
    let audit = ask(&job, "audit", &["--input", "/dev/null"]);
    assert_eq!(audit.status.code(), Some(2));
    assert!(text(&audit.stderr).contains("is in use by process"), "{}", text(&audit.stderr));

    running.end("-INT");
    let stopped = ask_json(&job, "status", 0);
    assert_eq!((&stopped["state"], &stopped["holder"]), (&json!("interrupted"), &Value::Null));
    assert_eq!(stopped["seconds_left"], Value::Null);
    assert!(stopped["completed"].as_u64() >= status["completed"].as_u64());
    let audit = ask_json(&job, "audit", 1);
    assert_eq!((&audit["status"], &audit["rows"]), (&json!("interrupted"), &json!(3000)));
}

#[test]
fn a_job_that_was_killed_is_told_from_one_that_has_ended() {
    let (job, mut running, _) = start_long();
    running.end("-KILL");
    assert_eq!(ask_json(&job, "status", 0)["state"], "killed");
    for command in ["audit", "retry"] {
        let output = ask(&job, command, &[]);
        assert_eq!(output.status.code(), Some(2));
        assert!(text(&output.stderr).contains("its own command"), "{}", text(&output.stderr));
    }
    let job = done(20);
    let status = ask_json(&job, "status", 0);
    assert_eq!((&status["state"], &status["completed"]), (&json!("complete"), &json!(18)));
    assert_eq!((&status["failed"], &status["share_read"]), (&json!(2), &json!(1.0)));
}

#[test]
fn a_result_as_it_was_written_is_complete() {
    let job = done(40);
    let before = std::fs::read(job.out().join("output.jsonl")).unwrap();
    let output = ask(&job, "audit", &[]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stdout));
    let shown = text(&output.stdout);
    assert!(shown.contains("36 answers, 4 errors") && shown.contains("complete  yes"), "{shown}");
    assert_eq!(std::fs::read(job.out().join("output.jsonl")).unwrap(), before);
    // Of plain rows too.
    let plain = Job::on(MODEL)
        .toml("[prompt]\nuser = \"{{ text }}\"\n[sampling]\nmax_tokens = 2\n")
        .lines(["a", "b", "b", "c"].map(|word| json!({"text": word}).to_string()));
    assert!(plain.run_once(&[]).status.success());
    assert_eq!(ask_json(&plain, "audit", 0)["rows"], 4);
}

/// What somebody does to a finished job, and what the audit finds of it.
struct Harm {
    name: &'static str,
    does: fn(&Path),
    finds: &'static [&'static str],
}

const HARMS: &[Harm] = &[
    Harm {
        name: "a line altered",
        does: |root| {
            lines(root, "out/output.jsonl", |lines| {
                lines[4] = lines[4].replacen("\"text\":\"", "\"text\":\"x", 1)
            })
        },
        finds: &["out/output.jsonl:5: altered since it was written (row-5)"],
    },
    Harm {
        name: "a line removed",
        does: |root| lines(root, "out/output.jsonl", |lines| drop(lines.remove(4))),
        finds: &["out/output.jsonl:5: the line batch_req_… is missing here"],
    },
    Harm {
        name: "a line doubled",
        does: |root| lines(root, "out/output.jsonl", |lines| lines.insert(4, lines[2].clone())),
        finds: &["out/output.jsonl:5: a line that stands elsewhere too (row-2)"],
    },
    Harm {
        name: "a line appended",
        does: |root| {
            lines(root, "out/errors.jsonl", |lines| lines.push("{\"custom_id\": \"mine\"}".to_owned()))
        },
        finds: &["out/errors.jsonl:4: a line behind the last that the job wrote (mine)"],
    },
    Harm {
        name: "two lines swapped",
        does: |root| lines(root, "out/output.jsonl", |lines| lines.swap(4, 5)),
        finds: &[
            "out/output.jsonl:5: the line batch_req_… is missing here",
            "out/output.jsonl:6: a line that stands elsewhere too (row-5)",
        ],
    },
    Harm {
        name: "the last line torn",
        does: |root| {
            let path = root.join("out/output.jsonl");
            let bytes = std::fs::read(&path).unwrap();
            std::fs::write(path, &bytes[..bytes.len() - 5]).unwrap();
        },
        finds: &["out/output.jsonl:27: torn"],
    },
    Harm {
        name: "a file of lines gone",
        does: |root| std::fs::remove_file(root.join("out/errors.jsonl")).unwrap(),
        finds: &[
            "out/errors.jsonl:1: the line batch_req_… is missing here",
            "out/errors.jsonl:1: the line batch_req_… is missing here",
            "out/errors.jsonl:1: the line batch_req_… is missing here",
        ],
    },
    Harm {
        name: "a row added to the input",
        does: |root| lines(root, "input.jsonl", |lines| lines.push(rows(31).remove(30))),
        finds: &["input.jsonl:31: a row without a line (row-30)"],
    },
    Harm {
        name: "a row taken from the input",
        does: |root| lines(root, "input.jsonl", |lines| drop(lines.pop())),
        finds: &["out/output.jsonl:27: batch_req_… is the line of no row of the input"],
    },
    Harm {
        name: "a row of the input changed",
        does: |root| lines(root, "input.jsonl", |lines| lines[0] = lines[0].replace("hello 0", "hello, 0")),
        finds: &[
            "input.jsonl:1: a row without a line (row-0)",
            "out/output.jsonl:1: batch_req_… is the line of no row of the input",
        ],
    },
    Harm {
        name: "two rows of the input swapped",
        does: |root| lines(root, "input.jsonl", |lines| lines.swap(0, 1)),
        finds: &["input.jsonl:2: the line in output.jsonl stands before an earlier row's"],
    },
];

/// Changes the lines of a file.
fn lines(root: &Path, file: &str, change: impl FnOnce(&mut Vec<String>)) {
    let path = root.join(file);
    let mut lines: Vec<String> = std::fs::read_to_string(&path).unwrap().lines().map(str::to_owned).collect();
    change(&mut lines);
    std::fs::write(path, lines.join("\n") + "\n").unwrap();
}

/// A finding without the key in it, which says nothing to a reader.
fn without_key(what: &str) -> String {
    match what.split_once("batch_req_") {
        Some((before, after)) => format!("{before}batch_req_…{}", &after[32..]),
        None => what.to_owned(),
    }
}

#[test]
fn an_audit_names_what_is_not_as_it_was_written() {
    let job = done(30);
    let root = job.out().parent().unwrap().to_owned();
    let keep = tempfile::tempdir().unwrap();
    for harm in HARMS {
        let files = ["input.jsonl", "out/output.jsonl", "out/errors.jsonl"];
        let kept = |file: &str| keep.path().join(file.replace('/', "-"));
        let copy = |places: &dyn Fn(&str) -> (PathBuf, PathBuf)| {
            for (from, to) in files.map(places) {
                std::fs::copy(from, to).unwrap();
            }
        };
        copy(&|file| (root.join(file), kept(file)));
        (harm.does)(&root);
        let audit = ask_json(&job, "audit", 1);
        let found: Vec<String> = (audit["findings"].as_array().unwrap().iter())
            .map(|found| {
                let file = Path::new(found["file"].as_str().unwrap()).strip_prefix(&root).unwrap();
                format!(
                    "{}:{}: {}",
                    file.display(),
                    found["line"],
                    without_key(found["what"].as_str().unwrap())
                )
            })
            .collect();
        assert_eq!(found, harm.finds, "{}", harm.name);
        assert_eq!(audit["is_complete"], false);
        copy(&|file| (kept(file), root.join(file)));
    }
    assert_eq!(ask_json(&job, "audit", 0)["is_complete"], true);
    // What is too much to name is counted.
    lines(&root, "out/output.jsonl", |lines| {
        lines.iter_mut().for_each(|line| *line = line.replace(':', ": "))
    });
    let shown = text(&ask(&job, "audit", &["--most", "2"]).stdout);
    assert!(shown.contains("and 25 more") && shown.contains("complete  no: 27"), "{shown}");
}

/// A copy of a model in which the embedding of a token is no number, between the bytes that tell models apart.
fn damaged_model() -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture(MODEL)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
    }
    let path = copy.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let header_end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..header_end]).unwrap();
    let embedding = header["model.embed_tokens.weight"]["data_offsets"][0].as_u64().unwrap() as usize;
    let row = header_end + embedding + usize::from(TOKEN) * 256 * 2;
    bytes[row..row + 256 * 2].fill(0x7f); // 0x7f7f is a bf16 near the largest there is, whose square is infinite.
    bytes[row..row + 2].copy_from_slice(&[0xc0, 0x7f]); // And this is no number.
    std::fs::write(path, bytes).unwrap();
    copy
}

/// The token that is damaged.
const TOKEN: u16 = 100;

#[test]
fn rows_that_failed_are_run_once_more_and_only_they() {
    let model = damaged_model();
    let body =
        |prompt: Value| json!({"prompt": prompt, "max_tokens": 4, "ignore_eos": true, "temperature": 0});
    let job = (0..10).fold(Job::on_model(model.path()), |job, i| match i {
        3 | 7 => job.completion(&format!("row-{i}"), body(json!([5, TOKEN, 6]))),
        _ => job.completion(&format!("row-{i}"), body(json!([5, 6, i]))),
    });
    assert!(job.run_once(&[]).status.success());
    let read = |file: &str| std::fs::read_to_string(job.out().join(file)).unwrap();
    let (answers, errors) = (read("output.jsonl"), read("errors.jsonl"));
    assert_eq!((answers.lines().count(), errors.lines().count()), (8, 2), "{errors}");

    // Those that fail again have their lines again.
    let again = ask(&job, "retry", &["--progress", "none"]);
    assert!(again.status.success(), "{}", text(&again.stderr));
    assert_eq!((read("output.jsonl"), read("errors.jsonl")), (answers.clone(), errors));
    assert_eq!(read_json(&job.out().join("manifest.json"))["counts"]["resumed"], 8);

    // A run does not look at them again, and with the cause gone a retry answers them.
    std::fs::copy(fixture(MODEL).join("model.safetensors"), model.path().join("model.safetensors")).unwrap();
    assert!(job.run_once(&[]).status.success());
    assert_eq!(read("errors.jsonl").lines().count(), 2);
    let mended = ask(&job, "retry", &["--progress", "none"]);
    assert!(mended.status.success(), "{}", text(&mended.stderr));
    assert_eq!(read("errors.jsonl"), "");
    let ids = |text: String| -> Vec<Value> {
        let id = |line: &str| serde_json::from_str::<Value>(line).unwrap()["custom_id"].clone();
        text.lines().map(id).collect()
    };
    assert_eq!(ids(read("output.jsonl")), (0..10).map(|i| json!(format!("row-{i}"))).collect::<Vec<_>>());
    assert_eq!(ask_json(&job, "audit", 0)["output_lines"], 10);
    let manifest = read_json(&job.out().join("manifest.json"));
    assert_eq!((&manifest["counts"]["resumed"], &manifest["counts"]["completed"]), (&json!(8), &json!(10)));
}

#[test]
fn a_retry_reads_the_input_as_it_is_now_and_the_job_as_it_was() {
    let job = Job::on(MODEL).set("sampling.max_tokens=3").set("job.order=completion").lines(rows(10));
    assert!(job.run_once(&[]).status.success());
    let input = job.out().parent().unwrap().join("input.jsonl");
    let mended = std::fs::read_to_string(&input).unwrap().replace("\"top_p\":7", "\"top_p\":0.7");
    std::fs::write(&input, mended).unwrap();
    let output = ask(&job, "retry", &["--progress", "none"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let audit = ask_json(&job, "audit", 0);
    assert_eq!((&audit["output_lines"], &audit["error_lines"]), (&json!(10), &json!(0)));
    let manifest = read_json(&job.out().join("manifest.json"));
    assert_eq!(manifest["config"]["sampling"]["max_tokens"], 3);
    assert_eq!(manifest["config"]["overrides"].as_array().map(Vec::len), Some(2), "{}", manifest["config"]);
}

#[test]
fn a_run_says_why_rows_have_failed_and_ends_badly_where_all_have() {
    let plain = |i| json!({"id": format!("row-{i}"), "prompt": format!("hello {i}")}).to_string();
    let job =
        Job::on(MODEL).lines((0..6).map(plain)).line("no JSON").toml("[prompt]\nuser = \"{{ promt }}\"\n");
    let why = |shown: &[u8]| -> String {
        let shown = text(shown);
        let line = shown.lines().find_map(|line| line.strip_prefix("failed    "));
        line.unwrap_or_else(|| panic!("nothing has failed in\n{shown}")).to_owned()
    };
    let expected = format!(
        "6 missing_field, 1 invalid_json_line; the first, line 1 of the input: [prompt] user asks for promt, which the row \
         lacks; it has id, prompt; all of them in {}",
        job.out().join("errors.jsonl").display()
    );
    let all_failed = job.run_once(&[]);
    assert_eq!(all_failed.status.code(), Some(3), "{}", text(&all_failed.stderr));
    assert_eq!(why(&all_failed.stdout), expected);
    assert_eq!(why(&ask(&job, "status", &[]).stdout), expected);
    let told = format!(
        "error: no row was answered, all 7 have failed\nhint: once the input is corrected, `spanwise retry {:?}` runs them again; \
         once the job file is, `spanwise run` with --fresh starts over\n",
        job.out().display()
    );
    assert_eq!(text(&all_failed.stderr), told);
    // All rows have their lines all the same.
    assert_eq!(ask_json(&job, "audit", 0)["error_lines"], 7);

    // With one answer it is a job like others.
    let fresh = ["--fresh", "--set", "prompt.user={{ prompt }}", "--set", "sampling.max_tokens=2"];
    let some_failed = job.run_once(&fresh);
    assert_eq!((some_failed.status.code(), text(&some_failed.stderr)), (Some(0), String::new()));
    let reason = why(&some_failed.stdout);
    assert!(
        reason.starts_with("1 invalid_json_line; the first, line 7 of the input: not JSON: "),
        "{reason}"
    );
}

#[test]
fn a_folder_that_is_not_there_is_said_to_be_so() {
    for command in ["status", "audit", "retry"] {
        for path in ["no/such/folder", "Cargo.toml"] {
            let output = spanwise().args([command, path]).output().expect("start spanwise");
            let told = format!("error: {path}: there is no such folder\n");
            assert_eq!((output.status.code(), text(&output.stderr)), (Some(2), told), "{command}");
        }
    }
}
