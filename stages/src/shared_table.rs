//! A table that stages of one process have in common.
//!
//! The first stage of a tied model looks tokens up in the matrix by which the last one draws. On cores, which have one memory, both
//! have the same: SmolLM2's takes 57 MB, a fifth of its weights.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use kernels::CpuMatrix;

use crate::error::Result;

/// The embedding of stages that cores of one machine compute.
pub type CpuTable = SharedTable<CpuMatrix>;

/// A table, as long as any stage holds it, and the numeric profile of the backend that packed it.
#[derive(Debug)]
pub struct SharedTable<M>(Mutex<(String, Weak<M>)>);

impl<M> Default for SharedTable<M> {
    fn default() -> Self {
        SharedTable(Mutex::new((String::new(), Weak::new())))
    }
}

impl<M> SharedTable<M> {
    /// The table that another stage holds, if it was packed for the same `profile`, or else what `pack` makes: others wait for it.
    ///
    /// # Errors
    /// Those of `pack`; whoever comes next packs it then.
    pub(crate) fn get_or_pack(&self, profile: String, pack: impl FnOnce() -> Result<M>) -> Result<Arc<M>> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(table) = held.1.upgrade().filter(|_| held.0 == profile) {
            return Ok(table);
        }
        let table = Arc::new(pack()?);
        *held = (profile, Arc::downgrade(&table));
        Ok(table)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_packed_once_for_each_profile_as_long_as_somebody_holds_it() {
        let shared = SharedTable::default();
        let get = |profile: &str, number: u32| shared.get_or_pack(profile.to_owned(), || Ok(number)).unwrap();
        let first = get("avx2", 1);
        let again = get("avx2", 2);
        assert!(Arc::ptr_eq(&first, &again));
        assert_eq!((*get("amx", 3), *first), (3, 1), "another profile packs another way");
        let last = get("avx2", 4);
        assert_eq!(*last, 4);
        drop(last);
        assert_eq!(*get("avx2", 5), 5, "nobody held it any more");
    }
}
