//! Weights that stages of one process have in common.
//!
//! Replicas multiply by the same matrices, and the first stage of a tied model looks tokens up in the matrix by which the last one
//! draws: a fifth of SmolLM2's weights. Cores of a machine have one memory, so that what is packed alike is there once.
//!
//! One of these is for one model, whose tensors are each packed either as a matrix or as a table, and by backends whose numeric
//! profiles tell their ways of packing apart.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use kernels::CpuMatrix;

use crate::error::Result;

/// The weights of stages that cores of one machine compute.
pub type CpuWeights = SharedWeights<CpuMatrix>;

/// Matrices, each as long as any stage holds it.
#[derive(Debug)]
pub struct SharedWeights<M>(Mutex<HashMap<Packed, Slot<M>>>);

/// What a stage packs.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Packed {
    pub(crate) tensor: String,
    pub(crate) rows: Range<usize>,
    pub(crate) cols: Range<usize>,
    /// The numeric profile of the backend: others pack another way.
    pub(crate) profile: String,
}

type Slot<M> = Arc<Mutex<Weak<M>>>;

impl<M> Default for SharedWeights<M> {
    fn default() -> Self {
        SharedWeights(Mutex::default())
    }
}

impl<M> SharedWeights<M> {
    /// The matrix that another stage holds, or else what `pack` makes: others who want the same wait for it.
    ///
    /// # Errors
    /// Those of `pack`; whoever comes next packs it then.
    pub(crate) fn get_or_pack(&self, what: Packed, pack: impl FnOnce() -> Result<M>) -> Result<Arc<M>> {
        let slot = Arc::clone(self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(what).or_default());
        let mut held = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(matrix) = held.upgrade() {
            return Ok(matrix);
        }
        let matrix = Arc::new(pack()?);
        *held = Arc::downgrade(&matrix);
        Ok(matrix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(profile: &str, rows: Range<usize>) -> Packed {
        Packed { tensor: "gate".to_owned(), rows, cols: 0..8, profile: profile.to_owned() }
    }

    #[test]
    fn a_matrix_is_packed_once_for_each_profile_and_part_as_long_as_somebody_holds_it() {
        let shared = SharedWeights::default();
        let get = |profile: &str, rows, number: u32| {
            shared.get_or_pack(packed(profile, rows), || Ok(number)).unwrap()
        };
        let first = get("avx2", 0..4, 1);
        assert!(Arc::ptr_eq(&first, &get("avx2", 0..4, 2)));
        assert_eq!((*get("amx", 0..4, 3), *first), (3, 1), "another profile packs another way");
        assert_eq!((*get("avx2", 0..2, 4), *first), (4, 1), "another part is another matrix");
        drop(first);
        assert_eq!(*get("avx2", 0..4, 5), 5, "nobody held it any more");
    }

    #[test]
    fn what_could_not_be_packed_is_packed_by_whoever_comes_next() {
        let shared = SharedWeights::<u32>::default();
        let fails = || Err(kernels::Error::Unsupported("today".to_owned()).into());
        assert!(shared.get_or_pack(packed("avx2", 0..4), fails).is_err());
        assert_eq!(*shared.get_or_pack(packed("avx2", 0..4), || Ok(7)).unwrap(), 7);
    }
}
