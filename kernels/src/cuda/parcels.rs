//! Activations on their way from one stage to the next of a process, which never leave the devices. To and from other processes
//! parcels go by NCCL (`nccl/gate.rs`).
//!
//! A parcel is a copy, for the stage that hands it over goes on with its own array. From another GPU the next stage brings it to a
//! parcel of its own, by a queue beside the one that computes: so the next micro-batch's arrives while this one's is computed, and
//! what is computed finds it in its own memory. No host waits: an event says when a parcel is there, and another one when it was
//! taken, before which its memory is not used again. In the steady state nothing is allocated.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

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

    /// Has so many bytes for what this queue does from now on: behind all that reads what was in it last, also where that reads
    /// memory that is freed for more.
    fn grow(&mut self, stream: &Stream, bytes: usize) -> Result<()> {
        for taken in locked(&self.taken).drain(..) {
            taken.hold(OP, stream)?;
        }
        self.memory.reserve(OP, bytes)
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
        free.iter_mut().take(count).try_for_each(|slot| slot.grow(stream, bytes))
    }

    /// A parcel that a queue has yet to fill: its memory, behind all that still reads what was in it last.
    pub(super) fn parcel(self: &Arc<Self>, stream: &Arc<Stream>, rows: usize, cols: usize) -> Result<Parcel> {
        let free = locked(&self.0).pop_front();
        let mut slot = free.map_or_else(|| Slot::new(stream), Ok)?;
        slot.grow(stream, rows * cols * size_of::<f32>())?;
        Ok(Parcel(Arc::new(Content { rows, cols, slot: Some(slot), home: Arc::clone(self) })))
    }
}

impl Parcel {
    /// All numbers, row by row, on the host, as soon as they are computed. From any thread: they come by a queue of their own, so that
    /// this waits for nothing else that their device has to do, and is no part of what is captured there meanwhile.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn values(&self) -> Result<Vec<f32>> {
        let stream = Stream::open(self.memory().stream().index())?;
        let mut values = vec![0.0; self.0.rows * self.0.cols];
        self.ready().hold(OP, &stream)?;
        stream.download(OP, self.memory(), &mut values)?;
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

    /// The same of the moment when all that a queue has by now is done.
    fn taken_by(&self, stream: &Arc<Stream>) -> Result<()> {
        let taken = Arc::new(Event::new(OP, stream, false)?);
        taken.record(OP)?;
        self.taken_at(&taken);
        Ok(())
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
        let is_here = parcel.memory().stream().index() == self.stream.index();
        let parcel = if is_here { parcel.clone() } else { self.bring(parcel)? };
        parcel.ready().hold(OP, &self.stream)?;
        self.stream.copy(OP, parcel.memory(), &out.memory, parcel.bytes())?;
        parcel.taken_by(&self.stream)
    }

    /// Queues a copy of a parcel to one of this GPU, beside what it computes.
    fn bring(&self, parcel: &Parcel) -> Result<Parcel> {
        let (rows, cols) = parcel.shape();
        let here = self.arrived.parcel(&self.arrivals, rows, cols)?;
        parcel.ready().hold(OP, &self.arrivals)?;
        self.arrivals.copy(OP, parcel.memory(), here.memory(), parcel.bytes())?;
        here.ready().record(OP)?;
        parcel.taken_by(&self.arrivals)?;
        Ok(here)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Backend, WeightType};
    use crate::cuda::tests::emulated;

    /// The emulator draws what goes on: where one did not wait for the other, some of many come before.
    #[test]
    fn what_comes_from_another_gpu_arrives_while_this_one_computes() {
        let (from, to) = (emulated(WeightType::Bf16), emulated(WeightType::Bf16));
        let (mut x, mut busy) = (from.array(), to.array());
        from.upload(&[1.0, 2.0], 1, 2, &mut x).unwrap();
        to.upload(&[0.5; 4096], 64, 64, &mut busy).unwrap();
        let computed = Event::new(OP, &to.stream, false).unwrap();
        let mut num_early = 0;
        for _ in 0..40 {
            to.stream.wait(OP).unwrap();
            let more = to.pack(&busy).unwrap();
            (0..50).for_each(|_| to.unpack(&more, &mut busy).unwrap());
            computed.record(OP).unwrap();
            let parcel = from.pack(&x).unwrap();
            let here = to.bring(&parcel).unwrap();
            here.ready().wait(OP).unwrap();
            num_early += usize::from(!computed.has_passed());
            assert_eq!(here.values().unwrap(), [1.0, 2.0]);
        }
        assert!(num_early > 0, "none had arrived before all else was done");
    }

    /// A stage that goes in halves reads what another one has handed over.
    #[test]
    fn a_parcel_is_read_before_all_else_that_its_device_has_to_do() {
        let cuda = emulated(WeightType::Bf16);
        let (mut x, mut busy) = (cuda.array(), cuda.array());
        cuda.upload(&[1.0, 2.0], 1, 2, &mut x).unwrap();
        cuda.upload(&[0.5; 4096], 64, 64, &mut busy).unwrap();
        let computed = Event::new(OP, &cuda.stream, false).unwrap();
        let mut num_early = 0;
        for _ in 0..40 {
            let (parcel, more) = (cuda.pack(&x).unwrap(), cuda.pack(&busy).unwrap());
            (0..50).for_each(|_| cuda.unpack(&more, &mut busy).unwrap());
            computed.record(OP).unwrap();
            assert_eq!(parcel.values().unwrap(), [1.0, 2.0]);
            num_early += usize::from(!computed.has_passed());
        }
        assert!(num_early > 0, "none was there before all else was done");
    }

    /// As that stage is on another thread than the one whose step is captured.
    #[test]
    fn a_parcel_is_read_while_its_device_captures() {
        let cuda = emulated(WeightType::Bf16);
        let (mut x, mut other) = (cuda.array(), cuda.array());
        cuda.upload(&[1.0, 2.0], 1, 2, &mut x).unwrap();
        cuda.upload(&[3.0, 4.0], 1, 2, &mut other).unwrap();
        let parcel = cuda.pack(&x).unwrap();
        cuda.stream.begin_capture(OP).unwrap();
        let values = std::thread::scope(|scope| scope.spawn(|| parcel.values()).join().unwrap());
        cuda.stream.copy(OP, &other.memory, &x.memory, 8).unwrap();
        let graph = cuda.stream.end_capture(OP).expect("nothing else has come into it");
        assert_eq!(values.unwrap(), [1.0, 2.0]);
        graph.launch(OP).unwrap();
        assert_eq!(cuda.pack(&x).unwrap().values().unwrap(), [3.0, 4.0]);
    }

    /// Neither where no parcel shall have room, nor where one needs more.
    #[test]
    fn memory_that_another_gpu_has_yet_to_read_is_not_freed() {
        let (from, to) = (emulated(WeightType::Bf16), emulated(WeightType::Bf16));
        let (mut x, mut busy) = (from.array(), to.array());
        from.upload(&[1.0; 64], 8, 8, &mut x).unwrap();
        to.upload(&[0.5; 4096], 64, 64, &mut busy).unwrap();
        // By the queue that brings what is another GPU's: the emulator plays one GPU, and `unpack` would read in place.
        let read = Event::new(OP, &to.arrivals, false).unwrap();
        for bytes in (2..22).map(|times| times * 8 * 8 * size_of::<f32>()) {
            let more = to.pack(&busy).unwrap();
            (0..50).for_each(|_| drop(to.bring(&more).unwrap()));
            drop(to.bring(&from.pack(&x).unwrap()).unwrap());
            read.record(OP).unwrap();
            let changes = from.stream.changes();
            from.parcels.reserve(&from.stream, 0, bytes).unwrap();
            assert_eq!(from.stream.changes(), changes, "no memory was asked for");
            from.parcels.reserve(&from.stream, 1, bytes).unwrap();
            assert!(from.stream.changes() > changes && read.has_passed(), "it was freed before it was read");
        }
    }
}
