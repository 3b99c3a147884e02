//! Activations on their way from one stage to the next of a process, which never leave the devices. To and from other processes
//! parcels go by NCCL (`nccl/gate.rs`).
//!
//! A parcel is a copy, for the stage that hands it over goes on with its own array. The next stage copies it to its device, from
//! the same GPU or over the link between two, by a queue of its own for that. No host waits: an event says when a parcel is
//! there, and another one when it was taken, before which its memory is not used again. In the steady state nothing is
//! allocated.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::arrays::CudaArray;
use super::event::Event;
use super::stream::{Memory, Stream};
use super::{Cuda, locked};
use crate::error::Result;

pub(super) const OP: &str = "hand over";

/// An array that was handed over, f32 `[rows, cols]`, or will have been when its device has computed it.
#[derive(Debug, Clone)]
pub struct Parcel(Arc<Content>);

/// Memory that no parcel is in. The one that has been so for longest is used first: what it held is the first to have been taken.
#[derive(Debug, Default)]
pub(super) struct Parcels(Mutex<VecDeque<Slot>>);

/// Memory for a parcel.
#[derive(Debug)]
struct Slot {
    memory: Memory,
    /// Behind what fills it.
    ready: Event,
    /// Behind each copy of what it held last.
    taken: Mutex<Vec<Arc<Event>>>,
}

#[derive(Debug)]
struct Content {
    rows: usize,
    cols: usize,
    /// There until it is dropped.
    slot: Option<Slot>,
    home: Arc<Parcels>,
}

impl Drop for Content {
    fn drop(&mut self) {
        locked(&self.home.0).extend(self.slot.take());
    }
}

impl Slot {
    fn new(stream: &Arc<Stream>) -> Result<Slot> {
        Ok(Slot {
            memory: Memory::none(stream),
            ready: Event::new(OP, stream, false)?,
            taken: Mutex::default(),
        })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // Before its memory is freed.
        locked(&self.taken).iter().for_each(|taken| drop(taken.wait(OP)));
    }
}

impl Parcels {
    pub(super) fn clear(&self) {
        locked(&self.0).clear();
    }

    /// Has memory for so many, of so many bytes each.
    pub(super) fn reserve(&self, stream: &Arc<Stream>, count: usize, bytes: usize) -> Result<()> {
        let mut free = locked(&self.0);
        while free.len() < count {
            free.push_back(Slot::new(stream)?);
        }
        free.iter_mut().try_for_each(|slot| slot.memory.reserve(OP, bytes))
    }

    /// A parcel that a queue has yet to fill: its memory, behind all that still reads what was in it last.
    pub(super) fn parcel(self: &Arc<Self>, stream: &Arc<Stream>, rows: usize, cols: usize) -> Result<Parcel> {
        let free = locked(&self.0).pop_front();
        let mut slot = free.map_or_else(|| Slot::new(stream), Ok)?;
        for taken in locked(&slot.taken).drain(..) {
            taken.hold(OP, stream)?;
        }
        slot.memory.reserve(OP, rows * cols * size_of::<f32>())?;
        Ok(Parcel(Arc::new(Content { rows, cols, slot: Some(slot), home: Arc::clone(self) })))
    }
}

impl Parcel {
    /// All numbers, row by row, on the host.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn values(&self) -> Result<Vec<f32>> {
        let mut values = vec![0.0; self.0.rows * self.0.cols];
        self.slot().memory.download(OP, &mut values)?;
        Ok(values)
    }

    /// Rows and columns.
    pub fn shape(&self) -> (usize, usize) {
        (self.0.rows, self.0.cols)
    }

    pub(super) fn memory(&self) -> &Memory {
        &self.slot().memory
    }

    /// Behind what fills it.
    pub(super) fn ready(&self) -> &Event {
        &self.slot().ready
    }

    /// Its memory is not used again before this event.
    pub(super) fn taken_at(&self, event: &Arc<Event>) {
        locked(&self.slot().taken).push(Arc::clone(event));
    }

    fn slot(&self) -> &Slot {
        self.0.slot.as_ref().expect("it is there until the parcel is dropped")
    }

    fn bytes(&self) -> usize {
        self.0.rows * self.0.cols * size_of::<f32>()
    }
}

impl Cuda {
    /// Queues a copy of an array.
    pub(super) fn pack(&self, x: &CudaArray) -> Result<Parcel> {
        let parcel = self.parcels.parcel(&self.stream, x.rows, x.cols)?;
        self.stream.copy(OP, &x.memory, parcel.memory(), parcel.bytes())?;
        parcel.ready().record(OP)?;
        Ok(parcel)
    }

    /// Queues a copy of what a stage before has handed over, behind its being there and behind all that works with `out`.
    pub(super) fn unpack(&self, parcel: &Parcel, out: &mut CudaArray) -> Result<()> {
        out.reshape(parcel.0.rows, parcel.0.cols)?;
        parcel.ready().hold(OP, &self.copies)?;
        self.step.free.record(OP)?;
        self.step.free.hold(OP, &self.copies)?;
        self.copies.copy(OP, parcel.memory(), &out.memory, parcel.bytes())?;
        let copied = Arc::new(Event::new(OP, &self.copies, false)?);
        copied.record(OP)?;
        copied.hold(OP, &self.stream)?;
        parcel.taken_at(&copied);
        Ok(())
    }
}

/// Moments of a step.
#[derive(Debug)]
pub(super) struct StepClock {
    /// What is computed so far works with the residual stream no more.
    free: Event,
    /// The device turns to what this stage computes, and is done with it.
    start: Event,
    end: Event,
}

impl StepClock {
    pub(super) fn new(stream: &Arc<Stream>) -> Result<StepClock> {
        let event = |is_timed| Event::new("start", stream, is_timed);
        Ok(StepClock { free: event(false)?, start: event(true)?, end: event(true)? })
    }

    pub(super) fn begin(&self) -> Result<()> {
        self.start.record("begin a step")
    }

    pub(super) fn finish(&self) -> Result<Duration> {
        const OP: &str = "finish a step";
        self.end.record(OP)?;
        self.end.wait(OP)?;
        self.end.since(OP, &self.start)
    }
}
