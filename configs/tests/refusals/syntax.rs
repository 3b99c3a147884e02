//! Names that nobody knows, and text that is no TOML.

use crate::case::case;

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
speculation = "auto""#)
        .says(r#"
unknown key `speculation` in [pipeline]
 --> job.toml:7:1
  |
7 | speculation = "auto"
  | ^^^^^^^^^^^
hint: the keys of [pipeline] are devices, replicas, threads, simd, stages, tensor_parallel, split_blocks, stages_run_in, ranks, column_cuts, virtual_stages, profile, micro_batch_tokens, max_sequences, kv_cache_tokens, kv_cache_dtype, deterministic, cuda_graphs, token_feedback, step_timeout_seconds"#);
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
hint: the sections are [model], [pipeline], [job], [prompt], [sampling], [grade], [plan]",
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
hint: put it under one of [model], [pipeline], [job], [prompt], [sampling], [grade], [plan]",
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
hint: `devices` is a key of [pipeline] or [plan]",
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
