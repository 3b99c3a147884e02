//! Activations on their way to a GPU of another process.
//!
//! Two processes join in a group of two for each hop: the first sends, the second receives, each on a queue of its own for that, in
//! the order in which the hosts tell each other of what comes. What is sent is a [`Parcel`], and what is received becomes one, so
//! that a stage takes it over as it does within a process. The sender's thread for that alone waits until they are computed, and
//! tells the receiver then; no other host waits for numbers.
//!
//! Where the other end is gone, a queue waits for ever until its group is left ([`GroupExit`]), and then goes on with numbers that
//! are none: who receives may leave only when it is known that nobody wants what comes of them.

use std::path::PathBuf;
use std::sync::Arc;

use super::calls::{Communicator, Direction, GroupExit, GroupId, Move, Nccl};
use crate::cuda::Cuda;
use crate::cuda::event::Event;
use crate::cuda::parcels::{OP, Parcel, Parcels};
use crate::cuda::stream::Stream;
use crate::error::Result;

/// The ranks of a group of two.
const SENDS: [usize; 2] = [0, 2];
const RECEIVES: [usize; 2] = [1, 2];

/// Where a stage's GPU takes in and gives out activations, when its neighbours are other processes.
#[derive(Debug, Clone)]
pub struct Gate {
    libraries: Option<PathBuf>,
    /// Memory for what comes in, and the queue by which it does.
    arrived: Arc<Parcels>,
    arrivals: Arc<Stream>,
}

impl Cuda {
    /// The device's way to those of other processes.
    pub(in crate::cuda) fn open_gate(&self) -> Gate {
        Gate {
            libraries: self.options.libraries.clone(),
            arrived: Arc::clone(&self.arrived),
            arrivals: Arc::clone(&self.arrivals),
        }
    }
}

impl Gate {
    /// Which GPU it is, as the driver counts them.
    pub fn device(&self) -> usize {
        self.arrivals.index()
    }

    /// Whether NCCL is there.
    pub fn has_nccl(&self) -> bool {
        self.nccl().is_ok()
    }

    /// A new group, for one end to tell the other.
    ///
    /// # Errors
    /// There is no NCCL.
    pub fn new_group(&self) -> Result<GroupId> {
        self.nccl()?.new_group(&self.arrivals)
    }

    /// Joins a group as the one who sends; waits for the other, until `exit` is taken.
    ///
    /// # Errors
    /// There is no NCCL, what it refuses, or the group was left.
    pub fn sender(&self, exit: &GroupExit, group: GroupId) -> Result<NcclSender> {
        let stream = Stream::open(self.device())?;
        Ok(NcclSender { communicator: self.nccl()?.join(&stream, exit, group, SENDS)?, stream })
    }

    /// Joins a group as the one who receives, as [`Gate::sender`] does.
    ///
    /// # Errors
    /// As of [`Gate::sender`].
    pub fn receiver(&self, exit: &GroupExit, group: GroupId) -> Result<NcclReceiver> {
        let communicator = self.nccl()?.join(&self.arrivals, exit, group, RECEIVES)?;
        Ok(NcclReceiver { communicator, gate: self.clone() })
    }

    fn nccl(&self) -> Result<Nccl> {
        Nccl::load(self.libraries.as_deref())
    }
}

/// Sends parcels to the other end of its group.
#[derive(Debug)]
pub struct NcclSender {
    communicator: Communicator,
    stream: Arc<Stream>,
}

impl NcclSender {
    /// Waits on the host until parcels are computed. The other end should hear of them no sooner: the kernel by which it receives
    /// spins on multiprocessors, and what it computes meanwhile goes without these.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn wait_for(&self, parcels: &[&Parcel]) -> Result<()> {
        parcels.iter().try_for_each(|parcel| parcel.ready().wait(OP))
    }

    /// Queues parcels of a micro-batch, behind their being computed; the other end receives as many of the same shapes.
    ///
    /// # Errors
    /// What the driver or NCCL refuses, or the group was left.
    pub fn send(&mut self, parcels: &[&Parcel]) -> Result<()> {
        let mut moves = Vec::new();
        for parcel in parcels {
            parcel.ready().hold(OP, &self.stream)?;
            let (rows, cols) = parcel.shape();
            let at = parcel.memory().start();
            moves.push(Move { direction: Direction::To, peer: RECEIVES[0], at, numbers: rows * cols });
        }
        // SAFETY: the places are whole parcels, whose memory is not used again before the event below; the other end receives
        // as many numbers, which it was told.
        unsafe { self.communicator.queue(OP, &self.stream, &moves) }?;
        let sent = Arc::new(Event::new(OP, &self.stream, false)?);
        sent.record(OP)?;
        parcels.iter().for_each(|parcel| parcel.taken_at(&sent));
        Ok(())
    }
}

impl Drop for NcclSender {
    fn drop(&mut self) {
        // Who has not received by now has been left.
        self.communicator.abort();
    }
}

/// Receives parcels from the other end of its group. Dropped, it waits for all that is queued, unless its group was left.
#[derive(Debug)]
pub struct NcclReceiver {
    communicator: Communicator,
    gate: Gate,
}

impl NcclReceiver {
    /// Queues the receipt of so many parcels `[rows, cols]` of a micro-batch. They will be there when the other end has sent them.
    ///
    /// # Errors
    /// As of [`NcclSender::send`].
    pub fn receive(&mut self, count: usize, rows: usize, cols: usize) -> Result<Vec<Parcel>> {
        let Gate { arrived, arrivals, .. } = &self.gate;
        let parcels = (0..count).map(|_| arrived.parcel(arrivals, rows, cols)).collect::<Result<Vec<_>>>()?;
        let from = |parcel: &Parcel| Move {
            direction: Direction::From,
            peer: SENDS[0],
            at: parcel.memory().start(),
            numbers: rows * cols,
        };
        let moves: Vec<Move> = parcels.iter().map(from).collect();
        // SAFETY: the places are whole parcels of memory that nobody uses before they are ready; the other end has said that it
        // sends as many numbers.
        unsafe { self.communicator.queue(OP, arrivals, &moves) }?;
        parcels.iter().try_for_each(|parcel| parcel.ready().record(OP))?;
        Ok(parcels)
    }
}
