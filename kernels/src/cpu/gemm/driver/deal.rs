//! Deals the units of products out to threads.

use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::cpu::gemm::plan::share;
use crate::cpu::pool::ThreadPool;

/// Most threads that a product is dealt out to.
const MAX_SHARES: usize = 256;

/// A share's next unit, on a cache line of its own.
#[repr(align(64))]
struct Next(AtomicUsize);

/// Runs units on so many threads, each with what `begin` makes. A thread has a run of neighbouring units, and when it is
/// through with them helps the others, from their next unit on.
pub(super) fn deal<R>(
    pool: &ThreadPool,
    num_units: usize,
    num_shares: usize,
    begin: impl Fn() -> R + Sync,
    run: impl Fn(usize) + Sync,
) {
    let num_shares = num_shares.min(num_units).min(MAX_SHARES);
    if num_shares <= 1 {
        let _registers = begin();
        (0..num_units).for_each(run);
        return;
    }
    // Only those of the shares are written: all of them would take half of an L1 in every region.
    let mut next = [const { MaybeUninit::<Next>::uninit() }; MAX_SHARES];
    for (i, next) in next[..num_shares].iter_mut().enumerate() {
        next.write(Next(AtomicUsize::new(share(num_units, num_shares, i).start)));
    }
    // SAFETY: the loop above has written these.
    let next = unsafe { next[..num_shares].assume_init_ref() };
    pool.for_each(num_shares, |own| {
        let _registers = begin();
        for victim in (own..num_shares).chain(0..own) {
            let end = share(num_units, num_shares, victim).end;
            loop {
                // Relaxed: the counter orders nothing but itself, and the pool orders the rest.
                let idx = next[victim].0.fetch_add(1, Ordering::Relaxed);
                if idx >= end {
                    break;
                }
                run(idx);
            }
        }
    });
}
