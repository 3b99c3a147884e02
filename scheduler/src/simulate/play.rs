//! The loop: submit, issue, let the oldest micro-batch come back, account for the time until then.

use std::collections::VecDeque;
use std::iter::Peekable;
use std::time::Duration;

use super::draw::{Draw, Drawn};
use super::line::Line;
use super::timeline::Bins;
use super::waits::{Doing, Waits, reason};
use super::{Lengths, Simulated, Simulation, Step};
use crate::error::Error;
use crate::request::Generated;
use crate::scheduler::{Flow, Scheduler};

/// A job under way.
struct Player<'a, R: Iterator> {
    simulation: &'a Simulation<'a>,
    scheduler: Scheduler,
    requests: Peekable<R>,
    /// No request is left to submit.
    is_exhausted: bool,
    /// Submitted and not ended.
    num_offered: usize,
    draw: Draw,
    line: Line<'a>,
    /// What is on its way back, with the moments when it is there.
    answers: VecDeque<(u64, Drawn)>,
    now_ns: u64,
    /// Since when nothing has waited, once no request is left.
    tail_ns: Option<u64>,
    bins: Bins,
    most_pages: usize,
    rows: u64,
    prompt_tokens: u64,
    generated_tokens: u64,
}

pub(super) fn play<R: Iterator<Item = Lengths>>(
    simulation: &Simulation<'_>,
    requests: R,
    observe: &mut dyn FnMut(Step),
) -> Result<Simulated, Error> {
    let Simulation { options, stages, window, max_tokens } = simulation;
    assert_eq!(stages.len(), options.num_stages, "stages given and stages of the options");
    assert!(*window > 0 && *max_tokens > 0, "a window of {window} requests of {max_tokens} tokens");
    let mut player = Player {
        simulation,
        scheduler: Scheduler::new(options.clone()),
        requests: requests.peekable(),
        is_exhausted: false,
        num_offered: 0,
        draw: Draw::new(*max_tokens, options),
        line: Line::new(stages),
        answers: VecDeque::new(),
        now_ns: 0,
        tail_ns: None,
        bins: Bins::new(stages.len()),
        most_pages: 0,
        rows: 0,
        prompt_tokens: 0,
        generated_tokens: 0,
    };
    loop {
        player.submit()?;
        player.issue(observe);
        let Some((back_ns, drawn)) = player.answers.pop_front() else { break };
        player.pass(back_ns);
        player.complete(&drawn);
    }
    Ok(player.finish())
}

impl<R: Iterator<Item = Lengths>> Player<'_, R> {
    fn submit(&mut self) -> Result<(), Error> {
        while self.num_offered < self.simulation.window
            && let Some(lengths) = self.requests.next()
        {
            self.scheduler.submit(self.draw.request(lengths), Generated::default())?;
            self.num_offered += 1;
        }
        self.is_exhausted = self.requests.peek().is_none();
        Ok(())
    }

    fn issue(&mut self, observe: &mut dyn FnMut(Step)) {
        while let Some(micro_batch) = self.scheduler.next_micro_batch() {
            let drawn = self.draw.draw(&micro_batch);
            let back_ns = self.line.send(self.now_ns, micro_batch.id, micro_batch.load(), observe);
            self.answers.push_back((back_ns, drawn));
        }
        let nothing_waits = self.is_exhausted && self.scheduler.num_waiting() == 0;
        self.tail_ns = nothing_waits.then(|| self.tail_ns.unwrap_or(self.now_ns));
        self.most_pages = self.most_pages.max(self.pages_in_use());
    }

    fn pages_in_use(&self) -> usize {
        self.simulation.options.num_pages - self.scheduler.num_free_pages()
    }

    /// Moves the clock, and accounts for the time until then.
    fn pass(&mut self, to_ns: u64) {
        let from_ns = self.now_ns;
        self.bins.reach(to_ns);
        self.bins.add_levels(self.pages_in_use(), self.scheduler.num_running(), from_ns, to_ns);
        let flow = self.scheduler.flow();
        while self.now_ns < to_ns {
            self.pass_alike(flow, to_ns);
        }
        self.line.forget(to_ns);
    }

    /// Moves the clock as far as waiting means the same thing.
    fn pass_alike(&mut self, flow: Flow, to_ns: u64) {
        let (is_any_busy, to_ns) = self.line.while_alike(self.now_ns, to_ns);
        let wait = reason(flow, self.is_exhausted, is_any_busy);
        for stage in 0..self.simulation.stages.len() {
            self.line.walk(stage, self.now_ns, to_ns, |is_busy, from_ns, to_ns| {
                let doing = if is_busy { Doing::Busy } else { wait };
                self.bins.add_doing(stage, doing, from_ns, to_ns);
            });
        }
        self.now_ns = to_ns;
    }

    fn complete(&mut self, drawn: &Drawn) {
        self.generated_tokens += drawn.num_tokens();
        self.bins.add_tokens(drawn.num_tokens(), self.now_ns);
        for completion in self.scheduler.complete(drawn.answer(), |_, _| false) {
            self.draw.ended(completion.sequence);
            self.num_offered -= 1;
            self.rows += 1;
            self.prompt_tokens += completion.request.prompt.len() as u64;
        }
    }

    fn finish(self) -> Simulated {
        let options = &self.simulation.options;
        let (end_ns, num_pages) = (self.now_ns, options.num_pages);
        Simulated {
            wall: Duration::from_nanos(end_ns),
            rows: self.rows,
            prompt_tokens: self.prompt_tokens,
            generated_tokens: self.generated_tokens,
            micro_batches: self.scheduler.next_micro_batch_id().0,
            stats: self.scheduler.stats(),
            tail: Duration::from_nanos(end_ns - self.tail_ns.unwrap_or(end_ns)),
            stages: (0..options.num_stages).map(|stage| Waits::of_ns(self.bins.totals(stage))).collect(),
            kv: self.bins.page_ns() / (end_ns.max(1) as f64 * num_pages as f64),
            kv_most: self.most_pages as f64 / num_pages as f64,
            timeline: self.bins.finish(end_ns, num_pages),
        }
    }
}
