//! A block's FFN half, or the columns of it that the stage has.

use std::sync::Arc;

use kernels::Backend;

use super::Pass;
use super::attention::Linear;
use crate::error::Result;

/// A rank's part of the half, and how it comes together with the others'.
pub(super) enum FfnOnDevice<B: Backend> {
    /// All of the stage's columns, on the only rank or on the first.
    SwiGlu(SwiGlu<B>, Cut),
    /// Some of them; results are added up.
    Inner(SwiGlu<B>, Cut),
    /// All of it, on the only rank or on the first.
    Linear(Linear<B>),
    /// Some columns of the result.
    LinearColumns(Linear<B>),
    /// On the first rank, and this is another.
    Elsewhere,
    /// There is none.
    None,
}

/// Some columns of an FFN.
pub(super) struct SwiGlu<B: Backend> {
    pub(super) norm: B::Vector,
    pub(super) gate: Arc<B::Matrix>,
    pub(super) up: Arc<B::Matrix>,
    pub(super) down: Arc<B::Matrix>,
}

/// Where an FFN is shared with neighbouring stages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cut {
    /// The stage before has the columns before: `work.sums` holds what they have come to.
    pub(super) goes_on: bool,
    /// The next stage has the columns after: the sums go there, and nothing is added yet.
    pub(super) is_open: bool,
}

impl<B: Backend> FfnOnDevice<B> {
    /// Adds the half's result to `work.x`, on every rank that has it; or leaves its sums in `work.sums`.
    pub(super) fn run(&self, pass: &mut Pass<'_, B>) -> Result<()> {
        match self {
            FfnOnDevice::SwiGlu(ffn, cut) => {
                ffn.run(*cut, pass)?;
                pass.is_everywhere = false;
            }
            FfnOnDevice::Inner(ffn, cut) => ffn.run_shared(*cut, pass)?,
            FfnOnDevice::Linear(linear) => linear.run(pass)?,
            FfnOnDevice::LinearColumns(linear) => linear.run_columns(pass)?,
            FfnOnDevice::Elsewhere => pass.is_everywhere = false,
            FfnOnDevice::None => {}
        }
        Ok(())
    }
}

impl<B: Backend> SwiGlu<B> {
    /// `work.inner`: the columns of the SwiGLU.
    fn inner(&self, pass: &mut Pass<'_, B>) -> Result<()> {
        let (backend, work) = (pass.backend, &mut *pass.work);
        backend.rms_norm(&work.x, &self.norm, pass.eps, &mut work.normed)?;
        Ok(backend.swiglu(&work.normed, &self.gate, &self.up, &mut work.inner)?)
    }

    fn run(&self, cut: Cut, pass: &mut Pass<'_, B>) -> Result<()> {
        self.inner(pass)?;
        let (backend, work) = (pass.backend, &mut *pass.work);
        match cut {
            Cut { goes_on: false, is_open: false } => {
                backend.matmul_add(&work.inner, &self.down, &mut work.x)?
            }
            Cut { goes_on: false, is_open: true } => {
                backend.matmul(&work.inner, &self.down, &mut work.sums)?
            }
            Cut { goes_on: true, .. } => backend.matmul_onto(&work.inner, &self.down, &mut work.sums)?,
        }
        if cut == (Cut { goes_on: true, is_open: false }) {
            backend.add(&work.sums, &mut work.x)?;
        }
        Ok(())
    }

    /// The same with the other ranks, who have other columns. The first goes on with the sums of the stage before.
    fn run_shared(&self, cut: Cut, pass: &mut Pass<'_, B>) -> Result<()> {
        pass.share_x()?;
        self.inner(pass)?;
        let goes_on = cut.goes_on && pass.is_first_rank();
        if goes_on {
            let work = &mut *pass.work;
            std::mem::swap(&mut work.added, &mut work.sums);
            pass.backend.matmul_onto(&work.inner, &self.down, &mut work.added)?;
            pass.sum_added()?;
        } else {
            pass.sum_products(&self.down)?;
        }
        let (backend, work) = (pass.backend, &mut *pass.work);
        match cut.is_open {
            true => std::mem::swap(&mut work.added, &mut work.sums),
            false => backend.add(&work.added, &mut work.x)?,
        }
        Ok(())
    }
}
