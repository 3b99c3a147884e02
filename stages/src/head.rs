//! The end of a model: norm and output matrix for the rows that need logits, and what is made of them.
//!
//! A row that takes the likeliest token, and reports nothing beside it, needs no logits but the largest: such rows go
//! through the output matrix together, and their logits are stored nowhere. The others' tokens are chosen where the logits
//! are, and edited there before where penalties, biases, masks or a row that must not end yet ask for it.

use std::sync::Arc;

use kernels::{Arrival, Axis, Backend, Choice, ChoiceScratch, Chosen, Drawn, Draws, Largest};
use scheduler::{Failure, MicroBatch, MicroBatchOutput, Request, Slice, SliceOutput, TokenId, TokenLogprobs};

use crate::edits::{EditWork, is_edited};
use crate::error::Result;
use crate::random::Stream;
use crate::ranks::{RankStep, Ranks};
use crate::work_shapes::WorkShapes;

/// Rows of logits that are made at a time: 64 rows of a vocabulary of 128,256 are 33 MB, which the draws
/// then walk, and 64 rows are enough for a matrix product at full speed.
pub(crate) const LOGIT_ROWS: usize = 64;

/// The last norm and the output matrix, or a rank's rows of it.
pub(crate) struct Head<B: Backend> {
    pub(crate) norm: B::Vector,
    pub(crate) matrix: Arc<B::Matrix>,
    pub(crate) vocab: usize,
    pub(crate) hidden: usize,
    /// Where ranks share the matrix, the token of this one's first row.
    pub(crate) first_token: Option<usize>,
}

/// The other ranks, and whether they have the residual stream.
pub(crate) type Others<'a, A> = (&'a mut Ranks<A>, bool);

/// Arrays that every micro-batch reuses.
pub(crate) struct HeadWork<B: Backend> {
    /// Indices of rows that go through the head together, the rows, and their norm.
    row_ids: Vec<u32>,
    rows: B::Array,
    normed: B::Operand,
    logits: B::Array,
    /// A rank's part of logits.
    part: B::Array,
    host_logits: Vec<f32>,
    largest: Vec<Largest>,
    choices: Vec<Choice>,
    edits: EditWork,
    choosing: ChoiceScratch,
}

impl<B: Backend> HeadWork<B> {
    pub(crate) fn new(backend: &B) -> Self {
        HeadWork {
            row_ids: Vec::new(),
            rows: backend.array(),
            normed: backend.operand(),
            logits: backend.array(),
            part: backend.array(),
            host_logits: Vec::new(),
            largest: Vec::new(),
            choices: Vec::new(),
            edits: EditWork::default(),
            choosing: ChoiceScratch::default(),
        }
    }
}

/// What was asked of a step, and where its answers come in.
#[derive(Default)]
pub(crate) struct Asked {
    wanted: Vec<WantedRow>,
    /// For each slice the place of its draw among the answers.
    places: Vec<u32>,
    draws: Draws,
    arrival: Arrival,
}

impl Asked {
    /// With room for answers to so many rows.
    pub(crate) fn new<B: Backend>(backend: &B, rows: usize) -> Result<Self> {
        Ok(Asked { draws: backend.draws(rows)?, ..Asked::default() })
    }

    /// Whatever a micro-batch wants, of which nothing has been asked yet.
    fn list(&mut self, batch: &MicroBatch) {
        list_wanted(batch, &mut self.wanted);
        sort_wanted(&mut self.wanted);
        self.places.clear();
        self.places.resize(batch.slices.len(), u32::MAX);
        for (place, wanted) in (0..).zip(&self.wanted) {
            if matches!(wanted.want, Want::Draw) {
                self.places[wanted.slice] = place;
            }
        }
    }

    /// The place of a slice's draw among the answers.
    pub(crate) fn place(&self, slice: usize) -> u32 {
        self.places[slice]
    }

    pub(crate) fn draws(&self) -> &Draws {
        &self.draws
    }

    /// When the answers are there.
    pub(crate) fn arrival(&self) -> Arrival {
        self.arrival.clone()
    }

    /// The answers, which are waited for, in a list of their own: whoever gets it keeps it.
    pub(crate) fn answer<B: Backend>(&mut self, backend: &B, batch: &MicroBatch) -> Result<MicroBatchOutput> {
        let mut outputs: Vec<SliceOutput> = batch.slices.iter().map(no_output).collect();
        for (wanted, drawn) in self.wanted.iter().zip(backend.read_draws(&mut self.draws)?) {
            let output = &mut outputs[wanted.slice];
            match drawn {
                Drawn::Largest(largest) => wanted.take_largest(*largest, output),
                Drawn::Chosen(chosen) => wanted.take_chosen(chosen, &batch.slices[wanted.slice], output),
            }
        }
        Ok(MicroBatchOutput { id: batch.id, slices: outputs })
    }
}

impl<B: Backend> Head<B> {
    /// Asks what a micro-batch wants, of which `x: [tokens, hidden]` is the residual stream.
    pub(crate) fn run(
        &self,
        (backend, eps): (&B, f32),
        batch: &MicroBatch,
        x: &B::Array,
        others: Option<Others<'_, B::Array>>,
        work: &mut HeadWork<B>,
        asked: &mut Asked,
    ) -> Result<()> {
        let mut others = others.filter(|_| self.first_token.is_some());
        asked.list(batch);
        let Asked { wanted, draws, arrival, .. } = asked;
        backend.open_draws(draws, wanted.len())?;
        let num_read = wanted.partition_point(|wanted| wanted.reads_logits);
        let (read, greedy) = wanted.split_at(num_read);
        for wanted in read.chunks(LOGIT_ROWS) {
            work.take_rows(wanted.iter().map(|wanted| wanted.row));
            self.logits(backend, eps, x, &mut others, work)?;
            work.take_choices(wanted, batch);
            let HeadWork { logits, choices, edits, choosing, .. } = &mut *work;
            backend.choose_into(logits, choices, &edits.all, choosing, draws)?;
        }
        if !greedy.is_empty() {
            work.take_rows(greedy.iter().map(|wanted| wanted.row));
            if others.is_some() {
                self.largest(backend, eps, x, &mut others, work)?;
                draws.add_largest(&work.largest);
            } else {
                self.normed_rows(backend, eps, x, &mut others, work)?;
                backend.matmul_argmax_into(&work.normed, &self.matrix, &mut work.logits, draws)?;
            }
        }
        *arrival = backend.close_draws(draws)?;
        Ok(())
    }

    /// What a rank beside the first does for the answer to a micro-batch.
    pub(crate) fn follow(
        &self,
        backend: &B,
        eps: f32,
        step: &RankStep,
        x: &B::Array,
        others: Others<'_, B::Array>,
        work: &mut HeadWork<B>,
    ) -> Result<()> {
        let mut others = Some(others);
        for rows in step.logit_rows.chunks(LOGIT_ROWS) {
            work.take_rows(rows.iter().copied());
            self.logits(backend, eps, x, &mut others, work)?;
        }
        if step.greedy_rows.is_empty() {
            return Ok(());
        }
        work.take_rows(step.greedy_rows.iter().copied());
        self.largest(backend, eps, x, &mut others, work)
    }

    /// `work.logits` of the rows of `work.row_ids`, on the first rank.
    fn logits(
        &self,
        backend: &B,
        eps: f32,
        x: &B::Array,
        others: &mut Option<Others<'_, B::Array>>,
        work: &mut HeadWork<B>,
    ) -> Result<()> {
        self.normed_rows(backend, eps, x, others, work)?;
        let Some((ranks, _)) = others else {
            return Ok(backend.matmul(&work.normed, &self.matrix, &mut work.logits)?);
        };
        backend.matmul(&work.normed, &self.matrix, &mut work.part)?;
        ranks.gather(Axis::Columns, &work.part, &mut work.logits, work.row_ids.len() * self.vocab)
    }

    /// `work.largest` of the rows of `work.row_ids`, on the first rank.
    fn largest(
        &self,
        backend: &B,
        eps: f32,
        x: &B::Array,
        others: &mut Option<Others<'_, B::Array>>,
        work: &mut HeadWork<B>,
    ) -> Result<()> {
        self.normed_rows(backend, eps, x, others, work)?;
        backend.matmul_argmax(&work.normed, &self.matrix, &mut work.logits, &mut work.largest)?;
        let (Some((ranks, _)), Some(first)) = (others, self.first_token) else { return Ok(()) };
        // Each rank's candidate for each row: its token, which f32 holds exactly below 2^24, and its logit.
        assert!(self.vocab <= 1 << 24, "a vocabulary of {} is beyond what f32 counts", self.vocab);
        let rows = work.largest.len();
        let own =
            work.largest.iter().flat_map(|largest| [(first + largest.index as usize) as f32, largest.value]);
        work.host_logits.clear();
        work.host_logits.extend(own);
        backend.upload(&work.host_logits, rows, 2, &mut work.part)?;
        let num_ranks = ranks.place.num_ranks;
        ranks.gather(Axis::Columns, &work.part, &mut work.logits, rows * 2 * num_ranks)?;
        if ranks.is_first() {
            backend.download(&work.logits, &mut work.host_logits)?;
            let candidates = work.host_logits.chunks_exact(2 * num_ranks);
            work.largest.iter_mut().zip(candidates).for_each(|(largest, all)| *largest = best(all));
        }
        Ok(())
    }

    /// Norms the rows of `work.row_ids`, on every rank that has a part of the matrix.
    fn normed_rows(
        &self,
        backend: &B,
        eps: f32,
        x: &B::Array,
        others: &mut Option<Others<'_, B::Array>>,
        work: &mut HeadWork<B>,
    ) -> Result<()> {
        let has_x = |(ranks, is_everywhere): &Others<'_, B::Array>| *is_everywhere || ranks.is_first();
        if others.as_ref().is_none_or(has_x) {
            backend.gather(x, &work.row_ids, &mut work.rows)?;
        }
        if let Some((ranks, false)) = others {
            ranks.broadcast(&mut work.rows, work.row_ids.len() * self.hidden)?;
        }
        Ok(backend.rms_norm(&work.rows, &self.norm, eps, &mut work.normed)?)
    }
}

impl<B: Backend> HeadWork<B> {
    /// Makes room for steps of up to these shapes.
    pub(crate) fn reserve(&mut self, backend: &B, shapes: &WorkShapes) -> Result<()> {
        let WorkShapes { head_rows, head_normed, logits, logit_part, .. } = *shapes;
        backend.reserve(&mut self.rows, head_rows[0], head_rows[1])?;
        backend.reserve(&mut self.part, logit_part[0], logit_part[1])?;
        backend.reserve_operand(&mut self.normed, head_normed[0], head_normed[1])?;
        Ok(backend.reserve(&mut self.logits, logits[0], logits[1])?)
    }

    fn take_rows(&mut self, rows: impl Iterator<Item = u32>) {
        self.row_ids.clear();
        self.row_ids.extend(rows);
    }

    /// What is asked of rows, and edited of them where any of them is.
    fn take_choices(&mut self, wanted: &[WantedRow], batch: &MicroBatch) {
        self.choices.clear();
        self.choices.extend(wanted.iter().map(|wanted| wanted.choice(&batch.slices[wanted.slice])));
        self.edits.all.clear();
        let edited = |wanted: &WantedRow| {
            let slice = &batch.slices[wanted.slice];
            (matches!(wanted.want, Want::Draw) && is_edited(slice)).then_some(slice)
        };
        if wanted.iter().any(|wanted| edited(wanted).is_some()) {
            for wanted in wanted {
                match edited(wanted) {
                    Some(slice) => self.edits.add(slice),
                    None => self.edits.add_none(),
                }
            }
        }
    }
}

/// The largest of all ranks' candidates, pairs of token and logit: a NaN where there is one, else the lowest token of
/// equal ones, as ranks have theirs in the order of tokens.
fn best(candidates: &[f32]) -> Largest {
    let largest = |pair: &[f32]| Largest { index: pair[0] as u32, value: pair[1] };
    let mut candidates = candidates.chunks_exact(2).map(largest);
    let first = candidates.next().expect("there is a rank");
    candidates.fold(first, |best, next| {
        let is_better = !best.value.is_nan() && (next.value.is_nan() || next.value > best.value);
        if is_better { next } else { best }
    })
}

/// Rows of a micro-batch that need logits, and those that need the largest alone, each in the order of the first rank.
pub(crate) fn wanted_rows(batch: &MicroBatch) -> (Vec<u32>, Vec<u32>) {
    let mut wanted = Vec::new();
    list_wanted(batch, &mut wanted);
    sort_wanted(&mut wanted);
    let rows = |reads_logits: bool| {
        wanted.iter().filter(|wanted| wanted.reads_logits == reads_logits).map(|wanted| wanted.row).collect()
    };
    (rows(true), rows(false))
}

/// Rows of a slice stay in order, and those that are scored come before the one that is drawn for.
fn sort_wanted(wanted: &mut [WantedRow]) {
    wanted.sort_unstable_by_key(|wanted| (!wanted.reads_logits, wanted.row));
}

/// A row of a micro-batch whose logits somebody wants.
struct WantedRow {
    row: u32,
    slice: usize,
    /// Position of the token whose successor is asked for.
    position: u32,
    want: Want,
    /// Whether the answer needs more of the row than its largest logit.
    reads_logits: bool,
}

enum Want {
    /// The log-probability of the prompt token that follows.
    Score(TokenId),
    /// A draw of the token that follows.
    Draw,
}

fn no_output(slice: &Slice) -> SliceOutput {
    SliceOutput {
        sequence: slice.sequence,
        token: None,
        logprobs: None,
        prompt_logprobs: Vec::with_capacity(slice.score.len()),
        failure: None,
    }
}

/// Lists the rows of a micro-batch that are wanted; `out` is cleared first.
fn list_wanted(batch: &MicroBatch, out: &mut Vec<WantedRow>) {
    out.clear();
    let mut first_row = 0;
    for (index, slice) in batch.slices.iter().enumerate() {
        let mut want = |offset: u32, want| {
            let (row, position) = (first_row + offset, slice.first_position + offset);
            let reads_logits = reads_logits(&want, slice);
            out.push(WantedRow { row, slice: index, position, want, reads_logits });
        };
        for (offset, &token) in slice.score.iter().enumerate() {
            want(offset as u32, Want::Score(token));
        }
        let num_rows = slice.tokens.len() as u32;
        if slice.sample {
            want(num_rows - 1, Want::Draw);
        }
        first_row += num_rows;
    }
}

fn reads_logits(want: &Want, slice: &Slice) -> bool {
    let sampling = &slice.request.sampling;
    match want {
        Want::Score(_) => true,
        Want::Draw => sampling.temperature != 0.0 || sampling.logprobs.is_some() || is_edited(slice),
    }
}

impl WantedRow {
    /// Answers with the largest logit alone.
    fn take_largest(&self, largest: Largest, output: &mut SliceOutput) {
        // A NaN anywhere in the row shows here.
        match largest.value.is_finite() {
            true => output.token = Some(largest.index),
            false => self.fail(output, Failure::NonFiniteLogits { position: self.position }),
        }
    }

    fn fail(&self, output: &mut SliceOutput, failure: Failure) {
        output.failure.get_or_insert(failure);
    }

    /// What is asked of its logits.
    fn choice(&self, slice: &Slice) -> Choice {
        let Request { key, sampling, sample, .. } = &*slice.request;
        let top = sampling.logprobs.unwrap_or(0);
        let likeliest =
            Choice { given: None, temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, uniform: 0, top };
        match self.want {
            Want::Score(token) => Choice { given: Some(token), ..likeliest },
            Want::Draw => Choice {
                temperature: sampling.temperature,
                top_k: sampling.top_k,
                top_p: sampling.top_p,
                min_p: sampling.min_p,
                uniform: Stream::new(sampling.seed, key.0).fraction(*sample, next_position(slice)),
                ..likeliest
            },
        }
    }

    /// Answers with what was chosen.
    fn take_chosen(&self, chosen: &Chosen, slice: &Slice, output: &mut SliceOutput) {
        let position = self.position;
        if !(chosen.stats.max.is_finite() && chosen.stats.log_sum_exp.is_finite()) {
            return self.fail(output, Failure::NonFiniteLogits { position });
        }
        let Some(token) = chosen.token else { return self.fail(output, Failure::NothingLeft { position }) };
        match self.want {
            Want::Score(_) => output.prompt_logprobs.push(logprobs(token, chosen)),
            Want::Draw if slice.mask.as_ref().is_some_and(|mask| mask.wait().is_none()) => {
                self.fail(output, Failure::GuideGaveUp { position });
            }
            Want::Draw => {
                output.token = Some(token);
                output.logprobs = slice.request.sampling.logprobs.is_some().then(|| logprobs(token, chosen));
            }
        }
    }
}

/// Log-probabilities, the model's own: before temperature, and before anything was edited.
fn logprobs(token: TokenId, chosen: &Chosen) -> TokenLogprobs {
    let Chosen { token: _, logit, stats, top } = chosen;
    let logprob = |logit: f32| logit - stats.max - stats.log_sum_exp;
    TokenLogprobs {
        token,
        logprob: logprob(*logit),
        top: top.iter().map(|&(token, logit)| (token, logprob(logit))).collect(),
    }
}

fn next_position(slice: &Slice) -> u32 {
    slice.first_position + slice.tokens.len() as u32
}
