//! The trace of a run: steps go from the device threads to a thread that writes them, and nobody waits for the file.
//!
//! The file is there before anything is started, so that a path that cannot be written is found first. It is closed whichever
//! way the run ends: what a job that failed or was interrupted leaves behind can be read.

use std::io;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Instant;

use actors::{StepEvent, StepLog};
use anyhow::{Context, Result};

use crate::trace::{TraceWriter, TracedStep};

/// Steps that may wait for the file: several seconds of the fastest pipelines, and a megabyte.
const ROOM: usize = 1 << 14;

/// A stage as a trace calls it.
#[derive(Debug, Clone)]
pub(crate) struct TracedStage {
    pub(crate) name: String,
    /// Its ranks, where it has several.
    pub(crate) ranks: Vec<String>,
}

/// A trace whose run has not begun.
pub(crate) struct Prepared {
    path: PathBuf,
    writer: TraceWriter,
    /// The row of each stage; those of its ranks follow, where it has several.
    rows: Vec<usize>,
    log: StepLog,
    steps: Box<dyn Iterator<Item = StepEvent> + Send>,
}

/// A trace that is being written.
pub(crate) struct LiveTrace {
    path: PathBuf,
    log: StepLog,
    writing: Option<JoinHandle<io::Result<u64>>>,
}

impl Prepared {
    /// With a row for each stage, and where it has several ranks one more for each of these.
    ///
    /// # Errors
    /// The file cannot be made.
    pub(crate) fn create(path: &Path, stages: &[TracedStage]) -> Result<Self> {
        let (mut rows, mut names) = (Vec::new(), Vec::new());
        for TracedStage { name, ranks } in stages {
            rows.push(names.len());
            names.push(name.clone());
            names.extend_from_slice(ranks);
        }
        let writer =
            TraceWriter::create(path, &names).with_context(|| format!("write trace {}", path.display()))?;
        let (log, steps) = StepLog::new(ROOM);
        Ok(Prepared { path: path.to_owned(), writer, rows, log, steps: Box::new(steps) })
    }

    /// Where steps are to be told.
    pub(crate) fn log(&self) -> StepLog {
        self.log.clone()
    }

    /// Writes steps from now on; the time of the trace counts from `began`.
    pub(crate) fn begin(self, began: Instant) -> LiveTrace {
        let Prepared { path, writer, rows, log, steps } = self;
        let thread = std::thread::Builder::new().name("trace".to_owned());
        let writing = thread.spawn(move || write(writer, &rows, steps, began));
        LiveTrace { path, log, writing: Some(writing.expect("the system starts a thread")) }
    }
}

/// Returns how many micro-batches went through stages; ranks have the same ones.
fn write(
    mut writer: TraceWriter,
    rows: &[usize],
    steps: impl Iterator<Item = StepEvent>,
    began: Instant,
) -> io::Result<u64> {
    let mut num_steps = 0;
    for StepEvent { stage, rank, micro_batch, start, end, tokens, decode_tokens, hop_bytes } in steps {
        let seconds = |moment: Instant| moment.saturating_duration_since(began).as_secs_f64();
        writer.step(&TracedStep {
            row: rows[stage] + rank.map_or(0, |(rank, _)| 1 + rank),
            start_s: seconds(start),
            end_s: seconds(end),
            micro_batch,
            tokens,
            decode_tokens,
            hop_bytes: rank.is_none().then_some(hop_bytes),
            collectives_s: rank.map(|(_, collectives)| collectives.as_secs_f64()),
        })?;
        num_steps += u64::from(rank.is_none());
    }
    writer.finish()?;
    Ok(num_steps)
}

impl LiveTrace {
    /// Ends it, and says what became of it.
    pub(crate) fn end(mut self) -> String {
        let path = self.path.display().to_string();
        match self.close() {
            Some(Ok(num_steps)) => told(&path, num_steps, self.log.num_left_out()),
            Some(Err(error)) => format!("{path}, not whole: {error}"),
            None => format!("{path}, not whole"),
        }
    }

    /// Waits until the last step is written; none where the thread broke off.
    fn close(&mut self) -> Option<io::Result<u64>> {
        let writing = self.writing.take()?;
        self.log.end();
        writing.join().ok()
    }
}

impl Drop for LiveTrace {
    /// Who drops it is on the way out with an error of its own.
    fn drop(&mut self) {
        self.close();
    }
}

fn told(path: &str, num_steps: u64, num_left_out: u64) -> String {
    let steps = crate::text::grouped(num_steps);
    match num_left_out {
        0 => format!("{path}, {steps} steps"),
        left_out => {
            format!(
                "{path}, {steps} steps; {} left out, as the file was slower",
                crate::text::grouped(left_out)
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_whose_run_breaks_off_is_closed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.json");
        let trace = Prepared::create(&path, &[TracedStage { name: "only".to_owned(), ranks: Vec::new() }])
            .unwrap()
            .begin(Instant::now());
        drop(trace);
        let events: Vec<serde_json::Value> = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(events.iter().filter(|event| event["name"] == "thread_name").count(), 1);
    }

    #[test]
    fn steps_that_were_left_out_are_said() {
        assert_eq!(told("t.json", 1200, 0), "t.json, 1,200 steps");
        assert_eq!(told("t.json", 2, 7), "t.json, 2 steps; 7 left out, as the file was slower");
    }
}
