//! A plan as people read it.

use stages::Alike;

use crate::cli::LengthsArg;
use crate::plan::missing::{Missing, Nearest};
use crate::plan::report::{Found, Report, StagePart};
use crate::plan::setting::Setting;
use crate::text::{self, bytes, grouped, rate, short};

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
        lines.extend(found_lines(setting, report, found));
    }
    if let Some(why) = &report.not_run {
        lines.push(format!("not run    {why}"));
    }
    lines.push(source_line(setting, report));
    lines
}

/// Where times come from.
fn source_line(setting: &Setting, report: &Report) -> String {
    if report.estimate {
        let measure = setting.to_measure.as_ref().map_or(String::new(), |how| format!("; {how}"));
        return format!("estimate   by the devices' rooflines: nothing here was measured{measure}");
    }
    let basis = match report.found.as_ref().and_then(|found| found.basis) {
        Some("measured") | None => String::new(),
        Some(basis) => format!(", {basis}"),
    };
    format!("measured   times are those of the profile{basis}, the rest follows from shapes")
}

/// What is planned for.
fn work_lines(setting: &Setting, report: &Report) -> Vec<String> {
    let whole = |tokens: f64| grouped(tokens.round() as u64);
    let (prompt, output) = (whole(setting.mix.prompt_tokens), whole(setting.mix.output_tokens));
    let Some(read) = setting.work.read else {
        let devices = &report.devices;
        let spread = match setting.lengths {
            LengthsArg::Fixed => "for each".to_owned(),
            spread => format!("on average, {}", spread.name()),
        };
        return vec![format!(
            "job        prompts of {prompt} tokens, {output} generated {spread}, on {devices}"
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
        bytes(missing.bytes),
        bytes(missing.bytes_per_device),
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

fn found_lines(setting: &Setting, report: &Report, found: &Found) -> Vec<String> {
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
        "micro-batch of {}, {} tokens of KV in flight{}",
        micro_batch(found),
        grouped(found.tokens_in_flight),
        if found.replicas > 1 { ", in each replica" } else { "" }
    ));
    if found.max_sequences > setting.max_sequences {
        lines.push(format!(
            "set        max_sequences = {} under [pipeline]: with {} a run has fewer rows in flight, and is slower",
            found.max_sequences,
            grouped(setting.max_sequences)
        ));
    }
    lines.push(format!("speed      {} generated tokens/s", rate(found.tokens_per_second)));
    // A lone device has nothing to share out.
    let are_several = found.uniform_tp.as_ref().is_none_or(|uniform| uniform.tensor_parallel > 1);
    if are_several {
        lines.push(balance_line(report, found));
    }
    if let Some(given) = &found.given_stages {
        let (over_mean, beside) = (given.bottleneck_over_mean, beside(given.tokens_per_second, given.ratio));
        lines.push(format!("own stages slowest over mean {over_mean:.3}: {beside}"));
    }
    if are_several {
        lines.extend(comparison_lines(found));
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

/// How even the plan is.
fn balance_line(report: &Report, found: &Found) -> String {
    format!(
        "balance    slowest over mean {:.3} by {}, bubble {:.1} %; blocks alone {:.4}",
        found.bottleneck_over_mean,
        report.cost,
        found.bubble * 100.0,
        found.blocks_only.bottleneck_over_mean
    )
}

/// What the devices would do otherwise.
fn comparison_lines(found: &Found) -> [String; 2] {
    let even = &found.even_split;
    let even = format!(
        "even split slowest over mean {:.3}, blocks alone {:.4}: {}",
        even.bottleneck_over_mean,
        found.blocks_only.even_split,
        beside(even.tokens_per_second, even.ratio)
    );
    let uniform = match &found.uniform_tp {
        Some(uniform) => format!(
            "uniform TP one stage of all {} devices, blocks shared as split_blocks has it: {}",
            uniform.tensor_parallel,
            beside(uniform.tokens_per_second, uniform.ratio)
        ),
        None => "uniform TP not for these devices: unlike, or no divisor of the heads".to_owned(),
    };
    [even, uniform]
}

/// The rows of a micro-batch, or how a long prompt is shared out to several.
fn micro_batch(found: &Found) -> String {
    match found.decode_rows < found.micro_batch_rows as f64 {
        true => format!(
            "a chunk of 1 prompt, {:.1} of them for a row",
            found.micro_batch_rows as f64 / found.decode_rows
        ),
        false => format!("{} rows", grouped(found.micro_batch_rows)),
    }
}

/// Another layout's speed, and the plan's beside it.
pub(crate) fn beside(tokens_per_second: Option<f64>, ratio: Option<f64>) -> String {
    match tokens_per_second.zip(ratio) {
        Some((speed, ratio)) if ratio < 1.0 => {
            let (speed, better) = (rate(speed), 1.0 / ratio);
            format!("{speed} tokens/s, {better:.2} times as fast as the plan: take it")
        }
        Some((speed, ratio)) => {
            format!("{} tokens/s, the plan is {ratio:.2} times as fast", rate(speed))
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
    let ms = |ms: f64| text::milliseconds(ms);
    let mut lines = vec![format!(
        "{idx:<5} {:<9} {:<11} {devices:<16} {:>7} {:>8} {:>8} {:>8} {:>10} {:>8} {:>8} {:>8}",
        format!("[{}, {})", stage.blocks[0], stage.blocks[1]),
        format!("[{}, {})", stage.slots[0], stage.slots[1]),
        short(stage.params as f64),
        bytes(stage.memory.weights),
        bytes(stage.memory.kv),
        bytes(stage.memory.free),
        stage.kv_tokens.map_or("-".to_owned(), grouped),
        ms(stage.time_ms.prefill),
        ms(stage.time_ms.decode),
        ms(stage.time_ms.mix),
    )];
    lines.extend(stage.columns.iter().map(|cut| {
        format!("      of block {} columns [{}, {}) of {}", cut.block, cut.start, cut.end, cut.of)
    }));
    lines.extend(
        stage
            .exceptions
            .alike()
            .map(|Alike { half, how, blocks }| format!("      {half} of blocks {blocks:?} {how}")),
    );
    lines
}

fn job_line(found: &Found) -> Option<String> {
    let job = &found.job;
    let (rows, [shortest, longest]) = (job.rows?, job.interval.hours?);
    let cost = match job.interval.cost {
        Some([cheapest, dearest]) => format!(", costs {cheapest:.2} to {dearest:.2}"),
        None => String::new(),
    };
    let devices = shortest * job.device_hours? / job.hours?;
    Some(format!(
        "{} rows   {}, {} of a device at best{cost}",
        grouped(rows),
        text::hours([shortest, longest]),
        text::hours_or_seconds(devices)
    ))
}
