//! Steps for which a device has no room: they go in halves, and these in halves.
//!
//! Rows do not depend on what stands beside them, and a key that is written twice is the same key: so what comes of it has
//! the same bits. To send sequences back to wait would help nobody: their pages are memory that the cache keeps.
//!
//! Where GPUs share a stage all of them go in halves, the same ones, whichever has no room: it says so in place of the next thing
//! that they would tell each other, and at a step's end all say that they had it. So no rank waits for what another has not begun.
//! As long as a shortage lasts they go in halves at once, without freeing and making again all that they work in.

use kernels::Backend;
use scheduler::MicroBatch;

use super::SpanStage;
use super::queue::Answer;
use crate::error::{Error, Result};
use crate::ranks::{RankStep, Ranks};
use crate::stage::{Activations, StageOutput};

impl<B: Backend> SpanStage<B> {
    /// A micro-batch; where there is no room for it, its halves one after the other, and theirs. A token alone is tried once
    /// more when all has been given back that larger steps had.
    pub(super) fn step_in_parts(
        &mut self,
        batch: &MicroBatch,
        input: Option<&Activations>,
    ) -> Result<StageOutput> {
        if !self.is_refusal_foreseen(batch.num_tokens()) {
            match self.whole_step(batch, input) {
                Err(error) if error.is_out_of_memory() => self.shrink(&error, batch.num_tokens()),
                done => return done,
            }
        }
        let Some((front, back)) = batch.halves() else {
            return self.whole_step(batch, input).map_err(Error::of_one_token);
        };
        let (for_front, for_back) = match input {
            Some(input) => {
                let (front, back) = input.split(front.num_tokens())?;
                (Some(front), Some(back))
            }
            None => (None, None),
        };
        let done = self.step_in_parts(&front, for_front.as_ref())?;
        done.joined(self.step_in_parts(&back, for_back.as_ref())?)
    }

    /// The same of a rank beside the first.
    pub(super) fn follow_in_parts(&mut self, step: &RankStep) -> Result<()> {
        if !self.is_refusal_foreseen(step.num_rows()) {
            match self.follow_whole(step) {
                Err(error) if error.is_out_of_memory() => self.shrink(&error, step.num_rows()),
                done => return done,
            }
        }
        let Some((front, back)) = step.halves() else {
            return self.follow_whole(step).map_err(Error::of_one_token);
        };
        self.follow_in_parts(&front)?;
        self.follow_in_parts(&back)
    }

    /// Whether a step of several ranks would find no room, as one of no more rows did not long ago. A token alone is always
    /// tried.
    fn is_refusal_foreseen(&mut self, rows: usize) -> bool {
        match &mut self.room {
            Some(room) if self.ranks.is_some() && rows > 1 => room.refusals.is_foreseen(rows),
            _ => false,
        }
    }

    fn whole_step(&mut self, batch: &MicroBatch, input: Option<&Activations>) -> Result<StageOutput> {
        let begun = self.begin(batch, input);
        match self.agreed(begun)? {
            (Answer::Asked(mut asked), _) => {
                let output = asked.answer(&self.backend, batch)?;
                self.queue.put_back(asked);
                Ok(StageOutput::Tokens(output))
            }
            (_, queued) => {
                let activations = queued.activations.expect("a stage that draws nothing hands on");
                Ok(StageOutput::Activations(activations))
            }
        }
    }

    fn follow_whole(&mut self, step: &RankStep) -> Result<()> {
        let followed = self.follow_step(step);
        self.agreed(followed)
    }

    /// What came of a step on this rank, where it came to something on all.
    fn agreed<T>(&mut self, done: Result<T>) -> Result<T> {
        let Some(ranks) = &mut self.ranks else { return done };
        match done {
            Ok(done) => ranks.end_step(true).map(|()| done),
            Err(error) if error.is_out_of_memory() && !error.is_of_other_rank() => {
                match ranks.end_step(false) {
                    Err(other) if !other.is_out_of_memory() => Err(other),
                    _ => Err(error),
                }
            }
            // The others know, or will when they hear that this rank is gone.
            Err(error) => Err(error),
        }
    }

    /// Gives back what has grown for larger steps than those that come. Says why once, on the rank that has no room, and on the
    /// first.
    fn shrink(&mut self, error: &Error, tokens: usize) {
        let is_news = !error.is_of_other_rank() || self.ranks.as_ref().is_none_or(Ranks::is_first);
        if tokens > 1 && !std::mem::replace(&mut self.has_halved, true) && is_news {
            tracing::warn!(
                "{error}: the step of {tokens} tokens goes in halves, and later ones where they must"
            );
        }
        self.give_room_back();
        // What the smallest step there is lacks says nothing of others.
        if let Some(room) = self.room.as_mut().filter(|_| tokens > 1) {
            room.refusals.add(tokens);
        }
    }
}
