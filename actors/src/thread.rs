//! Threads beside actors, and what they share.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Starts a thread that ends by itself.
pub(crate) fn spawn(name: impl Into<String>, run: impl FnOnce() + Send + 'static) {
    std::thread::Builder::new().name(name.into()).spawn(run).expect("the system starts a thread");
}

/// Locks what threads share, also after one has panicked that held it: what ends a thread is told by another way.
pub(crate) fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
