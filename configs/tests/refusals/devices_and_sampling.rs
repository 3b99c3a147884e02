//! Devices, stages and sampling: values with a form of their own.

use crate::case::case;

#[test]
fn devices_and_stages_are_checked() {
    case("a kind of device that there is not")
        .more(
            r#"
[pipeline]
devices = ["cpu:0", "tpu:0"]"#,
        )
        .says(
            r#"
pipeline.devices[1]: unknown device kind `tpu` in "tpu:0", there are: cpu, cuda
 --> job.toml:7:21
  |
7 | devices = ["cpu:0", "tpu:0"]
  |                     ^^^^^^^"#,
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
    case("a repetition_penalty of nothing")
        .more(
            r"
[sampling]
repetition_penalty = 0",
        )
        .says(
            r"
sampling.repetition_penalty: expected a number from 0.01 to 100, found 0
 --> job.toml:7:22
  |
7 | repetition_penalty = 0
  |                      ^",
        );
    case("a penalty beyond OpenAI's")
        .more(
            r"
[sampling]
presence_penalty = -2.5",
        )
        .says(
            r"
sampling.presence_penalty: expected a number from -2 to 2, found -2.5
 --> job.toml:7:20
  |
7 | presence_penalty = -2.5
  |                    ^^^^",
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
