//! Job files and command lines that cannot be, as the whole program takes them. `configs/tests/refusals/`
//! asks of every key what its values may be.

use super::table::{Case, case, check};

const FILES: &[Case] = &[
    case(
        "no job file",
        |w| w.remove("job.toml"),
        "error: job file job.toml can't be read: No such file or directory (os error 2)",
    ),
    case(
        "a job file that is a folder",
        |w| w.folder("job.toml"),
        "error: job.toml is a folder, expected a job file, such as configs/quickstart.toml\nhint: `spanwise generate MODEL_DIR PROMPT` needs no job file",
    ),
    case(
        "an empty job file",
        |w| w.file("job.toml", ""),
        "error: missing key `path` in [model]\n --> job.toml\nhint: add a line such as path = \"../models/smollm2-135m\" under [model]",
    ),
    case(
        "a job file of one NUL",
        |w| w.file("job.toml", "\0"),
        "error: key with no value, expected `=`\n --> job.toml:1:2\n  |\n1 | \0\n  |  ^",
    ),
    case(
        "a job file that is not UTF-8",
        |w| w.file("job.toml", b"[model]\npath = \"caf\xe9\"\n"),
        "error: job file job.toml is not UTF-8: bad byte in line 2",
    ),
    case(
        "a job file in UTF-16",
        |w| w.file("job.toml", "[model]\n".encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>()),
        "error: unexpected key or value, expected newline, `#`\n --> job.toml:1:14\n  |\n1 | [\0m\0o\0d\0e\0l\0]\0\n  |              ^",
    ),
    case(
        "a job file in JSON",
        |w| w.file("job.toml", "{\"model\": {\"path\": \"model\"}}"),
        "error: invalid key-value pair, expected key\n --> job.toml:1:1\n  |\n1 | {\"model\": {\"path\": \"model\"}}\n  | ^",
    ),
    case(
        "a job file nested 100,000 deep",
        |w| w.file("job.toml", format!("[model]\npath = {}", "[".repeat(100_000))),
        "error: cannot recurse further; max recursion depth met\n --> job.toml:2:88\n  |\n2 | …[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[…\n  |                                          ^",
    ),
    case(
        "a job file with a key of 100,000 parts",
        |w| w.file("job.toml", format!("{}a = 1", "a.".repeat(100_000))),
        "error: recursion limit\n --> job.toml",
    ),
    case(
        "an unknown key",
        |w| w.bytes("job.toml", |b| b.extend(b"[pipeline]\nmicro_batch_token = 64\n")),
        "error: unknown key `micro_batch_token` in [pipeline]\n --> job.toml:7:1\n  |\n7 | micro_batch_token = 64\n  | ^^^^^^^^^^^^^^^^^\nhint: did you mean `micro_batch_tokens`?",
    ),
    case(
        "an unknown section",
        |w| w.bytes("job.toml", |b| b.extend(b"[pipelines]\n")),
        "error: unknown section `pipelines`\n --> job.toml:6:2\n  |\n6 | [pipelines]\n  |  ^^^^^^^^^\nhint: did you mean [pipeline]?",
    ),
    case(
        "a value of another type",
        |w| w.bytes("job.toml", |b| b.extend(b"[pipeline]\nthreads = 4.7\n")),
        "error: pipeline.threads: expected an integer of at least 1, found 4.7\n --> job.toml:7:11\n  |\n7 | threads = 4.7\n  |           ^^^",
    ),
    case(
        "a number beyond i64",
        |w| w.bytes("job.toml", |b| b.extend(b"seed = 99999999999999999999\n")),
        "error: job.seed: expected an integer from 0 to 2^63 - 1, found 99999999999999999999\n --> job.toml:6:8\n  |\n6 | seed = 99999999999999999999\n  |        ^^^^^^^^^^^^^^^^^^^^",
    ),
    case(
        "a key twice",
        |w| w.bytes("job.toml", |b| b.extend(b"input = \"again.jsonl\"\n")),
        "error: duplicate key\n --> job.toml:6:1\n  |\n6 | input = \"again.jsonl\"\n  | ^^^^^",
    ),
];

const VALUES: &[Case] = &[
    case(
        "a --set of an unknown key",
        |w| w.set("pipeline.thread=4"),
        "error: in --set pipeline.thread=4: unknown key `pipeline.thread`\nhint: did you mean `pipeline.threads`?",
    ),
    case(
        "a --set without a value",
        |w| w.set("pipeline.threads"),
        "error: in --set pipeline.threads: expected section.key=value",
    ),
    case(
        "a temperature that is nan",
        |w| w.set("sampling.temperature=nan"),
        "error: in --set sampling.temperature=nan: expected a number from 0 to 2, found nan",
    ),
    case(
        "a temperature that is infinite",
        |w| w.set("sampling.temperature=inf"),
        "error: in --set sampling.temperature=inf: expected a number from 0 to 2, found inf",
    ),
    case(
        "a stop token beyond the vocabulary",
        |w| w.set("sampling.stop_token_ids=[768]"),
        "error: [sampling] stop_token_ids: expected token ids below 768, found 768",
    ),
    case(
        "seventeen stops",
        |w| w.set(&format!("sampling.stop=[{}]", ["\"x\""; 17].join(", "))),
        "error: [sampling] stop: expected at most 16 strings, found 17",
    ),
    case(
        "a prompt that does not end",
        |w| w.set("prompt.user=\"{{ text\""),
        "error: [prompt] user: syntax error: unexpected end of input, expected end of variable block, line 1",
    ),
    case(
        "a prompt nested 10,000 deep",
        |w| {
            let prompt = "{% if a %}".repeat(10_000);
            w.set(&format!("prompt.user={prompt:?}"))
        },
        "error: [prompt] user: syntax error: template exceeds maximum recursion limits, line 1",
    ),
    case(
        "a context beyond the model's",
        |w| w.set("model.max_context_tokens=5000"),
        "error: [model] max_context_tokens: found 5000, the model's max_position_embeddings is 4096",
    ),
    case(
        "a context beyond all numbers of tokens",
        |w| w.set("model.max_context_tokens=9223372036854775807"),
        "error: [model] max_context_tokens: found 9223372036854775807, the model's max_position_embeddings is 4096",
    ),
    case(
        "more threads than make sense",
        |w| w.set("pipeline.threads=1000000"),
        "error: [pipeline] threads: found 1000000, expected at most 1024",
    ),
    case(
        "more sequences than make sense",
        |w| w.set("pipeline.max_sequences=9223372036854775807"),
        "error: [pipeline] max_sequences: found 9223372036854775807, expected at most 65536",
    ),
    case(
        "a micro-batch larger than makes sense",
        |w| w.set("pipeline.micro_batch_tokens=9223372036854775807"),
        "error: [pipeline] micro_batch_tokens: found 9223372036854775807, expected at most 1048576",
    ),
    case(
        "a KV cache larger than the memory",
        |w| w.set("pipeline.kv_cache_tokens=100000000000"),
        "error: [pipeline] kv_cache_tokens: 100000000000 take 294400.0 GB, and … GB of memory are free beside the weights",
    ),
    case(
        "a KV cache beyond its page numbers",
        |w| w.set("pipeline.kv_cache_tokens=9223372036854775807"),
        "error: [pipeline] kv_cache_tokens: found 9223372036854775807, expected at most 274877906880",
    ),
    case(
        "a device that is not there",
        |w| w.set("pipeline.devices=[\"tpu:0\"]"),
        "error: in --set pipeline.devices=[\"tpu:0\"]: pipeline.devices[0]: unknown device kind `tpu` in \"tpu:0\", there are: cpu, cuda",
    ),
    case(
        "a device beyond all cores",
        |w| w.set("pipeline.devices=[\"cpu:4096\"]"),
        "error: in --set pipeline.devices=[\"cpu:4096\"]: pipeline.devices[0]: expected a device such as \"cpu:0\", found \"cpu:4096\"",
    ),
    case(
        "more stages than blocks",
        |w| w.set(&format!("pipeline.devices=[{}]", ["\"cpu:0\""; 12].join(", "))),
        "error: 11 blocks cannot be cut into 12 stages",
    ),
    case(
        "a stage beyond the last block",
        |w| w.set("pipeline.stages=[[0, 12]]"),
        "error: [pipeline] stages: the last one ends at block 12, the model has 11 blocks (12 slots, and no block in 1 of them)",
    ),
    case(
        "a stage that ends before the last block",
        |w| w.set("pipeline.stages=[[0, 10]]"),
        "error: [pipeline] stages: the last one ends at block 10, the model has 11 blocks (12 slots, and no block in 1 of them)",
    ),
];

const COMMANDS: &[Case] = &[
    case(
        "an unknown command",
        |w| w.spanwise(&["zzz", "job.toml"]),
        "error: unrecognized subcommand 'zzz'\n\nUsage: spanwise <COMMAND>\n\nFor more information, try '--help'.",
    ),
    case(
        "run without a job",
        |w| w.spanwise(&["run"]),
        "error: the following required arguments were not provided:\n  <JOB.toml>\n\nUsage: spanwise run <JOB.toml>\n\nFor more information, try '--help'.",
    ),
    case(
        "a limit below 0",
        |w| w.arg("--limit=-1"),
        "error: invalid value '-1' for '--limit <N>': invalid digit found in string\n\nFor more information, try '--help'.",
    ),
    case(
        "a limit that is a text",
        |w| w.arg("--limit=some"),
        "error: invalid value 'some' for '--limit <N>': invalid digit found in string\n\nFor more information, try '--help'.",
    ),
    case(
        "an unknown option",
        |w| w.arg("--frehs"),
        "error: unexpected argument '--frehs' found\n\n  tip: a similar argument exists: '--fresh'\n\nUsage: spanwise run --progress <PROGRESS> --fresh <JOB.toml>\n\nFor more information, try '--help'.",
    ),
    case(
        "inspect of nothing",
        |w| w.spanwise(&["inspect", "nowhere"]),
        "error: read nowhere/config.json: No such file or directory (os error 2)",
    ),
    case(
        "inspect of what is no model",
        |w| w.spanwise(&["inspect", "rows.jsonl"]),
        "error: rows.jsonl: architectures: found nothing, expected LlamaForCausalLM or DeciLMForCausalLM",
    ),
    case(
        "generate by a model that is not there",
        |w| w.spanwise(&["generate", "nowhere", "hello"]),
        "error: load model: read nowhere/config.json: No such file or directory (os error 2)",
    ),
    case(
        "generate by a job file",
        |w| w.spanwise(&["generate", "job.toml", "hello"]),
        "error: job.toml is a file, expected a model's folder\nhint: `spanwise run JOB.toml` runs a job file",
    ),
    case(
        "a plan for a model's folder",
        |w| w.spanwise(&["plan", "model"]),
        "error: model is a folder, expected a job file, such as configs/quickstart.toml\nhint: `spanwise generate MODEL_DIR PROMPT` needs no job file",
    ),
    case(
        "generate with a temperature below 0",
        |w| w.spanwise(&["generate", "model", "hello", "--temperature=-1"]),
        "error: temperature: expected a number from 0 to 2, found -1",
    ),
    case(
        "generate with a temperature of nan",
        |w| w.spanwise(&["generate", "model", "hello", "--temperature=nan"]),
        "error: temperature: expected a number from 0 to 2, found NaN",
    ),
    case(
        "generate beyond the context",
        |w| w.spanwise(&["generate", "model", "hello", "--max-context-tokens=2"]),
        "error: messages: 18 tokens leave no room in the context of 2",
    ),
    case(
        "generate with no context at all",
        |w| w.spanwise(&["generate", "model", "hello", "--max-context-tokens=0"]),
        "error: messages: 18 tokens leave no room in the context of 0",
    ),
    case(
        "generate of nothing",
        |w| w.spanwise(&["generate", "model", "", "--raw"]),
        "error: prompt: expected at least one token, found none",
    ),
    case(
        "generate with no threads",
        |w| w.spanwise(&["generate", "model", "hello", "--threads=0"]),
        "error: load stage 0: a cpu device needs at least 1 thread, got 0",
    ),
    case(
        "generate with an empty stop",
        |w| w.spanwise(&["generate", "model", "hello", "--stop="]),
        "error: stop: expected strings that are not empty, found \"\"",
    ),
];

#[test]
fn job_files_that_cannot_be_are_refused() {
    check(FILES);
}

#[test]
fn values_that_cannot_be_are_refused() {
    check(VALUES);
}

#[test]
fn commands_that_cannot_be_are_refused() {
    check(COMMANDS);
}
