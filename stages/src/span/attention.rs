//! A block's attention half.

use std::sync::Arc;

use kernels::{AttentionSlice, Axis, Backend};

use super::Pass;
use crate::batch::Batch;
use crate::error::Result;
use crate::shard::RankPlace;

/// A rank's part of the half, and how it comes together with the others'.
pub(super) enum AttentionOnDevice<B: Backend> {
    /// All of it, on the only rank or on the first.
    Gqa(Gqa<B>),
    /// Some heads, or none; results are added up.
    Heads(Option<Gqa<B>>),
    /// All heads of the rank's sequences.
    Sequences(Gqa<B>),
    /// All of it, on the only rank or on the first.
    Linear(Linear<B>),
    /// Some columns of the result.
    LinearColumns(Linear<B>),
    /// On the first rank, and this is another.
    Elsewhere,
    /// There is none.
    None,
}

/// Grouped-query attention, or some heads of it.
pub(super) struct Gqa<B: Backend> {
    pub(super) norm: B::Vector,
    pub(super) q: Arc<B::Matrix>,
    pub(super) k: Arc<B::Matrix>,
    pub(super) v: Arc<B::Matrix>,
    pub(super) o: Arc<B::Matrix>,
    pub(super) cache: B::KvCache,
}

/// A matrix in the place of a half.
pub(super) struct Linear<B: Backend> {
    pub(super) norm: B::Vector,
    pub(super) matrix: Arc<B::Matrix>,
}

impl<B: Backend> AttentionOnDevice<B> {
    /// Whether keys and values are here.
    pub(super) fn has_cache(&self) -> bool {
        match self {
            AttentionOnDevice::Gqa(_) | AttentionOnDevice::Sequences(_) => true,
            AttentionOnDevice::Heads(gqa) => gqa.is_some(),
            AttentionOnDevice::Linear(_) | AttentionOnDevice::LinearColumns(_) => false,
            AttentionOnDevice::Elsewhere | AttentionOnDevice::None => false,
        }
    }

    /// Adds the half's result to `work.x`, on every rank that has it.
    pub(super) fn run(&mut self, pass: &mut Pass<'_, B>) -> Result<()> {
        match self {
            AttentionOnDevice::Gqa(gqa) => {
                gqa.inner(pass)?;
                pass.backend.matmul_add(&pass.work.inner, &gqa.o, &mut pass.work.x)?;
                pass.is_everywhere = false;
            }
            AttentionOnDevice::Heads(gqa) => {
                pass.share_x()?;
                match gqa {
                    Some(gqa) => {
                        gqa.inner(pass)?;
                        pass.sum_products(&gqa.o)?;
                    }
                    None => {
                        pass.add_nothing()?;
                        pass.sum_added()?;
                    }
                }
                pass.backend.add(&pass.work.added, &mut pass.work.x)?;
            }
            AttentionOnDevice::Sequences(gqa) => gqa.run_sequences(pass)?,
            AttentionOnDevice::Linear(linear) => linear.run(pass)?,
            AttentionOnDevice::LinearColumns(linear) => linear.run_columns(pass)?,
            AttentionOnDevice::Elsewhere => pass.is_everywhere = false,
            AttentionOnDevice::None => {}
        }
        Ok(())
    }
}

impl<B: Backend> Gqa<B> {
    /// `work.inner`: attention's output of all rows, before the last matrix.
    fn inner(&mut self, pass: &mut Pass<'_, B>) -> Result<()> {
        let work = &mut *pass.work;
        pass.backend.rms_norm(&work.x, &self.norm, pass.eps, &mut work.normed)?;
        let batch = pass.batch;
        self.attend(pass, batch.slices(), batch.positions())
    }

    /// The same from `work.normed` on, of the rows of some slices.
    fn attend(&mut self, pass: &mut Pass<'_, B>, slices: &[AttentionSlice], positions: &[u32]) -> Result<()> {
        let (backend, work) = (pass.backend, &mut *pass.work);
        let rope = pass.rope.expect("a span with attention has rotary angles");
        let out = [&mut work.q, &mut work.k, &mut work.v];
        backend.matmul_each(&work.normed, [&self.q, &self.k, &self.v], out)?;
        let turned = [&mut work.q, &mut work.k];
        let cache = &mut self.cache;
        Ok(backend.attend(turned, &work.v, (rope, positions), cache, slices, &mut work.inner)?)
    }

    /// The half for the rank's own sequences, put together with the others'. No number depends on who has which.
    fn run_sequences(&mut self, pass: &mut Pass<'_, B>) -> Result<()> {
        pass.share_x()?;
        let place = pass.ranks.as_ref().expect("sequences are shared by several ranks").place;
        let deal = Deal { batch: pass.batch, num_ranks: place.num_ranks };
        let (rows, slices) = deal.of(place.rank);
        let positions: Vec<u32> = rows.iter().map(|row| pass.batch.positions()[*row as usize]).collect();
        let (backend, work) = (pass.backend, &mut *pass.work);
        backend.gather(&work.x, &rows, &mut work.rows)?;
        backend.rms_norm(&work.rows, &self.norm, pass.eps, &mut work.normed)?;
        self.attend(pass, &slices, &positions)?;
        let numbers = pass.numbers();
        let work = &mut *pass.work;
        backend.matmul(&work.inner, &self.o, &mut work.added)?;
        let ranks = pass.ranks.as_mut().expect("sequences are shared by several ranks");
        ranks.all_gather(Axis::Rows, &work.added, &mut work.gathered, numbers)?;
        backend.gather(&work.gathered, &deal.places(), &mut work.added)?;
        Ok(backend.add(&work.added, &mut work.x)?)
    }
}

impl<B: Backend> Linear<B> {
    /// All of it.
    pub(super) fn run(&self, pass: &mut Pass<'_, B>) -> Result<()> {
        let work = &mut *pass.work;
        pass.backend.rms_norm(&work.x, &self.norm, pass.eps, &mut work.normed)?;
        pass.backend.matmul_add(&work.normed, &self.matrix, &mut work.x)?;
        pass.is_everywhere = false;
        Ok(())
    }

    /// Some columns, put together with those of the other ranks.
    pub(super) fn run_columns(&self, pass: &mut Pass<'_, B>) -> Result<()> {
        pass.share_x()?;
        let numbers = pass.numbers();
        let (backend, work) = (pass.backend, &mut *pass.work);
        backend.rms_norm(&work.x, &self.norm, pass.eps, &mut work.normed)?;
        backend.matmul(&work.normed, &self.matrix, &mut work.added)?;
        let ranks = pass.ranks.as_mut().expect("columns are shared by several ranks");
        ranks.all_gather(Axis::Columns, &work.added, &mut work.gathered, numbers)?;
        Ok(backend.add(&work.gathered, &mut work.x)?)
    }
}

/// Which rows of a micro-batch each rank has, where its sequences are shared out.
struct Deal<'a> {
    batch: &'a Batch,
    num_ranks: usize,
}

impl<'a> Deal<'a> {
    /// A sequence is where its pages are, all of them.
    fn slices(&self, rank: usize) -> impl Iterator<Item = &'a AttentionSlice> {
        let place = RankPlace { rank, num_ranks: self.num_ranks };
        self.batch.slices().iter().filter(move |slice| place.has_page(slice.pages[0]))
    }

    fn rows(&self, rank: usize) -> impl Iterator<Item = u32> {
        self.slices(rank).flat_map(|slice| {
            let end = slice.first_row + slice.num_rows;
            (slice.first_row..end).map(|row| u32::try_from(row).expect("rows are counted in 32 bits"))
        })
    }

    /// A rank's rows of the micro-batch, and its slices as they lie in those rows and in its own pages.
    fn of(&self, rank: usize) -> (Vec<u32>, Vec<AttentionSlice>) {
        let place = RankPlace { rank, num_ranks: self.num_ranks };
        let mut first_row = 0;
        let slices = (self.slices(rank))
            .map(|slice| {
                let pages = slice.pages.iter().map(|page| place.own_page(*page)).collect();
                let own = AttentionSlice { first_row, pages, ..*slice };
                first_row += slice.num_rows;
                own
            })
            .collect();
        (self.rows(rank).collect(), slices)
    }

    /// For each row of the micro-batch its place among the rows of all ranks, one rank's after another's.
    fn places(&self) -> Vec<u32> {
        let dealt: Vec<u32> = (0..self.num_ranks).flat_map(|rank| self.rows(rank)).collect();
        let mut places = vec![0; dealt.len()];
        for (place, row) in (0..).zip(dealt) {
            places[row as usize] = place;
        }
        places
    }
}
