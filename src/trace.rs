//! Steps of stages over time in Chrome's trace event format, which opens in ui.perfetto.dev and chrome://tracing.
//!
//! It streams: a step is written when it is told, and memory does not grow. The file is one JSON array, closed when
//! the writer is finished or dropped, so that what a job that failed leaves behind can be read too. Whoever tells the
//! steps keeps those of one stage in order and apart; nothing is checked here.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use serde_json::json;

/// All stages are threads of one process.
const PROCESS: u32 = 0;

/// A step on a row of a trace, in seconds from the job's begin.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct TracedStep {
    pub(crate) row: usize,
    pub(crate) start_s: f64,
    pub(crate) end_s: f64,
    pub(crate) micro_batch: u64,
    pub(crate) tokens: usize,
    pub(crate) decode_tokens: usize,
    /// Bytes of activations that go to the next stage, where that is known: none from the last one.
    pub(crate) hop_bytes: Option<u64>,
    /// What of it went to collectives, where it is a rank's.
    pub(crate) collectives_s: Option<f64>,
}

/// A trace file that is being written.
#[derive(Debug)]
pub(crate) struct TraceWriter {
    file: BufWriter<File>,
    is_closed: bool,
}

impl TraceWriter {
    /// A new file with one row for each stage; a file of that name is replaced.
    pub(crate) fn create(path: &Path, stage_names: &[String]) -> io::Result<Self> {
        let mut file = BufWriter::new(File::create(path)?);
        let name = json!({"ph": "M", "pid": PROCESS, "name": "process_name", "args": {"name": "pipeline"}});
        write!(file, "[\n{name}")?;
        for (stage, name) in stage_names.iter().enumerate() {
            let row = |kind: &str, args| json!({"ph": "M", "pid": PROCESS, "tid": stage, "name": kind, "args": args});
            write!(file, ",\n{}", row("thread_name", json!({"name": name})))?;
            write!(file, ",\n{}", row("thread_sort_index", json!({"sort_index": stage})))?;
        }
        Ok(Self { file, is_closed: false })
    }

    /// One micro-batch through one stage, or through a rank of it.
    pub(crate) fn step(&mut self, step: &TracedStep) -> io::Result<()> {
        let TracedStep { row, start_s, end_s, micro_batch, tokens, decode_tokens, hop_bytes, collectives_s } =
            *step;
        let hop = hop_bytes
            .filter(|bytes| *bytes > 0)
            .map_or_else(String::new, |bytes| format!(",\"hop_bytes\":{bytes}"));
        let collectives = collectives_s.map_or_else(String::new, |seconds| {
            format!(",\"collectives_us\":{}", Microseconds(nanoseconds(seconds)))
        });
        // Both ends are rounded before one is taken from the other, so that neighbours do not come to overlap.
        let (start_ns, end_ns) = (nanoseconds(start_s), nanoseconds(end_s));
        let (ts, dur) = (Microseconds(start_ns), Microseconds(end_ns.saturating_sub(start_ns)));
        write!(
            self.file,
            ",\n{{\"ph\":\"X\",\"pid\":{PROCESS},\"tid\":{row},\"name\":\"micro-batch {micro_batch}\",\"ts\":{ts},\
             \"dur\":{dur},\"args\":{{\"micro_batch\":{micro_batch},\"tokens\":{tokens},\
             \"decode_tokens\":{decode_tokens}{hop}{collectives}}}}}"
        )
    }

    /// Ends the file.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        self.close()
    }

    fn close(&mut self) -> io::Result<()> {
        self.is_closed = true;
        self.file.write_all(b"\n]\n")?;
        self.file.flush()
    }
}

impl Drop for TraceWriter {
    /// Who drops it is on the way out with an error of its own.
    fn drop(&mut self) {
        if !self.is_closed {
            let _ = self.close();
        }
    }
}

/// Whole nanoseconds shown as the microseconds of the format.
struct Microseconds(u64);

impl std::fmt::Display for Microseconds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{:03}", self.0 / 1000, self.0 % 1000)
    }
}

fn nanoseconds(seconds: f64) -> u64 {
    (seconds * 1e9).round() as u64
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn read(path: &Path) -> Vec<Value> {
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    #[test]
    fn steps_are_complete_events_on_the_row_of_their_stage() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.json");
        let mut trace = TraceWriter::create(&path, &["first".to_owned(), "\"second\"".to_owned()]).unwrap();
        let step = TracedStep {
            row: 1,
            start_s: 0.000_001_5,
            end_s: 2.0,
            micro_batch: 7,
            tokens: 33,
            decode_tokens: 32,
            hop_bytes: Some(0),
            collectives_s: None,
        };
        trace.step(&TracedStep { row: 0, hop_bytes: Some(4096), collectives_s: Some(0.25), ..step }).unwrap();
        trace.step(&step).unwrap();
        trace.finish().unwrap();
        let events = read(&path);
        let name = |tid: u64| {
            let is_name = |event: &&Value| event["name"] == "thread_name" && event["tid"] == tid;
            events.iter().find(is_name).unwrap()["args"]["name"].clone()
        };
        assert_eq!((name(0), name(1)), ("first".into(), "\"second\"".into()));
        let args = json!({"micro_batch": 7, "tokens": 33, "decode_tokens": 32});
        let step = json!({"ph": "X", "pid": 0, "tid": 1, "name": "micro-batch 7", "ts": 1.5, "dur": 1_999_998.5,
                          "args": args});
        assert_eq!(events.last(), Some(&step));
        let first = &events[events.len() - 2]["args"];
        assert_eq!((&first["collectives_us"], &first["hop_bytes"]), (&json!(250_000.0), &json!(4096)));
    }

    #[test]
    fn a_trace_that_is_dropped_can_be_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.json");
        let mut trace = TraceWriter::create(&path, &["only".to_owned()]).unwrap();
        trace.step(&TracedStep { start_s: 1.0, end_s: 2.0, ..TracedStep::default() }).unwrap();
        drop(trace);
        assert_eq!(read(&path).iter().filter(|event| event["ph"] == "X").count(), 1);
    }

    #[test]
    fn steps_that_touch_do_not_overlap_after_rounding() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.json");
        let mut trace = TraceWriter::create(&path, &["only".to_owned()]).unwrap();
        // Starts and lengths rounded each for itself would overlap in every third step or so.
        for step in 0..100 {
            let (start_s, end_s) = (f64::from(step) * 0.7e-9, f64::from(step + 1) * 0.7e-9);
            trace.step(&TracedStep { start_s, end_s, ..TracedStep::default() }).unwrap();
        }
        trace.finish().unwrap();
        let steps = read(&path);
        let ns = |event: &Value, key: &str| (event[key].as_f64().unwrap() * 1e3).round() as u64;
        let steps: Vec<&Value> = steps.iter().filter(|event| event["ph"] == "X").collect();
        for pair in steps.windows(2) {
            assert_eq!(ns(pair[0], "ts") + ns(pair[0], "dur"), ns(pair[1], "ts"));
        }
    }
}
