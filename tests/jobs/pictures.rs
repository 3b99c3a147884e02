//! Pictures as the program draws them: XML, all blocks and stages, to scale, and those of the documentation.

use std::path::Path;
use std::process::Output;

use roxmltree::{Document, Node};
use serde_json::Value;

use crate::harness::{root, spanwise};

const ULTRA_MODEL: &str = "configs/models/Llama-3_1-Nemotron-Ultra-253B-v1";
const SUPER_MODEL: &str = "configs/models/Llama-3_3-Nemotron-Super-49B-v1";
const ULTRA: &str = "configs/ultra-253b-8xh100.toml";
/// Few rows on a pipeline of several stages.
const PLAYED: &str = "--devices 8xh200 --rows 400 --set plan.prompt_tokens=128 --set plan.output_tokens=64";

/// Runs `spanwise` at the root of the repository with a picture to draw.
fn draw_to(path: &Path, args: &str) -> Output {
    let mut command = spanwise();
    command.current_dir(root()).args(args.split_whitespace()).arg("--svg").arg(path);
    command.output().expect("start spanwise")
}

/// The picture that a command draws, and what it prints.
fn drawn(args: &str) -> (String, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("picture.svg");
    let output = draw_to(&path, args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    (std::fs::read_to_string(path).expect("a picture"), String::from_utf8(output.stdout).expect("UTF-8"))
}

fn all<'a>(document: &'a Document<'_>, name: &'a str) -> Vec<Node<'a, 'a>> {
    document.descendants().filter(|node| node.has_attribute(name)).collect()
}

fn bars<'a>(group: Node<'a, 'a>) -> Vec<Node<'a, 'a>> {
    group.children().filter(|child| child.has_tag_name("rect")).collect()
}

fn number(node: Node<'_, '_>, name: &str) -> f64 {
    node.attribute(name).and_then(|text| text.parse().ok()).unwrap_or_else(|| panic!("no {name} in {node:?}"))
}

fn texts(document: &Document<'_>) -> String {
    document.descendants().filter_map(|node| node.text()).map(str::trim).collect::<Vec<_>>().join("\n")
}

#[test]
fn every_block_of_a_model_is_drawn_with_the_halves_that_it_has() {
    for model in ["models/abacus", ULTRA_MODEL, SUPER_MODEL] {
        let (svg, json) = drawn(&format!("inspect {model} --format json"));
        let inspection: Value = serde_json::from_str(&json).unwrap();
        let document = Document::parse(&svg).expect("XML");
        let blocks = inspection["blocks"].as_array().unwrap();
        let groups = all(&document, "data-block");
        assert_eq!(groups.len(), blocks.len(), "{model}");
        for (block, group) in blocks.iter().zip(groups) {
            let halves = ["attention", "ffn"].iter().filter(|half| block[**half] != "none").count();
            assert_eq!(bars(group).len(), halves, "{model} {block}");
            let tooltip = group.descendants().find(|node| node.has_tag_name("title")).expect("a tooltip");
            assert!(tooltip.text().unwrap().contains(&format!("slot {}:", block["slot"])), "{block}");
        }
    }
}

/// Of both sides of the line, so that attention can be compared with FFNs.
#[test]
fn heights_of_half_blocks_are_their_parameters() {
    let (svg, json) = drawn(&format!("inspect {ULTRA_MODEL} --format json"));
    let inspection: Value = serde_json::from_str(&json).unwrap();
    let document = Document::parse(&svg).expect("XML");
    let height =
        |group: &Node<'_, '_>| -> f64 { bars(*group).iter().map(|bar| number(*bar, "height")).sum() };
    let heights: Vec<f64> = all(&document, "data-block").iter().map(height).collect();
    let params: Vec<f64> =
        inspection["blocks"].as_array().unwrap().iter().map(|b| b["params"].as_f64().unwrap()).collect();
    let scale = heights.iter().sum::<f64>() / params.iter().sum::<f64>();
    for (height, params) in heights.iter().zip(&params) {
        // Each of two bars is rounded to a hundredth.
        assert!((height - params * scale).abs() < 0.02, "{height} for {params}");
    }
}

/// The parts of a stage are as wide as they take time, for the plan and for the even split on one scale.
#[test]
fn widths_of_a_stage_sum_up_to_its_time() {
    for args in ["", "--devices 2xh200 --dtype fp8", "--devices 64xh200", "--devices 4xh100-80gb,2xh200"] {
        let (svg, json) = drawn(&format!("plan {ULTRA} --format json {args}"));
        let plan: Value = serde_json::from_str(&json).unwrap();
        let document = Document::parse(&svg).expect("XML");
        let groups = all(&document, "data-stage");
        let stages = plan["stages"].as_array().unwrap();
        let width = |mark: String| -> f64 {
            let own: Vec<_> =
                groups.iter().filter(|group| group.attribute("data-stage") == Some(&mark)).collect();
            let ends = |group: &Node<'_, '_>| {
                let ends = bars(*group).into_iter().map(|bar| number(bar, "x") + number(bar, "width"));
                ends.fold(0.0, f64::max)
            };
            own.iter().map(|group| ends(group)).fold(0.0, f64::max) - number(bars(*own[0])[0], "x")
        };
        let time = |stage: &Value| stage["time_ms"]["mix"].as_f64().unwrap();
        let scale = width("plan 0".to_owned()) / time(&stages[0]);
        for (index, stage) in stages.iter().enumerate() {
            let (width, wanted) = (width(format!("plan {index}")), time(stage) * scale);
            // White between parts takes at most a pixel of the last one.
            assert!((width - wanted).abs() < 2.0, "stage {index} of {args}: {width}, expected {wanted}");
        }
        let is_even = |group: &&Node<'_, '_>| group.attribute("data-stage").unwrap().starts_with("even");
        assert!(groups.iter().filter(is_even).count() >= 81, "{args}");
    }
}

#[test]
fn a_plan_s_picture_tells_speed_memory_and_what_others_would_do() {
    let (svg, _) = drawn(&format!("plan {ULTRA} --devices 8xh200"));
    let document = Document::parse(&svg).expect("XML");
    let texts = texts(&document);
    for words in
        ["on 8xh200, bf16", "tokens/s", "estimate", "slowest", "even split", "times as fast", "fused FFN"]
    {
        assert!(texts.contains(words), "{words} is not in\n{texts}");
    }
    let memory = all(&document, "data-memory");
    assert!(memory.len().is_multiple_of(4) && memory.len() >= 8, "{}", memory.len());
    for stage in memory.chunks(4) {
        let sum: f64 = stage.iter().map(|part| number(bars(*part)[0], "width")).sum();
        assert!((sum - 284.0).abs() < 0.1, "{sum}");
    }
    // Shared blocks are hatched, and only where columns are cut.
    let hatched = |svg: &str| svg.matches("fill=\"url(#hatch)\"").count();
    let (whole, _) = drawn(&format!("plan {ULTRA} --devices 8xh200 --set pipeline.column_cuts=off"));
    assert!(hatched(&svg) > 1 && hatched(&whole) == 0, "{} {}", hatched(&svg), hatched(&whole));
}

/// Where a path of steps, or its area, has its level: the end of each step, and its height above the start.
fn steps(path: Node<'_, '_>) -> Vec<(f64, f64)> {
    let outline = path.attribute("d").expect("an outline").trim_start_matches('M').trim_end_matches('z');
    let end = outline.find(['v', 'h']).expect("a step");
    let (mut x, mut height): (f64, f64) = (outline.split(' ').next().unwrap().parse().unwrap(), 0.0);
    let mut steps = vec![];
    for (at, letter) in outline[end..].match_indices(['v', 'h']) {
        let rest = &outline[end + at + 1..];
        let length: f64 = rest[..rest.find(['v', 'h']).unwrap_or(rest.len())].parse().expect("a length");
        match letter {
            "v" => height -= length,
            _ => {
                x += length;
                steps.push((x, height));
            }
        }
    }
    steps
}

/// The height of a path at a place.
fn height_at(steps: &[(f64, f64)], x: f64) -> f64 {
    steps.iter().find(|(end, _)| *end > x).expect("a step").1
}

/// Each stage has a row; in every bin the parts stand on each other with heights that are their shares, up to the
/// height of the row.
#[test]
fn heights_in_a_simulation_s_rows_are_shares_of_time() {
    const PARTS: [&str; 5] = ["busy", "starved", "kv_limited", "tail", "idle"];
    let (svg, json) = drawn(&format!("simulate {ULTRA} --format json {PLAYED}"));
    let report: Value = serde_json::from_str(&json).unwrap();
    let document = Document::parse(&svg).expect("XML");
    let rows = all(&document, "data-stage");
    let timeline = &report["timeline"];
    let (stages, bin_seconds) = (timeline["stages"].as_array().unwrap(), &timeline["bin_seconds"]);
    let num_stages = report["stages"].as_array().unwrap().len();
    assert!(num_stages > 2 && [rows.len(), stages.len()] == [num_stages; 2], "{} rows", rows.len());
    let wall_seconds = report["wall_seconds"].as_f64().unwrap();
    for (row, bins) in rows.iter().zip(stages) {
        let path = |part: &&str| row.children().find(|path| path.attribute("data-part") == Some(part));
        let paths: Vec<_> = PARTS.iter().map(|part| path(part).map(steps)).collect();
        for (bin, shares) in bins.as_array().unwrap().iter().enumerate() {
            let width = bin_seconds.as_f64().unwrap();
            let middle = (bin as f64 + 0.5) * width;
            if wall_seconds - bin as f64 * width < 1e-3 * wall_seconds {
                continue; // Less than a pixel of the last bin was played.
            }
            let x = 208.0 + 880.0 * middle.min(wall_seconds - 1e-9) / wall_seconds;
            let (mut drawn, mut share) = (0.0, 0.0);
            for (part, steps) in PARTS.iter().zip(&paths) {
                share += shares[*part].as_f64().unwrap();
                drawn = steps.as_ref().map_or(drawn, |steps| height_at(steps, x));
                // Levels are drawn to half a pixel.
                assert!((drawn - share * 36.0).abs() < 0.26, "{part} in bin {bin}: {drawn}, {shares}");
            }
            assert!((drawn - 36.0).abs() < 1e-9, "bin {bin}: {drawn}");
        }
    }
}

#[test]
fn a_simulation_s_picture_tells_its_job_its_speed_and_the_plan_s_bottleneck() {
    let (svg, json) = drawn(&format!("simulate {ULTRA} --format json {PLAYED} --seed 3"));
    let report: Value = serde_json::from_str(&json).unwrap();
    let document = Document::parse(&svg).expect("XML");
    let texts = texts(&document);
    let bottleneck = format!("stage {}, bottleneck", report["plan"]["bottleneck"]);
    for words in [
        "Llama-3_1-Nemotron-Ultra-253B-v1 on 8xh200, bf16",
        "400 rows with prompts of 128 tokens, 64 generated on average, exponential; seed 3",
        "of the plan's",
        "an estimate",
        "last row admitted",
        &bottleneck,
    ] {
        assert!(texts.contains(words), "{words} is not in\n{texts}");
    }
    assert_eq!(svg.matches(", bottleneck").count(), 1, "{texts}");
    // The tokens' line is as high as the most of them, or the plan's, at its highest.
    let tokens = report["timeline"]["tokens"].as_array().unwrap().iter().map(|rate| rate.as_f64().unwrap());
    let tokens: Vec<f64> = tokens.collect();
    let most = tokens.iter().copied().fold(0.0, f64::max);
    let top = most.max(report["plan"]["tokens_per_second"].as_f64().unwrap());
    let level = all(&document, "data-level")[2].children().find(|node| node.has_tag_name("path")).unwrap();
    let heights = steps(level).into_iter().map(|(_, height)| height);
    let highest = heights.fold(f64::NEG_INFINITY, f64::max);
    let rise = (most - tokens[0]) / top * 62.0;
    assert!((highest - rise).abs() < 0.51, "{highest} above the first bin, expected {rise}");
}

/// One stage for each of 64 devices: bins that look alike are drawn as one.
#[test]
fn a_picture_of_many_stages_is_small() {
    let args = "--devices 64xh200 --rows 3000 --set plan.prompt_tokens=128 --set plan.output_tokens=64";
    let ones = vec!["1"; 64].join(",");
    let (svg, json) =
        drawn(&format!("simulate {ULTRA} --format json {args} --set pipeline.tensor_parallel=[{ones}]"));
    let report: Value = serde_json::from_str(&json).unwrap();
    let document = Document::parse(&svg).expect("XML");
    let num_stages = report["stages"].as_array().unwrap().len();
    assert_eq!(all(&document, "data-stage").len(), num_stages);
    assert!(num_stages > 50 && svg.len() < 300_000, "{num_stages} stages in {} bytes", svg.len());
}

/// Both stages of a device have one bar, one memory, and together its time.
#[test]
fn a_device_that_is_passed_twice_is_one_bar() {
    let lengths = "--set plan.prompt_tokens=120000 --set plan.output_tokens=1024";
    let (svg, text) = drawn(&format!("plan configs/super-49b-1xh200.toml --devices 5xh200 {lengths}"));
    assert!(text.contains("devices are passed twice"), "{text}");
    let document = Document::parse(&svg).expect("XML");
    let memory = all(&document, "data-memory");
    assert_eq!(memory.len(), 5 * 4);
    for device in memory.chunks(4) {
        let sum: f64 = device.iter().map(|part| number(bars(*part)[0], "width")).sum();
        assert!((sum - 284.0).abs() < 0.1, "{sum}");
    }
    let texts = texts(&document);
    assert!(texts.contains("stages 0, 5") && texts.contains("stages 4, 9"), "{texts}");
}

#[test]
fn names_of_models_are_escaped() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("a<b & \"c\"");
    std::fs::create_dir(&model).unwrap();
    std::fs::copy(root().join("models/abacus/config.json"), model.join("config.json")).unwrap();
    let path = folder.path().join("picture.svg");
    for named in [model.clone(), model.join("config.json")] {
        let output = spanwise().arg("inspect").arg(named).arg("--svg").arg(&path).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let svg = std::fs::read_to_string(&path).unwrap();
        let document = Document::parse(&svg).expect("XML");
        assert!(texts(&document).lines().any(|line| line == "a<b & \"c\""), "{svg}");
    }
}

#[test]
fn a_picture_that_cannot_be_drawn_or_written_is_an_error_that_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("no/such/folder.svg");
    let commands =
        ["inspect models/abacus".to_owned(), format!("plan {ULTRA}"), format!("simulate {ULTRA} {PLAYED}")];
    for args in commands {
        let output = draw_to(&missing, &args);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(stderr.contains("write picture") && stderr.contains("folder.svg"), "{stderr}");
    }
    let path = folder.path().join("plan.svg");
    for command in ["plan", "simulate"] {
        let output = draw_to(&path, &format!("{command} {ULTRA} --devices 4xh100-80gb --format json"));
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && stderr.contains("nothing fits"), "{stderr}");
        assert!(!path.exists());
        let plan: Value = serde_json::from_slice(&output.stdout).expect("the plan all the same");
        assert_eq!(plan["fits"], false);
    }
}

/// Whoever changes what is drawn, or what a plan says, draws them anew with the commands of the message.
#[test]
fn pictures_of_the_documentation_are_what_is_drawn_now() {
    let pictures = [
        ("docs/pictures/ultra-253b-blocks.svg", format!("inspect {ULTRA_MODEL}")),
        ("docs/pictures/ultra-253b-8xh100-plan.svg", format!("plan {ULTRA} --dtype fp8")),
        (
            "docs/pictures/ultra-253b-8xh200-simulated.svg",
            format!("simulate {ULTRA} --devices 8xh200 --rows 10000"),
        ),
    ];
    for (path, args) in pictures {
        let kept = std::fs::read_to_string(root().join(path)).expect("a picture");
        assert!(kept == drawn(&args).0, "{path} is of the past: spanwise {args} --svg {path}");
        assert!(kept.len() < 120_000, "{path} has {} bytes", kept.len());
    }
}
