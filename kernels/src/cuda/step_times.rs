//! When a device turned to a step, and when it was done with it.

use std::sync::Arc;
use std::time::Duration;

use super::event::Event;
use super::stream::Stream;
use crate::draws::Arrival;
use crate::error::Result;

const OP: &str = "finish a step";

/// A step of a device that works beside its host; of any other one it says nothing, for it is done when the host is.
#[derive(Debug, Clone, Default)]
pub struct StepTimes(Option<Arc<Moments>>);

#[derive(Debug)]
struct Moments {
    start: Event,
    end: Event,
}

impl StepTimes {
    /// Of a step that is queued from now on.
    pub(super) fn begin(stream: &Arc<Stream>) -> Result<StepTimes> {
        let moments = Moments { start: Event::new(OP, stream, true)?, end: Event::new(OP, stream, true)? };
        moments.start.record(OP)?;
        Ok(StepTimes(Some(Arc::new(moments))))
    }

    /// All of it is queued.
    pub(super) fn end(&self) -> Result<()> {
        self.0.as_ref().map_or(Ok(()), |moments| moments.end.record(OP))
    }

    /// The moment when the device is done with it.
    pub fn arrival(&self) -> Arrival {
        let end = |moments: Arc<Moments>| Arrival::when(move || moments.end.wait(OP));
        self.0.clone().map_or_else(Arrival::default, end)
    }

    /// Waits until the device is done with it; how long it was at it.
    ///
    /// # Errors
    /// What the driver refuses, which may come from anything that was queued before.
    pub fn wait(&self) -> Result<Option<Duration>> {
        let Some(Moments { start, end }) = self.0.as_deref() else { return Ok(None) };
        end.wait(OP)?;
        end.since(OP, start).map(Some)
    }
}
