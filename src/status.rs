//! `spanwise status`: how far a job is, from another terminal.

use std::path::Path;

use anyhow::Result;
use jobs::{JobPhase, JobStatus, Progress, Status};
use serde_json::json;

use crate::cli::{Format, StatusArgs};
use crate::text::{duration, grouped, rate};
use crate::{failures, print};

/// Shows the job of an output folder.
///
/// # Errors
/// A folder without a job.
pub(crate) fn status(args: &StatusArgs) -> Result<()> {
    let status = JobStatus::of(&args.output)?;
    match args.format {
        Format::Json => print(&serde_json::to_string_pretty(&as_json(&status))?),
        Format::Text => lines(&status, &args.output).iter().for_each(|line| print(line)),
    }
    Ok(())
}

/// The phase as a word for programs.
fn word(phase: &JobPhase) -> &'static str {
    match phase {
        JobPhase::Running { .. } => "running",
        JobPhase::Ended(Status::Complete) => "complete",
        JobPhase::Ended(Status::Interrupted) => "interrupted",
        JobPhase::Ended(Status::Failed) => "failed",
        JobPhase::Died => "killed",
    }
}

fn as_json(status: &JobStatus) -> serde_json::Value {
    let Progress { output_lines, error_lines, rows_read, bytes_read, input_bytes, .. } = status.progress;
    let Progress { prompt_tokens, generated_tokens, unfinished_tokens, began, committed, .. } =
        status.progress;
    let holder = match &status.phase {
        JobPhase::Running { holder } => Some(holder.as_str()),
        _ => None,
    };
    json!({
        "state": word(&status.phase),
        "holder": holder,
        "began_at": began,
        "as_of": committed,
        "completed": output_lines,
        "failed": error_lines - status.lines_to_renew(),
        "failed_before": status.lines_to_renew(),
        "rows": status.rows(),
        "rows_read": rows_read,
        "bytes_read": bytes_read,
        "input_bytes": input_bytes,
        "share_read": status.share_read(),
        "prompt_tokens": prompt_tokens,
        "generated_tokens": generated_tokens,
        "unfinished_tokens": unfinished_tokens,
        "lines_per_second": status.lines_per_second(),
        "tokens_per_second": status.tokens_per_second(),
        "seconds_left": status.seconds_left(),
    })
}

fn lines(status: &JobStatus, folder: &Path) -> Vec<String> {
    let Progress { output_lines, error_lines, is_read_to_end, .. } = status.progress;
    let mut lines = Vec::new();
    let mut add = |name: &str, value: String| lines.push(format!("{name:<9} {value}"));
    add(
        "state",
        match &status.phase {
            JobPhase::Running { holder } => format!("running: {holder}"),
            JobPhase::Ended(Status::Complete) => "complete".to_owned(),
            phase => format!("{}; the job's own command goes on", word(phase)),
        },
    );
    let of = match status.rows() {
        Some(rows) if is_read_to_end => format!(", of {} rows", grouped(rows)),
        Some(rows) => format!(", of about {} rows", grouped(rows)),
        None => String::new(),
    };
    let to_renew = status.lines_to_renew();
    let before = match to_renew {
        0 => String::new(),
        rows => format!(", {} failed before and left to look at again", grouped(rows)),
    };
    let failed = grouped(error_lines - to_renew);
    add("rows", format!("{} done, {failed} failed{before}{of}", grouped(output_lines)));
    // A run at work may be putting its lines in order.
    if error_lines > 0 && matches!(status.phase, JobPhase::Ended(_)) {
        add("failed", failures::line(folder));
    }
    if let Some(share) = status.share_read() {
        add("input", format!("{:.1} % read", 100.0 * share));
    }
    if let (Some(rows), Some(tokens)) = (status.lines_per_second(), status.tokens_per_second()) {
        let (rows, tokens) = (rate(rows), rate(tokens));
        add("speed", format!("{rows} rows/s, {tokens} generated tokens/s in the latest run"));
    }
    if let Some(seconds) = status.seconds_left() {
        add("left", format!("about {}", duration(seconds)));
    }
    lines
}
