//! `spanwise audit`: whether a result is complete, and what is wrong with it.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use jobs::{Audit, AuditOptions, InputRecord, Manifest, Order, Status};
use serde_json::json;

use crate::cli::{AuditArgs, Format};
use crate::print;
use crate::text::grouped;

/// A result with something wrong.
const EXIT_WRONG: u8 = 1;

/// Audits an output folder.
///
/// # Errors
/// A folder without a job, a job that runs, an input that cannot be read.
pub(crate) fn audit(args: &AuditArgs) -> Result<ExitCode> {
    let manifest = Manifest::find(&args.output)?;
    let input = match (&args.input, &manifest) {
        (Some(input), _) => input.clone(),
        (None, Some(Manifest { input: InputRecord { path, .. }, .. }))
            if path.exists() && !path.is_file() =>
        {
            bail!(
                "{} is no file that could be read again\nhint: --input FILE names one with the same rows",
                path.display()
            )
        }
        (None, Some(manifest)) => manifest.input.path.clone(),
        (None, None) => bail!(
            "{} holds no {}, which names the input\nhint: a job that was killed goes on by its own command; \
             --input FILE audits what is there",
            args.output.display(),
            Manifest::FILE_NAME
        ),
    };
    let options = AuditOptions {
        folder: args.output.clone(),
        input: input.clone(),
        order: manifest.as_ref().and_then(order),
        limit: manifest.as_ref().and_then(|manifest| manifest.limit),
        most_findings: args.most,
    };
    let audit = Audit::of(&options).context("audit")?;
    let status = manifest.as_ref().map(|manifest| manifest.status);
    let is_complete = audit.is_complete() && status == Some(Status::Complete);
    match args.format {
        Format::Json => print(&serde_json::to_string_pretty(&as_json(&audit, &input, status, is_complete))?),
        Format::Text => lines(&audit, &options, status, is_complete).iter().for_each(|line| print(line)),
    }
    Ok(if is_complete { ExitCode::SUCCESS } else { ExitCode::from(EXIT_WRONG) })
}

/// The order that the job has promised.
fn order(manifest: &Manifest) -> Option<Order> {
    match manifest.config["job"]["order"].as_str() {
        Some("input") if manifest.status == Status::Complete => Some(Order::Input),
        _ => None,
    }
}

fn how_it_ended(status: Option<Status>) -> &'static str {
    match status {
        Some(Status::Complete) => "complete",
        Some(Status::Interrupted) => "interrupted",
        Some(Status::Failed) => "failed",
        None => "killed",
    }
}

fn as_json(audit: &Audit, input: &Path, status: Option<Status>, is_complete: bool) -> serde_json::Value {
    let findings: Vec<_> = (audit.findings.iter())
        .map(
            |found| json!({"file": found.file.display().to_string(), "line": found.line, "what": found.what}),
        )
        .collect();
    json!({
        "is_complete": is_complete,
        "status": how_it_ended(status),
        "input": input.display().to_string(),
        "rows": audit.rows,
        "output_lines": audit.output_lines,
        "error_lines": audit.error_lines,
        "num_findings": audit.num_findings,
        "findings": findings,
    })
}

fn lines(audit: &Audit, options: &AuditOptions, status: Option<Status>, is_complete: bool) -> Vec<String> {
    let mut lines: Vec<String> = (audit.findings.iter())
        .map(|found| format!("{}:{}: {}", found.file.display(), found.line, found.what))
        .collect();
    match audit.num_findings - audit.findings.len() as u64 {
        0 => {}
        more => lines.push(format!("and {} more", grouped(more))),
    }
    if status != Some(Status::Complete) {
        lines.push(format!("the last run of the job was {}; its own command goes on", how_it_ended(status)));
    }
    let mut add = |name: &str, value: String| lines.push(format!("{name:<9} {value}"));
    add("rows", format!("{} in {}", grouped(audit.rows), options.input.display()));
    add("lines", format!("{} answers, {} errors", grouped(audit.output_lines), grouped(audit.error_lines)));
    add(
        "complete",
        match is_complete {
            true => "yes: each row has one line, and each line is as it was written".to_owned(),
            false if audit.num_findings == 1 => "no: 1 thing is wrong".to_owned(),
            false => format!("no: {} things are wrong", grouped(audit.num_findings)),
        },
    );
    lines
}
