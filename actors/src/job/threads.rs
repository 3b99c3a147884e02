//! The threads beside a job actor: files block. One reads, renders and tokenizes rows, the other
//! detokenizes, writes lines and commits them.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError};
use jobs::{Line, Reader, Row, Tokenizer, Unread, Writer};
use kameo::actor::ActorRef;
use rustix::time::{ClockId, clock_gettime};

use super::state::Unwritten;
use super::{InputEnded, JobActor, JobProgress, LinesEnded, RowRead, RowsFinished};
use crate::error::{Error, Result, panic_message, with_causes};
use crate::thread::spawn;

/// How often lines are put on disk and committed. This much work is lost at most when the program dies; a
/// commit takes a few syncs of 1 to 20 ms each, and the pipeline does not wait for them.
const COMMIT_INTERVAL: Duration = Duration::from_millis(500);

/// Finished rows that pass by in one message, which costs about as much as reading some rows.
const BUNCH_ROWS: usize = 1024;

pub(super) fn spawn_reader(
    reader: Reader,
    leave: Receiver<()>,
    job: ActorRef<JobActor>,
    progress: Arc<JobProgress>,
) {
    spawn("reader", move || {
        if let Err(error) = catch(|| read_rows(reader, &leave, &job, &progress.reader_cpu_ns)) {
            let _ = job.tell(InputEnded(Err(error))).blocking_send();
        }
    });
}

pub(super) fn spawn_writer(
    mut writer: Writer,
    unwritten: Receiver<Unwritten>,
    make: LineMaker,
    job: ActorRef<JobActor>,
    progress: Arc<JobProgress>,
) {
    spawn("writer", move || {
        let ended = catch(|| write_lines(&mut writer, &unwritten, &make, &progress.writer_cpu_ns));
        let committed = writer.committed();
        // Either way the writer goes, and with it the lock on the folder, before anybody hears of the end.
        let ended = match ended {
            Ok(Ok(None)) => catch(|| writer.pause()),
            Ok(Ok(Some(unread))) => catch(|| writer.finish(unread)),
            Ok(Err(error)) => Ok(Err(error)),
            Err(panic) => Err(panic),
        };
        let (written, failure) = match ended {
            Ok(Ok(written)) => (written, None),
            Ok(Err(error)) => (committed, Some(files_error(&error))),
            Err(panic) => (committed, Some(panic)),
        };
        note_cpu_time(&progress.writer_cpu_ns);
        let _ = job.tell(LinesEnded { written, failure }).blocking_send();
    });
}

/// Reads rows as long as there is leave, then says how the input ended.
fn read_rows(mut reader: Reader, leave: &Receiver<()>, job: &ActorRef<JobActor>, cpu_ns: &AtomicU64) {
    // Finished rows that are still to be handed over, before any row behind them.
    let mut bunch = Vec::new();
    loop {
        let next = reader.next();
        note_cpu_time(cpu_ns);
        match next {
            Some(Ok(Row::Finished(row))) if bunch.len() + 1 < BUNCH_ROWS => {
                bunch.push(row);
                continue;
            }
            _ if bunch.is_empty() => {}
            _ => {
                let rows = RowsFinished(std::mem::take(&mut bunch));
                if leave.recv().is_err() || job.tell(rows).blocking_send().is_err() {
                    return; // The job wants no more rows, or is gone.
                }
            }
        }
        let ended = match next {
            Some(Ok(row)) => {
                if leave.recv().is_err() || job.tell(RowRead(row)).blocking_send().is_err() {
                    return;
                }
                continue;
            }
            Some(Err(error)) => Err(files_error(&error)),
            None if reader.is_limited() => Ok((reader.record(), Unread::Stays)),
            None => Ok((reader.record(), Unread::HasLeft)),
        };
        let _ = job.tell(InputEnded(ended)).blocking_send();
        return;
    }
}

/// Writes until the job wants no more; what has become of unread rows, where the job has come to its end.
fn write_lines(
    writer: &mut Writer,
    unwritten: &Receiver<Unwritten>,
    make: &LineMaker,
    cpu_ns: &AtomicU64,
) -> jobs::Result<Option<Unread>> {
    let mut committed = Instant::now();
    loop {
        match unwritten.recv_timeout(COMMIT_INTERVAL) {
            Ok(Unwritten::End(unread)) => return Ok(Some(unread)),
            Ok(unwritten) => make.write(writer, unwritten)?,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(None),
        }
        if committed.elapsed() >= COMMIT_INTERVAL {
            writer.commit()?;
            committed = Instant::now();
            note_cpu_time(cpu_ns);
        }
    }
}

/// Makes lines of what comes back.
pub(crate) struct LineMaker {
    /// Turns tokens into text, where the model has one.
    pub(crate) tokenizer: Option<Arc<Tokenizer>>,
    /// When the job's first run began, in Unix seconds: the time of every answer, so that no line depends
    /// on when it was computed.
    pub(crate) created: u64,
}

impl LineMaker {
    /// Writes what is not the end.
    pub(crate) fn write(&self, writer: &mut Writer, unwritten: Unwritten) -> jobs::Result<()> {
        match unwritten {
            Unwritten::Completed(row, completions) => {
                writer.write(&Line::completed(&row, &completions, self.tokenizer.as_ref(), self.created))
            }
            Unwritten::Line(line) => writer.write(&line),
            Unwritten::Finished(rows) => rows.into_iter().try_for_each(|row| writer.keep(row)),
            Unwritten::Checkpoint(key, first, piece) => writer.checkpoint(key, first as u64, &piece),
            Unwritten::End(_) => unreachable!("the end is no line"),
        }
    }
}

/// Notes how long the calling thread has had a core so far.
fn note_cpu_time(cpu_ns: &AtomicU64) {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let ns = Duration::try_from(time).map_or(0, |time| time.as_nanos() as u64);
    cpu_ns.store(ns, Ordering::Relaxed);
}

/// Runs a thread's work; a panic in it must not leave the job waiting for a word that never comes.
pub(crate) fn catch<T>(work: impl FnOnce() -> T) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work))
        .map_err(|panic| Error::Files(format!("internal error: {}", panic_message(&*panic))))
}

fn files_error(error: &jobs::Error) -> Error {
    Error::Files(with_causes(error))
}
