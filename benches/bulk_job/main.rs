//! How many tokens a second does a bulk job generate, and what does that depend on?
//!
//! The job: 256 chat prompts of 34 to 407 tokens, 31.8 thousand together, of which the first 24 are the same, with 128 new
//! tokens each, greedy, SmolLM2-135M in bf16, all rows in flight. Variants run in turn; wherever all must answer
//! alike, each run's answers are compared before its time counts.
//!
//! ```text
//! cargo bench --bench bulk_job -- [QUESTION] [RUNS] [--rows N]
//! ```
//!
//! With `--rows` the first N of them.
//!
//! | question | |
//! |---|---|
//! | `layouts` | one stage of all cores; two of one core each; two replicas, each the whole model on one core with half of the rows |
//! | `ladder` | what two stages lose, rung by rung: one stage, the same in steps as small as two have, two in such steps, two in steps of at most 512 tokens |
//! | `tokens` | two stages in micro-batches of at most 512 tokens, 128, 64 and 32, each against the one before, and by the profile |
//! | `int8` | int8 against bf16, one stage |
//! | `neighbour` | beside one busy process against alone, one stage |
//! | `llama` | 64 such prompts on a Llama of 1.1 B parameters with random weights |
//! | `start` | from process start to the first token of an answer |
//! | `rows` | none: prints the job's rows, for [other engines](../peers) |
//!
//! Two stages are cut, and their micro-batches bounded, by what `spanwise profile` has measured, where it has.
//!
//! With nothing else running. Rates are of the job without loading; the share of peak is of products measured before
//! the first run and after the last. Beside the median of ratios stands where it lies with 95 %, or as sure as so few runs are.

#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "a bench prints")]

#[path = "../common/mod.rs"]
mod common;
mod job;
mod workload;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use common::{interval::Interval, median};
use job::{Job, Run, SPANWISE};
use kernels::{Ceilings, Cpu, CpuOptions, KvDtype, Simd, WeightType, available_cores};
use stages::ModelConfig;
use workload::Workload;

const ONE_STAGE: &str = r#"pipeline.devices=["cpu:0"]"#;
const TWO_DEVICES: &str = r#"pipeline.devices=["cpu:0", "cpu:1"]"#;
const ONE_STAGE_EACH: &str = "pipeline.virtual_stages=off";

/// Micro-batches that two stages share the rows out to, one more than stages.
const OF_TWO_STAGES: usize = 3;

/// The share of a job's time that reading, rendering, tokenizing, detokenizing and writing may take together.
const MOST_TEXT: f64 = 0.02;

/// Makes this program the busy neighbour.
const SPIN: &str = "--spin";

/// One way to run the job.
struct Variant {
    name: &'static str,
    sets: &'static [&'static str],
    has_neighbour: bool,
    /// Whether a step has no more tokens than each micro-batch of two stages has rows.
    has_small_steps: bool,
}

impl Variant {
    /// The keys that it sets, in a job of so many rows.
    fn sets_of(&self, rows: usize) -> Vec<String> {
        let mut sets: Vec<String> = self.sets.iter().map(|&set| set.to_owned()).collect();
        if self.has_small_steps {
            sets.push(format!("pipeline.micro_batch_tokens={}", rows.div_ceil(OF_TWO_STAGES)));
        }
        sets
    }
}

/// Variants that run in turn, each of which is compared with the one before it, or one alone.
struct Question {
    name: &'static str,
    variants: &'static [Variant],
    are_answers_alike: bool,
}

const fn variant(name: &'static str, sets: &'static [&'static str]) -> Variant {
    Variant { name, sets, has_neighbour: false, has_small_steps: false }
}

const fn in_small_steps(name: &'static str, sets: &'static [&'static str]) -> Variant {
    Variant { has_small_steps: true, ..variant(name, sets) }
}

const TWO_STAGES: &[&str] = &[TWO_DEVICES, ONE_STAGE_EACH];

/// In micro-batches of at most 512 tokens, as one stage has them; by default two have what the profile finds best.
const TWO_OF_512: &[&str] = &[TWO_DEVICES, ONE_STAGE_EACH, "pipeline.micro_batch_tokens=512"];
/// Of at most 128.
const TWO_OF_128: &[&str] = &[TWO_DEVICES, ONE_STAGE_EACH, "pipeline.micro_batch_tokens=128"];
/// Of at most 64.
const TWO_OF_64: &[&str] = &[TWO_DEVICES, ONE_STAGE_EACH, "pipeline.micro_batch_tokens=64"];
/// Of at most 32.
const TWO_OF_32: &[&str] = &[TWO_DEVICES, ONE_STAGE_EACH, "pipeline.micro_batch_tokens=32"];

const QUESTIONS: [Question; 6] = [
    Question {
        name: "layouts",
        variants: &[
            variant("one stage", &[ONE_STAGE]),
            variant("two stages", TWO_STAGES),
            variant("replicas", &[TWO_DEVICES, "pipeline.replicas=2"]),
        ],
        are_answers_alike: true,
    },
    Question {
        name: "ladder",
        variants: &[
            variant("one stage", &[ONE_STAGE]),
            in_small_steps("one, small", &[ONE_STAGE]),
            in_small_steps("two, small", TWO_STAGES),
            variant("two of 512", TWO_OF_512),
        ],
        are_answers_alike: true,
    },
    Question {
        name: "tokens",
        variants: &[
            variant("of 512", TWO_OF_512),
            variant("of 128", TWO_OF_128),
            variant("of 64", TWO_OF_64),
            variant("of 32", TWO_OF_32),
            variant("by profile", TWO_STAGES),
        ],
        are_answers_alike: true,
    },
    Question {
        name: "int8",
        variants: &[variant("bf16", &[ONE_STAGE]), variant("int8", &[ONE_STAGE, "model.dtype=int8"])],
        are_answers_alike: false,
    },
    Question {
        name: "neighbour",
        variants: &[
            variant("alone", &[ONE_STAGE]),
            Variant { has_neighbour: true, ..variant("beside one", &[ONE_STAGE]) },
        ],
        are_answers_alike: true,
    },
    Question {
        name: "llama",
        variants: &[variant("one stage", &[ONE_STAGE, "model.random_weights=true"])],
        are_answers_alike: true,
    },
];

fn main() {
    let mut args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    if args.iter().any(|arg| arg == SPIN) {
        spin();
    }
    let rows = take_rows(&mut args);
    let runs = args.iter().find_map(|arg| arg.parse().ok()).unwrap_or(3);
    let asked = args.iter().find(|arg| arg.parse::<usize>().is_err()).map_or("layouts", String::as_str);
    let smollm2 = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/smollm2-135m");
    assert!(smollm2.join("config.json").is_file(), "run `cargo smollm2` first");
    if asked == "start" {
        return start(&smollm2, runs);
    }
    if asked == "rows" {
        return print!("{}", Workload::first(rows.unwrap_or(256)).chats());
    }
    let question = QUESTIONS.iter().find(|question| question.name == asked);
    let question = question.unwrap_or_else(|| panic!("unknown question {asked}"));
    let scratch = tempfile::tempdir().expect("a temporary folder");
    let llama = scratch.path().join("llama");
    let (model, workload): (PathBuf, _) = match asked {
        "llama" => {
            workload::make_llama(&llama);
            (llama, Workload::first(rows.unwrap_or(64)))
        }
        _ => (smollm2, Workload::first(rows.unwrap_or(256))),
    };
    let config = ModelConfig::read(&model).expect("a configuration");
    let input = match asked {
        "llama" => workload.token_ids(config.dims.vocab),
        _ => workload.chats(),
    };
    let (rows, prompt, new) = (workload.prompts.len(), workload.prompt_tokens(), workload.new_tokens());
    println!("{rows} rows, {prompt} tokens of prompts, {new} new ones");
    let peak_before = peak();
    let all = ask(question, &Job::new(&model, &input, workload.prompt_tokens()), runs);
    report(question, &all, &workload, &config, peak_before.max(peak()));
}

/// Takes `--rows N` out of the arguments.
fn take_rows(args: &mut Vec<String>) -> Option<usize> {
    let at = args.iter().position(|arg| arg == "--rows")?;
    let given: Vec<String> = args.drain(at..args.len().min(at + 2)).collect();
    let rows = given.get(1).and_then(|rows| rows.parse().ok()).filter(|rows| (1..=256).contains(rows));
    Some(rows.expect("--rows takes a number from 1 to 256"))
}

/// Runs all variants in turn.
fn ask(question: &Question, job: &Job, runs: usize) -> Vec<Vec<Run>> {
    let mut all: Vec<Vec<Run>> = question.variants.iter().map(|_| Vec::new()).collect();
    for _ in 0..runs {
        for (idx, variant) in question.variants.iter().enumerate() {
            let neighbour = variant.has_neighbour.then(Neighbour::start);
            let run = job.run(&variant.sets_of(job.rows));
            drop(neighbour);
            let first = if question.are_answers_alike { &all[0] } else { &all[idx] };
            if let Some(first) = first.first() {
                assert_eq!(first.lines, run.lines, "{} answers differently", variant.name);
            }
            all[idx].push(run);
        }
    }
    all
}

fn report(question: &Question, all: &[Vec<Run>], workload: &Workload, config: &ModelConfig, peak: f64) {
    let flops = workload.flops(config);
    println!(
        "{:.2} TFLOP; {:.0} GFLOP/s measured: {:.0} generated tokens/s at most in bf16; weights and KV {:.0} MB",
        flops / 1e12,
        peak / 1e9,
        workload.new_tokens() as f64 * peak / flops,
        workload.weight_and_kv_bytes(config) as f64 / 1e6
    );
    for (variant, runs) in question.variants.iter().zip(all) {
        let list = |of: &dyn Fn(&Run) -> String| runs.iter().map(of).collect::<Vec<_>>().join(" ");
        let rates: Vec<f64> = runs.iter().map(|run| run.rate).collect();
        let rate = median(&rates);
        println!(
            "{:<10} {} generated tokens/s, median {rate:.0}, {:.1} % of the bf16 peak",
            variant.name,
            list(&|run| format!("{:.0}", run.rate)),
            100.0 * flops * rate / workload.new_tokens() as f64 / peak
        );
        println!(
            "{:<10} {} CPU seconds; stages busy {} % of the time; memory {}",
            "",
            list(&|run| format!("{:.1}", run.cpu_seconds)),
            list(&|run| run.busy.clone()),
            runs[0].memory
        );
        println!("{:<10} {}", "", text(runs));
    }
    let rungs: Vec<_> = question.variants.iter().zip(all).collect();
    rungs.windows(2).for_each(|pair| compare(pair[0], pair[1]));
    if let [first, .., last] = rungs[..]
        && rungs.len() > 2
    {
        compare(first, last);
    }
}

/// The most of the time that the threads of text took in any run, and what the bar is to that.
fn text(runs: &[Run]) -> String {
    let most = |of: &dyn Fn(&Run) -> f64| runs.iter().map(of).fold(0.0, f64::max);
    let (reading, writing) = (most(&|run| run.text[0]), most(&|run| run.text[1]));
    let both = most(&|run| run.text.iter().sum());
    format!(
        "reading text took {:.2} % of the time at most, writing it {:.2} %, both {:.2} %: {} the bar of {:.0} %",
        100.0 * reading,
        100.0 * writing,
        100.0 * both,
        if both <= MOST_TEXT { "within" } else { "beyond" },
        100.0 * MOST_TEXT
    )
}

/// Prints how much faster a variant is than another one.
fn compare((base, base_runs): (&Variant, &Vec<Run>), (other, other_runs): (&Variant, &Vec<Run>)) {
    let ratios: Vec<f64> =
        other_runs.iter().zip(base_runs).map(|(other, base)| other.rate / base.rate).collect();
    let (name, base) = (other.name, base.name);
    println!("{name} / {base}, pair by pair: median {:.3}, {:.3}", median(&ratios), Interval::of(&ratios));
}

/// Seconds from the start of the process to the first byte of an answer.
fn start(model: &Path, runs: usize) {
    let mut seconds = Vec::new();
    for _ in 0..=runs {
        let begun = Instant::now();
        let mut child = Command::new(SPANWISE)
            .arg("generate")
            .arg(model)
            .args(["What is the capital of France?", "--temperature", "0"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("start spanwise");
        let mut answer = String::new();
        let mut out = child.stdout.take().expect("a pipe");
        let mut byte = [0];
        out.read_exact(&mut byte).expect("an answer");
        seconds.push(begun.elapsed().as_secs_f64());
        out.read_to_string(&mut answer).expect("text");
        assert!(child.wait().expect("an end").success() && answer.contains("Paris"), "{answer}");
    }
    seconds.remove(0); // The model may not have been in the disk cache.
    let shown: Vec<String> = seconds.iter().map(|seconds| format!("{seconds:.3}")).collect();
    println!("first token after {} s, median {:.3}", shown.join(" "), median(&seconds));
}

/// Products a second on all cores, in bf16.
fn peak() -> f64 {
    let cores = available_cores();
    let (threads, simd) = (cores.len(), Simd::detect());
    let options = CpuOptions { cores, threads, simd, weights: WeightType::Bf16, kv: KvDtype::Bf16 };
    let cpu = Cpu::new(options).expect("a device");
    // This thread is not pinned: what it starts would be, too.
    Ceilings::new(&cpu).expect("memory to measure with").product_flops()
}

/// A process that computes all the time.
struct Neighbour(Child);

impl Neighbour {
    fn start() -> Self {
        let program = std::env::current_exe().expect("this program's path");
        Neighbour(Command::new(program).arg(SPIN).spawn().expect("start a busy process"))
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        self.0.kill().expect("end the busy process");
        self.0.wait().expect("its end");
    }
}

fn spin() -> ! {
    let mut state = 1u64;
    loop {
        state = std::hint::black_box(state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
    }
}
