//! Steps that are begun before those before them have come to an end.
//!
//! A device goes on with the next step by itself, and its host is never waited for in between; what comes from another GPU arrives meanwhile. A
//! stage that is the whole model may be given tokens that the step before draws, wherever these are: on a device they stay there,
//! and what the host knows already is sent as any other token. Two steps are under way at most, and what came of them is collected in order; the
//! answers of the last step are kept beyond that, for the next one may have been issued before they came back.

use std::collections::VecDeque;
use std::sync::Arc;

use kernels::{Backend, Draws, StepTimes};
use scheduler::{FedBack, MicroBatch, MicroBatchOutput};

use super::SpanStage;
use crate::batch::Fed;
use crate::error::Result;
use crate::head::Asked;
use crate::stage::{Activations, Collected, Queued, StageOutput};

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
    times: StepTimes,
    was_given_early: bool,
}

#[allow(clippy::large_enum_variant, reason = "there are three of them at most")]
pub(super) enum Answer {
    Asked(Asked),
    /// It went in parts.
    Known(MicroBatchOutput),
    /// The next stage goes on with it.
    HandedOn,
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
            Some(Step { batch, answer, .. }) if batch.id == micro_batch => match answer {
                Answer::Asked(asked) => Fed::Drawn(asked.place(slice)),
                // A row that has failed has none, and what comes of it is dropped.
                Answer::Known(output) => Fed::Known(output.slices[slice].token.unwrap_or(0)),
                Answer::HandedOn => panic!("{micro_batch:?} went to another stage, which draws"),
            },
            last => {
                let last = last.map(|step| step.batch.id);
                panic!("a token of {micro_batch:?} was asked for, and the last step was {last:?}")
            }
        }
    }

    /// What came of the oldest step, which is waited for.
    pub(super) fn collect<B: Backend>(&mut self, backend: &B) -> Result<Collected> {
        let mut step = self.steps.pop_front().expect("a micro-batch was queued");
        let output = match &mut step.answer {
            Answer::Asked(asked) => Some(asked.answer(backend, &step.batch)?),
            Answer::Known(output) => Some(output.clone()),
            Answer::HandedOn => None,
        };
        let device_time = step.times.wait()?.filter(|_| step.was_given_early);
        let no_longer_asked_for =
            if self.steps.is_empty() { self.collected.replace(step) } else { Some(step) };
        self.recycle(no_longer_asked_for);
        Ok(Collected { output, device_time })
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
    pub(super) fn queue_step(
        &mut self,
        batch: &Arc<MicroBatch>,
        input: Option<&Activations>,
    ) -> Result<Option<Queued>> {
        assert!(self.ranks.is_none(), "{:?} was queued on a stage of several ranks", batch.id);
        let under_way = self.queue.steps.len();
        assert!(under_way < STEPS, "{:?} was queued behind {STEPS} others", batch.id);
        self.was_given_early = input.is_some_and(Activations::are_on_a_device);
        let (answer, queued) = match self.begin(batch, input) {
            Err(error) if error.is_out_of_memory() && under_way > 0 => return Ok(None),
            Err(error) if error.is_out_of_memory() => match self.step_in_parts(batch, input)? {
                StageOutput::Tokens(output) => (Answer::Known(output), Queued::default()),
                StageOutput::Activations(activations) => {
                    (Answer::HandedOn, Queued { activations: Some(activations), ..Queued::default() })
                }
            },
            begun => begun?,
        };
        self.backend.end_step(&self.times)?;
        let arrival = if matches!(answer, Answer::HandedOn) { self.times.arrival() } else { queued.arrival };
        let (times, was_given_early) = (self.times.clone(), self.was_given_early);
        self.queue.push(Step { batch: Arc::clone(batch), answer, times, was_given_early });
        self.make_room_again();
        Ok(Some(Queued { arrival, ..queued }))
    }

    /// Queues a micro-batch as a whole; what will come of it, and what there is of it now.
    pub(super) fn begin(
        &mut self,
        batch: &MicroBatch,
        input: Option<&Activations>,
    ) -> Result<(Answer, Queued)> {
        if self.head.is_none() {
            self.compute(batch, input)?;
            let activations = Some(self.activations()?);
            return Ok((Answer::HandedOn, Queued { activations, ..Queued::default() }));
        }
        let mut asked = self.queue.spare(&self.backend)?;
        if let Err(error) = self.ask(batch, input, &mut asked) {
            // Who tries again may be short of the memory of another one.
            self.queue.put_back(asked);
            return Err(error);
        }
        let arrival = asked.arrival();
        Ok((Answer::Asked(asked), Queued { activations: None, arrival }))
    }
}
