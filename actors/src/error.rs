//! What ends a pipeline or a job.

use std::ops::ControlFlow;

use kameo::actor::ActorId;
use kameo::error::ActorStopReason;

/// An error of a stage, or of the job's files.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// A stage could not load its span.
    #[error("load stage {stage}: {message}")]
    Load {
        /// The stage, from 0.
        stage: usize,
        /// What the device or the model said.
        message: String,
    },
    /// A stage's step failed.
    #[error("stage {stage}: {message}")]
    Step {
        /// The stage, from 0.
        stage: usize,
        /// What the device said.
        message: String,
    },
    /// A stage's thread panicked: a bug of ours.
    #[error("stage {stage} panicked: {message}")]
    Panic {
        /// The stage, from 0.
        stage: usize,
        /// The panic's message.
        message: String,
    },
    /// A stage's step took longer than it may.
    #[error("stage {stage}: a step did not end within {seconds} s, the [pipeline] step_timeout_seconds")]
    Hang {
        /// The stage, from 0.
        stage: usize,
        /// The time it had.
        seconds: u64,
    },
    /// A stage ended again and again, however often it was started.
    #[error(
        "{end}; stages end again and again, {times} times since the last micro-batch was done, and are given up"
    )]
    GivenUp {
        /// The last end.
        end: Box<Error>,
        /// Ends in a row.
        times: u32,
    },
    /// The job's input could not be read, or its output could not be written.
    #[error("{0}")]
    Files(String),
    /// More rows failed than the job allows.
    #[error(
        "{failed} rows are error lines, of {judged} finished or in flight; more than the {max_error_rate} of [job] max_error_rate"
    )]
    TooManyErrors {
        /// Rows with an error line.
        failed: u64,
        /// Rows with a line, and those that are being computed.
        judged: u64,
        /// The share of them that may be error lines.
        max_error_rate: f64,
    },
    /// An actor ended without saying why: a bug of ours.
    #[error("{0} ended early")]
    Ended(&'static str),
}

/// This crate's result.
pub type Result<T> = std::result::Result<T, Error>;

/// An error with its causes, in one line.
pub(crate) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// The message of a caught panic.
pub(crate) fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
}

/// What made an actor end, from the chain of links that carried the news.
pub(crate) fn death_error(reason: &ActorStopReason) -> Error {
    match reason {
        ActorStopReason::LinkDied { reason, .. } => death_error(reason),
        ActorStopReason::Panicked(panic) => {
            panic.downcast::<Error>().unwrap_or_else(|| match panic.with_str(str::to_owned) {
                Some(message) => Error::Files(format!("the pipeline panicked: {message}")),
                None => Error::Ended("the pipeline"),
            })
        }
        _ => Error::Ended("the pipeline"),
    }
}

/// What the end of a linked actor means to one that does not supervise it.
pub(crate) fn link_death(id: ActorId, reason: ActorStopReason) -> ControlFlow<ActorStopReason> {
    match reason {
        ActorStopReason::Normal | ActorStopReason::SupervisorRestart => ControlFlow::Continue(()),
        reason => ControlFlow::Break(ActorStopReason::LinkDied { id, reason: Box::new(reason) }),
    }
}
