//! What was measured, as people read it.

use stages::profile::{Ceilings, Rate, Throughput};

use super::report::Report;
use crate::text::grouped;

/// The lines before the first batch.
pub(super) fn head(report: &Report) -> Vec<String> {
    let Report { params, device, weights, kv, context_tokens, .. } = report;
    vec![
        format!("model      {} parameters, {weights} weights, {kv} KV", grouped(*params)),
        format!("device     {device}"),
        format!("context    {} tokens", grouped(*context_tokens as u64)),
        format!("{:>5} {:^39}   {:>22}", "", "prefill", "decode"),
        format!("{:>5} {}   {}", "rows", columns(), columns()),
    ]
}

fn columns() -> String {
    format!("{:>12} {:>12} {:>13}", "tokens/s", "roofline", "share")
}

/// A batch.
pub(super) fn line(batch: &Throughput) -> String {
    format!("{:>5} {}   {}", batch.batch, rate(&batch.prefill), rate(&batch.decode))
}

fn rate(rate: &Rate) -> String {
    let most = rate.tokens as f64 / rate.roofline_seconds;
    format!("{:>12.1} {:>12.1} {:>12.1}%", rate.tokens_per_second, most, rate.roofline_share * 100.0)
}

/// What it costs that no row's bits depend on its batch.
pub(super) fn cost(fixed: &Throughput, free: &Throughput) -> String {
    let share = |fixed: &Rate, free: &Rate| (1.0 - fixed.tokens_per_second / free.tokens_per_second) * 100.0;
    format!(
        "{:>5} {:>12.1} {:>11.1}%   {:>12.1} {:>11.1}%",
        free.batch,
        free.prefill.tokens_per_second,
        share(&fixed.prefill, &free.prefill),
        free.decode.tokens_per_second,
        share(&fixed.decode, &free.decode)
    )
}

/// The lines before the first cost.
pub(super) fn cost_head() -> [String; 2] {
    let columns = format!("{:>12} {:>12}", "tokens/s", "costs");
    [
        "with deterministic = false, and what true costs".to_owned(),
        format!("{:>5} {columns}   {columns}", "rows"),
    ]
}

/// The ceilings that shares were of, from the lowest to the highest.
pub(super) fn ceilings(report: &Report) -> String {
    let range = |of: fn(&Ceilings) -> f64| {
        let values = || report.batches.iter().map(|batch| of(&batch.ceilings) / 1e9);
        let (least, most) = (values().fold(f64::INFINITY, f64::min), values().fold(0.0, f64::max));
        format!("{least:.1} to {most:.1}")
    };
    format!(
        "ceilings   products {} GFLOP/s, memory read {} GB/s, measured around each batch",
        range(|ceilings| ceilings.product_flops_per_second),
        range(|ceilings| ceilings.read_bytes_per_second)
    )
}
