//! What only the whole shows: keys that are missing, overrides, files that cannot be read.

use std::path::Path;

use crate::case::{GOOD, case, folder};

#[test]
fn keys_without_default_must_be_given() {
    case("no model path")
        .file(
            r#"
[model]
dtype = "f32"
[job]
input = "in.jsonl"
output = "out""#,
        )
        .says(
            r#"
missing key `path` in [model]
 --> job.toml:1:2
  |
1 | [model]
  |  ^^^^^
hint: add a line such as path = "../models/smollm2-135m" under [model]"#,
        );
    case("no [job]")
        .file(
            r#"
[model]
path = "m""#,
        )
        .says(
            r#"
missing key `input` in [job]
 --> job.toml
hint: add a line such as input = "questions.jsonl" under [job]"#,
        );
    case("an empty file").file("").says(
        r#"
missing key `path` in [model]
 --> job.toml
hint: add a line such as path = "../models/smollm2-135m" under [model]"#,
    );
    case("a prompt without user")
        .more(
            r#"
[prompt]
system = "Be brief.""#,
        )
        .says(
            r#"
missing key `user` in [prompt]
 --> job.toml:6:2
  |
6 | [prompt]
  |  ^^^^^^
hint: add a line such as user = "Summarise: {{ text }}" under [prompt]"#,
        );
    case("an empty user prompt")
        .more(
            r#"
[prompt]
user = """#,
        )
        .says(
            r#"
prompt.user: expected a text that is not empty, found ""
 --> job.toml:7:8
  |
7 | user = ""
  |        ^^"#,
        );
    case("a --set of a prompt's system alone").set(r"prompt.system=Be brief.").says(
        r#"
missing key `user` in [prompt]
 --> job.toml
hint: add a line such as user = "Summarise: {{ text }}" under [prompt]"#,
    );
}

#[test]
fn overrides_are_checked_and_named() {
    case("a wrong value that an override hides")
        .more(
            r"
[pipeline]
threads = 4.7",
        )
        .set("pipeline.threads=4")
        .says(
            r"
pipeline.threads: expected an integer of at least 1, found 4.7
 --> job.toml:7:11
  |
7 | threads = 4.7
  |           ^^^",
        );
    case("a --set out of range")
        .set("pipeline.threads=4.7")
        .says(r"in --set pipeline.threads=4.7: expected an integer of at least 1, found 4.7");
    case("a --set without value")
        .set("pipeline.threads")
        .says(r"in --set pipeline.threads: expected section.key=value");
    case("a --set of a misspelt key").set(r"pipeline.thread=4").says(
        r"
in --set pipeline.thread=4: unknown key `pipeline.thread`
hint: did you mean `pipeline.threads`?",
    );
    case("a --set without section").set(r"seed=4").says(
        r"
in --set seed=4: unknown key `seed`
hint: did you mean `job.seed` or `sampling.seed`?",
    );
    case("a --set of a section")
        .set("pipeline={ threads = 4 }")
        .says(r"
in --set pipeline={ threads = 4 }: [pipeline] can't be set as a whole, only its keys one by one
hint: the keys are devices, replicas, threads, simd, stages, tensor_parallel, split_blocks, stages_run_in, ranks, column_cuts, virtual_stages, profile, micro_batch_tokens, max_sequences, kv_cache_tokens, kv_cache_dtype, deterministic, cuda_graphs, token_feedback, step_timeout_seconds");
    case("a --set of an unknown key").set(r#"model.color="blue""#).says(
        r#"
in --set model.color="blue": unknown key `model.color`
hint: keys are named section.key, the sections are model, pipeline, job, prompt, sampling, grade, plan"#,
    );
    case("a --set of one element").set(r"pipeline.devices.0=cpu:1").says(
        r"
in --set pipeline.devices.0=cpu:1: unknown key `pipeline.devices.0`
hint: did you mean `pipeline.devices`?",
    );
    case("a --set list without quotes")
        .set("pipeline.devices=[cpu:0, cpu:1]")
        .says(r#"
in --set pipeline.devices=[cpu:0, cpu:1]: expected a list of devices such as ["cpu:0", "cpu:1"], found "[cpu:0, cpu:1]"
hint: this is no TOML value and was taken as text; a list of texts is written '["a", "b"]', with the outer quotes for the shell"#);
    case("a --set list with a wrong element")
        .set(r#"pipeline.devices=["cpu:0", "gpu:1"]"#)
        .says(r#"in --set pipeline.devices=["cpu:0", "gpu:1"]: pipeline.devices[1]: unknown device kind `gpu` in "gpu:1", there are: cpu, cuda"#);
    case("a --set number for a path").set(r"job.input=2026").says(
        r#"
in --set job.input=2026: expected a path, found 2026
hint: to give it as text, write --set 'job.input="2026"'"#,
    );
    case("a --set that does not fit the file")
        .more(r#"
[pipeline]
devices = ["cpu:0", "cpu:1"]
stages = [[0, 14], [14, 30]]"#)
        .set(r#"pipeline.devices=["cpu:0"]"#)
        .says(r#"
in --set pipeline.devices=["cpu:0"]: 2 block ranges in pipeline.stages for 1 device in pipeline.devices, expected one range per device
hint: stages = "auto" fits any devices"#);
    case("a --set that does not fit the environment")
        .set("sampling.max_tokens=8")
        .env("SPANWISE__SAMPLING__MIN_TOKENS", "16")
        .says(r"in --set sampling.max_tokens=8: sampling.min_tokens is 16, more than the 8 of sampling.max_tokens");
    case("a variable out of range").env("SPANWISE__PIPELINE__MAX_SEQUENCES", "many").says(
        r#"in SPANWISE__PIPELINE__MAX_SEQUENCES=many: expected "auto" or an integer of at least 1, found "many""#,
    );
    case("a misspelt variable").env("SPANWISE__PIPELINE__THREAD", "4").says(
        r"
in SPANWISE__PIPELINE__THREAD=4: no such key
hint: did you mean `SPANWISE__PIPELINE__THREADS`?",
    );
    case("a variable of our prefix and nothing else").env("SPANWISE__VERBOSE", "1").says(
        r"
in SPANWISE__VERBOSE=1: no such key
hint: keys are named SPANWISE__SECTION__KEY, the sections are model, pipeline, job, prompt, sampling, grade, plan",
    );
    case("a variable in small letters").env("SPANWISE__pipeline__threads", "4").says(
        r"
in SPANWISE__pipeline__threads=4: no such key
hint: did you mean `SPANWISE__PIPELINE__THREADS`?",
    );
    case("a variable that is empty")
        .env("SPANWISE__JOB__OUTPUT", "")
        .says(r#"in SPANWISE__JOB__OUTPUT=: expected a path, found """#);
    case("a number for a path in the environment").env("SPANWISE__MODEL__PATH", "49").says(
        r#"
in SPANWISE__MODEL__PATH=49: expected a path, found 49
hint: to give it as text, write SPANWISE__MODEL__PATH='"49"'"#,
    );
}

#[test]
fn a_file_that_can_not_be_read_is_refused() {
    let folder = folder("unreadable");
    let load = |name: &str| {
        let error = configs::load(Path::new(name), &[], std::iter::empty(), &folder).expect_err(name);
        error.to_string()
    };
    assert_eq!(load("none.toml"), "job file none.toml can't be read: No such file or directory (os error 2)");
    std::fs::write(folder.join("latin1.toml"), b"[model]\npath = \"caf\xe9\"\n").unwrap();
    assert_eq!(load("latin1.toml"), "job file latin1.toml is not UTF-8: bad byte in line 2");
}

/// Every file that begins like a good one, and every good one with one character changed, is either
/// loaded or refused.
#[test]
fn no_cut_and_no_changed_character_panics() {
    let folder = folder("mutations");
    let good =
        format!("{GOOD}[pipeline]\nthreads = 2\nstages = [[0, 14]]\n[sampling]\nstop = [\"E\", 'ä']\n");
    let load = |text: &str| {
        std::fs::write(folder.join("job.toml"), text).unwrap();
        let loaded = configs::load(Path::new("job.toml"), &[], std::iter::empty(), &folder);
        loaded.map_err(|error| assert!(!error.to_string().is_empty())).is_ok()
    };
    assert!(load(&good));
    assert!(load(&format!("\u{feff}{good}")), "an editor's byte order mark is no part of the file");
    assert!(load(&good.replace('\n', "\r\n")));
    for (start, c) in good.char_indices() {
        load(&good[..start]);
        for other in ['"', '[', ']', '=', '\n', '.', '#', '9', '\u{feff}', '\r'] {
            load(&format!("{}{other}{}", &good[..start], &good[start + c.len_utf8()..]));
        }
    }
}
