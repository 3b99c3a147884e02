//! Output folders that cannot be written to, or hold what is not ours.

use super::table::{Case, case, check};

const FOLDERS: &[Case] = &[
    case(
        "an output that is a file",
        |w| w.file("out", "mine"),
        "error: FOLDER/out: is no folder, and [job] output has to be one",
    ),
    case(
        "an output below a file",
        |w| w.set("job.output=rows.jsonl/out"),
        "error: cannot create the output folder FOLDER/rows.jsonl/out: Not a directory (os error 20)",
    ),
    case(
        "an output that links to itself",
        |w| w.link("out", "out"),
        "error: FOLDER/out: is no folder, and [job] output has to be one",
    ),
    case(
        "an output that links to nothing",
        |w| w.link("out", "elsewhere"),
        "error: FOLDER/out: is no folder, and [job] output has to be one",
    ),
    case(
        "an output where no folder can be made",
        |w| w.set("job.output=/proc/out"),
        "error: cannot create the output folder /proc/out: No such file or directory (os error 2)",
    ),
    case(
        "an output with a name too long",
        |w| {
            let name = "x".repeat(300);
            w.set(&format!("job.output={name}"))
        },
        "error: cannot create the output folder FOLDER/xxx…: File name too long (os error 36)",
    ),
    case(
        "an output whose name holds a NUL",
        |w| w.set("job.output=\"out\\u0000\""),
        "error: cannot create the output folder FOLDER/out\0: file name contained an unexpected NUL byte",
    ),
    case(
        "lines of nobody knows whom",
        |w| w.file("out/output.jsonl", "{}\n"),
        "error: FOLDER/out/output.jsonl exists, and no journal beside it says whose lines it holds; pass --fresh to start over, or name another folder in [job] output",
    ),
    case(
        "error lines of nobody knows whom",
        |w| w.file("out/errors.jsonl", "{}\n"),
        "error: FOLDER/out/errors.jsonl exists, and no journal beside it says whose lines it holds; pass --fresh to start over, or name another folder in [job] output",
    ),
    case(
        "lines that are a folder",
        |w| w.folder("out/output.jsonl"),
        "error: FOLDER/out/output.jsonl exists, and no journal beside it says whose lines it holds; pass --fresh to start over, or name another folder in [job] output",
    ),
    case(
        "lines that are a folder, and a fresh start",
        |w| {
            w.folder("out/output.jsonl");
            w.arg("--fresh")
        },
        "error: write FOLDER/out/output.jsonl: Is a directory (os error 21)",
    ),
    case(
        "error lines that are a folder after a run",
        |w| {
            w.done();
            w.folder("out/errors.jsonl")
        },
        "error: write FOLDER/out/errors.jsonl: Is a directory (os error 21)",
    ),
    case(
        "a lock that is a folder",
        |w| w.folder("out/job.lock"),
        "error: write FOLDER/out/job.lock: Is a directory (os error 21)",
    ),
    case(
        "a lock that links to itself",
        |w| {
            w.folder("out");
            w.link("out/job.lock", "job.lock")
        },
        "error: write FOLDER/out/job.lock: Too many levels of symbolic links (os error 40)",
    ),
    case(
        "a journal that is a folder",
        |w| w.folder("out/journal.sqlite"),
        "error: journal FOLDER/out/journal.sqlite: unable to open database file: FOLDER/out/journal.sqlite: Error code 14: unable to open database file",
    ),
    case(
        "a journal that links to nothing",
        |w| {
            w.folder("out");
            w.link("out/journal.sqlite", "nothing")
        },
        "",
    )
    .exits(0),
    case(
        "a journal that is a text",
        |w| w.file("out/journal.sqlite", "select * from rows;".repeat(300)),
        "error: the journal FOLDER/out/journal.sqlite is damaged; restore it, pass --fresh to start over, or name another folder in [job] output: file is not a database: Error code 26: file is not a database",
    ),
    case(
        "a journal of zeros",
        |w| w.file("out/journal.sqlite", [0; 8192]),
        "error: the journal FOLDER/out/journal.sqlite is damaged; restore it, pass --fresh to start over, or name another folder in [job] output: file is not a database: Error code 26: file is not a database",
    ),
    case(
        "a journal of another version",
        |w| {
            w.done();
            w.bytes("out/journal.sqlite", |b| b[60..64].copy_from_slice(&99u32.to_be_bytes()))
        },
        "error: FOLDER/out/journal.sqlite: a journal of version 99, this program writes version 3; go on with the program that wrote it, or pass --fresh to start over",
    ),
    case(
        "a journal of which the second half is gone",
        |w| {
            w.done();
            w.bytes("out/journal.sqlite", |b| b.truncate(b.len() / 2))
        },
        "error: the journal FOLDER/out/journal.sqlite is damaged; restore it, pass --fresh to start over, or name another folder in [job] output: database disk image is malformed: Error code 11: database disk image is malformed",
    ),
    case(
        "a journal with a page of noise",
        |w| {
            w.done();
            w.bytes("out/journal.sqlite", |b| b[4096..8192].fill(0xa5))
        },
        "error: the journal FOLDER/out/journal.sqlite is damaged; restore it, pass --fresh to start over, or name another folder in [job] output: database disk image is malformed: Error code 11: database disk image is malformed",
    ),
    case(
        "a journal whose header says something else",
        |w| {
            w.done();
            w.bytes("out/journal.sqlite", |b| b[..16].fill(b'x'))
        },
        "error: the journal FOLDER/out/journal.sqlite is damaged; restore it, pass --fresh to start over, or name another folder in [job] output: file is not a database: Error code 26: file is not a database",
    ),
    case(
        "an empty journal beside lines",
        |w| {
            w.done();
            w.file("out/journal.sqlite", "")
        },
        "error: FOLDER/out/output.jsonl exists, and no journal beside it says whose lines it holds; pass --fresh to start over, or name another folder in [job] output",
    ),
    case(
        "a journal and no lines",
        |w| {
            w.done();
            w.remove("out/output.jsonl")
        },
        "error: FOLDER/out/output.jsonl has 0 bytes, and the journal vouches for …; restore it, or pass --fresh to start over",
    ),
    case(
        "lines cut short",
        |w| {
            w.done();
            w.bytes("out/output.jsonl", |b| b.truncate(10))
        },
        "error: FOLDER/out/output.jsonl has 10 bytes, and the journal vouches for …; restore it, or pass --fresh to start over",
    ),
    case(
        "a job with another seed",
        |w| {
            w.done();
            w.set("job.seed=5")
        },
        "error: FOLDER/out holds lines that were made otherwise:\n  job.seed: was 0, is 5\nset this back, pass --fresh to start over, or name another folder in [job] output",
    ),
    case(
        "a job with another prompt",
        |w| {
            w.done();
            w.set("prompt.user=\"{{ text }}\"")
        },
        "error: FOLDER/out holds lines that were made otherwise:\n  prompt.user: was not set, is \"{{ text }}\"\nset this back, pass --fresh to start over, or name another folder in [job] output",
    ),
    case(
        "a job with other number types",
        |w| {
            w.done();
            w.set("model.dtype=f32")
        },
        "error: FOLDER/out holds lines that were made otherwise:\n  model.dtype: was \"bf16\", is \"f32\"\n  pipeline.kv_cache_dtype: was \"bf16\", is \"f32\"\nset this back, pass --fresh to start over, or name another folder in [job] output",
    ),
    case(
        "a job with another SIMD level",
        |w| {
            w.done();
            w.set("pipeline.simd=reference")
        },
        "error: FOLDER/out holds lines that were computed otherwise:\n  backend: was \"cpu\", is \"reference\"\n  pipeline.simd: was …, is \"none\"\nan answer may differ in a few tokens from the one it would have had; pass --accept-numerics to go on all the same, set this back, or pass --fresh to start over",
    ),
    case(
        "a job with another model",
        |w| {
            w.done();
            w.json("model/generation_config.json", |g| g["unknown"] = 1.into())
        },
        "error: FOLDER/out holds lines that were made otherwise:\n  model: was …, is …\nset this back, pass --fresh to start over, or name another folder in [job] output",
    ),
];

#[test]
fn an_output_folder_that_cannot_be_is_refused_and_left_alone() {
    check(FOLDERS);
}
