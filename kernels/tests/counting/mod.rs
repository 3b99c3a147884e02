//! The system's allocator, with a count of what it gave. The count is of the whole process, so that a program has one test by it.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

struct Counting;

static TIMES: AtomicUsize = AtomicUsize::new(0);
static BYTES: AtomicUsize = AtomicUsize::new(0);

fn count(bytes: usize) {
    TIMES.fetch_add(1, Ordering::Relaxed);
    BYTES.fetch_add(bytes, Ordering::Relaxed);
}

// SAFETY: everything is the system's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count(new_size);
        // SAFETY: the caller's.
        unsafe { System.realloc(memory, layout, new_size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// How often memory was given, and how much.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Allocated {
    pub(crate) times: usize,
    pub(crate) bytes: usize,
}

impl Allocated {
    pub(crate) const NOTHING: Allocated = Allocated { times: 0, bytes: 0 };

    /// While some work is done, by any thread.
    pub(crate) fn during(work: impl FnOnce()) -> Allocated {
        let before = Allocated::so_far();
        work();
        let after = Allocated::so_far();
        Allocated { times: after.times - before.times, bytes: after.bytes - before.bytes }
    }

    fn so_far() -> Allocated {
        Allocated { times: TIMES.load(Ordering::Relaxed), bytes: BYTES.load(Ordering::Relaxed) }
    }
}
