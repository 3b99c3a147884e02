//! One span's forward pass: the loop over its blocks, on any backend, on one rank of a stage or on its only one.
//!
//! Joins what the scheduler says (micro-batches) with what kernels can do (operations on arrays). A stage
//! with the first block embeds tokens; a stage with the last one applies the norm and the output matrix to
//! the rows that need logits, and draws. Between them only the f32 residual stream travels, and beside it the sums
//! of an FFN that is cut by columns.
//!
//! Of several ranks the first always has the residual stream; the others have it after a half that all share, and get
//! it by a broadcast before such a half where they have not.

mod attention;
mod ffn;
mod fill;
mod halves;
mod load;
#[cfg(test)]
mod on_gpu;
#[cfg(test)]
mod on_gpus;
mod queue;
mod room;
#[cfg(test)]
mod shard_reads;

use std::sync::Arc;
use std::time::Duration;

use kernels::{Backend, DecodeStep, FedTokens, Gate, StepTimes};
use scheduler::MicroBatch;

use crate::batch::Batch;
use crate::error::Result;
use crate::head::{Asked, Head, HeadWork};
use crate::host_rows::RowPool;
use crate::memory::StepSize;
use crate::part::Part;
use crate::ranks::{RankStep, Ranks};
use crate::stage::{Activations, Collected, Follower, Queued, Rows, Stage, StageOutput};
use crate::work_shapes::WorkShapes;

use attention::AttentionOnDevice;
use ffn::FfnOnDevice;
use queue::Queue;
use room::Room;

/// How much of a model a stage holds, and how much it must be ready for.
#[derive(Debug, Clone, Copy)]
pub struct SpanOptions {
    /// Its blocks.
    pub part: Part,
    /// KV pages, the same number in every stage. Of ranks that share out sequences each has an equal part: page `p`
    /// is that of rank `p % ranks`.
    pub num_pages: usize,
    /// Longest sequence.
    pub context_tokens: usize,
    /// The largest step, for which a GPU's arrays are made at load; where it is not known they grow with the steps.
    pub largest_step: Option<StepSize>,
}

/// The weights and the caches of a span of blocks on one device: all of them, or a rank's part.
pub(crate) struct SpanStage<B: Backend> {
    backend: B,
    eps: f32,
    hidden: usize,
    part: Part,
    embedding: Option<Arc<B::Matrix>>,
    batch: Batch,
    blocks: Vec<BlockOnDevice<B>>,
    head: Option<Head<B>>,
    rope: Option<B::Rope>,
    ranks: Option<Ranks<B::Array>>,
    /// Where it was said how large steps will be.
    room: Option<Room>,
    /// Whether a step went in halves, which is told once.
    has_halved: bool,
    /// Of the last step.
    times: StepTimes,
    /// Whether it was given activations that are on a device.
    was_given_early: bool,
    queue: Queue,
    /// What goes out to the next stage through the host.
    hops: RowPool,
    work: Work<B>,
}

struct BlockOnDevice<B: Backend> {
    attention: AttentionOnDevice<B>,
    ffn: FfnOnDevice<B>,
}

/// Arrays that every micro-batch reuses.
struct Work<B: Backend> {
    /// The residual stream, `[tokens, hidden]`.
    x: B::Array,
    /// Its norm, what a half's matrices read.
    normed: B::Operand,
    q: B::Array,
    k: B::Array,
    v: B::Array,
    /// A half's inner result: attention's output or SwiGLU's product.
    inner: B::Operand,
    /// What a half adds to the residual stream, or this rank's part of it.
    added: B::Array,
    /// What the ranks' parts make together.
    gathered: B::Array,
    /// Of an FFN that is cut by columns, what the columns before have come to, `[tokens, hidden]`.
    sums: B::Array,
    /// Rows of the rank's own sequences, where attention is shared by sequences.
    rows: B::Array,
    head: HeadWork<B>,
}

/// What the halves of a span have in common during a micro-batch.
struct Pass<'a, B: Backend> {
    backend: &'a B,
    eps: f32,
    hidden: usize,
    rope: Option<&'a B::Rope>,
    ranks: Option<&'a mut Ranks<B::Array>>,
    batch: &'a Batch,
    /// Whether all ranks have the residual stream.
    is_everywhere: bool,
    work: &'a mut Work<B>,
}

impl<B: Backend> Work<B> {
    fn new(backend: &B) -> Self {
        Work {
            x: backend.array(),
            normed: backend.operand(),
            q: backend.array(),
            k: backend.array(),
            v: backend.array(),
            inner: backend.operand(),
            added: backend.array(),
            gathered: backend.array(),
            sums: backend.array(),
            rows: backend.array(),
            head: HeadWork::new(backend),
        }
    }

    /// Makes room for steps of up to these shapes, also in what the backend keeps.
    fn reserve(&mut self, backend: &B, shapes: &WorkShapes) -> Result<()> {
        let WorkShapes { x, normed, q, kv, inner, added, gathered, own_rows, sums, .. } = *shapes;
        let arrays = [
            (&mut self.x, x),
            (&mut self.q, q),
            (&mut self.k, kv),
            (&mut self.v, kv),
            (&mut self.added, added),
            (&mut self.gathered, gathered),
            (&mut self.rows, own_rows),
            (&mut self.sums, sums),
        ];
        for (array, [rows, cols]) in arrays {
            backend.reserve(array, rows, cols)?;
        }
        for (operand, [rows, cols]) in [(&mut self.normed, normed), (&mut self.inner, inner)] {
            backend.reserve_operand(operand, rows, cols)?;
        }
        self.head.reserve(backend, shapes)?;
        Ok(backend.reserve_work(&shapes.kept)?)
    }
}

impl<B: Backend> Pass<'_, B> {
    fn run(&mut self, blocks: &mut [BlockOnDevice<B>]) -> Result<()> {
        for block in blocks {
            block.attention.run(self)?;
            block.ffn.run(self)?;
        }
        Ok(())
    }

    fn is_first_rank(&self) -> bool {
        self.ranks.as_ref().is_none_or(|ranks| ranks.is_first())
    }

    /// Numbers of the residual stream.
    fn numbers(&self) -> usize {
        self.batch.num_rows() * self.hidden
    }

    /// Gives every rank the residual stream.
    fn share_x(&mut self) -> Result<()> {
        let numbers = self.numbers();
        match &mut self.ranks {
            Some(ranks) if !self.is_everywhere => ranks.broadcast(&mut self.work.x, numbers)?,
            _ => {}
        }
        self.is_everywhere = true;
        Ok(())
    }

    /// `work.added` of a rank that has nothing to add.
    fn add_nothing(&mut self) -> Result<()> {
        Ok(self.backend.zeros(self.batch.num_rows(), self.hidden, &mut self.work.added)?)
    }

    /// `work.added` becomes the sum over all ranks.
    fn sum_added(&mut self) -> Result<()> {
        let (rows, numbers) = (self.batch.num_rows(), self.numbers());
        let ranks = self.ranks.as_mut().expect("sums are of several ranks");
        for piece in ranks.pieces(rows) {
            ranks.begin_all_reduce(&self.work.added, piece)?;
        }
        ranks.finish_all_reduce(&mut self.work.added, numbers)
    }

    /// The same of what `work.inner` and this rank's part of a matrix give: some rows may be summed while the next are multiplied.
    fn sum_products(&mut self, w: &B::Matrix) -> Result<()> {
        let (rows, numbers) = (self.batch.num_rows(), self.numbers());
        let ranks = self.ranks.as_mut().expect("sums are of several ranks");
        let Work { inner, added, .. } = &mut *self.work;
        let pieces = ranks.pieces(rows);
        let begin = |added: &B::Array, piece| ranks.begin_all_reduce(added, piece);
        self.backend.matmul_in_pieces(inner, w, added, &pieces, begin)?;
        ranks.finish_all_reduce(added, numbers)
    }
}

impl<B: Backend> SpanStage<B> {
    /// The blocks of a micro-batch; the first rank has put the residual stream into `work.x`, and sums into `work.sums`. Whether
    /// all ranks have it then.
    fn run_blocks(&mut self) -> Result<bool> {
        if self.ranks.is_some() || !self.batch.is_decode() {
            return self.run_all();
        }
        let rows = self.batch.num_rows();
        let padded = self.backend.padded_rows(rows);
        self.resize(padded, self.part.first_column > 0)?;
        let SpanStage { backend, eps, hidden, rope, batch, blocks, work, .. } = self;
        let (backend, batch) = (&*backend, &*batch);
        let step = DecodeStep { rows: padded, positions: batch.positions(), slices: batch.slices() };
        backend.repeat(&step, || {
            let mut pass = Pass {
                backend,
                eps: *eps,
                hidden: *hidden,
                rope: rope.as_ref(),
                ranks: None,
                batch,
                is_everywhere: false,
                work: &mut *work,
            };
            pass.run(blocks)
        })?;
        self.resize(rows, self.part.end_column.is_some())?;
        Ok(false)
    }

    /// Gives what goes in or comes out so many rows: the residual stream, and the sums of an FFN where it `has_sums`.
    fn resize(&mut self, rows: usize, has_sums: bool) -> Result<()> {
        let (backend, work) = (&self.backend, &mut self.work);
        backend.resize(&mut work.x, rows, self.hidden)?;
        if has_sums {
            backend.resize(&mut work.sums, rows, self.hidden)?;
        }
        Ok(())
    }

    fn run_all(&mut self) -> Result<bool> {
        let mut pass = Pass {
            backend: &self.backend,
            eps: self.eps,
            hidden: self.hidden,
            rope: self.rope.as_ref(),
            ranks: self.ranks.as_mut(),
            batch: &self.batch,
            is_everywhere: false,
            work: &mut self.work,
        };
        pass.run(&mut self.blocks)?;
        Ok(pass.is_everywhere)
    }

    /// Takes what comes in: tokens, or the activations of the stage before.
    fn take(&mut self, input: Option<&Activations>) -> Result<()> {
        match (&self.embedding, input) {
            (Some(table), None) if self.batch.fed().is_empty() => {
                self.backend.embed(table, self.batch.tokens(), &mut self.work.x)?;
            }
            (Some(table), None) => {
                let (tokens, fed) = (self.batch.tokens(), self.batch.fed());
                let fed = FedTokens { tokens, fed, draws: self.queue.last_draws() };
                self.backend.embed_fed(table, fed, &mut self.work.x)?;
            }
            (None, Some(Activations { values, sums, hidden })) => {
                let backend = &self.backend;
                let take = |rows: &Rows, out: &mut B::Array| match rows {
                    Rows::Host(values) => backend.upload(values, values.len() / hidden, *hidden, out),
                    Rows::Device(parcel) => backend.take_over(parcel, out),
                };
                take(values, &mut self.work.x)?;
                assert_eq!(sums.is_some(), self.part.first_column > 0, "sums come where an FFN is cut");
                if let Some(sums) = sums {
                    take(sums, &mut self.work.sums)?;
                }
            }
            (Some(_), Some(_)) => panic!("the first stage was given activations"),
            (None, None) => panic!("a later stage was given no activations"),
        }
        Ok(())
    }

    /// What goes out to the next stage.
    fn activations(&self) -> Result<Activations> {
        let rows = |x: &B::Array| -> Result<Rows> {
            if let Some(parcel) = self.backend.hand_over(x)? {
                return Ok(Rows::Device(parcel));
            }
            let mut values = self.hops.rows();
            self.backend.download(x, &mut values)?;
            Ok(Rows::Host(values))
        };
        let sums = self.part.end_column.is_some().then(|| rows(&self.work.sums)).transpose()?;
        Ok(Activations { values: rows(&self.work.x)?, sums, hidden: self.hidden })
    }
}

impl<B: Backend> SpanStage<B> {
    /// The blocks of a micro-batch, and in the last stage what it asks of their result.
    fn ask(&mut self, batch: &MicroBatch, input: Option<&Activations>, asked: &mut Asked) -> Result<()> {
        let is_everywhere = self.compute(batch, input)?;
        let head = self.head.as_ref().expect("the last stage has a head");
        let Work { x, head: work, .. } = &mut self.work;
        let ranks = self.ranks.as_mut().map(|ranks| (ranks, is_everywhere));
        head.run((&self.backend, self.eps), batch, x, ranks, work, asked)
    }

    /// The blocks of a micro-batch. Whether all ranks have their result.
    fn compute(&mut self, batch: &MicroBatch, input: Option<&Activations>) -> Result<bool> {
        self.batch.assign(batch, |fed_back| self.queue.find(fed_back));
        self.make_room_to_share()?;
        self.take(input)?;
        self.times = self.backend.begin_step()?;
        self.run_blocks()
    }

    /// A rank's part of a step as a whole.
    fn follow_step(&mut self, step: &RankStep) -> Result<()> {
        self.batch.follow(step);
        self.make_room_to_share()?;
        let is_everywhere = self.run_blocks()?;
        let Work { x, head: work, .. } = &mut self.work;
        match (&self.head, &mut self.ranks) {
            (Some(head), Some(ranks)) => {
                head.follow(&self.backend, self.eps, step, x, (ranks, is_everywhere), work)
            }
            _ => Ok(()),
        }
    }
}

impl<B: Backend> Stage for SpanStage<B> {
    fn step(&mut self, batch: &MicroBatch, input: Option<Activations>) -> Result<StageOutput> {
        self.was_given_early = input.as_ref().is_some_and(Activations::are_on_a_device);
        let output = self.step_in_parts(batch, input.as_ref())?;
        self.backend.end_step(&self.times)?;
        self.make_room_again();
        Ok(output)
    }

    fn is_ahead(&self) -> bool {
        self.ranks.is_none() && self.backend.works_beside_host()
    }

    fn queue(&mut self, batch: &Arc<MicroBatch>, input: Option<&Activations>) -> Result<Option<Queued>> {
        self.queue_step(batch, input)
    }

    fn collect(&mut self) -> Result<Collected> {
        self.queue.collect(&self.backend)
    }

    fn finish(&mut self) -> Result<Option<Duration>> {
        Ok(self.times.wait()?.filter(|_| self.was_given_early))
    }

    fn gate(&self) -> Option<Gate> {
        self.backend.gate()
    }

    fn fill_pages(&mut self, num_pages: usize) -> Result<()> {
        assert!(self.ranks.is_none(), "pages are filled of a lone device");
        fill::fill_pages((&self.backend, self.eps, self.hidden), &mut self.blocks, &mut self.work, num_pages)
    }
}

impl<B: Backend> Follower for SpanStage<B> {
    fn follow(&mut self, step: &RankStep) -> Result<()> {
        self.follow_in_parts(step)
    }
}
