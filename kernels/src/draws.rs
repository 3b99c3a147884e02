//! What a step draws: answers on their way to the host, and the tokens among them where the step behind it finds them.
//!
//! A device goes on without its host: a step's answers are asked for, another step is queued that begins with its tokens, and only
//! then somebody waits for the answers. Where a backend has everything at once, they are here at once, and this module is all there is to it.

use std::sync::Arc;

use crate::backend::Largest;
use crate::choice::Chosen;
use crate::cuda::CudaDraws;
use crate::error::Result;

/// The answer for one row of logits.
#[derive(Debug, Clone, PartialEq)]
pub enum Drawn {
    /// Where no more was asked than the largest logit.
    Largest(Largest),
    /// What was chosen.
    Chosen(Chosen),
}

impl Drawn {
    /// The token; nothing where the row has none to be drawn.
    pub fn token(&self) -> Option<u32> {
        match self {
            Drawn::Largest(largest) => Some(largest.index),
            Drawn::Chosen(chosen) => chosen.token,
        }
    }
}

/// The answers to one step, a row after the other. It keeps its memory from step to step.
#[derive(Debug, Default)]
pub struct Draws {
    /// Those that are here.
    pub(crate) drawn: Vec<Drawn>,
    pub(crate) chosen: Vec<Chosen>,
    pub(crate) largest: Vec<Largest>,
    /// Those of a GPU, until they are here.
    pub(crate) device: Option<CudaDraws>,
}

impl Draws {
    /// Answers that the host has made out itself, behind all others: the largest logits of rows that several ranks have a part of.
    /// They cannot be fed back.
    pub fn add_largest(&mut self, largest: &[Largest]) {
        match &mut self.device {
            None => self.drawn.extend(largest.iter().copied().map(Drawn::Largest)),
            Some(device) => device.add_known(largest),
        }
    }
}

/// Tokens of a step, some of which another step has drawn.
#[derive(Debug, Clone, Copy)]
pub struct FedTokens<'a> {
    /// A token for each row.
    pub tokens: &'a [u32],
    /// Rows whose token is one of `draws` instead, and which of its answers; where that is none, any token.
    pub fed: &'a [(u32, u32)],
    /// The other step's answers.
    pub draws: &'a Draws,
}

/// The moment at which the answers to a step are there. May be waited for on any thread.
#[derive(Clone, Default)]
pub struct Arrival(Option<Arc<Wait>>);

type Wait = dyn Fn() -> Result<()> + Send + Sync;

impl std::fmt::Debug for Arrival {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() { "Arrival(later)" } else { "Arrival(now)" })
    }
}

impl Arrival {
    /// When this returns; that of `default` is now.
    pub fn when(wait: impl Fn() -> Result<()> + Send + Sync + 'static) -> Arrival {
        Arrival(Some(Arc::new(wait)))
    }

    /// Returns when they are there.
    ///
    /// # Errors
    /// What the driver refuses, which may come from anything that was queued before.
    pub fn wait(&self) -> Result<()> {
        self.0.as_ref().map_or(Ok(()), |wait| wait())
    }
}
