//! Job files and overrides that are refused, each with the whole of its message.

use std::path::{Path, PathBuf};

/// Lines 1 to 5 of most cases: a file that loads.
const GOOD: &str = r#"[model]
path = "m"
[job]
input = "in.jsonl"
output = "out"
"#;

struct Case {
    what: &'static str,
    file: String,
    sets: Vec<String>,
    env: Vec<(String, String)>,
}

fn case(what: &'static str) -> Case {
    Case { what, file: GOOD.to_owned(), sets: Vec::new(), env: Vec::new() }
}

impl Case {
    /// The whole file. The line break after the opening quote is not part of it.
    fn file(mut self, text: &str) -> Self {
        self.file = text.trim_start_matches('\n').to_owned();
        self
    }

    /// The file after its first five lines.
    fn more(mut self, text: &str) -> Self {
        self.file.push_str(text.trim_start_matches('\n'));
        self
    }

    fn set(mut self, set: &str) -> Self {
        self.sets.push(set.to_owned());
        self
    }

    fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    #[track_caller]
    fn says(self, message: &str) {
        let folder = folder(self.what);
        std::fs::write(folder.join("job.toml"), &self.file).unwrap();
        let loaded = configs::load(Path::new("job.toml"), &self.sets, self.env.into_iter(), &folder);
        let error = loaded.expect_err(self.what).to_string();
        assert_eq!(error, message.trim_start_matches('\n'), "{}", self.what);
    }
}

/// A folder of its own for each case, as tests run side by side.
fn folder(what: &str) -> PathBuf {
    let name: String = what.chars().map(|c| if c.is_alphanumeric() { c } else { '_' }).collect();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("refusals").join(name);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

#[test]
fn names_that_are_not_known_are_refused() {
    case("a misspelt key")
        .more(
            r#"
[pipeline]
devices = ["cpu:0"]
micro_batch_token = 256"#,
        )
        .says(
            r"
unknown key `micro_batch_token` in [pipeline]
 --> job.toml:8:1
  |
8 | micro_batch_token = 256
  | ^^^^^^^^^^^^^^^^^
hint: did you mean `micro_batch_tokens`?",
        );
    case("a key far from all")
        .more(r#"
[pipeline]
tensor_parallel = "auto""#)
        .says(r#"
unknown key `tensor_parallel` in [pipeline]
 --> job.toml:7:1
  |
7 | tensor_parallel = "auto"
  | ^^^^^^^^^^^^^^^
hint: the keys of [pipeline] are devices, threads, simd, stages, micro_batch_tokens, max_sequences, kv_cache_tokens, kv_cache_dtype"#);
    case("a key of another section")
        .file(
            r#"
[model]
path = "m"
threads = 2
[job]
input = "in.jsonl"
output = "out""#,
        )
        .says(
            r"
unknown key `threads` in [model]
 --> job.toml:3:1
  |
3 | threads = 2
  | ^^^^^^^
hint: `threads` belongs in [pipeline]",
        );
    case("the first of two unknown keys")
        .more(
            r"
[sampling]
top-p = 0.5
best_of = 2",
        )
        .says(
            r"
unknown key `top-p` in [sampling]
 --> job.toml:7:1
  |
7 | top-p = 0.5
  | ^^^^^
hint: did you mean `top_p`?",
        );
    case("a misspelt section")
        .file(
            r#"
[model]
path = "m"
[jobs]
input = "in.jsonl"
output = "out""#,
        )
        .says(
            r"
unknown section `jobs`
 --> job.toml:3:2
  |
3 | [jobs]
  |  ^^^^
hint: did you mean [job]?",
        );
    case("an unknown section")
        .file(
            r#"
[hardware]
gpus = 8
[model]
path = "m"
[job]
input = "in.jsonl"
output = "out""#,
        )
        .says(
            r"
unknown section `hardware`
 --> job.toml:1:2
  |
1 | [hardware]
  |  ^^^^^^^^
hint: the sections are [model], [pipeline], [job], [prompt], [sampling]",
        );
    case("a misspelt key outside of a section")
        .file(
            r#"
thread = 2
[model]
path = "m"
[job]
input = "in.jsonl"
output = "out""#,
        )
        .says(
            r"
key `thread` stands outside of any section
 --> job.toml:1:1
  |
1 | thread = 2
  | ^^^^^^
hint: put it under one of [model], [pipeline], [job], [prompt], [sampling]",
        );
    case("a section that is a key")
        .more(
            r"
[devices]
cpu = 2",
        )
        .says(
            r"
unknown section `devices`
 --> job.toml:6:2
  |
6 | [devices]
  |  ^^^^^^^
hint: `devices` is a key of [pipeline]",
        );
    case("a key outside of its section")
        .file(
            r#"
seed = 1
[model]
path = "m"
[job]
input = "in.jsonl"
output = "out""#,
        )
        .says(
            r"
key `seed` stands outside of any section
 --> job.toml:1:1
  |
1 | seed = 1
  | ^^^^
hint: put it under [job] or [sampling]",
        );
    case("a section that is a value")
        .file(
            r#"
pipeline = "cpu:0"
[model]
path = "m"
[job]
input = "in.jsonl"
output = "out""#,
        )
        .says(
            r#"
pipeline: expected a section of keys, found a value
 --> job.toml:1:12
  |
1 | pipeline = "cpu:0"
  |            ^^^^^^^
hint: begin it with [pipeline]"#,
        );
    case("a section that is a list")
        .more(
            r#"
[[prompt]]
user = "Hi""#,
        )
        .says(
            r"
prompt: expected a section of keys, found a list
 --> job.toml:6:1
  |
6 | [[prompt]]
  | ^^^^^^^^^^
hint: begin it with [prompt]",
        );
    case("a section below a section")
        .more(
            r"
[pipeline.stage]
blocks = 3",
        )
        .says(
            r"
unknown key `stage` in [pipeline]
 --> job.toml:6:11
  |
6 | [pipeline.stage]
  |           ^^^^^
hint: did you mean `stages`?",
        );
}

#[test]
fn what_is_no_toml_is_refused() {
    case("no end of a text")
        .file(
            r#"
[model]
path = "m
[job]
input = "in.jsonl"
output = "out""#,
        )
        .says(
            r#"
invalid basic string, expected `"`
 --> job.toml:2:10
  |
2 | path = "m
  |          ^"#,
        );
    case("no value")
        .file(
            r#"
[model]
path =
[job]
input = "in.jsonl"
output = "out""#,
        )
        .says(
            r"
string values must be quoted, expected literal string
 --> job.toml:2:7
  |
2 | path =
  |       ^",
        );
    case("a section twice")
        .more(
            r"
[job]
seed = 1",
        )
        .says(
            r"
duplicate key
 --> job.toml:6:2
  |
6 | [job]
  |  ^^^",
        );
    case("a key twice")
        .file(
            r#"
[model]
path = "m"
path = "n"
[job]
input = "in.jsonl"
output = "out""#,
        )
        .says(
            r#"
duplicate key
 --> job.toml:3:1
  |
3 | path = "n"
  | ^^^^"#,
        );
}

#[test]
fn types_and_ranges_are_checked_and_nothing_is_coerced() {
    case("a real number for an integer")
        .more(
            r"
[pipeline]
threads = 4.7",
        )
        .says(
            r"
pipeline.threads: expected an integer of at least 1, found 4.7
 --> job.toml:7:11
  |
7 | threads = 4.7
  |           ^^^",
        );
    case("a text for an integer")
        .more(
            r#"
[pipeline]
threads = "5""#,
        )
        .says(
            r#"
pipeline.threads: expected an integer of at least 1, found "5"
 --> job.toml:7:11
  |
7 | threads = "5"
  |           ^^^"#,
        );
    case("zero threads")
        .more(
            r"
[pipeline]
threads = 0",
        )
        .says(
            r"
pipeline.threads: expected an integer of at least 1, found 0
 --> job.toml:7:11
  |
7 | threads = 0
  |           ^",
        );
    case("a negative count")
        .more(
            r"
[pipeline]
max_sequences = -1",
        )
        .says(
            r"
pipeline.max_sequences: expected an integer of at least 1, found -1
 --> job.toml:7:17
  |
7 | max_sequences = -1
  |                 ^^",
        );
    case("an integer past 64 bits")
        .more(
            r"
seed = 18446744073709551616",
        )
        .says(
            r"
job.seed: expected an integer from 0 to 2^63 - 1, found 18446744073709551616
 --> job.toml:6:8
  |
6 | seed = 18446744073709551616
  |        ^^^^^^^^^^^^^^^^^^^^",
        );
    case("a negative seed")
        .more(
            r"
seed = -1",
        )
        .says(
            r"
job.seed: expected an integer from 0 to 2^63 - 1, found -1
 --> job.toml:6:8
  |
6 | seed = -1
  |        ^^",
        );
    case("an unknown word")
        .file(
            r#"
[model]
path = "m"
dtype = "fp16"
[job]
input = "in.jsonl"
output = "out""#,
        )
        .says(
            r#"
model.dtype: expected "bf16" or "f32", found "fp16"
 --> job.toml:3:9
  |
3 | dtype = "fp16"
  |         ^^^^^^"#,
        );
    case("a word in another case")
        .more(
            r#"
[pipeline]
simd = "AVX2""#,
        )
        .says(
            r#"
pipeline.simd: expected "auto", "avx512", "avx2", "portable" or "reference", found "AVX2"
 --> job.toml:7:8
  |
7 | simd = "AVX2"
  |        ^^^^^^"#,
        );
    case("an order that is none")
        .more(
            r#"
order = "random""#,
        )
        .says(
            r#"
job.order: expected "input" or "completion", found "random"
 --> job.toml:6:9
  |
6 | order = "random"
  |         ^^^^^^^^"#,
        );
    case("a number for a word")
        .more(
            r"
[pipeline]
kv_cache_dtype = 16",
        )
        .says(
            r#"
pipeline.kv_cache_dtype: expected "auto", "f32" or "bf16", found 16
 --> job.toml:7:18
  |
7 | kv_cache_dtype = 16
  |                  ^^"#,
        );
    case("neither auto nor tokens")
        .more(
            r#"
[pipeline]
kv_cache_tokens = "8k""#,
        )
        .says(
            r#"
pipeline.kv_cache_tokens: expected "auto" or an integer of at least 1, found "8k"
 --> job.toml:7:19
  |
7 | kv_cache_tokens = "8k"
  |                   ^^^^"#,
        );
    case("a text for a flag")
        .file(
            r#"
[model]
path = "m"
random_weights = "yes"
[job]
input = "in.jsonl"
output = "out""#,
        )
        .says(
            r#"
model.random_weights: expected true or false, found "yes"
 --> job.toml:3:18
  |
3 | random_weights = "yes"
  |                  ^^^^^"#,
        );
    case("a number for a path")
        .file(
            r#"
[model]
path = 253
[job]
input = "in.jsonl"
output = "out""#,
        )
        .says(
            r"
model.path: expected a path, found 253
 --> job.toml:2:8
  |
2 | path = 253
  |        ^^^",
        );
    case("an empty path")
        .file(
            r#"
[model]
path = "m"
[job]
input = ""
output = "out""#,
        )
        .says(
            r#"
job.input: expected a path, found ""
 --> job.toml:4:9
  |
4 | input = ""
  |         ^^"#,
        );
    case("a date for a path")
        .file(
            r#"
[model]
path = "m"
[job]
input = "in.jsonl"
output = 2026-01-31"#,
        )
        .says(
            r"
job.output: expected a path, found a date
 --> job.toml:5:10
  |
5 | output = 2026-01-31
  |          ^^^^^^^^^^",
        );
}

#[test]
fn devices_and_stages_are_checked() {
    case("a kind of device that there is not")
        .more(
            r#"
[pipeline]
devices = ["cpu:0", "cuda:0"]"#,
        )
        .says(
            r#"
pipeline.devices[1]: unknown device kind `cuda` in "cuda:0", there is: cpu
 --> job.toml:7:21
  |
7 | devices = ["cpu:0", "cuda:0"]
  |                     ^^^^^^^^"#,
        );
    case("a device without index")
        .more(
            r#"
[pipeline]
devices = [
  "cpu:0",
  "cpu",
]"#,
        )
        .says(
            r#"
pipeline.devices[1]: expected a device such as "cpu:0", found "cpu"
 --> job.toml:9:3
  |
9 |   "cpu",
  |   ^^^^^"#,
        );
    case("a device with a crooked index")
        .more(
            r#"
[pipeline]
devices = ["cpu:01"]"#,
        )
        .says(
            r#"
pipeline.devices[0]: expected a device such as "cpu:0", found "cpu:01"
 --> job.toml:7:12
  |
7 | devices = ["cpu:01"]
  |            ^^^^^^^^"#,
        );
    case("a device that is no text")
        .more(
            r"
[pipeline]
devices = [0, 1]",
        )
        .says(
            r#"
pipeline.devices[0]: expected a device such as "cpu:0", found 0
 --> job.toml:7:12
  |
7 | devices = [0, 1]
  |            ^"#,
        );
    case("devices that are no list")
        .more(
            r#"
[pipeline]
devices = "cpu:0""#,
        )
        .says(
            r#"
pipeline.devices: expected a list of devices such as ["cpu:0", "cpu:1"], found "cpu:0"
 --> job.toml:7:11
  |
7 | devices = "cpu:0"
  |           ^^^^^^^"#,
        );
    case("no devices")
        .more(
            r"
[pipeline]
devices = []",
        )
        .says(
            r#"
pipeline.devices: expected a list of devices such as ["cpu:0", "cpu:1"], found an empty list
 --> job.toml:7:11
  |
7 | devices = []
  |           ^^"#,
        );
    case("stages with a gap")
        .more(
            r#"
[pipeline]
devices = ["cpu:0", "cpu:1"]
stages = [[0, 14], [15, 30]]"#,
        )
        .says(
            r"
pipeline.stages: stage 1 starts at block 15, expected block 14: stages take all blocks in order
 --> job.toml:8:10
  |
8 | stages = [[0, 14], [15, 30]]
  |          ^^^^^^^^^^^^^^^^^^^",
        );
    case("stages that do not begin at 0")
        .more(
            r"
[pipeline]
stages = [[1, 30]]",
        )
        .says(
            r"
pipeline.stages: stage 0 starts at block 1, expected block 0: stages take all blocks in order
 --> job.toml:7:10
  |
7 | stages = [[1, 30]]
  |          ^^^^^^^^^",
        );
    case("an empty stage")
        .more(
            r#"
[pipeline]
devices = ["cpu:0", "cpu:1"]
stages = [[0, 14], [14, 14]]"#,
        )
        .says(
            r"
pipeline.stages[1]: block range [14, 14] is empty: the end is the first block not taken, so at least 15
 --> job.toml:8:20
  |
8 | stages = [[0, 14], [14, 14]]
  |                    ^^^^^^^^",
        );
    case("a stage with one bound")
        .more(
            r"
[pipeline]
stages = [[0]]",
        )
        .says(
            r"
pipeline.stages[0]: expected a block range such as [0, 14], found a list of 1
 --> job.toml:7:11
  |
7 | stages = [[0]]
  |           ^^^",
        );
    case("stages without ranges")
        .more(
            r"
[pipeline]
stages = [0, 14, 30]",
        )
        .says(
            r"
pipeline.stages[0]: expected a block range such as [0, 14], found 0
 --> job.toml:7:11
  |
7 | stages = [0, 14, 30]
  |           ^",
        );
    case("no stages")
        .more(
            r"
[pipeline]
stages = []",
        )
        .says(
            r#"
pipeline.stages: expected "auto" or block ranges such as [[0, 14], [14, 30]], found an empty list
 --> job.toml:7:10
  |
7 | stages = []
  |          ^^"#,
        );
    case("stages by a word")
        .more(
            r#"
[pipeline]
stages = "even""#,
        )
        .says(
            r#"
pipeline.stages: expected "auto" or block ranges such as [[0, 14], [14, 30]], found "even"
 --> job.toml:7:10
  |
7 | stages = "even"
  |          ^^^^^^"#,
        );
    case("more stages than devices")
        .more(
            r"
[pipeline]
stages = [[0, 14], [14, 30]]",
        )
        .says(
            r#"
2 block ranges in pipeline.stages for 1 device in pipeline.devices, expected one range per device
 --> job.toml:7:10
  |
7 | stages = [[0, 14], [14, 30]]
  |          ^^^^^^^^^^^^^^^^^^^
hint: stages = "auto" fits any devices"#,
        );
}

#[test]
fn sampling_ranges_are_checked() {
    case("too hot")
        .more(
            r"
[sampling]
temperature = 2.5",
        )
        .says(
            r"
sampling.temperature: expected a number from 0 to 2, found 2.5
 --> job.toml:7:15
  |
7 | temperature = 2.5
  |               ^^^",
        );
    case("not a number")
        .more(
            r"
[sampling]
temperature = nan",
        )
        .says(
            r"
sampling.temperature: expected a number from 0 to 2, found nan
 --> job.toml:7:15
  |
7 | temperature = nan
  |               ^^^",
        );
    case("a top_p of nothing")
        .more(
            r"
[sampling]
top_p = 0",
        )
        .says(
            r"
sampling.top_p: expected a number above 0 and up to 1, found 0
 --> job.toml:7:9
  |
7 | top_p = 0
  |         ^",
        );
    case("a min_p above 1")
        .more(
            r"
[sampling]
min_p = 1.5",
        )
        .says(
            r"
sampling.min_p: expected a number from 0 to 1, found 1.5
 --> job.toml:7:9
  |
7 | min_p = 1.5
  |         ^^^",
        );
    case("a negative top_k")
        .more(
            r"
[sampling]
top_k = -1",
        )
        .says(
            r"
sampling.top_k: expected an integer of at least 0 (0 keeps all tokens), found -1
 --> job.toml:7:9
  |
7 | top_k = -1
  |         ^^",
        );
    case("an empty stop")
        .more(
            r#"
[sampling]
stop = ["END", ""]"#,
        )
        .says(
            r#"
sampling.stop[1]: expected a text that is not empty, found ""
 --> job.toml:7:16
  |
7 | stop = ["END", ""]
  |                ^^"#,
        );
    case("a stop that is a table")
        .more(
            r#"
[sampling]
stop = { text = "END" }"#,
        )
        .says(
            r#"
sampling.stop: expected a text that is not empty, or a list of such, found a table
 --> job.toml:7:8
  |
7 | stop = { text = "END" }
  |        ^^^^^^^^^^^^^^^^"#,
        );
    case("a stop token that is a text")
        .more(
            r#"
[sampling]
stop_token_ids = [2, "</s>"]"#,
        )
        .says(
            r#"
sampling.stop_token_ids[1]: expected an integer from 0 to 2^32 - 1, found "</s>"
 --> job.toml:7:22
  |
7 | stop_token_ids = [2, "</s>"]
  |                      ^^^^^^"#,
        );
    case("one stop token without its list")
        .more(
            r"
[sampling]
stop_token_ids = 2",
        )
        .says(
            r"
sampling.stop_token_ids: expected a list of token ids such as [2, 7], found 2
 --> job.toml:7:18
  |
7 | stop_token_ids = 2
  |                  ^",
        );
    case("min_tokens above max_tokens")
        .more(
            r"
[sampling]
min_tokens = 65
max_tokens = 64",
        )
        .says(
            r"
sampling.min_tokens is 65, more than the 64 of sampling.max_tokens
 --> job.toml:7:14
  |
7 | min_tokens = 65
  |              ^^",
        );
}

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
hint: the keys are devices, threads, simd, stages, micro_batch_tokens, max_sequences, kv_cache_tokens, kv_cache_dtype");
    case("a --set of an unknown key").set(r#"model.color="blue""#).says(
        r#"
in --set model.color="blue": unknown key `model.color`
hint: keys are named section.key, the sections are model, pipeline, job, prompt, sampling"#,
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
        .says(r#"in --set pipeline.devices=["cpu:0", "gpu:1"]: pipeline.devices[1]: unknown device kind `gpu` in "gpu:1", there is: cpu"#);
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
        r#"in SPANWISE__PIPELINE__MAX_SEQUENCES=many: expected an integer of at least 1, found "many""#,
    );
    case("a misspelt variable").env("SPANWISE__PIPELINE__THREAD", "4").says(
        r"
in SPANWISE__PIPELINE__THREAD=4: no such key
hint: did you mean `SPANWISE__PIPELINE__THREADS`?",
    );
    case("a variable of our prefix and nothing else").env("SPANWISE__VERBOSE", "1").says(
        r"
in SPANWISE__VERBOSE=1: no such key
hint: keys are named SPANWISE__SECTION__KEY, the sections are model, pipeline, job, prompt, sampling",
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
