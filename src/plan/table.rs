//! A plan as people read it.

use crate::plan::missing::{Missing, Nearest};
use crate::plan::report::{Found, Report, StagePart};
use crate::plan::setting::Setting;
use crate::text::grouped;

pub(crate) fn lines(setting: &Setting, report: &Report) -> Vec<String> {
    let mut lines = vec![];
    let model = &report.model;
    lines.push(format!(
        "model      {} parameters in {} blocks of {} slots, {} with {} KV",
        grouped(model.params),
        model.blocks,
        model.slots,
        report.dtype,
        report.kv_cache_dtype
    ));
    lines.extend(work_lines(setting, report));
    if let Some(missing) = &report.missing {
        lines.extend(missing_lines(report, missing));
    }
    if let Some(found) = &report.found {
        lines.extend(found_lines(report, found));
    }
    lines.push(match report.estimate {
        true => "estimate   by the devices' rooflines: nothing here was measured".to_owned(),
        false => "measured   times are those of the profile, the rest follows from shapes".to_owned(),
    });
    lines
}

/// What is planned for.
fn work_lines(setting: &Setting, report: &Report) -> Vec<String> {
    let whole = |tokens: f64| grouped(tokens.round() as u64);
    let (prompt, output) = (whole(setting.mix.prompt_tokens), whole(setting.mix.output_tokens));
    let Some(read) = setting.work.read else {
        let devices = &report.devices;
        return vec![format!(
            "job        prompts of {prompt} tokens, {output} generated for each, on {devices}"
        )];
    };
    let lengths = &setting.work.lengths;
    let at = |share| grouped(lengths.prompt_quantile(share));
    let mut lines = vec![format!(
        "job        {} rows, {} of them looked at and {} refused, on {}",
        grouped(read.rows),
        grouped(read.looked_at),
        grouped(read.refused + read.too_long),
        report.devices
    )];
    lines.push(match read.is_prompt_given {
        true => format!("prompts    {prompt} tokens each, as [plan] says"),
        false => format!(
            "prompts    {prompt} tokens on average, half of them up to {}, 95 % up to {}, the longest {}",
            at(0.5),
            at(0.95),
            at(1.0)
        ),
    });
    lines.push(match read.is_output_given {
        true => format!("outputs    {output} tokens on average, as [plan] says and max_tokens allow"),
        false => format!(
            "outputs    every row at its max_tokens, an upper bound: {output} on average; [plan] output_tokens would say \
             what to expect"
        ),
    });
    lines
}

fn missing_lines(report: &Report, missing: &Missing) -> Vec<String> {
    let mut lines = vec![format!(
        "does not fit: {} are missing, {} on each of {}",
        gigabytes(missing.bytes),
        gigabytes(missing.bytes_per_device),
        report.devices
    )];
    for nearest in &missing.nearest {
        lines.push(match nearest {
            Nearest::TokensInFlight(tokens) => {
                format!("fits with  --set plan.tokens_in_flight={tokens}")
            }
            Nearest::Dtype(dtype) => format!("fits with  --dtype {dtype}"),
            Nearest::Devices(devices) => format!("fits with  --devices {devices}"),
        });
    }
    if missing.nearest.is_empty() {
        lines.push("no narrower type and no 16 times as many devices would do".to_owned());
    }
    lines
}

fn found_lines(report: &Report, found: &Found) -> Vec<String> {
    let mut lines = vec![];
    if found.replicas > 1 {
        lines
            .push(format!("replicas   {}, each with a part of the rows; the first of them:", found.replicas));
    }
    lines.push(format!(
        "{:<5} {:<9} {:<11} {:<16} {:>7} {:>8} {:>8} {:>8} {:>10} {:>8} {:>8} {:>8}",
        "stage",
        "blocks",
        "slots",
        "devices",
        "params",
        "weights",
        "KV",
        "free",
        "KV tokens",
        "prefill",
        "decode",
        "mix"
    ));
    lines.extend(found.stages.iter().enumerate().flat_map(|(idx, stage)| stage_lines(idx, stage)));
    if found.stages.iter().any(|stage| stage.pass > 0) {
        lines.push(
            "devices are passed twice: free and KV tokens are what both stages of a device leave".to_owned(),
        );
    }
    lines.push(format!(
        "micro-batch of {} rows, {} tokens of KV in flight{}",
        grouped(found.micro_batch_rows),
        grouped(found.tokens_in_flight),
        if found.replicas > 1 { ", in each replica" } else { "" }
    ));
    lines.push(format!("speed      {} generated tokens/s", grouped(found.tokens_per_second.round() as u64)));
    lines.push(format!(
        "balance    slowest over mean {:.3} by {}, bubble {:.1} %; blocks alone {:.4}",
        found.bottleneck_over_mean,
        report.cost,
        found.bubble * 100.0,
        found.blocks_only.bottleneck_over_mean
    ));
    let even = &found.even_split;
    lines.push(format!(
        "even split slowest over mean {:.3}, blocks alone {:.4}: {}",
        even.bottleneck_over_mean,
        found.blocks_only.even_split,
        beside(even.tokens_per_second, even.ratio)
    ));
    match &found.uniform_tp {
        Some(uniform) => lines.push(format!(
            "uniform TP all {} devices on every block: {}",
            uniform.tensor_parallel,
            beside(uniform.tokens_per_second, uniform.ratio)
        )),
        None => lines.push("uniform TP not for these devices: unlike, or no divisor of the heads".to_owned()),
    }
    if let Some(rows @ 1..) = found.job.rows_that_cannot_fit {
        lines.push(format!(
            "too long   {} rows, for the context or for what the fullest stage has room for",
            grouped(rows)
        ));
    }
    lines.extend(job_line(found));
    lines
}

/// Another layout's speed, and the plan's beside it.
pub(crate) fn beside(tokens_per_second: Option<f64>, ratio: Option<f64>) -> String {
    match tokens_per_second.zip(ratio) {
        Some((speed, ratio)) if ratio < 1.0 => {
            let (speed, better) = (grouped(speed.round() as u64), 1.0 / ratio);
            format!("{speed} tokens/s, {better:.2} times as fast as the plan: take it")
        }
        Some((speed, ratio)) => {
            format!("{} tokens/s, the plan is {ratio:.2} times as fast", grouped(speed.round() as u64))
        }
        None => "does not fit".to_owned(),
    }
}

/// The devices of a stage, as `h200:0` or `h200:0-3`.
pub(crate) fn device_range(devices: &[String]) -> String {
    match devices {
        [one] => one.clone(),
        [first, .., last] => format!("{first}-{}", last.rsplit(':').next().unwrap_or(last)),
        [] => String::new(),
    }
}

fn stage_lines(idx: usize, stage: &StagePart) -> Vec<String> {
    let devices = device_range(&stage.devices);
    let ms = |ms: f64| format!("{ms:.1} ms");
    let mut lines = vec![format!(
        "{idx:<5} {:<9} {:<11} {devices:<16} {:>7} {:>8} {:>8} {:>8} {:>10} {:>8} {:>8} {:>8}",
        format!("[{}, {})", stage.blocks[0], stage.blocks[1]),
        format!("[{}, {})", stage.slots[0], stage.slots[1]),
        format!("{:.1} B", stage.params as f64 / 1e9),
        gigabytes(stage.memory.weights),
        gigabytes(stage.memory.kv),
        gigabytes(stage.memory.free),
        stage.kv_tokens.map_or("-".to_owned(), grouped),
        ms(stage.time_ms.prefill),
        ms(stage.time_ms.decode),
        ms(stage.time_ms.mix),
    )];
    lines.extend(stage.columns.iter().map(|cut| {
        format!("      of block {} columns [{}, {}) of {}", cut.block, cut.start, cut.end, cut.of)
    }));
    lines
}

fn job_line(found: &Found) -> Option<String> {
    let job = &found.job;
    let (rows, hours, [_, longest]) = (job.rows?, job.hours?, job.interval.hours?);
    let cost = match job.cost.zip(job.interval.cost) {
        Some((cost, [_, dearest])) => format!(", costs {cost:.2} to {dearest:.2}"),
        None => String::new(),
    };
    Some(format!(
        "{} rows   {hours:.2} to {longest:.2} hours, {:.1} device-hours at best{cost}",
        grouped(rows),
        job.device_hours?
    ))
}

pub(crate) fn gigabytes(bytes: u64) -> String {
    format!("{:.1} GB", bytes as f64 / 1e9)
}
