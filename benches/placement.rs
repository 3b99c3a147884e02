//! Does a stage take what a profile predicts, and does the planned cut bring what the plan promises?
//!
//! The model: a scaled-down Nemotron Ultra, its 81 real blocks at hidden 512 (about 290 M parameters, random weights), on two
//! stages of one pinned core each. It is profiled, cut by the profile and evenly by slots, and each cut runs the
//! same bulk of random prompts with the real scheduler and the real stages; both must draw the same tokens
//! before times count. A stage's predicted time is the sum over the micro-batches that it was given.
//!
//! `cargo bench --bench placement [-- RUNS]`, with nothing else running; about 8 minutes for 9 runs.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "a bench prints")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};
use common::median;
use scheduler::{
    Generated, MicroBatch, MicroBatchOutput, Options, Problem, Request, RequestKey, Sampling, Scheduler,
    Span, StageDevice, TokenId, least_bottleneck_on_each,
};
use serde_json::{Value, json};
use stages::cost::{Channel, CostModel, Load, Measured, NumberType, NumberTypes, pieces};
use stages::profile::{Effort, MeasureOptions, Missing, Neighbours, measure};
use stages::{
    Activations, Device, Dtypes, KvDtype, Model, PAGE_TOKENS, Sharing, Simd, SpanOptions, StageOutput,
    WeightType, available_cores,
};

const NUM_STAGES: usize = 2;
const HIDDEN: usize = 512;
const HEADS: usize = 32;
const VOCAB: usize = 32_000;
/// Longest prompt and completion together.
const CONTEXT: usize = 256;

/// Rows in flight, and tokens of the largest micro-batch.
const ROWS: usize = 96;
const MICRO_BATCH_TOKENS: usize = 256;
/// Prompts are of 16 to 80 tokens.
const PROMPT_TOKENS: std::ops::Range<usize> = 16..81;
const NEW_TOKENS: usize = 48;

const DTYPES: Dtypes = Dtypes { weights: WeightType::Bf16, kv: KvDtype::Bf16 };
const TYPES: NumberTypes = NumberTypes { weights: NumberType::Bf16, kv: NumberType::Bf16 };

fn main() -> Result<()> {
    let runs = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(9);
    let folder = tempfile::tempdir()?;
    let model = scaled_ultra(folder.path())?;
    let cores = available_cores();
    ensure!(cores.len() >= NUM_STAGES, "{NUM_STAGES} cores are needed, found {}", cores.len());
    let device = |core: &usize| Device::Cpu { cores: vec![*core], threads: 1, simd: Simd::detect() };
    let devices: Vec<Device> = cores.iter().take(NUM_STAGES).map(device).collect();
    let costs = profile(&model, &devices)?;

    let (planned, even) = (plan(&model, &costs)?, even_split(&model));
    println!("{} parameters; planned {}, even {}", model.config.params(), shown(&planned), shown(&even));
    let mut cuts =
        [Cut::start("planned", &model, &devices, planned)?, Cut::start("even", &model, &devices, even)?];

    let answers = [cuts[0].run()?.answers, cuts[1].run()?.answers];
    ensure!(answers[0] == answers[1], "the cuts answer differently");
    let mut results = [vec![], vec![]];
    for _ in 0..runs {
        for (cut, results) in cuts.iter_mut().zip(&mut results) {
            results.push(cut.run()?);
        }
    }
    for (cut, results) in cuts.iter().zip(&results) {
        cut.report(&model, &costs, results);
    }
    report_gain(&model, &costs, &cuts, &results);
    Ok(())
}

/// Ultra's own blocks with smaller dimensions: widths follow from `ffn_mult`, KV heads from the group.
fn scaled_ultra(folder: &Path) -> Result<Model> {
    let ultra = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/models/Llama-3_1-Nemotron-Ultra-253B-v1");
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(ultra.join("config.json"))?)?;
    let scaled = [
        ("hidden_size", HIDDEN),
        ("num_attention_heads", HEADS),
        ("head_dim", HIDDEN / HEADS),
        ("vocab_size", VOCAB),
        ("max_position_embeddings", CONTEXT),
    ];
    for (key, value) in scaled {
        config[key] = json!(value);
    }
    config["eos_token_id"] = json!([]);
    std::fs::write(folder.join("config.json"), config.to_string())?;
    Ok(Model::open(folder, true)?.0)
}

fn profile(model: &Model, devices: &[Device]) -> Result<Measured> {
    let options = MeasureOptions {
        devices: devices.to_vec(),
        dtypes: DTYPES,
        context_tokens: CONTEXT,
        micro_batch_tokens: MICRO_BATCH_TOKENS,
        widths: vec![],
        free_bytes: 4 << 30,
        effort: Effort::default(),
    };
    let begun = Instant::now();
    let profile =
        measure(model, &options, &Missing::all_of(&model.config, &[]), &mut |line| println!("  {line}"))?;
    println!("profiled in {:.0} s", begun.elapsed().as_secs_f64());
    // No stage has several ranks here.
    let all_reduce = Channel { latency_seconds: 0.0, bytes_per_second: 1e9 };
    Ok(Measured::new(&model.config, &profile, Neighbours::Busy, TYPES, all_reduce)?)
}

/// The cut for the mean micro-batch: two stages have three in flight.
fn plan(model: &Model, costs: &Measured) -> Result<Vec<Span>> {
    let rows = (ROWS / (NUM_STAGES + 1)) as f64;
    let prompt = (PROMPT_TOKENS.start + PROMPT_TOKENS.end) as f64 / 2.0;
    let load = Load {
        decode_tokens: rows,
        decode_context: prompt + NEW_TOKENS as f64 / 2.0,
        prefill_tokens: rows * prompt / NEW_TOKENS as f64,
        prefill_context: prompt / 2.0,
        logit_rows: rows,
    };
    let pieces = pieces(&model.config, None);
    let hop_seconds = costs.hop_seconds(load);
    let device = StageDevice { kind: 0, memory_bytes: u64::MAX, hop_seconds, cut_hop_seconds: hop_seconds };
    let (devices, ends) = ([device; NUM_STAGES], vec![true; pieces.len()]);
    let costs = [vec![(1, costs.rank_costs(&pieces, 1, load))]];
    let problem = Problem::new(&devices, &ends, &costs);
    let stages = least_bottleneck_on_each(&problem, 0)?.context("memory is no limit")?;
    Ok(stages.iter().map(|stage| Span { start: stage.pieces.start, end: stage.pieces.end }).collect())
}

/// As many slots for each stage, empty ones counted.
fn even_split(model: &Model) -> Vec<Span> {
    let middle = model.config.num_slots / 2;
    let cut = model.config.blocks.partition_point(|block| block.slot < middle);
    vec![Span { start: 0, end: cut }, Span { start: cut, end: model.config.blocks.len() }]
}

/// What travels to a stage.
type Parcel = (Arc<MicroBatch>, Option<Activations>);

/// What a stage has to say of a micro-batch.
enum News {
    Loaded(Result<()>),
    Step { stage: usize, load: Load, seconds: f64 },
    Tokens(MicroBatchOutput),
}

/// A pipeline of loaded stages, each on a thread of its own.
struct Cut {
    name: &'static str,
    spans: Vec<Span>,
    first: Option<Sender<Parcel>>,
    news: Receiver<News>,
    threads: Vec<JoinHandle<()>>,
}

/// What one bulk has brought.
struct Ran {
    seconds: f64,
    /// Each micro-batch of each stage, with its time.
    steps: Vec<Vec<(Load, f64)>>,
    answers: BTreeMap<u128, Vec<TokenId>>,
}

impl Cut {
    fn start(name: &'static str, model: &Model, devices: &[Device], spans: Vec<Span>) -> Result<Self> {
        let (tell, news) = channel();
        let mut next = None;
        let mut threads = vec![];
        for (stage, (span, device)) in spans.iter().zip(devices).enumerate().rev() {
            let (sender, parcels) = channel();
            let options = SpanOptions {
                part: (*span).into(),
                num_pages: num_pages(),
                context_tokens: CONTEXT,
                largest_step: None,
            };
            let worker = Worker { stage, parcels, next: next.replace(sender), tell: tell.clone() };
            let (model, device) = (model.clone(), device.clone());
            threads.push(std::thread::spawn(move || worker.work(&model, &device, options)));
        }
        for _ in devices {
            if let News::Loaded(loaded) = news.recv()? {
                loaded?;
            }
        }
        Ok(Cut { name, spans, first: next, news, threads })
    }

    /// The whole bulk, from the first prompt to the last token.
    fn run(&mut self) -> Result<Ran> {
        let mut scheduler = Scheduler::new(options());
        for request in requests() {
            scheduler.submit(request, Generated::default())?;
        }
        let mut steps = vec![vec![]; NUM_STAGES];
        let mut answers = BTreeMap::new();
        let begun = Instant::now();
        while answers.len() < ROWS {
            while let Some(batch) = scheduler.next_micro_batch() {
                let first = self.first.as_ref().context("the pipeline has ended")?;
                first.send((Arc::new(batch), None)).map_err(|_| anyhow!("a stage has ended"))?;
            }
            match self.news.recv()? {
                News::Step { stage, load, seconds } => steps[stage].push((load, seconds)),
                News::Tokens(output) => {
                    for done in scheduler.complete(output, |_, _| false) {
                        answers.insert(done.request.key.0, done.generated.tokens);
                    }
                }
                News::Loaded(_) => {}
            }
        }
        Ok(Ran { seconds: begun.elapsed().as_secs_f64(), steps, answers })
    }

    /// Sum of the predicted times of a stage's micro-batches.
    fn predicted(&self, model: &Model, costs: &Measured, stage: usize, ran: &Ran) -> f64 {
        let pieces = pieces(&model.config, None);
        let seconds = |(load, _): &(Load, f64)| {
            costs.step_seconds(&pieces, self.spans[stage].range(), 1, &Sharing::default(), *load)
        };
        ran.steps[stage].iter().map(seconds).sum()
    }

    fn report(&self, model: &Model, costs: &Measured, results: &[Ran]) {
        let tokens = |ran: &Ran| (ROWS * NEW_TOKENS) as f64 / ran.seconds;
        let rates: Vec<f64> = results.iter().map(tokens).collect();
        println!("{} {}: {:.0} generated tokens/s (median)", self.name, shown(&self.spans), median(&rates));
        for stage in 0..NUM_STAGES {
            let measured: Vec<f64> = results.iter().map(|ran| busy(ran, stage)).collect();
            let predicted: Vec<f64> =
                results.iter().map(|ran| self.predicted(model, costs, stage, ran)).collect();
            let ratios: Vec<f64> = measured.iter().zip(&predicted).map(|(m, p)| m / p).collect();
            let list: Vec<String> = ratios.iter().map(|ratio| format!("{ratio:.3}")).collect();
            println!(
                "  stage {stage} {}: {:.3} s measured, {:.3} s predicted; measured / predicted {}, median {:.3}",
                self.spans[stage],
                median(&measured),
                median(&predicted),
                list.join(" "),
                median(&ratios)
            );
        }
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        self.first = None;
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

/// A stage's thread.
struct Worker {
    stage: usize,
    parcels: Receiver<Parcel>,
    next: Option<Sender<Parcel>>,
    tell: Sender<News>,
}

impl Worker {
    fn work(self, model: &Model, device: &Device, options: SpanOptions) {
        let mut stage = match stages::load(model, device, DTYPES, options) {
            Ok(stage) => stage,
            Err(error) => return drop(self.tell.send(News::Loaded(Err(error.into())))),
        };
        // Nobody hears any more when the bench has ended, and then neither are there parcels.
        let _ = self.tell.send(News::Loaded(Ok(())));
        for (batch, input) in &self.parcels {
            let begun = Instant::now();
            let output = stage.step(&batch, input).expect("the stage takes a step");
            let seconds = begun.elapsed().as_secs_f64();
            let _ = self.tell.send(News::Step { stage: self.stage, load: batch.load(), seconds });
            match (output, &self.next) {
                (StageOutput::Activations(values), Some(next)) => drop(next.send((batch, Some(values)))),
                (StageOutput::Tokens(output), None) => drop(self.tell.send(News::Tokens(output))),
                _ => panic!("stage {} is at the wrong place", self.stage),
            }
        }
    }
}

/// The ratio of both cuts' speeds, pair by pair, beside that of their slowest stages' predicted times.
fn report_gain(model: &Model, costs: &Measured, cuts: &[Cut; 2], results: &[Vec<Ran>; 2]) {
    let slowest = |cut: usize, run: usize| {
        let ran = &results[cut][run];
        let stages = (0..NUM_STAGES).map(|stage| cuts[cut].predicted(model, costs, stage, ran));
        stages.fold(0.0, f64::max)
    };
    let runs = results[0].len();
    let measured: Vec<f64> = (0..runs).map(|run| results[1][run].seconds / results[0][run].seconds).collect();
    let predicted: Vec<f64> = (0..runs).map(|run| slowest(1, run) / slowest(0, run)).collect();
    let list: Vec<String> = measured.iter().map(|ratio| format!("{ratio:.3}")).collect();
    let (measured, predicted) = (median(&measured), median(&predicted));
    println!(
        "planned / even, pair by pair: {}; median {measured:.3}, predicted {predicted:.3}, measured / predicted {:.3}",
        list.join(" "),
        measured / predicted
    );
}

fn busy(ran: &Ran, stage: usize) -> f64 {
    ran.steps[stage].iter().map(|(_, seconds)| seconds).sum()
}

fn num_pages() -> usize {
    ROWS * (PROMPT_TOKENS.end + NEW_TOKENS).div_ceil(PAGE_TOKENS)
}

fn options() -> Options {
    Options {
        num_stages: NUM_STAGES,
        micro_batch_tokens: MICRO_BATCH_TOKENS,
        max_sequences: ROWS,
        num_pages: num_pages(),
        num_lanes: 1,
        page_tokens: PAGE_TOKENS,
        context_tokens: CONTEXT,
        efficient_tokens: 8,
        num_memories: 1,
        feeds_back: false,
        is_ahead: false,
    }
}

/// The same prompts on every machine.
fn requests() -> Vec<Arc<Request>> {
    let mut state = 1_u64;
    let mut next = |bound: usize| {
        // Knuth's linear congruential generator.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % bound
    };
    let sampling = Arc::new(Sampling::greedy(NEW_TOKENS as u32));
    (0..ROWS)
        .map(|row| {
            let tokens = PROMPT_TOKENS.start + next(PROMPT_TOKENS.len());
            let prompt = (0..tokens).map(|_| next(VOCAB) as TokenId).collect();
            let key = RequestKey(row as u128);
            Arc::new(Request { key, prompt, sampling: Arc::clone(&sampling), sample: 0 })
        })
        .collect()
}

fn shown(spans: &[Span]) -> String {
    spans.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}
