//! One FFN is eight times the others, and there are two devices: what do a column cut and a stage of two ranks bring over
//! whole blocks, and do micro-batches take what the plan predicts?
//!
//! The model: two blocks, a fused FFN of 12,288 columns, two blocks; hidden 512, random weights, each device one pinned
//! core. Blocks are profiled; the planner cuts whole blocks, and columns, by that. Micro-batches of 64 rows decode at a
//! context of 64. The clock starts when a pipeline is full and its arrays have their sizes, as the plan's figure is that of a job's middle;
//! beside it stands what each stage was in its steps, and what ranks spent in collectives, waiting for each other counted. All layouts must draw the same tokens but for the ranks' rounding, which may turn a few.
//! Ranks are threads, which is what is profiled, and once more processes that meet by TCP, as `[pipeline] ranks` has them: these
//! stand beside the same prediction, as a plan takes them for threads.
//!
//! `cargo bench --bench wide_ffn [-- RUNS]`, with nothing else running; about three minutes.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "a bench prints")]

mod common;
#[path = "common/decoding.rs"]
mod decoding;
#[path = "wide_ffn/ranks.rs"]
mod ranks;

use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use common::median;
use decoding::Decoding;
use ranks::Home;
use scheduler::{
    Load, MicroBatch, Problem, StageDevice, TokenId, least_bottleneck, least_bottleneck_on_each,
};
use serde_json::{Value, json};
use stages::cost::{Channel, CostModel, Measured, NumberType, NumberTypes, PieceShape, pieces};
use stages::profile::{Effort, MeasureOptions, Missing, Neighbours, Profile, TokenPoint, measure};
use stages::{
    Activations, Alike, Device, Dtypes, KvDtype, Model, Part, SUM_CUT, Sharing, Simd, SpanOptions,
    StageOutput, WeightType, available_cores,
};

const HIDDEN: usize = 512;
const VOCAB: usize = 2048;
const FFN: usize = 1536;
const ROWS: usize = 64;
const CONTEXT: usize = 64;
/// Micro-batches of a run, and those in flight with two stages.
const STEPS: u64 = 60;
/// Micro-batches that are over when the clock starts.
const WARM_UP: usize = 5;
const IN_FLIGHT: usize = 3;

const DTYPES: Dtypes = Dtypes { weights: WeightType::Bf16, kv: KvDtype::Bf16 };
const TYPES: NumberTypes = NumberTypes { weights: NumberType::Bf16, kv: NumberType::Bf16 };
/// Of ranks of a number that is not profiled: there are none.
const NO_TIME: Channel = Channel { latency_seconds: 0.0, bytes_per_second: 1e30 };

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let Some(of_rank) = ranks::asked_to_follow(&args) {
        return ranks::follow(of_rank);
    }
    let runs = args.iter().find_map(|arg| arg.parse().ok()).unwrap_or(9);
    let folder = tempfile::tempdir()?;
    let model = model(folder.path())?;
    let cores = available_cores();
    ensure!(cores.len() >= 2, "2 cores are needed, found {}", cores.len());
    let devices: Vec<Device> = cores[..2].iter().map(|core| device(*core)).collect();
    let profile = profile(&model, &devices)?;
    let pair = profile.shared(2).context("two ranks are profiled")?;
    let at_rows = |points: &[TokenPoint]| {
        points.iter().find(|point| point.tokens == ROWS).map(|point| point.seconds.median * 1e6)
    };
    println!(
        "[{ROWS}, {HIDDEN}] in f32 between two ranks: all-reduce {:.1} us, all-gather of columns {:.1} us, broadcast {:.1} us",
        at_rows(&pair.all_reduce).context("so many rows are profiled")?,
        at_rows(&pair.all_gather).context("so many rows are profiled")?,
        at_rows(&pair.broadcast).context("so many rows are profiled")?
    );
    let costs = Measured::new(&model.config, &profile, Neighbours::Busy, TYPES, NO_TIME)?;
    let load = micro_batch(0).load();

    let whole = plan(&model, &costs, load, false)?;
    let cut = plan(&model, &costs, load, true)?;
    let sharing = costs.sharing(&pieces(&model.config, None), 2, load);
    let alone = |name, parts| Layout { name, parts, ranks: None, sharing: Sharing::default() };
    let shared =
        |name, home| Layout { name, parts: vec![all(&model)], ranks: Some(home), sharing: sharing.clone() };
    let layouts = [
        alone("whole blocks", whole),
        alone("column cut", cut),
        shared("two ranks", Home::Threads),
        shared("two processes", Home::Processes),
    ];
    let run = |layout: &Layout| layout.run(&model, folder.path(), &devices);
    let expected = run(&layouts[0])?.1;
    for layout in &layouts[1..] {
        let found = run(layout)?.1;
        let turned = found.iter().zip(&expected).filter(|(found, expected)| found != expected).count();
        ensure!(layout.ranks.is_some() || turned == 0, "{}: {turned} tokens differ", layout.name);
        ensure!(
            turned <= expected.len() / 50,
            "{}: {turned} of {} tokens differ",
            layout.name,
            expected.len()
        );
    }
    let mut times = layouts.each_ref().map(|_| vec![]);
    for _ in 0..runs {
        for (layout, times) in layouts.iter().zip(&mut times) {
            times.push(run(layout)?.0);
        }
    }
    let of_micro_batch = |times: &[Times]| times.iter().map(|times| times.micro_batch).collect::<Vec<_>>();
    let base = median(&of_micro_batch(&times[0]));
    for (layout, times) in layouts.iter().zip(&times) {
        let seconds = of_micro_batch(times);
        let stages = layout.predicted(&model, &costs, load);
        let (measured, predicted) = (median(&seconds), stages.iter().copied().fold(0.0, f64::max));
        println!(
            "{:<13} {:.3} ms a micro-batch ({:.3} to {:.3}), predicted {:.3} ms, measured / predicted {:.3}; {:.2} times as fast as whole blocks: {}",
            layout.name,
            1e3 * measured,
            1e3 * seconds.iter().copied().fold(f64::INFINITY, f64::min),
            1e3 * seconds.iter().copied().fold(0.0, f64::max),
            1e3 * predicted,
            measured / predicted,
            base / measured,
            layout.parts.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "),
        );
        for (stage, predicted) in stages.into_iter().enumerate() {
            let steps: Vec<f64> = times.iter().map(|times| times.steps[stage]).collect();
            println!(
                "    stage {stage}: {:.3} ms in a step, predicted {:.3} ms, measured / predicted {:.3}",
                1e3 * median(&steps),
                1e3 * predicted,
                median(&steps) / predicted
            );
        }
        for Alike { half, how, blocks } in layout.sharing.exceptions().alike() {
            println!("    {half} of {blocks:?} {how}");
        }
        for rank in 0..times[0].collectives.len() {
            let of_rank = |run: &Times| run.collectives[rank].as_secs_f64() / STEPS as f64;
            let seconds: Vec<f64> = times.iter().map(of_rank).collect();
            println!("    rank {rank}: {:.3} ms of a step in collectives", 1e3 * median(&seconds));
        }
    }
    Ok(())
}

fn model(folder: &Path) -> Result<Model> {
    let block = |has_attention: bool, width: usize| {
        json!({
            "attention": {"n_heads_in_group": has_attention.then_some(4), "no_op": !has_attention, "replace_with_linear": false},
            "ffn": {"intermediate_size": width, "no_op": false, "replace_with_linear": false},
        })
    };
    let blocks: Vec<Value> = [(true, FFN), (true, FFN), (false, 8 * FFN), (true, FFN), (true, FFN)]
        .map(|(has_attention, width)| block(has_attention, width))
        .to_vec();
    let config = json!({
        "architectures": ["DeciLMForCausalLM"], "model_type": "nemotron-nas", "hidden_act": "silu",
        "hidden_size": HIDDEN, "num_attention_heads": 8, "num_hidden_layers": blocks.len(), "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "rope_scaling": null, "tie_word_embeddings": false, "vocab_size": VOCAB,
        "max_position_embeddings": 256, "eos_token_id": [], "block_configs": blocks,
        "attention_bias": false, "mlp_bias": false,
    });
    std::fs::write(folder.join("config.json"), config.to_string())?;
    Ok(Model::open(folder, true)?.0)
}

fn device(core: usize) -> Device {
    Device::Cpu { cores: vec![core], threads: 1, simd: Simd::detect() }
}

/// All blocks, as one stage.
fn all(model: &Model) -> Part {
    scheduler::Span { start: 0, end: model.config.blocks.len() }.into()
}

fn profile(model: &Model, devices: &[Device]) -> Result<Profile> {
    let options = MeasureOptions {
        devices: devices.to_vec(),
        dtypes: DTYPES,
        context_tokens: 256,
        micro_batch_tokens: ROWS,
        widths: vec![2],
        free_bytes: 4 << 30,
        effort: Effort::default(),
    };
    let begun = Instant::now();
    let profile = measure(model, &options, &Missing::all_of(&model.config, &options.widths), &mut |_| {})?;
    println!("profiled in {:.0} s", begun.elapsed().as_secs_f64());
    Ok(profile)
}

/// The best cut into two stages.
fn plan(model: &Model, costs: &Measured, load: Load, column_cuts: bool) -> Result<Vec<Part>> {
    let pieces = pieces(&model.config, column_cuts.then_some(SUM_CUT));
    let hop_seconds = costs.hop_seconds(load);
    let device =
        StageDevice { kind: 0, memory_bytes: u64::MAX, hop_seconds, cut_hop_seconds: 2.0 * hop_seconds };
    let ends: Vec<bool> = pieces.iter().map(|piece| piece.ends_block).collect();
    let (devices, costs) = ([device; 2], [vec![(1, costs.rank_costs(&pieces, 1, load))]]);
    let problem = Problem::new(&devices, &ends, &costs);
    let stages = match column_cuts {
        true => least_bottleneck(&problem, 0, 2).context("memory is no limit")?,
        false => least_bottleneck_on_each(&problem, 0)?.context("memory is no limit")?,
    };
    Ok(stages.iter().map(|stage| part(&pieces[stage.pieces.clone()])).collect())
}

fn part(pieces: &[PieceShape]) -> Part {
    let (first, last) = (&pieces[0], &pieces[pieces.len() - 1]);
    let columns = |piece: &PieceShape| piece.columns.clone().unwrap_or(0..0);
    Part {
        blocks: scheduler::Span { start: first.block, end: last.block + 1 },
        first_column: columns(first).start,
        end_column: (!last.ends_block).then_some(columns(last).end),
    }
}

struct Layout {
    name: &'static str,
    parts: Vec<Part>,
    /// Where two ranks of a single stage run; nothing of stages of one device each.
    ranks: Option<Home>,
    /// How the ranks share blocks.
    sharing: Sharing,
}

/// Seconds of a run.
struct Times {
    /// From answer to answer, on average.
    micro_batch: f64,
    /// In a step of each stage, medians.
    steps: Vec<f64>,
    /// Of each rank of several, in all steps.
    collectives: Vec<Duration>,
}

type Parcel = (Arc<MicroBatch>, Option<Activations>);

impl Layout {
    /// Times, and the tokens that all micro-batches draw. The model is in `folder`.
    fn run(&self, model: &Model, folder: &Path, devices: &[Device]) -> Result<(Times, Vec<TokenId>)> {
        match self.ranks {
            None => Ok(self.run_stages(model, devices)),
            Some(Home::Threads) => Ok(ranks::in_threads(model, devices, &self.sharing)),
            Some(Home::Processes) => ranks::in_processes((model, folder), devices, &self.sharing),
        }
    }

    fn run_stages(&self, model: &Model, devices: &[Device]) -> (Times, Vec<TokenId>) {
        let loaded = Barrier::new(self.parts.len() + 1);
        std::thread::scope(|scope| {
            let (tell, tokens): (Sender<Vec<TokenId>>, Receiver<Vec<TokenId>>) = channel();
            let mut next: Option<Sender<Parcel>> = None;
            let mut threads = Vec::new();
            for (part, device) in self.parts.iter().zip(devices).rev() {
                let (sender, parcels) = channel::<Parcel>();
                let (next, tell, loaded) = (next.replace(sender), tell.clone(), &loaded);
                threads.push(scope.spawn(move || {
                    let mut stage = stages::load(model, device, DTYPES, options(*part)).expect("it loads");
                    let mut steps = Vec::new();
                    loaded.wait();
                    for (batch, input) in parcels {
                        let begun = Instant::now();
                        let output = stage.step(&batch, input).expect("a step");
                        steps.push(begun.elapsed().as_secs_f64());
                        match output {
                            StageOutput::Activations(values) => {
                                let next = next.as_ref().expect("not the last");
                                next.send((batch, Some(values))).expect("the next stage is there");
                            }
                            StageOutput::Tokens(output) => {
                                let drawn = output.slices.iter().filter_map(|slice| slice.token).collect();
                                tell.send(drawn).expect("the bench is there");
                            }
                        }
                    }
                    median(&steps)
                }));
            }
            let first = next.expect("there is a stage");
            loaded.wait();
            let mut begun = Instant::now();
            let mut drawn = Vec::new();
            for id in 0..STEPS + IN_FLIGHT as u64 {
                if id < STEPS {
                    first.send((Arc::new(micro_batch(id)), None)).expect("the first stage is there");
                }
                if id >= IN_FLIGHT as u64 {
                    drawn.extend(tokens.recv().expect("a micro-batch comes back"));
                }
                if drawn.len() == WARM_UP * ROWS {
                    begun = Instant::now();
                }
            }
            let micro_batch = begun.elapsed().as_secs_f64() / (STEPS as usize - WARM_UP) as f64;
            drop(first);
            let steps = threads.into_iter().rev().map(|thread| thread.join().expect("a stage ends"));
            (Times { micro_batch, steps: steps.collect(), collectives: Vec::new() }, drawn)
        })
    }

    /// Each stage's time, by the profile.
    fn predicted(&self, model: &Model, costs: &Measured, load: Load) -> Vec<f64> {
        let mut cut = Vec::new();
        let mut runs = Vec::new();
        for part in &self.parts {
            let start = cut.len();
            for block in part.blocks.range() {
                let first = if block == part.blocks.start { part.first_column } else { 0 };
                let end = part.end_column.filter(|_| block + 1 == part.blocks.end);
                let stages::Ffn::SwiGlu { width } = model.config.blocks[block].ffn else { continue };
                let columns = Some(first..end.unwrap_or(width));
                cut.push(PieceShape { block, columns, ends_block: end.is_none() });
            }
            runs.push(start..cut.len());
        }
        let ranks = if self.ranks.is_some() { 2 } else { 1 };
        runs.into_iter().map(|run| costs.step_seconds(&cut, run, ranks, &self.sharing, load)).collect()
    }
}

fn options(part: Part) -> SpanOptions {
    SpanOptions { part, num_pages: ROWS * 2, context_tokens: 256, largest_step: None }
}

/// What a row's cache holds is written anew or zero.
fn micro_batch(id: u64) -> MicroBatch {
    let decoding = Decoding { rows: ROWS, context: CONTEXT, pages_of_row: 2 };
    decoding.micro_batch(id, |row| ((id as usize * 31 + row * 7) % VOCAB) as TokenId)
}
