//! What is called of NCCL: joining a group of GPUs, moving numbers between them, and leaving it.
//!
//! Symbols are looked up here and not by cudarc, which does not try `libnccl.so.2`, the one name that packages have.

use std::ffi::{c_int, c_uint, c_void};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cudarc::nccl::sys::{cudaStream_t, ncclComm_t, ncclDataType_t, ncclResult_t, ncclUniqueId};

use super::super::libraries::{self, Found};
use super::super::locked;
use super::super::stream::{Argument, Stream};
use crate::error::{Error, Result};

/// What a rank tells the others so that they find each other: `NCCL_UNIQUE_ID_BYTES`.
pub type GroupId = [u8; 128];

/// How long ranks wait for each other before they have met. The library takes some seconds where it has many ways to try.
const PATIENCE: Duration = Duration::from_secs(60);

/// The oldest version that is taken, as `ncclGetVersion` has it. Groups are left by other threads than those that call, and before it
/// one of the library's own may wait in `poll` where it never sees that (`src/proxy.cc`), and the flag that says so is none for threads.
const OLDEST: c_int = 22_003;

/// A group of moves is queued by a thread that the library starts for it, from version 2.23 on; before, only the first with each rank.
/// That takes some tens of microseconds, and to sleep would take longer.
const SOON: Duration = Duration::from_micros(200);

/// How often a rank looks later on whether what it has begun is under way.
const LOOK_EVERY: Duration = Duration::from_micros(50);

type Transfer =
    unsafe extern "C" fn(*mut c_void, usize, ncclDataType_t, c_int, ncclComm_t, cudaStream_t) -> ncclResult_t;

/// The functions.
#[derive(Debug, Clone, Copy)]
struct Functions {
    get_unique_id: unsafe extern "C" fn(*mut ncclUniqueId) -> ncclResult_t,
    comm_init_rank:
        unsafe extern "C" fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut Config) -> ncclResult_t,
    comm_get_error: unsafe extern "C" fn(ncclComm_t, *mut ncclResult_t) -> ncclResult_t,
    comm_abort: unsafe extern "C" fn(ncclComm_t) -> ncclResult_t,
    group_start: unsafe extern "C" fn() -> ncclResult_t,
    group_end: unsafe extern "C" fn() -> ncclResult_t,
    send: Transfer,
    recv: Transfer,
}

/// `ncclConfig_t` as version 2.14 has it, the first that has one; later ones take what it lacks for not said.
#[repr(C)]
struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    padding: c_int,
}

impl Config {
    /// Calls come back at once and go on by themselves: whoever waits for another rank can be called off.
    fn of_calls_that_do_not_wait() -> Config {
        Config { size: size_of::<Config>(), magic: 0xcafe_beef, version: 21_400, blocking: 0, padding: 0 }
    }
}

/// The library, loaded.
#[derive(Debug, Clone, Copy)]
pub(super) struct Nccl(Functions);

/// A rank's place among others, which are on other GPUs.
#[derive(Debug)]
pub(super) struct Communicator {
    nccl: Nccl,
    exit: GroupExit,
    stream: Arc<Stream>,
}

/// The way out of a group, for any thread and at any time, also before it has been joined: who waits for another rank waits no
/// longer then, on the host as on the device, where queues go on with whatever numbers are there.
#[derive(Debug, Clone, Default)]
pub struct GroupExit(Arc<Exit>);

#[derive(Debug, Default)]
struct Exit {
    place: Mutex<Place>,
    /// Is no longer being left.
    freed: Condvar,
}

#[derive(Debug, Default)]
enum Place {
    #[default]
    Outside,
    Inside(Member),
    /// Left, while the library has yet to free what it had for the group.
    Leaving,
    Left,
}

#[derive(Debug)]
struct Member {
    nccl: Nccl,
    comm: ncclComm_t,
    stream: Arc<Stream>,
}

// SAFETY: NCCL asks that a communicator's calls follow each other, from whatever thread; they are made under a lock, but for the last.
unsafe impl Send for Member {}

impl Member {
    /// Leaves the group, and ends what is under way. The library may wait for other ranks to do so, too.
    fn abort(self) {
        if self.stream.bind("leave a group").is_ok() {
            // SAFETY: it was joined once, and is not used any more.
            let _ = unsafe { (self.nccl.0.comm_abort)(self.comm) };
        }
    }
}

impl GroupExit {
    /// Leaves the group, and ends what is under way; waits for nobody.
    pub fn leave(&self) {
        let mut place = locked(&self.0.place);
        match std::mem::replace(&mut *place, Place::Left) {
            Place::Outside | Place::Left => {}
            Place::Leaving => *place = Place::Leaving,
            Place::Inside(member) => {
                *place = Place::Leaving;
                let exit = Arc::clone(&self.0);
                let leave = move || {
                    member.abort();
                    *locked(&exit.place) = Place::Left;
                    exit.freed.notify_all();
                };
                let thread = std::thread::Builder::new().name("leave".to_owned()).spawn(leave);
                thread.expect("the system starts a thread");
            }
        }
    }

    /// Whether it was left.
    pub fn has_left(&self) -> bool {
        matches!(*locked(&self.0.place), Place::Leaving | Place::Left)
    }

    /// Waits until the library has freed what it had for a group that was left, at most for so long; whether it has.
    pub fn has_freed_within(&self, patience: Duration) -> bool {
        let is_leaving = |place: &mut Place| matches!(place, Place::Leaving);
        let place = locked(&self.0.place);
        let waited = self.0.freed.wait_timeout_while(place, patience, is_leaving);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Calls something of the group that does not wait.
    fn call(
        &self,
        stream: &Stream,
        op: &'static str,
        call: impl FnOnce(ncclComm_t) -> ncclResult_t,
    ) -> Result<()> {
        match &*locked(&self.0.place) {
            Place::Inside(member) => check(stream, op, call(member.comm)),
            Place::Outside | Place::Leaving | Place::Left => {
                Err(failed(stream, op, "the group was left".to_owned()))
            }
        }
    }

    /// Waits until what was begun is under way.
    fn settle(&self, nccl: Nccl, stream: &Stream, op: &'static str) -> Result<()> {
        let begun = Instant::now();
        loop {
            let mut state = ncclResult_t::ncclInProgress;
            // SAFETY: the library writes a number.
            self.call(stream, op, |comm| unsafe { (nccl.0.comm_get_error)(comm, &mut state) })?;
            if state != ncclResult_t::ncclInProgress {
                return check(stream, op, state);
            }
            if begun.elapsed() > PATIENCE {
                return Err(failed(stream, op, format!("another rank did not come within {PATIENCE:?}")));
            }
            match begun.elapsed() < SOON {
                true => std::thread::yield_now(),
                false => std::thread::sleep(LOOK_EVERY),
            }
        }
    }
}

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

/// Looks the library up.
///
/// # Errors
/// It is nowhere, or too old.
pub(in crate::cuda) fn find(first: Option<&Path>) -> Result<Found> {
    let found = libraries::NCCL.find(first)?;
    let mut version: c_int = 0;
    // SAFETY: the type is that of NCCL's header since version 1, and the library writes a number.
    let asked = unsafe {
        let get_version: unsafe extern "C" fn(*mut c_int) -> ncclResult_t =
            function(found.library, "ncclGetVersion")?;
        get_version(&mut version)
    };
    if !is_fine(asked) || version < OLDEST {
        return Err(Error::NoCuda(format!(
            "NCCL too old: {} is of version {}, expected {} at least\nhint: install a later release of nvidia-nccl-cu13",
            found.path.display(),
            version_name(version),
            version_name(OLDEST)
        )));
    }
    Ok(found)
}

/// Such as `2.20.3`. Until 2.8 numbers had one digit less.
fn version_name(version: c_int) -> String {
    let major = if version < 10_000 { 1_000 } else { 10_000 };
    format!("{}.{}.{}", version / major, version % major / 100, version % 100)
}

impl Nccl {
    /// Loads the library.
    ///
    /// # Errors
    /// It is nowhere, too old, or lacks a function.
    pub(super) fn load(first: Option<&Path>) -> Result<Nccl> {
        let library = find(first)?.library;
        // SAFETY: the types are those of NCCL's header since version 2.14.
        unsafe {
            Ok(Nccl(Functions {
                get_unique_id: function(library, "ncclGetUniqueId")?,
                comm_init_rank: function(library, "ncclCommInitRankConfig")?,
                comm_get_error: function(library, "ncclCommGetAsyncError")?,
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

    /// Takes a place in a group; waits until all have come, or `exit` is taken.
    pub(super) fn join(
        self,
        stream: &Arc<Stream>,
        exit: &GroupExit,
        group: GroupId,
        [rank, num_ranks]: [usize; 2],
    ) -> Result<Communicator> {
        const OP: &str = "join a group";
        stream.bind(OP)?;
        let id = ncclUniqueId { internal: group.map(|byte| byte as _) };
        let mut comm = std::ptr::null_mut();
        let mut config = Config::of_calls_that_do_not_wait();
        {
            let mut place = locked(&exit.0.place);
            if !matches!(*place, Place::Outside) {
                return Err(failed(stream, OP, "the group was left".to_owned()));
            }
            // SAFETY: the id is a group's, and the device is the thread's.
            check(stream, OP, unsafe {
                (self.0.comm_init_rank)(&mut comm, num_ranks as c_int, id, rank as c_int, &mut config)
            })?;
            *place = Place::Inside(Member { nccl: self, comm, stream: Arc::clone(stream) });
        }
        let communicator = Communicator { nccl: self, exit: exit.clone(), stream: Arc::clone(stream) };
        exit.settle(self, stream, OP)?;
        Ok(communicator)
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
        Err(_) => Err(Error::NoCuda(format!("libnccl has no {name}, expected what NVIDIA calls so"))),
    }
}

impl Communicator {
    /// Queues moves as one group, so that none waits for another; those between two ranks follow each other as they stand.
    /// Where calls go to several queues, events have what is moved follow in their order.
    ///
    /// # Safety
    /// Each place is of this device and as large, and every peer queues the move's other end.
    pub(super) unsafe fn queue(&self, op: &'static str, stream: &Stream, moves: &[Move]) -> Result<()> {
        let Functions { group_start, group_end, send, recv, .. } = self.nccl.0;
        stream.bind(op)?;
        let queue = |comm: ncclComm_t| {
            // SAFETY: the group is ended below, whatever becomes of its calls.
            let started = unsafe { group_start() };
            if !is_fine(started) {
                return started;
            }
            let mut moved = ncclResult_t::ncclSuccess;
            for part in moves.iter().filter(|part| part.numbers > 0) {
                let Argument::Pointer(at) = part.at else { unreachable!("{:?} is no pointer", part.at) };
                let transfer = if part.direction == Direction::To { send } else { recv };
                let (at, peer, stream) = (at as *mut c_void, part.peer as c_int, stream.handle().cast());
                // SAFETY: the caller vouches for the place and for the peer.
                moved =
                    unsafe { transfer(at, part.numbers, ncclDataType_t::ncclFloat32, peer, comm, stream) };
                if !is_fine(moved) {
                    break;
                }
            }
            // SAFETY: it was started above.
            let ended = unsafe { group_end() };
            if is_fine(moved) { ended } else { moved }
        };
        self.exit.call(stream, op, queue)?;
        // Two ranks that meet for the first time have yet to find a way to each other.
        self.exit.settle(self.nccl, stream, op)
    }

    /// Leaves the group, and ends what is under way; waits for nobody.
    pub(super) fn abort(&self) {
        self.exit.leave();
    }

    /// Whether it was left, by whoever has its exit.
    pub(super) fn has_left(&self) -> bool {
        self.exit.has_left()
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        // What this rank has queued is the others' too; after a failure there is nobody any more who waits for it.
        if !self.exit.has_left() {
            let _ = self.stream.wait("leave a group");
        }
        self.exit.leave();
    }
}

/// Whether a call was taken; what it has begun may be under way yet.
fn is_fine(status: ncclResult_t) -> bool {
    matches!(status, ncclResult_t::ncclSuccess | ncclResult_t::ncclInProgress)
}

fn check(stream: &Stream, op: &'static str, status: ncclResult_t) -> Result<()> {
    match is_fine(status) {
        true => Ok(()),
        false => Err(failed(stream, op, format!("{status:?}"))),
    }
}

fn failed(stream: &Stream, op: &'static str, what: String) -> Error {
    Error::Cuda { device: stream.index(), op, message: format!("NCCL: {what}") }
}
