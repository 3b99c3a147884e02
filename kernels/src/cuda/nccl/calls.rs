//! What is called of NCCL: joining a group of GPUs, moving numbers between them, and leaving it.
//!
//! Symbols are looked up here and not by cudarc, which does not try `libnccl.so.2`, the one name that packages have.

use std::ffi::{c_int, c_void};
use std::path::Path;
use std::sync::Arc;

use cudarc::nccl::sys::{cudaStream_t, ncclComm_t, ncclDataType_t, ncclResult_t, ncclUniqueId};

use super::super::libraries;
use super::super::stream::{Argument, Stream};
use crate::error::{Error, Result};

/// What a rank tells the others so that they find each other: `NCCL_UNIQUE_ID_BYTES`.
pub(super) type GroupId = [u8; 128];

type Transfer =
    unsafe extern "C" fn(*mut c_void, usize, ncclDataType_t, c_int, ncclComm_t, cudaStream_t) -> ncclResult_t;

/// The functions.
#[derive(Debug, Clone, Copy)]
struct Functions {
    get_unique_id: unsafe extern "C" fn(*mut ncclUniqueId) -> ncclResult_t,
    comm_init_rank: unsafe extern "C" fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int) -> ncclResult_t,
    comm_abort: unsafe extern "C" fn(ncclComm_t) -> ncclResult_t,
    group_start: unsafe extern "C" fn() -> ncclResult_t,
    group_end: unsafe extern "C" fn() -> ncclResult_t,
    send: Transfer,
    recv: Transfer,
}

/// The library, loaded.
#[derive(Debug, Clone, Copy)]
pub(super) struct Nccl(Functions);

/// A rank's place among others, which are on other GPUs.
#[derive(Debug)]
pub(super) struct Communicator {
    nccl: Nccl,
    comm: ncclComm_t,
    stream: Arc<Stream>,
}

// SAFETY: NCCL asks that a communicator's calls follow each other, from whatever thread; they need `&mut`.
unsafe impl Send for Communicator {}

/// Numbers in f32 on their way to or from another rank.
#[derive(Debug, Clone, Copy)]
pub(super) struct Move {
    pub(super) direction: Direction,
    pub(super) peer: usize,
    pub(super) at: Argument,
    pub(super) numbers: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    To,
    From,
}

impl Nccl {
    /// Loads the library.
    ///
    /// # Errors
    /// It is nowhere, or so old that it lacks a function.
    pub(super) fn load(first: Option<&Path>) -> Result<Nccl> {
        let library = libraries::NCCL.load(first)?;
        // SAFETY: the types are those of NCCL's header since version 2.7.
        unsafe {
            Ok(Nccl(Functions {
                get_unique_id: function(library, "ncclGetUniqueId")?,
                comm_init_rank: function(library, "ncclCommInitRank")?,
                comm_abort: function(library, "ncclCommAbort")?,
                group_start: function(library, "ncclGroupStart")?,
                group_end: function(library, "ncclGroupEnd")?,
                send: function(library, "ncclSend")?,
                recv: function(library, "ncclRecv")?,
            }))
        }
    }

    /// A new group's, for one rank to tell the others.
    pub(super) fn new_group(&self, stream: &Stream) -> Result<GroupId> {
        let mut id = ncclUniqueId { internal: [0; 128] };
        // SAFETY: the library writes as many bytes.
        check(stream, "begin a group", unsafe { (self.0.get_unique_id)(&mut id) })?;
        Ok(id.internal.map(|byte| byte as u8))
    }

    /// Takes a place in a group; waits until all have come.
    pub(super) fn join(
        self,
        stream: &Arc<Stream>,
        group: GroupId,
        rank: usize,
        num_ranks: usize,
    ) -> Result<Communicator> {
        const OP: &str = "join a group";
        stream.bind(OP)?;
        let id = ncclUniqueId { internal: group.map(|byte| byte as _) };
        let mut comm = std::ptr::null_mut();
        // SAFETY: the id is a group's, and the device is the thread's.
        check(stream, OP, unsafe {
            (self.0.comm_init_rank)(&mut comm, num_ranks as c_int, id, rank as c_int)
        })?;
        Ok(Communicator { nccl: self, comm, stream: Arc::clone(stream) })
    }
}

/// Looks a function up.
///
/// # Safety
/// `T` is its type.
unsafe fn function<T: Copy>(library: &libloading::Library, name: &str) -> Result<T> {
    // SAFETY: the caller vouches for the type, and the library is never closed.
    match unsafe { library.get::<T>(name.as_bytes()) } {
        Ok(symbol) => Ok(*symbol),
        Err(_) => Err(Error::NoCuda(format!(
            "libnccl has no {name}: found a version before 2.7, expected a later one"
        ))),
    }
}

impl Communicator {
    /// Queues moves as one group, so that none waits for another; those between two ranks follow each other as they stand.
    ///
    /// # Safety
    /// Each place is of this device and as large, and every peer queues the move's other end.
    pub(super) unsafe fn queue(&mut self, op: &'static str, moves: &[Move]) -> Result<()> {
        let Functions { group_start, group_end, send, recv, .. } = self.nccl.0;
        self.stream.bind(op)?;
        // SAFETY: the group is ended below, whatever becomes of its calls.
        check(&self.stream, op, unsafe { group_start() })?;
        let queued = moves.iter().filter(|part| part.numbers > 0).try_for_each(|part| {
            let Argument::Pointer(at) = part.at else { unreachable!("{:?} is no pointer", part.at) };
            let transfer = if part.direction == Direction::To { send } else { recv };
            let (peer, stream) = (part.peer as c_int, self.stream.handle().cast());
            // SAFETY: the caller vouches for the place and for the peer.
            let status = unsafe {
                transfer(
                    at as *mut c_void,
                    part.numbers,
                    ncclDataType_t::ncclFloat32,
                    peer,
                    self.comm,
                    stream,
                )
            };
            check(&self.stream, op, status)
        });
        // SAFETY: it was started above.
        let ended = check(&self.stream, op, unsafe { group_end() });
        queued.and(ended)
    }

    /// Leaves the group at once, and ends what is under way.
    pub(super) fn abort(&mut self) {
        let comm = std::mem::replace(&mut self.comm, std::ptr::null_mut());
        if !comm.is_null() && self.stream.bind("leave a group").is_ok() {
            // SAFETY: it was joined once, and is not used any more.
            let _ = unsafe { (self.nccl.0.comm_abort)(comm) };
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        // What this rank has queued is the others' too; after a failure there is nobody any more who waits for it.
        if !self.comm.is_null() {
            let _ = self.stream.wait("leave a group");
        }
        self.abort();
    }
}

fn check(stream: &Stream, op: &'static str, status: ncclResult_t) -> Result<()> {
    match status {
        ncclResult_t::ncclSuccess => Ok(()),
        other => Err(Error::Cuda { device: stream.index(), op, message: format!("NCCL: {other:?}") }),
    }
}
