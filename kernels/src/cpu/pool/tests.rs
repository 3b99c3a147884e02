//! Regions of one task and of many, on pools of their own and on shared ones.

use super::*;
use std::sync::atomic::AtomicU32;

fn count_runs(pool: &ThreadPool, num_tasks: usize) -> Vec<u32> {
    let runs: Vec<AtomicU32> = (0..num_tasks).map(|_| AtomicU32::new(0)).collect();
    pool.for_each(num_tasks, |task| {
        runs[task].fetch_add(1, Ordering::Relaxed);
    });
    runs.into_iter().map(AtomicU32::into_inner).collect()
}

#[test]
fn every_task_runs_once_through_many_regions() {
    for threads in [1, 2, 3, 5] {
        let pool = ThreadPool::new(&available_cores(), threads);
        for region in 0..2000 {
            let num_tasks = region % 17;
            assert_eq!(count_runs(&pool, num_tasks), vec![1; num_tasks], "{threads} threads");
        }
    }
}

#[test]
fn regions_after_a_pause_find_sleeping_workers() {
    let pool = ThreadPool::new(&[], 3);
    for region in 0..50 {
        if region % 5 == 0 {
            thread::sleep(std::time::Duration::from_millis(2));
        }
        assert_eq!(count_runs(&pool, 64), vec![1; 64]);
    }
}

#[test]
fn workers_really_share_the_tasks() {
    let pool = ThreadPool::new(&[], 2);
    let names = Mutex::new(std::collections::HashSet::new());
    // Two tasks that wait for each other can only end on two threads.
    let barrier = std::sync::Barrier::new(2);
    pool.for_each(2, |_| {
        names.lock().unwrap().insert(thread::current().id());
        barrier.wait();
    });
    assert_eq!(names.into_inner().unwrap().len(), 2);
}

#[test]
fn several_callers_may_share_a_pool() {
    let pool = ThreadPool::new(&[], 3);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..500 {
                    assert_eq!(count_runs(&pool, 9), vec![1; 9]);
                }
            });
        }
    });
}

#[test]
fn users_of_the_same_cores_share_a_pool_as_long_as_there_are_any() {
    let cores = [available_cores()[0]];
    let pool = ThreadPool::of_device(&cores, 2);
    assert!(Arc::ptr_eq(&pool, &ThreadPool::of_device(&cores, 2)));
    assert!(!Arc::ptr_eq(&pool, &ThreadPool::of_device(&cores, 3)));
    assert!(!Arc::ptr_eq(&ThreadPool::of_device(&[], 2), &ThreadPool::of_device(&[], 2)));
    let gone = Arc::downgrade(&pool);
    drop(pool);
    assert!(gone.upgrade().is_none(), "nobody has it");
    assert_eq!(count_runs(&ThreadPool::of_device(&cores, 2), 9), vec![1; 9]);
}

#[test]
fn a_nested_region_runs_inline() {
    let pool = ThreadPool::new(&[], 3);
    let total = AtomicU32::new(0);
    pool.for_each(8, |_| {
        pool.for_each(8, |_| {
            total.fetch_add(1, Ordering::Relaxed);
        });
    });
    assert_eq!(total.into_inner(), 64);
}

#[test]
fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
    let pool = ThreadPool::new(&[], 3);
    for poison in 0..20 {
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            pool.for_each(20, |task| assert_ne!(task, poison, "poisoned task"));
        }));
        assert!(outcome.is_err(), "task {poison} panicked in silence");
        assert_eq!(count_runs(&pool, 20), vec![1; 20]);
    }
}

#[test]
fn writes_of_tasks_are_seen_after_the_region() {
    let pool = ThreadPool::new(&[], 4);
    let mut sums = vec![0u64; 64];
    for round in 1..=200u64 {
        let base = SendPtr(sums.as_mut_ptr());
        // SAFETY: every task adds to its own entry.
        pool.for_each(64, |task| unsafe { *base.at(task) += round });
    }
    assert_eq!(sums, vec![200 * 201 / 2; 64]);
}

struct SendPtr(*mut u64);
// SAFETY: the test's tasks touch disjoint entries.
unsafe impl Sync for SendPtr {}
impl SendPtr {
    fn at(&self, index: usize) -> *mut u64 {
        // SAFETY: the index is below the vector's length.
        unsafe { self.0.add(index) }
    }
}
