//! A small fork-join pool of pinned threads: one per CPU device.
//!
//! A *region* is one call of [`ThreadPool::for_each`]. The caller opens it, works in it like everybody
//! else, closes it when no task is left, and waits for those workers alone that had entered. A worker
//! that sleeps, or that the system has put aside for another process, is therefore never waited for
//! unless it holds a task. Waiting is a short spin and then sleep: threads that spin at barriers starve
//! each other as soon as anything else runs on their cores.
//!
//! Which thread runs which task is left to chance; a kernel's result must not depend on it.

#[cfg(test)]
mod tests;

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::{self, JoinHandle, Thread};

use core_affinity::CoreId;
use crossbeam::utils::CachePadded;

use super::caches::CoreCaches;

/// Pauses a thread spins for before it sleeps. A pause takes 10 to 40 ns on the x86 processors of the last
/// years, so this is 20 to 80 µs: longer than the serial code between two operations of a block, much
/// shorter than a scheduler's time slice.
const SPIN_PAUSES: u32 = 2000;

/// The gate's lowest bits count the workers inside the region.
const INSIDE: u64 = 0xffff;
/// The caller takes no more workers in.
const CLOSED: u64 = 1 << 16;
/// The caller sleeps until the last worker has left.
const CALLER_SLEEPS: u64 = 1 << 17;
/// The remaining bits number the regions, so that a worker enters each of them once.
const REGION: u64 = 1 << 18;

thread_local! {
    /// Whether this thread is inside a region: a nested region runs inline.
    static IN_REGION: Cell<bool> = const { Cell::new(false) };
}

/// The cores that the calling thread may run on. To be asked before a thread is pinned, as the answer is then that
/// core alone.
pub fn available_cores() -> Vec<usize> {
    match core_affinity::get_core_ids() {
        Some(cores) if !cores.is_empty() => cores.into_iter().map(|core| core.id).collect(),
        _ => (0..thread::available_parallelism().map_or(1, |cores| cores.get())).collect(),
    }
}

/// A fork-join pool of threads pinned to cores; the caller of a region is one of them.
#[derive(Debug)]
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held for the length of a region: several threads may share a pool.
    region: Mutex<()>,
    caller_core: Option<usize>,
    caches: CoreCaches,
}

/// What the caller lays out for the workers of a region.
struct Region {
    task: *const (dyn Fn(usize) + Sync),
    num_tasks: usize,
    caller: Thread,
}

struct Shared {
    gate: CachePadded<AtomicU64>,
    /// The next task to be claimed.
    next: CachePadded<AtomicUsize>,
    /// Written by the caller while the gate is closed and nobody inside; read by workers inside.
    region: UnsafeCell<Option<Region>>,
    /// What the first task to panic has thrown.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    has_panicked: AtomicBool,
    is_sleeping: Vec<CachePadded<AtomicBool>>,
    is_stopping: AtomicBool,
}

// SAFETY: all fields but `region` are Sync. `region` is written by the thread that holds the pool's
// region lock, while the gate is closed and no worker inside; workers read it only while they are counted
// inside, and entering (acquire) happens after the gate was opened (release).
unsafe impl Sync for Shared {}
// SAFETY: the task pointer is dereferenced only while its region runs, and points to a Sync closure.
unsafe impl Send for Shared {}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("num_workers", &self.is_sleeping.len()).finish_non_exhaustive()
    }
}

/// The pools of devices, while anybody has them.
static OF_DEVICES: Mutex<Vec<DevicePool>> = Mutex::new(Vec::new());

struct DevicePool {
    cores: Vec<usize>,
    threads: usize,
    pool: Weak<ThreadPool>,
}

impl ThreadPool {
    /// The pool of a device: as [`ThreadPool::new`] makes it, or the one that another user of the same cores has, with as many
    /// threads. So two stages on one device take turns, region by region, and do not get into each other's way. Without
    /// cores each has its own.
    pub fn of_device(cores: &[usize], threads: usize) -> Arc<ThreadPool> {
        if cores.is_empty() {
            return Arc::new(ThreadPool::new(cores, threads));
        }
        let mut pools = OF_DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
        pools.retain(|device| device.pool.strong_count() > 0);
        let is_same = |device: &&DevicePool| device.cores == cores && device.threads == threads;
        if let Some(pool) = pools.iter().find(is_same).and_then(|device| device.pool.upgrade()) {
            return pool;
        }
        let pool = Arc::new(ThreadPool::new(cores, threads));
        pools.push(DevicePool { cores: cores.to_vec(), threads, pool: Arc::downgrade(&pool) });
        pool
    }

    /// A pool of `threads` threads (at least one, the caller counted). Thread `i` is pinned to
    /// `cores[i % cores.len()]`; thread 0 is the caller, who pins itself by [`ThreadPool::pin_caller`].
    /// Without cores, or where the system refuses, threads run unpinned.
    pub fn new(cores: &[usize], threads: usize) -> ThreadPool {
        let num_workers = threads.clamp(1, INSIDE as usize) - 1;
        let shared = Arc::new(Shared {
            gate: CachePadded::new(AtomicU64::new(CLOSED)),
            next: CachePadded::new(AtomicUsize::new(0)),
            region: UnsafeCell::new(None),
            panic: Mutex::new(None),
            has_panicked: AtomicBool::new(false),
            is_sleeping: (0..num_workers).map(|_| CachePadded::new(AtomicBool::new(false))).collect(),
            is_stopping: AtomicBool::new(false),
        });
        let core_of = |thread: usize| (!cores.is_empty()).then(|| cores[thread % cores.len()]);
        let workers = (0..num_workers).map(|worker| spawn_worker(&shared, worker, core_of(worker + 1)));
        let (caller_core, workers) = (core_of(0), workers.collect());
        let caches = CoreCaches::of(&cores[..cores.len().min(num_workers + 1)]);
        ThreadPool { workers, shared, region: Mutex::new(()), caller_core, caches }
    }

    /// As if its cores had other caches.
    #[cfg(test)]
    pub(crate) fn with_caches(mut self, caches: CoreCaches) -> ThreadPool {
        self.caches = caches;
        self
    }

    /// The caches that its cores have, as its first one has them.
    pub(crate) fn caches(&self) -> CoreCaches {
        self.caches
    }

    /// Threads that work in a region, the caller counted.
    pub fn num_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Pins the calling thread to the pool's first core. For a thread whose regions all run here.
    pub fn pin_caller(&self) {
        pin(self.caller_core);
    }

    /// Runs `task(i)` for every `i` in `0..num_tasks` on the pool's threads, the caller among them, and
    /// returns when all are done. Tasks are claimed one by one. With one task or one thread, and inside
    /// of another region, everything runs in the caller. A panic of a task is passed on to the caller
    /// when nobody works any more; tasks not yet begun are then left out.
    pub fn for_each(&self, num_tasks: usize, task: impl Fn(usize) + Sync) {
        if num_tasks <= 1 || self.workers.is_empty() || IN_REGION.get() {
            (0..num_tasks).for_each(task);
            return;
        }
        let guard = self.region.lock().unwrap_or_else(PoisonError::into_inner);
        self.open(num_tasks, &task);
        IN_REGION.set(true);
        self.shared.work(num_tasks, &task);
        IN_REGION.set(false);
        self.close();
        let thrown = self.shared.take_panic();
        drop(guard);
        if let Some(payload) = thrown {
            resume_unwind(payload);
        }
    }

    // ## closed => open
    fn open(&self, num_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. Workers call the task while they are counted inside, and
        // `close` returns when none is, before `task` goes out of scope in `for_each`.
        let task =
            unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(task) };
        // SAFETY: this thread holds the region lock, the gate is closed and nobody is inside.
        unsafe { *shared.region.get() = Some(Region { task, num_tasks, caller: thread::current() }) };
        shared.next.store(0, Ordering::Relaxed);
        let gate = shared.gate.load(Ordering::Relaxed);
        debug_assert_eq!(gate & (INSIDE | CLOSED | CALLER_SLEEPS), CLOSED, "a region before has not ended");
        // SeqCst here and on `is_sleeping`: either a worker that lies down sees the open gate, or this
        // thread sees it asleep.
        shared.gate.store((gate & !(REGION - 1)).wrapping_add(REGION), Ordering::SeqCst);
        self.wake(num_tasks - 1);
    }

    // ## open => closed, once the workers inside have left
    fn close(&self) {
        let shared = &*self.shared;
        let mut gate = shared.gate.fetch_or(CLOSED, Ordering::AcqRel) | CLOSED;
        let mut pauses = 0;
        while gate & INSIDE != 0 {
            if pauses < SPIN_PAUSES {
                pauses += 1;
                std::hint::spin_loop();
            } else if gate & CALLER_SLEEPS == 0 {
                // A worker that leaves from now on wakes this thread; look once more before sleeping.
                shared.gate.fetch_or(CALLER_SLEEPS, Ordering::AcqRel);
            } else {
                thread::park();
            }
            gate = shared.gate.load(Ordering::Acquire);
        }
        shared.gate.fetch_and(!CALLER_SLEEPS, Ordering::Relaxed);
    }

    /// Wakes up to `num_wanted` of the workers that sleep.
    fn wake(&self, num_wanted: usize) {
        for (worker, is_sleeping) in self.workers.iter().zip(&self.shared.is_sleeping).take(num_wanted) {
            if is_sleeping.load(Ordering::SeqCst) && is_sleeping.swap(false, Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.is_stopping.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches what its tasks throw, so there is nothing to learn from its end.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// Claims and runs tasks until none is left.
    fn work(&self, num_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= num_tasks {
                return;
            }
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| task(index))) {
                self.next.store(num_tasks, Ordering::Relaxed);
                let mut first = self.panic.lock().unwrap_or_else(PoisonError::into_inner);
                first.get_or_insert(payload);
                self.has_panicked.store(true, Ordering::Relaxed);
            }
        }
    }

    /// What was thrown in the region that has just ended; leaving it was synchronised by the gate.
    fn take_panic(&self) -> Option<Box<dyn Any + Send>> {
        if !self.has_panicked.swap(false, Ordering::Relaxed) {
            return None;
        }
        self.panic.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// A worker's life: wait for a region it has not been in, enter, work, leave.
    fn serve(&self, worker: usize) {
        IN_REGION.set(true);
        let mut last_region = 0;
        while let Some(region) = self.enter(worker, last_region) {
            last_region = region;
            // SAFETY: this worker is counted inside, so the caller leaves `region` and the task alone.
            let (task, num_tasks, caller) = unsafe {
                let region = (*self.region.get()).as_ref().expect("an open region is laid out");
                (&*region.task, region.num_tasks, region.caller.clone())
            };
            self.work(num_tasks, task);
            let before = self.gate.fetch_sub(1, Ordering::AcqRel);
            if before & INSIDE == 1 && before & CALLER_SLEEPS != 0 {
                caller.unpark();
            }
        }
    }

    /// Waits for an open region other than `last_region` and counts the worker in; `None` at the end.
    fn enter(&self, worker: usize, last_region: u64) -> Option<u64> {
        let mut pauses = 0;
        loop {
            let gate = self.gate.load(Ordering::SeqCst);
            let region = gate & !(REGION - 1);
            if gate & CLOSED == 0 && region != last_region {
                let entered = self.gate.compare_exchange(gate, gate + 1, Ordering::AcqRel, Ordering::Relaxed);
                if entered.is_ok() {
                    self.is_sleeping[worker].store(false, Ordering::Relaxed);
                    return Some(region);
                }
            } else if self.is_stopping.load(Ordering::SeqCst) {
                return None;
            } else if pauses < SPIN_PAUSES {
                pauses += 1;
                std::hint::spin_loop();
            } else if !self.is_sleeping[worker].swap(true, Ordering::SeqCst) {
                // Lain down: look at the gate once more, for the caller may have missed it.
            } else {
                thread::park();
                pauses = 0;
            }
        }
    }
}

fn spawn_worker(shared: &Arc<Shared>, worker: usize, core: Option<usize>) -> JoinHandle<()> {
    let shared = Arc::clone(shared);
    let body = move || {
        pin(core);
        shared.serve(worker);
    };
    thread::Builder::new().name(format!("kernels-{}", worker + 1)).spawn(body).expect("spawn a pool thread")
}

/// Cores that a set of the system's C library has room for; a number beyond would be out of its bounds.
const MAX_CORES: usize = 1024;

/// Moves the calling thread to a core. A thread inherits its creator's core, so that a worker moves even where
/// its creator was pinned before; where the system refuses, it stays.
fn pin(core: Option<usize>) {
    if let Some(id) = core.filter(|&core| core < MAX_CORES) {
        core_affinity::set_for_current(CoreId { id });
    }
}
