//! Activations on their way from one stage to the next, which never leave the devices.
//!
//! A parcel is a copy, for the stage that hands it over goes on with its own array. The next stage copies it to its device, from
//! the same GPU or over the link between two. Its memory is then used again: in the steady state nothing is allocated.

use std::sync::{Arc, Mutex};

use super::arrays::CudaArray;
use super::stream::{Memory, Stream};
use super::{Cuda, locked};
use crate::error::Result;

const OP: &str = "hand over";

/// An array that was handed over, f32 `[rows, cols]`.
#[derive(Debug, Clone)]
pub struct Parcel(Arc<Content>);

/// Memory that no parcel is in.
#[derive(Debug, Default)]
pub(super) struct Parcels(Mutex<Vec<Memory>>);

#[derive(Debug)]
struct Content {
    rows: usize,
    cols: usize,
    /// There until it is dropped.
    memory: Option<Memory>,
    home: Arc<Parcels>,
}

impl Drop for Content {
    fn drop(&mut self) {
        locked(&self.home.0).extend(self.memory.take());
    }
}

impl Parcels {
    pub(super) fn clear(&self) {
        locked(&self.0).clear();
    }

    /// Has memory for so many, of so many bytes each.
    pub(super) fn reserve(&self, stream: &Arc<Stream>, count: usize, bytes: usize) -> Result<()> {
        let mut free = locked(&self.0);
        let missing = count.saturating_sub(free.len());
        free.extend((0..missing).map(|_| Memory::none(stream)));
        free.iter_mut().try_for_each(|memory| memory.reserve(OP, bytes))
    }

    fn memory(&self, stream: &Arc<Stream>) -> Memory {
        locked(&self.0).pop().unwrap_or_else(|| Memory::none(stream))
    }
}

impl Parcel {
    /// All numbers, row by row, on the host.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn values(&self) -> Result<Vec<f32>> {
        let mut values = vec![0.0; self.0.rows * self.0.cols];
        self.memory().download(OP, &mut values)?;
        Ok(values)
    }

    /// Rows and columns.
    pub fn shape(&self) -> (usize, usize) {
        (self.0.rows, self.0.cols)
    }

    fn memory(&self) -> &Memory {
        self.0.memory.as_ref().expect("it is there until the parcel is dropped")
    }

    fn bytes(&self) -> usize {
        self.0.rows * self.0.cols * size_of::<f32>()
    }
}

impl Cuda {
    /// Copies an array, and waits for it: the next stage may be on another device, whose queue knows nothing of this one, and
    /// the time of a step is that of its device.
    pub(super) fn pack(&self, x: &CudaArray) -> Result<Parcel> {
        let mut memory = self.parcels.memory(&self.stream);
        memory.reserve(OP, x.rows * x.cols * size_of::<f32>())?;
        let content =
            Content { rows: x.rows, cols: x.cols, memory: Some(memory), home: Arc::clone(&self.parcels) };
        let mut parcel = Parcel(Arc::new(content));
        let bytes = parcel.bytes();
        let content = Arc::get_mut(&mut parcel.0).expect("nobody else has it yet");
        let memory = content.memory.as_mut().expect("it was put there");
        self.stream.copy(OP, &x.memory, memory, bytes)?;
        self.stream.wait(OP)?;
        Ok(parcel)
    }

    /// Queues a copy of what a stage before has handed over. The parcel is kept until a step that reads it has ended.
    pub(super) fn unpack(&self, parcel: &Parcel, out: &mut CudaArray) -> Result<()> {
        out.reshape(parcel.0.rows, parcel.0.cols)?;
        self.stream.copy(OP, parcel.memory(), &mut out.memory, parcel.bytes())
    }
}
