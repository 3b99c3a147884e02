//! How many rows a second do reading, keying, writing and the journal take without a model, how long does
//! a job of that many finished rows take to go on, and how much memory does each need?
//!
//! Rows are batch lines of 16 token ids, or plain rows of a few words; lines have 400 bytes and are
//! completed out of order, as in a pipeline with 256 rows in flight. Three runs of each job, every one a
//! process of its own, so that its peak of memory is its own too:
//!
//! * from nothing, and stopped when all rows are done and nothing is in order yet;
//! * all rows finished, and then put in order: every line is written anew;
//! * all rows finished and in order.
//!
//! And how long does an audit of the result take?
//!
//! Before its times count, a run must have met the rows it should, and the output must have as many lines
//! as the input, the first and the last in their places.
//!
//! `cargo bench --bench journal [-- ROWS]`, with nothing else running.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "a bench prints")]

use std::io::{BufRead, Write};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use jobs::{
    Audit, AuditOptions, EarlierRuns, Line, LineFile, ModelText, ModelTextOptions, Order, OutputFolder,
    Preparer, PromptOptions, Reader, Row, RowOptions, SamplingOptions, Unread, Writer,
};

const ROWS: u64 = 1_000_000;
const LINE_BYTES: usize = 400;
const IN_FLIGHT: usize = 256;

/// What a run of the bench's own program is to do.
const RUN: &str = "--run";

/// The run that audits.
const AUDIT: &str = "audit";

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [run, kind, end, folder, ..] = args.as_slice()
        && run == RUN
    {
        return run_job(kind, end, Path::new(folder));
    }
    let rows = args.iter().find_map(|arg| arg.parse().ok()).unwrap_or(ROWS);
    for kind in ["batch", "plain"] {
        // Beside the build, since a system's own folder for temporary files may be memory.
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a temporary folder");
        write_input(folder.path(), kind, rows);
        for (name, end, met) in [
            ("from nothing", "pause", [rows, 0]),
            ("all finished, put in order", "finish", [0, rows]),
            ("all finished and in order", "finish", [0, rows]),
        ] {
            let figures = run_apart(kind, end, folder.path());
            assert!(figures.starts_with(&format!("{} new, {} finished", met[0], met[1])), "{figures}");
            println!("{kind} rows, {name}: {figures}");
        }
        check_output(&folder.path().join("out/output.jsonl"), rows);
        println!("{kind} rows, audited: {}", run_apart(kind, AUDIT, folder.path()));
    }
}

/// Runs this program again for one run of the job; what it has to say.
fn run_apart(kind: &str, end: &str, folder: &Path) -> String {
    let program = std::env::current_exe().expect("the bench's path");
    let output = Command::new(program).args([RUN, kind, end]).arg(folder).output().expect("run the bench");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text").trim().to_owned()
}

fn run_job(kind: &str, end: &str, folder: &Path) {
    let began = Instant::now();
    if end == AUDIT {
        return audit(folder);
    }
    let preparer = preparer(kind, folder);
    let output = OutputFolder::open(&folder.join("out"), false).expect("open the output folder");
    let (writer, earlier) = output.begin(Order::Input, &preparer.settings(), 0, false).expect("begin");
    let began_reading = Instant::now();
    let (new, finished, writer) = read_and_write(folder, preparer, writer, earlier);
    let began_ending = Instant::now();
    match end {
        "pause" => writer.pause(),
        _ => writer.finish(Unread::HasLeft),
    }
    .expect("end the run");
    let seconds = began.elapsed().as_secs_f64();
    println!(
        "{new} new, {finished} finished in {seconds:.2} s ({:.2} to begin, {:.2} to end; {:.2} of CPU), \
         {:.0} rows/s, {} MB at most",
        (began_reading - began).as_secs_f64(),
        began_ending.elapsed().as_secs_f64(),
        cpu_seconds(),
        (new + finished) as f64 / seconds,
        peak_bytes() / 1_000_000,
    );
}

fn audit(folder: &Path) {
    let began = Instant::now();
    let options = AuditOptions {
        folder: folder.join("out"),
        input: folder.join("input.jsonl"),
        order: Some(Order::Input),
        limit: None,
        most_findings: 1,
    };
    let audit = Audit::of(&options).expect("audit");
    assert!(audit.is_complete(), "{:?}", audit.findings);
    let seconds = began.elapsed().as_secs_f64();
    let rate = audit.rows as f64 / seconds;
    println!("{seconds:.1} s, {rate:.0} rows/s, {} MB at most", peak_bytes() / 1_000_000);
}

fn read_and_write(
    folder: &Path,
    preparer: Preparer,
    mut writer: Writer,
    earlier: EarlierRuns,
) -> (u64, u64, Writer) {
    let reader = Reader::open(&folder.join("input.jsonl"), preparer, None).expect("open the input");
    let (mut new, mut finished) = (0, 0);
    let mut in_flight = Vec::with_capacity(IN_FLIGHT);
    let write = |writer: &mut Writer, in_flight: &mut Vec<Line>| {
        // 101 has no divisor in common with 256: each is written once.
        let stirred = (0..in_flight.len()).map(|step| step * 101 % in_flight.len());
        stirred.for_each(|at| writer.write(&in_flight[at]).expect("write"));
        in_flight.clear();
    };
    for row in reader.after(earlier) {
        match row.expect("read") {
            Row::Request(row) => {
                new += 1;
                in_flight.push(line(&row));
            }
            Row::Finished(row) => {
                finished += 1;
                writer.keep(row).expect("keep");
            }
            Row::Rejected(row) => panic!("{row:?}"),
        }
        if in_flight.len() == IN_FLIGHT {
            write(&mut writer, &mut in_flight);
        }
    }
    in_flight.drain(..).for_each(|line| writer.write(&line).expect("write"));
    (new, finished, writer)
}

fn line(row: &jobs::PreparedRow) -> Line {
    let mut json = format!(r#"{{"row":{},"custom_id":"{}","text":""#, row.index, row.custom_id);
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

fn check_output(path: &Path, rows: u64) {
    let file = std::io::BufReader::new(std::fs::File::open(path).expect("open the output"));
    let mut count = 0;
    for line in file.split(b'\n') {
        let line = line.expect("read the output");
        if count % 1000 == 0 || count + 1 == rows {
            assert!(line.starts_with(format!("{{\"row\":{count},").as_bytes()), "line {count}");
        }
        count += 1;
    }
    assert_eq!(count, rows, "each row has a line");
}

fn write_input(folder: &Path, kind: &str, rows: u64) {
    let file = std::fs::File::create(folder.join("input.jsonl")).expect("create the input");
    let mut file = std::io::BufWriter::new(file);
    for row in 0..rows {
        match kind {
            "batch" => writeln!(
                file,
                r#"{{"custom_id":"row-{row}","method":"POST","url":"/v1/completions","body":{{"prompt":[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,{}],"max_tokens":8}}}}"#,
                row % 100
            ),
            // Every tenth row is one that was there before.
            _ => writeln!(file, r#"{{"subject":"a {} b","word":"c"}}"#, if row % 10 == 9 { row / 2 } else { row }),
        }
        .expect("write the input");
    }
    file.flush().expect("write the input");
}

/// A model without weights: batch lines bring token ids, plain rows meet a tokenizer of three words.
fn preparer(kind: &str, folder: &Path) -> Preparer {
    let is_plain = kind == "plain";
    if is_plain {
        let tokenizer = r#"{"version":"1.0","added_tokens":[],"pre_tokenizer":{"type":"WhitespaceSplit"},"model":{"type":"WordLevel","vocab":{"a":0,"b":1,"c":2,"?":3},"unk_token":"?"}}"#;
        let config = r#"{"chat_template":"{{ messages[0].content }}"}"#;
        std::fs::write(folder.join("tokenizer.json"), tokenizer).expect("write the tokenizer");
        std::fs::write(folder.join("tokenizer_config.json"), config).expect("write its configuration");
    }
    let options = ModelTextOptions { vocab_size: 128, eos_token_ids: vec![0], unix_seconds: 0 };
    let text = ModelText::open(folder, &options).expect("the model's text files");
    let user = "{{ subject }} {{ word }}".to_owned();
    let options = RowOptions {
        model_identity: "none".to_owned(),
        prompt: is_plain.then_some(PromptOptions { system: None, user }),
        grader: None,
        sampling: SamplingOptions::default(),
        seed: 0,
        max_context_tokens: 64,
    };
    Preparer::new(Arc::new(text), options).expect("settings that fit")
}

fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("the process's figures");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("its peak");
    1024 * peak.trim().trim_end_matches(" kB").parse::<u64>().expect("kilobytes")
}

/// What the process has used of all cores, as a shared machine's clock says little.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("the process's figures");
    let (_, fields) = stat.rsplit_once(')').expect("the program's name");
    // The 14th and the 15th field, the name being the 2nd; the kernel counts in hundredths.
    let ticks = fields.split_whitespace().skip(11).take(2).map(|ticks| ticks.parse::<f64>().expect("ticks"));
    ticks.sum::<f64>() / 100.0
}
