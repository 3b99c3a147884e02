//! Devices at work side by side, with a clock on each.
//!
//! GPUs have memory of their own, but hand over to each other: what one takes comes from its neighbour.
//!
//! Each device, or the first of those that share a stage, has a thread that loads the subject and takes its steps. All begin
//! a point together; where they are to be busy, one that has enough times goes on working until the last has.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::at_work::{AtHand, AtWork};
use super::measure::Effort;
use super::points::{Both, Seconds};
use super::subject::{Step, Subject};
use crate::error::Result;
use crate::stage::{Device, Dtypes};

/// Devices alike that share the memory or hand over to each other, and how long to look.
#[derive(Debug, Clone, Copy)]
pub(super) struct Gang<'a> {
    pub(super) devices: &'a [Device],
    /// Devices of a stage: as many as there are work side by side, and what is left over is idle.
    pub(super) width: usize,
    pub(super) dtypes: Dtypes,
    pub(super) effort: Effort,
    /// Other memory to read before each step, so that what was read before it is in no cache.
    pub(super) scrub_bytes: u64,
}

/// What the threads of a gang share.
struct Shared {
    all: Barrier,
    has_failed: AtomicBool,
    /// Stages that need more times for the present point.
    num_at_work: AtomicUsize,
}

impl Gang<'_> {
    /// The times of each step, after `before` was done once.
    ///
    /// # Errors
    /// What a device refuses.
    pub(super) fn time(
        &self,
        subject: &Subject,
        before: &[Step],
        steps: &[Step],
    ) -> Result<Vec<Both<Seconds>>> {
        let shared = Shared {
            all: Barrier::new(self.num_stages()),
            has_failed: AtomicBool::new(false),
            num_at_work: AtomicUsize::new(0),
        };
        let results: Vec<Result<Vec<Both<Vec<f64>>>>> = std::thread::scope(|scope| {
            let start = |(index, devices)| {
                let shared = &shared;
                scope.spawn(move || self.on_devices(index, devices, shared, subject, before, steps))
            };
            let threads: Vec<_> = self.devices.chunks_exact(self.width).enumerate().map(start).collect();
            threads.into_iter().map(|thread| thread.join().expect("a device thread panicked")).collect()
        });
        let mut times = vec![Both { alone: vec![], busy: vec![] }; steps.len()];
        for result in results {
            for (all, own) in times.iter_mut().zip(result?) {
                all.alone.extend(own.alone);
                all.busy.extend(own.busy);
            }
        }
        let seconds = |times: &Both<Vec<f64>>| {
            let alone = Seconds::of(times.alone.clone());
            let busy = if times.busy.is_empty() { alone } else { Seconds::of(times.busy.clone()) };
            Both { alone, busy }
        };
        Ok(times.iter().map(seconds).collect())
    }

    fn num_stages(&self) -> usize {
        self.devices.len() / self.width
    }

    /// The device that hands over to a stage.
    fn before(&self, index: usize) -> &Device {
        let num_devices = self.devices.len();
        &self.devices[(index * self.width + num_devices - 1) % num_devices]
    }

    fn on_devices(
        &self,
        index: usize,
        devices: &[Device],
        shared: &Shared,
        subject: &Subject,
        before: &[Step],
        steps: &[Step],
    ) -> Result<Vec<Both<Vec<f64>>>> {
        let takes_activations = steps.iter().any(|step| step.input.is_some());
        let at_hand =
            AtHand { scrub_bytes: self.scrub_bytes, before: takes_activations.then(|| self.before(index)) };
        let mut at_work = AtWork::load(subject, devices, self.dtypes, at_hand);
        if at_work.is_err() {
            shared.has_failed.store(true, Ordering::Release);
        }
        shared.all.wait();
        if shared.has_failed.load(Ordering::Acquire) {
            return at_work.map(|_| vec![]);
        }
        let at_work = at_work.as_mut().expect("no device has failed");
        for step in before {
            at_work.seconds(step);
        }
        let mut times = vec![];
        for step in steps {
            let step = &at_work.handed_over(step);
            at_work.seconds(step); // Arrays find their size.
            shared.all.wait();
            let alone = if index == 0 { self.repeat(at_work, step, None) } else { vec![] };
            shared.num_at_work.store(self.num_stages(), Ordering::Release);
            shared.all.wait();
            let are_several = self.num_stages() > 1;
            let busy =
                if are_several { self.repeat(at_work, step, Some(&shared.num_at_work)) } else { vec![] };
            times.push(Both { alone, busy });
        }
        at_work.result().map(|()| times)
    }

    /// Times of one step, with neighbours until the last of them has enough.
    fn repeat(&self, at_work: &mut AtWork, step: &Step, neighbours: Option<&AtomicUsize>) -> Vec<f64> {
        let times = at_work.repeat(step, self.effort);
        if let Some(num_at_work) = neighbours {
            num_at_work.fetch_sub(1, Ordering::AcqRel);
            while num_at_work.load(Ordering::Acquire) > 0 {
                at_work.seconds(step);
            }
        }
        times
    }
}
