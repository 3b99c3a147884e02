//! A simulated job as people read it.

use super::report::{Report, StagePart};
use crate::plan::table::device_range;
use crate::text::{duration, grouped};

pub(super) fn lines(report: &Report) -> Vec<String> {
    let Report { lengths, pipeline, .. } = report;
    let sigma = lengths.sigma.map(|sigma| format!(" with sigma {sigma}")).unwrap_or_default();
    let mut lines = vec![
        format!("devices    {}, {} with {} KV", report.devices, report.dtype, report.kv_cache_dtype),
        format!(
            "rows       {} with prompts of {} tokens, {} generated on average: {}{sigma}, at most {}, seed {}",
            grouped(report.rows),
            grouped(lengths.prompt_tokens.round() as u64),
            grouped((report.generated_tokens as f64 / report.rows.max(1) as f64).round() as u64),
            lengths.distribution,
            grouped(lengths.max_tokens.into()),
            lengths.seed
        ),
        format!(
            "pipeline   micro-batches of {} rows and up to {} tokens, {} sequences, {} pages of {} tokens",
            grouped(pipeline.micro_batch_rows),
            grouped(pipeline.micro_batch_tokens as u64),
            grouped(pipeline.max_sequences as u64),
            grouped(pipeline.num_pages as u64),
            pipeline.page_tokens
        ),
        format!(
            "{:<5} {:<11} {:<16} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8}",
            "stage", "blocks", "devices", "busy", "starved", "KV", "tail", "idle", "planned"
        ),
    ];
    if report.replicas > 1 {
        let (replicas, last) = (report.replicas, report.last_replica);
        lines.push(format!("replicas   {replicas}, each with a part of the rows; stages, tail and KV are of {last}, which ends last"));
    }
    lines.extend(report.stages.iter().enumerate().map(|(idx, stage)| stage_line(report, idx, stage)));
    lines.extend(outcome_lines(report));
    let source = match report.estimate {
        true => "by the devices' rooflines and the scheduler's own decisions: nothing was measured",
        false => "by measured times of stages, interpolated, and the scheduler's own decisions",
    };
    lines.push(format!("estimate   {source}"));
    lines
}

fn stage_line(report: &Report, idx: usize, stage: &StagePart) -> String {
    let devices = device_range(&stage.devices);
    let share = |ns: u64| percent(ns as f64 / report.wall_ns.max(1) as f64);
    format!(
        "{idx:<5} {:<11} {devices:<16} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8}",
        format!("[{}, {})", stage.blocks[0], stage.blocks[1]),
        share(stage.busy_ns),
        share(stage.starved_ns),
        share(stage.kv_limited_ns),
        share(stage.tail_ns),
        share(stage.idle_ns),
        percent(stage.planned_busy)
    )
}

fn outcome_lines(report: &Report) -> [String; 5] {
    [
        format!(
            "time       {} ({:.3} s), of which {} after the last row was admitted",
            duration(report.wall_seconds),
            report.wall_seconds,
            duration(report.tail_ns as f64 * 1e-9)
        ),
        format!(
            "tokens     {} of prompts, {} generated",
            grouped(report.prompt_tokens),
            grouped(report.generated_tokens)
        ),
        format!(
            "speed      {} generated tokens/s, {:.3} of the plan's {}",
            grouped(report.tokens_per_second.round() as u64),
            report.plan.ratio,
            grouped(report.plan.tokens_per_second.round() as u64)
        ),
        format!(
            "KV         {} of the pages in use on average, {} at most",
            percent(report.kv.mean),
            percent(report.kv.most)
        ),
        format!(
            "preempted  {} times, {} tokens computed again, in {} micro-batches",
            grouped(report.preemptions),
            grouped(report.recomputed_tokens),
            grouped(report.micro_batches)
        ),
    ]
}

fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}
