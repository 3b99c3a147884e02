//! How many rows a second do reading, keying, writing and the journal take without a model, and how long
//! does a job of that many finished rows take to go on?
//!
//! The rows: completions of 16 token ids; the lines: 400 bytes each, completed in the order of the input.
//! Before its times count, the output must have as many lines as the input, and a job that goes on must
//! find every row finished.
//!
//! `cargo bench --bench journal [-- ROWS]`, with nothing else running.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "a bench prints")]

use std::io::{BufRead, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jobs::{
    FinishedRows, Line, LineFile, ModelText, ModelTextOptions, Order, OutputFolder, Preparer, Reader, Row,
    RowOptions, SamplingOptions, Unread, Writer,
};

const ROWS: u64 = 1_000_000;
const LINE_BYTES: usize = 400;

fn main() {
    let rows = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(ROWS);
    let folder = tempfile::tempdir().expect("a temporary folder");
    write_input(folder.path(), rows);

    let (first, resumed) = run(folder.path());
    assert_eq!((count_lines(&folder.path().join("out/output.jsonl")), resumed), (rows, 0));
    show("from nothing", rows, first);
    let (again, resumed) = run(folder.path());
    assert_eq!(resumed, rows, "every row is finished");
    show("all finished", rows, again);
}

fn show(name: &str, rows: u64, time: Duration) {
    let seconds = time.as_secs_f64();
    let peak = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = peak.lines().find(|line| line.starts_with("VmHWM")).unwrap_or("VmHWM: unknown").to_owned();
    println!("{name}: {rows} rows in {seconds:.2} s, {:.0} rows/s; {peak}", rows as f64 / seconds);
}

/// Counts without holding what it reads, for the peak of memory is shown.
fn count_lines(path: &Path) -> u64 {
    let file = std::io::BufReader::new(std::fs::File::open(path).expect("open the output"));
    file.split(b'\n').fold(0, |count, line| count + u64::from(line.is_ok()))
}

fn write_input(folder: &Path, rows: u64) {
    let file = std::fs::File::create(folder.join("input.jsonl")).expect("create the input");
    let mut file = std::io::BufWriter::new(file);
    for row in 0..rows {
        writeln!(
            file,
            r#"{{"custom_id":"row-{row}","method":"POST","url":"/v1/completions","body":{{"prompt":[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,{}],"max_tokens":8}}}}"#,
            row % 100
        )
        .expect("write the input");
    }
    file.flush().expect("write the input");
}

/// Runs the job; how long it took, and how many rows were finished before.
fn run(folder: &Path) -> (Duration, u64) {
    let began = Instant::now();
    let options = ModelTextOptions { vocab_size: 128, eos_token_ids: vec![0], unix_seconds: 0 };
    let text = ModelText::open(folder, &options).expect("a model without text files");
    let options = RowOptions {
        model_identity: "none".to_owned(),
        prompt: None,
        sampling: SamplingOptions::default(),
        seed: 0,
        max_context_tokens: 64,
    };
    let preparer = Preparer::new(Arc::new(text), options).expect("settings that fit");
    let output = OutputFolder::open(&folder.join("out"), false).expect("open the output folder");
    let (mut writer, finished): (Writer, FinishedRows) =
        output.begin(Order::Input, &preparer.settings(), 0, false).expect("begin");
    let reader =
        Reader::open(&folder.join("input.jsonl"), preparer, None).expect("open the input").after(finished);
    let mut resumed = 0;
    for row in reader {
        match row.expect("read") {
            Row::Request(row) => writer.write(&line(&row)).expect("write"),
            Row::Finished(row) => {
                resumed += 1;
                writer.keep(row).expect("keep");
            }
            Row::Rejected(row) => panic!("{row:?}"),
        }
    }
    writer.finish(Unread::HasLeft).expect("finish");
    (began.elapsed(), resumed)
}

fn line(row: &jobs::PreparedRow) -> Line {
    let mut json = format!(r#"{{"custom_id":"{}","text":""#, row.custom_id);
    json.extend(std::iter::repeat_n('x', LINE_BYTES - json.len() - 3));
    json.push_str("\"}");
    Line {
        row: row.index,
        key: row.request.key,
        file: LineFile::Output,
        is_refusal: false,
        prompt_tokens: row.request.prompt.len() as u64,
        generated_tokens: 8,
        json,
    }
}
