//! A subject on a device, with a clock on its steps.

use std::time::Instant;

use super::measure::Effort;
use super::subject::{Place, Step, Subject};
use super::team::Team;
use crate::error::Result;
use crate::stage::{self, Device, Dtypes, Stage, StageOutput};

/// More than this says nothing new.
const MAX_REPEATS: usize = 50;

/// A point that takes this many times its share ends with however many times it has.
const PATIENCE: f64 = 10.0;

/// A loaded subject. Once its device has refused a step it does nothing more, so that nobody waits for it in vain.
pub(super) struct AtWork {
    stage: Box<dyn Stage>,
    /// The stage that hands over to it, where activations never leave the devices.
    before: Option<Box<dyn Stage>>,
    scrub: Vec<u64>,
    error: Option<crate::Error>,
}

/// What a subject has at hand beside itself.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct AtHand<'a> {
    /// Other memory of the host that is read before each step.
    pub(super) scrub_bytes: u64,
    /// The device of the stage before, for a subject that takes activations.
    pub(super) before: Option<&'a Device>,
}

impl AtWork {
    /// Loads a subject on a device, or on several that share it; the calling thread becomes the first one's.
    ///
    /// # Errors
    /// What a device refuses.
    pub(super) fn load(
        subject: &Subject,
        devices: &[Device],
        dtypes: Dtypes,
        at_hand: AtHand<'_>,
    ) -> Result<Self> {
        let stage: Box<dyn Stage> = match devices {
            [device] => stage::load(&subject.model, device, dtypes, subject.options)?,
            devices => Box::new(Team::load(subject, devices, dtypes)?),
        };
        let before = match at_hand.before {
            Some(device @ Device::Cuda { .. }) => {
                let before = Subject::no_blocks(&subject.model, Place::Middle);
                Some(stage::load(&before.model, device, dtypes, before.options)?)
            }
            _ => None,
        };
        Ok(AtWork { stage, before, scrub: vec![1; at_hand.scrub_bytes as usize / 8], error: None })
    }

    /// Writes every page of the subject's.
    ///
    /// # Errors
    /// What the device refuses.
    pub(super) fn fill_pages(&mut self, num_pages: usize) -> Result<()> {
        self.stage.fill_pages(num_pages)
    }

    /// The same step with its activations where the stage before leaves them.
    pub(super) fn handed_over(&mut self, step: &Step) -> Step {
        let mut step = step.clone();
        let Some(before) = self.before.as_mut().filter(|_| step.input.is_some()) else { return step };
        match before.step(&step.batch, step.input.take()) {
            Ok(StageOutput::Activations(activations)) => step.input = Some(activations),
            Ok(StageOutput::Tokens(_)) => unreachable!("a stage in the middle hands activations over"),
            Err(error) => self.error = Some(error),
        }
        step
    }

    /// Takes a step and says how long it took, until its device has done it.
    pub(super) fn seconds(&mut self, step: &Step) -> f64 {
        if self.error.is_some() {
            return 0.0;
        }
        let input = step.input.clone();
        std::hint::black_box(self.scrub.iter().sum::<u64>());
        let begun = Instant::now();
        let done = self.stage.step(&step.batch, input).and_then(|_| self.stage.finish());
        let seconds = begun.elapsed().as_secs_f64();
        self.error = done.err();
        seconds
    }

    /// Times of one step, until there are enough.
    pub(super) fn repeat(&mut self, step: &Step, effort: Effort) -> Vec<f64> {
        let mut times = vec![];
        let begun = Instant::now();
        while !effort.is_enough(times.len(), begun.elapsed().as_secs_f64()) {
            times.push(self.seconds(step));
        }
        times
    }

    /// Whether the device took every step.
    ///
    /// # Errors
    /// What it refused.
    pub(super) fn result(&mut self) -> Result<()> {
        self.error.take().map_or(Ok(()), Err)
    }
}

impl Effort {
    fn is_enough(self, repeats: usize, elapsed: f64) -> bool {
        let is_tired = repeats > 0 && elapsed > PATIENCE * self.point_seconds;
        is_tired || repeats >= MAX_REPEATS || (repeats >= self.least_repeats && elapsed > self.point_seconds)
    }
}
