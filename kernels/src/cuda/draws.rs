//! Answers of steps on their way from a GPU: tokens stay where the embedding of the step behind finds them, and all that the host
//! wants goes to pinned memory, behind which an event says that it is there.

use std::sync::Arc;

use super::arrays::{CudaArray, CudaMatrix, CudaOperand};
use super::choices::{self, ChoiceWork};
use super::event::Event;
use super::staging::Pinned;
use super::stream::Memory;
use super::{Cuda, Workspace, locked};
use crate::backend::{Backend, Largest};
use crate::check;
use crate::choice::{Choice, Edits};
use crate::draws::{Arrival, Drawn, Draws, FedTokens};
use crate::error::Result;

const OP: &str = "draw";

/// As embed.cu has a token that is fed back; any other is below.
const FED: u32 = 1 << 31;

/// A row's statistics: the token with the largest logit, that, and the log-sum-exp.
type Stats = [u32; 3];

/// The answers to one step.
#[derive(Debug)]
pub(crate) struct CudaDraws {
    /// A token for each row, or none.
    tokens: Memory,
    /// What comes back, part by part.
    host: Pinned,
    used: usize,
    /// Rows that were asked for, and those that there is room for.
    rows: usize,
    room: usize,
    parts: Vec<Part>,
    there: Arc<Event>,
}

/// Rows that were asked for together, and where their statistics and answers begin in pinned memory.
#[derive(Debug)]
enum Part {
    Largest {
        rows: usize,
        stats_at: usize,
    },
    Chosen(Choices),
    /// The host has them.
    Known(Vec<Largest>),
}

#[derive(Debug)]
struct Choices {
    choices: Vec<Choice>,
    vocabulary: usize,
    /// Words of each answer.
    width: usize,
    stats_at: usize,
    answers_at: usize,
}

impl CudaDraws {
    /// Bytes on the device for so many rows.
    pub(super) fn bytes(rows: usize) -> usize {
        rows * size_of::<u32>()
    }

    /// Where the tokens of the next rows go, behind so many others.
    fn next_tokens(&self, rows: usize) -> (&Memory, usize) {
        assert!(self.rows + rows <= self.room, "{} and {rows} rows in room for {}", self.rows, self.room);
        (&self.tokens, self.rows)
    }

    /// Queues a copy of so many bytes to the host. Where it goes there.
    fn fetch(&mut self, from: &Memory, bytes: usize) -> Result<usize> {
        let at = self.used;
        if at + bytes > self.host.bytes() {
            // More tokens are named beside a row's own than usual.
            let mut larger = Pinned::new(self.tokens.stream(), (at + bytes).next_power_of_two())?;
            self.host.settle()?;
            larger.content_mut(0..at).copy_from_slice(self.host.content(0..at));
            self.host = larger;
        }
        self.host.fetch(OP, from, at, bytes)?;
        self.used += bytes;
        Ok(at)
    }

    pub(crate) fn add_known(&mut self, largest: &[Largest]) {
        self.parts.push(Part::Known(largest.to_vec()));
    }

    /// Adds all answers, which are there.
    fn read(&self, out: &mut Vec<Drawn>) {
        for part in &self.parts {
            match part {
                Part::Largest { rows, stats_at } => {
                    let largest = |[index, value, _]: Stats| Largest { index, value: f32::from_bits(value) };
                    out.extend(self.stats(*stats_at, *rows).map(largest).map(Drawn::Largest));
                }
                Part::Chosen(Choices { choices, vocabulary, width, stats_at, answers_at }) => {
                    let rows = choices.len();
                    let answers = self.words(*answers_at, width * rows).chunks_exact(*width);
                    let rows = self.stats(*stats_at, rows).zip(answers).zip(choices);
                    let chosen = rows
                        .map(|((stats, answer), choice)| choices::chosen(stats, answer, choice, *vocabulary));
                    out.extend(chosen.map(Drawn::Chosen));
                }
                Part::Known(largest) => out.extend(largest.iter().copied().map(Drawn::Largest)),
            }
        }
    }

    fn stats(&self, at: usize, rows: usize) -> impl Iterator<Item = Stats> {
        self.words(at, 3 * rows).chunks_exact(3).map(|stats| [stats[0], stats[1], stats[2]])
    }

    fn words(&self, at: usize, words: usize) -> &[u32] {
        bytemuck::cast_slice(self.host.content(at..at + words * size_of::<u32>()))
    }
}

impl Cuda {
    pub(super) fn new_draws(&self, rows: usize) -> Result<Draws> {
        let mut tokens = Memory::none(&self.stream);
        tokens.reserve(OP, CudaDraws::bytes(rows))?;
        let answers = ChoiceWork::answer_bytes(rows.max(1));
        let host = Pinned::new(&self.stream, answers + rows * size_of::<Stats>())?;
        let there = Arc::new(Event::new(OP, &self.stream, false)?);
        let device = CudaDraws { tokens, host, used: 0, rows: 0, room: rows, parts: Vec::new(), there };
        Ok(Draws { device: Some(device), ..Draws::default() })
    }

    pub(super) fn begin_draws(&self, draws: &mut Draws, rows: usize) -> Result<()> {
        draws.drawn.clear();
        let device = device(draws);
        device.tokens.reserve(OP, CudaDraws::bytes(rows))?;
        (device.used, device.rows, device.room) = (0, 0, rows);
        device.parts.clear();
        Ok(())
    }

    pub(super) fn choose_rows_into(
        &self,
        logits: &mut CudaArray,
        asked: &[Choice],
        edits: &Edits,
        draws: &mut Draws,
    ) -> Result<()> {
        let draws = device(draws);
        if asked.is_empty() {
            return Ok(());
        }
        let width = self.ask_choices(logits, asked, edits, Some(draws.next_tokens(logits.rows)))?;
        let workspace = locked(&self.workspace);
        let Workspace { stats, choices: ChoiceWork { answers, .. }, .. } = &*workspace;
        let (rows, vocabulary) = (logits.rows, logits.cols);
        let stats_at = draws.fetch(stats, rows * size_of::<Stats>())?;
        let answers_at = draws.fetch(answers, rows * width * size_of::<u32>())?;
        let choices = asked.to_vec();
        draws.rows += rows;
        draws.parts.push(Part::Chosen(Choices { choices, vocabulary, width, stats_at, answers_at }));
        Ok(())
    }

    pub(super) fn largest_into(
        &self,
        x: &CudaOperand,
        w: &CudaMatrix,
        scratch: &mut CudaArray,
        draws: &mut Draws,
    ) -> Result<()> {
        let draws = device(draws);
        self.matmul(x, w, scratch)?;
        if scratch.rows == 0 {
            return Ok(());
        }
        let (tokens, first) = draws.next_tokens(scratch.rows);
        self.ask_stats(OP, scratch, tokens.at(CudaDraws::bytes(first)))?;
        let rows = scratch.rows;
        let stats_at = draws.fetch(&locked(&self.workspace).stats, rows * size_of::<Stats>())?;
        draws.rows += rows;
        draws.parts.push(Part::Largest { rows, stats_at });
        Ok(())
    }

    pub(super) fn end_draws(&self, draws: &mut Draws) -> Result<Arrival> {
        let draws = device(draws);
        draws.there.record(OP)?;
        let there = Arc::clone(&draws.there);
        Ok(Arrival::when(move || there.wait(OP)))
    }

    pub(super) fn drawn<'a>(&self, draws: &'a mut Draws) -> Result<&'a [Drawn]> {
        let Draws { drawn, device: Some(device), .. } = draws else { return Ok(&draws.drawn) };
        if drawn.is_empty() {
            device.there.wait(OP)?;
            device.read(drawn);
        }
        Ok(drawn)
    }

    pub(super) fn embed_with(
        &self,
        table: &CudaMatrix,
        fed: FedTokens<'_>,
        out: &mut CudaArray,
    ) -> Result<()> {
        const OP: &str = "embed";
        let FedTokens { tokens, fed, draws } = fed;
        let Some(draws) = &draws.device else { unreachable!("draws of a GPU are on it") };
        check::all_below(OP, "token", tokens, table.rows)?;
        let mut words = tokens.to_vec();
        for &(row, place) in fed {
            check::all_below(OP, "place of a token that is fed back", &[place], draws.rows)?;
            words[row as usize] = FED | place;
        }
        self.embed_words(table, &words, draws.tokens.start(), out)
    }
}

fn device(draws: &mut Draws) -> &mut CudaDraws {
    draws.device.as_mut().expect("draws of a GPU were made by it")
}
