//! Types and ranges of single keys; nothing is coerced.

use crate::case::case;

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
            r#"
pipeline.max_sequences: expected "auto" or an integer of at least 1, found -1
 --> job.toml:7:17
  |
7 | max_sequences = -1
  |                 ^^"#,
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
model.dtype: expected "bf16", "f32", "fp8", "int8", "int8-weight" or "int4-weight", found "fp16"
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
pipeline.simd: expected "auto", "amx", "avx512", "avx2", "portable" or "reference", found "AVX2"
 --> job.toml:7:8
  |
7 | simd = "AVX2"
  |        ^^^^^^"#,
        );
    case("blocks that are split in no way")
        .more(
            r#"
[pipeline]
split_blocks = "off""#,
        )
        .says(
            r#"
pipeline.split_blocks: expected "auto" or "all", found "off"
 --> job.toml:7:16
  |
7 | split_blocks = "off"
  |                ^^^^^"#,
        );
    case("devices that are gone through once or twice")
        .more(
            r#"
[pipeline]
virtual_stages = 2"#,
        )
        .says(
            r#"
pipeline.virtual_stages: expected "auto" or "off", found 2
 --> job.toml:7:18
  |
7 | virtual_stages = 2
  |                  ^"#,
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
pipeline.kv_cache_dtype: expected "auto", "f32", "bf16" or "fp8", found 16
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
    case("no tokens")
        .more(
            r"
[pipeline]
micro_batch_tokens = 0",
        )
        .says(
            r#"
pipeline.micro_batch_tokens: expected "auto" or an integer of at least 1, found 0
 --> job.toml:7:22
  |
7 | micro_batch_tokens = 0
  |                      ^"#,
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
fn layouts_that_no_plan_could_have_are_refused() {
    let says = |what, line: &str, message: &str| {
        let end = line.len() - "tensor_parallel = ".len();
        case(what).more(&format!("[pipeline]\n{line}\n")).says(&format!(
            "pipeline.tensor_parallel: expected \"auto\", \"off\" or a width of 1, 2, 3, 4 or 8 for each stage such as \
             [1, 1, 2], found {message}\n --> job.toml:7:19\n  |\n7 | {line}\n  |                   {}",
            "^".repeat(end)
        ));
    };
    says("a width of 5", "tensor_parallel = [1, 5]", "a width of 5");
    says("no width", "tensor_parallel = []", "an empty list");
    says("a word that is no width", "tensor_parallel = \"on\"", "\"on\"");
}

#[test]
fn a_plan_needs_lengths_and_devices_that_can_be_read() {
    case("a plan for prompts of nothing").more("[plan]\nprompt_tokens = 0\n").says(
        r#"
plan.prompt_tokens: expected an integer of at least 1, found 0
 --> job.toml:7:17
  |
7 | prompt_tokens = 0
  |                 ^"#,
    );
    case("devices that are none").more("[plan]\ndevices = \"8 h200\"\n").says(
        r#"
plan.devices: expected devices such as "8xh200" or "4xh100-80gb,2xh200", found "8 h200"
 --> job.toml:7:11
  |
7 | devices = "8 h200"
  |           ^^^^^^^^"#,
    );
}
