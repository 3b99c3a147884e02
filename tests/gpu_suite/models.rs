//! How many tokens a second do whole models, and real blocks of Ultra, prefill and decode with random weights, and how near is
//! that to the roofline?

use std::ops::Range;

use anyhow::{Context, Result};
use kernels::Cuda;
use serde_json::{Value, json};
use stages::profile::{Effort, Rate, Throughput, ThroughputOptions, throughput};
use stages::{Device, Dtypes, KvDtype, Model, WeightType};

use crate::bars;
use crate::items::Setting;

const ULTRA: &str = include_str!("../../configs/models/Llama-3_1-Nemotron-Ultra-253B-v1/config.json");
const SUPER: &str = include_str!("../../configs/models/Llama-3_3-Nemotron-Super-49B-v1/config.json");
/// Few words, where blocks alone are asked for.
const SHORT_VOCABULARY: usize = 256;

/// A model, or blocks of one, and how they are run.
pub(crate) struct Measured {
    pub(crate) name: &'static str,
    /// What it is to reach.
    pub(crate) bar: &'static str,
    /// That it needs at least, and that it has at most.
    pub(crate) seconds: [u64; 2],
    config: &'static str,
    /// Slots of the checkpoint, with few words, or all.
    slots: Option<Range<usize>>,
    pub(crate) weights: WeightType,
    pub(crate) kv: KvDtype,
    context_tokens: usize,
    batches: &'static [usize],
    /// What its decoding is held against.
    least: Option<Least>,
}

/// The least that decoding is to reach.
#[derive(Debug, Clone, Copy)]
enum Least {
    RooflineShare(f64),
    TokensPerSecond(f64),
}

impl Least {
    /// The verdict, as the end of a line. A share of what is not the device's ceiling meets no bar.
    fn on(self, decode: &Rate, has_ceiling: bool) -> &'static str {
        bars::verdict(match self {
            Least::RooflineShare(least) => has_ceiling && decode.roofline_share >= least,
            Least::TokensPerSecond(least) => decode.tokens_per_second >= least,
        })
    }
}

/// Why the fastest products on this device are not those of a library, by which its ceiling was then not measured either.
pub(crate) fn own_products(gpu: &Cuda, weights: WeightType) -> Option<String> {
    let of_int4 = || (weights == WeightType::Int4Weight).then_some("no library has those of 4 bits");
    gpu.own_products().or_else(of_int4).map(str::to_owned)
}

/// What a line ends with whose ceiling is of such products.
pub(crate) fn own_ceiling(why: Option<&str>) -> String {
    why.map_or_else(String::new, |why| format!("; products, the ceiling's too, by our own kernel: {why}"))
}

pub(crate) fn of(setting: &Setting) -> Vec<Measured> {
    let bf16 = WeightType::Bf16;
    let kv_in_fp8 = |measured| Measured { kv: KvDtype::Fp8, ..measured };
    let model = |name, bar, seconds, config, weights, context_tokens, batches| Measured {
        name,
        bar,
        seconds,
        config,
        slots: None,
        weights,
        kv: KvDtype::Bf16,
        context_tokens,
        batches,
        least: None,
    };
    if setting.is_small {
        let blocks = |name, weights| Measured {
            slots: Some(0..2),
            ..model(name, "none", [1, 60], ULTRA, weights, 20, &[2])
        };
        return vec![
            blocks("two small blocks", bf16),
            kv_in_fp8(blocks("two small blocks, fp8 with keys and values in fp8", WeightType::Fp8)),
        ];
    }
    // In the middle of 256 tokens after 512.
    let bulk = 640;
    vec![
        Measured {
            slots: Some(43..63),
            least: Some(Least::RooflineShare(0.7)),
            ..model(
                "Ultra's slots 43 to 62, bf16",
                "decode 70 % of the roofline, which is 17.8 and 24.8 ms at 790 TFLOP/s; aim 85 %",
                [40, 120],
                ULTRA,
                bf16,
                2048,
                &[184, 256],
            )
        },
        kv_in_fp8(Measured {
            least: Some(Least::TokensPerSecond(500.0)),
            ..model(
                "Ultra-253B, int4 with keys and values in fp8",
                "runs; decode 500 tokens/s; aim 1,000",
                [60, 180],
                ULTRA,
                WeightType::Int4Weight,
                1024,
                &[64],
            )
        }),
        model("Super-49B, bf16", "none, see the bulk job", [40, 120], SUPER, bf16, bulk, &[256]),
        kv_in_fp8(model(
            "Super-49B, fp8 with keys and values in fp8",
            "none, see the bulk job",
            [40, 120],
            SUPER,
            WeightType::Fp8,
            bulk,
            &[256],
        )),
    ]
}

/// Those that run a whole job.
pub(crate) fn for_bulk(setting: &Setting) -> Vec<Measured> {
    let job = |name, weights, kv| Measured {
        name,
        bar: "65 % of the ceiling; aim 80 %",
        seconds: [60, 170],
        config: SUPER,
        slots: setting.is_small.then_some(0..2),
        weights,
        kv,
        context_tokens: 0,
        batches: &[],
        least: None,
    };
    let bf16 = job("Super-49B, bf16, a bulk job", WeightType::Bf16, KvDtype::Bf16);
    match setting.is_small {
        true => vec![bf16],
        false => {
            vec![bf16, job("Super-49B, fp8 with keys and values, a bulk job", WeightType::Fp8, KvDtype::Fp8)]
        }
    }
}

/// A line for each batch.
pub(crate) fn measure(measured: &Measured, setting: &Setting) -> Result<Vec<String>> {
    let (model, device) = (open(measured, setting)?, device(setting));
    let effort = match setting.is_small {
        true => Effort { point_seconds: 0.0, least_repeats: 1 },
        false => Effort { point_seconds: 0.5, ..Effort::default() },
    };
    let mut options = ThroughputOptions {
        device,
        dtypes: Dtypes { weights: measured.weights, kv: measured.kv },
        context_tokens: measured.context_tokens,
        micro_batch_tokens: if setting.is_small { 32 } else { 2048 },
        batches: measured.batches.to_vec(),
        most_pages: None,
        effort,
    };
    let gpu = setting.cuda(measured.weights, measured.kv, false)?;
    let own_products = own_products(&gpu, measured.weights);
    let multiprocessors = gpu.gpu().multiprocessors as usize;
    options.most_pages = Some(options.pages_in(&model, gpu.free_bytes()?, multiprocessors));
    drop(gpu);
    let begun = std::time::Instant::now();
    let mut lines = Vec::new();
    let mut say = |what: &str| eprintln!("{what} after {:.1} s", begun.elapsed().as_secs_f64());
    throughput(&model, &options, &mut say, &mut |found| {
        lines.push(line(found, measured, own_products.as_deref()));
    })?;
    Ok(lines)
}

/// The model with random weights.
pub(crate) fn open(measured: &Measured, setting: &Setting) -> Result<Model> {
    let folder = setting.cache.join(format!("model-{}", std::process::id()));
    std::fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    std::fs::write(folder.join("config.json"), config(measured, setting)?.to_string())?;
    Ok(Model::open(&folder, true)?.0)
}

/// The GPU, where a row's bits may depend on its batch: as fast as it goes.
pub(crate) fn device(setting: &Setting) -> Device {
    Device::Cuda {
        index: 0,
        libraries: setting.libraries.clone(),
        cubins: Some(setting.cache.clone()),
        is_deterministic: false,
        has_graphs: true,
    }
}

/// The same as jobs have it unless they say otherwise: a row's bits do not depend on its batch.
pub(crate) fn device_of_jobs(setting: &Setting) -> Device {
    match device(setting) {
        Device::Cuda { index, libraries, cubins, has_graphs, .. } => {
            Device::Cuda { index, libraries, cubins, is_deterministic: true, has_graphs }
        }
        other => other,
    }
}

/// Some of Super's blocks, which fit twice.
pub(crate) fn for_steps(setting: &Setting) -> Measured {
    Measured {
        name: "Super's slots 0 to 19, bf16, as one stage and as two",
        bar: "a step's thread below 5 % of it; two stages within 3 % of one, queued alike",
        seconds: [15, 60],
        config: SUPER,
        slots: Some(if setting.is_small { 0..2 } else { 0..20 }),
        weights: WeightType::Bf16,
        kv: KvDtype::Bf16,
        context_tokens: 2048,
        batches: &[],
        least: None,
    }
}

fn line(found: &Throughput, measured: &Measured, own_products: Option<&str>) -> String {
    let rate = |rate: &Rate| {
        format!(
            "{:.2} ms, {:.0} tokens/s, {:.1} % of the roofline",
            rate.seconds.median * 1e3,
            rate.tokens_per_second,
            100.0 * rate.roofline_share
        )
    };
    let verdict = |least: Least| format!(", {}", least.on(&found.decode, own_products.is_none()));
    let verdict = measured.least.map_or_else(String::new, verdict);
    format!(
        "{} rows at {} tokens: decode {}{verdict}; prefill {}{}",
        found.batch,
        measured.context_tokens,
        rate(&found.decode),
        rate(&found.prefill),
        own_ceiling(own_products)
    )
}

/// The model's config with what is asked for of it.
fn config(measured: &Measured, setting: &Setting) -> Result<Value> {
    let mut config: Value = serde_json::from_str(measured.config).context("read config.json")?;
    if let Some(slots) = &measured.slots {
        let blocks = config["block_configs"].as_array().context("no block_configs")?[slots.clone()].to_vec();
        config["num_hidden_layers"] = json!(blocks.len());
        config["block_configs"] = json!(blocks);
        config["vocab_size"] = json!(SHORT_VOCABULARY);
        config["eos_token_id"] = json!([]);
    }
    if setting.is_small {
        for (key, value) in [("hidden_size", 64), ("num_attention_heads", 16), ("head_dim", 16)] {
            config[key] = json!(value);
        }
    }
    Ok(config)
}
