//! Masks of the vocabulary, which are made while other work runs.
//!
//! Who draws waits for the mask; nobody else does, and this crate makes none.

use std::sync::{Arc, OnceLock};

/// A bit for each token of the vocabulary, from the lowest of each word on, once it is known: 0 bars the token.
#[derive(Debug, Clone, Default)]
pub struct TokenMask(Arc<OnceLock<Option<Vec<u32>>>>);

impl TokenMask {
    /// One that is known; see [`TokenMask::set`].
    pub fn known(words: Option<Vec<u32>>) -> TokenMask {
        TokenMask(Arc::new(OnceLock::from(words)))
    }

    /// Makes it known: its words, or nothing where there can be none, and its row fails. Said once.
    pub fn set(&self, words: Option<Vec<u32>>) {
        assert!(self.0.set(words).is_ok(), "a mask is made once");
    }

    /// Waits until it is known.
    pub fn wait(&self) -> Option<&[u32]> {
        self.0.wait().as_deref()
    }
}
