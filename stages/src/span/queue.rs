//! Steps of a stage that is the whole model, begun before the answers to the one before are known.
//!
//! A step is queued with tokens that the step before draws, wherever these are: on a device they stay there, and what the host
//! knows already is sent as any other token. Two steps are under way at most, and their answers are collected in order; those of the last step are
//! kept beyond that, for the next one may have been issued before they came back.

use std::collections::VecDeque;
use std::sync::Arc;

use kernels::{Arrival, Backend, Draws};
use scheduler::{FedBack, MicroBatch, MicroBatchOutput, TokenId};

use super::SpanStage;
use crate::batch::Fed;
use crate::error::Result;
use crate::head::Asked;
use crate::stage::StageOutput;

/// Steps under way at once: one that is computed, and one behind it.
const STEPS: usize = 2;

/// Steps that were queued, and what the next ones are queued with.
#[derive(Default)]
pub(super) struct Queue {
    /// The oldest first.
    steps: VecDeque<Step>,
    /// The last one, where it was collected.
    collected: Option<Step>,
    spare: Vec<Asked>,
    /// Rows that there is room for.
    rows: usize,
}

struct Step {
    batch: Arc<MicroBatch>,
    answer: Answer,
}

#[allow(clippy::large_enum_variant, reason = "there are three of them at most")]
enum Answer {
    Asked(Asked),
    /// It went in parts, or was needed before.
    Known(MicroBatchOutput),
}

impl Queue {
    /// Makes room for steps that draw up to so many rows.
    pub(super) fn reserve<B: Backend>(&mut self, backend: &B, rows: usize) -> Result<()> {
        self.rows = rows;
        self.spare = (0..STEPS).map(|_| Asked::new(backend, rows)).collect::<Result<_>>()?;
        Ok(())
    }

    pub(super) fn spare<B: Backend>(&mut self, backend: &B) -> Result<Asked> {
        self.spare.pop().map_or_else(|| Asked::new(backend, self.rows), Ok)
    }

    pub(super) fn put_back(&mut self, asked: Asked) {
        self.spare.push(asked);
    }

    fn last(&self) -> Option<&Step> {
        self.steps.back().or(self.collected.as_ref())
    }

    /// The answers of the step that was queued last, some tokens of which [`Queue::find`] has said to be among them.
    pub(super) fn last_draws(&self) -> &Draws {
        match self.last() {
            Some(Step { answer: Answer::Asked(asked), .. }) => asked.draws(),
            _ => panic!("no answers are on their way"),
        }
    }

    /// What a token is that is fed back, or where it is.
    pub(super) fn find(&self, fed_back: FedBack) -> Fed {
        let FedBack { micro_batch, slice } = fed_back;
        match self.last() {
            Some(Step { batch, answer }) if batch.id == micro_batch => match answer {
                Answer::Asked(asked) => Fed::Drawn(asked.place(slice)),
                // A row that has failed has none, and what comes of it is dropped.
                Answer::Known(output) => Fed::Known(output.slices[slice].token.unwrap_or(0)),
            },
            last => {
                let last = last.map(|step| step.batch.id);
                panic!("a token of {micro_batch:?} was asked for, and the last step was {last:?}")
            }
        }
    }

    /// The token that is fed back, which is waited for.
    fn wait_for<B: Backend>(&mut self, backend: &B, fed_back: FedBack) -> Result<TokenId> {
        if let Some(Step { batch, answer }) = self.steps.back_mut().or(self.collected.as_mut())
            && let Answer::Asked(asked) = answer
        {
            let output = asked.answer(backend, batch)?;
            if let Answer::Asked(asked) = std::mem::replace(answer, Answer::Known(output)) {
                self.spare.push(asked);
            }
        }
        match self.find(fed_back) {
            Fed::Known(token) => Ok(token),
            Fed::Drawn(_) => unreachable!("it was waited for"),
        }
    }

    /// The oldest answer, which is waited for.
    pub(super) fn collect<B: Backend>(&mut self, backend: &B) -> Result<MicroBatchOutput> {
        let mut step = self.steps.pop_front().expect("a micro-batch was queued");
        let output = match &mut step.answer {
            Answer::Asked(asked) => asked.answer(backend, &step.batch)?,
            Answer::Known(output) => output.clone(),
        };
        let no_longer_asked_for =
            if self.steps.is_empty() { self.collected.replace(step) } else { Some(step) };
        self.recycle(no_longer_asked_for);
        Ok(output)
    }

    fn push(&mut self, step: Step) {
        self.steps.push_back(step);
        let no_longer_asked_for = self.collected.take();
        self.recycle(no_longer_asked_for);
    }

    fn recycle(&mut self, step: Option<Step>) {
        if let Some(Step { answer: Answer::Asked(asked), .. }) = step {
            self.spare.push(asked);
        }
    }
}

impl<B: Backend> SpanStage<B> {
    pub(super) fn queue_step(&mut self, batch: &Arc<MicroBatch>) -> Result<Arrival> {
        assert!(
            self.part.is_first() && self.head.is_some() && self.ranks.is_none(),
            "{:?} was queued on a stage that is not the whole model",
            batch.id
        );
        assert!(self.queue.steps.len() < STEPS, "{:?} was queued behind {STEPS} others", batch.id);
        let (answer, arrival) = match self.ask_anew(batch) {
            Ok(asked) => {
                let arrival = asked.arrival();
                (Answer::Asked(asked), arrival)
            }
            // It goes in parts, of which each is waited for: so its tokens must be known.
            Err(error) if error.is_out_of_memory() => {
                let known = self.with_known_tokens(batch)?;
                match self.step_in_parts(&known, None)? {
                    StageOutput::Tokens(output) => (Answer::Known(output), Arrival::default()),
                    StageOutput::Activations(_) => unreachable!("the last stage draws"),
                }
            }
            Err(error) => return Err(error),
        };
        self.queue.push(Step { batch: Arc::clone(batch), answer });
        Ok(arrival)
    }

    fn ask_anew(&mut self, batch: &MicroBatch) -> Result<Asked> {
        let mut asked = self.queue.spare(&self.backend)?;
        self.ask(batch, None, &mut asked)?;
        Ok(asked)
    }

    /// The same micro-batch, none of its tokens fed back.
    fn with_known_tokens(&mut self, batch: &MicroBatch) -> Result<MicroBatch> {
        let mut known = batch.clone();
        for slice in &mut known.slices {
            if let Some(fed_back) = slice.fed_back.take() {
                slice.tokens[0] = self.queue.wait_for(&self.backend, fed_back)?;
            }
        }
        Ok(known)
    }
}
