//! Moments of a queue: other queues wait for them, and so does the host.

use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::{result, sys};

use super::stream::Stream;
use crate::error::Result;

/// A moment of a device's queue, when it has been recorded there. Recorded again it is another one; who waits already does so for the
/// one before.
#[derive(Debug)]
pub(crate) struct Event {
    event: sys::CUevent,
    stream: Arc<Stream>,
}

// SAFETY: events may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// One of a queue that says when it was, where it `is_timed`.
    pub(crate) fn new(op: &'static str, stream: &Arc<Stream>, is_timed: bool) -> Result<Event> {
        stream.bind(op)?;
        let timing = if is_timed { 0 } else { sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32 };
        // Who waits for it sleeps meanwhile: of events the driver asks again and again unless each is told otherwise.
        let flags = timing | sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC as u32;
        let mut event = std::ptr::null_mut();
        // SAFETY: the context is the thread's, and the driver writes a handle, which is destroyed in `drop`.
        unsafe { sys::cuEventCreate(&mut event, flags) }
            .result()
            .map_err(|error| stream.failed(op, error))?;
        Ok(Event { event, stream: Arc::clone(stream) })
    }

    /// Is behind all that is queued now.
    pub(crate) fn record(&self, op: &'static str) -> Result<()> {
        self.stream.bind(op)?;
        // SAFETY: event and queue live, and are of one device.
        unsafe { result::event::record(self.event, self.stream.handle()) }
            .map_err(|error| self.stream.failed(op, error))
    }

    /// What is queued on a stream from now on waits until this has passed; at once where it was never recorded.
    pub(crate) fn hold(&self, op: &'static str, stream: &Stream) -> Result<()> {
        stream.bind(op)?;
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both live.
        unsafe { result::stream::wait_event(stream.handle(), self.event, flags) }
            .map_err(|error| stream.failed(op, error))
    }

    /// Waits on the host until it has passed; not at all where it was never recorded.
    pub(crate) fn wait(&self, op: &'static str) -> Result<()> {
        self.stream.bind(op)?;
        // SAFETY: it lives.
        unsafe { result::event::synchronize(self.event) }.map_err(|error| self.stream.failed(op, error))
    }

    /// Whether it has passed, or was never recorded.
    pub(crate) fn has_passed(&self) -> bool {
        // SAFETY: it lives.
        unsafe { sys::cuEventQuery(self.event) }.result().is_ok()
    }

    /// From an earlier one on; both are timed and have passed.
    pub(crate) fn since(&self, op: &'static str, earlier: &Event) -> Result<Duration> {
        self.stream.bind(op)?;
        // SAFETY: both live.
        let milliseconds = unsafe { result::event::elapsed(earlier.event, self.event) };
        let milliseconds = milliseconds.map_err(|error| self.stream.failed(op, error))?;
        Ok(Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.stream.bind("drop an event").is_ok() {
            // SAFETY: it was created once; what waits for it goes on to do so.
            let _ = unsafe { result::event::destroy(self.event) };
        }
    }
}
