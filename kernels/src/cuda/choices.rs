//! Choosing tokens on the device: a few words for each row go there, with what is to be edited of it, and a few come back, and no
//! logits.
//!
//! Edits of rows are as many as their tokens so far, which nobody knows before. No row has more than the vocabulary has tokens, so that there
//! is room for so many, and rows that have more together are chosen from in parts.

use std::ops::Range;

use super::arrays::CudaArray;
use super::stream::Argument;
use super::stream::Memory;
use super::{Cuda, Workspace, locked, row_grid, u32_of};
use crate::backend::LogitStats;
use crate::check;
use crate::choice::{Choice, Chosen, Edit, Edits};
use crate::error::Result;

const OP: &str = "choose";

/// Threads of a block of logit_stats.cu and of choose.cu.
const THREADS: usize = 512;

/// As choose.cu has a choice, with where its edits begin and end, and its mask.
type Asked = [u32; 11];

/// As choose.cu has an edit, the last word for the logit that was there.
type AskedEdit = [u32; 4];

/// No token, and no mask.
const NONE: u32 = u32::MAX;

/// Likeliest tokens of a row that there is room for before anybody asks: as many as OpenAI's API gives.
const USUAL_TOP: usize = 20;

/// What is on its way there and back.
#[derive(Debug)]
pub(super) struct ChoiceWork {
    asked: Memory,
    edits: Memory,
    masks: Memory,
    pub(super) answers: Memory,
    host_asked: Vec<Asked>,
    host_edits: Vec<AskedEdit>,
    host_answers: Vec<u32>,
}

impl ChoiceWork {
    pub(super) fn new(none: impl Fn() -> Memory) -> ChoiceWork {
        ChoiceWork {
            asked: none(),
            edits: none(),
            masks: none(),
            answers: none(),
            host_asked: Vec::new(),
            host_edits: Vec::new(),
            host_answers: Vec::new(),
        }
    }

    /// Bytes of what is asked of so many rows.
    pub(super) fn asked_bytes(rows: usize) -> usize {
        rows * size_of::<Asked>()
    }

    /// Bytes that a step sends for so many rows, no more than `at_once` of which are chosen from together: what is asked of them, a mask
    /// for each, and the edits of as many parts. Of more edits buffers that take turns do so more often.
    pub(super) fn sent_bytes(rows: usize, at_once: usize, vocabulary: usize) -> usize {
        let [asked, edits, masks, _] = ChoiceWork::bytes(rows, vocabulary);
        asked + masks + rows.div_ceil(at_once.max(1)) * edits
    }

    /// Bytes of the answers to so many rows.
    pub(super) fn answer_bytes(rows: usize) -> usize {
        rows * (2 + 2 * USUAL_TOP) * size_of::<u32>()
    }

    /// Bytes of the edits of a part, where any row has some.
    fn edit_bytes(vocabulary: usize) -> usize {
        vocabulary * size_of::<AskedEdit>()
    }

    /// Bytes of all four pieces, for so many rows of a vocabulary.
    pub(super) fn bytes(rows: usize, vocabulary: usize) -> [usize; 4] {
        let masks = rows * vocabulary.div_ceil(32) * size_of::<u32>();
        let edits = if rows > 0 { ChoiceWork::edit_bytes(vocabulary) } else { 0 };
        [ChoiceWork::asked_bytes(rows), edits, masks, ChoiceWork::answer_bytes(rows)]
    }

    pub(super) fn reserve(&mut self, rows: usize, vocabulary: usize) -> Result<()> {
        let ChoiceWork { asked, edits, masks, answers, .. } = self;
        let mut pieces = [asked, edits, masks, answers].into_iter().zip(ChoiceWork::bytes(rows, vocabulary));
        pieces.try_for_each(|(memory, bytes)| memory.reserve(OP, bytes))
    }
}

impl Cuda {
    pub(super) fn choose_rows(
        &self,
        logits: &mut CudaArray,
        choices: &[Choice],
        changes: &Edits,
        out: &mut Vec<Chosen>,
    ) -> Result<()> {
        out.clear();
        let width = self.ask_choices(logits, choices, changes, None)?;
        let mut workspace = locked(&self.workspace);
        let Workspace { stats, host_stats, choices: ChoiceWork { answers, host_answers, .. }, .. } =
            &mut *workspace;
        host_stats.resize(logits.rows, [0; 3]);
        host_answers.resize(logits.rows * width, 0);
        self.stream.download(OP, stats, host_stats)?;
        self.stream.download(OP, answers, host_answers)?;
        let rows = host_stats.iter().zip(host_answers.chunks_exact(width)).zip(choices);
        out.extend(rows.map(|((stats, answer), choice)| chosen(*stats, answer, choice, logits.cols)));
        Ok(())
    }

    /// Queues what chooses a token from each row: its statistics and its answer then lie in the workspace, and its token also at `tokens`, behind so
    /// many others, where that is anywhere. Words of an answer.
    pub(super) fn ask_choices(
        &self,
        logits: &mut CudaArray,
        choices: &[Choice],
        changes: &Edits,
        tokens: Option<(&Memory, usize)>,
    ) -> Result<usize> {
        check::logits(logits.cols)?;
        check::choices(choices, changes, logits.rows, logits.cols)?;
        let mut workspace = locked(&self.workspace);
        let Workspace { stats, choices: work, .. } = &mut *workspace;
        let ChoiceWork { asked, edits, masks, answers, host_asked, host_edits, .. } = work;
        let (rows, cols) = (logits.rows, logits.cols);
        let parts = parts(changes, rows, cols);
        host_asked.clear();
        for part in &parts {
            let first_edit = changes.begin(part.start).edits;
            host_asked.extend(part.clone().map(|row| words(&choices[row], changes, row, first_edit)));
        }
        let most = choices.iter().map(|choice| choice.top as usize).max().unwrap_or(0).min(cols);
        let width = 2 + 2 * most;
        stats.reserve(OP, rows * size_of::<[u32; 3]>())?;
        asked.reserve(OP, size_of_val(&host_asked[..]))?;
        edits.reserve(OP, if changes.edits.is_empty() { 0 } else { ChoiceWork::edit_bytes(cols) })?;
        masks.reserve(OP, size_of_val(&changes.masks[..]))?;
        answers.reserve(OP, rows * width * size_of::<u32>())?;
        let outbox = &mut locked(&self.tables).outbox;
        outbox.send(&self.stream, OP, bytemuck::cast_slice(host_asked), asked)?;
        outbox.send(&self.stream, OP, bytemuck::cast_slice(&changes.masks), masks)?;
        let grid = row_grid(rows, THREADS);
        let arguments = [stats.start(), logits.memory.start(), u32_of(cols), NO_TOKENS];
        // SAFETY: there is room for the statistics of each row.
        unsafe { self.stream.launch(OP, &self.kernels.logit_stats, grid, &arguments) }?;
        for part in parts {
            let of_part = changes.begin(part.start).edits..changes.begin(part.end).edits;
            host_edits.clear();
            host_edits.extend(changes.edits[of_part].iter().map(edit_words));
            outbox.send(&self.stream, OP, bytemuck::cast_slice(host_edits), edits)?;
            let of_rows = |words: usize| part.start * words * size_of::<u32>();
            let arguments = [
                answers.at(of_rows(width)),
                logits.memory.at(of_rows(cols)),
                stats.at(of_rows(3)),
                asked.at(ChoiceWork::asked_bytes(part.start)),
                edits.start(),
                masks.start(),
                u32_of(cols),
                u32_of(width),
                tokens
                    .map_or(NO_TOKENS, |(memory, first)| memory.at((first + part.start) * size_of::<u32>())),
            ];
            let grid = row_grid(part.len(), THREADS);
            // SAFETY: each row has its statistics, its choice of a token of the vocabulary, and room for as many pairs as any
            // asks for; its edits and its mask were sent, and are of the vocabulary; `tokens` has room for a token of each row, or is nowhere.
            unsafe { self.stream.launch(OP, &self.kernels.choose, grid, &arguments) }?;
        }
        Ok(width)
    }
}

/// Tokens are wanted nowhere but among the answers.
pub(super) const NO_TOKENS: Argument = Argument::Pointer(0);

/// Rows, as few parts of them as have no more edits each than the vocabulary has tokens.
fn parts(changes: &Edits, rows: usize, vocabulary: usize) -> Vec<Range<usize>> {
    let (mut parts, mut first) = (Vec::new(), 0);
    for row in 0..rows {
        if changes.begin(row + 1).edits - changes.begin(first).edits > vocabulary {
            parts.push(first..row);
            first = row;
        }
    }
    parts.push(first..rows);
    parts
}

/// What is asked of a row, of whose part the edits begin there.
fn words(choice: &Choice, changes: &Edits, row: usize, first_edit: usize) -> Asked {
    let Choice { given, temperature, top_k, top_p, min_p, uniform, top } = *choice;
    let (begin, end) = (changes.begin(row), changes.begin(row + 1));
    [
        uniform as u32,
        (uniform >> 32) as u32,
        given.unwrap_or(NONE),
        temperature.to_bits(),
        top_k,
        top_p.to_bits(),
        min_p.to_bits(),
        top,
        (begin.edits - first_edit) as u32,
        (end.edits - first_edit) as u32,
        if begin.masks < end.masks { begin.masks as u32 } else { NONE },
    ]
}

fn edit_words(edit: &Edit) -> AskedEdit {
    [edit.token, edit.scale.to_bits(), edit.shift.to_bits(), 0]
}

pub(super) fn chosen(
    [argmax, max, log_sum_exp]: [u32; 3],
    answer: &[u32],
    choice: &Choice,
    vocabulary: usize,
) -> Chosen {
    let stats = LogitStats { argmax, max: f32::from_bits(max), log_sum_exp: f32::from_bits(log_sum_exp) };
    // Of a row that is not finite nothing but the statistics was written.
    let count = if stats.max.is_finite() { (choice.top as usize).min(vocabulary) } else { 0 };
    let mut top: Vec<(u32, f32)> =
        answer[2..2 + 2 * count].chunks_exact(2).map(|pair| (pair[0], f32::from_bits(pair[1]))).collect();
    top.sort_unstable_by(|(a, x), (b, y)| {
        y.partial_cmp(x).unwrap_or(std::cmp::Ordering::Equal).then(a.cmp(b))
    });
    let token = Some(answer[0]).filter(|&token| token != NONE);
    Chosen { token, logit: f32::from_bits(answer[1]), stats, top }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choice::RowEdits;

    #[test]
    fn rows_of_many_edits_are_chosen_from_in_parts() {
        let edit = |token| Edit { token, scale: 1.0, shift: 1.0 };
        let changes = |counts: &[u32]| {
            let mut changes = Edits::default();
            for &count in counts {
                let edits: Vec<Edit> = (0..count).map(edit).collect();
                changes.add_row(RowEdits { edits: &edits, mask: None });
            }
            changes
        };
        let parts = |counts: &[u32]| -> Vec<(usize, usize)> {
            parts(&changes(counts), 5, 10).into_iter().map(|part| (part.start, part.end)).collect()
        };
        assert_eq!(parts(&[]), [(0, 5)]);
        assert_eq!(parts(&[2; 5]), [(0, 5)]);
        assert_eq!(parts(&[10, 0, 1, 9, 1]), [(0, 2), (2, 4), (4, 5)]);
        assert_eq!(parts(&[10; 5]), [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]);
    }
}
