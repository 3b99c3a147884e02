//! The stages as they take micro-batches in turn, and what of their steps is still to be accounted for.

use std::collections::VecDeque;
use std::time::Duration;

use super::{Step, VirtualStage};
use crate::load::Load;
use crate::micro_batch::MicroBatchId;

/// All stages. Times are nanoseconds from the job's begin.
#[derive(Debug)]
pub(super) struct Line<'a> {
    stages: &'a [VirtualStage<'a>],
    /// For each stage the others of its device.
    others: Vec<Vec<usize>>,
    /// For each stage the end of its last step.
    free_ns: Vec<u64>,
    /// For each stage the steps that take time and are not over yet, or were not accounted for.
    steps: Vec<VecDeque<Busy>>,
    /// When the last micro-batch comes back.
    back_ns: u64,
}

/// A step of one stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Busy {
    pub(super) start_ns: u64,
    pub(super) end_ns: u64,
}

impl<'a> Line<'a> {
    pub(super) fn new(stages: &'a [VirtualStage<'a>]) -> Self {
        let others = |index: usize| {
            let is_other = |other: &usize| *other != index && stages[*other].device == stages[index].device;
            (0..stages.len()).filter(is_other).collect()
        };
        Self {
            stages,
            others: (0..stages.len()).map(others).collect(),
            free_ns: vec![0; stages.len()],
            steps: vec![VecDeque::new(); stages.len()],
            back_ns: 0,
        }
    }

    /// Sends a micro-batch through all stages, from `now_ns` on. Returns when its answer is back.
    pub(super) fn send(
        &mut self,
        now_ns: u64,
        id: MicroBatchId,
        load: Load,
        observe: &mut dyn FnMut(Step),
    ) -> u64 {
        let mut arrival_ns = now_ns;
        for (index, stage) in self.stages.iter().enumerate() {
            let step_ns = nanoseconds((stage.seconds)(load));
            let start_ns = self.start(index, arrival_ns.max(self.free_ns[index]), step_ns);
            let end_ns = start_ns + step_ns;
            arrival_ns = end_ns + nanoseconds((stage.hop_seconds)(load));
            self.free_ns[index] = end_ns;
            if start_ns < end_ns {
                self.steps[index].push_back(Busy { start_ns, end_ns });
            }
            observe(Step {
                stage: index,
                micro_batch: id.0,
                start: Duration::from_nanos(start_ns),
                end: Duration::from_nanos(end_ns),
                tokens: load.tokens() as usize,
                decode_tokens: load.decode_tokens as usize,
            });
        }
        // A small micro-batch may hop faster than a large one before it; it is not heard of before that.
        self.back_ns = self.back_ns.max(arrival_ns);
        self.back_ns
    }

    /// When a stage may begin a step, at `from_ns` or later. What its device will do for its other stages is certain: it has the
    /// time between for this one, where that is enough.
    fn start(&self, index: usize, from_ns: u64, step_ns: u64) -> u64 {
        let mut start_ns = from_ns;
        loop {
            let is_in_the_way = |step: &&Busy| step.start_ns < start_ns + step_ns && start_ns < step.end_ns;
            let steps =
                self.others[index].iter().filter_map(|other| self.steps[*other].iter().find(is_in_the_way));
            let Some(end_ns) = steps.map(|step| step.end_ns).max() else { return start_ns };
            start_ns = end_ns;
        }
    }

    /// Walks what a stage did from `from_ns` to `to_ns`, where it was not forgotten yet: each part of the
    /// time once, in order, and whether it was busy then.
    pub(super) fn walk(&self, stage: usize, from_ns: u64, to_ns: u64, mut part: impl FnMut(bool, u64, u64)) {
        let mut at_ns = from_ns;
        for step in self.steps[stage].iter().take_while(|step| step.start_ns < to_ns) {
            if at_ns < step.start_ns {
                part(false, at_ns, step.start_ns);
            }
            let (start_ns, end_ns) = (at_ns.max(step.start_ns), step.end_ns.min(to_ns));
            if start_ns < end_ns {
                part(true, start_ns, end_ns);
                at_ns = end_ns;
            }
        }
        if at_ns < to_ns {
            part(false, at_ns, to_ns);
        }
    }

    /// How long from `from_ns` on, at most to `to_ns`, it stays as it is then: some stage busy, or none.
    pub(super) fn while_alike(&self, from_ns: u64, to_ns: u64) -> (bool, u64) {
        let mut at_ns = from_ns;
        while at_ns < to_ns
            && let Some(end_ns) = self.latest_end(at_ns)
        {
            at_ns = end_ns;
        }
        if at_ns > from_ns { (true, at_ns.min(to_ns)) } else { (false, self.next_start(from_ns).min(to_ns)) }
    }

    /// The latest end of a step that is under way at a moment.
    fn latest_end(&self, at_ns: u64) -> Option<u64> {
        let under_way = |steps: &VecDeque<Busy>| {
            let mut begun = steps.iter().take_while(|step| step.start_ns <= at_ns);
            begun.find(|step| at_ns < step.end_ns).map(|step| step.end_ns)
        };
        self.steps.iter().filter_map(under_way).max()
    }

    /// The first start of a step after a moment.
    fn next_start(&self, at_ns: u64) -> u64 {
        let next = |steps: &VecDeque<Busy>| {
            steps.iter().map(|step| step.start_ns).find(|start_ns| at_ns < *start_ns)
        };
        self.steps.iter().filter_map(next).min().unwrap_or(u64::MAX)
    }

    /// Forgets all steps that were over at a moment.
    pub(super) fn forget(&mut self, until_ns: u64) {
        for steps in &mut self.steps {
            while steps.front().is_some_and(|step| step.end_ns <= until_ns) {
                steps.pop_front();
            }
        }
    }
}

fn nanoseconds(seconds: f64) -> u64 {
    assert!(seconds.is_finite() && seconds >= 0.0, "a stage takes {seconds} seconds");
    (seconds * 1e9).round() as u64
}
